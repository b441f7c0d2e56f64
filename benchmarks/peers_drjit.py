"""Dr.Jit's hash grid and networks (LLVM on a CPU) with our numbers.

Its dense levels have rows for the vertices alone, where tiny-cuda-nn's (and ours) are rounded up to eight: a level is
copied into its place. What is timed stays Dr.Jit's; the numbers are copied once, and answers are read by `*_to_torch`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from contestants import Unavailable
from peers import CUDA, need
from torch import Tensor

from mvdream_fast.ops import FieldSpec
from mvdream_fast.ops.hash_encode import HashGrid, Level


def drjit() -> Any:
    """The module, with as many threads as torch."""
    if CUDA:
        raise Unavailable("Dr.Jit's LLVM backend is what one takes on a CPU")
    need("drjit")
    import drjit as dr

    if not dr.has_backend(dr.JitBackend.LLVM):
        raise Unavailable("Dr.Jit finds no LLVM library (libLLVM.so)")
    dr.set_thread_count(torch.get_num_threads())
    return dr


def array(x: Tensor) -> Any:
    """[P, C] as C arrays of P numbers."""
    from drjit.llvm.ad import ArrayXf

    return ArrayXf(x.detach().numpy().T.copy())


def encoding_of(table: Tensor, grid: HashGrid) -> Any:
    """Dr.Jit's encoding of three coordinates with the numbers of our table."""
    from drjit.llvm.ad import Float
    from drjit.nn import HashGridEncoding

    encoding = HashGridEncoding(
        Float,
        3,
        n_levels=grid.n_levels,
        n_features_per_level=grid.n_features,
        base_resolution=grid.base_resolution,
        per_level_scale=grid.growth,
        hashmap_size=1 << grid.log2_size,
        torchngp_compat=True,
    )
    # Ours are tiny-cuda-nn's, computed in float32: of 4095 cells Dr.Jit's are 0.0015 more, and its answers show that.
    encoding._level_scale = lambda level: grid.levels[level].scale
    rows = torch.cat([table[level.offset :][: rows_of(level, grid)] for level in grid.levels])
    if encoding.n_params != rows.numel():
        raise Unavailable(f"Dr.Jit's grid has {encoding.n_params} numbers, ours {rows.numel()}")
    encoding.data = Float(rows.detach().numpy().ravel())
    return encoding


def rows_of(level: Level, grid: HashGrid) -> int:
    """Rows of a level in Dr.Jit's table, which rounds to whole numbers of features."""
    exact = -(-(level.resolution**3) // grid.n_features) * grid.n_features
    return level.size if level.hashed else min(exact, level.size)


def hash_grid(positions: Tensor, table: Tensor, grid: HashGrid, d_out: Tensor | None) -> Callable[[], tuple]:
    """A call that encodes [P, 3]; with a cotangent [P, L*F] it gives the table's gradient, too."""
    dr = drjit()
    encoding, points = encoding_of(table, grid), array(positions)
    cotangent = None if d_out is None else array(d_out)

    def call() -> tuple:
        if cotangent is None:
            return evaluated(dr, encoding(points))
        dr.enable_grad(encoding.data)
        dr.set_grad(encoding.data, 0)
        out = encoding(points)
        dr.backward(dr.sum(dr.sum(out * cotangent)))
        return evaluated(dr, out, dr.grad(encoding.data))

    return call


def evaluated(dr: Any, *values: Any) -> tuple:
    dr.eval(*values)
    dr.sync_thread()
    return values


def grid_to_torch(out: tuple, grid: HashGrid) -> tuple[Tensor, ...]:
    """The encoding [P, L*F], and the gradient of the table."""
    return (torch.from_numpy(np.array(out[0]).T.copy()), *(table_to_torch(x, grid) for x in out[1:]))


def table_to_torch(gradient: Any, grid: HashGrid) -> Tensor:
    """Numbers of Dr.Jit's table in the places of ours, [n_entries, F]."""
    theirs = torch.from_numpy(np.array(gradient).reshape(-1, grid.n_features))
    whole, start = torch.zeros(grid.n_entries, grid.n_features), 0
    for level in grid.levels:
        n = rows_of(level, grid)
        whole[level.offset : level.offset + n] = theirs[start : start + n]
        start += n
    return whole


def field(
    positions: Tensor, table: Tensor, weights: Sequence[Tensor], spec: FieldSpec, d_out: Sequence[Tensor] | None
) -> Callable[[], tuple]:
    """A call of the whole field, density by softplus; weights: both layers of density, then both of colours.

    Returns: densities, colours, and with cotangents the gradients of the table and of all weights in a row.
    """
    dr = drjit()
    from drjit import nn
    from drjit.llvm.ad import ArrayXf, Float, TensorXf

    encoding, points = encoding_of(table, spec.grid), array(positions)
    layers = nn.pack(*(TensorXf(w.detach().numpy()) for w in weights), layout="training")
    packed = layers[0].buffer
    cotangents = None if d_out is None else (Float(d_out[0].numpy()), array(d_out[1]))

    def forward() -> tuple[Any, Any]:
        features = nn.CoopVec(encoding(points * (0.5 / spec.radius) + 0.5))
        raw, rgb = (ArrayXf(nn.matvec(layers[i + 1], dr.maximum(nn.matvec(layers[i], features), 0))) for i in (0, 2))
        distance = dr.sqrt(points[0] * points[0] + points[1] * points[1] + points[2] * points[2])
        thick = raw[0] + spec.bias_scale * (1 - distance / spec.bias_std)
        return dr.log(1 + dr.exp(thick)), 1 / (1 + dr.exp(-rgb))  # thick is at most bias_scale and what weights add

    def call() -> tuple:
        if cotangents is None:
            return evaluated(dr, *forward())
        for numbers in (encoding.data, packed):
            dr.enable_grad(numbers)
            dr.set_grad(numbers, 0)
        for layer in layers:
            layer.buffer = packed
        sigmas, rgb = forward()
        dr.backward(dr.sum(sigmas * cotangents[0]) + dr.sum(dr.sum(rgb * cotangents[1])))
        return evaluated(dr, sigmas, rgb, dr.grad(encoding.data), dr.grad(packed))

    return call


def field_to_torch(out: tuple, weights: Sequence[Tensor], grid: HashGrid) -> tuple[Tensor, ...]:
    """Densities [P], colours [P, 3], and the gradients of the table and of each weight."""
    density, colors = torch.from_numpy(np.array(out[0])), torch.from_numpy(np.array(out[1]).T.copy())
    if len(out) == 2:
        return density, colors
    flat = torch.from_numpy(np.array(out[3]))
    parts = flat[: sum(w.numel() for w in weights)].split([w.numel() for w in weights])
    shaped = (part.reshape(w.shape) for part, w in zip(parts, weights, strict=True))
    return density, colors, table_to_torch(out[2], grid), *shaped
