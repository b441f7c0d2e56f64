"""Search in, and sampling from, sorted values along rays, batched or packed. Nothing here is differentiable."""

import math

import torch
from torch import Tensor

from mvdream_fast.core import reads
from mvdream_fast.core.reads import read
from mvdream_fast.nerfacc_compat._inputs import check_alike, floats, promoted, whole
from mvdream_fast.nerfacc_compat.data_specs import RayIntervals, RaySamples, layouts
from mvdream_fast.ops._edges import require
from mvdream_fast.ops._packing import rows_of


@torch.no_grad()
def searchsorted(
    sorted_sequence: RayIntervals | RaySamples, values: RayIntervals | RaySamples
) -> tuple[Tensor, Tensor]:
    """Neighbours of each value in the sequence of its ray: sequence[left] <= value < sequence[right].

    Values outside take the nearest end, twice. Returns: (ids_left, ids_right) int64 in the shape of values.vals; within
    the ray where values are batched, into the flat sequence where they are packed. A ray without a sequence gives its
    start (packed) or 0 (batched). Raises: ValueError for shapes, layouts and numbers of rays that don't fit; TypeError.
    """
    keys, queries = layouts("searchsorted", sorted_sequence=sorted_sequence, values=values)
    rays = rows_of(queries, values.vals.numel())
    base, last = keys[rays, 0], (keys[rays].sum(-1) - 1).maximum(keys[rays, 0])
    right = _upper_bound(sorted_sequence.vals.flatten(), values.vals.flatten(), base, last)
    ids = (right - 1).maximum(base), right
    if values.vals.ndim > 1:
        ids = ids[0] - base, ids[1] - base
    return ids[0].view(values.vals.shape), ids[1].view(values.vals.shape)


@torch.no_grad()
def importance_sampling(
    intervals: RayIntervals, cdfs: Tensor, n_intervals_per_ray: Tensor | int, stratified: bool = False
) -> tuple[RayIntervals, RaySamples]:
    """Samples of every ray at equal steps of its cdf, given at the edges of its intervals, and intervals around them.

    With an int, batched results: edges [R, n + 1] (or [..., n + 1] like the input) and samples [R, n]. With a tensor
    [R], packed ones. `stratified` shifts the samples of a ray together by a random part of a step, from torch's
    generator. A lone sample's interval is that of its ray; a ray without edges gives zeros.

    Returns: (RayIntervals, RaySamples). Raises: ValueError for shapes and layouts that don't fit; TypeError.
    """
    op = "importance_sampling"
    (edges,) = layouts(op, intervals=intervals)
    check_alike(op, **{"intervals.vals": intervals.vals, "cdfs": cdfs})
    dtype, n_rays = promoted(intervals.vals, cdfs), edges.shape[0]
    vals, cdfs = floats(intervals.vals).flatten(), floats(cdfs).flatten()
    batched = not isinstance(n_intervals_per_ray, Tensor)
    counts, n_samples, n_edges = _counts(n_intervals_per_ray, n_rays, vals)
    packed = torch.stack([counts.cumsum(0) - counts, counts], -1)
    rays = rows_of(packed, n_samples)
    order = torch.arange(n_samples, device=cdfs.device) - packed[rays, 0]
    bias = torch.rand(n_rays, device=cdfs.device, dtype=cdfs.dtype) if stratified else cdfs.new_full((n_rays,), 0.5)
    samples = _invert(vals, cdfs, edges, counts, rays, order, bias)
    new_edges, *new = _surround(vals, edges, packed, samples, n_edges)
    new_edges, samples = new_edges.to(dtype), samples.to(dtype)
    if batched:
        shape, n = intervals.vals.shape[:-1] if intervals.vals.ndim > 1 else (n_rays,), int(n_intervals_per_ray)
        return RayIntervals(new_edges.view(*shape, n + 1)), RaySamples(samples.view(*shape, n))
    return RayIntervals(new_edges, *new), RaySamples(samples, packed, rays)


def _counts(n_intervals_per_ray: Tensor | int, n_rays: int, like: Tensor) -> tuple[Tensor, int, int]:
    """Samples of each ray, [R] int64, and how many samples and edges there are in all."""
    op, name = "importance_sampling", "n_intervals_per_ray"
    if isinstance(n_intervals_per_ray, Tensor):
        counts = whole(op, name, n_intervals_per_ray, like)
        got = list(counts.shape)
        require(got == [n_rays], op, name, f"of shape [{n_rays}]", got, "one number a ray")
        n_samples, n_without, n_negative = read(torch.stack([counts.sum(), (counts == 0).sum(), (counts < 0).sum()]))
        require(n_negative == 0, op, name, "at least 0", "a negative number", "pass counts")
        return counts, n_samples, n_samples + n_rays - n_without
    positive = hasattr(n_intervals_per_ray, "__index__") and int(n_intervals_per_ray) > 0
    require(positive, op, name, "a number above 0, or one a ray", n_intervals_per_ray, "pass a count")
    n = int(n_intervals_per_ray)
    return torch.full((n_rays,), n, device=like.device), n_rays * n, n_rays * (n + 1)


def _sample_from_weighted(
    bins: Tensor,
    weights: Tensor,
    num_samples: int,
    stratified: bool = False,
    vmin: float = -math.inf,
    vmax: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """The same from weights [..., n] of bins [..., n + 1]: edges [..., num_samples + 1] around samples in the middle.

    The outer edges are as far out as their neighbours are, but within vmin and vmax.
    """
    cdfs = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))
    centers = importance_sampling(RayIntervals(bins), cdfs, num_samples, stratified)[1].vals
    middles = (centers[..., 1:] + centers[..., :-1]) / 2
    first = (2 * centers[..., :1] - middles[..., :1]).clamp(min=vmin)
    last = (2 * centers[..., -1:] - middles[..., -1:]).clamp(max=vmax)
    return torch.cat([first, middles, last], -1), centers


def _upper_bound(keys: Tensor, values: Tensor, base: Tensor, last: Tensor) -> Tensor:
    """First index in [base, last) whose key is above the value, else last: a bisection of all values at once."""
    low, high = base.clone(), last.clone()
    if keys.numel() == 0:
        return low
    longest = keys.shape[0]
    if low.numel() and not reads.reads_wait(keys.device):
        longest = int((high - low).max())
    for _ in range(longest.bit_length()):
        middle = (low + high) // 2
        above = keys[middle.clamp(max=keys.shape[0] - 1)] > values
        searching = low < high
        high = torch.where(searching & above, middle, high)
        low = torch.where(searching & ~above, middle + 1, low)
    return low


def _invert(vals, cdfs, edges, counts, rays, order, bias) -> Tensor:
    """The distance at which the cdf of each sample's ray reaches that sample's value."""
    if vals.numel() == 0:
        return vals.new_zeros(rays.shape[0])
    empty = edges[rays, 1] == 0
    top = vals.shape[0] - 1
    base = edges[rays, 0].clamp(max=top)
    last = (edges[rays].sum(-1) - 1).maximum(base).clamp(max=top)
    floor, ceiling = cdfs[base], cdfs[last]
    u = floor + (order + bias[rays]) * (ceiling - floor) / counts[rays]
    right = _upper_bound(cdfs, u, base, last)
    left = (right - 1).maximum(base)
    slope = cdfs[right] - cdfs[left]
    inside = vals[left] + (u - cdfs[left]) * (vals[right] - vals[left]) / slope.clamp(min=1e-10)
    t = torch.where(slope < 1e-10, 0.5 * (vals[left] + vals[right]), inside)
    return torch.where(empty, 0, t)


def _surround(vals, edges, packed, samples, n_edges: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Edges halfway between a ray's samples, the outer ones as far out again but inside the ray: the packed fields."""
    counts = packed[:, 1]
    of_ray = torch.where(counts > 0, counts + 1, 0)
    info = torch.stack([of_ray.cumsum(0) - of_ray, of_ray], -1)
    rays = rows_of(info, n_edges)
    order = torch.arange(rays.shape[0], device=vals.device) - info[rays, 0]
    is_left, is_right = order < counts[rays], order > 0
    if rays.numel() == 0:
        return vals.new_zeros(0), info, rays, is_left, is_right
    first, final = packed[rays, 0], packed[rays].sum(-1) - 1
    right = (first + order).minimum(final)
    left = (first + order - 1).maximum(first)
    middle = 0.5 * (samples[left] + samples[right])
    low, high = _ends(vals, edges, rays)
    before = samples[first] - 0.5 * (samples[(first + 1).minimum(final)] - samples[first])
    behind = samples[final] + 0.5 * (samples[final] - samples[(final - 1).maximum(first)])
    lone = counts[rays] == 1
    t = torch.where(~is_right, torch.where(lone, low, before.maximum(low)), middle)
    return torch.where(~is_left, torch.where(lone, high, behind.minimum(high)), t), info, rays, is_left, is_right


def _ends(vals, edges, rays) -> tuple[Tensor, Tensor]:
    if vals.numel() == 0:
        zero = vals.new_zeros(rays.shape[0])
        return zero, zero
    top, empty = vals.shape[0] - 1, edges[rays, 1] == 0
    low = vals[edges[rays, 0].clamp(max=top)]
    high = vals[(edges[rays].sum(-1) - 1).clamp(0, top)]
    return torch.where(empty, 0, low), torch.where(empty, 0, high)
