"""Opacities of pieces of rays: worked numbers, unbiased on a plane, telescoping; and the ends that pieces share."""

import math

import pytest
import torch

from mvdream_fast.ops.march_rays import Samples
from mvdream_fast.scene.surface.opacity import density_of, nodes_of, optical_depths

ONE = torch.ones(1)


def alphas(before, after, length, s, ratio=1.0, kind="neus"):
    sizes = (torch.tensor([x], dtype=torch.float64) for x in (before, after, length))
    return -torch.expm1(-optical_depths(kind, *sizes, torch.tensor([s], dtype=torch.float64), ratio)).item()


def test_neus_by_hand():
    # Phi(1) = 0.7310586, Phi(0) = 0.5, Phi(-1) = 0.2689414, with s = 10 and distances of tenths.
    assert alphas(0.1, 0.0, 0.1, 10) == pytest.approx((0.7310586 - 0.5) / 0.7310586, abs=1e-6)
    assert alphas(0.1, -0.1, 0.2, 10) == pytest.approx(1 - 0.2689414 / 0.7310586, abs=1e-6)
    assert alphas(0.0, -0.1, 0.5, 10) == pytest.approx(1 - 0.2689414 / 0.5, abs=1e-6)
    assert alphas(-0.1, 0.1, 0.2, 10) == 0  # on the way out the opacity is clamped to 0
    assert alphas(0.1, 0.1, 0.2, 10) == 0


def test_annealing_by_hand():
    # Seen exactly from its side, c = 0: half of the length counts as the fall before annealing, nothing after it.
    assert alphas(0.0, 0.0, 0.4, 10, ratio=0.0) == pytest.approx(1 - 0.2689414 / 0.7310586, abs=1e-6)
    assert alphas(0.0, 0.0, 0.4, 10, ratio=0.5) == pytest.approx(1 - 0.3775407 / 0.6224593, abs=1e-6)  # Phi(-+0.5)
    assert alphas(0.0, 0.0, 0.4, 10, ratio=1.0) == 0
    # Seen from behind, c = 1, it is hidden at any stage; met head on, c = -1, it is there at any.
    for ratio in (0.0, 0.3, 1.0):
        assert alphas(-0.1, 0.1, 0.2, 10, ratio) == pytest.approx(0, abs=1e-12)
        assert alphas(0.1, -0.1, 0.2, 10, ratio) == pytest.approx(1 - 0.2689414 / 0.7310586, abs=1e-6)


def test_volsdf_by_hand():
    # beta = 0.1: density 10 * (1 - exp(-1) / 2) at 0.1 inside, 5 on the surface, 10 * exp(-1) / 2 at 0.1 outside.
    found = density_of("volsdf", torch.tensor([-0.1, 0.0, 0.1]), torch.tensor([10.0]))
    torch.testing.assert_close(found, torch.tensor([10 - 5 / math.e, 5.0, 5 / math.e]))
    assert alphas(0.1, -0.1, 0.2, 10, kind="volsdf") == pytest.approx(1 - math.exp(-0.2 * 5), abs=1e-9)
    assert alphas(-0.1, 0.1, 0.2, 10, kind="volsdf") == pytest.approx(1 - math.exp(-0.2 * 5), abs=1e-9)


def test_density_is_the_limit_of_short_pieces_met_head_on():
    at, h = torch.linspace(-0.5, 0.5, 41, dtype=torch.float64), 1e-5
    s = torch.tensor([30.0], dtype=torch.float64)
    depths = optical_depths("neus", at + h / 2, at - h / 2, torch.full_like(at, h), s)
    torch.testing.assert_close(depths / h, density_of("neus", at, s), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("slope", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("s", [20.0, 300.0])
def test_weights_are_largest_on_a_plane(slope, s):
    # A ray that meets a plane at t = 1 under an angle (or a distance of another slope); fine steps.
    t = torch.linspace(0, 2, 8001, dtype=torch.float64)
    distance, lengths = slope * (1 - t), t.diff()
    depths = optical_depths("neus", distance[:-1], distance[1:], lengths, torch.tensor([s], dtype=torch.float64))
    weights = torch.exp(depths - depths.cumsum(0)) * -torch.expm1(-depths)
    middle = 0.5 * (t[:-1] + t[1:])[weights.argmax()]
    assert middle.item() == pytest.approx(1, abs=2.6e-4)
    # What is left of the ray behind any of them is Phi there over Phi at the start: nothing depends on the steps.
    left = torch.sigmoid(s * distance[-1]) / torch.sigmoid(s * distance[0])
    assert math.exp(-depths.sum().item()) == pytest.approx(left.item(), rel=1e-9)


def test_far_from_the_surface_everything_is_finite_and_has_gradients():
    before = torch.tensor([50.0, 1.0, -1.0, -50.0], requires_grad=True)
    s = torch.tensor([1e4], requires_grad=True)
    depths = optical_depths("neus", before, before - 0.01, torch.full((4,), 0.01), s, 0.3)
    assert bool(((depths >= 0) & depths.isfinite()).all())
    assert depths[:2].tolist() == [0, 0]
    torch.testing.assert_close(depths[2:], torch.full((2,), 100.0), rtol=1e-3, atol=0)
    depths.sum().backward()
    assert before.grad.isfinite().all()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["neus", "volsdf"])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_gradients_against_finite_differences(kind, ratio):
    generator = torch.Generator().manual_seed(0)
    before = 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)
    after = before - 0.1 * torch.rand(30, generator=generator, dtype=torch.float64)
    lengths = torch.full_like(before, 0.12)
    s = torch.tensor([12.0], dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (before, after, s)]
    assert torch.autograd.gradcheck(lambda a, b, s: optical_depths(kind, a, b, lengths, s, ratio), leaves)


def packed(*rays):
    """Samples of rays, each a list of (start, end)."""
    pairs = torch.tensor([pair for ray in rays for pair in ray]).reshape(-1, 2)
    counts = torch.tensor([len(ray) for ray in rays])
    return Samples(*pairs.unbind(-1), torch.stack([counts.cumsum(0) - counts, counts], -1))


def test_nodes_are_shared_by_neighbours_that_touch():
    # The second ray is empty; the third starts where the first ends; the fourth has a gap.
    samples = packed([(1.0, 2.0), (2.0, 3.0)], [], [(3.0, 4.0)], [(0.0, 1.0), (5.0, 6.0), (6.0, 7.0)], [])
    nodes = nodes_of(samples)
    assert nodes.points.t_starts.tolist() == [1, 2, 3, 3, 4, 0, 1, 5, 6, 7]
    assert nodes.points.packed_info.tolist() == [[0, 3], [3, 0], [3, 2], [5, 5], [10, 0]]
    assert nodes.first.tolist() == [0, 1, 3, 5, 7, 8]
    distances = nodes.points.t_starts
    assert torch.equal(nodes.starts(distances), samples.t_starts)
    assert torch.equal(nodes.ends(distances), samples.t_ends)
    assert torch.equal(nodes.means(distances), samples.t_mids)
    origin, direction = torch.zeros(5, 3), torch.tensor([[1.0, 0, 0]]).expand(5, 3)
    assert nodes.points.positions(origin, direction)[:, 0].tolist() == distances.tolist()


def test_nodes_of_nothing():
    nodes = nodes_of(packed([], []))
    assert (nodes.points.n_samples, nodes.points.n_rays, nodes.first.shape) == (0, 2, (0,))
    assert nodes.means(torch.zeros(0, 3)).shape == (0, 3)
    assert nodes.starts(torch.zeros(0)).shape == (0,)
