"""Volume rendering from densities or opacities, packed (ray_indices or packed_info) or batched [R, n].

Argument order, defaults and shapes are nerfacc's; packed_info counts where ray_indices come as well. `prefix_trans`
multiplies the transmittance and is never written to. Half precision is summed as float32; results have the dtype that
torch gives the product of the inputs. Shapes and indices that don't fit are a ValueError, wrong dtypes a TypeError.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mvdream_fast.nerfacc_compat._inputs import (
    HALVES,
    check_alike,
    check_fits,
    check_range,
    check_tensor,
    floats,
    packing,
    promoted,
    ray_count,
    whole,
    widened,
)
from mvdream_fast.nerfacc_compat.scan import scan
from mvdream_fast.ops._edges import check_same_device, require


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
    with no sample at all it isn't called. render_bkgd: [3], or [R, 3]. Differentiable in what the function returns and
    in render_bkgd.
    Raises: ValueError without a function or for shapes that don't fit; TypeError.
    """
    function, kind = (rgb_sigma_fn, "sigmas") if rgb_sigma_fn is not None else (rgb_alpha_fn, "alphas")
    if function is None:
        raise ValueError("rendering: rgb_sigma_fn or rgb_alpha_fn must be given, got neither; pass one of them")
    check_alike("rendering", t_starts=t_starts, t_ends=t_ends)
    packed_info, shape = None, (*t_starts.shape[:-1], 3)
    if ray_indices is not None:
        n_rays = ray_count("rendering", n_rays)
        shape = (n_rays, 3)
        packed_info = packing("rendering", "t_starts", t_starts, None, ray_indices, n_rays)
    if render_bkgd is not None:
        check_fits("rendering", "render_bkgd", render_bkgd, shape, t_starts)
    rgbs, values = _evaluate(function, kind, t_starts, t_ends, ray_indices)
    if kind == "sigmas":
        trans, alphas, dtype = _from_density("rendering", t_starts, t_ends, values, packed_info)
    else:
        trans, alphas, dtype = _from_alpha("rendering", values, packed_info)
    weights, mids = trans * alphas, 0.5 * (floats(t_starts) + floats(t_ends))
    colors = summed(weights, floats(rgbs), ray_indices, n_rays)
    opacities = summed(weights, None, ray_indices, n_rays)
    depths = summed(weights, mids[..., None], ray_indices, n_rays)
    depths = depths / opacities.clamp_min(torch.finfo(colors.dtype).eps)
    if render_bkgd is not None:
        colors = colors + floats(render_bkgd) * (1 - opacities)
    made = {"weights": weights, "trans": trans, "alphas": alphas}
    extras = {name: x.to(dtype) for name, x in made.items()} | {kind: values, "rgbs": rgbs}
    like = extras["weights"]
    colors, depths = colors.to(promoted(like, rgbs, render_bkgd)), depths.to(promoted(like, t_starts, t_ends))
    return colors, opacities.to(dtype), depths, extras


def _evaluate(function: Callable, kind: str, t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor | None):
    if t_starts.numel() == 0:
        return t_starts.new_zeros(*t_starts.shape, 3), t_starts.new_zeros(t_starts.shape)
    rgbs, values = function(t_starts, t_ends, ray_indices)
    for name, x, wanted in ((kind, values, [*t_starts.shape]), ("rgbs", rgbs, [*t_starts.shape, 3])):
        check_tensor("rendering", name, x)
        got = list(x.shape)
        require(
            got == wanted, "rendering", name, f"of shape {wanted}", got, "return one a sample, without another axis"
        )
    check_same_device("rendering", t_starts=t_starts, rgbs=rgbs, **{kind: values})
    return rgbs, values


def render_transmittance_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """T_i = product of (1 - alpha_j) over the samples before i; same shape as alphas."""
    op = "render_transmittance_from_alpha"
    trans, _, dtype = _from_alpha(op, alphas, packed_info, ray_indices, n_rays, prefix_trans)
    return trans.to(dtype)


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
    op = "render_transmittance_from_density"
    trans, alphas, dtype = _from_density(op, t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans)
    return trans.to(dtype), alphas.to(dtype)


def render_weight_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights T_i alpha_i, and T_i."""
    op = "render_weight_from_alpha"
    trans, alphas, dtype = _from_alpha(op, alphas, packed_info, ray_indices, n_rays, prefix_trans)
    return (trans * alphas).to(dtype), trans.to(dtype)


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
    op = "render_weight_from_density"
    trans, alphas, dtype = _from_density(op, t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans)
    return (trans * alphas).to(dtype), trans.to(dtype), alphas.to(dtype)


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
    op = "render_visibility_from_alpha"
    trans, alphas, _ = _from_alpha(op, alphas, packed_info, ray_indices, n_rays, prefix_trans)
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
    op = "render_visibility_from_density"
    trans, alphas, _ = _from_density(op, t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans)
    return _visible(trans, alphas, early_stop_eps, alpha_thre)


def accumulate_along_rays(
    weights: Tensor, values: Tensor | None = None, ray_indices: Tensor | None = None, n_rays: int | None = None
) -> Tensor:
    """Sum of weights * values along each ray: [R, D], D = 1 without values. Packed needs ray_indices and n_rays.

    ray_indices may come in any order here. Raises: ValueError for shapes, and for indices outside [0, n_rays).
    """
    if ray_indices is not None:
        n_rays = ray_count("accumulate_along_rays", n_rays)
    _check_sum("accumulate_along_rays", weights, values, ray_indices, n_rays)
    total = summed(widened(weights), None if values is None else widened(values), ray_indices, n_rays)
    dtype = weights.dtype if values is None else torch.result_type(weights, values)
    return total.to(dtype) if dtype in HALVES else total


def accumulate_along_rays_(
    weights: Tensor, values: Tensor | None = None, ray_indices: Tensor | None = None, outputs: Tensor | None = None
) -> None:
    """The same, added to outputs [R, D] in place."""
    op = "accumulate_along_rays_"
    if outputs is None:
        raise TypeError(f"{op}: outputs must be a tensor, got NoneType; pass a tensor")
    check_tensor(op, "outputs", outputs)
    _check_sum(op, weights, values, ray_indices, outputs.shape[0])
    rays = weights.shape[:-1] if ray_indices is None else outputs.shape[:1]
    wanted, got = [*rays, 1 if values is None else values.shape[-1]], list(outputs.shape)
    require(got == wanted, op, "outputs", f"of shape {wanted}", got, "allocate one row a ray")
    check_same_device(op, weights=weights, outputs=outputs)
    total = summed(widened(weights), None if values is None else widened(values), ray_indices, outputs.shape[0])
    outputs.add_(total)


def summed(weights: Tensor, values: Tensor | None, ray_indices: Tensor | None, n_rays: int | None) -> Tensor:
    """`accumulate_along_rays` of what is checked and of no half precision."""
    source = weights[..., None] if values is None else weights[..., None] * values
    if ray_indices is None or n_rays is None:
        return source.sum(-2)
    return source.new_zeros(n_rays, source.shape[-1]).index_add(0, ray_indices.long(), source)


def _from_alpha(op, alphas, packed_info=None, ray_indices=None, n_rays=None, prefix_trans=None):
    """Transmittance and opacities, both of at least float32, and the dtype that the caller is owed."""
    check_tensor(op, "alphas", alphas)
    packed_info = packing(op, "alphas", alphas, packed_info, ray_indices, n_rays)
    dtype, prefix = _prefix(op, alphas, promoted(alphas), prefix_trans)
    alphas = floats(alphas)
    trans = scan(1 - alphas, packed_info, product=True, exclusive=True)
    return trans if prefix is None else trans * prefix, alphas, dtype


def _from_density(op, t_starts, t_ends, sigmas, packed_info=None, ray_indices=None, n_rays=None, prefix_trans=None):
    check_alike(op, t_starts=t_starts, t_ends=t_ends, sigmas=sigmas)
    packed_info = packing(op, "sigmas", sigmas, packed_info, ray_indices, n_rays)
    dtype, prefix = _prefix(op, sigmas, promoted(t_starts, t_ends, sigmas), prefix_trans)
    depths = sigmas * (floats(t_ends) - floats(t_starts))
    trans = torch.exp(-scan(depths, packed_info, product=False, exclusive=True))
    return trans if prefix is None else trans * prefix, -torch.expm1(-depths), dtype


def _prefix(op: str, samples: Tensor, dtype: torch.dtype, prefix_trans: Tensor | None):
    if prefix_trans is None:
        return dtype, None
    check_fits(op, "prefix_trans", prefix_trans, samples.shape, samples)
    return torch.promote_types(dtype, promoted(prefix_trans)), floats(prefix_trans)


def _visible(trans: Tensor, alphas: Tensor, early_stop_eps: float, alpha_thre: float) -> Tensor:
    visible = trans >= early_stop_eps
    return visible & (alphas >= alpha_thre) if alpha_thre > 0 else visible


def _check_sum(op: str, weights, values, ray_indices, n_rays) -> None:
    check_tensor(op, "weights", weights)
    require(weights.dtype != torch.bool, op, "weights", "numbers", weights.dtype, "convert them first", TypeError)
    shape = list(weights.shape)
    if values is not None:
        require(isinstance(values, Tensor), op, "values", "a tensor", type(values).__name__, "pass a tensor", TypeError)
        got = list(values.shape)
        require(got[:-1] == shape, op, "values", f"of shape {[*shape, 'D']}", got, "add a last axis")
        check_same_device(op, weights=weights, values=values)
    if ray_indices is not None:
        require(len(shape) == 1, op, "weights", "of shape [S] with ray_indices", shape, "flatten them")
        indices = whole(op, "ray_indices", ray_indices, weights)
        got = list(indices.shape)
        require(got == shape, op, "ray_indices", f"of shape {shape}", got, "one ray a sample")
        check_range(op, "ray_indices", indices, n_rays)
