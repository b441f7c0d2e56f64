"""The evaluation's measures on numbers worked by hand, and on solids whose silhouettes are known."""

import math

import pytest
import torch

from mvdream_fast.camera import generate_rays, orbit_cameras
from mvdream_fast.evaluation import measures as ev


def test_top1_is_strict():
    similarity = torch.tensor([[0.9, 0.1, 0.3], [0.3, 0.2, 0.1], [0.5, 0.4, 0.5]])
    assert ev.top1(similarity, torch.tensor([0, 1, 2])).tolist() == [True, False, False]  # the last one is a tie
    assert ev.top1(torch.zeros(3, 4), torch.arange(3)).sum() == 0


def test_angles_wrap():
    a, b = torch.tensor([350.0, 0, 90, -170, 725]), torch.tensor([10.0, 180, 90, 170, 0])
    assert ev.angle_difference(a, b).tolist() == [20, 180, 0, 20, 5]


def test_moments():
    mean, cov = ev.moments(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    assert mean.tolist() == [1, 1]
    assert cov.tolist() == [[2, 0], [0, 0]]
    with pytest.raises(ValueError, match="n from 2"):
        ev.moments(torch.zeros(1, 2))


def test_frechet_distance_of_gaussians():
    """Along axes: the squared distances of means and of standard deviations, summed."""

    def gaussian(mean, std):
        return torch.tensor(mean).double(), torch.tensor(std).double().square().diag()

    a, b = gaussian([0.0, 1.0], [1.0, 3.0]), gaussian([3.0, 5.0], [2.0, 1.0])
    assert ev.frechet_distance(a, b) == pytest.approx(9 + 16 + 1 + 4)
    assert ev.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert ev.frechet_distance(gaussian([0.0, 0.0], [0.0, 2.0]), a) == pytest.approx(1 + 1 + 1)


def test_frechet_distance_of_covariances_that_do_not_commute():
    from scipy.linalg import sqrtm

    torch.manual_seed(0)
    a, b = (ev.moments(torch.randn(20, 4) @ torch.randn(4, 4)) for _ in range(2))
    root = torch.from_numpy(sqrtm((a[1] @ b[1]).numpy()).real)
    expected = (a[0] - b[0]).square().sum() + (a[1] + b[1] - 2 * root).trace()
    assert ev.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert ev.frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-6)


def test_spread():
    x, y = [1.0, 0.0], [0.0, 1.0]
    assert ev.spread(torch.tensor([x, x])) == pytest.approx(0)
    assert ev.spread(torch.tensor([x, y])) == pytest.approx(1)
    assert ev.spread(torch.tensor([x, x, y])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least 2"):
        ev.spread(torch.tensor([x]))


def test_opposite_difference_counts_what_is_seen():
    views = torch.zeros(4, 3, 2, 2)
    views[2, :, 0, 0] = 0.5  # differs from view 0 in one of the three pixels that either shows
    masks = torch.zeros(4, 2, 2, dtype=torch.bool)
    masks[0, 0] = masks[2, 0, 0] = masks[1, 1, 1] = True
    assert ev.opposite_difference(views, masks) == pytest.approx(math.sqrt(0.25 / 3))
    assert ev.opposite_difference(views, masks & False) == 0
    with pytest.raises(ValueError, match="even"):
        ev.opposite_difference(views[:3], masks[:3])


def test_janus_needs_two_opposite_fronts():
    azimuth = torch.arange(8) * 45.0

    def accused(predicted, confidence=None):
        sure = torch.ones(8) if confidence is None else torch.tensor(confidence)
        return ev.is_janus(azimuth, ev.reads_as_front(torch.tensor(predicted), sure))

    assert not accused([0.0, 45, 90, 135, 180, 225, 270, 315])  # an honest turn: fronts at 0, 45 and 315
    assert accused([0.0, 45, 90, 135, 0, 225, 270, 315])  # a second face on the back
    assert not accused([0.0, 45, 90, 135, 46, 225, 270, 315])
    assert not accused([0.0, 45, 90, 135, 0, 225, 270, 315], [1.0, 1, 1, 1, 0.2, 1, 1, 1])  # a guess accuses nobody
    assert not accused([180.0] * 8)
    assert accused([0.0] * 8)


def test_silhouettes_against_a_flat_background():
    images = torch.full((2, 3, 8, 8), 0.5)
    images[0, 0, 2:4, 3:6] = 0.8
    images[1] += 0.05 * torch.sin(torch.arange(64.0).view(8, 8))  # noise of the background
    masks = ev.silhouettes(images)
    assert masks[0].sum() == 6
    assert masks[0, 2:4, 3:6].all()
    assert not masks[1].any()


CAMERAS = orbit_cameras(4, 0.0, 0.0, 360.0, 3.0, 40.0)


def ball(cameras, radius=0.6, size=48):
    """Silhouettes of a ball at the origin, bool [V, size, size]."""
    rays = generate_rays(cameras, size, size)
    nearest = torch.linalg.cross(rays.rays_o, rays.rays_d).norm(dim=-1)
    return (nearest < radius).view(len(cameras), size, size)


def test_views_of_a_solid_support_each_other():
    assert ev.hull_support(ball(CAMERAS), CAMERAS) > 0.99
    assert ev.hull_support(ball(orbit_cameras(4, 25.0)), orbit_cameras(4, 25.0)) > 0.99


def test_silhouettes_that_disagree_are_found():
    masks = ball(CAMERAS)
    half = masks.clone()
    half[2, 24:] = False  # one view sees the upper half alone: of the others only that half is left
    left = (masks[0, :25].sum() / masks[0].sum()).item()  # a row more: points may lie a pixel off
    assert ev.hull_support(half, CAMERAS) == pytest.approx((3 * left + 0.5) / 3.5, abs=0.03)
    gone = masks.clone()
    gone[1] = False
    assert ev.hull_support(gone, CAMERAS) == 0
    assert ev.hull_support(masks & False, CAMERAS) == 0
    with pytest.raises(ValueError, match="one a view"):
        ev.hull_support(masks[:3], CAMERAS)


def test_color_spread():
    images = torch.zeros(3, 3, 4, 4)
    images[1, 0, :2] = 1.0
    images[2, :, 3, 3] = 1.0  # not in the silhouette
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[:2, :2] = True
    assert ev.color_spread(images, masks) == pytest.approx(0.5)  # black and red: each half a red away from the mean
    assert ev.color_spread(images[:1], masks[:1]) == 1


def test_neighbour_overlap_goes_round():
    masks = torch.tensor([[[True, True]], [[True, False]], [[False, False]]])
    assert ev.neighbour_overlap(masks) == pytest.approx((0.5 + 0 + 0) / 3)
    assert ev.neighbour_overlap(masks[:1].repeat(3, 1, 1)) == 1


def test_overlap_is_view_by_view():
    a = torch.tensor([[[True, True, False]], [[True, False, False]], [[False, False, False]]])
    b = torch.tensor([[[False, True, True]], [[True, False, False]], [[False, False, False]]])
    assert ev.overlap(a, b) == pytest.approx((1 / 3 + 1 + 0) / 3)


def test_fog_is_what_is_covered_by_half():
    opacity = torch.tensor([[[0.0, 0.1, 0.2, 0.89], [0.95, 1.0, 1.0, 0.05]]])
    assert ev.fog(opacity) == pytest.approx(2 / 5)  # of 0.2, 0.89, 0.95, 1 and 1
    assert ev.fog(torch.ones(2, 3, 3)) == 0
    assert ev.fog(torch.full((2, 3, 3), 0.05)) == 1


def test_mean_gradient_by_hand():
    """Brightness [[0, 1, 1], [0, 1, 0.25], ...]: gradients (1, 0), (0, 0); the last row and column only end them."""
    image = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.25]]).expand(3, 2, 3)
    assert ev.mean_gradient(image) == pytest.approx((1 + 0) / 2)
    image = torch.tensor([[0.0, 0.3, 0.3], [0.4, 0.3, 0.3]]).expand(2, 3, 2, 3)
    assert ev.mean_gradient(image) == pytest.approx((0.5 + 0) / 2)  # hypot(0.3, 0.4)
    red = torch.zeros(3, 2, 2)
    red[0, :, 1] = 1
    assert ev.mean_gradient(red) == pytest.approx(1 / 3)


def test_blur_lowers_the_gradient_and_contrast_raises_it():
    image = (torch.arange(32) % 8 < 4).float().expand(3, 32, 32)
    blurred = torch.nn.functional.avg_pool2d(image, 3, 1, 1, count_include_pad=False)
    assert ev.mean_gradient(blurred[:, 2:-2, 2:-2]) <= ev.mean_gradient(image[:, 2:-2, 2:-2])
    assert ev.mean_gradient(image / 2) == pytest.approx(ev.mean_gradient(image) / 2)


def test_psnr_where_the_mask_is():
    a, b = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    b[0, :, 0, 0], b[0, :, 1, 1] = 0.1, 1.0
    mask = torch.tensor([[[True, True], [False, False]]])
    assert ev.psnr(a, b, mask) == pytest.approx(-10 * math.log10(0.01 / 2))
    assert ev.psnr(a, a, mask) == 99
    assert ev.psnr(a, b, mask & False) == 0


def test_kernel_distance_by_hand():
    """One feature, kernel (xy + 1)^3. Of 0 and 1 among themselves: 1; of 1 and 2: 27; across: (1 + 1 + 8 + 27) / 4."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert ev.kernel_distance(a, b) == pytest.approx(1 + 27 - 2 * 37 / 4)
    assert ev.kernel_distance(b, a) == pytest.approx(ev.kernel_distance(a, b))
    wide = torch.cat([a, a], dim=1), torch.cat([b, b], dim=1)  # the same mean of products
    assert ev.kernel_distance(*wide) == pytest.approx(ev.kernel_distance(a, b))
    with pytest.raises(ValueError, match="at least 2 of both, got 1 and 2"):
        ev.kernel_distance(a[:1], b)


def test_kernel_distance_has_no_bias_where_frechet_has():
    """Of samples of one distribution, five at a time: the first is 0 in the mean, the second far from it."""
    torch.manual_seed(0)
    pairs = [torch.randn(2, 5, 4).unbind(0) for _ in range(2000)]
    kernel = torch.tensor([ev.kernel_distance(a, b) for a, b in pairs])
    assert kernel.mean().abs() < 3 * kernel.std() / math.sqrt(2000)
    assert all(ev.frechet_distance(ev.moments(a), ev.moments(b)) > 0.1 for a, b in pairs[:20])


def test_agreement_is_seen_from_the_origin():
    a, b = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 3.0], [1.0, 9.0]])
    origin = torch.tensor([1.0, 1.0])
    assert ev.agreement(a, b, origin) == pytest.approx((0 + 1) / 2)
    assert ev.agreement(a, a, origin) == pytest.approx(1)
