"""Search in, and sampling from, sorted values along rays."""

import pytest
import torch
from reference.nerfacc_data import RAYS, close, draw

from mvdream_fast import nerfacc_compat as nerfacc
from mvdream_fast.nerfacc_compat.pdf import _sample_from_weighted


def test_searchsorted_by_hand():
    sequence = nerfacc.RayIntervals(torch.tensor([0.0, 1, 0, 1, 2]), packed_info=torch.tensor([[0, 2], [2, 3]]))
    values = nerfacc.RayIntervals(torch.tensor([0.5, 1.5, 2.5]), packed_info=torch.tensor([[0, 1], [1, 2]]))
    left, right = nerfacc.searchsorted(sequence, values)
    assert (left.tolist(), right.tolist()) == ([0, 3, 3], [1, 4, 4])


def test_searchsorted_batched_is_torch_searchsorted_clamped():
    keys, values = draw(5, 9).sort(-1).values, draw(5, 20, seed=1) * 1.4 - 0.2
    left, right = nerfacc.searchsorted(nerfacc.RaySamples(keys), nerfacc.RaySamples(values))
    wanted = torch.searchsorted(keys, values, right=True)
    assert torch.equal(right, wanted.clamp(max=8))
    # Past the last key both are it, as nerfacc does: its bisection leaves the last key out.
    assert torch.equal(left, (right - 1).clamp(min=0))


def test_importance_sampling_by_hand():
    intervals = nerfacc.RayIntervals(torch.tensor([0.0, 1, 0, 1, 2]), packed_info=torch.tensor([[0, 2], [2, 3]]))
    cdfs = torch.tensor([0.0, 0.5, 0.0, 0.5, 1.0])
    new, samples = nerfacc.importance_sampling(intervals, cdfs, 2)
    close(new.vals, torch.tensor([[0, 0.5, 1], [0, 1, 2]]))
    close(samples.vals, torch.tensor([[0.25, 0.75], [0.5, 1.5]]))
    new, samples = nerfacc.importance_sampling(intervals, cdfs, torch.tensor([0, 3]))
    close(samples.vals, torch.tensor([1 / 3, 1, 5 / 3]))
    close(new.vals, torch.tensor([0, 2 / 3, 4 / 3, 2]))
    assert new.packed_info.tolist() == [[0, 0], [0, 4]]
    assert new.is_left.tolist() == [True, True, True, False]
    assert new.is_right.tolist() == [False, True, True, True]
    assert samples.ray_indices.tolist() == [1, 1, 1]
    new, samples = nerfacc.importance_sampling(intervals, cdfs, 1)
    close(new.vals, torch.tensor([[0.0, 1], [0, 2]]))
    close(samples.vals, torch.tensor([[0.5], [1.0]]))


def test_importance_sampling_follows_the_density():
    edges = torch.linspace(0, 1, 11).expand(64, 11)
    cdfs = edges**3
    for stratified in (False, True):
        torch.manual_seed(0)
        new, samples = nerfacc.importance_sampling(nerfacc.RayIntervals(edges), cdfs, 50, stratified)
        assert (new.vals.shape, samples.vals.shape) == ((64, 51), (64, 50))
        u = torch.arange(50) / 50 + (0.01 if not stratified else 0)
        index = (samples.vals * 10).floor().clamp(max=9).long()
        low, high = cdfs.gather(1, index), cdfs.gather(1, index + 1)
        back = low + (samples.vals * 10 - index) * (high - low)
        shift = back - u
        assert bool(((shift >= -1e-5) & (shift <= (0.02 if stratified else 0) + 1e-5)).all())
        assert bool((new.vals.diff(dim=-1) >= 0).all())
        if stratified:
            close(shift, shift[:, :1].expand(64, 50), atol=1e-5)
            assert float(shift[:, 0].std()) > 0.004


def test_packed_and_batched_importance_sampling_agree():
    edges, cdfs = draw(4, 8).sort(-1).values, draw(4, 8, seed=1).sort(-1).values
    new, samples = nerfacc.importance_sampling(nerfacc.RayIntervals(edges), cdfs, 6)
    packed_info = torch.tensor([[0, 8], [8, 8], [16, 8], [24, 8]])
    packed = nerfacc.RayIntervals(edges.flatten(), packed_info=packed_info)
    new_p, samples_p = nerfacc.importance_sampling(packed, cdfs.flatten(), torch.full((4,), 6))
    close(samples_p.vals.view(4, 6), samples.vals)
    close(new_p.vals.view(4, 7), new.vals)


def test_packed_chunks_without_their_rays_are_refused():
    unsorted = nerfacc.RaySamples(torch.rand(7), ray_indices=RAYS.flip(0))
    with pytest.raises(ValueError, match="searchsorted: sorted_sequence: ray_indices must be sorted"):
        nerfacc.searchsorted(unsorted, unsorted)
    loose = nerfacc.RaySamples(torch.zeros(3))
    with pytest.raises(ValueError, match="sorted_sequence: packed vals must be given with packed_info or ray_indices"):
        nerfacc.searchsorted(loose, loose)


def samples(vals, **layout):
    return nerfacc.RaySamples(torch.as_tensor(vals), **layout)


KEY = samples([[0.0]])


@pytest.mark.parametrize(
    ("sequence", "values", "error", "text"),
    [
        (samples([[0.0, 1.0]] * 3), samples([[0.5]] * 2), ValueError, "values must be data of 3 rays like the rest"),
        (samples([[0.0, 1.0]]), samples([[0.5]] * 2), ValueError, "sorted_sequence must be data of 2 rays"),
        (KEY, samples([1.0], ray_indices=torch.tensor([1])), ValueError, r"values: ray_indices must be in \[0, 1\)"),
        (KEY, samples([1.0], packed_info=torch.ones(1, 2)), TypeError, "values: packed_info must be of whole numbers"),
        (KEY, samples([1.0], packed_info=torch.tensor([[1, 1]])), ValueError, "values: packed_info must be ray after"),
        (KEY, samples([1.0], ray_indices=torch.ones(1)), TypeError, "values: ray_indices must be of whole numbers"),
        (samples(0.0), samples([[1.0]]), ValueError, "sorted_sequence: vals must be of at least one axis"),
        (samples([[1j]]), samples([[1.0]]), TypeError, "sorted_sequence: vals must be of real numbers"),
    ],
)
def test_refusals_of_searchsorted(sequence, values, error, text):
    with pytest.raises(error, match=f"^searchsorted: {text}"):
        nerfacc.searchsorted(sequence, values)


def test_the_last_rays_may_have_nothing():
    """Indices of rays alone do not tell how many rays there are: the other side does."""
    keys = samples([0.0, 1, 0, 1, 2], ray_indices=torch.tensor([0, 0, 1, 1, 1]))
    values = samples([[0.5], [0.5], [0.5]])  # a third ray, without a sequence
    left, right = nerfacc.searchsorted(keys, values)
    assert (left.tolist(), right.tolist()) == ([[0], [0], [0]], [[1], [1], [0]])
    values = samples([0.5], ray_indices=torch.tensor([0]))
    left, right = nerfacc.searchsorted(keys, values)
    assert (left.tolist(), right.tolist()) == ([0], [1])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 4)])
def test_nothing_to_search_in_or_for(shape):
    vals = torch.zeros(shape)
    for n in (0, 2):
        left, right = nerfacc.searchsorted(samples(vals), samples(torch.zeros(*shape[:-1], n)))
        assert left.shape == right.shape == (*shape[:-1], n)
    new, drawn = nerfacc.importance_sampling(nerfacc.RayIntervals(vals), vals, 3, stratified=True)
    assert (new.vals.shape, drawn.vals.shape) == ((*shape[:-1], 4), (*shape[:-1], 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sampling_in_half_precision(dtype):
    edges, cdfs = (draw(3, 9, seed=i).sort(-1).values.to(dtype) for i in (0, 1))
    new, drawn = nerfacc.importance_sampling(nerfacc.RayIntervals(edges), cdfs, 6)
    wanted = nerfacc.importance_sampling(nerfacc.RayIntervals(edges.double()), cdfs.double(), 6)
    for got, exact in zip((new, drawn), wanted, strict=True):
        assert got.vals.dtype == dtype
        close(got.vals.double(), exact.vals, rtol=0, atol=0.3 * torch.finfo(dtype).eps)  # rounded once
    left, right = nerfacc.searchsorted(samples(edges), samples(edges.double() + 1e-9))  # each just above its own key
    assert torch.equal(left[:, :-1], torch.arange(8).expand(3, 8))
    assert torch.equal(right, (left + 1).clamp(max=8))


def test_axes_before_the_last_and_strides():
    edges, cdfs = draw(2, 3, 9).sort(-1).values, draw(2, 3, 9, seed=1).sort(-1).values
    flat = nerfacc.importance_sampling(nerfacc.RayIntervals(edges.view(6, 9)), cdfs.view(6, 9), 4)
    turned = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (edges, cdfs)]
    assert not turned[0].is_contiguous()
    new, drawn = nerfacc.importance_sampling(nerfacc.RayIntervals(turned[0]), turned[1], 4)
    assert torch.equal(new.vals, flat[0].vals.view(2, 3, 5))
    assert torch.equal(drawn.vals, flat[1].vals.view(2, 3, 4))
    ids = [nerfacc.searchsorted(samples(x), samples(draw(2, 3, 5, seed=2))) for x in (edges, turned[0])]
    assert all(torch.equal(a, b) for a, b in zip(*ids, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"cdfs": torch.zeros(2, 5)}, ValueError, r"cdfs must be of shape \[2, 4\] like intervals.vals, got \[2, 5\]"),
        ({"cdfs": torch.zeros(4)}, ValueError, r"cdfs must be of shape \[2, 4\] like intervals.vals, got \[4\]"),
        ({"n_intervals_per_ray": 0}, ValueError, "n_intervals_per_ray must be a number above 0, or one a ray, got 0"),
        ({"n_intervals_per_ray": 2.5}, ValueError, "n_intervals_per_ray must be a number above 0.*, got 2.5"),
        ({"n_intervals_per_ray": torch.tensor([1])}, ValueError, r"n_intervals_per_ray must be of shape \[2\]"),
        ({"n_intervals_per_ray": torch.tensor(3)}, ValueError, r"n_intervals_per_ray must be of shape \[2\], got \[\]"),
        ({"n_intervals_per_ray": torch.tensor([1, -1])}, ValueError, "n_intervals_per_ray must be at least 0"),
        ({"n_intervals_per_ray": torch.ones(2)}, TypeError, "n_intervals_per_ray must be of whole numbers"),
        ({"intervals": nerfacc.RayIntervals(torch.zeros(4))}, ValueError, "intervals: packed vals must be given with"),
    ],
)
def test_refusals_of_importance_sampling(change, error, text):
    edges = nerfacc.RayIntervals(torch.zeros(2, 4))
    arguments = {"intervals": edges, "cdfs": torch.zeros(2, 4), "n_intervals_per_ray": 3}
    with pytest.raises(error, match=f"^importance_sampling: {text}"):
        nerfacc.importance_sampling(**arguments | change)


def test_sampling_by_weights_by_hand():
    # Half of the weight in each bin: samples at 1/8, 3/8, ... of it all.
    edges, centers = _sample_from_weighted(torch.tensor([[0.0, 1, 3]]), torch.tensor([[2.0, 2]]), 4)
    close(centers, torch.tensor([[0.25, 0.75, 1.5, 2.5]]))
    close(edges, torch.tensor([[0, 0.5, 1.125, 2, 3]]))
    edges, _ = _sample_from_weighted(torch.tensor([[0.0, 1, 3]]), torch.tensor([[2.0, 2]]), 4, vmin=0.1, vmax=2.9)
    close(edges[0, [0, -1]], torch.tensor([0.1, 2.9]))
