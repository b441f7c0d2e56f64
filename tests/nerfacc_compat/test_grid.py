"""Rays against boxes and grids: brute force, numbers by hand, and what is refused."""

import math

import pytest
import torch
from reference.nerfacc_data import close, draw, rays_around

from mvdream_fast import nerfacc_compat as nerfacc
from mvdream_fast.nerfacc_compat import grid


def test_ray_aabb_intersect():
    rays_o = torch.tensor([[-2.0, 0, 0], [0, 0, 0], [-2, 2, 0], [2, 0, 0], [-2, 1, 0]])
    rays_d = torch.tensor([[1.0, 0, 0]]).expand(5, 3)
    boxes = torch.tensor([[-1.0, -1, -1, 1, 1, 1], [-2, -2, -2, 0.5, 2, 2]])
    t_mins, t_maxs, hits = nerfacc.ray_aabb_intersect(rays_o, rays_d, boxes)
    assert hits.tolist() == [[True, True], [True, True], [False, True], [False, False], [True, True]]
    assert t_mins[0].tolist() == [1, 0]
    assert t_maxs[1].tolist() == [1, 0.5]
    assert t_mins[3].tolist() == [math.inf, math.inf]
    t_mins, t_maxs, _ = nerfacc.ray_aabb_intersect(rays_o, rays_d, boxes, 0.5, 1.2, -1.0)
    close(t_mins[0], torch.tensor([1.0, 0.5]))
    close(t_maxs[0], torch.tensor([1.2, 1.2]))
    assert t_maxs[3].tolist() == [-1, -1]


def brute_force(rays_o, rays_d, binaries, aabbs, near, far, step, cone):
    """Sequential marching in Python: of the lattice, the steps whose midpoint is in an occupied cell."""
    found = []
    for o, d, t, end in zip(rays_o.double(), rays_d.double(), near.tolist(), far.tolist(), strict=True):
        mine = []
        while t < min(end, 12.0):
            dt = max(t * cone, step)
            middle = t + dt / 2
            p = o + d * middle
            for binary, box in zip(binaries, aabbs.double(), strict=True):
                x = (p - box[:3]) / (box[3:] - box[:3])
                if bool(((x >= 0) & (x < 1)).all()):
                    cell = (x * torch.tensor(binary.shape)).long()
                    if bool(binary[tuple(cell.tolist())]) and middle < end:
                        mine.append((t, t + dt))
                    break
            t += dt
        found.append(mine)
    return found


@pytest.mark.parametrize("levels", [1, 3])
def test_traversal_against_brute_force(levels):
    rays_o, rays_d = rays_around(12)
    grid = nerfacc.OccGridEstimator([-0.5, -0.4, -0.5, 0.5, 0.6, 0.5], resolution=[4, 5, 6], levels=levels)
    grid.binaries[:] = draw(levels, 4, 5, 6, seed=4) < 0.4
    near, far = torch.linspace(0.5, 2, 12), torch.linspace(2.9, 6, 12)
    args = (rays_o, rays_d, grid.binaries, grid.aabbs, near, far)
    intervals, samples, ends = nerfacc.traverse_grids(*args, step_size=0.05)
    wanted = brute_force(*args, 0.05, 0.0)
    assert samples.packed_info[:, 1].tolist() == [len(w) for w in wanted]
    flat = torch.tensor([t for ray in wanted for t in ray], dtype=torch.float64).reshape(-1, 2)
    close(intervals.vals[intervals.is_left].double(), flat[:, 0], atol=1e-5)
    close(intervals.vals[intervals.is_right].double(), flat[:, 1], atol=1e-5)
    close(samples.vals.double(), flat.mean(-1), atol=1e-5)
    assert torch.equal(intervals.ray_indices[intervals.is_left], samples.ray_indices)
    assert bool(samples.is_valid.all())
    # An edge between two touching intervals is one edge.
    assert intervals.vals.shape[0] < 2 * samples.vals.shape[0]
    assert bool((ends[samples.packed_info[:, 1] > 0] > near[samples.packed_info[:, 1] > 0]).all())


def test_the_fast_way_and_the_general_one_find_the_same():
    rays_o, rays_d = rays_around(200)
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=16)
    grid.binaries[:] = draw(1, 16, 16, 16, seed=4) < 0.3
    rays, t_starts, t_ends = grid.sampling(rays_o, rays_d, near_plane=0.3, far_plane=4.0, render_step_size=0.02)
    near, far = torch.full((200,), 0.3), torch.full((200,), 4.0)
    intervals, samples, _ = nerfacc.traverse_grids(rays_o, rays_d, grid.binaries, grid.aabbs, near, far, 0.02)
    assert torch.equal(rays, samples.ray_indices)
    close(t_starts, intervals.vals[intervals.is_left], atol=1e-5)
    close(t_ends, intervals.vals[intervals.is_right], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(("levels", "cone_angle"), [(1, 0.0), (1, 0.1), (2, 0.0)])  # the fast way, the general one
def test_rays_that_miss_the_box_have_no_samples(levels, cone_angle, dtype):
    """What ray_aabb_intersect says of them, infinity, is taken by the traversals."""
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=4, levels=levels)
    grid.binaries[:] = True
    rays_o = torch.tensor([[-3.0, 0.1, 0.1], [-3, 9, 9], [-3, 0.1, 0.2]], dtype=dtype)
    rays_d = torch.tensor([[1.0, 0, 0]], dtype=dtype).expand(3, 3)
    t_min, t_max, hits = (x[:, 0] for x in nerfacc.ray_aabb_intersect(rays_o, rays_d, grid.aabbs.to(dtype)))
    assert hits.tolist() == [True, False, True]
    assert t_min.tolist() == [2, math.inf, 2]
    options = {"render_step_size": 0.5, "cone_angle": cone_angle}
    found = grid.sampling(rays_o, rays_d, t_min=t_min, t_max=t_max, **options)
    wanted = grid.sampling(rays_o, rays_d, t_min=t_min.nan_to_num(posinf=1e4), t_max=t_max, **options)
    assert found[0].unique().tolist() == [0, 2]
    assert all(map(torch.equal, found, wanted))
    _, samples, ends = nerfacc.traverse_grids(rays_o, rays_d, grid.binaries, grid.aabbs, t_min, t_max, 0.5, cone_angle)
    assert torch.equal(samples.ray_indices, found[0])
    assert samples.packed_info[1, 1] == 0
    assert ends[1] == math.inf
    assert bool(ends[[0, 2]].isfinite().all())


def test_growing_steps():
    # All cells occupied: steps of max(0.1, t / 4) from t = 0.1, in the box from 1 to 3.
    binaries, aabbs = torch.ones(1, 4, 4, 4, dtype=torch.bool), torch.tensor([[-1.0, -1, -1, 1, 1, 1]])
    rays_o, rays_d = torch.tensor([[-2.0, 0.1, 0.1]]), torch.tensor([[1.0, 0, 0]])
    near = torch.tensor([1.0])
    intervals, samples, end = nerfacc.traverse_grids(rays_o, rays_d, binaries, aabbs, near, None, 0.1, 0.25)
    edges = [1.0, 1.25, 1.5625, 1.953125, 2.44140625, 3.0517578125]
    close(intervals.vals, torch.tensor(edges), atol=1e-5)
    assert end.item() == pytest.approx(edges[-1])
    assert intervals.is_left.tolist() == [True] * 5 + [False]


def test_cell_by_cell_and_the_limit():
    binaries = torch.ones(1, 4, 4, 4, dtype=torch.bool)
    binaries[0, 2] = False
    aabbs = torch.tensor([[0.0, 0, 0, 4, 4, 4]])
    rays_o, rays_d = torch.tensor([[-1.0, 0.5, 0.5], [5.0, 0.5, 0.5]]), torch.tensor([[1.0, 0, 0], [-1, 0, 0]])
    intervals, samples, _ = nerfacc.traverse_grids(rays_o, rays_d, binaries, aabbs, step_size=0.0)
    close(intervals.vals, torch.tensor([1.0, 2, 3, 4, 5, 1, 2, 3, 4, 5]))
    assert intervals.is_left.tolist() == [True, True, False, True, False, True, False, True, True, False]
    assert intervals.is_right.tolist() == [False, True, True, False, True, False, True, False, True, True]
    assert samples.packed_info.tolist() == [[0, 3], [3, 3]]
    mask = torch.tensor([False, True])
    limited = {"traverse_steps_limit": 2, "over_allocate": True, "rays_mask": mask}
    _, samples, ends = nerfacc.traverse_grids(rays_o, rays_d, binaries, aabbs, step_size=0.0, **limited)
    assert samples.packed_info.tolist() == [[0, 0], [0, 2]]
    assert ends.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rays_mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"rays_mask must be of shape \[4\], got \[3\]"),
        ({"rays_mask": torch.ones(4, 1, dtype=torch.bool)}, ValueError, r"rays_mask must be of shape \[4\]"),
        ({"rays_mask": torch.ones(4)}, TypeError, "rays_mask must be a bool tensor, got torch.float32"),
        ({"rays_mask": [True] * 4}, TypeError, "rays_mask must be a tensor, got list; pass a tensor"),
        ({"far_planes": torch.tensor([9, 9, math.nan, 9])}, ValueError, "far_planes must be a number, got NaN"),
        ({"near_planes": torch.tensor([0, math.nan, 0, 0])}, ValueError, "near_planes must be a number or infinity"),
        ({"near_planes": torch.tensor([0, -math.inf, 0, 0])}, ValueError, "near_planes must be a number or infinity"),
        ({"rays_o": torch.full((4, 3), math.nan)}, ValueError, "rays_o must be finite"),
        ({"rays_d": torch.tensor([[1, 0, math.nan]] * 4)}, ValueError, "rays_d must be finite"),
        ({"step_size": math.nan}, ValueError, "step_size must be a number, got NaN"),
        ({"rays_d": torch.full((4, 3), 9e-31)}, ValueError, "rays_d must be non-zero"),
        ({"rays_d": torch.zeros(4, 3)}, ValueError, "rays_d must be non-zero"),
        ({"rays_d": torch.ones(1, 3)}, ValueError, r"rays_d must be of shape \[4, 3\], got \[1, 3\]"),
        ({"rays_o": torch.ones(3)}, ValueError, r"rays_o must be of shape \[any, 3\], got \[3\]"),
        ({"near_planes": torch.zeros(4, 1)}, ValueError, r"near_planes must be of shape \[4\].*, got \[4, 1\]"),
        ({"far_planes": torch.ones(3)}, ValueError, r"far_planes must be of shape \[4\].*, got \[3\]"),
        ({"far_planes": 9.0}, TypeError, "far_planes must be a tensor, got float"),
        ({"binaries": torch.ones(1, 4, 4, 4)}, TypeError, "binaries must be a bool tensor, got torch.float32"),
        ({"binaries": torch.ones(4, 4, 4).bool()}, ValueError, r"binaries must be of shape \[m, x, y, z\]"),
        ({"aabbs": torch.ones(6)}, ValueError, r"aabbs must be of shape \[1, 6\], got \[6\]"),
        ({"over_allocate": True}, ValueError, "traverse_steps_limit must be given with over_allocate"),
        ({"step_size": 1e-11}, ValueError, "rays_d must be of a length that crosses the box in at most"),
        (
            {"rays_d": torch.full((4, 3), 1e-12)},
            ValueError,
            "rays_d must be of a length that crosses the box in at most",
        ),
    ],
)
def test_refusals_of_a_traversal(change, error, text):
    rays_o, rays_d = rays_around(4)
    cells, boxes = torch.ones(1, 4, 4, 4, dtype=torch.bool), torch.tensor([[-1.0, -1, -1, 1, 1, 1]])
    arguments = {"rays_o": rays_o, "rays_d": rays_d, "binaries": cells, "aabbs": boxes, "step_size": 0.1} | change
    with pytest.raises(error, match=f"traverse_grids: {text}"):
        nerfacc.traverse_grids(**arguments)


def test_no_rays_and_nothing_occupied():
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=4, levels=2)
    for rays in (rays_around(5), (torch.zeros(0, 3), torch.zeros(0, 3))):
        found = grid.sampling(*rays, lambda *_: pytest.fail("called"))
        assert [x.shape for x in found] == [(0,)] * 3
        intervals, samples, ends = nerfacc.traverse_grids(*rays, grid.binaries, grid.aabbs)
        assert intervals.vals.shape == samples.vals.shape == (0,)
        assert samples.packed_info.tolist() == [[0, 0]] * len(rays[0])
        assert ends.shape == rays[0].shape[:1]
        assert nerfacc.ray_aabb_intersect(*rays, grid.aabbs)[0].shape == (len(rays[0]), 2)
    intervals = nerfacc.RayIntervals(torch.zeros(0), packed_info=torch.zeros(2, 2, dtype=torch.int64))
    new, samples = nerfacc.importance_sampling(intervals, torch.zeros(0), 3)
    assert (new.vals.shape, samples.vals.shape) == ((2, 4), (2, 3))
    left, right = nerfacc.searchsorted(intervals, nerfacc.RaySamples(torch.zeros(2, 3)))
    assert left.tolist() == right.tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rays_of_any_precision_and_stride(dtype):
    rays_o, rays_d = (x.to(dtype) for x in rays_around(50))
    binaries, aabbs = draw(2, 4, 5, 6, seed=4) < 0.4, torch.tensor([[-1.0, -1, -1, 1, 1, 1], [-2, -2, -2, 2, 2, 2]])
    near, far = torch.linspace(0.5, 2, 50).to(dtype), torch.linspace(2.9, 6, 50).to(dtype)
    results = []
    for turn in (lambda x: x, lambda x: x.float(), lambda x: torch.stack([x, x], -1)[..., 0]):
        o, d, boxes, low, high = (turn(x) for x in (rays_o, rays_d, aabbs.to(dtype), near, far))
        cells = torch.stack([binaries, ~binaries], -1)[..., 0]
        intervals, samples, ends = nerfacc.traverse_grids(o, d, cells, boxes, low, high, step_size=0.05)
        results.append([intervals.vals, intervals.packed_info, samples.vals, samples.ray_indices, ends])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert results[0][0].numel() > 100


def test_boxes_in_half_precision():
    rays_o, rays_d = (x.half() for x in rays_around(50))
    boxes = torch.tensor([[-1.0, -1, -1, 1, 1, 1], [-2, -2, -2, 0.5, 2, 2]])
    ours = nerfacc.ray_aabb_intersect(rays_o, rays_d, boxes.half())
    wide = nerfacc.ray_aabb_intersect(rays_o.double(), rays_d.double(), boxes.double())
    assert torch.equal(ours[2], wide[2])
    for a, b in zip(ours[:2], wide[:2], strict=True):
        assert a.dtype == torch.float16
        assert torch.equal(a, b.half())


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (((3,), (3,), (1, 6)), r"rays_o must be of shape \[any, 3\], got \[3\]"),
        (((2, 3), (1, 3), (1, 6)), r"rays_d must be of shape \[2, 3\], got \[1, 3\]"),
        (((2, 3), (2, 3), (6,)), r"aabbs must be of shape \[any, 6\], got \[6\]"),
        (((2, 3), (2, 3), (2, 3, 6)), r"aabbs must be of shape \[any, 6\]"),
    ],
)
def test_refusals_of_an_intersection(shapes, text):
    with pytest.raises(ValueError, match=f"^ray_aabb_intersect: {text}"):
        nerfacc.ray_aabb_intersect(*map(torch.zeros, shapes))


def test_query_by_hand():
    # Grids of 2^3 cells in boxes that reach to 1, 2 and 4; the values tell grid and cell.
    base, data = torch.tensor([-1.0, -1, -1, 1, 1, 1]), torch.arange(24.0).view(3, 2, 2, 2) + 1
    points = {
        (0, 0, 0): 8,  # of the first grid the last cell, whose corner it is
        (-0.1, 0.1, -0.1): 3,
        (-0.99, -0.99, 0.99): 2,
        (1, 0, 0): 16,  # boxes are half open
        (1.5, -0.1, 0): 14,
        (-3.9, 3.9, 0.5): 20,
        (4, 0, 0): 0,  # outside
        (0, 0, -70): 0,
    }
    values, inside = grid._query(torch.tensor([*points], dtype=torch.float32), data, base)
    assert values.tolist() == [*points.values()]
    assert inside.tolist() == [True] * 6 + [False] * 2
    bits, _ = grid._query(torch.tensor([[0.5, 0.5, 0.5]]), data > 8, base)
    assert bits.tolist() == [False]
    assert grid._query(torch.zeros(0, 3), data, base)[0].shape == (0,)


def test_enlarged_boxes():
    assert grid._enlarge_aabb(torch.tensor([0.0, 1, 2, 2, 5, 3]), 2).tolist() == [-1, -1, 1.5, 3, 7, 3.5]
