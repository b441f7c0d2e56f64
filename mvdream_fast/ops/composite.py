"""Emission-absorption compositing of packed samples along their rays, and its adjoint.

    x_i = sigma_i (t_end_i - t_start_i),  T_i = exp(-sum_{j<i} x_j),  w_i = T_i (1 - exp(-x_i))

Where the samples come from, and what gives them their colours, is not known here.
"""

from typing import NamedTuple

import torch

from mvdream_fast.ops._edges import (
    BACKENDS,
    address,
    check_same_device,
    check_shaped,
    check_tensors,
    is_batched,
    load_native,
    queue_of,
    runs_natively,
    vmap_error,
)
from mvdream_fast.ops._packing import check_packing, exclusive_sum_packed, pack_info, rows_of
from mvdream_fast.ops._registered import differentiable, register
from mvdream_fast.ops.march_rays import Samples


class Rendered(NamedTuple):
    """What `composite` returns: rgb [R, 3], opacity [R], depth [R], weights [S], z_variance [R]."""

    rgb: torch.Tensor
    opacity: torch.Tensor
    depth: torch.Tensor
    weights: torch.Tensor
    z_variance: torch.Tensor


def composite(
    sigmas: torch.Tensor,
    rgb: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    ray_indices: torch.Tensor | None = None,
    packed_info: torch.Tensor | None = None,
    n_rays: int | None = None,
    background: torch.Tensor | None = None,
) -> Rendered:
    """Colour, opacity, depth, weights and depth variance of every ray.

    opacity = sum w; rgb = sum w c + (1 - opacity) background; depth = sum w t (not divided by the opacity);
    z_variance = sum w (t - depth)^2, t the midpoint. Differentiable in sigmas, rgb and background (a second time
    through the plain-torch reference), not in the distances. A ray without samples shows the background, with opacity,
    depth and variance 0.

    sigmas: [S], not negative. rgb: [S, 3]. t_starts, t_ends: [S]. Either packed_info [R, 2] int64 (start and count,
    ray after ray, without gaps) or ray_indices [S] int64, sorted, with n_rays. background: [R, 3], [3] or None (black).

    Returns: Rendered. Raises: ValueError, TypeError, RuntimeError for unfitting arguments.
    Source: Max, Optical models for direct volume rendering (1995); Mildenhall et al., arXiv 2003.08934, eq. 3.
    """
    if torch.compiler.is_compiling():
        # The checks read values, which a graph cannot; the registered form trusts its caller.
        if packed_info is None and ray_indices is not None and n_rays is not None:
            packed_info = pack_info(ray_indices, n_rays)
        run = torch.ops.mvdream_fast.composite
        return Rendered(*run(sigmas, rgb, t_starts.detach(), t_ends.detach(), packed_info, background))
    packed_info = _check(sigmas, rgb, t_starts, t_ends, ray_indices, packed_info, n_rays, background)
    return _composite(sigmas, rgb, t_starts, t_ends, packed_info, background)


def composite_samples(
    sigmas: torch.Tensor, rgb: torch.Tensor, samples: Samples, background: torch.Tensor | None = None
) -> Rendered:
    """`composite` of Samples, which are not checked again where `march_rays` or `prune_samples` made them."""
    packed_info, distances = samples.packed_info, (samples.t_starts, samples.t_ends)
    if torch.compiler.is_compiling():
        return composite(sigmas, rgb, *distances, packed_info=packed_info, background=background)
    _check(sigmas, rgb, *distances, None, packed_info, None, background, samples._is_ours)
    return _composite(sigmas, rgb, *distances, packed_info, background)


def _composite(sigmas, rgb, t_starts, t_ends, packed_info, background) -> Rendered:
    if not runs_natively(sigmas, rgb, t_starts, t_ends, background, devices=BACKENDS):
        return composite_ref(sigmas, rgb, t_starts, t_ends, packed_info, background)
    return Rendered(*_Composite.apply(sigmas, rgb, t_starts.detach(), t_ends.detach(), packed_info, background))


def composite_ref(sigmas, rgb, t_starts, t_ends, packed_info, background=None) -> Rendered:
    """The same in plain torch; differentiable any number of times."""
    n_rays, ray_indices = packed_info.shape[0], rows_of(packed_info, sigmas.shape[0])

    def per_ray(values):
        return values.new_zeros(n_rays, *values.shape[1:]).index_add(0, ray_indices, values)

    t_mids = 0.5 * (t_starts + t_ends)
    optical_depths = sigmas * (t_ends - t_starts)
    transmittance = torch.exp(-exclusive_sum_packed(optical_depths, packed_info))
    weights = transmittance * -torch.expm1(-optical_depths)
    opacity = per_ray(weights)
    depth = per_ray(weights * t_mids)
    z_variance = per_ray(weights * (t_mids - depth[ray_indices]) ** 2)
    color = per_ray(weights[:, None] * rgb)
    if background is not None:
        color = color + (1 - opacity)[:, None] * background
    return Rendered(color, opacity, depth, weights, z_variance)


def _forward(*inputs) -> tuple[torch.Tensor, ...]:
    sigmas, rgb, t_starts, t_ends, packed_info = (x.contiguous() for x in inputs[:5])
    background = _contiguous(inputs[5])
    native, n_rays = load_native("composite", sigmas), packed_info.shape[0]
    packed = native.Packed(*map(address, (t_starts, t_ends, packed_info)), n_rays, queue_of(sigmas))
    outputs = _empty(sigmas, n_rays)
    native.composite_forward(
        packed, *map(address, (sigmas, rgb, background)), _stride(background), *map(address, outputs)
    )
    return outputs


def _backward(cotangents, kept, wanted, *inputs):
    sigmas, rgb, t_starts, t_ends, packed_info = (x.contiguous() for x in inputs[:5])
    background = _contiguous(inputs[5])
    native, n_rays = load_native("composite", sigmas), packed_info.shape[0]
    packed = native.Packed(*map(address, (t_starts, t_ends, packed_info)), n_rays, queue_of(sigmas))
    cotangents, kept = [*map(_contiguous, cotangents)], [*map(_contiguous, kept)]
    d_sigmas, d_rgb = torch.empty_like(sigmas), torch.empty_like(rgb)
    d_background = sigmas.new_empty(n_rays, 3) if wanted[5] else None
    native.composite_backward(
        *(packed, *map(address, (sigmas, rgb, background)), _stride(background), *map(address, kept)),
        *([address(x) for x in cotangents], d_sigmas.data_ptr(), d_rgb.data_ptr(), address(d_background)),
    )
    if d_background is not None and background is not None and background.ndim == 1:
        # A running sum goes ray after ray with any number of threads; torch.sum splits the rays among them.
        d_background = torch.cat([background.new_zeros(1, 3), d_background]).double().cumsum(0)[-1].float()
    return d_sigmas, d_rgb, None, None, None, d_background


def _adjoint_ref(cotangents, kept, sigmas, rgb, t_starts, t_ends, packed_info, background):
    """The adjoint in closed form (csrc/composite.h), for where no graph can be kept."""
    opacity, depth = kept
    d_rgb, d_opacity, d_depth, d_weights, d_variance = cotangents
    rays = rows_of(packed_info, sigmas.shape[0])
    t, delta = 0.5 * (t_starts + t_ends), t_ends - t_starts
    transmittance = torch.exp(-exclusive_sum_packed(sigmas * delta, packed_info))
    alphas = -torch.expm1(-sigmas * delta)
    behind = 0 if background is None else background if background.ndim == 1 else background[rays]
    own = depth[rays]
    g = d_weights + d_opacity[rays] + d_depth[rays] * t + (d_rgb[rays] * (rgb - behind)).sum(-1)
    g = g + d_variance[rays] * ((t - own) ** 2 - 2 * own * (1 - opacity[rays]) * t)
    weighted = g * transmittance * alphas
    total = weighted.new_zeros(len(packed_info)).index_add(0, rays, weighted)[rays]
    farther = total - weighted - exclusive_sum_packed(weighted, packed_info)
    d_sigmas = delta * (g * transmittance * (1 - alphas) - farther)
    d_background = (1 - opacity)[:, None] * d_rgb
    if background is None or background.ndim == 1:
        d_background = d_background.sum(0)
    return d_sigmas, (transmittance * alphas)[:, None] * d_rgb[rays], None, None, None, d_background


def _forward_any(*inputs) -> tuple[torch.Tensor, ...]:
    return composite_ref(*inputs) if _wide(*inputs) else _forward(*inputs)


def _backward_any(cotangents, kept, wanted, *inputs):
    return _adjoint_ref(cotangents, kept, *inputs) if _wide(*inputs) else _backward(cotangents, kept, wanted, *inputs)


def _empty(sigmas: torch.Tensor, n_rays: int) -> tuple[torch.Tensor, ...]:
    return tuple(sigmas.new_empty(shape) for shape in ((n_rays, 3), (n_rays,), (n_rays,), sigmas.shape, (n_rays,)))


_Composite = differentiable(_forward, _backward, keeps=(1, 2), n_outputs=5, twice=composite_ref)
_registered = differentiable(_forward_any, _backward_any, keeps=(1, 2), n_outputs=5)
register(
    "composite(Tensor sigmas, Tensor rgb, Tensor t_starts, Tensor t_ends, Tensor packed_info, Tensor? background)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_registered,
    cuda=_registered,
    fake=lambda sigmas, rgb, t_starts, t_ends, packed_info, background: _empty(sigmas, packed_info.shape[0]),
)


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None else x.contiguous()


def _stride(background: torch.Tensor | None) -> int:
    return 3 if background is not None and background.ndim == 2 else 0


def _wide(*tensors: torch.Tensor | None) -> bool:
    return any(x is not None and x.is_floating_point() and x.dtype != torch.float32 for x in tensors)


def _check(sigmas, rgb, t_starts, t_ends, ray_indices, packed_info, n_rays, background, is_ours=False):
    check_tensors("composite", sigmas=sigmas, rgb=rgb, t_starts=t_starts, t_ends=t_ends)
    if is_batched(sigmas, rgb, t_starts, t_ends, ray_indices, packed_info, background):
        raise vmap_error("composite")
    op, n_samples = "composite", sigmas.shape[0] if sigmas.ndim else 0
    check_shaped(op, "sigmas", sigmas, (None,))
    check_shaped(op, "rgb", rgb, (n_samples, 3))
    check_shaped(op, "t_starts", t_starts, (n_samples,))
    check_shaped(op, "t_ends", t_ends, (n_samples,))
    if not is_ours:
        packed_info = check_packing(op, n_samples, ray_indices, packed_info, n_rays)
    if background is not None:
        check_tensors(op, background=background)
        check_shaped(op, "background", background, (3,) if background.ndim == 1 else (packed_info.shape[0], 3))
    tensors = {"sigmas": sigmas, "rgb": rgb, "t_starts": t_starts, "t_ends": t_ends, "background": background}
    check_same_device(op, **tensors, packed_info=packed_info)
    return packed_info
