"""Score distillation's target and gradient on the latents from the two noise predictions, in one pass.

Drawing the step and the noise, and the UNet call, live in guidance/sds.py.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mvdream_fast.ops._edges import check_float, check_tensors, is_batched, run_kernels, vmap_error
from mvdream_fast.ops._registered import register

OP = "sds_target"
STD_FLOOR = 1e-8

Weighting = Literal["sds", "uniform", "fantasia3d"]


class SDSTarget(NamedTuple):
    """`gradient` = (z - target) / (B*V), so that sum((z - target)^2) / (2 B*V) has it as its derivative."""

    target: Tensor  # [B*V, C, h, w]
    gradient: Tensor  # [B*V, C, h, w]


def sds_target(
    z: Tensor,
    z_t: Tensor,
    noise_pred_cond: Tensor,
    noise_pred_uncond: Tensor,
    noise: Tensor | None,
    alphas_cumprod_t: Tensor,
    guidance_scale: float,
    prediction: Literal["eps", "v"] = "eps",
    rescale: float = 0.5,
    mode: Literal["x0", "sds"] = "x0",
    n_views: int = 4,
    weighting: Weighting = "sds",
    grad_clip: Tensor | None = None,
) -> SDSTarget:
    """Guidance, reconstruction, rescaling of its standard deviation, and the gradient of the distillation loss.

    With m = u + guidance_scale (c - u), abar = alphas_cumprod_t and x0(.) the reconstruction from a prediction:
    "x0":  target = rescale * f * x0(m) + (1 - rescale) * x0(m), f = (std x0(c) + 1e-8) / (std x0(m) + 1e-8), the
    unbiased standard deviation over all values of a scene's views; gradient = (z - target) / (B*V).
    "sds": gradient = w (eps(m) - noise) / (B*V), target = z - B*V * gradient; rescale is not used.
    With grad_clip = k every value of B*V * gradient is held within -k and k, and target = z - B*V * gradient in either
    mode; what is no number stays none.
    Nothing is differentiable: both results are constants of the loss. Computed in float32, returned in z's dtype. On
    CUDA inputs that are not contiguous are copied.

    Args:
        z, z_t: clean and noised latents [B*V, C, h, w], views fastest.
        noise_pred_cond, noise_pred_uncond: the model's raw outputs, [B*V, C, h, w].
        noise: the noise in z_t, [B*V, C, h, w]; may be None in mode "x0".
        alphas_cumprod_t: abar of the step: one element, or [B*V].
        guidance_scale: 1 is the conditional prediction alone.
        prediction: what the model's outputs are.
        rescale: from 0 (off) to 1.
        mode: "x0" (the reconstruction loss of MVDream) or "sds" (DreamFusion's).
        n_views: V, must divide the batch.
        weighting: w of mode "sds": 1 - abar ("sds"), 1 ("uniform") or sqrt(abar) (1 - abar) ("fantasia3d").
        grad_clip: one element on the device of z, so that a graph may hold a limit that changes; None: no limit.

    Returns:
        SDSTarget(target, gradient), each [B*V, C, h, w].

    Raises:
        ValueError, TypeError: shapes, ranges, dtypes, unknown names.
        RuntimeError: tensors on two devices, under vmap, or a CUDA tensor without Triton.

    Source: Shi et al. 2023, "MVDream", section 3.3 and appendix; Poole et al. 2022, "DreamFusion", equation 3; Lin et
    al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4; Salimans and Ho 2022 for v;
    Chen et al. 2023, "Fantasia3D" (a weight); Hong et al. 2023, "Debiasing Scores and Prompts of 2D Diffusion for
    View-consistent Text-to-3D Generation" (clipping).
    """
    tensors = (z, z_t, noise_pred_cond, noise_pred_uncond, noise, alphas_cumprod_t)
    _check(*tensors, prediction, rescale, mode, n_views)
    _check_step(z, mode, weighting, grad_clip)
    settings = (guidance_scale, prediction, rescale, mode, n_views, weighting)
    if torch.compiler.is_compiling():
        *constants, limit = (None if x is None else x.detach() for x in (*tensors, grad_clip))
        return SDSTarget(*torch.ops.mvdream_fast.sds_target(*constants, *settings, limit))
    if is_batched(*tensors, grad_clip):
        raise vmap_error(OP)
    return SDSTarget(*_forward(*tensors, *settings, grad_clip))


def sds_target_ref(
    z: Tensor,
    z_t: Tensor,
    noise_pred_cond: Tensor,
    noise_pred_uncond: Tensor,
    noise: Tensor | None,
    alphas_cumprod_t: Tensor,
    guidance_scale: float,
    prediction: str = "eps",
    rescale: float = 0.5,
    mode: str = "x0",
    n_views: int = 4,
    weighting: str = "sds",
    grad_clip: Tensor | None = None,
) -> SDSTarget:
    """sds_target in plain torch, at least in float32; any device."""
    wide = torch.promote_types(z.dtype, torch.float32)
    n_images = z.shape[0]
    abar = alphas_cumprod_t.detach().to(wide).reshape(-1).expand(n_images)[:, None, None, None]
    x, x_t, cond, uncond = (a.detach().to(wide) for a in (z, z_t, noise_pred_cond, noise_pred_uncond))
    mixed = uncond + guidance_scale * (cond - uncond)
    if noise is not None and mode == "sds":  # which needs it
        eps = mixed if prediction == "eps" else abar.sqrt() * mixed + (1 - abar).sqrt() * x_t
        step = _weight(abar, weighting) * (eps - noise.detach().to(wide))
        target = x - step
    else:
        x0_mixed = _to_x0(x_t, mixed, abar, prediction)
        x0_cond = _to_x0(x_t, cond, abar, prediction)
        target = x0_mixed
        if rescale:
            factor = (_scene_std(x0_cond, n_views) + STD_FLOOR) / (_scene_std(x0_mixed, n_views) + STD_FLOOR)
            target = x0_mixed * (rescale * factor + (1 - rescale))
        step = x - target
    if grad_clip is not None:
        limit = grad_clip.detach().to(wide).reshape(())
        step = step.clamp(-limit, limit)
        target = x - step
    return SDSTarget(target.to(z.dtype), (step / max(n_images, 1)).to(z.dtype))


@torch.no_grad()
def _forward(z: Tensor, *rest) -> tuple[Tensor, Tensor]:
    if z.is_cuda:
        return run_kernels(OP, "z", z, "forward", z, *rest)
    return sds_target_ref(z, *rest)


def _op(*arguments) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in _forward(*arguments))


register(
    "sds_target(Tensor z, Tensor z_t, Tensor noise_pred_cond, Tensor noise_pred_uncond, Tensor? noise,"
    " Tensor alphas_cumprod_t, float guidance_scale, str prediction, float rescale, str mode, SymInt n_views,"
    ' str weighting="sds", Tensor? grad_clip=None) -> (Tensor, Tensor)',
    cpu=_op,
    cuda=_op,
    fake=lambda z, *_: (z.new_empty(z.shape), z.new_empty(z.shape)),
)


def _weight(abar: Tensor, weighting: str) -> Tensor:
    if weighting == "uniform":
        return torch.ones_like(abar)
    return abar.sqrt() * (1 - abar) if weighting == "fantasia3d" else 1 - abar


def _to_x0(x_t: Tensor, out: Tensor, abar: Tensor, prediction: str) -> Tensor:
    if prediction == "eps":
        return x_t / abar.sqrt() - (1 / abar - 1).sqrt() * out
    return abar.sqrt() * x_t - (1 - abar).sqrt() * out


def _scene_std(x: Tensor, n_views: int) -> Tensor:
    """[B*V, C, h, w] -> [B*V, 1, 1, 1]: unbiased, over all values of the image's scene."""
    if x.numel() == 0:
        return x.new_zeros(x.shape[0], 1, 1, 1)
    std = x.reshape(x.shape[0] // n_views, -1).std(dim=1)
    return std.repeat_interleave(n_views)[:, None, None, None]


def _check(
    z: Tensor,
    z_t: Tensor,
    cond: Tensor,
    uncond: Tensor,
    noise: Tensor | None,
    abar: Tensor,
    prediction: str,
    rescale: float,
    mode: str,
    n_views: int,
) -> None:
    if prediction not in ("eps", "v"):
        raise ValueError(f'{OP}: prediction must be "eps" or "v", got {prediction!r}; see the model\'s configuration')
    if mode not in ("x0", "sds"):
        raise ValueError(f'{OP}: mode must be "x0" or "sds", got {mode!r}; "x0" is MVDream\'s')
    if mode == "sds" and noise is None:
        raise ValueError(f'{OP}: noise must be given in mode "sds", got None; pass the noise that is in z_t')
    if not 0 <= rescale <= 1:
        raise ValueError(f"{OP}: rescale must be from 0 to 1, got {rescale}; MVDream uses 0.5")
    check_float(OP, "z", z)
    if z.ndim != 4:
        raise ValueError(f"{OP}: z must be [B*V, C, h, w], got {tuple(z.shape)}; views are the fastest batch index")
    if n_views < 1 or z.shape[0] % n_views:
        raise ValueError(f"{OP}: n_views must divide the batch of {z.shape[0]} images, got {n_views}; check the batch")
    if mode == "x0" and rescale and z.numel() == z.shape[0] and n_views == 1:
        raise ValueError(f"{OP}: rescale must be 0 for scenes of one value, got {rescale}; they have no deviation")
    check_tensors(OP, z_t=z_t, noise_pred_cond=cond, noise_pred_uncond=uncond, alphas_cumprod_t=abar)
    if noise is not None:
        check_tensors(OP, noise=noise)
    if abar.numel() != 1 and abar.shape != z.shape[:1]:
        raise ValueError(f"{OP}: alphas_cumprod_t must be one element or [B*V], got {tuple(abar.shape)}; index by t")
    named = (("z_t", z_t), ("noise_pred_cond", cond), ("noise_pred_uncond", uncond), ("noise", noise))
    for name, x in named:
        if x is not None and x.shape != z.shape:
            raise ValueError(f"{OP}: {name} must be {tuple(z.shape)} as z, got {tuple(x.shape)}; one latent per image")
    for name, x in (*named, ("alphas_cumprod_t", abar)):
        if x is None:
            continue
        check_float(OP, name, x)
        if x.device != z.device:
            raise RuntimeError(f"{OP}: {name} must be on the device of z, got {x.device} and {z.device}; move one")


def _check_step(z: Tensor, mode: str, weighting: str, grad_clip: Tensor | None) -> None:
    """What is done to the gradient."""
    if weighting not in ("sds", "uniform", "fantasia3d"):
        raise ValueError(f'{OP}: weighting must be "sds", "uniform" or "fantasia3d", got {weighting!r}; choose one')
    if weighting != "sds" and mode == "x0":
        raise ValueError(f'{OP}: weighting must be "sds" in mode "x0", got {weighting!r}; only mode "sds" has a weight')
    if grad_clip is None:
        return
    check_float(OP, "grad_clip", grad_clip)
    if grad_clip.numel() != 1:
        raise ValueError(f"{OP}: grad_clip must be one element, got {tuple(grad_clip.shape)}; one limit for all values")
    if grad_clip.device != z.device:
        where = f"{grad_clip.device} and {z.device}"
        raise RuntimeError(f"{OP}: grad_clip must be on the device of z, got {where}; move one")
