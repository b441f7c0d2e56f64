"""Running sums and products, along the last axis or along packed rays, and the packing itself."""

import torch
from torch import Tensor

from mvdream_fast.ops._packing import pack_sorted
from mvdream_fast.ops.packed_scan import packed_scan


@torch.no_grad()
def pack_info(ray_indices: Tensor, n_rays: int | None = None) -> Tensor:
    """Start and count of each ray's samples, [R, 2], of sorted ray_indices [S]; n_rays defaults to the last + 1.

    Raises: ValueError for indices that are not sorted, or not in [0, n_rays).
    """
    if ray_indices.ndim != 1:
        raise ValueError(f"pack_info: ray_indices must be of shape [S], got {list(ray_indices.shape)}; flatten them")
    if n_rays is None:
        n_rays = int(ray_indices.max()) + 1 if ray_indices.numel() else 0
    return pack_sorted("pack_info", ray_indices.long(), n_rays).to(ray_indices.dtype)


def inclusive_sum(inputs: Tensor, packed_info: Tensor | None = None) -> Tensor:
    """Sum of the values up to each one: along the last axis, or along each ray of packed inputs [S]."""
    if packed_info is None:
        return inputs.cumsum(-1)
    return packed_scan(inputs, packed_info.long())


def exclusive_sum(inputs: Tensor, packed_info: Tensor | None = None) -> Tensor:
    """Sum of the values before each one, 0 for the first: along the last axis, or along each ray of packed inputs."""
    if packed_info is None:
        return _shifted(inputs, 0).cumsum(-1)
    return packed_scan(inputs, packed_info.long(), exclusive=True)


def inclusive_prod(inputs: Tensor, packed_info: Tensor | None = None) -> Tensor:
    """Product of the values up to each one: along the last axis, or along each ray of packed inputs [S]."""
    if packed_info is None:
        return inputs.cumprod(-1)
    return packed_scan(inputs, packed_info.long(), product=True)


def exclusive_prod(inputs: Tensor, packed_info: Tensor | None = None) -> Tensor:
    """Product of the values before each one, 1 for the first: along the last axis, or each ray of packed inputs."""
    if packed_info is None:
        return _shifted(inputs, 1).cumprod(-1)
    return packed_scan(inputs, packed_info.long(), product=True, exclusive=True)


def _shifted(inputs: Tensor, neutral: float) -> Tensor:
    return torch.cat([torch.full_like(inputs[..., :1], neutral), inputs[..., :-1]], -1)
