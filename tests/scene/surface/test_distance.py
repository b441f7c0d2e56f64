"""The signed distance: exactly a sphere at first, its gradients, and levels that are not there until they open."""

import pytest
import torch

from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.losses import eikonal_loss
from mvdream_fast.scene.surface.config import SurfaceConfig
from mvdream_fast.scene.surface.distance import SignedDistance

SMALL = SurfaceConfig(volume="mini", sphere_radius=0.6)


def points(n, seed=0):
    return Stream(seed, 0, "points").uniform(n, 3, low=-1, high=1)


def rough(n_active=12, dtype=torch.float32):
    """A field that has learned something: numbers of order 1 in the table and the networks."""
    field = SignedDistance(SMALL, Stream(3, 0, "volume"))
    stream = Stream(4, 0, "rough")
    with torch.no_grad():
        field.table.copy_(stream.normal(*field.table.shape) * 0.3)
        field.density_weights[-1].copy_(stream.normal(*field.density_weights[-1].shape) * 0.2)
    field.n_active = n_active
    return field.to(dtype)


def test_it_starts_as_the_sphere():
    field, x = SignedDistance(SMALL), points(2000)
    sphere = x.double().norm(dim=-1) - 0.6
    torch.testing.assert_close(field.distances(x).double(), sphere, atol=2e-7, rtol=0)
    torch.testing.assert_close(field.distances_and_colors(x)[0], field.distances(x), atol=0, rtol=0)
    assert field.density_weights[-1].abs().max() == 0
    far = x[x.norm(dim=-1) > 0.2]
    torch.testing.assert_close(
        field.gradients(far, "analytic"), torch.nn.functional.normalize(far, dim=-1), atol=1e-6, rtol=0
    )


def test_eikonal_loss_is_zero_of_a_true_distance():
    field, x = SignedDistance(SMALL), points(500)
    slopes = field.gradients(x[x.norm(dim=-1) > 0.3], "analytic").norm(dim=-1)
    assert eikonal_loss(slopes).item() < 1e-12
    # Central differences of a sphere of radius r are off by about eps^2 / r^2, with eps the finest cell, 2 / 256.
    slopes = field.gradients(x[x.norm(dim=-1) > 0.3], "finite_difference").norm(dim=-1)
    assert eikonal_loss(slopes).item() < 1e-6
    assert eikonal_loss(torch.tensor([1.0, 1.5, 0.0])).item() == pytest.approx(1.25 / 3)
    assert eikonal_loss(torch.zeros(0)).item() == 0


def test_the_first_step_has_somewhere_to_go():
    field = SignedDistance(SMALL)
    field.distances(points(100)).sum().backward()
    assert field.density_weights[-1].grad.abs().max() > 0
    assert field.density_weights[0].grad.abs().max() == 0  # from the second step on, as with adapters


@pytest.mark.parametrize("n_active", [5, 12])
def test_gradients_of_the_parameters_against_finite_differences(n_active):
    field, x = rough(n_active, torch.float64), points(20).double()

    def loss():
        distances, rgb = field.distances_and_colors(x)
        return (distances.square() + rgb.sum(-1)).sum() + eikonal_loss(field.gradients(x).norm(dim=-1))

    loss().backward()
    touched = field.table.grad.flatten().abs().argsort(descending=True)[:4].tolist()
    for parameter, where in (
        (field.table, touched), (field.density_weights[0], [0, 33]), (field.density_weights[1], [3]),
        (field.feature_weights[0], [7]),
    ):  # fmt: skip
        flat = parameter.data.view(-1)
        for i in where:
            values, before = [], flat[i].item()
            for eps in (1e-6, -1e-6):
                flat[i] = before + eps
                values.append(loss().item())
            flat[i] = before
            slope = (values[0] - values[1]) / 2e-6
            assert parameter.grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_float32_is_float64_rounded():
    fine, exact, x = rough(7), rough(7, torch.float64), points(300)
    distances, rgb = fine.distances_and_colors(x)
    truth, colors = exact.distances_and_colors(x.double())
    torch.testing.assert_close(distances.double(), truth, atol=1e-5, rtol=0)
    torch.testing.assert_close(rgb.double(), colors, atol=1e-5, rtol=0)


def test_analytic_gradients_are_those_of_the_field():
    field, x = rough(4, torch.float64), 0.9 * points(50).double()
    eps = 1e-7
    around = torch.stack(
        [(field.distances(x + d) - field.distances(x - d)) / (2 * eps) for d in eps * torch.eye(3)], -1
    )
    torch.testing.assert_close(field.gradients(x, "analytic"), around, atol=1e-5, rtol=1e-5)


def test_levels_that_are_not_active_have_no_influence_and_no_gradient():
    field, x = rough(5), points(200)
    grid = field.spec.grid
    first = grid.levels[5].offset
    before = field.distances_and_colors(x)
    with torch.no_grad():
        field.table[first:] = 100.0
        field.density_weights[0][:, 10:] = 100.0
        field.feature_weights[0][:, 10:] = -100.0
    after = field.distances_and_colors(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (after[0].sum() + after[1].sum() + field.gradients(x).square().sum()).backward()
    assert field.table.grad[first:].abs().max() == 0
    assert field.table.grad[:first].abs().max() > 0
    for weights in (field.density_weights, field.feature_weights):
        assert weights[0].grad[:, 10:].abs().max() == 0
        assert weights[0].grad[:, :10].abs().max() > 0


def test_all_levels_are_those_of_the_whole_grid():
    field, x = rough(12), points(100)
    whole = [x.clone() for x in field.distances_and_colors(x)]
    field.n_active = 11
    assert not torch.equal(field.distances(x), whole[0])
    # A grid with one level less is the same as one whose last level is zero.
    with torch.no_grad():
        field.table[field.spec.grid.levels[11].offset :] = 0
    less = field.distances(x)
    field.n_active = 12
    torch.testing.assert_close(field.distances(x), less, atol=1e-6, rtol=0)


def test_eps_is_a_cell_of_the_finest_active_level():
    field = SignedDistance(SMALL)
    for n_active, resolution in ((1, 16), (12, 256)):
        field.n_active = n_active
        assert field.eps == pytest.approx(2 / resolution)


def test_deviation_is_an_exponent_of_ten_times_v():
    field = SignedDistance(SMALL)
    assert field.inverse_std.item() == pytest.approx(20.0855, rel=1e-5)  # exp(3)
    for v, s in ((5.0, 1e6), (-5.0, 1e-6)):
        field.deviation.data.fill_(v)
        assert field.inverse_std.item() == pytest.approx(s)
