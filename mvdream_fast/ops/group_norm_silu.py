"""GroupNorm with the per-image embedding added before it and SiLU after it: the glue around every UNet convolution.

The convolutions live in models/.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.ops._edges import (
    address,
    by_name,
    check_float,
    check_like,
    is_batched,
    is_followed,
    is_recorded,
    load_native,
    run_kernels,
    runs_natively,
    thread_count,
    vmap_error,
)
from mvdream_fast.ops._registered import differentiable, register


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
    neither contiguous nor channels_last is copied first, and on CUDA an emb that is not contiguous. Autocast does not
    change the dtype: it is the input's. channels_last float32 on a CPU runs natively, bit-identical for any number of
    threads; the rest there is torch. Second derivatives on a native CPU path only.

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
    if by_name(x):
        return torch.ops.mvdream_fast.group_norm_silu(x, weight, bias, n_groups, eps, emb, silu)[0]
    if is_batched(x, weight, bias, emb):
        raise vmap_error("group_norm_silu")
    if x.is_cuda and is_followed(x, weight, bias, emb):
        return _GroupNormSiLU.apply(x, weight, bias, n_groups, eps, emb, silu)
    if x.is_cuda:
        return _forward_kernels(x, weight, bias, n_groups, eps, emb, silu, keep=False)[0]
    if _is_native(x, weight, bias, emb):
        if is_recorded(x, weight, bias, emb):
            return _OnCpu.apply(x, weight, bias, n_groups, eps, emb, silu)
        return _forward_native(x, weight, bias, n_groups, eps, emb, silu)
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


def _cpu(x, weight, bias, n_groups, eps, emb, silu) -> Tensor:
    """Under torch's own autograd."""
    wide = torch.promote_types(x.dtype, torch.float32)
    u = _add(x, emb, wide)
    if not x.numel():
        return (u + (weight + bias)[:, None, None]).to(x.dtype)  # zero-size, and still a function of all of them
    y = F.group_norm(u, n_groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(y) if silu else y).to(x.dtype)


def _add(x: Tensor, emb: Tensor | None, wide: torch.dtype) -> Tensor:
    return x.to(wide) if emb is None else x.to(wide) + emb.to(wide)[:, :, None, None]


def _forward_cpu(x, weight, bias, n_groups, eps, emb, silu) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and 1/std [B*V, n_groups] that the backward needs."""
    x, wide = _dense(x), torch.promote_types(x.dtype, torch.float32)
    if not x.numel():
        mean, rstd = (x.new_zeros((x.shape[0], n_groups), dtype=wide) for _ in range(2))
        return torch.empty_like(x), mean, rstd
    if _is_native(x, weight, bias, emb):
        return _forward_and_statistics(x, weight, bias, n_groups, eps, emb, silu)
    sizes = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3], n_groups)
    u = _add(x, emb, wide)
    y, mean, rstd = torch.native_group_norm(u, weight.to(wide), bias.to(wide), *sizes, eps)
    return torch.empty_like(x).copy_(F.silu(y) if silu else y), mean, rstd


def _backward_cpu(cotangents, kept, wanted, x, weight, bias, n_groups, eps, emb, silu):
    x, d_y, (mean, rstd) = _dense(x), cotangents[0], kept
    if not x.numel():
        d_weight, d_bias, d_emb = (None if p is None else torch.zeros_like(p) for p in (weight, bias, emb))
        return torch.empty_like(x), d_weight, d_bias, None, None, d_emb
    if _is_native(x, weight, bias, emb) and runs_natively(d_y):
        return _backward_native(d_y, x, weight, bias, n_groups, emb, silu, mean, rstd)
    images, channels, height, width = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    u, d_z = _add(x, emb, wide), d_y.to(wide)
    if silu:
        groups = (u.reshape(images, n_groups, -1) - mean[..., None]) * rstd[..., None]
        z = groups.reshape(x.shape) * weight.to(wide)[:, None, None] + bias.to(wide)[:, None, None]
        gate = torch.sigmoid(z)
        d_z = d_z * gate * (1 + z * (1 - gate))
    sizes = (images, channels, height * width, n_groups)
    d_u, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
        d_z.contiguous(), u.contiguous(), mean, rstd, weight.to(wide), *sizes, [True] * 3
    )
    d_emb = None if emb is None else d_u.sum((2, 3)).to(emb.dtype)
    d_x = torch.empty_like(x).copy_(d_u)
    return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, None, d_emb


def _is_native(x: Tensor, weight: Tensor, bias: Tensor, emb: Tensor | None) -> bool:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and x.numel() > 0
    return channels_last and runs_natively(x, weight, bias, emb)


def _native_norm(x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, emb: Tensor | None, silu: bool):
    """The extension's view of contiguous (emb: row by row) arguments, which the caller keeps alive."""
    sizes = (x.shape[0], x.shape[2] * x.shape[3], x.shape[1], n_groups, silu)
    stride = 0 if emb is None else emb.stride(0)
    pointers = map(address, (x, weight, bias, emb))
    return load_native("group_norm_silu").GroupNorm(*pointers, stride, *sizes)


def _rows(emb: Tensor | None) -> Tensor | None:
    return emb if emb is None or emb.stride(1) == 1 else emb.contiguous()


def _forward_native(x, weight, bias, n_groups, eps, emb, silu, mean=None, rstd=None) -> Tensor:
    weight, bias, emb, y = weight.contiguous(), bias.contiguous(), _rows(emb), torch.empty_like(x)
    norm, n_threads = _native_norm(x, weight, bias, n_groups, emb, silu), thread_count()
    load_native("group_norm_silu").group_norm_silu_forward(norm, eps, *map(address, (y, mean, rstd)), n_threads)
    return y


def _forward_and_statistics(x, weight, bias, n_groups, eps, emb, silu) -> tuple[Tensor, Tensor, Tensor]:
    """_forward_cpu where the extension runs."""
    mean, rstd = x.new_empty((x.shape[0], n_groups)), x.new_empty((x.shape[0], n_groups))
    return _forward_native(x, weight, bias, n_groups, eps, emb, silu, mean, rstd), mean, rstd


def _backward_native(d_y, x, weight, bias, n_groups, emb, silu, mean, rstd):
    d_y = d_y.contiguous(memory_format=torch.channels_last)
    weight, bias, emb = weight.contiguous(), bias.contiguous(), _rows(emb)
    grads = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    d_emb = None if emb is None else emb.new_empty(emb.shape)
    norm = _native_norm(x, weight, bias, n_groups, emb, silu)
    pointers = map(address, (d_y, mean, rstd, *grads, d_emb))
    load_native("group_norm_silu").group_norm_silu_backward(norm, *pointers, thread_count())
    return *grads, None, None, d_emb


def _dense(x: Tensor) -> Tensor:
    """x itself in one of the two memory formats, else a contiguous copy."""
    known = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if known else x.contiguous()


def _forward_kernels(x, *arguments, keep: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return run_kernels("group_norm_silu", "x", x, "forward", _dense(x), *arguments, keep)


def _backward_kernels(cotangents, kept, wanted, x, weight, bias, n_groups, eps, emb, silu):
    arguments = (_dense(cotangents[0]), _dense(x), weight, bias, n_groups, emb, silu, *kept)
    *grads, d_emb = run_kernels("group_norm_silu", "x", x, "backward", *arguments)
    return *grads, None, None, d_emb


def _fake(x, weight, bias, n_groups, eps, emb, silu):
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(_dense(x)), *(x.new_empty((x.shape[0], n_groups), dtype=wide) for _ in range(2))


_GroupNormSiLU = differentiable(_forward_kernels, _backward_kernels, keeps=(1, 2))
_OnCpu = differentiable(_forward_and_statistics, _backward_cpu, keeps=(1, 2), twice=group_norm_silu_ref)
register(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, SymInt n_groups, float eps, Tensor? emb, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=differentiable(_forward_cpu, _backward_cpu, keeps=(1, 2)),
    cuda=_GroupNormSiLU,
    fake=_fake,
)
