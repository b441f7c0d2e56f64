"""Silhouettes of known views as a target for opacity: which they are, and what they pull at."""

import pytest
import torch

from mvdream_fast.camera import orbit_cameras
from mvdream_fast.core.rng import Stream
from mvdream_fast.guidance.base import Fitting, Outlined, Stateless, n_fitted, opacity_loss
from mvdream_fast.guidance.reconstruction import Anchored, Reconstruction, shown, squared_error

GREY = 0.5


def image(*boxes: tuple[slice, slice, float], noise: float = 0.0) -> torch.Tensor:
    """Boxes (rows, columns, level) before grey, [1, 3, 32, 32]."""
    out = torch.full((1, 3, 32, 32), GREY)
    for rows, columns, level in boxes:
        out[..., rows, columns] = level
    return out + noise * (2 * torch.rand(out.shape, generator=torch.Generator().manual_seed(0)) - 1)


def test_a_box_is_shown_and_what_is_around_it_is_not():
    mask = shown(image((slice(8, 24), slice(10, 20), 0.9)))
    assert mask.shape == (1, 1, 32, 32)
    assert (mask[..., 9:23, 11:19] == 1).all()
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[6:26, 8:22] = False
    assert (mask[0, 0][outside] == 0).all()


def test_an_edge_is_where_half_of_a_box_ends():
    # The share of the box in smoothed pixels beside its edge: 3/4 within, 1/4 without.
    mask = shown(image((slice(8, 24), slice(10, 20), 0.9)))[0, 0, 16]
    assert mask[10] > 0.8
    assert 0.1 < mask[9] < 0.4


def test_noise_of_the_background_is_not_shown():
    assert shown(image((slice(8, 24), slice(10, 20), 0.9), noise=0.04))[..., :6, :].max() < 0.05


def test_grey_that_an_outline_closes_in_is_shown():
    boxes = (slice(6, 26), slice(6, 26), 0.2), (slice(10, 22), slice(10, 22), GREY)
    assert (shown(image(*boxes))[..., 12:20, 12:20] == 1).all()


def test_grey_that_is_open_to_the_border_is_background():
    boxes = (slice(6, 26), slice(6, 26), 0.2), (slice(10, 32), slice(10, 22), GREY)
    assert (shown(image(*boxes))[..., 13:30, 13:19] == 0).all()


def test_nothing_is_shown_of_an_empty_view_and_views_are_told_apart():
    mask = shown(torch.cat([image(), image((slice(8, 24), slice(8, 24), 0.1))]))
    assert (mask[0] == 0).all()
    assert mask[1].mean() > 0.2


class Free(Stateless):
    """Nothing but a known score."""

    def views(self, step, stream):
        return orbit_cameras(2, 15.0)

    def score(self, rgb, views, step, stream, timing=None):
        return rgb.sum() * 0 + 0.25, 7


@pytest.mark.parametrize(("step", "weight"), [(0, 2.0), (2, 4.0), (9, 6.0)])
def test_known_views_pull_at_opacity_by_a_ramp_and_leave_the_others_alone(step, weight):
    images = image((slice(8, 24), slice(8, 24), 0.9)).expand(2, 3, 32, 32)[None]
    guidance = Anchored(Free(), images, [orbit_cameras(2, 15.0)], (0.0, 1.0, 1.0, 0.0), (0.0, 2.0, 6.0, 4.0))
    guidance.views(step, Stream(0, step, "cameras"))
    opacity = torch.full((4, 32, 32), 0.5, requires_grad=True)
    loss = opacity_loss(guidance, opacity, step)
    expected = weight * (shown(images[0]) - 0.5).square().sum() / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert (opacity.grad[:2] == 0).all()
    assert (opacity.grad[2:, 10:20, 10:20] < 0).all()
    assert (opacity.grad[2:, :5] > 0).all()


def test_without_a_weight_and_of_a_guidance_of_colours_nothing_is_wanted():
    images = image((slice(8, 24), slice(8, 24), 0.9))[None]
    opacity = torch.rand(3, 32, 32)
    plain = Anchored(Free(), images, [orbit_cameras(1, 15.0)], (0.0, 1.0, 1.0, 0.0))
    assert opacity_loss(plain, opacity, 0) == 0
    assert not isinstance(Free(), Outlined)
    assert opacity_loss(Free(), opacity, 0) == 0
    assert opacity_loss(Reconstruction(images[0], orbit_cameras(1, 15.0)), opacity[:1], 0) == 0


def test_a_reconstruction_has_silhouettes_too():
    images = image((slice(8, 24), slice(8, 24), 0.9))
    guidance = Reconstruction(images, orbit_cameras(1, 15.0), (0.0, 3.0, 3.0, 0.0))
    loss = opacity_loss(guidance, torch.zeros(1, 32, 32), 5)
    assert loss.item() == pytest.approx(3 * shown(images).square().sum().item())


@pytest.mark.parametrize(("size", "of"), [(16, 32), (64, 32)])
def test_renders_and_images_are_compared_at_the_smaller_size(size, of):
    rgb, images = torch.rand(2, 3, size, size), torch.rand(2, 3, of, of)
    small = min(size, of)
    a, b = (torch.nn.functional.avg_pool2d(x, x.shape[-1] // small) for x in (rgb, images))
    assert squared_error(rgb, images).item() == pytest.approx((a - b).square().sum().item() / 2, rel=1e-5)


def test_known_views_are_told_from_those_that_are_distilled_from():
    """They are a step's last ones, which stay unlit; of a guidance that fits all or nothing, all or none."""
    known, cameras = torch.zeros(2, 4, 3, 8, 8), [orbit_cameras(4)] * 2
    free = Stateless()
    assert not isinstance(free, Fitting)
    assert n_fitted(free, 8, 0) == 0
    assert n_fitted(Anchored(free, known, cameras, (0.0, 1.0, 1.0, 0.0)), 8, 0) == 4
    whole = Reconstruction(known[0], cameras[0])
    assert n_fitted(whole, 4, 0) == 4
    assert n_fitted(Anchored(whole, known, cameras, (0.0, 1.0, 1.0, 0.0)), 8, 0) == 8
