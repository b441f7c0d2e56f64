"""Traversal of nested occupancy grids with steps that may grow, or cell by cell: what `march_rays` does not cover.

Runs on the CPU for tensors of any device. One grid with a fixed step is `march_rays`, which is faster and exact.
"""

import math
from typing import NamedTuple

import torch

from mvdream_fast.ops._edges import (
    address,
    check_shaped,
    check_tensors,
    load_native,
    require,
    thread_count,
)
from mvdream_fast.ops.march_rays import raise_for

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

    Where several boxes hold a point, the first in the list decides. A step_size of 0 or less gives one interval per
    occupied cell. Rays outside rays_mask have none. Not differentiable.

    rays_o, rays_d: [R, 3]. binaries: [n_grids, Gx, Gy, Gz] bool. aabbs: [n_grids, 6]. near, far: [R]. rays_mask: [R]
    bool, None for all rays.
    max_samples: at most this many samples of a ray, the nearest.

    Returns: Traversed.
    Raises: ValueError for shapes, for a NaN, infinite or zero ray, a NaN bound or step, an empty box; TypeError.
    Source: the conventions of nerfacc 0.5.3.
    """
    _check(rays_o, rays_d, binaries, aabbs, near, far, step_size, cone_angle, rays_mask)
    n_rays, device = rays_o.shape[0], rays_o.device
    mask = torch.ones(n_rays, dtype=torch.bool) if rays_mask is None else rays_mask
    tensors = [_host(x) for x in (rays_o, rays_d, mask.to(torch.uint8), near, far, binaries.to(torch.uint8), aabbs)]
    native, limit = load_native("traverse_grids"), -1 if max_samples is None else max_samples
    n_edges, n_samples = torch.empty(2, n_rays, dtype=torch.int64)
    t_last = torch.empty(n_rays, dtype=torch.float32)
    rules = (n_rays, binaries.shape[0], tuple(binaries.shape[1:]), step_size, cone_angle, limit)
    inputs, counts = list(map(address, tensors)), list(map(address, (n_edges, n_samples, t_last)))
    native.traverse(inputs, *rules, counts, [0] * 6, thread_count())
    edge_starts, sample_starts = n_edges.cumsum(0) - n_edges, n_samples.cumsum(0) - n_samples
    edges, mids = t_last.new_empty(int(n_edges.sum())), t_last.new_empty(int(n_samples.sum()))
    is_left, is_right = torch.empty(2, edges.shape[0], dtype=torch.uint8)
    fill = list(map(address, (edge_starts, sample_starts, edges, is_left, is_right, mids)))
    native.traverse(inputs, *rules, counts, fill, thread_count())
    edge_info, sample_info = torch.stack([edge_starts, n_edges], -1), torch.stack([sample_starts, n_samples], -1)
    out = (edges, is_left.bool(), is_right.bool(), edge_info, mids, sample_info, t_last)
    return Traversed(*(x.to(device) for x in out))


def _host(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().cpu().contiguous()
    return x.float() if x.is_floating_point() else x


def _check(rays_o, rays_d, binaries, aabbs, near, far, step_size, cone_angle, rays_mask) -> None:
    check_tensors("traverse_grids", rays_o=rays_o, rays_d=rays_d, binaries=binaries, aabbs=aabbs, near=near, far=far)
    op, n_rays = "traverse_grids", rays_o.shape[0] if rays_o.ndim else 0
    check_shaped(op, "rays_o", rays_o, (None, 3))
    check_shaped(op, "rays_d", rays_d, (n_rays, 3))
    check_shaped(op, "near", near, (n_rays,))
    check_shaped(op, "far", far, (n_rays,))
    require(binaries.ndim == 4, op, "binaries", "[n_grids, x, y, z]", list(binaries.shape), "add the axis of the grids")
    check_shaped(op, "aabbs", aabbs, (binaries.shape[0], 6))
    few = 0 < binaries.shape[0] <= MAX_GRIDS and binaries.numel() > 0
    require(few, op, "binaries", f"1 to {MAX_GRIDS} grids of at least a cell", list(binaries.shape), "use fewer levels")
    boxes = bool(torch.isfinite(aabbs).all() & (aabbs[:, :3] < aabbs[:, 3:]).all())
    require(boxes, op, "aabbs", "finite, minimum below maximum", "other boxes", "pass (x0, y0, z0, x1, y1, z1)")
    finite = bool(torch.isfinite(rays_o).all() & torch.isfinite(rays_d).all() & torch.isfinite(near).all())
    raise_for(op, 0 if finite else 1)
    longest = rays_d.double().abs().amax(-1)
    raise_for(op, 0 if bool((longest >= 1e-30).all()) else 2)
    raise_for(op, 4 if bool(far.isnan().any()) else 0)
    require(not math.isnan(step_size), op, "step_size", "a number", "NaN", "pass 0 for one interval per cell")
    if step_size > 0 and n_rays:  # the limit of march_rays, with more steps than which a ray would not end
        way = torch.minimum((aabbs[:, 3:] - aabbs[:, :3]).max() / longest, far.double() - near.double())
        raise_for(op, 0 if float(way.max()) <= 2**32 * step_size else 5)
    require(cone_angle >= 0, op, "cone_angle", "at least 0", cone_angle, "pass the growth of the step per distance")
    if rays_mask is not None:
        is_bool = isinstance(rays_mask, torch.Tensor) and rays_mask.dtype == torch.bool
        got = getattr(rays_mask, "dtype", type(rays_mask).__name__)
        require(is_bool, op, "rays_mask", "a bool tensor", got, "compare it with something", TypeError)
        fits = tuple(rays_mask.shape) == (n_rays,)
        require(fits, op, "rays_mask", f"of shape [{n_rays}]", list(rays_mask.shape), "one value a ray")
