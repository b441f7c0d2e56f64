"""The two containers that nerfacc's functions exchange: data per ray, batched [R, n] or packed with its layout."""

from dataclasses import dataclass

import torch


@dataclass
class RaySamples:
    """One value per sample: vals [R, n], or [S] with packed_info [R, 2] (start, count) or ray_indices [S]."""

    vals: torch.Tensor
    packed_info: torch.Tensor | None = None
    ray_indices: torch.Tensor | None = None
    is_valid: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
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
        return self.vals.device


def layout(data: RaySamples | RayIntervals) -> torch.Tensor:
    """Start and count of every ray in `data.vals.flatten()`, [R, 2] int64, batched or packed."""
    if data.vals.ndim > 1:
        n = data.vals.shape[-1]
        starts = torch.arange(data.vals[..., 0].numel() if n else 0, device=data.vals.device) * n
        return torch.stack([starts, torch.full_like(starts, n)], -1)
    if data.packed_info is not None:
        return data.packed_info
    if data.ray_indices is None:
        raise ValueError(
            "nerfacc_compat: packed vals must be given with packed_info or ray_indices, got neither; pass one of them"
        )
    from mvdream_fast.nerfacc_compat.scan import pack_info

    return pack_info(data.ray_indices)
