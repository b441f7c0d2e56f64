"""The two containers that nerfacc's functions exchange: data per ray, batched [R, n] or packed with its layout."""

import math
from dataclasses import dataclass

import torch

from mvdream_fast.nerfacc_compat._inputs import check_tensor, packing, whole
from mvdream_fast.ops._edges import check_same_device, require


@dataclass
class RaySamples:
    """One value per sample: vals [R, n], or [S] with packed_info [R, 2] (start, count) or ray_indices [S]."""

    vals: torch.Tensor
    packed_info: torch.Tensor | None = None
    ray_indices: torch.Tensor | None = None
    is_valid: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.vals.device


@dataclass
class RayIntervals:
    """Edges of intervals: vals [R, n], or [E] with packed_info or ray_indices.

    A packed edge may end an interval (is_right), start the next (is_left), or do both where two intervals touch.
    """

    vals: torch.Tensor
    packed_info: torch.Tensor | None = None
    ray_indices: torch.Tensor | None = None
    is_left: torch.Tensor | None = None
    is_right: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.vals.device


def layouts(op: str, **data: RaySamples | RayIntervals) -> list[torch.Tensor]:
    """Start and count of every ray in each `vals.flatten()`, [R, 2] int64; all data are of the same R rays.

    Where ray_indices alone are given, the last rays may be without values.
    """
    counts = {name: _count(f"{op}: {name}", x) for name, x in data.items()}
    last = [_last_ray(x) for name, x in data.items() if counts[name] is None]
    n_rays = max([n for n in counts.values() if n is not None] or last)
    for name, n in counts.items():
        require(n in (None, n_rays), op, name, f"data of {n_rays} rays like the rest", n, "give every ray its values")
    check_same_device(op, **{f"{name}.vals": x.vals for name, x in data.items()})
    return [_layout(f"{op}: {name}", x, n_rays) for name, x in data.items()]


def _count(op: str, data: RaySamples | RayIntervals) -> int | None:
    """Number of rays, None where only ray_indices could tell."""
    check_tensor(op, "vals", data.vals)
    if data.vals.ndim > 1:
        return math.prod(data.vals.shape[:-1])
    if data.packed_info is not None:
        return len(data.packed_info)
    if data.ray_indices is None:
        raise ValueError(
            f"{op}: packed vals must be given with packed_info or ray_indices, got neither; pass one of them"
        )
    whole(op, "ray_indices", data.ray_indices, data.vals)
    return None


def _last_ray(data: RaySamples | RayIntervals) -> int:
    indices = data.ray_indices
    return max(int(indices.max()) + 1, 0) if indices is not None and indices.numel() else 0


def _layout(op: str, data: RaySamples | RayIntervals, n_rays: int) -> torch.Tensor:
    packed = packing(op, "vals", data.vals, data.packed_info, data.ray_indices, n_rays) if data.vals.ndim == 1 else None
    if packed is not None:
        return packed
    n = data.vals.shape[-1]
    starts = torch.arange(n_rays, device=data.vals.device) * n
    return torch.stack([starts, torch.full_like(starts, n)], -1)
