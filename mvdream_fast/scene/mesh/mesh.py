"""From a density field to a coloured triangle mesh: iso-surface, its threshold, clean-up, decimation.

Positions are in scene units, world z-up with the front at -Y (camera.py). Files are written by export.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mvdream_fast.core.errors import DivergedError

DensityFn = Callable[[torch.Tensor], torch.Tensor]  # [P, 3] -> [P]
ColorFn = Callable[[torch.Tensor], torch.Tensor]  # [P, 3] -> [P, 3] in [0, 1], sRGB

CHUNK = 1 << 17
# How fast the loss that an edge may cost grows from pass to pass; the first is the simplifier's own, with which it may
# give up before very small numbers.
AGGRESSIONS = (7, 10, 14)


@dataclass(frozen=True)
class Mesh:
    """Triangles in scene units with a colour a vertex (sRGB in [0, 1]), and a texture where one was baked."""

    vertices: np.ndarray  # [n, 3] float32
    faces: np.ndarray  # [m, 3] int32, counter-clockwise from outside
    colors: np.ndarray  # [n, 3] float32
    normals: np.ndarray | None = None  # [n, 3] float32; None: from the faces around
    uvs: np.ndarray | None = None  # [n, 2] float32, from the lower left
    texture: np.ndarray | None = None  # [T, T, 3] uint8, sRGB, the top row first

    def n_open_edges(self) -> int:
        """Edges that not as many triangles pass one way as the other; a watertight mesh has none.

        Vertices of one place are one: the seams of a texture open nothing.
        """
        _, place = np.unique(self.vertices, axis=0, return_inverse=True)
        corners = place.reshape(-1)[self.faces]  # [m, 3]
        ends = np.stack([corners, np.roll(corners, -1, 1)], -1).reshape(-1, 2)
        _, edge = np.unique(np.sort(ends, axis=1), axis=0, return_inverse=True)
        ways = np.sign(ends[:, 1] - ends[:, 0])
        return int(np.count_nonzero(np.bincount(edge.reshape(-1), ways)))

    def describe(self) -> str:
        """Its size, what its colours are, and whether it is watertight."""
        texture = "" if self.texture is None else ", a texture of {} x {}".format(*self.texture.shape)
        n_open = self.n_open_edges()
        closed = "watertight" if not n_open else f"not watertight: it is open at {n_open} edges"
        return f"{len(self.vertices)} vertices, {len(self.faces)} triangles{texture}; {closed}"


def sample_grid(density_fn: DensityFn, resolution: int, radius: float) -> np.ndarray:
    """Densities on a regular grid over [-radius, radius]^3 that includes its borders, G = `resolution` points a side
    and so one cell fewer: [G, G, G] float32, axes xyz."""
    axis = torch.linspace(-radius, radius, resolution)
    points = torch.cartesian_prod(axis, axis, axis)  # [G^3, 3]
    with torch.no_grad():
        values = torch.cat([density_fn(chunk) for chunk in points.split(CHUNK)])
    return values.float().cpu().numpy().reshape(resolution, resolution, resolution)


def trilinear(grid: np.ndarray, positions: torch.Tensor, radius: float) -> torch.Tensor:
    """The grid's value at positions [..., 3]; 0 outside the box. This is the function whose iso-surface the mesh is."""
    volume = torch.from_numpy(grid)[None, None]
    # grid_sample wants (x, y, z) to index (last, middle, first) axis: ours are stored x first.
    where = (positions.cpu() / radius).flip(-1).reshape(1, -1, 1, 1, 3)
    values = torch.nn.functional.grid_sample(volume, where, align_corners=True, padding_mode="zeros")
    return values.reshape(positions.shape[:-1])


def silhouette_threshold(
    grid: np.ndarray, radius: float, rays_o: torch.Tensor, rays_d: torch.Tensor, opacity: torch.Tensor
) -> tuple[float, float]:
    """The density level whose surface's silhouette agrees best with the rendered one, and their IoU.

    The rendered one is where a ray's opacity is more than half of the largest: of a volume that is fog throughout, and
    so nowhere half opaque, there is a surface, too.

    A ray meets the surface {density = level} exactly when the largest density along it exceeds the level, so the
    silhouettes of all levels follow from one pass over the rays; no mesh is made to find the level.

    Args:
        rays_o, rays_d: [R, 3]; opacity: [R], the volume's rendered opacity of those rays.
    """
    distance = rays_o.norm(dim=-1, keepdim=True)
    steps = torch.linspace(-1.0, 1.0, 2 * grid.shape[0]) * radius * 3**0.5
    peak = torch.cat(
        [
            trilinear(grid, o[:, None] + (d_o[:, None] + steps[None, :, None]) * d[:, None], radius).amax(dim=1)
            for o, d, d_o in zip(rays_o.split(2048), rays_d.split(2048), distance.split(2048), strict=True)
        ]
    ).numpy()  # [R]
    solid = (opacity > opacity.max() / 2).cpu().numpy()  # of fog, where it is densest
    order = np.argsort(-peak)
    # With the rays sorted by their peak, the surface at level peak[k] covers the first k+1 of them.
    inside = np.cumsum(solid[order])
    covered = np.arange(1, len(order) + 1)
    iou = inside / np.maximum(covered + solid.sum() - inside, 1)
    best = int(np.argmax(iou))
    upper, lower = peak[order[best]], peak[order[min(best + 1, len(order) - 1)]]
    return float((upper + lower) / 2), float(iou[best])


def extract_mesh(
    density_fn: DensityFn,
    color_fn: ColorFn,
    *,
    radius: float,
    threshold: float,
    resolution: int = 128,
    grid: np.ndarray | None = None,
    min_part: float = 0.01,
    max_faces: int | None = None,
) -> Mesh:
    """Marching cubes at `threshold`, closed at the box; parts with less than `min_part` of all faces are dropped.

    Raises DivergedError when the field has no surface there.
    """
    grid = sample_grid(density_fn, resolution, radius) if grid is None else grid
    vertices, faces = _iso_surface(grid, threshold, radius)
    vertices, faces = _drop_small_parts(vertices, faces, min_part)
    return colored_mesh(vertices, faces, color_fn, max_faces)


def colored_mesh(vertices: np.ndarray, faces: np.ndarray, color_fn: ColorFn, max_faces: int | None = None) -> Mesh:
    """Triangles with colours and normals there. vertices: [n, 3]; faces: [m, 3], simplified to at most `max_faces`, or
    where the shape allows no so few, as few as there can be; None and 0 keep them all."""
    if max_faces and len(faces) > max_faces:
        vertices, faces = _decimate(vertices, faces, max_faces)
    with torch.no_grad():
        points = torch.from_numpy(vertices)
        colors = torch.cat([color_fn(chunk) for chunk in points.split(CHUNK)]).clamp(0, 1)
    return Mesh(vertices, faces, colors.float().cpu().numpy(), smooth_normals(vertices, faces))


def smooth_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals at the vertices [n, 3] float32: the mean of the faces around, weighted by their area; up where that
    is no direction."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    of_faces = np.cross(b - a, c - a)
    normals = np.zeros(vertices.shape, dtype=np.float64)
    for k in range(3):
        np.add.at(normals, faces[:, k], of_faces)
    normals[np.linalg.norm(normals, axis=1) < 1e-20] = 0, 0, 1
    return (normals / np.linalg.norm(normals, axis=1, keepdims=True)).astype(np.float32)


def _iso_surface(grid: np.ndarray, threshold: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    from skimage.measure import marching_cubes

    if not np.isfinite(grid).all():
        raise DivergedError("the density field holds numbers that are not finite; no mesh can be made from it")
    if not grid.min() < threshold < grid.max():
        raise DivergedError(
            f"the density field has no surface at {threshold:.3g} (it spans {grid.min():.3g} to {grid.max():.3g}); "
            "the volume is empty or full"
        )
    # A shell below the threshold closes surfaces that leave the box.
    padded = np.pad(grid, 1, constant_values=min(float(grid.min()), threshold - 1.0))
    cell = 2 * radius / (grid.shape[0] - 1)
    vertices, faces, _, _ = marching_cubes(padded, threshold, spacing=(cell,) * 3, gradient_direction="ascent")
    return (vertices - radius - cell).astype(np.float32), faces.astype(np.int32)


def _drop_small_parts(vertices: np.ndarray, faces: np.ndarray, min_part: float) -> tuple[np.ndarray, np.ndarray]:
    """Keeps connected parts with at least `min_part` of all faces: floaters go, separate legs stay."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(faces) * 2, dtype=bool)
    edges = np.concatenate([faces[:, :2], faces[:, 1:]])
    graph = coo_matrix((ones, (edges[:, 0], edges[:, 1])), shape=(len(vertices),) * 2)
    _, label = connected_components(graph, directed=False)
    part = label[faces[:, 0]]
    keep = (np.bincount(part, minlength=label.max() + 1) >= min_part * len(faces))[part]
    used, faces = np.unique(faces[keep], return_inverse=True)
    return vertices[used], faces.reshape(-1, 3).astype(np.int32)


def _decimate(vertices: np.ndarray, faces: np.ndarray, max_faces: int) -> tuple[np.ndarray, np.ndarray]:
    from fast_simplification import simplify

    fewer = vertices, faces
    for aggression in AGGRESSIONS:
        fewer = simplify(vertices, faces, target_count=max_faces, agg=aggression)
        if len(fewer[1]) <= max_faces:
            break
    return np.ascontiguousarray(fewer[0], dtype=np.float32), np.ascontiguousarray(fewer[1], dtype=np.int32)
