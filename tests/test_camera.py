"""Cameras: upstream's golden poses, the ray convention, and what must stay true when cameras turn."""

import doctest
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvdream_fast.camera import (
    Y_UP_TO_Z_UP,
    Cameras,
    CameraSampling,
    generate_rays,
    get_camera,
    middle_cameras,
    normalize_camera,
    orbit_cameras,
    sample_cameras,
)
from mvdream_fast.core.rng import Stream
from mvdream_fast.distill.config import SDSConfig

S, C = 0.258819, 0.965926  # sine and cosine of 15 degrees
GOLDEN = {
    0: [1, 0, 0, 0, 0, S, -C, -C, 0, C, S, S, 0, 0, 0, 1],
    90: [0, -S, C, C, 1, 0, 0, 0, 0, C, S, S, 0, 0, 0, 1],
    180: [-1, 0, 0, 0, 0, -S, C, C, 0, C, S, S, 0, 0, 0, 1],
    270: [0, S, -C, -C, -1, 0, 0, 0, 0, C, S, S, 0, 0, 0, 1],
}
angles = st.floats(-720, 720)
elevations = st.floats(-89, 89)


def pose(cameras: Cameras) -> torch.Tensor:
    return cameras.c2w.double()


def test_golden_vectors():
    expected = torch.tensor(list(GOLDEN.values()))
    assert get_camera(4).dtype == torch.float32
    assert (get_camera(4) - expected).abs().max() < 1e-6
    assert (get_camera(2, azimuth_start_deg=90) - expected[[1, 3]]).abs().max() < 1e-6


def test_y_up_world_puts_the_front_on_plus_z():
    front = get_camera(1, elevation_deg=0, blender_coord=False).reshape(4, 4)
    torch.testing.assert_close(front, torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]))


@given(st.integers(1, 16), elevations, angles)
@settings(max_examples=50, deadline=None)
def test_blender_world_is_the_y_up_world_turned(n_views, elevation, azimuth):
    y_up = get_camera(n_views, elevation, azimuth, blender_coord=False).reshape(-1, 4, 4)
    z_up = get_camera(n_views, elevation, azimuth).reshape(-1, 4, 4)
    torch.testing.assert_close(Y_UP_TO_Z_UP.float() @ y_up, z_up, atol=1e-6, rtol=0)
    # (cos e sin a, sin e, cos e cos a), as upstream builds it, with y up
    e, a = math.radians(elevation), math.radians(azimuth)
    expected = torch.tensor([math.cos(e) * math.sin(a), math.sin(e), math.cos(e) * math.cos(a)])
    torch.testing.assert_close(y_up[0, :3, 3], expected, atol=1e-6, rtol=0)


@given(elevations, angles, st.floats(0.1, 50))
@settings(max_examples=50, deadline=None)
def test_poses_are_rotations_that_look_at_the_origin(elevation, azimuth, distance):
    c2w = pose(orbit_cameras(3, elevation, azimuth, 360, distance))
    rotation, position = c2w[:, :3, :3], c2w[:, :3, 3]
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(3).double().expand(3, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(position.norm(dim=1), torch.full((3,), distance).double(), atol=0, rtol=1e-6)
    torch.testing.assert_close(rotation[:, :, 2] * distance, position, atol=1e-5 * distance, rtol=0)
    assert (rotation[:, 2, 0].abs() < 1e-6).all(), "the horizon must be level"
    assert (rotation[:, 2, 1] > 0).all(), "up must point upwards"


@given(elevations, angles)
@settings(max_examples=50, deadline=None)
def test_azimuth_is_threestudios_plus_90(elevation, azimuth):
    """threestudio: z up, position (cos e cos θ, cos e sin θ, sin e); θ = azimuth - 90 degrees."""
    theta, e = math.radians(azimuth - 90), math.radians(elevation)
    expected = [math.cos(e) * math.cos(theta), math.cos(e) * math.sin(theta), math.sin(e)]
    position = get_camera(1, elevation, azimuth).reshape(4, 4)[:3, 3]
    torch.testing.assert_close(position, torch.tensor(expected), atol=1e-6, rtol=0)


def test_looking_straight_down_is_defined():
    down = get_camera(1, elevation_deg=90).reshape(4, 4)
    torch.testing.assert_close(down[:3, :3], torch.eye(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_views", [1, 3, 7, 11, 49, 64])
@pytest.mark.parametrize(("start", "span"), [(0, 360), (0.1, 0.7), (-33.3, 359.999), (90, -360), (10, 0)])
def test_awkward_spans_give_no_extra_view(n_views, start, span):
    cameras = get_camera(n_views, azimuth_start_deg=start, azimuth_span_deg=span)
    assert cameras.shape == (n_views, 16)
    last = get_camera(1, azimuth_start_deg=start + span * (n_views - 1) / n_views)
    torch.testing.assert_close(cameras[-1:], last, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(-1, 4, 4), (-1, 16)])
def test_normalize_moves_to_the_unit_sphere_and_leaves_its_argument_alone(shape):
    c2w = orbit_cameras(5, 20, 30, 360, distance=3.7).c2w.reshape(shape)
    before = c2w.clone()
    out = normalize_camera(c2w)
    assert torch.equal(c2w, before)
    torch.testing.assert_close(out, get_camera(5, 20, 30), atol=1e-6, rtol=0)
    out.zero_()
    assert torch.equal(c2w, before), "the result must not share memory with the argument"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalize_keeps_a_camera_at_the_origin(dtype):
    c2w = torch.eye(4, dtype=dtype)[None]
    out = normalize_camera(c2w)
    assert torch.equal(out, c2w.reshape(1, 16))
    assert out.dtype == dtype


def test_normalize_a_camera_whose_distance_is_none_of_its_dtype():
    c2w = torch.eye(4, dtype=torch.float16)[None]
    c2w[0, :3, 3] = 50_000.0  # 86603 from the origin; float16 ends at 65504
    torch.testing.assert_close(
        normalize_camera(c2w)[0, [3, 7, 11]].float(), torch.full((3,), 3**-0.5), rtol=1e-3, atol=0
    )


def test_rays_worked_by_hand():
    """A 2 x 2 image, 90 degrees, camera in front: f = 0.5 * 2 / tan(45 deg) = 1, centres at ±0.5."""
    rays = generate_rays(orbit_cameras(1, 0, 0, 360, distance=2, fovy_deg=90), 2, 2)
    torch.testing.assert_close(rays.rays_o, torch.tensor([[0.0, -2, 0]]).expand(4, 3), atol=1e-6, rtol=0)
    expected = torch.tensor([[-0.5, 1, 0.5], [0.5, 1, 0.5], [-0.5, 1, -0.5], [0.5, 1, -0.5]]) / math.sqrt(1.5)
    torch.testing.assert_close(rays.rays_d, expected, atol=1e-6, rtol=0)


def test_rays_of_a_wide_image_keep_square_pixels():
    """The focal length comes from the height alone."""
    cameras = orbit_cameras(1, 0, 0, 360, distance=2, fovy_deg=60)
    wide = generate_rays(cameras, 4, 10).rays_d.reshape(4, 10, 3)
    square = generate_rays(cameras, 4, 4).rays_d.reshape(4, 4, 3)
    torch.testing.assert_close(wide[:, 3:7], square)


def test_rays_are_unit_row_major_and_views_slowest():
    cameras = orbit_cameras(3, 10, 40, 360, 2.5, 50)
    rays = generate_rays(cameras, 5, 7)
    assert rays.rays_o.shape == rays.rays_d.shape == (3 * 5 * 7, 3)
    torch.testing.assert_close(rays.rays_d.norm(dim=-1), torch.ones(105))
    assert torch.equal(rays.rays_o.reshape(3, 35, 3), cameras.c2w[:, None, :3, 3].expand(3, 35, 3))
    alone = generate_rays(Cameras(cameras.c2w[1:2], cameras.fovy[1:2]), 5, 7)
    torch.testing.assert_close(rays.rays_d[35:70], alone.rays_d)
    centre = rays.rays_d.reshape(3, 5, 7, 3)[:, 2, 3]
    torch.testing.assert_close(centre * 2.5, -cameras.c2w[:, :3, 3], atol=1e-6, rtol=0)


def test_the_edge_of_the_image_is_half_the_field_of_view_away():
    rays = generate_rays(orbit_cameras(1, 0, 0, 360, 2, fovy_deg=40), 2001, 1)
    top = rays.rays_d[0].double()  # its pixel centre lies half a pixel inside the edge
    tangent = (top[2] / top[1]).item()
    assert tangent == pytest.approx(math.tan(math.radians(20)) * 2000 / 2001, rel=1e-5)


@given(st.integers(0, 2**31), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_rotating_a_camera_rotates_its_rays(seed, n_views):
    rotation, _ = torch.linalg.qr(Stream(seed, 0, "rotation").normal(3, 3).double())
    turn = torch.eye(4, dtype=torch.float64)
    turn[:3, :3] = rotation
    cameras = orbit_cameras(n_views, 25, 10, 360, 2)
    still = generate_rays(Cameras(cameras.c2w.double(), cameras.fovy), 3, 4)
    turned = generate_rays(Cameras(turn @ cameras.c2w.double(), cameras.fovy), 3, 4)
    torch.testing.assert_close(turned.rays_d, still.rays_d @ rotation.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(turned.rays_o, still.rays_o @ rotation.T, atol=1e-12, rtol=0)


def test_no_pixels_no_rays():
    rays = generate_rays(orbit_cameras(2), 0, 5)
    assert rays.rays_o.shape == rays.rays_d.shape == (0, 3)


def test_rays_are_differentiable_in_the_pose():
    c2w = orbit_cameras(1).c2w.requires_grad_()
    rays = generate_rays(Cameras(c2w, torch.tensor([0.7])), 2, 2)
    (rays.rays_o.sum() + rays.rays_d.sum()).backward()
    assert c2w.grad[0, :3].abs().min() > 0


def draws(config: CameraSampling, n: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Azimuth, elevation (degrees), distance and fovy, each [n, V]."""
    cameras = sample_cameras(config, Stream(3, 0, "cameras"), n_groups=n)
    x, y, z = pose(cameras)[:, :3, 3].T
    distance = (x**2 + y**2 + z**2).sqrt()
    columns = (torch.rad2deg(torch.atan2(x, -y)), torch.rad2deg(torch.asin(z / distance)), distance, cameras.fovy)
    return tuple(column.double().reshape(n, config.n_views) for column in columns)


@pytest.mark.parametrize("n_views", [1, 3, 4, 8])
def test_groups_are_orthogonal_and_share_everything_else(n_views):
    azimuth, elevation, distance, fovy = draws(CameraSampling(n_views=n_views), 50)
    turned = (azimuth - azimuth[:, :1]) % 360
    expected = (torch.arange(n_views) * 360 / n_views).double().expand(50, n_views)
    assert ((turned - expected + 180) % 360 - 180).abs().max() < 1e-4
    for shared in (elevation, distance, fovy):
        torch.testing.assert_close(shared, shared[:, :1].expand_as(shared), atol=1e-4, rtol=1e-6)
    assert (azimuth[:, 0] + 180).max() < 360 / n_views + 1e-3, "the first view lies in the first sector from -180"


def test_paper_ranges():
    azimuth, elevation, distance, fovy = draws(CameraSampling.paper())
    relative = distance * torch.tan(fovy / 2)
    for value, low, high in ((elevation, 0, 30), (torch.rad2deg(fovy), 15, 60), (relative, 0.8, 1.0)):
        assert value.min() > low - 1e-4
        assert value.max() < high + 1e-4
        # 400 uniform draws miss the outer 3 % of a range with probability 5e-6
        assert value.min() < low + 0.03 * (high - low)
        assert value.max() > high - 0.03 * (high - low)
        assert abs(value.mean() - (low + high) / 2) < 0.07 * (high - low)
    assert 1.38 < distance.min() < distance.max() < 7.61
    for one, other in ((elevation, fovy), (relative, fovy), (elevation, relative), (azimuth, elevation)):
        assert abs(torch.corrcoef(torch.stack([one[:, 0], other[:, 0]]))[0, 1]) < 0.2


def test_upstream_elevations_reach_19_degrees_in_half_of_the_draws():
    _, elevation, _, _ = draws(CameraSampling(elevations="upstream"), 1000)
    over = (elevation[:, 0] > 19.4713).double().mean()
    # half of the groups are uniform over 0..30, of which 35 % are over 19.47; the others never are
    assert abs(over - 0.5 * (30 - 19.4713) / 30) < 0.04
    _, narrow, _, _ = draws(CameraSampling(elevations="upstream", elevation_range_deg=(30, 30)), 100)
    values = narrow[:, 0].unique()
    assert values.min() == pytest.approx(math.degrees(math.asin(1 / 3)), abs=1e-3)
    assert values.max() == pytest.approx(30, abs=1e-3)


def test_mini_cameras_frame_the_unit_sphere():
    _, _, distance, fovy = draws(CameraSampling.mini())
    assert (distance * torch.sin(fovy / 2)).min() > 1 - 1e-5
    assert (distance * torch.sin(fovy / 2)).max() < 1.05 + 1e-5


def test_absolute_distances():
    _, _, distance, _ = draws(CameraSampling(distance_range=(2, 3), relative_distance="none"))
    assert 2 - 1e-5 < distance.min() < distance.max() < 3 + 1e-5


def test_sampling_is_a_function_of_its_stream():
    one, two, other = (
        sample_cameras(CameraSampling(), Stream(seed, step, "cameras")) for seed, step in ((1, 2), (1, 2), (1, 3))
    )
    assert torch.equal(one.c2w, two.c2w)
    assert not torch.equal(one.c2w, other.c2w)


def test_the_paper_preset_of_the_sds_run_is_the_paper_sampling():
    one = sample_cameras(SDSConfig().cameras, Stream(1, 2, "cameras"), n_groups=2)
    two = sample_cameras(CameraSampling.paper(), Stream(1, 2, "cameras"), n_groups=2)
    assert torch.equal(one.c2w, two.c2w)
    assert torch.equal(one.fovy, two.fovy)


def sampled(**changes) -> Cameras:
    return sample_cameras(CameraSampling(**changes), Stream(0, 0, "cameras"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_camera(0), "n_views must be at least 1, got 0"),
        (
            lambda: get_camera(4, elevation_deg=math.nan),
            "elevation_deg must be from -90 to 90, got nan; 90 is straight above",
        ),
        (lambda: orbit_cameras(4, distance=0), "distance must be positive, got 0"),
        (lambda: orbit_cameras(4, fovy_deg=180), "fovy_deg must be within 0 and 180, got 180"),
        (lambda: orbit_cameras(4, azimuth_start_deg=math.inf), "azimuth_start_deg must be finite, got inf"),
        (lambda: normalize_camera(torch.eye(4)), r"c2w must be \[V, 4, 4\] or \[V, 16\], got \[4, 4\]"),
        (lambda: normalize_camera(torch.zeros(2, 3, 4)), r"got \[2, 3, 4\]"),
        (lambda: Cameras(torch.eye(4), torch.ones(1)), r"c2w must be \[V, 4, 4\], got \[4, 4\]"),
        (lambda: Cameras(torch.eye(4)[None], torch.ones(2)), r"fovy must be \[1\], got \[2\]"),
        (lambda: sampled(fovy_range_deg=(60, 15)), r"fovy_range_deg must be low..high, got 60..15"),
        (lambda: sampled(fovy_range_deg=(0, 15)), "fovy_range_deg must be within 0 and 180"),
        (lambda: sampled(distance_range=(0, 1)), "distance_range must be positive"),
        (lambda: sampled(elevation_range_deg=(0, math.nan)), "elevation_range_deg must be finite, got nan"),
        (lambda: sample_cameras(CameraSampling(), Stream(0, 0, ""), 0), "n_groups must be at least 1, got 0"),
        # What the ecosystem's callers pass by mistake: one sentence each
        (lambda: get_camera(None), "get_camera: n_views must be a whole number, got None"),
        (lambda: get_camera("4"), "n_views must be a whole number, got '4'"),
        (lambda: get_camera(4.0), "n_views must be a whole number, got 4.0"),
        (lambda: get_camera(True), "n_views must be a whole number, got True"),
        (lambda: get_camera(4, "15"), "elevation_deg must be a number, got '15'"),
        (lambda: get_camera(4, None), "elevation_deg must be a number, got None"),
        (lambda: get_camera(4, 120), "elevation_deg must be from -90 to 90, got 120"),
        (lambda: orbit_cameras(4, -90.5), "orbit_cameras: elevation_deg must be from -90 to 90, got -90.5"),
        (lambda: orbit_cameras(4, distance=[3, 4]), r"distance must be a number, got \[3, 4\]"),
        (lambda: orbit_cameras(4, fovy_deg=math.nan), "fovy_deg must be finite, got nan"),
        (lambda: normalize_camera(None), "c2w must be numbers .* got None; pass a tensor or a NumPy array"),
        (lambda: normalize_camera([[1, 2], [3]]), "c2w must be numbers"),
        (lambda: normalize_camera(np.ones((2, 16), complex)), "c2w must be numbers"),
        (lambda: Cameras(None, None), r"Cameras: c2w must be numbers \[V, 4, 4\], got None"),
        (lambda: Cameras(np.eye(4)[None], "40"), r"fovy must be numbers \[V\], got '40'"),
        (lambda: generate_rays(np.eye(4)[None], 2, 2), "cameras must be Cameras, got ndarray; make them of c2w"),
        (lambda: generate_rays(orbit_cameras(1), 2.0, 2), "height must be a whole number, got 2.0"),
        (lambda: generate_rays(orbit_cameras(1), 2, -1), "width must be at least 0, got -1"),
        (lambda: sampled(n_views=2.5), "n_views must be a whole number, got 2.5"),
        (lambda: sampled(elevation_range_deg=(0, 91)), "elevation_range_deg must be within -90 and 90, got 0..91"),
        (lambda: sampled(distance_range=3), "distance_range must be two numbers, got 3"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_and_poses_of_any_library_are_the_same():
    """NumPy scalars, 0-dimensional tensors, arrays of several dtypes and nested lists, against plain numbers."""
    plain = get_camera(3, 10, 20, 300)
    assert torch.equal(get_camera(np.int64(3), np.float32(10), torch.tensor(20), np.array(300)), plain)
    assert torch.equal(get_camera(torch.tensor(3), elevation_deg=np.int8(10), azimuth_start_deg=20.0,
                                  azimuth_span_deg=300), plain)  # fmt: skip
    poses = [[[0, 1, 0, 2], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]
    wanted = torch.tensor([[0.0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]])  # (2, 0, 0) moved to (1, 0, 0)
    for c2w in (poses, np.array(poses), np.array(poses, np.float32), torch.tensor(poses), [torch.tensor(poses[0])]):
        torch.testing.assert_close(normalize_camera(c2w), wanted.to(normalize_camera(c2w).dtype))
    cameras = Cameras(np.array(poses, np.float32), [0.5])
    assert torch.equal(cameras.c2w, torch.tensor(poses, dtype=torch.float32))
    rays = generate_rays(cameras, np.int32(1), 1)
    assert torch.equal(rays.rays_o, torch.tensor([[2.0, 0, 0]]))
    torch.testing.assert_close(rays.rays_d, torch.tensor([[0.0, 0, -1]]))  # along -z of the pose


def test_middle_cameras_stand_in_the_middle_of_the_ranges():
    cameras = middle_cameras(CameraSampling.paper(), elevation_deg=10)
    fovy = math.radians(37.5)
    torch.testing.assert_close(cameras.fovy, torch.full((4,), fovy))
    torch.testing.assert_close(cameras.c2w[:, :3, 3].norm(dim=1), torch.full((4,), 0.9 / math.tan(fovy / 2)))
    torch.testing.assert_close(normalize_camera(cameras.c2w), get_camera(4, 10), atol=1e-6, rtol=0)


def test_the_documentation_says_what_the_code_does():
    page = Path(__file__).parents[1] / "docs" / "cameras.md"
    failed, attempted = doctest.testfile(str(page), module_relative=False)
    assert attempted >= 5
    assert not failed


def test_perturbed_cameras_look_past_the_centre():
    """Positions move within a cube, centres and upward axes by normal numbers; the axes stay orthonormal."""
    still = replace(CameraSampling(), n_views=1, relative_distance="none", distance_range=(1.5, 2.0))
    moved = replace(still, perturb=(0.1, 0.2, 0.02))
    plain, jittered = (sample_cameras(config, Stream(0, 0, "cameras"), 400) for config in (still, moved))
    torch.testing.assert_close(plain.fovy, jittered.fovy, rtol=0, atol=0)
    rotation, position = jittered.c2w[:, :3, :3], jittered.c2w[:, :3, 3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(400, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(400), rtol=0, atol=1e-5)
    offset = position - plain.c2w[:, :3, 3]
    assert 0.09 < offset.abs().max() <= 0.1
    missed = position - (position * rotation[:, :, 2]).sum(1, keepdim=True) * rotation[:, :, 2]  # nearest to the centre
    assert missed.square().sum(1).mean().sqrt() == pytest.approx(
        0.2 * 2**0.5, rel=0.1
    )  # two of three deviations of 0.2
    roll = torch.rad2deg(torch.atan2(rotation[:, 2, 0], rotation[:, 2, 1]))
    assert roll.std() == pytest.approx(math.degrees(0.02), rel=0.3)
    sideways = replace(still, perturb=(0.0, 0.0, 1e-6))
    same = sample_cameras(sideways, Stream(0, 0, "cameras"), 400)
    torch.testing.assert_close(same.c2w, plain.c2w, rtol=0, atol=1e-4)
