"""Volume rendering from densities or opacities, packed (ray_indices or packed_info) or batched [R, n].

Argument order, defaults and shapes are nerfacc's. `prefix_trans` multiplies the transmittance and is never written to.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mvdream_fast.nerfacc_compat.scan import exclusive_prod, exclusive_sum, pack_info
from mvdream_fast.ops._edges import require


def rendering(
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    rgb_sigma_fn: Callable | None = None,
    rgb_alpha_fn: Callable | None = None,
    render_bkgd: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict]:
    """Colours [R, 3], opacities [R, 1], depths [R, 1] (divided by the opacity) and a dict of what they were made of.

    The function is called as fn(t_starts, t_ends, ray_indices) and returns rgbs [..., 3] with sigmas or alphas [...];
    with no sample at all it isn't called. Differentiable in what it returns and in render_bkgd.
    Raises: ValueError without a function or for shapes that don't fit.
    """
    if ray_indices is not None and not t_starts.shape == t_ends.shape == ray_indices.shape:
        shapes = [list(x.shape) for x in (t_starts, t_ends, ray_indices)]
        raise ValueError(f"rendering: t_starts, t_ends and ray_indices must be of one shape [S], got {shapes}; flatten")
    function = rgb_sigma_fn or rgb_alpha_fn
    if function is None:
        raise ValueError("rendering: rgb_sigma_fn or rgb_alpha_fn must be given, got neither; pass one of them")
    rgbs, values = _evaluate(function, t_starts, t_ends, ray_indices)
    if rgb_sigma_fn is not None:
        weights, trans, alphas = render_weight_from_density(
            t_starts, t_ends, values, ray_indices=ray_indices, n_rays=n_rays
        )
        extras = {"weights": weights, "alphas": alphas, "trans": trans, "sigmas": values, "rgbs": rgbs}
    else:
        weights, trans = render_weight_from_alpha(values, ray_indices=ray_indices, n_rays=n_rays)
        extras = {"weights": weights, "trans": trans, "rgbs": rgbs, "alphas": values}
    colors = accumulate_along_rays(weights, rgbs, ray_indices, n_rays)
    opacities = accumulate_along_rays(weights, None, ray_indices, n_rays)
    depths = accumulate_along_rays(weights, (t_starts + t_ends)[..., None] / 2, ray_indices, n_rays)
    depths = depths / opacities.clamp_min(torch.finfo(rgbs.dtype).eps)
    if render_bkgd is not None:
        colors = colors + render_bkgd * (1 - opacities)
    return colors, opacities, depths, extras


def _evaluate(function: Callable, t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor | None):
    if t_starts.numel() == 0:
        return t_starts.new_zeros(*t_starts.shape, 3), t_starts.new_zeros(t_starts.shape)
    rgbs, values = function(t_starts, t_ends, ray_indices)
    if rgbs.shape[-1] != 3:
        raise ValueError(f"rendering: rgbs must have 3 channels, got {list(rgbs.shape)}; return colours")
    if values.shape != t_starts.shape:
        got, wanted = list(values.shape), list(t_starts.shape)
        raise ValueError(f"rendering: sigmas or alphas must be of shape {wanted}, got {got}; squeeze the last axis")
    return rgbs, values


def render_transmittance_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """T_i = product of (1 - alpha_j) over the samples before i; same shape as alphas."""
    trans = exclusive_prod(1 - alphas, _packing(packed_info, ray_indices, n_rays))
    return trans if prefix_trans is None else trans * prefix_trans


def render_transmittance_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """T_i = exp(-sum of sigma_j delta_j over the samples before i), and alpha_i = 1 - exp(-sigma_i delta_i)."""
    depths = sigmas * (t_ends - t_starts)
    trans = torch.exp(-exclusive_sum(depths, _packing(packed_info, ray_indices, n_rays)))
    return trans if prefix_trans is None else trans * prefix_trans, -torch.expm1(-depths)


def render_weight_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights T_i alpha_i, and T_i."""
    trans = render_transmittance_from_alpha(alphas, packed_info, ray_indices, n_rays, prefix_trans)
    return trans * alphas, trans


def render_weight_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights T_i alpha_i, T_i, and alpha_i."""
    trans, alphas = render_transmittance_from_density(
        t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans
    )
    return trans * alphas, trans, alphas


@torch.no_grad()
def render_visibility_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    early_stop_eps: float = 1e-4,
    alpha_thre: float = 0.0,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """Which samples can be seen: T_i >= early_stop_eps and, for alpha_thre > 0, alpha_i >= alpha_thre. Bool."""
    trans = render_transmittance_from_alpha(alphas, packed_info, ray_indices, n_rays, prefix_trans)
    return _visible(trans, alphas, early_stop_eps, alpha_thre)


@torch.no_grad()
def render_visibility_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    early_stop_eps: float = 1e-4,
    alpha_thre: float = 0.0,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """The same from densities."""
    trans, alphas = render_transmittance_from_density(
        t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans
    )
    return _visible(trans, alphas, early_stop_eps, alpha_thre)


def accumulate_along_rays(
    weights: Tensor, values: Tensor | None = None, ray_indices: Tensor | None = None, n_rays: int | None = None
) -> Tensor:
    """Sum of weights * values along each ray: [R, D], D = 1 without values. Packed needs ray_indices and n_rays.

    ray_indices may come in any order here. Raises: ValueError for shapes, and for indices outside [0, n_rays).
    """
    source = _weighted(weights, values)
    if ray_indices is None:
        return source.sum(-2)
    if n_rays is None:
        raise ValueError("accumulate_along_rays: n_rays must be given with ray_indices, got None; pass it")
    _check_packed("accumulate_along_rays", weights, ray_indices, n_rays)
    return source.new_zeros(n_rays, source.shape[-1]).index_add(0, ray_indices, source)


def accumulate_along_rays_(
    weights: Tensor, values: Tensor | None = None, ray_indices: Tensor | None = None, outputs: Tensor | None = None
) -> None:
    """The same, added to outputs [R, D] in place."""
    source = _weighted(weights, values)
    if outputs is None or outputs.shape[-1] != source.shape[-1]:
        got = None if outputs is None else list(outputs.shape)
        raise ValueError(f"accumulate_along_rays_: outputs must be [R, {source.shape[-1]}], got {got}; allocate it")
    if ray_indices is None:
        outputs.add_(source.sum(-2))
        return
    _check_packed("accumulate_along_rays_", weights, ray_indices, outputs.shape[0])
    outputs.index_add_(0, ray_indices, source)


def _packing(packed_info: Tensor | None, ray_indices: Tensor | None, n_rays: int | None) -> Tensor | None:
    if packed_info is None and ray_indices is not None:
        return pack_info(ray_indices, n_rays)
    return packed_info


def _visible(trans: Tensor, alphas: Tensor, early_stop_eps: float, alpha_thre: float) -> Tensor:
    visible = trans >= early_stop_eps
    return visible & (alphas >= alpha_thre) if alpha_thre > 0 else visible


def _weighted(weights: Tensor, values: Tensor | None) -> Tensor:
    if values is None:
        return weights[..., None]
    if values.shape[:-1] != weights.shape:
        wanted, got = [*weights.shape, "D"], list(values.shape)
        raise ValueError(f"accumulate_along_rays: values must be {wanted}, got {got}; add a last axis")
    return weights[..., None] * values


def _check_packed(op: str, weights: Tensor, ray_indices: Tensor, n_rays: int) -> None:
    if weights.ndim != 1:
        raise ValueError(f"{op}: weights must be [S] with ray_indices, got {list(weights.shape)}; flatten them")
    if ray_indices.shape != weights.shape:
        wanted, got = list(weights.shape), list(ray_indices.shape)
        raise ValueError(f"{op}: ray_indices must be of shape {wanted}, got {got}; one ray a sample")
    if ray_indices.numel():
        ends = [int(x) for x in torch.aminmax(ray_indices)]
        require(ends[0] >= 0 and ends[1] < n_rays, op, "ray_indices", f"in [0, {n_rays})", ends, "check n_rays")
