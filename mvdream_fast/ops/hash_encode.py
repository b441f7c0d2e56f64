"""The multiresolution hash-grid encoding with tiny-cuda-nn's addressing: spec, op and plain-torch reference.

No weights live here; `field.volume` owns the table, `ops.field` fuses the encoding with the networks behind it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

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


def hash_encode(positions: Tensor, table: Tensor, grid: HashGrid) -> Tensor:
    """Encodes points by trilinear interpolation of learned features at every level of a hash grid.

    positions: [P, 3] float32; clamped to [0, 1], so +-inf is allowed and NaN is refused.
    table:     [grid.n_entries, F] float32.
    Differentiable twice in positions and table; the derivative in positions is that of the clamped, piecewise
    trilinear function. Second derivatives run through the plain-torch reference.

    Returns [P, n_levels * F], level-major: column `level * F + feature`.
    Raises ValueError for wrong shapes and NaN, TypeError for other dtypes, RuntimeError for mixed devices.
    Source: Mueller et al. 2022, "Instant Neural Graphics Primitives", section 3; tiny-cuda-nn's rounding and hash.
    """
    check_positions("hash_encode", positions)
    check_table("hash_encode", positions, table, grid)
    return hash_encode_ref(positions, table, grid)


def hash_encode_ref(positions: Tensor, table: Tensor, grid: HashGrid) -> Tensor:
    """The contract of `hash_encode` in plain torch, in any floating dtype and on any device."""
    if positions.isnan().any():
        raise ValueError("hash_encode: positions must be numbers, got NaN; check what produced them")
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
        out = out + weight[:, None] * entries[_index_ref(cell.long() + cell.new_tensor(bits).long(), level)]
    return out


def _index_ref(vertex: Tensor, level: Level) -> Tensor:
    """Row of each lattice vertex [P, 3] among the level's entries: row-major or hashed, always modulo the size."""
    x, y, z = vertex.unbind(-1)
    if not level.hashed:
        return (x + level.resolution * (y + level.resolution * z)) % level.size
    return ((x * PRIMES[0] ^ y * PRIMES[1] ^ z * PRIMES[2]) & 0xFFFFFFFF) % level.size


def check_positions(op: str, positions: Tensor) -> None:
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise ValueError(f"{op}: positions must be [P, 3], got {list(positions.shape)}")
    if positions.dtype != torch.float32:
        raise TypeError(f"{op}: positions must be float32, got {positions.dtype}; {op}_ref takes any floating dtype")


def check_table(op: str, positions: Tensor, table: Tensor, grid: HashGrid) -> None:
    shape = [grid.n_entries, grid.n_features]
    if list(table.shape) != shape:
        raise ValueError(f"{op}: table must be {shape} for this grid, got {list(table.shape)}")
    if table.dtype != torch.float32:
        raise TypeError(f"{op}: table must be float32, got {table.dtype}; {op}_ref takes any floating dtype")
    if table.device != positions.device:
        raise RuntimeError(f"{op}: table must be on {positions.device} with positions, got {table.device}; move it")
