"""The encodings without parameters: identity, frequencies, triangle waves, blobs and spherical harmonics."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mvdream_fast.tcnn_compat.config import Options
from mvdream_fast.tcnn_compat.encoder import Encoder


@dataclass(frozen=True)
class Identity(Encoder):
    """x * scale + offset."""

    n_dims: int
    scale: float = 1.0
    offset: float = 0.0

    @classmethod
    def read(cls, options: Options, n_dims: int) -> "Identity":
        """The encoding of a configuration."""
        return cls(n_dims, options.number("scale", 1.0), options.number("offset", 0.0))

    @property
    def width(self) -> int:
        """Columns without padding."""
        return self.n_dims

    def values(self, x: Tensor, params: Tensor) -> Tensor:
        """x [P, n_dims] -> [P, width]."""
        return x * self.scale + self.offset


@dataclass(frozen=True)
class Frequency(Encoder):
    """sin(2^k pi x), cos(2^k pi x) for k = 0, 1, ... of each input. Source: Mildenhall et al. 2020, equation 4."""

    n_dims: int
    n_frequencies: int

    @classmethod
    def read(cls, options: Options, n_dims: int) -> "Frequency":
        """The encoding of a configuration."""
        return cls(n_dims, options.integer("n_frequencies", 12, 1, 64))

    @property
    def width(self) -> int:
        """Columns without padding."""
        return self.n_dims * self.n_frequencies * 2

    def values(self, x: Tensor, params: Tensor) -> Tensor:
        """x [P, n_dims] -> [P, width]: a sine and a cosine of each frequency, input by input."""
        # sin and cos have period 2 in 2^k x, which is taken off where it is exact: pi times a large number is not.
        angles = _octaves(x, self.n_frequencies).remainder(2) * math.pi
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


@dataclass(frozen=True)
class TriangleWave(Encoder):
    """4 |v - floor(v) - 1/2| - 1, v = 2^(k-1) x + k / 4. Source: Mueller et al. 2021, "Real-time Neural Radiance
    Caching for Path Tracing", with tiny-cuda-nn's shift of k / 4."""

    n_dims: int
    n_frequencies: int

    @classmethod
    def read(cls, options: Options, n_dims: int) -> "TriangleWave":
        """The encoding of a configuration."""
        return cls(n_dims, options.integer("n_frequencies", 12, 1, 64))

    @property
    def width(self) -> int:
        """Columns without padding."""
        return self.n_dims * self.n_frequencies

    def values(self, x: Tensor, params: Tensor) -> Tensor:
        """x [P, n_dims] -> [P, width]: every frequency, input by input."""
        shifts = torch.arange(self.n_frequencies, device=x.device, dtype=x.dtype) / 4
        phase = _octaves(x, self.n_frequencies) / 2 + shifts
        return ((phase - phase.detach().floor() - 0.5).abs() * 4 - 1).flatten(1)


@dataclass(frozen=True)
class OneBlob(Encoder):
    """The integral of a quartic bump of radius 1 / n_bins around x over each of n_bins bins of [0, 1], which is a ring.

    Source: Mueller et al. 2019, "Neural Importance Sampling", section 4.3, with tiny-cuda-nn's bump for the Gaussian.
    """

    n_dims: int
    n_bins: int

    @classmethod
    def read(cls, options: Options, n_dims: int) -> "OneBlob":
        """The encoding of a configuration."""
        n_bins = options.integer("n_bins", 16, 1, 1 << 16)
        options.require(n_bins & (n_bins - 1) == 0, "n_bins", "a power of 2", "change it")
        return cls(n_dims, n_bins)

    @property
    def width(self) -> int:
        """Columns without padding."""
        return self.n_dims * self.n_bins

    def values(self, x: Tensor, params: Tensor) -> Tensor:
        """x [P, n_dims] -> [P, width]: every bin, input by input."""
        edges = torch.arange(self.n_bins + 1, device=x.device, dtype=x.dtype) / self.n_bins
        distance = edges - x[:, :, None]  # [P, n_dims, n_bins + 1]
        below = torch.stack([_bump_below((distance + turn) * self.n_bins) for turn in (-1, 0, 1)]).sum(0)
        return below.diff(dim=-1).flatten(1)


def _bump_below(u: Tensor) -> Tensor:
    """The integral of 15/16 (1 - t^2)^2, t in [-1, 1], up to u."""
    square = u * u
    return (15 / 16 * u * (1 - 2 / 3 * square + square * square / 5) + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class SphericalHarmonics(Encoder):
    """Real spherical harmonics of the direction 2 x - 1, degrees below `degree`; padding comes before them.

    Source: Sloan 2013, "Efficient Spherical Harmonic Evaluation", appendix A1, with the Condon-Shortley sign. They are
    polynomials, also where 2 x - 1 is no unit vector.
    """

    n_dims: int
    degree: int

    fills_front = True

    @classmethod
    def read(cls, options: Options, n_dims: int) -> "SphericalHarmonics":
        """The encoding of a configuration."""
        options.require(n_dims == 3, "otype", f"an encoding of {n_dims} inputs", "it takes 3: mind n_input_dims")
        return cls(n_dims, options.integer("degree", 4, 1, 8))

    @property
    def width(self) -> int:
        """Columns without padding."""
        return self.degree**2

    def values(self, x: Tensor, params: Tensor) -> Tensor:
        """x [P, 3] -> [P, width]: column l (l + 1) + m is Y_lm."""
        x, y, z = (2 * x - 1).unbind(-1)
        out = [torch.zeros_like(z)] * self.width
        cosine, sine = torch.ones_like(z), torch.zeros_like(z)  # real and imaginary part of (x + i y)^m
        top = torch.ones_like(z)  # P_mm without its power of sin(theta)
        for m in range(self.degree):
            before, legendre = torch.zeros_like(z), top
            for degree in range(m, self.degree):
                norm = _norm(degree, m)
                out[degree * (degree + 1) + m] = norm * legendre * cosine
                if m:
                    out[degree * (degree + 1) - m] = norm * legendre * sine
                after = ((2 * degree + 1) * z * legendre - (degree + m) * before) / (degree - m + 1)
                before, legendre = legendre, after
            cosine, sine = x * cosine - y * sine, x * sine + y * cosine
            top = -(2 * m + 1) * top
        return torch.stack(out, dim=-1)


def _norm(degree: int, m: int) -> float:
    """What makes the squares of Y_lm integrate to 1 over the sphere."""
    ratio = math.factorial(degree - m) / math.factorial(degree + m)
    return math.sqrt((2 * degree + 1) / (4 * math.pi) * ratio * (2 if m else 1))


def _octaves(x: Tensor, n: int) -> Tensor:
    """x [P, n_dims] -> 2^k x [P, n_dims, n], exact."""
    return x[:, :, None] * torch.exp2(torch.arange(n, device=x.device, dtype=x.dtype))
