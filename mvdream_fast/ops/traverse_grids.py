"""Traversal of nested occupancy grids with steps that may grow, or cell by cell: what `march_rays` does not cover.

One grid with a fixed step is `march_rays`, which is faster and exact.
"""

import math
from typing import NamedTuple

import torch

from mvdream_fast.core.reads import read
from mvdream_fast.ops._edges import (
    address,
    as_constant,
    check_same_device,
    check_shaped,
    check_tensors,
    count,
    load_native,
    number,
    plain32,
    queue_of,
    require,
)
from mvdream_fast.ops._march_checks import raise_for

MAX_GRIDS = 16


class Traversed(NamedTuple):
    """Edges and samples of the intervals of all rays, packed ray after ray.

    edges [E], is_left [E] and is_right [E] bool, edge_info [R, 2]; mids [S], sample_info [R, 2]; t_last [R].
    """

    edges: torch.Tensor
    is_left: torch.Tensor
    is_right: torch.Tensor
    edge_info: torch.Tensor
    mids: torch.Tensor
    sample_info: torch.Tensor
    t_last: torch.Tensor


@torch.no_grad()
def traverse_grids(
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    binaries: torch.Tensor,
    aabbs: torch.Tensor,
    near: torch.Tensor,
    far: torch.Tensor,
    step_size: float,
    cone_angle: float = 0.0,
    max_samples: int | None = None,
    rays_mask: torch.Tensor | None = None,
) -> Traversed:
    """Intervals of the rays inside occupied cells, with steps of max(step_size, t * cone_angle).

    Where several boxes hold a point, the first in the list decides. Boxes are nested: between two that are apart, an
    interval goes on through the gap, as nerfacc's does. A step_size of 0 or less gives one interval per
    occupied cell. Rays outside rays_mask have none. Not differentiable; the result's size, and whether the rays are
    fine, needs one synchronisation on a GPU.

    rays_o, rays_d: [R, 3]. binaries: [n_grids, Gx, Gy, Gz] bool. aabbs: [n_grids, 6]. near, far: [R]. rays_mask: [R]
    bool, None for all rays.
    max_samples: at most this many samples of a ray, the nearest.

    Returns: Traversed.
    Raises: ValueError for shapes, for a NaN, infinite or zero ray, a NaN bound or step, an empty box; TypeError.
    Source: the conventions of nerfacc 0.5.3.
    """
    rules = (step_size, cone_angle, max_samples)
    return as_constant("traverse_grids", _traverse, rays_o, rays_d, binaries, aabbs, near, far, *rules, rays_mask)


def _traverse(rays_o, rays_d, binaries, aabbs, near, far, step_size, cone_angle, max_samples, rays_mask) -> Traversed:
    _check(rays_o, rays_d, binaries, aabbs, near, far, step_size, cone_angle, max_samples, rays_mask)
    n_rays, native = rays_o.shape[0], load_native("traverse_grids", rays_o)
    # [R] bool, and [n_grids, x, y, z]: one byte each
    rays_o, rays_d, near, far, aabbs = map(plain32, (rays_o, rays_d, near, far, aabbs))
    rays_mask = None if rays_mask is None else rays_mask.contiguous()
    tensors = [rays_o, rays_d, rays_mask, near, far, binaries.contiguous(), aabbs]
    counts = torch.empty(2, n_rays, dtype=torch.int64, device=rays_o.device)  # of edges and of samples
    status, t_last = counts.new_zeros(1, dtype=torch.int32), counts.new_empty(n_rays, dtype=torch.float32)
    rules = (n_rays, binaries.shape[0], tuple(binaries.shape[1:]), step_size, cone_angle)
    rules += (-1 if max_samples is None else max_samples,)
    inputs, found = list(map(address, tensors)), list(map(address, (*counts, t_last, status)))
    native.traverse(inputs, *rules, found, [0] * 6, queue_of(rays_o))
    starts = counts.cumsum(1) - counts
    worst, n_edges, n_samples = read(torch.cat([status, counts.sum(1)]))
    _raise_for(worst)
    edges, mids = t_last.new_empty(n_edges), t_last.new_empty(n_samples)
    is_left, is_right = torch.empty(2, n_edges, dtype=torch.bool, device=rays_o.device)
    fill = list(map(address, (*starts, edges, is_left, is_right, mids)))
    native.traverse(inputs, *rules, found, fill, queue_of(rays_o))
    edge_info, sample_info = torch.stack([starts, counts], -1)
    return Traversed(edges, is_left, is_right, edge_info, mids, sample_info, t_last)


def _raise_for(status: int) -> None:
    op = "traverse_grids"
    boxes = "finite, minimum below maximum"
    require(status != 6, op, "aabbs", boxes, "other boxes", "pass (x0, y0, z0, x1, y1, z1)")
    raise_for(op, status)


def _check(rays_o, rays_d, binaries, aabbs, near, far, step_size, cone_angle, max_samples, rays_mask) -> None:
    check_tensors("traverse_grids", rays_o=rays_o, rays_d=rays_d, binaries=binaries, aabbs=aabbs, near=near, far=far)
    op, n_rays = "traverse_grids", rays_o.shape[0] if rays_o.ndim else 0
    check_shaped(op, "rays_o", rays_o, (None, 3))
    check_shaped(op, "rays_d", rays_d, (n_rays, 3))
    check_shaped(op, "near", near, (n_rays,))
    check_shaped(op, "far", far, (n_rays,))
    require(binaries.dtype == torch.bool, op, "binaries", "bool", binaries.dtype, "compare with something", TypeError)
    require(binaries.ndim == 4, op, "binaries", "[n_grids, x, y, z]", list(binaries.shape), "add the axis of the grids")
    check_shaped(op, "aabbs", aabbs, (binaries.shape[0], 6))
    check_same_device(op, rays_o=rays_o, rays_d=rays_d, binaries=binaries, aabbs=aabbs, near=near, far=far)
    few = 0 < binaries.shape[0] <= MAX_GRIDS and binaries.numel() > 0
    require(few, op, "binaries", f"1 to {MAX_GRIDS} grids of at least a cell", list(binaries.shape), "use fewer levels")
    step = number(op, "step_size", step_size, "pass 0 for one interval per cell")
    require(not math.isnan(step), op, "step_size", "a number", "NaN", "pass 0 for one interval per cell")
    cone = number(op, "cone_angle", cone_angle, "pass the growth of the step per distance")
    require(cone >= 0, op, "cone_angle", "at least 0", cone_angle, "pass the growth of the step per distance")
    few = max_samples is None or count(op, "max_samples", max_samples, "leave it out for no limit") >= 0
    require(few, op, "max_samples", "None or at least 0", max_samples, "leave it out for no limit")
    if rays_mask is not None:
        check_tensors(op, rays_mask=rays_mask)
        is_bool, got = rays_mask.dtype == torch.bool, rays_mask.dtype
        require(is_bool, op, "rays_mask", "a bool tensor", got, "compare it with something", TypeError)
        fits = tuple(rays_mask.shape) == (n_rays,)
        require(fits, op, "rays_mask", f"of shape [{n_rays}]", list(rays_mask.shape), "one value a ray")
        check_same_device(op, rays_o=rays_o, rays_mask=rays_mask)
