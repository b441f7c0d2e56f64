"""Texture lookup: nearest, bilinear, mip-mapped (trilinear), with gradients of texels, coordinates and footprints."""

from typing import Literal

import torch
from torch import Tensor

from mvdream_fast.ops._edges import (
    BACKENDS,
    address,
    check_same_device,
    check_shaped,
    is_batched,
    load_native,
    new_result,
    queue_of,
    require,
    runs_natively,
    vmap_error,
)
from mvdream_fast.ops._registered import differentiable, register
from mvdream_fast.ops._triangles import check_as

FILTERS = ("nearest", "linear", "linear-mipmap-linear")
BOUNDARIES = ("wrap", "clamp", "zero")
NEAREST, LINEAR, MIPMAP = range(3)
WRAP, CLAMP, ZERO = range(3)


def texture(
    tex: Tensor,
    uv: Tensor,
    uv_da: Tensor | None = None,
    filter_mode: Literal["nearest", "linear", "linear-mipmap-linear"] = "linear",
    boundary_mode: Literal["wrap", "clamp", "zero"] = "wrap",
) -> Tensor:
    """The texture's colours at coordinates uv.

    tex: [B, Ht, Wt, C], or [1, Ht, Wt, C] for all images. uv: [B, Hp, Wp, 2]; (0, 0) is the outer corner of texel
    [0, 0], (1, 1) that of the last. uv_da: [B, Hp, Wp, 4], (du/dX, du/dY, dv/dX, dv/dY) as `interpolate` gives them,
    which "linear-mipmap-linear" needs and the others leave alone. boundary_mode: what lies beyond [0, 1]: the texture
    again, its outermost texels, or zeros.

    The levels of the mip map are made here, each the mean over 2 x 2 texels of the one before, down to an odd side. The
    level is log2 of the longer axis of a pixel's footprint in texels, between the first and the last.

    Differentiable in tex, uv and uv_da, not in uv by "nearest"; a second time through the plain-torch reference.
    Coordinates that are no numbers show zeros. float32 runs natively, on a CPU with the same bits for any number of
    threads; float64 is plain torch.

    Returns: [B, Hp, Wp, C].
    Raises: ValueError, TypeError, RuntimeError for unfitting arguments.
    Source: Laine et al., Modular Primitives for High-Performance Differentiable Rendering (2020), section 3.3; the
    OpenGL 4.6 specification, section 8.14.
    """
    kind, boundary = _check(tex, uv, uv_da, filter_mode, boundary_mode)
    _, height, width, _ = tex.shape
    levels = _levels(tex) if kind == MIPMAP else [tex]
    chain = torch.cat([level.flatten(1, 2) for level in levels], 1)
    settings = (height, width, len(levels), kind, boundary)
    uv_da = uv_da if kind == MIPMAP else None
    if torch.compiler.is_compiling() and tex.dtype == torch.float32:
        return torch.ops.mvdream_fast.texture(chain, uv, uv_da, *settings)
    if not runs_natively(chain, uv, uv_da, devices=BACKENDS):
        return texture_ref(chain, uv, uv_da, *settings)
    return _Texture.apply(chain, uv, uv_da, *settings)


def _levels(tex: Tensor) -> list[Tensor]:
    """The mip map of tex [B, Ht, Wt, C], the largest level first."""
    levels = [tex]
    while True:
        height, width = levels[-1].shape[1:3]
        sides = (height, width)
        if max(sides) <= 1 or any(n > 1 and n % 2 for n in sides):
            return levels
        level = levels[-1]
        if height > 1:
            level = 0.5 * (level[:, 0::2] + level[:, 1::2])
        if width > 1:
            level = 0.5 * (level[:, :, 0::2] + level[:, :, 1::2])
        levels.append(level)


def texture_ref(
    chain: Tensor, uv: Tensor, uv_da: Tensor | None, height: int, width: int, n_levels: int, kind: int, boundary: int
) -> Tensor:
    """The same in plain torch, of the levels [B, T, C] in a row; differentiable any number of times."""
    shapes = [(max(1, height >> i), max(1, width >> i)) for i in range(n_levels)]
    starts = torch.tensor([0] + [h * w for h, w in shapes]).cumsum(0)
    chain = chain.expand(len(uv), -1, -1)
    known = uv.isfinite().all(-1, keepdim=True)
    uv = torch.where(known, uv, 0)
    if kind != MIPMAP or uv_da is None:
        return torch.where(known, _look_up(chain, uv, kind, boundary, shapes[0]), 0)
    level = _detail(uv_da, height, width, n_levels)[..., None]
    first = level.detach().floor().long()
    out = uv.new_zeros(*uv.shape[:-1], chain.shape[-1])
    for i, shape in enumerate(shapes):
        weight = torch.where(first == i, 1 - (level - first), torch.where(first == i - 1, level - first, 0))
        out = out + weight * _look_up(chain[:, starts[i] : starts[i + 1]], uv, kind, boundary, shape)
    return torch.where(known, out, 0)


def _look_up(texels: Tensor, uv: Tensor, kind: int, boundary: int, shape: tuple[int, int]) -> Tensor:
    """One level, texels [B, h w, C], at uv [B, Hp, Wp, 2]."""
    (x0, x1, u), (y0, y1, v) = (_neighbours(t, n, kind, boundary) for t, n in zip(uv.unbind(-1), reversed(shape)))

    def at(x: Tensor, y: Tensor) -> Tensor:
        there = (x >= 0) & (y >= 0)
        index = torch.where(there, y * shape[1] + x, 0).flatten(1)
        found = texels.gather(1, index[..., None].expand(-1, -1, texels.shape[-1]))
        return torch.where(there[..., None], found.unflatten(1, x.shape[1:]), 0)

    if kind == NEAREST:
        return at(x0, y0)
    return (1 - v) * ((1 - u) * at(x0, y0) + u * at(x1, y0)) + v * ((1 - u) * at(x0, y1) + u * at(x1, y1))


def _neighbours(t: Tensor, n: int, kind: int, boundary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis of n texels: the two next to a coordinate, -1 for none, and the weight of the second [..., 1]."""
    x = (t - t.detach().floor() if boundary == WRAP else t) * n - (0 if kind == NEAREST else 0.5)
    if boundary == CLAMP and kind != NEAREST:
        x = x.clamp(0, n - 1)
        x = torch.where((x > 0) & (x < n - 1), x, x.detach())
    low = x.detach().clamp(-(2.0**30), 2.0**30).floor()
    pair = torch.stack([low, low + 1]).long()
    if boundary == WRAP:
        pair = pair % n
    elif boundary == CLAMP:
        pair = pair.clamp(0, n - 1)
    else:
        pair = torch.where((pair >= 0) & (pair < n), pair, -1)
    return pair[0], pair[1], (x - low)[..., None]


def _detail(uv_da: Tensor, height: int, width: int, n_levels: int) -> Tensor:
    """The level of each pixel's footprint: log2 of the longer axis of the ellipse with columns d/dX and d/dY, [...]."""
    along = uv_da.unflatten(-1, (2, 2)) * uv_da.new_tensor([[width], [height]])  # [..., (u, v), (X, Y)], in texels
    xx, yy = along.square().sum(-2).unbind(-1)
    xy = along.prod(-1).sum(-1)
    squares = 0.25 * (xx - yy).square() + xy.square()
    spread = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
    longest = 0.5 * (xx + yy) + spread
    level = torch.where(longest > 1, 0.5 * torch.where(longest > 1, longest, 2).log2(), 0)
    return level.where(level < n_levels - 1, level.new_tensor(n_levels - 1))


def _forward(chain, uv, uv_da, *settings) -> Tensor:
    chain, uv, uv_da = chain.contiguous(), uv.contiguous(), uv_da if uv_da is None else uv_da.contiguous()
    out, native = new_result(uv, *uv.shape[:3], chain.shape[-1]), load_native("texture", chain)
    native.texture_forward(_textured(chain, uv, uv_da, *settings), address(out), queue_of(chain))
    return out


def _backward(cotangents, kept, wanted, chain, uv, uv_da, *settings) -> list[Tensor | None]:
    inputs = [x if x is None else x.contiguous() for x in (chain, uv, uv_da)]
    gradients = [new_result(x, *x.shape) if want and x is not None else None for x, want in zip(inputs, wanted)]
    native = load_native("texture", chain)
    d_out = cotangents[0].contiguous()
    addresses = map(address, (d_out, *gradients))
    native.texture_backward(_textured(*inputs, *settings), *addresses, queue_of(chain))
    return gradients


def _textured(chain, uv, uv_da, height, width, n_levels, kind, boundary):
    n_images, n_rows, n_columns, _ = uv.shape
    _, n_texels, n_channels = chain.shape
    stride = n_texels * n_channels if len(chain) > 1 else 0
    sizes, shape = [n_images, n_rows * n_columns, n_texels, stride], [height, width, n_levels, n_channels]
    return load_native("texture").Textured(*map(address, (chain, uv, uv_da)), sizes, shape, kind, boundary)


_Texture = differentiable(_forward, _backward, twice=texture_ref)
_registered = differentiable(_forward, _backward)
register(
    "texture(Tensor chain, Tensor uv, Tensor? uv_da, SymInt height, SymInt width, SymInt n_levels, SymInt kind,"
    " SymInt boundary) -> Tensor",
    cpu=_registered,
    cuda=_registered,
    fake=lambda chain, uv, *_: uv.new_empty(*uv.shape[:3], chain.shape[-1]),
)


def _check(tex, uv, uv_da, filter_mode, boundary_mode) -> tuple[int, int]:
    """The numbers of the filter and the boundary."""
    op = "texture"
    if is_batched(tex, uv, uv_da):
        raise vmap_error(op)
    check_shaped(op, "uv", uv, (None, None, None, 2))
    check_as(op, "tex", tex, (None, None, None, None), "uv", uv)
    require(tex.shape[0] in (1, len(uv)), op, "tex", f"of 1 or {len(uv)} images", tex.shape[0], "repeat it")
    require(
        tex.shape[1] > 0 and tex.shape[2] > 0, op, "tex", "of at least one texel", list(tex.shape), "pass a texture"
    )
    for name, value, known in (("filter_mode", filter_mode, FILTERS), ("boundary_mode", boundary_mode, BOUNDARIES)):
        require(value in known, op, name, f"one of {', '.join(known)}", value, "choose one")
    kind = FILTERS.index(filter_mode)
    if kind == MIPMAP:
        require(uv_da is not None, op, "uv_da", f"given with {filter_mode}", None, "pass what interpolate returns")
        check_as(op, "uv_da", uv_da, (*uv.shape[:3], 4), "uv", uv)
    check_same_device(op, tex=tex, uv=uv, uv_da=uv_da if kind == MIPMAP else None)
    return kind, BOUNDARIES.index(boundary_mode)
