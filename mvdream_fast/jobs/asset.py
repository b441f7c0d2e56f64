"""One text-to-3D run in its folder with a model that is loaded: first views, the loop, then mesh, turntable and report.

`sds` makes one or several of them, a worker as many as come. Flags and queues are not known here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvdream_fast.core import machine, run_folder
from mvdream_fast.core.errors import DivergedError
from mvdream_fast.core.files import atomic_write, read_json
from mvdream_fast.core.images import png_bytes
from mvdream_fast.distill import run_memory
from mvdream_fast.distill.loop import Progress
from mvdream_fast.distill.progress import Watcher
from mvdream_fast.distill.report import write_report
from mvdream_fast.distill.request import Request, open_model
from mvdream_fast.distill.sampled import Sampler
from mvdream_fast.distill.state import GrownAsset
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.mesh.animation import has_video
from mvdream_fast.scene.mesh.export import save_mesh
from mvdream_fast.text_to_3d import TextTo3D

if TYPE_CHECKING:
    from mvdream_fast.distill.viewer import Viewer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Device:
    """Where a model is, and how it computes: what the flags of these names say."""

    device: str = "auto"
    dtype: str = "auto"
    graphs: bool = True

    def load(self, request: Request, stage: int = 0) -> MVDreamPipeline:
        """The model of a run's stage."""
        from mvdream_fast.checkpoints.open import load_model

        return MVDreamPipeline(load_model(open_model(request, stage)), self.device, self.dtype, self.graphs)

    def write_record(self, request: Request, folder: Path, argv: Sequence[str] | None = None) -> None:
        """What a run is, and where it was made, in its folder: --resume reads it. argv: as in run_folder."""
        device = machine.choose_device(self.device)
        dtype = str(machine.choose_dtype(self.dtype, device))[6:]
        run_folder.write_record(folder, "sds", request.to_dict(), "ckpt", argv, device=str(device), dtype=dtype)

    def refuse_what_does_not_fit(self, requests: Sequence[Request]) -> int:
        """Refuses a model that is not there and a run that will not have the memory, before anything is loaded. All
        requests ask the same models. Returns the bytes of the largest. Raises ModelError, OutOfMemoryError."""
        from mvdream_fast.checkpoints.open import PARTS

        device = machine.choose_device(self.device)
        dtype, gpu_memory = machine.choose_dtype(self.dtype, device), run_memory.memory_of(device)
        sources = [open_model(requests[0], stage) for stage in range(len(requests[0].config.stages))]
        for source in sources:
            for part in PARTS:
                source.check(part)
        largest = 0
        for config in {request.config: None for request in requests}:
            for stage, source in zip(config.stages, sources, strict=True):
                parts = run_memory.estimate(
                    source.config, stage, source.n_bytes(dtype), gpu_memory=gpu_memory,
                    encoder_bytes=machine.encoder_dtype(dtype, device).itemsize,
                    graphs=self.graphs and device.type == "cuda",
                )  # fmt: skip
                run_memory.check(parts, stage, str(device))
                largest = max(largest, sum(parts.values()))
        return largest


@dataclass(frozen=True)
class Way:
    """How a run is made, not what.

    keep: the pipeline makes other assets afterwards. refine: loads the model of later stages where they ask another.
    watch: called after every step, beside what the folder is told.
    """

    keep: bool
    refine: Callable[[], MVDreamPipeline]
    say: Say
    preview_every: int | None = None
    checkpoint_every: int = 100
    viewer: "Viewer | None" = None
    watch: Callable[[Progress], None] = lambda _: None


def sample_views(sampler: Sampler, request: Request, folder: Path) -> None:
    """views.png: four views as the model draws them, so that a bad prompt is seen before the long part."""
    views = sampler.first_views(request.prompt, request.config, request.seed)
    atomic_write(folder / "views.png", png_bytes(views.sheet()))


def optimise(sampler: Sampler, request: Request, folder: Path, way: Way, interrupt: run_folder.Interrupt) -> bool:
    """Runs the loop, from what `folder` holds on, and leaves everything there. False where it was interrupted: then it
    has saved. Raises DivergedError."""
    about = read_json(folder / "config.json")
    watcher = Watcher(folder, request.config, way.preview_every, way.say, way.viewer)
    try:
        asset = TextTo3D(sampler.pipeline, keep=way.keep, refine=way.refine, sampler=sampler)(
            request.prompt, seed=request.seed, config=request.config, callback=partial(_told, (watcher, way.watch)),
            checkpoints=folder / "ckpt", checkpoint_every=way.checkpoint_every, interrupt=interrupt,
        )  # fmt: skip
        if interrupt.requested is not None:
            write_report(folder, about, watcher.log.read(), ["The run was stopped before its end."])
            return False
        way.say("writing the mesh, the turntable and the report")
        export(asset, request, folder, about, watcher.log.read(), way.say)
    except DivergedError as error:
        write_report(folder, about, watcher.log.read(), [f"The run did not finish: {error}."])
        raise
    return True


def _told(listeners: Sequence[Callable[[Progress], None]], progress: Progress) -> None:
    for listener in listeners:
        listener(progress)


def export(
    asset: GrownAsset, request: Request, folder: Path, about: dict[str, Any], records: list[dict], say: Say
) -> None:
    """asset.safetensors, turntable, mesh in every format, report. Raises DivergedError where there is no surface."""
    wanted = request.export
    asset.save(folder / "asset.safetensors")
    asset.turntable(*[folder / f"turntable.{ending}" for ending in ("webp", "mp4") if ending == "webp" or has_video()])
    texture = asset.representation.usual_texture if wanted.texture is None else wanted.texture
    mesh = asset.mesh(wanted.mesh_resolution, wanted.faces, texture or None)
    notes = [mesh.describe()]
    for ending in dict.fromkeys(("glb", *wanted.formats)):
        save_mesh(mesh, folder / f"mesh.{ending}", wanted.up, notes.append)
    for lost in notes[1:]:
        say(lost)
    write_report(folder, about, records, notes, mesh)
