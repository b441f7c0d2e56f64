"""tiny-cuda-nn's documented formulas in float64, one number at a time: what the tests of tcnn_compat compare with."""

import itertools
import math

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the modules make their params
FACTORS = (1, 2654435761, 805459861, 3674653429)

ACTIVATIONS = {
    "None": lambda x: x,
    "ReLU": lambda x: max(x, 0.0),
    "LeakyReLU": lambda x: max(x, 0.0) + 0.01 * min(x, 0.0),
    "Exponential": math.exp,
    "Sine": math.sin,
    "Sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "Squareplus": lambda x: 0.5 * (10 * x + math.sqrt(100 * x * x + 4)) / 10,
    "Softplus": lambda x: math.log(math.exp(10 * x) + 1) / 10,
    "Tanh": math.tanh,
    "SiLU": lambda x: x / (1 + math.exp(-x)),
}


def draw(*shape, seed=0):
    """Uniform numbers in [0, 1) that are float32 numbers, on DEVICE."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def refill(module, seed=0):
    """Params of order 1, where the initial ones are too small to tell right from wrong; returns them in float64."""
    values = draw(module.params.numel(), seed=seed) * 2 - 1
    module.load_state_dict({"params": values})
    return values.double().cpu().numpy()


def levels(dims, config):
    """(scale, side, rows) of each level of a grid."""
    kind, base = config.get("type", "Hash"), config.get("base_resolution", 16)
    for level in range(config.get("n_levels", 16)):
        exponent = np.float32(level) * np.log2(np.float32(config.get("per_level_scale", 2.0)))
        scale = np.exp2(exponent) * np.float32(base) - np.float32(1)
        side = math.ceil(scale) + 1
        dense = (side**dims + 7) // 8 * 8
        limit = {"Hash": 2 ** config.get("log2_hashmap_size", 19), "Tiled": base**dims, "Dense": dense}[kind]
        yield float(scale), side, min(dense, limit)


def row(vertex, side, rows, kind, factors=FACTORS):
    """The row of a vertex: its number in the dense grid, or its hash where a hash grid has too few rows."""
    if kind == "Hash" and side ** len(vertex) > rows:
        hashed = 0
        for coordinate, factor in zip(vertex, factors):
            hashed ^= coordinate * factor % 2**32
        return hashed % rows
    return sum(coordinate * side**axis for axis, coordinate in enumerate(vertex)) % rows


def grid(point, params, config, factors=FACTORS):
    """One point through a grid; only the lattice coordinate is rounded to float32."""
    n_features, kind = config.get("n_features_per_level", 2), config.get("type", "Hash")
    table, out = params.reshape(-1, n_features), []
    for scale, side, rows in levels(len(point), config):
        lattice = [float(np.float32(scale * float(x) + 0.5)) for x in point]
        cell = [math.floor(x) for x in lattice]
        high = [x - math.floor(x) for x in lattice]
        if config.get("interpolation") == "Smoothstep":
            high = [x * x * (3 - 2 * x) for x in high]
        if config.get("interpolation") == "Nearest":
            high = [0.0] * len(point)
        value = np.zeros(n_features)
        for corner in itertools.product((0, 1), repeat=len(point)):
            weight = math.prod(h if bit else 1 - h for h, bit in zip(high, corner))
            value += weight * table[row([c + bit for c, bit in zip(cell, corner)], side, rows, kind, factors)]
        out, table = [*out, *value], table[rows:]
    assert not len(table)
    return out


def frequency(x, n):
    """sin and cos of each octave of one input."""
    return [f(2**k * math.pi * x) for k in range(n) for f in (math.sin, math.cos)]


def triangle_wave(x, n):
    """A wave that rises from -1 to 1 and falls again, for each octave of one input."""
    phases = [2 ** (k - 1) * x + k / 4 for k in range(n)]
    return [abs(v - math.floor(v) - 0.5) * 4 - 1 for v in phases]


def one_blob(x, n_bins, steps=2000):
    """The quartic kernel around x, summed over each bin of a ring by the midpoint rule."""
    out = []
    for k in range(n_bins):
        total = 0.0
        for turn in (-1, 0, 1):
            t = ((k + (np.arange(steps) + 0.5) / steps) / n_bins - x + turn) * n_bins
            total += (15 / 16 * np.clip(1 - t * t, 0, None) ** 2).mean()
        out.append(total)
    return out


def harmonics_to_degree_4(x, y, z):
    """The 16 polynomials of tiny-cuda-nn's SphericalHarmonics with degree 4."""
    return [
        0.28209479177387814,
        -0.48860251190291987 * y,
        0.48860251190291987 * z,
        -0.48860251190291987 * x,
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.94617469575755997 * z * z - 0.31539156525251999,
        -1.0925484305920792 * x * z,
        0.54627421529603959 * (x * x - y * y),
        0.59004358992664352 * y * (y * y - 3 * x * x),
        2.8906114426405538 * x * y * z,
        0.45704579946446572 * y * (1 - 5 * z * z),
        0.3731763325901154 * z * (5 * z * z - 3),
        0.45704579946446572 * x * (1 - 5 * z * z),
        1.4453057213202769 * z * (x * x - y * y),
        0.59004358992664352 * x * (3 * y * y - x * x),
    ]


def network(x, params, n_out, config):
    """One input, padded to a multiple of 16 already, through a network's matrices."""
    n_neurons, n_hidden = config.get("n_neurons", 128), config.get("n_hidden_layers", 5)
    sizes = [len(x), *[n_neurons] * n_hidden, (n_out + 15) // 16 * 16]
    names = [config.get("activation", "ReLU")] * n_hidden + [config.get("output_activation", "None")]
    for n_in, rows, name in zip(sizes, sizes[1:], names):
        matrix, params = params[: n_in * rows].reshape(rows, n_in), params[n_in * rows :]
        x = [ACTIVATIONS[name](float(v)) for v in matrix @ np.asarray(x)]
    assert not len(params)
    return x[:n_out]


def close(out, rows, tolerance=2e-6):
    """`out` [P, n] equals the rows, each a list of numbers of order 1."""
    torch.testing.assert_close(
        out.double().cpu(), torch.tensor(rows, dtype=torch.float64), atol=tolerance, rtol=tolerance
    )
