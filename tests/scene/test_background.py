"""Backgrounds: the spherical harmonics, the environment map and its random colours, the fixed colour."""

import math

import pytest
import torch

from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.background import EnvironmentMap, FixedBackground, seen_behind, spherical_harmonics
from mvdream_fast.scene.base import Lighting


def directions(n, seed=0):
    d = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(d, dim=-1)


def test_harmonics_are_orthonormal():
    # Gauss-Legendre in z and equal steps in azimuth integrate polynomials of this degree exactly.
    import numpy as np

    z, w = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(8))
    azimuth = torch.arange(16, dtype=torch.float64) * 2 * math.pi / 16
    r = torch.sqrt(1 - z**2)[:, None]
    d = torch.stack([r * azimuth.cos(), r * azimuth.sin(), z[:, None].expand(8, 16)], -1).reshape(-1, 3)
    weight = (w[:, None] * 2 * math.pi / 16).expand(8, 16).reshape(-1)
    y = spherical_harmonics(d)
    torch.testing.assert_close(y.T @ (weight[:, None] * y), torch.eye(9, dtype=torch.float64), atol=1e-9, rtol=0)


def test_harmonics_by_hand():
    wanted = [0.28209479, 0, 0.48860251, 0, 0, 0, 0.63078313, 0, 0]
    torch.testing.assert_close(spherical_harmonics(torch.tensor([[0.0, 0, 1]]))[0], torch.tensor(wanted))
    wanted = [0.28209479, 0, 0, -0.48860251, 0, 0, -0.31539157, 0, 0.54627422]
    torch.testing.assert_close(spherical_harmonics(torch.tensor([[1.0, 0, 0]]))[0], torch.tensor(wanted))


def test_environment_map_parameters_and_range():
    background = EnvironmentMap()
    assert [tuple(p.shape) for p in background.parameters()] == [(16, 9), (16, 16), (3, 16)]
    out = background(directions(100).float())
    assert out.shape == (100, 3)
    assert bool(((out > 0) & (out < 1)).all())
    assert torch.equal(out, background(directions(100).float(), Stream(0, 0, "x"), training=False))


def test_random_colors_half_of_the_time():
    background, d = EnvironmentMap(), directions(8).float()
    learned, colors = background(d), []
    for step in range(400):
        out = background(d, Stream(0, step, "background"), training=True)
        if not torch.equal(out, learned):
            assert torch.equal(out, out[:1].expand(8, 3))
            colors.append(out[0])
    # 200 expected, deviation 10.
    assert 150 < len(colors) < 250
    spread = torch.stack(colors)
    assert bool((spread.mean(0) - 0.5).abs().max() < 0.1)


def test_random_colors_leave_a_zero_gradient():
    background = EnvironmentMap(augment_prob=1.0)
    background(directions(8).float(), Stream(0, 0, "background"), training=True).sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0 for p in background.parameters())


def test_plain_rays_have_the_background_itself_and_others_a_stream_of_its_own():
    background, d = EnvironmentMap(augment_prob=1.0), directions(8).float()
    plain = torch.arange(8) >= 5
    behind = Stream(0, 7, "behind")
    out = seen_behind(background, d, Stream(0, 0, "render"), Lighting(plain=plain, behind=behind))
    assert torch.equal(out[5:], background(d)[5:])
    assert torch.equal(out[:5], background(d, Stream(0, 7, "behind"), training=True)[:5])
    out.sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in background.parameters())


def test_training_needs_a_stream():
    with pytest.raises(ValueError, match="EnvironmentMap: stream must be a Stream in training, got None"):
        EnvironmentMap()(directions(2).float(), training=True)


def test_fixed_background():
    background = FixedBackground((0.2, 0.4, 0.6))
    out = background(directions(5).float(), Stream(0, 0, "x"), training=True)
    torch.testing.assert_close(out, torch.tensor([0.2, 0.4, 0.6]).expand(5, 3))
    assert not list(background.parameters())
    assert background(torch.zeros(0, 3)).shape == (0, 3)
