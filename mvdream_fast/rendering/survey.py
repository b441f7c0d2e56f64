"""The first look at every asset: is it readable, how much of the image it fills, its colours, its near-duplicates."""

from dataclasses import dataclass

import numpy as np

from mvdream_fast.data import captions
from mvdream_fast.rendering.mesh import Mesh
from mvdream_fast.rendering.orbits import look_at_origin

MIN_COVERAGE = 0.03
DUPLICATE_RMS = 0.02
GLASS = 0.6
SIZE = 48
AZIMUTHS = (0, 45, 135, 180, 225, 315)
THUMBNAIL_VIEWS = (0, 1, 3, 4)


@dataclass(frozen=True)
class Survey:
    """What planning needs to know of one asset; plain values, so that it can be stored as JSON."""

    coverage: float  # mean share of the image that the silhouette fills
    colors: dict[str, float]  # colour name -> share of the visible surface
    part_shares: list[float]  # visible share of each part
    part_colors: list[str]  # dominant colour name of each part, "" where it is not seen
    glass: list[int]  # parts that are less opaque than GLASS
    material: str | None
    thumbnail: list[int]  # four 16 x 16 views on grey, uint8, flattened
    notes: list[str]  # what of its file is not drawn
    extent: list[float]  # of the normalised mesh along x, y and z


def survey(mesh: Mesh, renderer) -> Survey:
    """Looks at a normalised mesh from six sides, without light."""
    c2w = np.stack([look_at_origin(a, 20, 1.03 / np.sin(np.radians(20))) for a in AZIMUTHS])
    fovy = np.full(len(AZIMUTHS), np.radians(40), np.float32)
    base = renderer.render(mesh, c2w, fovy, SIZE, samples=2, lit=False)
    ids = _part_ids(mesh, c2w, fovy, renderer)
    seen = base[..., 3] > 127
    rgb, owner = base[seen][:, :3] / 255, ids[seen]
    n_parts = len(mesh.parts)
    counts = np.bincount(owner[owner >= 0], minlength=n_parts)[:n_parts]
    colors = [_dominant(rgb[owner == i]) if counts[i] else "" for i in range(n_parts)]
    part_shares = (counts / max(counts.sum(), 1)).round(4).tolist()
    names = [(part.material, share) for part, share in zip(mesh.parts, part_shares)]
    return Survey(
        coverage=float((base[..., 3] / 255).mean()),
        colors={k: round(v, 4) for k, v in captions.shares(rgb).items()} if len(rgb) else {},
        part_shares=part_shares,
        part_colors=colors,
        glass=[i for i, part in enumerate(mesh.parts) if part.opacity < GLASS],
        material=captions.material_word(names),
        thumbnail=_thumbnail(base[list(THUMBNAIL_VIEWS)]),
        notes=list(mesh.notes),
        extent=_extent(mesh),
    )


def _extent(mesh: Mesh) -> list[float]:
    points = np.concatenate([part.positions for part in mesh.parts])
    return np.ptp(points, axis=0).round(4).tolist()


def _part_ids(mesh: Mesh, c2w, fovy, renderer) -> np.ndarray:
    """The index of the part seen at each pixel, -1 for none: the parts are drawn in colours that spell their index."""
    painted = mesh
    for i in range(len(mesh.parts)):
        code = np.array([i % 32, i // 32 % 32, i // 1024 % 32], np.float32) * 8 + 4
        painted = painted.recolored([i], code / 255, flat=True)
    image = renderer.render(painted.opaque(), c2w, fovy, SIZE, samples=1, lit=False)
    digits = image[..., :3].astype(np.int64) // 8
    return np.where(image[..., 3] > 0, digits @ np.array([1, 32, 1024]), -1)


def _dominant(rgb: np.ndarray) -> str:
    return next(iter(captions.shares(rgb)))


def _thumbnail(views: np.ndarray) -> list[int]:
    alpha = views[..., 3:] / 255
    flat = views[..., :3] * alpha + 128 * (1 - alpha)
    step = SIZE // 16
    small = flat.reshape(len(views), 16, step, 16, step, 3).mean((2, 4))
    return small.round().astype(np.uint8).reshape(-1).tolist()


def near_duplicates(thumbnails: np.ndarray) -> np.ndarray:
    """True for each [K, D] uint8 thumbnail that an earlier kept one equals up to an RMS of DUPLICATE_RMS."""
    rows = thumbnails.astype(np.float64)  # whole numbers: the squares below are exact
    squares = np.square(rows).sum(1)
    kept, n = np.empty_like(rows), 0
    drop = np.zeros(len(rows), bool)
    for i, row in enumerate(rows):
        distances = squares[~drop][:n] + squares[i] - 2 * kept[:n] @ row
        drop[i] = n > 0 and distances.min() < (255 * DUPLICATE_RMS) ** 2 * rows.shape[1]
        if not drop[i]:
            kept[n], n = row, n + 1
    return drop
