"""The multiresolution hash-grid encoding with tiny-cuda-nn's addressing: spec, op and plain-torch reference.

No weights live here; `field.volume` owns the table, `ops.field` fuses the encoding with the networks behind it.
"""

from dataclasses import astuple, dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvdream_fast.ops._edges import (
    BACKENDS,
    address,
    aligned,
    check_same_device,
    check_shaped,
    is_batched,
    load_native,
    queue_of,
    require,
    runs_natively,
    vmap_error,
)
from mvdream_fast.ops._registered import differentiable, register

PRIMES = (1, 2654435761, 805459861)


@dataclass(frozen=True)
class Level:
    """One resolution of the grid: its entries are rows `offset .. offset + size` of the table."""

    scale: float
    resolution: int
    offset: int
    size: int
    hashed: bool


@dataclass(frozen=True)
class HashGrid:
    """The shape of a hash grid; the defaults are the MVDream paper's. Sizes follow tiny-cuda-nn exactly."""

    n_levels: int = 16
    n_features: int = 2
    log2_size: int = 19
    base_resolution: int = 16
    growth: float = 1.447269237440378

    def __post_init__(self) -> None:
        for name, low, high in (("n_levels", 1, 32), ("log2_size", 3, 24), ("base_resolution", 1, 4096)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"HashGrid: {name} must be in [{low}, {high}], got {getattr(self, name)}")
        if self.n_features not in (1, 2, 4, 8):
            raise ValueError(f"HashGrid: n_features must be 1, 2, 4 or 8, got {self.n_features}")
        if not self.growth >= 1 or self.levels[-1].resolution > 1 << 20:
            raise ValueError(f"HashGrid: growth must be >= 1 with a top resolution <= 2^20, got {self.growth}")

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The levels, coarsest first. float32 arithmetic throughout, because rounding decides the resolutions."""
        levels, offset = [], 0
        log2_growth = np.log2(np.float32(self.growth))
        for i in range(self.n_levels):
            scale = np.exp2(np.float32(i) * log2_growth) * np.float32(self.base_resolution) - np.float32(1)
            resolution = int(np.ceil(scale)) + 1
            dense = -(-(resolution**3) // 8) * 8
            size = min(dense, 1 << self.log2_size)
            levels.append(Level(float(scale), resolution, offset, size, hashed=resolution**3 > size))
            offset += size
        return tuple(levels)

    @property
    def n_entries(self) -> int:
        """Rows of the table."""
        return self.levels[-1].offset + self.levels[-1].size

    @property
    def width(self) -> int:
        """Columns of the encoding."""
        return self.n_levels * self.n_features

    @cached_property
    def native(self) -> Any:
        """The same grid as an object of the native extension."""
        levels = [(lv.scale, lv.resolution, lv.offset, lv.size, lv.hashed) for lv in self.levels]
        return load_native("hash_encode").HashGrid(self.n_features, levels)

    def __getstate__(self) -> dict[str, Any]:
        # The native object can be neither copied nor pickled, and is made again when it is needed.
        return {name: value for name, value in vars(self).items() if name != "native"}


def hash_encode(positions: Tensor, table: Tensor, grid: HashGrid) -> Tensor:
    """Encodes points by trilinear interpolation of learned features at every level of a hash grid.

    positions: [P, 3] float32 or float64; clamped to [0, 1], so +-inf is allowed and NaN is refused.
    table:     [grid.n_entries, F], of the same dtype.
    Differentiable twice in positions and table; the derivative in positions is that of the clamped, piecewise
    trilinear function. float32 runs natively: on a CPU bit-identical for any number of threads; on CUDA bit-identical
    under torch.use_deterministic_algorithms (in fixed point), and a NaN position makes NaN features instead of an
    error, which would cost a synchronisation. float64 and second derivatives run through plain torch.

    Returns [P, n_levels * F], level-major: column `level * F + feature`.
    Raises ValueError for wrong shapes and NaN, TypeError for other dtypes, RuntimeError for mixed devices.
    Source: Mueller et al. 2022, "Instant Neural Graphics Primitives", section 3; tiny-cuda-nn's rounding and hash.
    """
    check_positions_and_table("hash_encode", positions, table, grid)
    if torch.compiler.is_compiling() and positions.dtype == torch.float32:
        return torch.ops.mvdream_fast.hash_encode(positions, table, *astuple(grid))
    if not runs_natively(positions, table, devices=BACKENDS):
        return hash_encode_ref(positions, table, grid)
    return _HashEncode.apply(positions, table, grid)


def hash_encode_ref(positions: Tensor, table: Tensor, grid: HashGrid) -> Tensor:
    """The contract of `hash_encode` in plain torch, in any floating dtype and on any device."""
    # A graph cannot read values, a GPU would be waited for: there a NaN makes whatever it makes.
    unread = torch.compiler.is_compiling() or positions.is_cuda
    require_no_nan("hash_encode", unread or not positions.isnan().any())
    unit = positions.clamp(0, 1)
    return torch.cat([_level_ref(unit, table[lv.offset : lv.offset + lv.size], lv) for lv in grid.levels], dim=-1)


def _level_ref(unit: Tensor, entries: Tensor, level: Level) -> Tensor:
    # tiny-cuda-nn's fmaf(scale, x, 0.5): rounded once, which a float64 detour reproduces.
    lattice = (unit.double() * level.scale + 0.5).to(unit.dtype)
    cell = lattice.detach().floor()
    high = lattice - cell  # [P, 3], the weight of the upper corner along each axis
    out = entries.new_zeros(())
    for corner in range(8):
        bits = [corner >> axis & 1 for axis in range(3)]
        weight = torch.ones_like(high[:, 0])
        for axis, bit in enumerate(bits):
            weight = weight * (high[:, axis] if bit else 1 - high[:, axis])
        vertex = torch.stack([x + bit for x, bit in zip(cell.long().unbind(-1), bits, strict=True)], dim=-1)
        out = out + weight[:, None] * entries[_index_ref(vertex, level)]
    return out


def _index_ref(vertex: Tensor, level: Level) -> Tensor:
    """Row of each lattice vertex [P, 3] among the level's entries: row-major or hashed, always modulo the size."""
    x, y, z = vertex.unbind(-1)
    if not level.hashed:
        return (x + level.resolution * (y + level.resolution * z)) % level.size
    return ((x * PRIMES[0] ^ y * PRIMES[1] ^ z * PRIMES[2]) & 0xFFFFFFFF) % level.size


def hash_encode_at_once(positions: Tensor, table: Tensor, grid: HashGrid) -> Tensor:
    """`hash_encode_ref` without its loops over levels and corners, [P, levels, 8] numbers at a time.

    For second derivatives, which take a fortieth of the torch calls so: the table has one gradient, not one a corner.
    """
    scale, resolution, size, offset, hashed = _level_columns(grid, table.device)
    lattice = (positions.clamp(0, 1).double()[:, None] * scale + 0.5).to(positions.dtype)  # [P, levels, 3]
    cell = lattice.detach().floor()
    of_x, of_y, of_z = torch.stack([1 - (lattice - cell), lattice - cell], -1).unbind(-2)  # [P, levels, 2] each
    weights = (of_z[..., None, None] * of_y[..., None, :, None] * of_x[..., None, None, :]).flatten(-3)
    bits = torch.arange(8, device=table.device)
    x, y, z = (cell[..., axis].long()[..., None] + (bits >> axis & 1) for axis in range(3))  # [P, levels, 8] each
    mixed = (x * PRIMES[0] ^ y * PRIMES[1] ^ z * PRIMES[2]) & 0xFFFFFFFF
    rows = torch.where(hashed, mixed, x + resolution * (y + resolution * z)) % size + offset
    return (weights[..., None] * table[rows]).sum(-2).flatten(-2)


@cache
def _level_columns(grid: HashGrid, device: torch.device) -> list[Tensor]:
    """Scale (float64), resolution, size, offset and whether it is hashed, of each level: [levels, 1] each.

    Filled in where they are used: a copy to a GPU would wait for it.
    """
    names = {"scale": torch.float64, "resolution": torch.int64, "size": torch.int64, "offset": torch.int64}
    names["hashed"] = torch.bool
    return [
        torch.stack([torch.full((1,), getattr(level, name), dtype=dtype, device=device) for level in grid.levels])
        for name, dtype in names.items()
    ]


def _forward(positions: Tensor, table: Tensor, grid: HashGrid) -> Tensor:
    positions, table = positions.contiguous(), aligned(table)
    out = positions.new_empty(len(positions), grid.width)
    ok = load_native("hash_encode", positions).hash_encode_forward(
        grid.native, *map(address, (table, positions)), len(positions), address(out), queue_of(positions)
    )
    require_no_nan("hash_encode", ok)
    return out


def _backward(cotangents, kept, wanted, positions, table, grid) -> list[Tensor | None]:
    """Gradients of positions and table, None where unwanted."""
    positions, table, d_out = positions.contiguous(), aligned(table), cotangents[0].contiguous()
    d_positions, d_table = (torch.empty_like(x) if want else None for x, want in zip((positions, table), wanted))
    inputs, outputs = map(address, (table, positions)), map(address, (d_out, d_table, d_positions))
    load_native("hash_encode", positions).hash_encode_backward(
        grid.native, *inputs, len(positions), *outputs, queue_of(positions)
    )
    return [d_positions, d_table]


@cache
def _grid_of(n_levels: int, n_features: int, log2_size: int, base_resolution: int, growth: float) -> HashGrid:
    return HashGrid(n_levels, n_features, log2_size, base_resolution, growth)


_HashEncode = differentiable(_forward, _backward, twice=hash_encode_at_once)
_registered = differentiable(
    lambda positions, table, *numbers: _forward(positions, table, _grid_of(*numbers)),
    lambda cotangents, kept, wanted, positions, table, *numbers: _backward(
        cotangents, kept, wanted, positions, table, _grid_of(*numbers)
    ),
)
register(
    "hash_encode(Tensor positions, Tensor table, SymInt n_levels, SymInt n_features, SymInt log2_size,"
    " SymInt base_resolution, float growth) -> Tensor",
    cpu=_registered,
    cuda=_registered,
    fake=lambda positions, table, n_levels, n_features, *_: positions.new_empty(len(positions), n_levels * n_features),
)


def require_no_nan(op: str, ok: bool) -> None:
    """Raises ValueError where a position is NaN, which no table row answers."""
    require(ok, op, "positions", "numbers", "NaN", "check what produced them")


def check_positions_and_table(op: str, positions: Tensor, table: Tensor, grid: HashGrid) -> None:
    """Raises for shapes, dtypes and devices that the grid cannot take."""
    if is_batched(positions, table):
        raise vmap_error(op)
    check_shaped(op, "positions", positions, (None, 3))
    check_shaped(op, "table", table, (grid.n_entries, grid.n_features))
    check_same_dtype(op, positions, table=table)
    check_same_device(op, positions=positions, table=table)


def check_same_dtype(op: str, positions: Tensor, **tensors: Tensor) -> None:
    """Raises TypeError where a tensor is of another dtype than the positions."""
    for name, tensor in tensors.items():
        same = tensor.dtype == positions.dtype
        require(same, op, name, f"{positions.dtype} like positions", tensor.dtype, "convert one of them", TypeError)
