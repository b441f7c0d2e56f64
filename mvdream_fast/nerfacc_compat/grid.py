"""Rays against boxes and occupancy grids. Nothing here is differentiable."""

import math

import torch
from torch import Tensor

from mvdream_fast import ops
from mvdream_fast.nerfacc_compat._inputs import check_bound, check_rays, widened, without_misses
from mvdream_fast.nerfacc_compat.data_specs import RayIntervals, RaySamples
from mvdream_fast.ops._edges import FLOATS, check_same_device, check_shaped, require
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
    Raises: ValueError for shapes that don't fit; TypeError.
    """
    check_shaped("ray_aabb_intersect", "rays_o", rays_o, (None, 3), FLOATS)
    check_shaped("ray_aabb_intersect", "rays_d", rays_d, tuple(rays_o.shape), FLOATS)
    check_shaped("ray_aabb_intersect", "aabbs", aabbs, (None, 6), FLOATS)
    check_same_device("ray_aabb_intersect", rays_o=rays_o, rays_d=rays_d, aabbs=aabbs)
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


_ray_aabb_intersect = ray_aabb_intersect  # nerfacc's own reference of it


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
    boxes overlap, the first in the list decides. A near plane of infinity, as ray_aabb_intersect gives it for a box
    that is missed, is a ray without samples. `traverse_steps_limit` bounds the samples of a ray. Results are always
    allocated exactly: `over_allocate` changes nothing, every sample is valid; `t_sorted`, `t_indices` and `hits` are
    accepted and not needed.

    Returns: (RayIntervals, RaySamples, termination distances [R]), float32: packed, with ray_indices.
    Raises: ValueError for shapes, for rays and planes that are no numbers, and for empty boxes; TypeError.
    """
    op, n_rays = "traverse_grids", check_rays("traverse_grids", rays_o, rays_d)
    check_grids(op, "binaries", binaries, "aabbs", aabbs, rays_o)
    near = rays_o.new_zeros(n_rays) if near_planes is None else near_planes
    far = rays_o.new_full((n_rays,), math.inf) if far_planes is None else far_planes
    check_bound(op, "near_planes", near, rays_o, least=True)
    check_bound(op, "far_planes", far, rays_o, least=False)
    limit = traverse_steps_limit if traverse_steps_limit is not None and traverse_steps_limit > 0 else None
    if over_allocate and limit is None:
        raise ValueError("traverse_grids: traverse_steps_limit must be given with over_allocate, got None; pass it")
    rays_o, rays_d, aabbs = map(widened, (rays_o, rays_d, aabbs))
    near, far, misses = without_misses(*(widened(x).expand(n_rays) for x in (near, far)))
    out = ops.traverse_grids(
        *(rays_o, rays_d, binaries, aabbs, near, far, step_size or 0.0, cone_angle or 0.0, limit, rays_mask)
    )
    edge_rays, sample_rays = (
        rows_of(info, x.shape[0]) for info, x in ((out.edge_info, out.edges), (out.sample_info, out.mids))
    )
    intervals = RayIntervals(out.edges, out.edge_info, edge_rays, out.is_left, out.is_right)
    samples = RaySamples(out.mids, out.sample_info, sample_rays, torch.ones_like(sample_rays, dtype=torch.bool))
    return intervals, samples, out.t_last.masked_fill(misses, math.inf)


def sample_grids(rays_o, rays_d, binaries, aabbs, near, far, step_size, cone_angle) -> tuple[Tensor, Tensor, Tensor]:
    """(ray_indices, t_starts, t_ends) of a traversal; one grid with a fixed step takes the fast way."""
    if binaries.shape[0] == 1 and cone_angle == 0 and step_size > 0:
        near, far, _ = without_misses(near, far)
        samples = march_rays(
            *(rays_o, rays_d, aabbs[0], pack_bits(binaries), tuple(binaries.shape[1:]), step_size, None, near, far)
        )
        return samples.ray_indices, samples.t_starts, samples.t_ends
    intervals, samples, _ = traverse_grids(rays_o, rays_d, binaries, aabbs, near, far, step_size, cone_angle)
    rays, is_left, is_right = samples.ray_indices, intervals.is_left, intervals.is_right
    if rays is None or is_left is None or is_right is None:
        raise AssertionError  # packed data, as traversed ones are, have all three
    return rays, intervals.vals[is_left], intervals.vals[is_right]


def check_grids(op: str, name: str, binaries: Tensor, box_name: str, aabbs: Tensor, rays_o: Tensor) -> None:
    """Grids [m, x, y, z] of bool, one box [6] for each, on the device of the rays."""
    is_bool = isinstance(binaries, Tensor) and binaries.dtype == torch.bool
    got = getattr(binaries, "dtype", type(binaries).__name__)
    require(is_bool, op, name, "a bool tensor", got, "compare it with something", TypeError)
    require(binaries.ndim == 4, op, name, "of shape [m, x, y, z]", list(binaries.shape), "add the axis of the grids")
    check_shaped(op, box_name, aabbs, (binaries.shape[0], 6), FLOATS)
    check_same_device(op, **{"rays_o": rays_o, name: binaries, box_name: aabbs})


def _enlarge_aabb(aabb: Tensor, factor: float) -> Tensor:
    """A box [6] that is `factor` times as large around the same centre."""
    centre, extent = (aabb[:3] + aabb[3:]) / 2, (aabb[3:] - aabb[:3]) / 2
    return torch.cat([centre - extent * factor, centre + extent * factor])


def _query(x: Tensor, data: Tensor, base_aabb: Tensor) -> tuple[Tensor, Tensor]:
    """Values of nested grids data [m, x, y, z] at points [P, 3], 0 outside, and whether each is inside: both [P].

    Each grid's box is twice the one before, base_aabb [6] the first; the smallest that holds a point answers.
    """
    from_centre = (x - base_aabb[:3]) / (base_aabb[3:] - base_aabb[:3]) - 0.5
    # Box i reaches to 2^i / 2 in every direction; frexp's exponent is that of the first power of two above a number.
    level = torch.frexp(from_centre.abs().amax(-1).clamp(min=0.25))[1].long() + 1
    inside = level < data.shape[0]
    shape = torch.tensor(data.shape[1:], device=x.device)
    cells = ((from_centre / 2.0 ** level[:, None] + 0.5) * shape).long()
    cells = cells.clamp(min=0).minimum(shape - 1)
    return data[level.clamp(max=data.shape[0] - 1), *cells.unbind(-1)] * inside, inside
