"""Encodings without parameters: against one number at a time, SciPy's spherical harmonics, and both derivatives."""

import math

import numpy as np
import pytest
import torch
from reference.tcnn_formulas import close, draw, frequency, harmonics_to_degree_4, one_blob, triangle_wave
from scipy.special import sph_harm_y

from mvdream_fast import tcnn_compat as tcnn


def encoding(dims, **config):
    return tcnn.Encoding(dims, config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "formula", "tolerance"),
    [
        ({"otype": "Identity", "scale": 2, "offset": -0.5}, lambda v: [2 * v - 0.5], 1e-7),
        ({"otype": "Frequency", "n_frequencies": 5}, lambda v: frequency(v, 5), 1e-6),
        ({"otype": "Frequency"}, lambda v: frequency(v, 12), 1e-6),
        ({"otype": "TriangleWave", "n_frequencies": 5}, lambda v: triangle_wave(v, 5), 2e-6),
        ({"otype": "TriangleWave"}, lambda v: triangle_wave(v, 12), 3e-4),  # as tiny-cuda-nn: 2^10 x + 11/4 in float32
        ({"otype": "OneBlob", "n_bins": 8}, lambda v: one_blob(v, 8), 2e-6),
        ({}, lambda v: one_blob(v, 16), 2e-6),
    ],
)
def test_against_one_number_at_a_time(config, formula, tolerance):
    module, x = encoding(2, **config), draw(20, 2)
    rows = [[value for v in point for value in formula(v)] for point in x.tolist()]
    assert module.n_output_dims == len(rows[0])
    assert module.params.numel() == 0
    close(module(x), rows, tolerance)


def test_blobs_go_around_and_sum_to_one():
    x = torch.tensor([[0.0], [1.0], [0.03]], device=draw(1).device)
    out = encoding(1, otype="OneBlob", n_bins=4)(x)
    assert torch.equal(out[0], out[1])
    # Around 0 one half lies in the first bin and one half in the last.
    torch.testing.assert_close(out[0].cpu(), torch.tensor([0.5, 0, 0, 0.5]))
    torch.testing.assert_close(out.sum(-1).cpu(), torch.ones(3))


@pytest.mark.parametrize("degree", range(1, 9))
def test_harmonics_of_directions(degree):
    v = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(degree))
    v = torch.nn.functional.normalize(v, dim=-1)
    theta, phi = np.arccos(v[:, 2].numpy()), np.arctan2(v[:, 1].numpy(), v[:, 0].numpy())
    columns = []
    for n in range(degree):
        for m in range(-n, n + 1):
            y = sph_harm_y(n, abs(m), theta, phi) * (math.sqrt(2) if m else 1)
            columns.append(y.imag if m < 0 else y.real)
    out = encoding(3, otype="SphericalHarmonics", degree=degree)(((v + 1) / 2).to(draw(1)))
    close(out, np.stack(columns, -1).tolist(), 3e-6)


def test_harmonics_are_polynomials_everywhere():
    x = draw(40, 3)
    rows = [harmonics_to_degree_4(*(2 * v - 1 for v in point)) for point in x.tolist()]
    close(encoding(3, otype="SphericalHarmonics")(x), rows)


@pytest.mark.parametrize("otype", ["Identity", "Frequency", "TriangleWave", "OneBlob", "SphericalHarmonics"])
def test_both_derivatives(otype):
    pure = encoding(3, otype=otype, n_frequencies=3, n_bins=4)._encoder
    x = draw(4, 3).cpu().double().requires_grad_()
    torch.autograd.gradcheck(lambda x: pure.values(x, x[:0, 0]), x)
    torch.autograd.gradgradcheck(lambda x: pure.values(x, x[:0, 0]), x)
