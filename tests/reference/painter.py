"""A worker without a model, for tests of what is shown of a queue: it takes jobs and leaves a run's files bit by bit.

What it draws is a red box on grey, in four views; a box seen from the side is a bar.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mvdream_fast.jobs.job import Job, Progress
from mvdream_fast.jobs.queue import Queue
from mvdream_fast.jobs.store import LocalStore
from mvdream_fast.jobs.workspace import Workspace
from mvdream_fast.scene.mesh.animation import save_animation
from mvdream_fast.scene.mesh.export import glb_bytes
from mvdream_fast.scene.mesh.mesh import Mesh

RED, GREY = (214, 40, 30), (128, 128, 128)
CORNERS = np.array([[x, y, z] for x in (-0.2, 0.2) for y in (-0.4, 0.4) for z in (-0.6, 0.6)], np.float32)
SIDES = np.array(
    [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4],
     [1, 5, 7], [1, 7, 3]]
)  # fmt: skip


def strip(rows: int = 1, filled: float = 1.0) -> Image.Image:
    """Four views of the box side by side, as large as `filled` says."""
    image = np.full((64 * rows, 256, 3), GREY, np.uint8)
    for view, half in enumerate((10, 20, 10, 20)):
        height, half = int(28 * filled), int(half * filled)
        image[32 - height : 32 + height, 64 * view + 32 - half : 64 * view + 32 + half] = RED
    return Image.fromarray(image)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def box() -> Mesh:
    colors = np.tile(np.float32(RED) / 255, (len(CORNERS), 1))
    return Mesh(CORNERS, SIDES, colors, CORNERS / np.linalg.norm(CORNERS, axis=1, keepdims=True))


class Painter:
    """One worker on the queue in `root`, which does a piece of work each time it is told to."""

    def __init__(self, root: Path):
        self.root, self.queue = root, Queue(LocalStore(root))
        self.lease = None

    def take(self) -> Job:
        """The next job, at work now."""
        self.queue.look()
        self.lease = self.queue.claim("painter")
        self.space = Workspace(self.queue.store, self.lease.job, self.lease.attempt, self.root)
        self.folder = self.space.begin()
        return self.lease.job

    def views(self) -> None:
        (self.folder / "views.png").write_bytes(png(strip()))

    def grow(self, done: int, total: int) -> None:
        """So many steps are done, and there is a preview."""
        (self.folder / "preview").mkdir(exist_ok=True)
        (self.folder / "preview" / f"{done:06d}.png").write_bytes(png(strip(3, done / total)))
        self.lease.heartbeat(Progress(done, total))

    def learn(self) -> None:
        for kind, name in (("photos", "00"), ("samples", "000400")):
            (self.folder / kind).mkdir(exist_ok=True)
            (self.folder / kind / f"{name}.png").write_bytes(png(strip()))
        (self.folder / "model").mkdir(exist_ok=True)

    def finish(self) -> None:
        if self.lease.job.kind == "sds":
            (self.folder / "mesh.glb").write_bytes(glb_bytes(box()))
            save_animation(np.stack([np.asarray(strip())] * 3), self.folder / "turntable.webp")
            (self.folder / "report.html").write_text("<script>alert(1)</script>")
        self.folder = self.root / self.space.publish()
        self.lease.finish()
