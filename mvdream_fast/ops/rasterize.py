"""Triangles to pixels: which triangle each pixel shows, where in it, and how fast that changes from pixel to pixel.

Conventions are nvdiffrast's, so that one can stand for the other. Blending attributes is `interpolate`, gradients of
silhouettes are `antialias`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvdream_fast.ops._edges import (
    BACKENDS,
    address,
    check_same_device,
    check_shaped,
    is_batched,
    load_native,
    new_result,
    plain32,
    queue_of,
    require,
    runs_natively,
    vmap_error,
)
from mvdream_fast.ops._registered import differentiable, register
from mvdream_fast.ops._triangles import check_faces, covering_faces

MOST_PIXELS = 1 << 14  # of a side
FRAGMENTS = 1 << 20  # handed out at a time


class Rasterized(NamedTuple):
    """What `rasterize` returns: rast [B, Hp, Wp, 4] and rast_db [B, Hp, Wp, 4]."""

    rast: Tensor
    rast_db: Tensor


class Fragments(NamedTuple):
    """Triangles at pixels: face [K] and pixel [K] (row * Wp + column) int64, values [K, 3] (u, v, z/w)."""

    face: Tensor
    pixel: Tensor
    values: Tensor


def rasterize(pos: Tensor, tri: Tensor, resolution: tuple[int, int]) -> Rasterized:
    """The nearest triangle at the centre of every pixel, with barycentric coordinates, depth and their slopes.

    pos: [V, 4] (one image) or [B, V, 4] (an image each), clip space (x, y, z, w). tri: [F, 3] int32, both sides show.
    resolution: (Hp, Wp), at most 16384 each.

    Row 0 is the bottom, y = -1; pixel (i, j) has its centre at ((i + 0.5) 2 / Wp - 1, (j + 0.5) 2 / Hp - 1) after the
    division by w. What lies outside of -w <= z <= w is cut off there. Vertices are snapped to 1/4096 of a pixel, and a
    centre on an edge belongs to the triangle of which that is a left or top edge: two triangles at an edge share no
    pixel and leave none out. Of surfaces within 2^-39 of one depth the triangle that comes first in tri is seen.

    Returns: rast: (u, v, z/w, triangle + 1), u and v the perspective-correct weights of a triangle's first and second
    corner; zeros where there is none. rast_db: (du/dX, du/dY, dv/dX, dv/dY) with X and Y in pixels.

    Differentiable in pos through u, v and rast_db, not through z/w, and not through which triangle is seen: that is
    what `antialias` is for. A second time through the plain-torch reference. float32 runs natively, on a CPU with the
    same bits for any number of threads; float64 is plain torch. On CUDA vertices that are no numbers and triangles
    without vertices are left out instead of refused, which would wait for the GPU.

    Raises: ValueError, TypeError, RuntimeError for unfitting arguments, vertices that are no numbers (CPU), and
    triangles whose vertices there are not (CPU).
    Source: Laine et al., Modular Primitives for High-Performance Differentiable Rendering (2020), section 3.
    """
    height, width = _check(pos, tri, resolution)
    images = pos if pos.ndim == 3 else pos[None]
    if torch.compiler.is_compiling() and pos.dtype == torch.float32:
        return Rasterized(*torch.ops.mvdream_fast.rasterize(images, tri, height, width))
    if not runs_natively(images, devices=BACKENDS):
        _check_values(images, tri)
        return rasterize_ref(images, tri, (height, width))
    return Rasterized(*_Rasterize.apply(images, tri, height, width))


def fragments(pos: Tensor, tri: Tensor, resolution: tuple[int, int]) -> Iterator[Fragments]:
    """Every triangle at every pixel that it covers by the rules of `rasterize`, seen or not, in the order of tri.

    For what blends or has holes. Some FRAGMENTS at a time, never less than a triangle's; not differentiable.
    pos: [V, 4] float32 on a CPU. tri: [F, 3] int32. resolution: (Hp, Wp).
    """
    height, width = _check(pos, tri, resolution)
    fits = pos.ndim == 2 and pos.dtype == torch.float32 and not pos.is_cuda
    require(fits, "fragments", "pos", "[V, 4] float32 on a CPU", f"{list(pos.shape)} {pos.dtype}", "convert it")
    pos, tri = plain32(pos), tri.contiguous()
    native, queue = load_native("fragments"), queue_of(pos)
    meshes, counts = meshes_of(pos[None], tri, height, width), torch.empty(len(tri), dtype=torch.int64)
    _refuse("fragments", native.fragment_counts(meshes, address(counts), queue), len(pos))
    ends = counts.cumsum(0)
    starts, first = ends - counts, 0
    while first < len(tri):
        end = max(first + 1, int(torch.searchsorted(ends, starts[first] + FRAGMENTS, right=True)))
        n = int(ends[end - 1] - starts[first])
        face, pixel = torch.empty(2, n, dtype=torch.int64)
        values = torch.empty(n, 3)
        native.fragment_fill(meshes, address(starts), [first, end], [*map(address, (face, pixel, values))], queue)
        yield Fragments(face, pixel, values)
        first = end


def rasterize_ref(pos: Tensor, tri: Tensor, resolution: tuple[int, int]) -> Rasterized:
    """The same in plain torch for pos [B, V, 4]; differentiable any number of times."""
    with torch.no_grad():
        ids = torch.stack([covering_faces(image, tri, resolution) for image in pos.double()] or [_nobody(resolution)])
        ids = ids[: len(pos)]
    covered = ids > 0
    image, row, column = covered.nonzero().unbind(-1)
    corners = tri.long()[ids[covered] - 1]  # [K, 3]
    outputs, slopes = _at_pixels(pos[image[:, None], corners], row, column, resolution)
    places = (image, row, column)
    number = ids[covered].to(pos.dtype)
    rast = pos.new_zeros(*ids.shape, 4).index_put(places, torch.cat([outputs, number[:, None]], -1))
    return Rasterized(rast, pos.new_zeros(*ids.shape, 4).index_put(places, slopes))


def _nobody(resolution: tuple[int, int]) -> Tensor:
    return torch.zeros(resolution, dtype=torch.int64)


def _at_pixels(corners: Tensor, row: Tensor, column: Tensor, resolution: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(u, v, z/w) [K, 3] and (du/dX, du/dY, dv/dX, dv/dY) [K, 4] of pixels in triangles with corners [K, 3, 4].

    Homogeneous: with the corners' x - X w and y - Y w at a pixel's place (X, Y), the areas of the three triangles that
    it makes with two corners are in the ratio of its perspective-correct weights.
    """
    height, width = resolution
    size = corners.new_tensor([width, height])
    place = (torch.stack([column, row], -1) + 0.5).to(corners.dtype) * 2 / size - 1  # [K, 2]
    x, y, z, w = corners.unbind(-1)
    x, y = x - place[:, :1] * w, y - place[:, 1:] * w
    x1, y1, w1, x2, y2, w2 = (t.roll(-n, 1) for n in (1, 2) for t in (x, y, w))  # the next corner, and the one after
    area = x1 * y2 - y1 * x2  # [K, 3]
    slope = torch.stack([w2 * y1 - w1 * y2, w1 * x2 - w2 * x1], -1)  # [K, 3, 2], d area / d place
    total = area.sum(-1, keepdim=True)
    flat = total == 0
    inverse = torch.where(flat, 0, 1 / torch.where(flat, 1, total))
    weights = (area * inverse)[:, :2]
    slopes = (slope[:, :2] - weights[..., None] * slope.sum(1, keepdim=True)) * inverse[..., None] * (2 / size)
    depth = (area * z).sum(-1, keepdim=True) / (area * w).sum(-1, keepdim=True)
    within = weights.detach().clamp(0, 1)
    within = within / within.sum(-1, keepdim=True).clamp(min=1)
    weights = weights + (within - weights.detach())  # clamped, with the gradient of what is not
    depth = depth.detach().nan_to_num(0).clamp(-1, 1)
    return torch.cat([weights, depth], -1), slopes.flatten(1)


def _forward(pos: Tensor, tri: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    pos, tri = pos.contiguous(), tri.contiguous()
    rast, rast_db = (new_result(pos, len(pos), height, width, 4) for _ in range(2))
    native = load_native("rasterize", pos)
    status = native.rasterize_forward(
        meshes_of(pos, tri, height, width), address(rast), address(rast_db), queue_of(pos)
    )
    _refuse("rasterize", status, pos.shape[1])
    return rast, rast_db


def _backward(cotangents, kept, wanted, pos, tri, height, width) -> list[Tensor]:
    pos, tri = pos.contiguous(), tri.contiguous()
    d_rast, d_db = (d if d is None else d.contiguous() for d in cotangents)
    d_pos, native = torch.empty_like(pos), load_native("rasterize", pos)
    addresses = map(address, (kept[0], d_rast, d_db, d_pos))
    native.rasterize_backward(meshes_of(pos, tri, height, width), *addresses, queue_of(pos))
    return [d_pos]


def meshes_of(pos: Tensor, tri: Tensor, height: int, width: int) -> Any:
    """The native arguments for contiguous pos [B, V, 4] and tri, on any device."""
    n_images, n_vertices, _ = pos.shape
    return load_native("rasterize").Meshes(address(pos), address(tri), n_images, n_vertices, len(tri), height, width)


_Rasterize = differentiable(
    _forward,
    _backward,
    keeps=(0,),
    n_outputs=2,
    twice=lambda pos, tri, height, width: rasterize_ref(pos, tri, (height, width)),
)
_registered = differentiable(_forward, _backward, keeps=(0,), n_outputs=2)
register(
    "rasterize(Tensor pos, Tensor tri, SymInt height, SymInt width) -> (Tensor, Tensor)",
    cpu=_registered,
    cuda=_registered,
    fake=lambda pos, tri, height, width: tuple(pos.new_empty(len(pos), height, width, 4) for _ in range(2)),
)


def _check(pos: Tensor, tri: Tensor, resolution: tuple[int, int]) -> tuple[int, int]:
    op = "rasterize"
    if is_batched(pos, tri):
        raise vmap_error(op)
    check_shaped(op, "pos", pos, (None, 4) if getattr(pos, "ndim", 0) == 2 else (None, None, 4))
    check_faces(op, tri)
    check_same_device(op, pos=pos, tri=tri)
    fits = isinstance(resolution, tuple | list) and len(resolution) == 2
    fits = fits and all(isinstance(n, int | torch.SymInt) and 1 <= n <= MOST_PIXELS for n in resolution)
    require(fits, op, "resolution", f"(Hp, Wp) of whole numbers from 1 to {MOST_PIXELS}", resolution, "choose others")
    return resolution


def _check_values(pos: Tensor, tri: Tensor) -> None:
    """What the native op finds as it goes."""
    if not pos.isfinite().all():
        _refuse("rasterize", 1, pos.shape[1])
    if tri.numel() and not (tri.min() >= 0 and tri.max() < pos.shape[1]):
        _refuse("rasterize", 2, pos.shape[1])


def _refuse(op: str, status: int, n_vertices: int) -> None:
    """Raises what a status of the native ops (RasterStatus in csrc/cpu/shapes.h) says."""
    require(status != 1, op, "pos", "finite", "NaN or infinity", "check what produced it")
    require(status != 2, op, "tri", f"in [0, {n_vertices})", "an index outside", "pass rows of pos")
