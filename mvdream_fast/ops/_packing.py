"""How the samples of all rays are packed ray after ray: both descriptions, the check of either, and sums along rays.

What the samples are, and where they come from, lives in the ops.
"""

import torch

from mvdream_fast.core import reads
from mvdream_fast.ops._edges import (
    check_tensors,
    require,
)


def pack_info(ray_indices: torch.Tensor, n_rays: int) -> torch.Tensor:
    """Start and count of each ray's samples, [R, 2] int64, from sorted ray_indices [S]."""
    if reads.reads_wait(ray_indices.device):  # bincount reads the largest index
        rays = torch.arange(n_rays + 1, device=ray_indices.device)
        return packed_counts(torch.searchsorted(ray_indices, rays).diff())
    return packed_counts(torch.bincount(ray_indices, minlength=n_rays))


def pack_runs(indices: torch.Tensor) -> torch.Tensor:
    """Start and count of each run of equal indices [S], and of runs without samples after them, [S, 2] int64: for who
    may not ask how many rays there are."""
    runs = torch.nn.functional.pad((indices[1:] != indices[:-1]).cumsum(0), (1, 0))[: indices.shape[0]]
    return pack_info(runs, indices.shape[0])


def packed_counts(counts: torch.Tensor) -> torch.Tensor:
    """Start and count of each ray's samples, [R, 2], from the counts [R]."""
    return torch.stack([counts.cumsum(0) - counts, counts], dim=-1)


def rows_of(packed_info: torch.Tensor, n: int) -> torch.Tensor:
    """The ray of each of n packed values, [n] int64: the inverse of `pack_info`."""
    rays = torch.arange(packed_info.shape[0], device=packed_info.device)
    return torch.repeat_interleave(rays, packed_info[:, 1], output_size=n)


def exclusive_sum_packed(values: torch.Tensor, packed_info: torch.Tensor) -> torch.Tensor:
    """Sum of a ray's values [S] before each one, [S], along the padded rows of its rays: differentiable."""
    n_rays = packed_info.shape[0]
    if values.numel() == 0 or n_rays == 0:
        return values * 0
    rows, (starts, counts) = rows_of(packed_info, values.shape[0]), packed_info.unbind(-1)
    columns = torch.arange(values.shape[0], device=values.device) - starts[rows]
    padded = values.new_zeros(n_rays, int(counts.max()) + 1).index_put((rows, columns + 1), values)
    return padded.cumsum(-1)[rows, columns]


def check_packing(op, n_samples, ray_indices, packed_info, n_rays, bounded=False) -> torch.Tensor:
    """The packing of n_samples samples as packed_info [R, 2], from whichever of the two descriptions is given.

    bounded: for an op that reads nothing outside of the samples, whatever the packing says: where reads wait, its
    numbers are not looked at.
    """
    one = (ray_indices is None) != (packed_info is None)
    require(one, op, "one of ray_indices and packed_info", "given", "both or none", "pass exactly one")
    check_tensors(op, **({"ray_indices": ray_indices} if packed_info is None else {"packed_info": packed_info}))
    if packed_info is None:
        require(n_rays is not None, op, "n_rays", "given with ray_indices", None, "rays without samples count too")
        require(
            ray_indices.dtype == torch.int64, op, "ray_indices", "int64", ray_indices.dtype, "use .long()", TypeError
        )
        fits = tuple(ray_indices.shape) == (n_samples,)
        require(fits, op, "ray_indices", f"of shape [{n_samples}]", list(ray_indices.shape), "one ray a sample")
        return pack_sorted(op, ray_indices, n_rays, bounded=bounded)
    require(packed_info.dtype == torch.int64, op, "packed_info", "int64", packed_info.dtype, "use .long()", TypeError)
    two = packed_info.ndim == 2 and packed_info.shape[1] == 2
    require(two, op, "packed_info", "of shape [n_rays, 2]", list(packed_info.shape), "pass start and count of each ray")
    same = n_rays is None or n_rays == packed_info.shape[0]
    require(same, op, "n_rays", f"{packed_info.shape[0]} as in packed_info", n_rays, "leave it out")
    if bounded and reads.reads_wait(packed_info.device):
        return packed_info
    starts, counts = packed_info.unbind(-1)
    tight = bool((counts >= 0).all() & (starts == counts.cumsum(0) - counts).all()) and int(counts.sum()) == n_samples
    require(
        tight, op, "packed_info", f"ray after ray without gaps, {n_samples} samples in all", "other", "use pack_info"
    )
    return packed_info


def pack_sorted(op, ray_indices, n_rays, name="ray_indices", bounded=False) -> torch.Tensor:
    """`pack_info` of int64 indices that are checked to be sorted and in range; bounded: as in `check_packing`."""
    if ray_indices.numel() and not (bounded and reads.reads_wait(ray_indices.device)):
        ordered = bool((ray_indices[1:] >= ray_indices[:-1]).all())
        require(ordered, op, name, "sorted", "a decreasing index", "sort the samples by ray")
        first, last = int(ray_indices[0]), int(ray_indices[-1])
        require(first >= 0 and last < n_rays, op, name, f"in [0, {n_rays})", [first, last], "check n_rays")
    return pack_info(ray_indices, n_rays)
