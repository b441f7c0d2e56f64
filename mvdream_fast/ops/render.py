"""Inference rendering: march, field and composite a few rays at a time, with early termination and no gradient."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mvdream_fast.ops.composite import composite_ref
from mvdream_fast.ops.march_rays import march_rays, march_rays_ref, visible_ref

Field = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_RAYS_PER_CHUNK = 4096


class RenderedImage(NamedTuple):
    """What `render` returns: rgb [R, 3], opacity [R], depth [R], n_samples (field evaluations)."""

    rgb: torch.Tensor
    opacity: torch.Tensor
    depth: torch.Tensor
    n_samples: int


@torch.no_grad()
def render(
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    field: Field,
    aabb: torch.Tensor | Sequence[float],
    occupancy_bits: torch.Tensor,
    resolution: int,
    step_size: float,
    background: torch.Tensor | None = None,
    near: float = 0.0,
    far: float = math.inf,
    alpha_thre: float = 0.0,
    early_stop_eps: float = 1e-4,
) -> RenderedImage:
    """Colour, opacity and depth of rays through a field, without gradients and without memory for every sample.

    Equal to march_rays, prune_samples and composite in a row. field: positions [P, 3] -> (sigmas [P], rgb [P, 3]).
    The other arguments are those of `march_rays`, `prune_samples` and `composite`.

    Returns: RenderedImage. Raises: what the three ops raise.
    """
    return _render_chunks(
        march_rays,
        rays_o,
        rays_d,
        field,
        aabb,
        occupancy_bits,
        resolution,
        step_size,
        background,
        near,
        far,
        alpha_thre,
        early_stop_eps,
    )


@torch.no_grad()
def render_ref(
    rays_o,
    rays_d,
    field,
    aabb,
    occupancy_bits,
    resolution,
    step_size,
    background=None,
    near=0.0,
    far=math.inf,
    alpha_thre=0.0,
    early_stop_eps=1e-4,
) -> RenderedImage:
    """The same with the reference ops."""
    return _render_chunks(
        march_rays_ref,
        rays_o,
        rays_d,
        field,
        aabb,
        occupancy_bits,
        resolution,
        step_size,
        background,
        near,
        far,
        alpha_thre,
        early_stop_eps,
    )


def _render_chunks(
    march, rays_o, rays_d, field, aabb, bits, resolution, step_size, background, near, far, alpha_thre, early_stop_eps
) -> RenderedImage:
    n_rays, n_samples = rays_o.shape[0], 0
    rgb, opacity, depth = rays_o.new_zeros(n_rays, 3), rays_o.new_zeros(n_rays), rays_o.new_zeros(n_rays)
    for i in range(0, n_rays, _RAYS_PER_CHUNK):
        part = slice(i, i + _RAYS_PER_CHUNK)
        samples = march(rays_o[part], rays_d[part], aabb, bits, resolution, step_size, None, near, far)
        sigmas, colours = field(samples.positions(rays_o[part], rays_d[part]))
        n_samples += samples.n_samples
        keep = visible_ref(samples, sigmas, alpha_thre, early_stop_eps)
        kept = samples.select(keep)
        behind = background[part] if background is not None and background.ndim == 2 else background
        out = composite_ref(sigmas[keep], colours[keep], kept.t_starts, kept.t_ends, kept.packed_info, behind)
        rgb[part], opacity[part], depth[part] = out.rgb, out.opacity, out.depth
    return RenderedImage(rgb, opacity, depth, n_samples)
