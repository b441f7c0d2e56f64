"""Fits a volume, a surface or tetrahedra to 24 images of a mesh: how do 8 other views come out, and its mesh?

    python examples/fit_volume.py MESH.glb [--representation volume surface tets] [--seconds 60] [--out fit]
    python examples/fit_volume.py FOLDER --name "teddy bear"   # of meshes, or Debian's sweethome3d-furniture, unpacked
    python examples/fit_volume.py FOLDER                       # ten of a folder with a metadata.csv: HELD_OUT

The images are drawn by a rasteriser in numpy, which shares nothing with what is fitted. Each fit has the same processor
time on one thread. The tetrahedra have, as in the recipes that end with them, a volume before: VOLUME_SHARE of their
time. Writes `fit.json` and `table.md`, the table; and `fit.png`, a view that was not fitted: the mesh above, below
it the meshes that were made, as they are exported. A fit that is in `fit.json` already is not made again.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mvdream_fast.camera import Cameras, Rays, generate_rays, orbit_cameras
from mvdream_fast.core.cli import set_threads
from mvdream_fast.core.errors import DivergedError
from mvdream_fast.core.files import atomic_write
from mvdream_fast.core.images import to_bytes
from mvdream_fast.core.rng import Stream
from mvdream_fast.ops import interpolate, rasterize
from mvdream_fast.rendering.catalogue import Entry, read_folder, read_sweethome3d
from mvdream_fast.rendering.mesh import Mesh as Drawn
from mvdream_fast.rendering.mesh_file import load_mesh
from mvdream_fast.rendering.software import NumpyRenderer
from mvdream_fast.scene.mesh.distance import surface_distance
from mvdream_fast.scene.mesh.mesh import Mesh
from mvdream_fast.scene.nerf.config import NerfConfig, VolumeConfig
from mvdream_fast.scene.nerf.nerf import Nerf
from mvdream_fast.scene.raster import clip_matrices
from mvdream_fast.scene.surface.config import SurfaceConfig
from mvdream_fast.scene.surface.surface import Surface
from mvdream_fast.scene.tets.config import TetsConfig
from mvdream_fast.scene.tets.tets import Tets

# The first file of each of these nouns of metadata.csv; the schedules were tried on the second chair alone.
HELD_OUT = ("chair", "bar stool", "table", "coffee table", "desk", "floor lamp", "bicycle", "horse", "tree", "robot")
KINDS = ("volume", "surface", "tets")
N_VIEWS, JUDGED = 32, range(2, 32, 4)  # 24 to fit, 8 to judge
FITTED = [i for i in range(N_VIEWS) if i not in JUDGED]
FOVY_DEG, SHOWN = 40.0, JUDGED[3]
RAYS_PER_STEP = 2048  # of a volume or a surface; tetrahedra are drawn as whole images
IMAGES_PER_STEP = 2
VOLUME_SHARE = 0.5
SPACING = 0.02  # of the samples that a distance's triangles are found with
N_POINTS = 20_000  # each way, of the Chamfer distance
LARGE = 512  # pixels of the view that is timed
MESH_RESOLUTION = 128  # cells a side that a volume's and a surface's mesh is taken from


class FineVolume:
    """A mini volume with a table of 2^17 entries a level and a density that begins low, so that there is no fog."""

    def volume_config(self) -> VolumeConfig:
        return replace(VolumeConfig.mini(), log2_size=17, bias_scale=2.0)


class VolumeFit(FineVolume, NerfConfig):
    """What a volume is fitted as."""


class SurfaceFit(FineVolume, SurfaceConfig):
    """What a surface is fitted as."""


class TetsFit(FineVolume, TetsConfig):
    """What tetrahedra are fitted as."""


COMMON = {"volume": "mini", "background": "white", "lr_encoding": 0.01, "lr_mlp": 0.005}
MARCHED = {"samples_per_ray": 256, "max_samples": 1 << 16}
VOLUME = VolumeFit(**COMMON | MARCHED | {"lr_encoding": 0.02, "lambda_opaque": (0.0, 1e-3, 1e-3, 0.0)})
SURFACE = SurfaceFit(
    **COMMON | MARCHED,
    sphere_radius=0.95,  # around all of the mesh: what is carved keeps thin parts, what grows has to reach them
    sdf_levels=(0.0, 6.0, 12.0, 200.0),
    cos_anneal=(0.0, 0.0, 1.0, 200.0),
    lambda_eikonal=(0.0, 0.1, 0.1, 0.0),
    lr_deviation=0.005,
)
TETS = TetsFit(**COMMON | {"lr_mlp": 0.002}, lambda_normal_consistency=(0.0, 0.01, 0.01, 0.0), lr_geometry=0.002)


@dataclass(frozen=True)
class Views:
    """A mesh from N_VIEWS sides: rgba [V, S, S, 4] with straight alpha in [0, 1]."""

    cameras: Cameras
    rgba: torch.Tensor

    @property
    def size(self) -> int:
        return self.rgba.shape[1]

    def some(self, chosen: list[int] | torch.Tensor) -> "Views":
        return Views(Cameras(self.cameras.c2w[chosen], self.cameras.fovy[chosen]), self.rgba[chosen])

    def rays(self) -> Rays:
        return generate_rays(self.cameras, self.size, self.size)


@dataclass(frozen=True)
class Score:
    """How a fit came out. iou and chamfer are the exported mesh's; without a surface it has neither."""

    name: str
    kind: str
    psnr: float
    iou: float
    chamfer: float
    steps: int
    seconds: float
    view_seconds: float


def main() -> None:
    args = parse_arguments()
    set_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = {args.source.stem: load_mesh(args.source)} if args.source.is_file() else load_named(args.source, args.name)
    record = args.out / "fit.json"
    scores = [Score(**row) for row in json.loads(record.read_text())] if record.exists() else []
    for i, (name, drawn) in enumerate(chosen.items()):
        target = drawn.normalised("sphere")
        views = draw(target, args.size)
        save_view(over(views.some([SHOWN]).rgba, torch.ones(3))[0], args.out / f"{name}-mesh.png")
        for kind in args.representation:
            if any((score.name, score.kind) == (name, kind) for score in scores):
                continue
            scores.append(fit_and_score(name, kind, target, views, args))
            print(row_of(scores[-1]), flush=True)
            atomic_write(record, json.dumps([asdict(score) for score in scores], indent=1).encode())
        atomic_write(args.out / "table.md", table(scores, args.representation).encode())
        save_sheet([*chosen][: i + 1], args)
    print(args.out / "table.md", args.out / "fit.png", sep="\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a mesh file, or a folder of meshes or of sweethome3d-furniture")
    parser.add_argument("--name", nargs="+", default=HELD_OUT, help="assets of the folder, by noun or name")
    parser.add_argument("--representation", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seconds", type=float, default=60, help="of processor time for each fit")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fit"), help="folder of table and picture")
    return parser.parse_args()


def load_named(folder: Path, names: list[str]) -> dict[str, Drawn]:
    """The first entry of the folder, in the order of its ids, for each noun or part of a name."""
    entries = read_sweethome3d(folder) if any(folder.rglob("*.sh3f")) else read_folder(folder)
    return {name.replace(" ", "-"): first_of(entries, name).load() for name in names}


def first_of(entries: list[Entry], name: str) -> Entry:
    kinds = [entry for entry in entries if entry.kind == name]
    found = kinds or [entry for entry in entries if name.lower() in entry.name.lower()]
    if not found:
        raise SystemExit(f"no asset of the folder is named {name!r}; try --name chair")
    return min(found, key=lambda entry: entry.id)


def draw(drawn: Drawn, size: int) -> Views:
    """Views all around by the golden angle, from 15 degrees below to 60 above; the unit ball fills the image."""
    distance = 1.02 / math.sin(math.radians(FOVY_DEG / 2))
    poses = [
        orbit_cameras(1, -15 + 75 * i / (N_VIEWS - 1), 137.508 * i, distance=distance, fovy_deg=FOVY_DEG)
        for i in range(N_VIEWS)
    ]
    cameras = Cameras(torch.cat([pose.c2w for pose in poses]), torch.cat([pose.fovy for pose in poses]))
    images = NumpyRenderer().render(drawn, cameras.c2w.numpy(), cameras.fovy.numpy(), size)
    return Views(cameras, torch.from_numpy(images.astype(np.float32) / 255))


def over(rgba: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    return rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:]) * background


Batch = Callable[[Stream], tuple[Rays, torch.Tensor]]  # a step's rays [R] and what they show, [R, 4]


def rays_of_all(views: Views) -> Batch:
    """Rays drawn from all images."""
    rays, pixels = views.rays(), views.rgba.reshape(-1, 4)

    def batch(stream: Stream) -> tuple[Rays, torch.Tensor]:
        chosen = stream.integers(0, len(pixels), RAYS_PER_STEP)
        return Rays(rays.rays_o[chosen], rays.rays_d[chosen]), pixels[chosen]

    return batch


def whole_images(views: Views) -> Batch:
    """Whole images, drawn from all."""

    def batch(stream: Stream) -> tuple[Rays, torch.Tensor]:
        some = views.some(stream.integers(0, len(views.rgba), IMAGES_PER_STEP))
        return some.rays(), some.rgba.reshape(-1, 4)

    return batch


def fit(shape: Nerf | Tets, batch: Batch, until: float, seed: int) -> int:
    """Optimises until the processor's time is `until`; a new colour stands behind each step, so that emptiness must be
    transparent. Learning rates fall with the time, as a cosine. Returns the number of steps."""
    optimizer = torch.optim.Adam(shape.parameter_groups(), betas=(0.9, 0.99), eps=1e-15, fused=True)
    rates, begun, step = [group["lr"] for group in optimizer.param_groups], time.process_time(), 0
    while (now := time.process_time()) < until:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (now - begun) / (until - begun)))
        stream = Stream(seed, step, "fit")
        rays, pixels = batch(stream)
        shape.background.color = stream.uniform(3)
        out = shape.render(rays, stream, training=True)
        error = (out.rgb - over(pixels, shape.background.color)).square().mean()
        missed = (out.opacity - pixels[:, 3]).square().mean()
        optimizer.zero_grad()
        (error + missed + shape.regularizers(out, rays, step)).backward()
        optimizer.step()
        shape.after_step(step, Stream(seed, step, "occupancy"))
        step += 1
    return step


def fitted(kind: str, views: Views, seconds: float, seed: int) -> tuple[Nerf | Tets, int]:
    """The shape after `seconds` of processor time, and its steps."""
    begun = time.process_time()
    stream = Stream(seed, 0, "volume")
    shape = Surface(SURFACE, stream) if kind == "surface" else Nerf(VOLUME, stream)
    share = VOLUME_SHARE if kind == "tets" else 1
    steps = fit(shape, rays_of_all(views), begun + share * seconds, seed)
    if kind == "tets":
        shape = Tets.from_representation(TETS, shape, seed)
        steps += fit(shape, whole_images(views), begun + seconds, seed)
    shape.background.color = torch.ones(3)
    return shape, steps


def fit_and_score(name: str, kind: str, target: Drawn, views: Views, args: argparse.Namespace) -> Score:
    begun = time.process_time()
    shape, steps = fitted(kind, views.some(FITTED), args.seconds, args.seed)
    seconds = time.process_time() - begun
    unseen = views.some([*JUDGED])
    with torch.no_grad():
        rgb = shape.render(unseen.rays()).rgb.reshape(*unseen.rgba.shape[:3], 3)
        begun = time.process_time()
        shape.render(generate_rays(views.some([SHOWN]).cameras, LARGE, LARGE))
        view_seconds = time.process_time() - begun
    psnr = -10 * torch.log10((rgb - over(unseen.rgba, torch.ones(3))).square().mean((1, 2, 3))).mean().item()
    try:
        mesh = shape.mesh(MESH_RESOLUTION)
    except DivergedError:
        save_view(torch.ones(views.size, views.size, 3), args.out / f"{name}-{kind}.png")
        return Score(name, kind, psnr, 0.0, math.inf, steps, seconds, view_seconds)
    save_view(picture(mesh, views.some([SHOWN])), args.out / f"{name}-{kind}.png")
    return Score(
        name,
        kind,
        psnr,
        silhouette_iou(mesh, unseen),
        chamfer(mesh, whole(target), views.cameras),
        steps,
        seconds,
        view_seconds,
    )


def whole(drawn: Drawn) -> Mesh:
    """All parts as one mesh, without colours."""
    starts = np.cumsum([0, *[len(part.positions) for part in drawn.parts]])
    vertices = np.concatenate([part.positions for part in drawn.parts])
    faces = np.concatenate([part.faces + start for part, start in zip(drawn.parts, starts)]).astype(np.int32)
    return Mesh(vertices, faces, np.zeros_like(vertices))


def seen(mesh: Mesh, cameras: Cameras, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and colours [V, S, S, 6] of what the pixels show of a mesh, and which do, [V, S, S]."""
    vertices, faces = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces)
    matrices = clip_matrices(cameras, (size, size), 2.0)
    clip = vertices @ matrices[:, :, :3].transpose(1, 2) + matrices[:, None, :, 3]
    rast, _ = rasterize(clip, faces, (size, size))
    attributes, _ = interpolate(torch.cat([vertices, torch.from_numpy(mesh.colors)], 1), rast, faces)
    return attributes, rast[..., 3] > 0


def silhouette_iou(mesh: Mesh, views: Views) -> float:
    """The overlap of silhouettes, over all images together."""
    covered, wanted = seen(mesh, views.cameras, views.size)[1], views.rgba[..., 3] > 0.5
    return ((covered & wanted).sum() / (covered | wanted).sum()).item()


def chamfer(mesh: Mesh, target: Mesh, cameras: Cameras) -> float:
    """The mean of both mean distances from the points of one mesh that can be seen to the other mesh."""
    return sum(one_way(a, b, cameras) for a, b in ((mesh, target), (target, mesh))) / 2


def one_way(mesh: Mesh, other: Mesh, cameras: Cameras) -> float:
    attributes, covered = seen(mesh, cameras, 128)
    points = attributes[covered][:, :3]
    chosen = Stream(0, 0, "chamfer").integers(0, len(points), N_POINTS)
    return float(surface_distance(points[chosen].numpy(), other, SPACING, reach=2.0).mean())


def picture(mesh: Mesh, view: Views) -> torch.Tensor:
    """A mesh as it is exported, with its colours in front of white, 4 x 4 rays a pixel: [S, S, 3]."""
    attributes, covered = seen(mesh, view.cameras, 4 * view.size)
    image = torch.where(covered[..., None], attributes[..., 3:], torch.ones(3)).movedim(-1, 1)
    return torch.nn.functional.avg_pool2d(image, 4)[0].movedim(0, -1)


def save_view(image: torch.Tensor, path: Path) -> None:
    Image.fromarray(to_bytes(image)).save(path)


def save_sheet(names: list[str], args: argparse.Namespace) -> None:
    """A column for each mesh, what was made of it below."""
    columns = [[f"{name}-{row}.png" for row in ("mesh", *args.representation)] for name in names]
    images = [np.concatenate([np.asarray(Image.open(args.out / file)) for file in column]) for column in columns]
    Image.fromarray(np.concatenate(images, 1)).save(args.out / "fit.png")


def row_of(score: Score) -> str:
    numbers = (
        f"{score.psnr:.2f} | {score.iou:.3f} | {1000 * score.chamfer:.1f} | {score.steps} | {score.view_seconds:.2f}"
    )
    return f"| {score.name} | {score.kind} | {numbers} |"


def table(scores: list[Score], kinds: list[str]) -> str:
    """Markdown: each fit, then the means of each kind."""
    head = [
        "| mesh | shape | PSNR, dB | IoU | Chamfer, 1/1000 | steps | large view, s |",
        "|---|---|---|---|---|---|---|",
    ]
    means = []
    for kind in kinds:
        own = [score for score in scores if score.kind == kind]
        numbers = [sum(getattr(s, field) for s in own) / len(own) for field in list(asdict(own[0]))[2:]]
        means.append(row_of(Score(f"mean of {len(own)}", kind, *numbers[:3], round(numbers[3]), *numbers[4:])))
    names = [score.name for score in scores]
    rows = sorted(scores, key=lambda score: (names.index(score.name), KINDS.index(score.kind)))
    return "\n".join([*head, *map(row_of, rows), *means, ""])


if __name__ == "__main__":
    main()
