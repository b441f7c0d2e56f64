"""Score distillation's target and gradient in Triton: one program a scene, one launch; not differentiable.

Formula: m = u + s (c - u); x0(o) = a z_t - b o with (a, b) = (abar^-1/2, (1/abar - 1)^1/2) for eps-prediction and
(abar^1/2, (1 - abar)^1/2) for v; f = (std x0(c) + 1e-8) / (std x0(m) + 1e-8), unbiased over a scene, two passes.
    "x0":  target = (rescale f + 1 - rescale) x0(m), gradient = (z - target) / (B*V)
    "sds": gradient = w (eps(m) - noise) / (B*V), target = z - B*V gradient; w is 1 - abar, 1 or sqrt(abar) (1 - abar)
With a limit k the gradient times B*V is held within -k and k, and target = z - B*V gradient in either mode.
Source: Shi et al. 2023, "MVDream", section 3.3; Poole et al. 2022, "DreamFusion"; Lin et al. 2023, section 3.4.
"""

import math

import torch
import triton
import triton.language as tl
from mvdream_fast.kernels._launch import Launch, by_layout
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True, "num_warps": 8}
BLOCK = 2048
STD_FLOOR = tl.constexpr(1e-8)
WEIGHTINGS = ("sds", "uniform", "fantasia3d")


@triton.jit
def _reconstructions(z_t, cond, uncond, abar, at, size, scene, scale, inside, ABAR_STEP: tl.constexpr, V: tl.constexpr):
    """x0 of the guided and of the conditional prediction at offsets `at` of a scene, float32."""
    x_t = tl.load(z_t + at, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cond + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(uncond + at, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(abar + at // size * ABAR_STEP, mask=inside, other=1.0).to(tl.float32)
    mixed = u + scale * (c - u)
    if V:
        a, b = tl.sqrt(p), tl.sqrt(1 - p)
    else:
        a, b = 1 / tl.sqrt(p), tl.sqrt(1 / p - 1)
    return a * x_t - b * mixed, a * x_t - b * c


@triton.jit
def _within(step, limit):
    """The gradient within -limit and limit; what is no number stays none."""
    k = tl.load(limit).to(tl.float32)
    step = tl.maximum(step, -k, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(step, k, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sds_target_x0(
    z, z_t, cond, uncond, abar, limit, target, gradient, size, scene_size, scale, rescale, inv_images,
    ABAR_STEP: tl.constexpr, V: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mode "x0": `size` values an image, `scene_size` a scene, all contiguous."""
    scene = tl.program_id(0).to(tl.int64)
    first = scene * scene_size
    sum_m, sum_c = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, scene_size, BLOCK):
        local = start + tl.arange(0, BLOCK)
        inside = local < scene_size
        x0_m, x0_c = _reconstructions(z_t, cond, uncond, abar, first + local, size, scene, scale, inside, ABAR_STEP, V)
        sum_m += x0_m
        sum_c += x0_c
    n = tl.cast(scene_size, tl.float32)
    mean_m, mean_c = tl.sum(sum_m, 0) / n, tl.sum(sum_c, 0) / n
    square_m, square_c = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, scene_size, BLOCK):
        local = start + tl.arange(0, BLOCK)
        inside = local < scene_size
        x0_m, x0_c = _reconstructions(z_t, cond, uncond, abar, first + local, size, scene, scale, inside, ABAR_STEP, V)
        x0_m, x0_c = tl.where(inside, x0_m - mean_m, 0.0), tl.where(inside, x0_c - mean_c, 0.0)
        square_m += x0_m * x0_m
        square_c += x0_c * x0_c
    rest = tl.maximum(n - 1, 1.0)  # a scene of one value, which only comes with a rescale of 0, has a deviation of 0
    std_m, std_c = tl.sqrt(tl.sum(square_m, 0) / rest), tl.sqrt(tl.sum(square_c, 0) / rest)
    factor = rescale * ((std_c + STD_FLOOR) / (std_m + STD_FLOOR)) + (1 - rescale)
    for start in range(0, scene_size, BLOCK):
        local = start + tl.arange(0, BLOCK)
        inside, at = local < scene_size, first + local
        x0_m, x0_c = _reconstructions(z_t, cond, uncond, abar, at, size, scene, scale, inside, ABAR_STEP, V)
        x0_m = x0_m * factor
        clean = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        step = clean - x0_m
        if CLIP:
            step = _within(step, limit)
            x0_m = clean - step
        tl.store(target + at, x0_m.to(target.dtype.element_ty), mask=inside)
        tl.store(gradient + at, (step * inv_images).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def sds_target_noise(
    z, z_t, cond, uncond, noise, abar, limit, target, gradient, size, total, scale, inv_images,
    ABAR_STEP: tl.constexpr, V: tl.constexpr, CLIP: tl.constexpr, WEIGHTING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mode "sds", element by element."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    c = tl.load(cond + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(uncond + at, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(abar + at // size * ABAR_STEP, mask=inside, other=1.0).to(tl.float32)
    eps = u + scale * (c - u)
    if V:
        eps = tl.sqrt(p) * eps + tl.sqrt(1 - p) * tl.load(z_t + at, mask=inside, other=0.0).to(tl.float32)
    step = eps - tl.load(noise + at, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTING == 0:
        step = (1 - p) * step
    if WEIGHTING == 2:
        step = tl.sqrt(p) * (1 - p) * step
    if CLIP:
        step = _within(step, limit)
    clean = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + at, (clean - step).to(target.dtype.element_ty), mask=inside)
    tl.store(gradient + at, (step * inv_images).to(gradient.dtype.element_ty), mask=inside)


def forward(
    z: Tensor, z_t: Tensor, cond: Tensor, uncond: Tensor, noise: Tensor | None, abar: Tensor,
    guidance_scale: float, prediction: str, rescale: float, mode: str, n_views: int, weighting: str = "sds",
    grad_clip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """target and gradient, contiguous [B*V, C, h, w] in z's dtype; inputs that are not contiguous are copied."""
    noise = noise if mode == "sds" else None
    limit = abar if grad_clip is None else grad_clip  # an address that is not read without a limit
    inputs = [a.contiguous() for a in (z, z_t, cond, uncond, noise, abar, limit) if a is not None]
    dtypes = tuple(a.dtype for a in inputs)
    settings = (guidance_scale, prediction, rescale, mode, n_views, weighting, grad_clip is not None)
    launch = _launch(z.shape, dtypes, z.device, abar.numel() > 1, *settings)
    target, gradient = (torch.empty(z.shape, dtype=z.dtype, device=z.device) for _ in range(2))
    if launch:
        launch(*inputs, target, gradient)
    return target, gradient


@by_layout
def _launch(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device, many_steps: bool,
    guidance_scale: float, prediction: str, rescale: float, mode: str, n_views: int, weighting: str, clipped: bool,
) -> Launch | None:  # fmt: skip
    """The kernel of a mode; None where there is nothing to do."""
    images, size = shape[0], math.prod(shape[1:])
    if not images * size:
        return None
    settings = {"ABAR_STEP": int(many_steps), "V": prediction == "v", "CLIP": clipped, "BLOCK": BLOCK, **OPTIONS}
    if mode == "sds":
        values = (size, images * size, float(guidance_scale), 1 / images)
        settings["WEIGHTING"] = WEIGHTINGS.index(weighting)
        return Launch(sds_target_noise, triton.cdiv(images * size, BLOCK), values, settings)
    values = (size, n_views * size, float(guidance_scale), float(rescale), 1 / images)
    return Launch(sds_target_x0, images // n_views, values, settings)
