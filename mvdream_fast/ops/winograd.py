"""3x3 convolutions on CPUs by Winograd's algorithm: a quarter of the multiplications.

Which convolutions go this way is decided in models/.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.ops._edges import (
    address,
    check_tensors,
    is_batched,
    is_recorded,
    load_native,
    runs_natively,
    thread_count,
    vmap_error,
)
from mvdream_fast.ops._registered import differentiable

OP = "winograd_conv3x3"
TILE = 4  # pixels along a side of a tile's output


def winograd_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv2d(x, weight, bias, padding=1) with F(4x4, 3x3); errors of about 1e-5 for outputs of order 1.

    Bit-identical for any number of threads, and so are the gradients of x and weight.

    Args:
        x: [B*V, C, h, w] float32 on the CPU; copied unless channels_last.
        weight: [C_out, C, 3, 3] float32; copied unless channels_last.
        bias: [C_out] or None.

    Returns:
        [B*V, C_out, h, w], channels_last.

    Raises:
        ValueError: shapes. TypeError: not float32. RuntimeError: other devices, watched by torch.func, under vmap.
        torch.compile does not know it: the models take torch's convolution while they are compiled.

    Source: Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks", section 4.
    """
    _check(x, weight, bias)
    return _Winograd.apply(x, weight, bias) if is_recorded(x, weight, bias) else _forward(x, weight, bias)


def winograd_conv3x3_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """winograd_conv3x3 in plain torch."""
    return F.conv2d(x, weight, bias, padding=1)


def winograd_pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether winograd_conv3x3 takes these without a copy, and is then 1.2 times as fast as torch or more.

    So it was measured for 8 tiles and 32 channels or more; tiles that hang over the image's edge are work for nothing.
    """
    last = all(a.is_contiguous(memory_format=torch.channels_last) for a in (x, weight))
    if not (last and runs_natively(x, weight, bias)):
        return False
    n_tiles = x.shape[0] * -(-x.shape[2] // TILE) * -(-x.shape[3] // TILE)
    covered = x.shape[0] * x.shape[2] * x.shape[3] / (TILE * TILE * max(n_tiles, 1))
    return n_tiles >= 8 and min(weight.shape[:2]) >= 32 and covered >= 0.75


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(shape: tuple[int, ...]) -> Tensor:
    """What the extension writes to, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight, bias = _last(x), _last(weight), bias if bias is None else bias.contiguous()
    y = _empty((x.shape[0], len(weight), *x.shape[2:]))
    if not (x.numel() and weight.numel()):  # no sums, or nothing to hold them
        return y.zero_() if bias is None else y.copy_(bias[:, None, None].expand_as(y))
    pointers = address(x), _images(x), address(weight), address(bias)
    load_native(OP).winograd_conv3x3(*pointers, len(weight), address(y), thread_count())
    return y


def _d_x(d_y: Tensor, weight: Tensor) -> Tensor:
    """The convolution of d_y with the weights turned by half a turn, their inputs for outputs."""
    weight, turned = _last(weight), torch.empty_like(weight.transpose(0, 1), memory_format=torch.channels_last)
    load_native(OP).turn_weights(address(weight), *weight.shape[:2], address(turned), thread_count())
    return _forward(d_y, turned, None)


def _d_weight(d_y: Tensor, x: Tensor) -> Tensor:
    x, d_weight = _last(x), _empty((d_y.shape[1], x.shape[1], 3, 3))
    if not (x.numel() and d_y.numel()):
        return d_weight.zero_()
    pointers = address(x), _images(x), address(d_y)
    load_native(OP).winograd_conv3x3_weights(*pointers, d_y.shape[1], address(d_weight), thread_count())
    return d_weight


def _images(x: Tensor) -> object:
    return load_native(OP).Images(x.shape[0], x.shape[2], x.shape[3], x.shape[1])


def _backward(cotangents, kept, wanted, x: Tensor, weight: Tensor, bias: Tensor | None):
    (d_y,) = cotangents
    if not runs_natively(d_y):  # several cotangents at once, for one
        sizes, ones, zeros = None if bias is None else [len(bias)], [1, 1], [0, 0]
        return torch.ops.aten.convolution_backward(d_y, x, weight, sizes, ones, ones, ones, False, zeros, 1, wanted)
    d_y = _last(d_y)
    d_x = _d_x(d_y, weight) if wanted[0] else None
    d_weight = _d_weight(d_y, x) if wanted[1] else None
    return d_x, d_weight, d_y.sum((0, 2, 3)) if wanted[2] else None


_Winograd = differentiable(_forward, _backward, twice=winograd_conv3x3_ref)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(OP, x=x, weight=weight)
    if bias is not None:
        check_tensors(OP, bias=bias)
    if is_batched(x, weight, bias):
        raise vmap_error(OP)
    for name, a in (("x", x), ("weight", weight), ("bias", bias)):
        if a is not None and a.dtype != torch.float32:
            raise TypeError(f"{OP}: {name} must be float32, got {a.dtype}; use torch's conv2d for the others")
        if a is not None and not runs_natively(a):
            got = f"one on {a.device}" if a.device.type != "cpu" else "a subclass, or one that is negated or watched"
            raise RuntimeError(f"{OP}: {name} must be a plain CPU tensor, got {got}; use torch's conv2d")
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        wanted = "[B*V, C, h, w] and [C_out, C, 3, 3]"
        raise ValueError(
            f"{OP}: x and weight must be {wanted}, got {tuple(x.shape)} and {tuple(weight.shape)}; reshape"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{OP}: bias must be [{len(weight)}], got {tuple(bias.shape)}; one value for each output")
