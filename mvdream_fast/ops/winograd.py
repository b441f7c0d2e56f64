"""3x3 convolutions on CPUs by Winograd's algorithm, for inference: a quarter of the multiplications.

Which convolutions go this way, and which transformed weights are kept, is decided in models/.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.ops._edges import (
    address,
    is_batched,
    is_recorded,
    load_native,
    runs_natively,
    thread_count,
    vmap_error,
)

OP = "winograd_conv3x3"
TILE = 4  # pixels along a side of a tile's output; its input has two more
PLANES = (TILE + 2) ** 2
# Bytes of transformed weights that are alive at a time where none are kept, and of tiles: they stay in the last-level
# cache, and their allocations under glibc's largest mmap threshold (32 MB), above which every call pays for new pages.
_WEIGHT_BYTES, _LEAST_TILE_BYTES, _MOST_TILE_BYTES = 24 << 20, 2 << 20, 24 << 20
_TILES_PER_TRANSFORM = 256  # so many tiles repay a transform of the weights


def winograd_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, transformed: Tensor | None = None
) -> Tensor:
    """conv2d(x, weight, bias, padding=1) with F(4x4, 3x3); errors of about 1e-5 for outputs of order 1.

    Not differentiable. The products between the transforms are torch's, so bits may depend on the number of threads.

    Args:
        x: [B*V, C, h, w] float32 on the CPU; copied unless channels_last.
        weight: [C_out, C, 3, 3] float32; copied unless channels_last.
        bias: [C_out] or None.
        transformed: what `winograd_weights` made of `weight`; None transforms it on the way, a part at a time.

    Returns:
        [B*V, C_out, h, w], channels_last.

    Raises:
        ValueError: shapes. TypeError: not float32. RuntimeError: other devices, recorded by autograd, under vmap.

    Source: Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks", section 4.
    """
    _check(x, weight, bias, transformed)
    x, weight = (a.contiguous(memory_format=torch.channels_last) for a in (x, weight))
    bias = bias if bias is None else bias.contiguous()
    y = torch.empty((x.shape[0], len(weight), *x.shape[2:]), memory_format=torch.channels_last)
    if not (x.numel() and weight.numel()):  # no sums, or nothing to hold them
        return y.zero_() if bias is None else y.copy_(bias[:, None, None].expand_as(y))
    n_tiles = winograd_tiles(x)
    rows, columns = _parts(n_tiles, weight, transformed is not None)
    images, native, n_threads = _images(x), load_native(OP), thread_count()
    tiles, planes = x.new_empty(PLANES * rows * x.shape[1]), None
    for first in range(0, n_tiles, rows):
        n = min(rows, n_tiles - first)
        native.winograd_input(address(x), images, first, n, address(tiles), n_threads)
        window = tiles[: PLANES * n * x.shape[1]].view(PLANES, n, -1)
        for start in range(0, len(weight), columns):
            part = slice(start, start + columns)
            if transformed is not None:
                planes = transformed
            elif planes is None or columns < len(weight):
                planes = winograd_weights(weight[part])
            products = torch.bmm(window, planes.transpose(1, 2))
            of_part = _images(y, products.shape[2])
            shifted = (address(bias) and address(bias[part]), of_part, first, n, address(y[:, part]), len(weight))
            native.winograd_output(address(products), *shifted, n_threads)
    return y


def winograd_conv3x3_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """winograd_conv3x3 in plain torch."""
    return F.conv2d(x, weight, bias, padding=1)


def winograd_weights(weight: Tensor) -> Tensor:
    """[C_out, C, 3, 3] -> [36, C_out, C], four times as large: what the convolution multiplies by."""
    n_out, n_channels = weight.shape[:2]
    weight = weight.detach().contiguous(memory_format=torch.channels_last)
    planes = torch.empty(PLANES, n_out, n_channels)
    load_native(OP).winograd_weights(address(weight), n_out, n_channels, address(planes), thread_count())
    return planes


def winograd_pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether winograd_conv3x3 takes these without a copy, and is then 1.2 times as fast as torch or more.

    So it was measured for 8 tiles and 32 channels or more, with the weights transformed beforehand; tiles that hang
    over the image's edge are work for nothing.
    """
    plain = runs_natively(x, weight, bias) and not is_recorded(x, weight, bias)
    if not plain or not all(a.is_contiguous(memory_format=torch.channels_last) for a in (x, weight)):
        return False
    n_tiles = winograd_tiles(x)
    covered = x.shape[0] * x.shape[2] * x.shape[3] / (TILE * TILE * max(n_tiles, 1))
    return n_tiles >= 8 and min(weight.shape[:2]) >= 32 and covered >= 0.75


def winograd_tiles(x: Tensor) -> int:
    """How many tiles cover the images [B*V, C, h, w]."""
    return x.shape[0] * -(-x.shape[2] // TILE) * -(-x.shape[3] // TILE)


def _images(x: Tensor, n_channels: int | None = None):
    return load_native(OP).Images(x.shape[0], x.shape[2], x.shape[3], n_channels or x.shape[1])


def _parts(n_tiles: int, weight: Tensor, ready: bool) -> tuple[int, int]:
    """Tiles and output channels to do at a time, in even parts."""
    n_out, n_channels = weight.shape[:2]
    columns = n_out if ready else _even(n_out, _WEIGHT_BYTES // (4 * PLANES * n_channels))
    tile_bytes = min(max(8 * PLANES * columns * n_channels, _LEAST_TILE_BYTES), _MOST_TILE_BYTES)
    rows = tile_bytes // (4 * PLANES * (n_channels + columns))
    return _even(n_tiles, rows if columns == n_out else max(rows, _TILES_PER_TRANSFORM)), columns


def _even(total: int, most: int) -> int:
    """The size of the fewest equal parts of `total` that are no larger than `most`."""
    n_parts = -(-total // max(1, min(total, most))) if total else 1
    return max(1, -(-total // n_parts))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, transformed: Tensor | None) -> None:
    if is_batched(x, weight, bias):
        raise vmap_error(OP)
    named = {"x": x, "weight": weight, "bias": bias, "transformed": transformed}
    for name, a in named.items():
        if a is not None and a.dtype != torch.float32:
            raise TypeError(f"{OP}: {name} must be float32, got {a.dtype}; use torch's conv2d for the others")
        if a is not None and not runs_natively(a):
            raise RuntimeError(f"{OP}: {name} must be a plain CPU tensor, got one on {a.device}; use torch's conv2d")
    if is_recorded(x, weight, bias):
        raise RuntimeError(f"{OP}: arguments must not be recorded by autograd, got some that are; use torch's conv2d")
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        wanted = "[B*V, C, h, w] and [C_out, C, 3, 3]"
        raise ValueError(
            f"{OP}: x and weight must be {wanted}, got {tuple(x.shape)} and {tuple(weight.shape)}; reshape"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{OP}: bias must be [{len(weight)}], got {tuple(bias.shape)}; one value for each output")
    if transformed is not None and (
        transformed.shape != (PLANES, *weight.shape[:2]) or not transformed.is_contiguous()
    ):
        wanted = f"contiguous [{PLANES}, {len(weight)}, {weight.shape[1]}]"
        raise ValueError(f"{OP}: transformed must be {wanted}, got {tuple(transformed.shape)}; see winograd_weights")
