"""Multiresolution grids of 2 to 4 dimensions: hashed, dense or tiled; nearest, linear or smoothstep interpolation.

Source: Mueller et al. 2022, "Instant Neural Graphics Primitives", section 3; tiny-cuda-nn's rounding, sizes and hashes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import xor

import numpy as np
import torch
from torch import Tensor

from mvdream_fast.core.rng import Stream
from mvdream_fast.ops.hash_encode import HashGrid, Level, hash_encode, require_no_nan
from mvdream_fast.tcnn_compat.config import Options
from mvdream_fast.tcnn_compat.encoder import Encoder, next_multiple

WORD = 1 << 32  # rows are numbered in uint32
HASHES = {
    "CoherentPrime": (1, 2654435761, 805459861, 3674653429),
    "Prime": (1958374283, 2654435761, 805459861, 3674653429),
    "ReversedPrime": (2165219737, 1434869437, 2097192037, 3674653429),
}
STORAGES = {"Hash": "Hash", "Dense": "Dense", "Tiled": "Tiled", "Tile": "Tiled"}
STORAGE_OF_TYPE = {"densegrid": "Dense", "tiledgrid": "Tiled"}
INTERPOLATIONS = {"Nearest": "Nearest", "Linear": "Linear", "Smoothstep": "Smoothstep"}


@dataclass(frozen=True)
class Grid(Encoder):
    """A grid's shape. Its params are the levels' rows, coarsest level first, `n_features` numbers each."""

    n_dims: int
    n_levels: int
    n_features: int
    storage: str
    log2_size: int
    base_resolution: int
    growth: float
    interpolation: str
    factors: tuple[int, ...]
    levels: tuple[Level, ...] = field(init=False, repr=False)  # coarsest first
    native: HashGrid | None = field(init=False, repr=False)  # the same grid as `ops.hash_encode` takes it, if it can

    filler = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", self._levels())
        object.__setattr__(self, "native", self._native())

    @classmethod
    def read(cls, options: Options, n_dims: int) -> "Grid":
        """The grid of a configuration; raises ValueError for one that there cannot be."""
        ok = n_dims in (2, 3, 4)
        options.require(ok, "otype", f"an encoding of {n_dims} inputs", "a grid has 2, 3 or 4: mind n_input_dims")
        n_features = options.integer("n_features_per_level", 2, 1, 8)
        ok = n_features in (1, 2, 4, 8)
        options.require(ok, "n_features_per_level", "1, 2, 4 or 8", "change it")
        ok = not options.config.get("stochastic_interpolation", False)
        options.require(ok, "stochastic_interpolation", "false", "only the exact gradient is here")
        default = STORAGE_OF_TYPE.get(str(options.config.get("otype", "Grid")).lower(), "Hash")
        storage = options.choice("type", default, STORAGES)
        n_levels, base = _n_levels(options, n_features), options.integer("base_resolution", 16, 1, 1 << 20)
        growth = (256 / base) ** (1 / max(n_levels - 1, 1)) if storage == "Dense" else 2.0
        growth = options.number("per_level_scale", growth)
        options.require(growth > 0, "per_level_scale", "above 0", "change it")
        log2_size = options.integer("log2_hashmap_size", 19, 3, 30)
        interpolation = options.choice("interpolation", "Linear", INTERPOLATIONS)
        factors = options.choice("hash", "CoherentPrime", HASHES)
        grid = cls(n_dims, n_levels, n_features, storage, log2_size, base, growth, interpolation, factors)
        ok = all(1 <= level.resolution <= WORD // 2 for level in grid.levels) and grid.n_params < WORD
        limits = "one of resolutions from 1 to 2^31 and fewer than 2^32 parameters"
        options.require(ok, "per_level_scale", limits, "change it, n_levels or base_resolution")
        return grid

    def _levels(self) -> tuple[Level, ...]:
        # float32 arithmetic throughout, because rounding decides the resolutions.
        levels, offset = [], 0
        log2_growth = np.log2(np.float32(self.growth))
        for i in range(self.n_levels):
            with np.errstate(over="ignore"):  # such a grid is refused
                scale = np.exp2(np.float32(i) * log2_growth) * np.float32(self.base_resolution) - np.float32(1)
            resolution = int(min(np.ceil(scale), WORD)) + 1
            vertices = resolution**self.n_dims
            limits = {"Hash": 1 << self.log2_size, "Tiled": self.base_resolution**self.n_dims}
            size = min(next_multiple(min(vertices, WORD // 2 - 1), 8), limits.get(self.storage, WORD))
            hashed = self.storage == "Hash" and vertices > size
            levels.append(Level(float(scale), resolution, offset, size, hashed))
            offset += size
        return tuple(levels)

    def _native(self) -> HashGrid | None:
        plain = (self.n_dims, self.interpolation, self.factors) == (3, "Linear", HASHES["CoherentPrime"])
        if not plain or self.levels[-1].resolution > 1 << 20:
            return None
        log2_size = self.log2_size if self.storage == "Hash" else 24
        try:
            grid = HashGrid(self.n_levels, self.n_features, log2_size, self.base_resolution, self.growth)
        except ValueError:  # beyond its limits
            return None
        return grid if grid.levels == self.levels else None

    @property
    def alignment(self) -> int:
        """A level's features are not torn apart."""
        return self.n_features

    @property
    def width(self) -> int:
        """Columns without padding: level-major."""
        return self.n_levels * self.n_features

    @property
    def n_params(self) -> int:
        """Numbers in all levels."""
        return (self.levels[-1].offset + self.levels[-1].size) * self.n_features

    def initial(self, stream: Stream) -> Tensor:
        """Uniform in +-1e-4."""
        return stream.uniform(self.n_params, low=-1e-4, high=1e-4)

    def values(self, x: Tensor, params: Tensor) -> Tensor:
        """x [P, n_dims], clamped to [0, 1], and params [n_params] -> [P, width]."""
        table = params.view(-1, self.n_features)
        if self.native:
            return hash_encode(x, table, self.native)
        # Not on a GPU, where asking waits for it, and not in a graph, which cannot read values.
        require_no_nan("Grid", x.is_cuda or torch.compiler.is_compiling() or not x.isnan().any())
        unit, tables = x.clamp(0, 1), table.split([level.size for level in self.levels])
        parts = zip(tables, self.levels, strict=True)
        return torch.cat([self._level(unit, entries, level) for entries, level in parts], dim=-1)

    def _level(self, unit: Tensor, entries: Tensor, level: Level) -> Tensor:
        # tiny-cuda-nn's fmaf(scale, x, 0.5): rounded once, which a float64 detour reproduces.
        lattice = (unit.double() * level.scale + 0.5).to(unit.dtype)
        cell = lattice.detach().floor()
        vertex = cell.long().unbind(-1)
        if self.interpolation == "Nearest":
            return entries[self._rows(vertex, level)] + 0 * unit[:, :1]  # the points' gradient is 0, not missing
        high = lattice - cell  # [P, n_dims], the weight of the upper corner along each axis
        if self.interpolation == "Smoothstep":
            high = high * high * (3 - 2 * high)
        out = entries.new_zeros(())
        for corner in range(1 << self.n_dims):
            bits = [corner >> axis & 1 for axis in range(self.n_dims)]
            weights = [high[:, axis] if bit else 1 - high[:, axis] for axis, bit in enumerate(bits)]
            rows = self._rows([c + bit for c, bit in zip(vertex, bits, strict=True)], level)
            out = out + math.prod(weights[1:], start=weights[0])[:, None] * entries[rows]
        return out

    def _rows(self, axes: Sequence[Tensor], level: Level) -> Tensor:
        """Rows [P] of lattice vertices, n_dims times [P], among the level's entries: in uint32, modulo their number."""
        if level.hashed:
            return reduce(xor, [c * factor for c, factor in zip(axes, self.factors)]) % WORD % level.size
        if level.resolution**self.n_dims >= WORD:  # tiny-cuda-nn gives up: a tiled level this fine reads its first row
            return torch.zeros_like(axes[0])
        return reduce(lambda row, c: row * level.resolution + c, reversed(axes)) % level.size


def _n_levels(options: Options, n_features: int) -> int:
    """The number of levels, which the number of all features gives as well."""
    key = next((key for key in ("n_features", "n_grid_features") if key in options), None)
    if key is None:
        return options.integer("n_levels", 16, 1, 128)
    options.require("n_levels" not in options, key, "missing where n_levels is given", "remove one of them")
    total = options.integer(key, 0, n_features, 128 * n_features)
    options.require(total % n_features == 0, key, "a multiple of n_features_per_level", "change one of them")
    return total // n_features
