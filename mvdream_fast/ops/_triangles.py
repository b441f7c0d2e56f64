"""What the rasteriser's ops share: checks of meshes, and in plain torch which triangle each pixel shows.

That is the fill rule of `rasterize` and its clipping, for the references. No kernel is called.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mvdream_fast.ops._edges import check_shaped, check_tensors, require

MOST_FACES = 1 << 24  # a face's number is a float32
SUBPIXELS = 4096  # a pixel's side in the whole numbers that vertices are snapped to
GUARD = 1 << 15  # pixels from the middle of the screen; what lies farther out is clipped there
DEPTH_STEPS = 2.0**39
CANDIDATES = 1 << 20  # (triangle, pixel) pairs looked at in one go


class Pieces(NamedTuple):
    """Triangles on the screen, parts of faces: face [M]; x, y [M, 3] int64 in subpixels; depth [M, 3] float64."""

    face: Tensor
    x: Tensor
    y: Tensor
    depth: Tensor


def check_faces(op: str, tri: Tensor) -> None:
    """Raises where `tri` is no list of triangles by shape, type and length; its numbers are not read."""
    check_indices(op, "tri", tri, (None, 3))
    require(len(tri) <= MOST_FACES, op, "tri", f"at most {MOST_FACES} triangles", len(tri), "split the mesh")


def check_indices(op: str, name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    """An int32 tensor of this shape; None stands for any length."""
    check_tensors(op, **{name: x})
    require(x.dtype == torch.int32, op, name, "int32", x.dtype, "convert it with .int()", TypeError)
    fits = x.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, x.shape))
    wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
    require(fits, op, name, f"of shape {wanted}", list(x.shape), "reshape it")


def check_as(op: str, name: str, x: Tensor, shape: tuple[int | None, ...], other: str, like: Tensor) -> None:
    """A tensor of this shape and of the dtype of another argument."""
    check_shaped(op, name, x, shape)
    require(x.dtype == like.dtype, op, name, f"{like.dtype} like {other}", x.dtype, "convert one", TypeError)


def check_rast(op: str, rast: Tensor) -> None:
    """Raises where `rast` is not what `rasterize` returns, by shape and type; its numbers are not read."""
    check_shaped(op, "rast", rast, (None, None, None, 4))


def covering_faces(pos: Tensor, tri: Tensor, resolution: tuple[int, int]) -> Tensor:
    """[Hp, Wp] int64: the nearest triangle of each pixel plus 1, 0 for none. pos: [V, 4] float64."""
    height, width = resolution
    nearest = torch.full((height * width,), torch.inf, dtype=torch.float64, device=pos.device)
    first = torch.full_like(nearest, len(tri), dtype=torch.int64)
    pieces = _pieces(pos, tri, resolution)
    covered = list(_covered(pieces, resolution))
    for pixel, depth, _ in covered:
        nearest.scatter_reduce_(0, pixel, depth, "amin")
    for pixel, depth, face in covered:
        seen = depth == nearest[pixel]
        first.scatter_reduce_(0, pixel[seen], face[seen], "amin")
    return torch.where(first < len(tri), first + 1, 0).reshape(height, width)


def _pieces(pos: Tensor, tri: Tensor, resolution: tuple[int, int]) -> Pieces:
    planes = _planes(resolution).to(pos.device)
    corners = pos[tri.long()]  # [F, 3, 4]
    whole = (corners @ planes.T >= 0).all(-1).all(-1)
    polygons = [(corners[whole], whole.nonzero()[:, 0])]
    for face in (~whole).nonzero()[:, 0].tolist():
        polygon = _clip(corners[face], planes)
        for k in range(2, len(polygon)):
            polygons.append((polygon[[0, k - 1, k]][None], torch.tensor([face], device=pos.device)))
    corners = torch.cat([triangle for triangle, _ in polygons])
    return Pieces(torch.cat([face for _, face in polygons]), *_snap(corners, resolution))


def _planes(resolution: tuple[int, int]) -> Tensor:
    """[6, 4]: near, far, left, right, bottom, top of what is not clipped; a point p is inside where plane . p >= 0."""
    x, y = (2 * GUARD / n for n in reversed(resolution))
    rows = [[0, 0, 1, 1], [0, 0, -1, 1], [1, 0, 0, x], [-1, 0, 0, x], [0, 1, 0, y], [0, -1, 0, y]]
    return torch.tensor(rows, dtype=torch.float64)


def _clip(polygon: Tensor, planes: Tensor) -> Tensor:
    """What of a polygon [n, 4] lies inside of all planes [6, 4] (Sutherland and Hodgman)."""
    for plane in planes:
        kept, inside = [], (polygon @ plane).tolist()
        for i, (p, d) in enumerate(zip(polygon, inside)):
            q, e = polygon[(i + 1) % len(polygon)], inside[(i + 1) % len(polygon)]
            if d >= 0:
                kept.append(p)
            if d >= 0 > e:
                kept.append(p + d / (d - e) * (q - p))
            elif e >= 0 > d:  # always from the inside, as the triangle on the other side of the edge does it
                kept.append(q + e / (e - d) * (p - q))
        if len(kept) < 3:
            return polygon[:0]
        polygon = torch.stack(kept)
    return polygon


def _snap(corners: Tensor, resolution: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """x, y in whole subpixels from the centre of pixel (0, 0), and z/w, of corners [M, 3, 4]."""
    height, width = resolution
    x, y, z, w = corners.unbind(-1)
    x, y = (
        (((t / w) * 0.5 + 0.5) * n * SUBPIXELS + 0.5).floor().long() - SUBPIXELS // 2
        for t, n in ((x, width), (y, height))
    )
    return x, y, z / w


def _covered(pieces: Pieces, resolution: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(pixel, depth, face) of all pixels whose centres lie in pieces, some CANDIDATES at a time."""
    low, span = [], []
    for at, n in ((pieces.x, resolution[1]), (pieces.y, resolution[0])):
        first = (-(-at.amin(1) // SUBPIXELS)).clamp(0, n)  # of the pixels whose centres may be inside
        low.append(first)
        span.append(((at.amax(1) // SUBPIXELS).clamp(-1, n - 1) - first + 1).clamp(min=0))
    counts = span[0] * span[1]
    ends = counts.cumsum(0)
    start = 0
    while start < len(counts):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(ends, before + CANDIDATES, right=True)))
        piece = torch.repeat_interleave(torch.arange(start, stop, device=counts.device), counts[start:stop])
        nth = torch.arange(len(piece), device=counts.device) - (ends - counts)[piece] + before
        column, row = low[0][piece] + nth % span[0][piece], low[1][piece] + nth // span[0][piece]
        yield _inside(pieces, piece, column, row, resolution[1])
        start = stop


def _inside(pieces: Pieces, piece: Tensor, column: Tensor, row: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    x, y = pieces.x[piece], pieces.y[piece]  # [K, 3]
    px, py = column[:, None] * SUBPIXELS, row[:, None] * SUBPIXELS
    area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (y[:, 1] - y[:, 0]) * (x[:, 2] - x[:, 0])
    turn = area.sign()[:, None]  # the same test for clockwise triangles, with all edges reversed
    dx, dy = turn * (x.roll(-1, 1) - x), turn * (y.roll(-1, 1) - y)
    edge = dx * (py - y) - dy * (px - x)  # [K, 3], of whole numbers
    left_or_top = (dy < 0) | ((dy == 0) & (dx < 0))
    kept = ((edge > 0) | ((edge == 0) & left_or_top)).all(1) & (area != 0)
    piece, column, row, area = piece[kept], column[kept], row[kept], area[kept]
    x, y, depth = x[kept].double(), y[kept].double(), pieces.depth[piece]
    rise = depth[:, 1:] - depth[:, :1]
    slope_x = (rise[:, 0] * (y[:, 2] - y[:, 0]) - rise[:, 1] * (y[:, 1] - y[:, 0])) / area
    slope_y = (rise[:, 1] * (x[:, 1] - x[:, 0]) - rise[:, 0] * (x[:, 2] - x[:, 0])) / area
    at = depth[:, 0] + slope_x * (column * SUBPIXELS - x[:, 0]) + slope_y * (row * SUBPIXELS - y[:, 0])
    return row * width + column, (at * DEPTH_STEPS).round() / DEPTH_STEPS, pieces.face[piece]
