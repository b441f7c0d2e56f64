"""Rays against boxes and occupancy grids. Nothing here is differentiable."""

import math

import torch
from torch import Tensor

from mvdream_fast import ops
from mvdream_fast.nerfacc_compat.data_specs import RayIntervals, RaySamples
from mvdream_fast.ops._packing import rows_of
from mvdream_fast.ops.march_rays import march_rays, pack_bits


@torch.no_grad()
def ray_aabb_intersect(
    rays_o: Tensor,
    rays_d: Tensor,
    aabbs: Tensor,
    near_plane: float = -math.inf,
    far_plane: float = math.inf,
    miss_value: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays [R, 3] enter and leave boxes [m, 6]: (t_mins, t_maxs, hits), each [R, m].

    A box behind the origin, or touched in one point only, is missed. Distances are clamped to the planes, misses get
    miss_value. A ray inside a slab's faces and parallel to them hits (nerfacc gives NaN there).
    """
    o, d = rays_o[:, None].double(), rays_d[:, None].double()
    low, high = aabbs[None, :, :3].double(), aabbs[None, :, 3:].double()
    a, b = (low - o) / d, (high - o) / d
    blocked = torch.where((o >= low) & (o <= high), -math.inf, math.inf)
    t_mins = torch.where(d == 0, blocked, torch.minimum(a, b)).amax(-1)
    t_maxs = torch.where(d == 0, -blocked, torch.maximum(a, b)).amin(-1)
    hits = (t_maxs > t_mins) & (t_maxs > 0)
    t_mins, t_maxs = (
        torch.where(hits, t.clamp(near_plane, far_plane), miss_value).to(rays_o.dtype) for t in (t_mins, t_maxs)
    )
    return t_mins, t_maxs, hits


@torch.no_grad()
def traverse_grids(
    rays_o: Tensor,
    rays_d: Tensor,
    binaries: Tensor,
    aabbs: Tensor,
    near_planes: Tensor | None = None,
    far_planes: Tensor | None = None,
    step_size: float | None = 1e-3,
    cone_angle: float | None = 0.0,
    traverse_steps_limit: int | None = None,
    over_allocate: bool | None = False,
    rays_mask: Tensor | None = None,
    t_sorted: Tensor | None = None,
    t_indices: Tensor | None = None,
    hits: Tensor | None = None,
) -> tuple[RayIntervals, RaySamples, Tensor]:
    """Intervals of rays [R, 3] inside the occupied cells of grids binaries [m, x, y, z] in boxes aabbs [m, 6].

    Steps of max(step_size, t * cone_angle) from the near plane on; step_size <= 0 gives one interval per cell. Where
    boxes overlap, the first in the list decides. `traverse_steps_limit` bounds the samples of a ray. Results are always
    allocated exactly: `over_allocate` changes nothing, every sample is valid; `t_sorted`, `t_indices` and `hits` are
    accepted and not needed.

    Returns: (RayIntervals, RaySamples, termination distances [R]): packed, with ray_indices.
    """
    n_rays = rays_o.shape[0]
    near = rays_o.new_zeros(n_rays) if near_planes is None else near_planes
    far = rays_o.new_full((n_rays,), math.inf) if far_planes is None else far_planes
    limit = traverse_steps_limit if traverse_steps_limit is not None and traverse_steps_limit > 0 else None
    if over_allocate and limit is None:
        raise ValueError("traverse_grids: traverse_steps_limit must be given with over_allocate, got None; pass it")
    out = ops.traverse_grids(
        *(rays_o, rays_d, binaries, aabbs, near, far, step_size or 0.0, cone_angle or 0.0, limit, rays_mask)
    )
    edge_rays, sample_rays = (
        rows_of(info, x.shape[0]) for info, x in ((out.edge_info, out.edges), (out.sample_info, out.mids))
    )
    intervals = RayIntervals(out.edges, out.edge_info, edge_rays, out.is_left, out.is_right)
    samples = RaySamples(out.mids, out.sample_info, sample_rays, torch.ones_like(sample_rays, dtype=torch.bool))
    return intervals, samples, out.t_last


def sample_grids(rays_o, rays_d, binaries, aabbs, near, far, step_size, cone_angle) -> tuple[Tensor, Tensor, Tensor]:
    """(ray_indices, t_starts, t_ends) of a traversal; one grid with a fixed step takes the fast way."""
    if binaries.shape[0] == 1 and cone_angle == 0 and step_size > 0:
        samples = march_rays(
            *(rays_o, rays_d, aabbs[0], pack_bits(binaries), tuple(binaries.shape[1:]), step_size, None, near, far)
        )
        return samples.ray_indices, samples.t_starts, samples.t_ends
    intervals, samples, _ = traverse_grids(rays_o, rays_d, binaries, aabbs, near, far, step_size, cone_angle)
    return samples.ray_indices, intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]
