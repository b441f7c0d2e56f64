"""Lens models against OpenCV's formulas in Python numbers, there and back."""

import math

import pytest
import torch
from reference.nerfacc_data import close, draw

from mvdream_fast import nerfacc_compat as nerfacc
from mvdream_fast.nerfacc_compat import cameras

NAMES = ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6", "s1", "s2", "s3", "s4")
LENS = (-0.2, 0.05, 0.003, -0.002, -0.01, 0.02, -0.01, 0.004, 0.005, -0.002, 0.003, 0.001)


def seen_at(point, lens):
    """OpenCV's camera model: radial, tangential and thin-prism distortion of one point."""
    k1, k2, p1, p2, k3, k4, k5, k6, s1, s2, s3, s4 = [*lens, *[0.0] * (12 - len(lens))]
    x, y = point
    r2 = x**2 + y**2
    radial = (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3) / (1 + k4 * r2 + k5 * r2**2 + k6 * r2**3)
    return (
        x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2) + s1 * r2 + s2 * r2**2,
        y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y + s3 * r2 + s4 * r2**2,
    )


def seen_at_by_a_fisheye(point, lens):
    """OpenCV's fisheye model: the angle from the axis becomes a polynomial of it."""
    r = math.hypot(*point)
    theta = math.atan(r)
    theta_d = theta * (1 + sum(k * theta ** (2 * i + 2) for i, k in enumerate(lens)))
    return tuple(x * (theta_d / r if r else 1.0) for x in point)


def grid_of_points(reach):
    axis = torch.linspace(-reach, reach, 9, dtype=torch.float64)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)  # [9, 9, 2], its middle the centre


def through(model, points, lens):
    rows = [model(point, lens) for point in points.view(-1, 2).tolist()]
    return torch.tensor(rows, dtype=torch.float64).view(points.shape)


@pytest.mark.parametrize("n", [0, 1, 2, 4, 5, 8, 12])
def test_a_lens_is_undone(n):
    points, lens = grid_of_points(0.6), torch.tensor(LENS[:n], dtype=torch.float64)
    distorted = through(seen_at, points, LENS[:n])
    close(nerfacc.opencv_lens_undistortion(distorted, lens, iters=20), points, rtol=0, atol=1e-12)
    close(cameras._opencv_lens_distortion(points, lens), distorted, rtol=0, atol=1e-14)
    out = nerfacc.opencv_lens_undistortion(distorted.float(), lens.float())
    assert out.dtype == torch.float32
    close(out.double(), points, rtol=0, atol=1e-6)


@pytest.mark.parametrize("i", range(12))
def test_each_coefficient_alone(i):
    lens = [0.0] * 12
    lens[i] = 0.05 if NAMES[i][0] == "k" else 0.01
    points = grid_of_points(0.5)
    distorted = through(seen_at, points, lens)
    assert float((distorted - points).abs().max()) > 1e-4
    close(nerfacc.opencv_lens_undistortion(distorted, torch.tensor(lens).double()), points, rtol=0, atol=1e-8)


def test_a_lens_by_hand():
    # r^2 = 0.25: 0.3 (1 + 0.1 / 4) and 0.4 (1 + 0.1 / 4); with p1 = 0.01 twice 0.01 * 0.12, and 0.01 (0.25 + 0.32).
    point = torch.tensor([0.3, 0.4], dtype=torch.float64)
    seen = cameras._opencv_lens_distortion(point, torch.tensor([0.1]).double())
    close(seen, torch.tensor([0.3075, 0.41]).double(), rtol=0, atol=1e-7)
    lens = torch.tensor([0, 0, 0.01, 0], dtype=torch.float64)
    close(cameras._opencv_lens_distortion(point, lens), torch.tensor([0.3024, 0.4057]).double(), rtol=0, atol=1e-7)
    back = nerfacc.opencv_lens_undistortion(torch.tensor([0.3075, 0.41]), torch.tensor([0.1]))
    close(back, torch.tensor([0.3, 0.4]), rtol=0, atol=1e-6)
    # A fisheye without coefficients shows 45 degrees at pi / 4.
    back = nerfacc.opencv_lens_undistortion_fisheye(torch.tensor([[math.pi / 4, 0]]), torch.zeros(4))
    close(back, torch.tensor([[1.0, 0]]), rtol=0, atol=1e-6)


def test_newtons_slopes_are_the_models():
    points, lens = draw(7, 2) - 0.5, torch.tensor(LENS, dtype=torch.float64)
    rows = torch.stack(cameras._distorted(points.unbind(-1), lens)[1], -1).view(7, 2, 2)
    for point, slopes in zip(points, rows, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda p: cameras._opencv_lens_distortion(p, lens), point)
        close(slopes, jacobian, rtol=0, atol=1e-14)
    angles, k = draw(7), torch.tensor([0.05, -0.02, 0.01, -0.003], dtype=torch.float64).unbind()
    wanted = torch.autograd.functional.jacobian(lambda t: cameras._fisheye_angle(t, k)[0], angles).diagonal()
    close(cameras._fisheye_angle(angles, k)[1], wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("reach", [0.6, 5.0])
def test_a_fisheye_is_undone(reach):
    points, lens = grid_of_points(reach), (0.05, -0.02, 0.01, -0.003)
    params = torch.tensor(lens, dtype=torch.float64)
    distorted = through(seen_at_by_a_fisheye, points, lens)
    out = nerfacc.opencv_lens_undistortion_fisheye(distorted, params, iters=30)
    close(out, points, rtol=1e-6, atol=1e-9)
    assert out[4, 4].tolist() == [0, 0]
    close(cameras._opencv_lens_distortion_fisheye(points, params), distorted, rtol=0, atol=1e-14)
    single = nerfacc.opencv_lens_undistortion_fisheye(distorted.float(), params.float())
    assert single.dtype == torch.float32
    close(single.double(), points, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("k1", [0.2, -0.03])
def test_a_fisheye_up_to_180_degrees(k1):
    """Distances above 90 degrees belong to angles below, where the lens shows things farther out than they are."""
    angles = torch.linspace(0, 1.55, 32, dtype=torch.float64)
    distorted = torch.stack([angles * (1 + k1 * angles**2), 0 * angles], -1)
    lens = torch.tensor([k1, 0, 0, 0], dtype=torch.float64)
    out = nerfacc.opencv_lens_undistortion_fisheye(distorted, lens, 1e-12, 50)
    close(torch.atan(out[:, 0]), angles, rtol=0, atol=1e-9)


def test_what_no_fisheye_sees_is_nan():
    lens, beyond = torch.zeros(4), torch.tensor([[0.0, 1.58], [0.0, -3.0], [math.nan, 0.1], [0.1, 0.1]])
    out = nerfacc.opencv_lens_undistortion_fisheye(beyond, lens)
    assert out.isnan().all(-1).tolist() == [True, True, True, False]
    # One step is not enough where eps asks for more.
    strong = torch.tensor([0.3, 0, 0, 0])
    assert bool(nerfacc.opencv_lens_undistortion_fisheye(torch.tensor([[1.5, 0.3]]), strong, iters=1).isnan().all())


def test_points_stay_where_a_lens_folds():
    """At r^2 = 1 / 3, k1 = -1, the picture folds: the determinant is 0 there, and no step is made."""
    fold = torch.tensor([[math.sqrt(1 / 3), 0.0]], dtype=torch.float64)
    assert torch.equal(nerfacc.opencv_lens_undistortion(fold, torch.tensor([-1.0]).double(), eps=1e-3), fold)


@pytest.mark.parametrize("fisheye", [False, True])
def test_coefficients_of_each_point(fisheye):
    n, function = (4, nerfacc.opencv_lens_undistortion_fisheye) if fisheye else (8, nerfacc.opencv_lens_undistortion)
    points, lenses = draw(3, 5, 2) - 0.5, (draw(3, 5, n, seed=1) - 0.5) * 0.1
    alone = [[function(p, k) for p, k in zip(*rows, strict=True)] for rows in zip(points, lenses, strict=True)]
    wanted = torch.stack([torch.stack(row) for row in alone])
    close(function(points, lenses), wanted, rtol=0, atol=1e-12)
    turned = (x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (points, lenses))
    assert torch.equal(function(*turned), function(points, lenses))
    shared = function(points, lenses[:, :1])
    close(shared, function(points, lenses[:, :1].expand(3, 5, n)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lenses_in_half_precision(dtype):
    points = (draw(40, 2) - 0.5).to(dtype)
    for function, lens in (
        (nerfacc.opencv_lens_undistortion, LENS),
        (nerfacc.opencv_lens_undistortion_fisheye, (0.05, -0.02, 0.01, -0.003)),
    ):
        lens = torch.tensor(lens).to(dtype)
        out = function(points, lens)
        assert out.dtype == dtype
        close(out.double(), function(points.double(), lens.double()), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradients():
    points, lens = (draw(6, 2) - 0.5).requires_grad_(), (torch.tensor(LENS[:8], dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(cameras._opencv_lens_distortion, (points, lens))
    assert torch.autograd.gradcheck(cameras._opencv_lens_undistortion, (points, lens))
    fisheye = torch.tensor([0.05, -0.02, 0.01, -0.003], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cameras._opencv_lens_distortion_fisheye, (points, fisheye))
    assert not nerfacc.opencv_lens_undistortion(points, lens).requires_grad
    assert not nerfacc.opencv_lens_undistortion_fisheye(points, fisheye).requires_grad


@pytest.mark.parametrize("shape", [(0, 2), (3, 0, 2)])
def test_no_points(shape):
    assert nerfacc.opencv_lens_undistortion(torch.zeros(shape), torch.zeros(8)).shape == shape
    assert nerfacc.opencv_lens_undistortion_fisheye(torch.zeros(shape), torch.zeros(4)).shape == shape


@pytest.mark.parametrize(
    ("fisheye", "uv", "params", "error", "text"),
    [
        (False, (5, 3), (8,), ValueError, r"uv must be of shape \[..., 2\], got \[5, 3\]"),
        (False, (5, 2), (3,), ValueError, "params must be of 0 or 1 or 2 or 4 or 5 or 8 or 12 coefficients.*, got 3"),
        (True, (5, 2), (5,), ValueError, "params must be of 4 coefficients in OpenCV's order, got 5"),
        (False, (5, 2), (4, 8), ValueError, r"params must be of shape \[5, 8\], or 1 along an axis, got \[4, 8\]"),
        (False, (2,), (4, 8), ValueError, r"params must be of shape \[8\], or 1 along an axis, got \[4, 8\]"),
        (True, (5, 2), (6, 5, 4), ValueError, r"params must be of shape \[5, 4\], or 1 along an axis, got \[6, 5, 4\]"),
        (True, (5, 2), (), ValueError, "params must be of at least one axis"),
    ],
)
def test_refusals(fisheye, uv, params, error, text):
    name = "opencv_lens_undistortion" + "_fisheye" * fisheye
    with pytest.raises(error, match=f"^{name}: {text}"):
        getattr(nerfacc, name)(torch.zeros(uv), torch.zeros(params))


def test_refusals_of_other_arguments():
    with pytest.raises(TypeError, match="opencv_lens_undistortion: uv must be a tensor, got list"):
        nerfacc.opencv_lens_undistortion([0.1, 0.2], torch.zeros(8))
    with pytest.raises(ValueError, match="opencv_lens_undistortion_fisheye: iters must be at least 1, got 0"):
        nerfacc.opencv_lens_undistortion_fisheye(torch.zeros(1, 2), torch.zeros(4), iters=0)
