"""GroupNorm with the per-image embedding added before it and SiLU after it: the glue around every UNet convolution.

The convolutions live in models/.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    vjp,
    vmap_error,
)


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
        return _forward(_dense(x), weight, bias, n_groups, eps, emb, silu)[0]
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


def _cpu(x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, eps: float, emb: Tensor | None, silu: bool) -> Tensor:
    """Under torch's own autograd."""
    wide = torch.promote_types(x.dtype, torch.float32)
    u = _add(x, emb, wide)
    if not x.numel():
        return (u + (weight + bias)[:, None, None]).to(x.dtype)  # zero-size, and still a function of all of them
    y = F.group_norm(u, n_groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(y) if silu else y).to(x.dtype)


def _add(x: Tensor, emb: Tensor | None, wide: torch.dtype) -> Tensor:
    return x.to(wide) if emb is None else x.to(wide) + emb.to(wide)[:, :, None, None]


def _forward_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, eps: float, emb: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and 1/std [B*V, n_groups] that the backward needs."""
    wide = torch.promote_types(x.dtype, torch.float32)
    sizes = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3], n_groups)
    if not x.numel():
        return torch.empty_like(x), *(x.new_zeros((x.shape[0], n_groups), dtype=wide) for _ in range(2))
    if _is_native(x, weight, bias, emb):
        return _forward_and_statistics(x, weight, bias, n_groups, eps, emb, silu)
    u = _add(x, emb, wide)
    y, mean, rstd = torch.native_group_norm(u, weight.to(wide), bias.to(wide), *sizes, eps)
    return torch.empty_like(x).copy_(F.silu(y) if silu else y), mean, rstd


def _backward_cpu(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    n_groups: int,
    emb: Tensor | None,
    silu: bool,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if not x.numel():
        return torch.empty_like(x), *(None if p is None else torch.zeros_like(p) for p in (weight, bias, emb))
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
    d_u, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
        d_z.contiguous(),
        u.contiguous(),
        mean,
        rstd,
        weight.to(wide),
        images,
        channels,
        height * width,
        n_groups,
        [True] * 3,
    )
    d_emb = None if emb is None else d_u.sum((2, 3)).to(emb.dtype)
    return torch.empty_like(x).copy_(d_u), d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_emb


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


def _forward_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    n_groups: int,
    eps: float,
    emb: Tensor | None,
    silu: bool,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> Tensor:
    weight, bias, emb, y = weight.contiguous(), bias.contiguous(), _rows(emb), torch.empty_like(x)
    norm, n_threads = _native_norm(x, weight, bias, n_groups, emb, silu), thread_count()
    load_native("group_norm_silu").group_norm_silu_forward(norm, eps, *map(address, (y, mean, rstd)), n_threads)
    return y


def _forward_and_statistics(
    x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, eps: float, emb: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """_forward_cpu where the extension runs."""
    mean, rstd = (x.new_empty((x.shape[0], n_groups)) for _ in range(2))
    return _forward_native(x, weight, bias, n_groups, eps, emb, silu, mean, rstd), mean, rstd


def _backward_native(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    n_groups: int,
    emb: Tensor | None,
    silu: bool,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    d_y = d_y.contiguous(memory_format=torch.channels_last)
    weight, bias, emb = weight.contiguous(), bias.contiguous(), _rows(emb)
    grads = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    d_emb = None if emb is None else emb.new_empty(emb.shape)
    norm = _native_norm(x, weight, bias, n_groups, emb, silu)
    pointers = map(address, (d_y, mean, rstd, *grads, d_emb))
    load_native("group_norm_silu").group_norm_silu_backward(norm, *pointers, thread_count())
    return *grads, d_emb


def _dense(x: Tensor) -> Tensor:
    """x itself in one of the two memory formats, else a contiguous copy."""
    known = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if known else x.contiguous()


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, eps: float, emb: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if x.is_cuda:
        return run_kernels("group_norm_silu", "x", x, "forward", x, weight, bias, n_groups, eps, emb, silu)
    return _forward_cpu(x, weight, bias, n_groups, eps, emb, silu)


def _backward(d_y: Tensor, x: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if x.is_cuda:
        return run_kernels("group_norm_silu", "x", x, "backward", d_y, x, *rest)
    return _backward_cpu(d_y, x, *rest)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, n_groups, eps, emb, silu):
        x = _dense(x)
        y, mean, rstd = _forward(x, weight, bias, n_groups, eps, emb, silu)
        ctx.save_for_backward(x, weight, bias, emb, mean, rstd)
        ctx.flags = n_groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, weight, bias, emb, mean, rstd = ctx.saved_tensors
        n_groups, silu = ctx.flags
        grads = _backward(_dense(d_y), x, weight, bias, n_groups, emb, silu, mean, rstd)
        return *grads[:3], None, None, grads[3], None


class _OnCpu(torch.autograd.Function):
    """Only for what the extension takes: `_is_native`."""

    @staticmethod
    def forward(ctx, x, weight, bias, n_groups, eps, emb, silu):
        y, mean, rstd = _forward_and_statistics(x, weight, bias, n_groups, eps, emb, silu)
        ctx.save_for_backward(x, weight, bias, emb, mean, rstd)
        ctx.flags = n_groups, eps, silu
        return y

    @staticmethod
    def backward(ctx, d_y):
        x, weight, bias, emb, mean, rstd = ctx.saved_tensors
        n_groups, eps, silu = ctx.flags
        if torch.is_grad_enabled():  # second derivatives are asked for
            tensors = [t for t in (x, weight, bias, emb) if t is not None]
            grads = vjp(lambda x, w, b, e=None: (_cpu(x, w, b, n_groups, eps, e, silu),), tensors, [d_y])
            grads += [None] * (4 - len(grads))
        else:
            grads = _backward_cpu(d_y, x, weight, bias, n_groups, emb, silu, mean, rstd)
        return *grads[:3], None, None, grads[3], None


@torch.library.custom_op("mvdream_fast::group_norm_silu", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, eps: float, emb: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(_dense(x), weight, bias, n_groups, eps, emb, silu)


@torch.library.custom_op("mvdream_fast::group_norm_silu_backward", mutates_args=())
def _op_backward(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    n_groups: int,
    emb: Tensor | None,
    silu: bool,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (_dense(d_y), _dense(x), weight, bias, n_groups, emb, silu, mean, rstd)
    *grads, d_emb = _backward(*arguments)
    return *grads, x.new_empty(0) if d_emb is None else d_emb


@_op.register_fake
def _(x, weight, bias, n_groups, eps, emb, silu):
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty((x.shape[0], n_groups), dtype=wide) for _ in range(2))
    return torch.empty_like(_dense(x)), mean, rstd


@_op_backward.register_fake
def _(d_y, x, weight, bias, n_groups, emb, silu, mean, rstd):
    d_weight, d_bias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    return torch.empty_like(_dense(x)), d_weight, d_bias, x.new_empty(0) if emb is None else emb.new_empty(emb.shape)


def _setup(ctx, inputs, output):
    x, weight, bias, n_groups, _, emb, silu = inputs
    ctx.save_for_backward(x, weight, bias, emb, *output[1:])
    ctx.flags = n_groups, silu


def _autograd(ctx, d_y, d_mean, d_rstd):
    x, weight, bias, emb, mean, rstd = ctx.saved_tensors
    n_groups, silu = ctx.flags
    grads = torch.ops.mvdream_fast.group_norm_silu_backward(d_y, x, weight, bias, n_groups, emb, silu, mean, rstd)
    return *grads[:3], None, None, None if emb is None else grads[3], None


_op.register_autograd(_autograd, setup_context=_setup)
