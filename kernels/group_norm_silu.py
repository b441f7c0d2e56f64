"""silu(group_norm(x + emb)) in Triton, forward and backward, for contiguous and channels_last images.

Formula, per image and group, over n = C/G * h*w values:
    u = x + emb, mu = mean u, var = mean (u - mu)^2 (a second pass), r = (var + eps)^-1/2, xhat = (u - mu) r
    z = w xhat + b, y = z sigmoid(z); d_z = d_y sigmoid(z) (1 + z (1 - sigmoid(z)))
    d_w = sum d_z xhat, d_b = sum d_z, d_u = r (w d_z - mean(w d_z) - xhat mean(w d_z xhat)), d_emb = sum d_u (pixels)
Every sum has a fixed order: one program owns a group of an image; images are added in a second kernel.
Source: Wu and He 2018, "Group Normalization".
"""

import math

import torch
import triton
import triton.language as tl
from mvdream_fast.kernels._launch import Launch, by_layout
from torch import Tensor

Sizes = tuple[int, ...]  # a shape, or the strides of a tensor

OPTIONS = {"enable_fp_fusion": True, "num_warps": 4}
BLOCK_CHANNELS = 64
BLOCK = 2048
SUM_CHANNELS = 128


@triton.jit
def group_size(size, pixels):
    """Values of a group in float32: as integers of 32 bits the product passes 2^31."""
    return tl.cast(size, tl.float32) * tl.cast(pixels, tl.float32)


@triton.jit
def _load(x, emb, image, channel, pixel, strides, channels, inside, channel_inside, EMB: tl.constexpr):
    """x + emb in float32 at [BLOCK_C, BLOCK_P] channels and pixels of an image; zero outside."""
    at = x + image * strides[0] + channel[:, None] * strides[1] + pixel[None, :] * strides[2]
    u = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if EMB:
        row = tl.load(emb + image * channels + channel, mask=channel_inside, other=0.0).to(tl.float32)
        u = tl.where(inside, u + row[:, None], 0.0)
    return u


@triton.jit
def group_norm_silu_forward(
    x, emb, weight, bias, y, mean, rstd, strides, channels, pixels, n_groups, eps,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, EMB: tl.constexpr, SILU: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One group of one image; y has x's strides. KEEP stores what the backward needs."""
    image, group = (tl.program_id(0) // n_groups).to(tl.int64), tl.program_id(0) % n_groups
    size = channels // n_groups
    sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for c in range(0, size, BLOCK_C):
        local = c + tl.arange(0, BLOCK_C)
        channel = (group * size + local).to(tl.int64)
        for p in range(0, pixels, BLOCK_P):
            pixel = (p + tl.arange(0, BLOCK_P)).to(tl.int64)
            inside = (local < size)[:, None] & (pixel < pixels)[None, :]
            sums += _load(x, emb, image, channel, pixel, strides, channels, inside, local < size, EMB)
    n = group_size(size, pixels)
    mu = tl.sum(tl.sum(sums, 1), 0) / n
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for c in range(0, size, BLOCK_C):
        local = c + tl.arange(0, BLOCK_C)
        channel = (group * size + local).to(tl.int64)
        for p in range(0, pixels, BLOCK_P):
            pixel = (p + tl.arange(0, BLOCK_P)).to(tl.int64)
            inside = (local < size)[:, None] & (pixel < pixels)[None, :]
            u = _load(x, emb, image, channel, pixel, strides, channels, inside, local < size, EMB)
            u = tl.where(inside, u - mu, 0.0)
            squares += u * u
    r = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / n + eps)
    if KEEP:
        tl.store(mean + tl.program_id(0), mu)
        tl.store(rstd + tl.program_id(0), r)
    for c in range(0, size, BLOCK_C):
        local = c + tl.arange(0, BLOCK_C)
        channel = (group * size + local).to(tl.int64)
        w = tl.load(weight + channel, mask=local < size, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=local < size, other=0.0).to(tl.float32)
        for p in range(0, pixels, BLOCK_P):
            pixel = (p + tl.arange(0, BLOCK_P)).to(tl.int64)
            inside = (local < size)[:, None] & (pixel < pixels)[None, :]
            u = _load(x, emb, image, channel, pixel, strides, channels, inside, local < size, EMB)
            z = (u - mu) * r * w[:, None] + b[:, None]
            if SILU:
                z = z * tl.sigmoid(z)
            at = y + image * strides[0] + channel[:, None] * strides[1] + pixel[None, :] * strides[2]
            tl.store(at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _d_affine(d_y, xhat, w, b, image, channel, pixel, strides, inside, SILU: tl.constexpr):
    """The gradient at the output of the affine map, float32, zero outside."""
    at = d_y + image * strides[0] + channel[:, None] * strides[1] + pixel[None, :] * strides[2]
    d_z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = xhat * w[:, None] + b[:, None]
        gate = tl.sigmoid(z)
        d_z = d_z * gate * (1 + z * (1 - gate))
    return d_z


@triton.jit
def group_norm_silu_backward(
    d_y, x, emb, weight, bias, mean, rstd, d_x, d_emb, part_weight, part_bias, d_y_strides, strides,
    channels, pixels, n_groups,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, EMB: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One group of one image; d_x has x's strides; part_weight and part_bias are [B*V, C] float32."""
    image, group = (tl.program_id(0) // n_groups).to(tl.int64), tl.program_id(0) % n_groups
    size = channels // n_groups
    mu, r = tl.load(mean + tl.program_id(0)), tl.load(rstd + tl.program_id(0))
    total, total_hat = 0.0, 0.0
    for c in range(0, size, BLOCK_C):
        local = c + tl.arange(0, BLOCK_C)
        channel = (group * size + local).to(tl.int64)
        w = tl.load(weight + channel, mask=local < size, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=local < size, other=0.0).to(tl.float32)
        sum_z, sum_hat = tl.zeros([BLOCK_C, BLOCK_P], tl.float32), tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for p in range(0, pixels, BLOCK_P):
            pixel = (p + tl.arange(0, BLOCK_P)).to(tl.int64)
            inside = (local < size)[:, None] & (pixel < pixels)[None, :]
            xhat = (_load(x, emb, image, channel, pixel, strides, channels, inside, local < size, EMB) - mu) * r
            d_z = _d_affine(d_y, xhat, w, b, image, channel, pixel, d_y_strides, inside, SILU)
            sum_z += d_z
            sum_hat += d_z * xhat
        d_b, d_w = tl.sum(sum_z, 1), tl.sum(sum_hat, 1)
        tl.store(part_bias + image * channels + channel, d_b, mask=local < size)
        tl.store(part_weight + image * channels + channel, d_w, mask=local < size)
        total += tl.sum(w * d_b, 0)
        total_hat += tl.sum(w * d_w, 0)
    n = group_size(size, pixels)
    total, total_hat = total / n, total_hat / n
    for c in range(0, size, BLOCK_C):
        local = c + tl.arange(0, BLOCK_C)
        channel = (group * size + local).to(tl.int64)
        w = tl.load(weight + channel, mask=local < size, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=local < size, other=0.0).to(tl.float32)
        sum_u = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for p in range(0, pixels, BLOCK_P):
            pixel = (p + tl.arange(0, BLOCK_P)).to(tl.int64)
            inside = (local < size)[:, None] & (pixel < pixels)[None, :]
            xhat = (_load(x, emb, image, channel, pixel, strides, channels, inside, local < size, EMB) - mu) * r
            d_z = _d_affine(d_y, xhat, w, b, image, channel, pixel, d_y_strides, inside, SILU)
            d_u = r * (w[:, None] * d_z - total - xhat * total_hat)
            at = d_x + image * strides[0] + channel[:, None] * strides[1] + pixel[None, :] * strides[2]
            tl.store(at, d_u.to(d_x.dtype.element_ty), mask=inside)
            sum_u += tl.where(inside, d_u, 0.0)
        if EMB:
            at = d_emb + image * channels + channel
            tl.store(at, tl.sum(sum_u, 1).to(d_emb.dtype.element_ty), mask=local < size)


@triton.jit
def sum_images(part_weight, part_bias, d_weight, d_bias, images, channels, BLOCK_C: tl.constexpr):
    """[B*V, C] -> [C] of both parameters, image after image."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    acc_w, acc_b = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for image in range(images):
        at = tl.cast(image, tl.int64) * channels + channel
        acc_w += tl.load(part_weight + at, mask=inside, other=0.0)
        acc_b += tl.load(part_bias + at, mask=inside, other=0.0)
    tl.store(d_weight + channel, acc_w.to(d_weight.dtype.element_ty), mask=inside)
    tl.store(d_bias + channel, acc_b.to(d_bias.dtype.element_ty), mask=inside)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, eps: float, emb: Tensor | None, silu: bool,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y like x (x is contiguous or channels_last); mean and 1/std [B*V, n_groups] float32 for a backward to come."""
    launch = _forward_launch(
        x.shape, x.stride(), x.dtype, x.device, weight.dtype, bias.dtype, None if emb is None else emb.dtype,
        n_groups, eps, silu, keep,
    )  # fmt: skip
    y, mean, rstd = torch.empty_like(x), None, None
    if keep:
        mean, rstd = (torch.empty((x.shape[0], n_groups), dtype=torch.float32, device=x.device) for _ in range(2))
    if launch:
        emb = x if emb is None else emb.contiguous()  # x stands for what is not read, y for what is not written
        statistics = (mean, rstd) if keep else (y, y)
        launch(x, emb, weight.contiguous(), bias.contiguous(), y, *statistics)
    return y, mean, rstd


@by_layout
def _forward_launch(
    shape: Sizes, strides: Sizes, dtype: torch.dtype, device: torch.device,
    weight: torch.dtype, bias: torch.dtype, emb: torch.dtype | None, n_groups: int, eps: float, silu: bool, keep: bool,
) -> Launch | None:  # fmt: skip
    """The kernel of an x of this shape and strides; None where there is nothing to do."""
    if not math.prod(shape):
        return None
    values = (_strides(shape, strides), shape[1], shape[2] * shape[3], n_groups, float(eps))
    settings = _settings(shape, n_groups) | {"EMB": emb is not None, "SILU": silu, "KEEP": keep}
    return Launch(group_norm_silu_forward, shape[0] * n_groups, values, settings)


def backward(
    d_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, emb: Tensor | None, silu: bool,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """d_x like x, d_weight, d_bias [C], d_emb [B*V, C]; d_y is contiguous or channels_last."""
    images, channels = x.shape[:2]
    d_x = torch.empty_like(x)
    launches = _backward_launches(
        x.shape, x.stride(), d_y.stride(), x.dtype, d_y.dtype, x.device, weight.dtype, bias.dtype,
        None if emb is None else emb.dtype, n_groups, silu,
    )  # fmt: skip
    if launches is None:
        return d_x, *(None if p is None else torch.zeros_like(p) for p in (weight, bias, emb))
    of_groups, of_images = launches
    d_emb = None if emb is None else torch.empty(emb.shape, dtype=emb.dtype, device=emb.device)
    parts = [torch.empty((images, channels), dtype=torch.float32, device=x.device) for _ in range(2)]
    of_groups(
        d_y, x, x if emb is None else emb.contiguous(), weight.contiguous(), bias.contiguous(), mean, rstd,
        d_x, d_x if emb is None else d_emb, *parts,
    )  # fmt: skip
    d_weight, d_bias = (torch.empty(channels, dtype=p.dtype, device=x.device) for p in (weight, bias))
    of_images(*parts, d_weight, d_bias)
    return d_x, d_weight, d_bias, d_emb


@by_layout
def _backward_launches(
    shape: Sizes, strides: Sizes, d_y_strides: Sizes, dtype: torch.dtype, d_y: torch.dtype, device: torch.device,
    weight: torch.dtype, bias: torch.dtype, emb: torch.dtype | None, n_groups: int, silu: bool,
) -> tuple[Launch, Launch] | None:  # fmt: skip
    """The kernel of groups and the one that adds images; None where there is nothing to do."""
    if not math.prod(shape):
        return None
    images, channels = shape[:2]
    places = (_strides(shape, d_y_strides), _strides(shape, strides))
    values = (*places, channels, shape[2] * shape[3], n_groups)
    settings = _settings(shape, n_groups) | {"EMB": emb is not None, "SILU": silu}
    sums = {"BLOCK_C": SUM_CHANNELS, **OPTIONS}
    return (
        Launch(group_norm_silu_backward, images * n_groups, values, settings),
        Launch(sum_images, triton.cdiv(channels, SUM_CHANNELS), (images, channels), sums),
    )


def _strides(shape: Sizes, strides: Sizes) -> Sizes:
    """Of image, channel and pixel; rows of pixels follow each other in both memory formats."""
    return strides[0], strides[1], strides[3] if shape[3] > 1 else strides[2]


def _settings(shape: Sizes, n_groups: int) -> dict[str, object]:
    block_c = min(BLOCK_CHANNELS, triton.next_power_of_2(shape[1] // n_groups))
    block_p = min(BLOCK // block_c, triton.next_power_of_2(shape[2] * shape[3]))
    return {"BLOCK_C": block_c, "BLOCK_P": block_p, **OPTIONS}
