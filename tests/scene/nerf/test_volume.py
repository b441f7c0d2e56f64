"""The volume module: presets, initialisation, and normals by two independent ways."""

import copy
import math
import pickle

import pytest
import torch

from mvdream_fast import ops
from mvdream_fast.core.rng import Stream
from mvdream_fast.ops.render import fusable
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig

SMALL = VolumeConfig(n_levels=4, log2_size=10, base_resolution=4, top_resolution=16, width=16)


def points(n, seed=0):
    return Stream(seed, 0, "points").uniform(n, 3, low=-1, high=1)


def test_papers_preset():
    volume = Volume(VolumeConfig.paper())
    assert VolumeConfig.paper().growth == pytest.approx(1.447269237440378, abs=1e-15)
    assert volume.table.numel() == 12_599_920
    assert [tuple(w.shape) for w in volume.density_weights] == [(64, 32), (1, 64)]
    assert [tuple(w.shape) for w in volume.feature_weights] == [(64, 32), (3, 64)]
    spec = volume.spec
    assert (spec.radius, spec.bias_scale, spec.bias_std, spec.density_activation) == (1.0, 10.0, 0.5, "softplus")
    assert spec.color_sigmoid


def test_mini_preset():
    grid = VolumeConfig.mini().spec.grid
    assert (grid.n_levels, grid.n_features, grid.levels[0].resolution, grid.levels[-1].resolution) == (12, 2, 16, 256)
    assert max(level.size for level in grid.levels) == 2**15


def test_initialisation():
    volume = Volume(VolumeConfig.mini())
    assert volume.table.abs().max() <= 1e-4
    assert volume.table.std().item() == pytest.approx(1e-4 / math.sqrt(3), rel=0.01)  # of a uniform distribution
    for weight in (*volume.density_weights, *volume.feature_weights):
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.9 * bound < weight.abs().max().item() <= bound


def test_two_volumes_start_equal_and_a_stream_changes_them():
    first, second, other = Volume(SMALL), Volume(SMALL), Volume(SMALL, Stream(1, 0, "volume"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.table, other.table)
    second.load_state_dict(other.state_dict())
    assert torch.equal(second.density(points(5)), other.density(points(5)))


def test_fresh_volume_is_a_grey_blob():
    # Before training the density is the bias, softplus(10 (1 - |x| / 0.5)), and colours are near one half.
    x = torch.tensor([[0.0, 0, 0], [0.25, 0, 0], [0, 0.5, 0], [0, 0, 1.0]])
    sigmas, rgb = Volume(VolumeConfig.paper())(x)
    raw = 10 * (1 - torch.tensor([0.0, 0.25, 0.5, 1.0]) / 0.5)
    torch.testing.assert_close(sigmas, torch.nn.functional.softplus(raw), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(rgb, torch.full((4, 3), 0.5), rtol=0, atol=1e-3)


def test_forward_is_the_op_on_its_parameters():
    volume = Volume(SMALL)
    x = points(100)
    sigmas, rgb = volume(x)
    expected = ops.field_ref(x, volume.table, [*volume.density_weights], [*volume.feature_weights], volume.spec)
    torch.testing.assert_close((sigmas, rgb), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(volume.density(x), sigmas)
    (sigmas.sum() + rgb.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in volume.parameters())


def test_only_a_plain_volume_says_that_a_kernel_can_evaluate_it():
    class Renamed(Volume):
        pass

    class Doubled(Volume):
        def forward(self, positions):
            sigmas, rgb = super().forward(positions)
            return 2 * sigmas, rgb

    x = points(20)
    for plain in (Volume(SMALL), Renamed(SMALL)):
        assert fusable(plain) is not None
        assert all(torch.equal(a, b) for a, b in zip(fusable(plain)(x), plain(x), strict=True))
    hooked, patched, wide = Volume(SMALL), Volume(SMALL), Volume(SMALL).double()
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda positions: Volume.forward(patched, positions)
    for other in (Doubled(SMALL), hooked, patched, wide, lambda positions: positions):
        assert fusable(other) is None


@pytest.mark.parametrize("mode", ["analytic", "finite_difference"])
def test_normals_of_a_sphere_point_outwards(mode):
    volume = Volume(SMALL)
    x = points(200) * 0.8
    normals = volume.normals(x, mode)
    outwards = torch.nn.functional.normalize(x, dim=-1)
    assert (normals * outwards).sum(-1).min() > 0.999
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(200))


def test_normals_by_both_ways_agree():
    volume = Volume(SMALL).double()
    with torch.no_grad():
        volume.table.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    x = points(200).double()
    analytic, difference = volume.normals(x), volume.normals(x, "finite_difference", eps=1e-6)
    # A point within eps of a cell's face has two slopes; none of these is.
    assert (analytic * difference).sum(-1).min() > 1 - 1e-6


def test_normals_train_the_field():
    volume = Volume(SMALL)
    x = points(30).requires_grad_()
    volume.normals(x).square().mul(torch.arange(3.0)).sum().backward()
    assert volume.table.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        assert not volume.normals(x).requires_grad


def test_flat_density_has_zero_normals():
    volume = Volume(VolumeConfig(n_levels=4, log2_size=10, top_resolution=64, bias_scale=0.0))
    with torch.no_grad():
        volume.density_weights[0].zero_()
    for mode in ("analytic", "finite_difference"):
        assert (volume.normals(points(10), mode) == 0).all()


def test_no_points():
    volume = Volume(SMALL)
    sigmas, rgb = volume(torch.zeros(0, 3))
    assert sigmas.shape == (0,)
    assert rgb.shape == (0, 3)
    assert volume.normals(torch.zeros(0, 3)).shape == (0, 3)


def test_unknown_normal_mode_is_refused():
    with pytest.raises(ValueError, match="normals: mode must be 'analytic' or 'finite_difference', got 'sobel'"):
        Volume(SMALL).normals(points(1), "sobel")


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda volume: pickle.loads(pickle.dumps(volume))])
def test_a_volume_that_has_run_can_be_copied(twin_of):
    volume, x = Volume(SMALL), points(20)
    wanted = volume(x)
    twin = twin_of(volume)
    assert all(torch.equal(a, b) for a, b in zip(twin(x), wanted, strict=True))
    assert twin.spec == volume.spec
    with torch.no_grad():
        twin.table.zero_()
    assert torch.equal(volume(x)[1], wanted[1])
