"""GroupNorm with the per-image embedding added before it and SiLU after it: the glue around every UNet convolution.

The convolutions live in models/.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.ops._edges import check_float, check_like, is_batched, vmap_error


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    n_groups: int,
    eps: float = 1e-5,
    emb: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """silu(group_norm(x + emb)); the embedding is one row per image, added to every pixel.

    Statistics are float32, two passes (mean, then variance: no cancellation). The memory format is kept; an x that is
    neither contiguous nor channels_last is copied first. Autocast does not change the dtype: it is the input's.

    Args:
        x: [B*V, C, h, w] contiguous or channels_last; float32, float16 or bfloat16 (float64 on the CPU).
        weight, bias: [C], of x's dtype or float32.
        n_groups: divides C.
        eps: added to the variance.
        emb: [B*V, C] or None, of x's dtype or float32.
        silu: False stops after the affine map.

    Returns:
        [B*V, C, h, w] in x's dtype and memory format.

    Raises:
        ValueError, TypeError: shapes, ranges, dtypes.
        RuntimeError: tensors on two devices, under vmap, or a CUDA tensor without Triton.

    Source: Wu and He 2018, "Group Normalization"; the place of emb is the ResBlock's of latent diffusion.
    """
    _check(x, weight, bias, n_groups, eps, emb)
    if is_batched(x, weight, bias, emb):
        raise vmap_error("group_norm_silu")
    return _cpu(x, weight, bias, n_groups, eps, emb, silu)


def group_norm_silu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    n_groups: int,
    eps: float = 1e-5,
    emb: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """group_norm_silu in plain torch, at least in float32; any device, differentiable."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if emb is not None:
        y = y + emb.to(wide)[:, :, None, None]
    groups = y.reshape(x.shape[0], n_groups, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = normed.reshape(x.shape) * weight.to(wide)[:, None, None] + bias.to(wide)[:, None, None]
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, eps: float, emb: Tensor | None) -> None:
    op = "group_norm_silu"
    check_float(op, "x", x)
    if x.ndim != 4:
        raise ValueError(f"{op}: x must be [B*V, C, h, w], got {tuple(x.shape)}; reshape it")
    images, channels = x.shape[:2]
    if n_groups < 1 or channels % n_groups:
        raise ValueError(f"{op}: n_groups must divide the {channels} channels, got {n_groups}; choose a divisor")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be positive, got {eps}; the usual value is 1e-5")
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_like(op, name, parameter, "x", x)
        if parameter.shape != (channels,):
            raise ValueError(f"{op}: {name} must be [C] = [{channels}], got {tuple(parameter.shape)}; see x's channels")
    if emb is not None:
        check_like(op, "emb", emb, "x", x)
        if emb.shape != (images, channels):
            raise ValueError(
                f"{op}: emb must be [B*V, C] = [{images}, {channels}], got {tuple(emb.shape)}; one row per image"
            )


def _cpu(x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, eps: float, emb: Tensor | None, silu: bool) -> Tensor:
    if emb is not None:
        x = x + emb.to(x.dtype)[:, :, None, None]
    if weight.dtype != bias.dtype:
        weight, bias = weight.float(), bias.float()
    y = F.group_norm(x, n_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(y) if silu else y
