"""The proposal-network estimator: numbers by hand, its loss in loops, what a training learns, what it refuses."""

import pytest
import torch
from reference.nerfacc_data import close, draw
from torch import nn

from mvdream_fast import nerfacc_compat as nerfacc
from mvdream_fast.nerfacc_compat.estimators import prop_net


def nothing(t_starts, t_ends):
    return torch.zeros_like(t_starts)


def test_samples_where_nothing_is_known():
    estimator = nerfacc.PropNetEstimator()
    t_starts, t_ends = estimator.sampling([], [], 4, 2, 1.0, 5.0, sampling_type="uniform")
    close(t_starts, torch.tensor([[1.0, 2, 3, 4]] * 2))
    close(t_ends, torch.tensor([[2.0, 3, 4, 5]] * 2))
    t_starts, t_ends = estimator.sampling([], [], 4, 1, 1.0, 5.0)  # equal steps of 1 / t, from 1 to 1 / 5
    close(t_starts, torch.tensor([[1.0, 1 / 0.8, 1 / 0.6, 1 / 0.4]]))
    close(t_ends, torch.tensor([[1 / 0.8, 1 / 0.6, 1 / 0.4, 5]]))
    t_starts, t_ends = estimator.sampling([], [], 4, 1, 0.5, float("inf"))
    close(t_ends, torch.tensor([[2 / 3, 1, 2, torch.inf]]))


def test_samples_go_where_a_proposal_sees_something():
    """A wall in the third of four intervals takes half of the light, and the last edge what is left of it."""
    asked = []

    def wall(t_starts, t_ends):
        asked.append((t_starts, t_ends))
        return torch.tensor([[0, 0, torch.log(torch.tensor(2.0)), 0]]).expand(3, 4)

    t_starts, t_ends = nerfacc.PropNetEstimator().sampling([wall], [4], 2, 3, 0.0, 4.0, sampling_type="uniform")
    close(asked[0][0], torch.tensor([[0.0, 1, 2, 3]] * 3))
    close(asked[0][1], torch.tensor([[1.0, 2, 3, 4]] * 3))
    # cdf 0, 0, 0, 1/2, 1 at 0..4: samples at 1/4 and 3/4 of the light are 2.5 and 3.5.
    close(t_starts, torch.tensor([[2.0, 3]] * 3))
    close(t_ends, torch.tensor([[3.0, 4]] * 3))


def test_planes_of_each_ray():
    near, far = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]])
    t_starts, t_ends = nerfacc.PropNetEstimator().sampling([nothing], [8], 2, 2, near, far, sampling_type="uniform")
    # A proposal that sees nothing has all light left at its last interval.
    close(t_ends[:, -1:], far)
    assert bool((t_starts >= near).all())


def loss_in_loops(edges, weights, proposal_edges, proposal_weights, eps=1e-7):
    """Mip-NeRF 360's eq. 13 of one ray: what an interval weighs above the sum of the proposal's that overlap it."""
    losses = []
    for i, w in enumerate(weights):
        bound = 0.0
        for j, p in enumerate(proposal_weights):
            if proposal_edges[j] <= edges[i + 1] and proposal_edges[j + 1] > edges[i]:
                bound = bound + p
        losses.append(torch.clamp(w - bound, min=0) ** 2 / (w + eps))
    return torch.stack(losses)


def cumulative(weights):
    return nn.functional.pad(weights.cumsum(-1), (1, 0))


def histograms(n_rays=4, n=9, m=5):
    """Edges and weights of a rendering and of a proposal that covers as much of the rays."""
    edges, proposal_edges = draw(n_rays, n + 1).sort(-1).values, draw(n_rays, m + 1, seed=1).sort(-1).values
    proposal_edges[:, 0], proposal_edges[:, -1] = -0.1, 1.1
    return edges, draw(n_rays, n, seed=2) / n, proposal_edges, draw(n_rays, m, seed=3) / m


def test_the_loss_against_loops():
    edges, weights, proposal_edges, proposal_weights = histograms()
    inputs = [proposal_weights.clone().requires_grad_() for _ in range(3)]
    outer = nerfacc.RayIntervals(proposal_edges)
    losses = [
        torch.stack([loss_in_loops(*ray) for ray in zip(edges, weights, proposal_edges, inputs[0], strict=True)]),
        prop_net._pdf_loss(nerfacc.RayIntervals(edges), cumulative(weights), outer, cumulative(inputs[1])),
        prop_net._lossfun_outer(edges, weights, proposal_edges, inputs[2]),
    ]
    gradients = [torch.autograd.grad(x, p, draw(4, 9, seed=4))[0] for x, p in zip(losses, inputs, strict=True)]
    assert float(losses[0].max()) > 1e-3
    assert float((losses[0] == 0).double().mean()) > 0.1
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        close(loss, losses[0], rtol=1e-5, atol=1e-8)  # the eps of _lossfun_outer is that of its dtype
        close(gradient, gradients[0], rtol=1e-5, atol=1e-6)


def test_the_packed_loss_is_the_batched_one():
    edges, weights, proposal_edges, proposal_weights = histograms()
    batched = prop_net._pdf_loss(
        *(nerfacc.RayIntervals(edges), cumulative(weights)),
        *(nerfacc.RayIntervals(proposal_edges), cumulative(proposal_weights)),
    )
    sides = []
    for x, w in ((edges, weights), (proposal_edges, proposal_weights)):
        n = x.shape[1]
        is_left, is_right = (torch.arange(n) != end for end in (n - 1, 0))
        rays = torch.arange(4).repeat_interleave(n)
        packed = nerfacc.RayIntervals(x.flatten(), None, rays, is_left.repeat(4), is_right.repeat(4))
        sides += [packed, cumulative(w).flatten()]
    close(prop_net._pdf_loss(*sides).view(4, 9), batched, rtol=1e-12, atol=1e-12)
    sides[0].is_left = None
    with pytest.raises(ValueError, match="_pdf_loss: is_left and is_right must be given with packed intervals"):
        prop_net._pdf_loss(*sides)


def test_a_loss_by_hand():
    # An interval of weight 0.5 overlaps the proposal's first two, of 0.1 and 0.2: (0.5 - 0.3)^2 / 0.5.
    edges, proposal = torch.tensor([[0.5, 1.5]]), torch.tensor([[0.0, 1, 2, 3]])
    cdfs, proposal_cdfs = torch.tensor([[0.0, 0.5]]), torch.tensor([[0.0, 0.1, 0.3, 1.0]])
    loss = prop_net._pdf_loss(nerfacc.RayIntervals(edges), cdfs, nerfacc.RayIntervals(proposal), proposal_cdfs)
    close(loss, torch.tensor([[0.08]]), rtol=1e-5)


class Density(nn.Module):
    """Density by the distance alone, a logarithm for each of 16 places."""

    def __init__(self):
        super().__init__()
        self.logs = nn.Parameter(torch.full((16,), -1.0))

    def forward(self, t_starts, t_ends):
        place = ((t_starts + t_ends) / 2 * 4).clamp(0, 15.99)
        return self.logs.exp()[place.long()]


def shell(t_starts, t_ends):
    return 30.0 * (((t_starts + t_ends) / 2 - 2.6).abs() < 0.1)


def train(seed=0, steps=150):
    torch.manual_seed(seed)
    proposals = nn.ModuleList([Density(), Density()])
    optimizer = torch.optim.Adam(proposals.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100, 0.1)
    estimator, losses = nerfacc.PropNetEstimator(optimizer, scheduler), []
    requires_grad = nerfacc.estimators.prop_net.get_proposal_requires_grad_fn(2.0, 50)
    for step in range(steps):
        options = {"stratified": True, "requires_grad": requires_grad(step)}
        t_starts, t_ends = estimator.sampling([*proposals], [32, 24], 16, 8, 0.1, 4.0, "uniform", **options)
        trans, _ = nerfacc.render_transmittance_from_density(t_starts, t_ends, shell(t_starts, t_ends))
        loss = estimator.update_every_n_steps(trans, options["requires_grad"], loss_scaler=2.0)
        losses += [loss] if options["requires_grad"] else []
    return estimator, proposals, losses, scheduler


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # in steps without gradients
def test_proposals_learn_where_the_weight_is():
    estimator, proposals, losses, scheduler = train()
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])
    assert scheduler.last_epoch == 150  # of every step, with or without gradients
    levels = ([], []), ([*proposals], [32, 24])
    within = [int((shell(*estimator.sampling(*level, 16, 1, 0.1, 4.0, "uniform")) > 0).sum()) for level in levels]
    assert within[0] <= 1
    assert within[1] >= 4
    again = train()
    assert again[2] == losses


def test_the_loss_reaches_proposals_and_nothing_else():
    proposals = nn.ModuleList([Density(), Density()])
    estimator = nerfacc.PropNetEstimator()
    samples = estimator.sampling([*proposals], [32, 24], 16, 8, 0.1, 4.0, "uniform", requires_grad=True)
    sigmas = shell(*samples).requires_grad_()
    trans, _ = nerfacc.render_transmittance_from_density(*samples, sigmas)
    loss = estimator.compute_loss(trans, loss_scaler=10.0)
    loss.backward()
    assert loss.item() > 0
    assert all(bool(p.grad.abs().sum() > 0) for p in proposals.parameters())
    assert sigmas.grad is None
    assert estimator.compute_loss(trans).item() == 0  # what sampling kept is used up
    estimator.sampling([*proposals], [32, 24], 16, 8, 0.1, 4.0, "uniform", requires_grad=True)
    half = estimator.compute_loss(trans.half())
    close(10 * half.detach(), loss.detach(), rtol=1e-2)


def test_a_second_sampling_replaces_the_first():
    estimator, density = nerfacc.PropNetEstimator(), Density()
    kept = []
    for _ in range(2):
        samples = estimator.sampling([density], [8], 4, 2, 0.1, 4.0, requires_grad=True)
        kept.append(len(estimator.prop_cache))
    trans = torch.ones_like(samples[0])
    assert kept == [2, 2]
    estimator.sampling([density], [8], 5, 2, 0.1, 4.0)  # a look without gradients leaves it alone
    estimator.compute_loss(trans).backward()
    assert density.logs.grad is not None


def test_no_rays():
    density = Density()
    estimator = nerfacc.PropNetEstimator(torch.optim.SGD(density.parameters(), lr=1.0))
    t_starts, t_ends = estimator.sampling([density], [8], 4, 0, 0.1, 4.0, stratified=True, requires_grad=True)
    assert t_starts.shape == t_ends.shape == (0, 4)
    before = density.logs.detach().clone()
    assert estimator.update_every_n_steps(torch.zeros(0, 4), requires_grad=True) == 0
    assert torch.equal(density.logs, before)


def test_without_proposals_or_gradients_there_is_no_loss():
    estimator = nerfacc.PropNetEstimator()
    estimator.sampling([], [], 4, 2, 0.1, 4.0, requires_grad=True)
    assert estimator.compute_loss(torch.ones(2, 4)).item() == 0
    assert estimator.compute_loss(torch.ones(2, 4)).shape == ()
    assert estimator.update_every_n_steps(torch.ones(2, 4)) == 0
    assert estimator.state_dict() == {}


def test_when_proposals_learn():
    requires_grad = nerfacc.estimators.prop_net.get_proposal_requires_grad_fn(target=2.0, num_steps=4)
    # Steps since the last one against 0, 0.5, 1, 1.5, 2, 2, ...: 0 > 0 not, 1 > 0.5, 1 > 1 not, 2 > 1.5, 1 > 2 not ...
    assert [requires_grad(step) for step in range(10)] == [
        *(False, True, False, True, False, False, True, False, False, True),
    ]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"prop_samples": [8, 4]}, ValueError, r"prop_samples must be 1 numbers like prop_sigma_fns, got \[8, 4\]"),
        ({"prop_samples": []}, ValueError, r"prop_samples must be 1 numbers .* got \[\]"),
        ({"near_plane": 4.0}, ValueError, "far_plane must be above near_plane, got 4.0"),
        ({"near_plane": 0.0}, ValueError, "near_plane must be above 0 with lindisp, got 0.0; .*uniform"),
        ({"near_plane": torch.ones(2)}, ValueError, r"near_plane must be of shape \[2, 1\].*, got \[2\]"),
        ({"far_plane": torch.ones(3, 1)}, ValueError, r"far_plane must be of shape \[2, 1\]"),
        ({"sampling_type": "log"}, ValueError, "sampling_type must be uniform or lindisp, got log"),
        ({"n_rays": -1}, ValueError, "n_rays must be given .* at least 0, got -1"),
        (
            {"prop_sigma_fns": [lambda a, b: a[..., None]]},
            ValueError,
            r"sigmas must be of shape \[2, 8\] like t_starts",
        ),
        ({"prop_sigma_fns": [lambda a, b: None]}, TypeError, "sigmas must be a tensor, got NoneType"),
    ],
)
def test_refusals_of_sampling(change, error, text):
    arguments = {"prop_sigma_fns": [nothing], "prop_samples": [8], "num_samples": 4, "n_rays": 2}
    arguments |= {"near_plane": 0.1, "far_plane": 4.0} | change
    with pytest.raises(error, match=f"^sampling: {text}"):
        nerfacc.PropNetEstimator().sampling(**arguments)


def test_refusals_of_updates():
    estimator, density = nerfacc.PropNetEstimator(), Density()
    with pytest.raises(RuntimeError, match="update_every_n_steps: the estimator must be given an optimizer, got None"):
        estimator.update_every_n_steps(torch.ones(2, 4), requires_grad=True)
    estimator.optimizer = torch.optim.SGD(density.parameters(), lr=1.0)
    with pytest.raises(RuntimeError, match="update_every_n_steps: the samples must be kept by sampling, got none"):
        estimator.update_every_n_steps(torch.ones(2, 4), requires_grad=True)
    estimator.sampling([density], [8], 4, 2, 0.1, 4.0, requires_grad=True)
    with pytest.raises(ValueError, match=r"compute_loss: trans must be of shape \[2, 4\], got \[2, 5\]"):
        estimator.update_every_n_steps(torch.ones(2, 5), requires_grad=True)
    assert estimator.update_every_n_steps(torch.ones(2, 4), requires_grad=True) >= 0  # nothing was lost by the mistake
