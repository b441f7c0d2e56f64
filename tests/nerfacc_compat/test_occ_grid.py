"""The occupancy-grid estimator: what it finds, what its cameras see, its checkpoints, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from reference.nerfacc_data import close, rays_around

from mvdream_fast import nerfacc_compat as nerfacc


@pytest.mark.parametrize("cone_angle", [0.0, 0.1])  # the fast way, and the general one
@pytest.mark.parametrize("broken", ["rays_o", "rays_d", "t_min", "t_max"])
def test_rays_that_are_no_numbers_are_refused_by_sampling(cone_angle, broken):
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=4)
    rays_o, rays_d = rays_around(4)
    arguments = {"rays_o": rays_o, "rays_d": rays_d, "t_min": torch.zeros(4), "t_max": torch.full((4,), 9.0)}
    arguments[broken][2] = math.nan
    wanted = {"t_max": "t_max must be a number, got NaN", "t_min": "t_min must be a number or infinity, got NaN"}
    wanted = wanted.get(broken, f"{broken} must be finite")
    with pytest.raises(ValueError, match=f"^sampling: {wanted}"):
        grid.sampling(**arguments, render_step_size=0.1, cone_angle=cone_angle)


def test_estimator_finds_a_ball_and_samples_it():
    torch.manual_seed(0)
    grid = nerfacc.OccGridEstimator(torch.tensor([-1.0, -1, -1, 1, 1, 1]), resolution=16, levels=2)

    def ball(x):
        return (x.norm(dim=-1, keepdim=True) < 0.7).float()

    for step in range(0, 400, 16):
        grid.update_every_n_steps(step, ball)
    inner = grid.binaries[0].float().mean().item()
    assert inner == pytest.approx(4 / 3 * math.pi * 0.7**3 / 8, rel=0.3)
    rays_o, rays_d = rays_around(50)
    rays, t_starts, t_ends = grid.sampling(rays_o, rays_d, render_step_size=0.01)
    distance = (rays_o[rays] + rays_d[rays] * ((t_starts + t_ends) / 2)[:, None]).norm(dim=-1)
    assert float(distance.max()) < 0.7 + 4 * 3**0.5 / 16
    assert rays.numel() > 500
    visible = grid.sampling(rays_o, rays_d, lambda t0, t1, i: 50 * (t1 > 0), render_step_size=0.01, alpha_thre=0.01)
    assert 0 < visible[0].numel() < rays.numel()
    alphas = grid.sampling(rays_o, rays_d, alpha_fn=lambda t0, t1, i: 0.0 * t0, render_step_size=0.01, alpha_thre=0.01)
    assert alphas[0].numel() == 0
    jittered = grid.sampling(rays_o, rays_d, render_step_size=0.01, stratified=True)
    assert jittered[1].shape != t_starts.shape or not torch.equal(jittered[1], t_starts)
    with pytest.raises(RuntimeError, match="update_every_n_steps: the estimator must be in training mode"):
        grid.eval().update_every_n_steps(0, ball)


def test_invisible_cells_are_never_occupied():
    grid = nerfacc.OccGridEstimator([-1.0, -1, -1, 1, 1, 1], resolution=8)
    # A camera at z = -3 that looks along +z and sees only the middle.
    K = torch.tensor([[[40.0, 0, 8], [0, 40, 8], [0, 0, 1]]])
    c2w = torch.eye(4)[None].clone()
    c2w[0, 2, 3] = -3
    grid.mark_invisible_cells(K, c2w, 16, 16)
    unseen = (grid.occs < 0).view(8, 8, 8)
    assert 0 < unseen.float().mean() < 1
    assert bool(unseen[0, 0].all())
    assert not bool(unseen[4, 4, 4])
    grid.update_every_n_steps(0, lambda x: torch.rand(len(x), 1) + 1)
    assert not bool(grid.binaries[0][unseen].any())
    grid._update(300, lambda x: torch.rand(len(x), 1) + 1)
    assert bool((grid.occs.view(8, 8, 8)[unseen] == -1).all())


def test_estimator_checkpoints_carry_nerfaccs_names():
    grid = nerfacc.OccGridEstimator([0, 0, 0, 1, 1, 1], resolution=4, levels=2)
    shapes = {name: tuple(x.shape) for name, x in grid.state_dict().items()}
    assert shapes == {"resolution": (3,), "aabbs": (2, 6), "occs": (128,), "binaries": (2, 4, 4, 4)}
    close(grid.aabbs[1], torch.tensor([-0.5, -0.5, -0.5, 1.5, 1.5, 1.5]))


def cameras(dtype=torch.float32):
    """Two cameras on the axis z that look at each other, the second one narrow and turned by 180 degrees around y."""
    K = torch.tensor([[[40.0, 0, 8], [0, 40, 8], [0, 0, 1]], [[80, 0, 8], [0, 80, 6], [0, 0, 1]]], dtype=dtype)
    c2w = torch.eye(4, dtype=dtype).repeat(2, 1, 1)
    c2w[0, 2, 3], c2w[1, 2, 3] = -3, 3.5
    c2w[1, 0, 0] = c2w[1, 2, 2] = -1
    return K, c2w


def seen_in_a_loop(grid, K, c2w, width, height, near_plane):
    """Which cells some camera sees and none is too near to, one after the other in Python numbers."""
    seen = []
    for box in grid.aabbs.tolist():
        for cell in grid.grid_coords.tolist():
            low, high, n = box[:3], box[3:], grid.resolution.tolist()
            p = [a + (b - a) * i / max(m - 1, 1) for a, b, i, m in zip(low, high, cell, n, strict=True)]
            depths = []
            for k, pose in zip(K.tolist(), c2w.tolist(), strict=True):
                off = [p[i] - pose[i][3] for i in range(3)]
                x, y, z = (sum(pose[i][j] * off[i] for i in range(3)) for j in range(3))
                u, v = k[0][0] * x + k[0][2] * z, k[1][1] * y + k[1][2] * z
                if z > 0 and 0 <= u / z < width and 0 <= v / z < height:
                    depths.append(z)
            seen.append(bool(depths) and min(depths) >= near_plane)
    return seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("near_plane", [0.0, 3.3])
def test_cameras_of_any_precision_mark_the_same_cells(dtype, near_plane):
    K, c2w = cameras(dtype)
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1.5, 1], [5, 6, 7], levels=2)
    wanted = seen_in_a_loop(grid, K, c2w, 16, 14, near_plane)
    assert 0.05 < sum(wanted) / len(wanted) < 0.95
    for poses in (c2w, c2w[:, :3], c2w.transpose(1, 2).contiguous().transpose(1, 2)):
        for chunk in (32**3, 7):
            grid.occs.zero_()
            grid.mark_invisible_cells(K, poses, 16, 14, near_plane, chunk)
            assert (grid.occs == 0).tolist() == wanted
            assert set(grid.occs.tolist()) == {0.0, -1.0}
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1.5, 1], [5, 6, 7], levels=2)
    grid.mark_invisible_cells(K.long(), c2w, 16, 14, near_plane)  # whole numbers of pixels
    assert (grid.occs == 0).tolist() == wanted


def test_marks_of_nerfaccs_own_example():
    grid = nerfacc.OccGridEstimator(torch.tensor([-1.0, -1, -1, 1, 1, 1]), resolution=32, levels=4)
    K = torch.tensor([[[100.0, 0, 50], [0, 100, 50], [0, 0, 1]]])
    pose = torch.tensor([[[-1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 2.5]]])
    for dtype in (torch.float32, torch.float64):
        grid.occs.zero_()
        grid.mark_invisible_cells(K.to(dtype), pose.to(dtype), 100, 100)
        assert [int((grid.occs == mark).sum()) for mark in (-1, 0)] == [77660, 53412]


def test_one_K_for_all_cameras_one_cell_and_no_camera():
    K, c2w = cameras()
    marks = []
    for k in (K[:1], K[:1].expand(2, 3, 3)):
        grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=[1, 4, 4])  # its cell along x is at -1
        grid.mark_invisible_cells(k, c2w, 40, 16)
        marks.append(grid.occs.tolist())
    assert marks[0] == marks[1]
    assert set(marks[0]) == {0.0, -1.0}
    grid.mark_invisible_cells(K[:0], c2w[:0], 16, 16)
    assert set(grid.occs.tolist()) == {-1.0}
    grid.update_every_n_steps(0, lambda x: torch.ones(len(x), 1))  # of no cell at all
    assert not bool(grid.binaries.any())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"K": torch.eye(3)}, ValueError, r"K must be of shape \[2, 3, 3\] or \[1, 3, 3\], got \[3, 3\]"),
        ({"K": torch.eye(3).expand(3, 3, 3)}, ValueError, r"K must be of shape \[2, 3, 3\] or .* got \[3, 3, 3\]"),
        ({"c2w": torch.eye(4)}, ValueError, r"c2w must be of shape \[N, 3, 4\] or \[N, 4, 4\], got \[4, 4\]"),
        ({"c2w": torch.ones(2, 3, 3)}, ValueError, r"c2w must be of shape \[N, 3, 4\] or \[N, 4, 4\], got \[2, 3, 3\]"),
        ({"c2w": torch.eye(4).numpy()}, TypeError, "c2w must be a tensor, got ndarray"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
    ],
)
def test_refusals_of_cameras(change, error, text):
    K, c2w = cameras()
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=2)
    with pytest.raises(error, match=f"^mark_invisible_cells: {text}"):
        grid.mark_invisible_cells(**{"K": K, "c2w": c2w, "width": 16, "height": 16} | change)


@pytest.mark.parametrize("cone_angle", [0.0, 0.1])  # the fast way, and the general one
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rays_o": torch.zeros(3)}, ValueError, r"rays_o must be of shape \[any, 3\], got \[3\]"),
        ({"rays_d": torch.ones(1, 3)}, ValueError, r"rays_d must be of shape \[4, 3\], got \[1, 3\]"),
        ({"rays_d": torch.zeros(4, 3)}, ValueError, "rays_d must be non-zero"),
        ({"t_min": torch.zeros(4, 1)}, ValueError, r"t_min must be of shape \[4\], or 1 along an axis, got \[4, 1\]"),
        ({"t_max": torch.zeros(3)}, ValueError, r"t_max must be of shape \[4\], or 1 along an axis, got \[3\]"),
        ({"t_max": 2.0}, TypeError, "t_max must be a tensor, got float"),
        ({"near_plane": math.inf}, ValueError, "near_plane must be finite, got inf"),
        ({"far_plane": math.nan}, ValueError, "far_plane must be a number, got nan"),
        ({"render_step_size": math.nan}, ValueError, "render_step_size must be finite, got nan"),
        ({"sigma_fn": lambda t, *_: t[:, None]}, ValueError, r"sigmas must be of shape \[\d+\] like t_starts"),
        ({"alpha_fn": lambda t, *_: t[:-1]}, ValueError, r"alphas must be of shape \[\d+\] like t_starts"),
    ],
)
def test_refusals_of_sampling(change, error, text, cone_angle):
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=4)
    grid.binaries[:] = True
    rays_o, rays_d = rays_around(4)
    arguments = {"rays_o": rays_o, "rays_d": rays_d, "render_step_size": 0.1, "cone_angle": cone_angle} | change
    with pytest.raises(error, match=f"^sampling: {text}"):
        grid.sampling(**arguments)


def test_negative_cone_angles_are_refused():
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=4)
    with pytest.raises(ValueError, match="^sampling: cone_angle must be at least 0, got -0.1"):
        grid.sampling(*rays_around(4), cone_angle=-0.1)


@pytest.mark.parametrize("cone_angle", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_rays_and_estimators_of_any_precision(dtype, cone_angle):
    rays_o, rays_d = (x.half() for x in rays_around(20))
    options = {"render_step_size": 0.1, "cone_angle": cone_angle, "t_min": torch.tensor(0.5, dtype=dtype)}
    found = []
    for cast in (torch.Tensor.float, lambda x: x.to(dtype)):
        grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=4).to(dtype)
        grid.update_every_n_steps(0, lambda x: (x.sum(-1) > 0).to(x.dtype))  # [P] will do as well
        assert grid.occs.dtype == dtype
        assert 20 < int(grid.binaries.sum()) < 50
        grid.binaries[:] = torch.arange(4) > 1
        found.append(grid.sampling(cast(rays_o), cast(rays_d), lambda t, *_: (t * 0 + 1).half(), **options))
    assert found[0][0].numel() > 50
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("answer", [lambda x: x[:, :2], lambda x: x[:-1, :1], lambda x: x[None, :, 0], lambda x: 1.0])
def test_answers_of_another_shape_are_refused(answer):
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=2)
    text = r"^update_every_n_steps: the answer of occ_eval_fn must be of shape \[8, 1\], got"
    with pytest.raises(ValueError, match=text):
        grid.update_every_n_steps(0, answer)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([0, 0, 0, 1, 1, 1], 0), "resolution must be one or three whole numbers above 0, got 0"),
        (([0, 0, 0, 1, 1, 1], [4, 4]), "resolution must be one or three whole numbers above 0"),
        (([0, 0, 0, 1, 1, 1], 4.5), "resolution must be one or three whole numbers above 0, got 4.5"),
        (([0, 0, 0, 1, 1], 4), "roi_aabb must be six finite numbers, minimum below maximum"),
        (([0, 0, 0, 1, 0, 1], 4), "roi_aabb must be six finite numbers, minimum below maximum"),
        (([0, 0, 0, 1, 1, math.inf], 4), "roi_aabb must be six finite numbers, minimum below maximum"),
        (([0, 0, 0, 1, 1, 1], 4, 0), "levels must be 1 to 16, got 0"),
    ],
)
def test_refusals_of_grids(arguments, text):
    with pytest.raises(ValueError, match=f"^OccGridEstimator: {text}"):
        nerfacc.OccGridEstimator(*arguments)


def test_resolutions_in_each_form():
    for resolution in (4, [4] * 3, (4, 4, 4), torch.tensor([4] * 3), torch.tensor(4), np.int64(4), np.array([4] * 3)):
        grid = nerfacc.OccGridEstimator([0, 0, 0, 1, 1, 1], resolution)
        assert grid.resolution.tolist() == [4, 4, 4]
        assert grid.resolution.dtype == torch.int32
