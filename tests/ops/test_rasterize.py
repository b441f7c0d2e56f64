"""rasterize: by hand, against plain torch and against pixels asked one by one; watertight, exact areas, gradients."""

import math

import pytest
import torch
from reference.meshes import asked_one_by_one, box, flat, perspective, sheet, soup, sphere
from threads import by_threads
from tolerances import PARITY

from mvdream_fast.ops.rasterize import fragments, rasterize, rasterize_ref

# name -> clip space [B, V, 4], triangles and the resolution
SCENES = {
    "flat": lambda: (*soup(60, with_w=False), (37, 50)),
    "perspective": lambda: (*soup(60), (63, 100)),
    "many small": lambda: (*soup(1500, 0.05), (64, 48)),
    "huge": lambda: (*soup(12, 40.0), (33, 70)),
    "two images": lambda: (*soup(40, n_images=2, seed=3), (40, 33)),
    "sphere": lambda: (perspective(sphere()[0])[None], sphere()[1], (65, 65)),
}


def outputs_and_gradient(function, pos, tri, resolution, seed=0, where=None):
    """rast, rast_db and the gradient of pos under a random cotangent, which is zero but for pixels `where`."""
    pos = pos.detach().clone().requires_grad_()
    out = function(pos, tri, resolution)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in out]
    cotangents = [d if where is None else d * where[..., None] for d in cotangents]
    return *(x.detach() for x in out), *torch.autograd.grad(out, pos, cotangents)


def test_by_hand():
    # Corners (-1, -1), (1, -1), (-1, 1) on 4 x 4 pixels: the lower left half, less the four centres on its long edge,
    # which is a right one. Row 0 is the bottom.
    pos = torch.tensor([[-1.0, -1, 0.5, 1], [1, -1, 0.5, 1], [-1, 1, 0.5, 1]])
    rast, rast_db = rasterize(pos, torch.tensor([[0, 1, 2]], dtype=torch.int32), (4, 4))
    assert rast[0, ..., 3].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    # The centre of pixel (0, 0) is (1/8, 1/8) of the way along both legs.
    torch.testing.assert_close(rast[0, 0, 0], torch.tensor([0.75, 0.125, 0.5, 1]))
    torch.testing.assert_close(rast[0, 0, 2], torch.tensor([0.25, 0.625, 0.5, 1]))
    torch.testing.assert_close(rast_db[0, 1, 1], torch.tensor([-0.25, -0.25, 0.25, 0]))
    assert not rast[0, 3].any()
    assert not rast_db[0, 3].any()


def test_weights_are_perspective_correct_by_hand():
    # A level edge from w = 1 to w = 3: its middle on the screen is a quarter of the way to the far end.
    pos = torch.tensor([[-1.0, -1, 0, 1], [3, -3, 0, 3], [-1, 1, 0, 1]])
    rast, _ = rasterize(pos, torch.tensor([[0, 1, 2]], dtype=torch.int32), (64, 65))
    row = rast[0, 0, 32]
    v = float(row[1])
    x = ((1 - v) * -1 + v * 3) / ((1 - v) * 1 + v * 3)  # as if on the level edge, half a pixel below
    assert x == pytest.approx(0, abs=0.02)
    assert v == pytest.approx(0.25, abs=0.01)


def test_the_nearer_triangle_is_seen_and_of_equals_the_first():
    pos = torch.cat([flat(torch.tensor([[-3.0, -1], [3, -1], [0, 5]]), depth) for depth in (0.5, -0.5, -0.5)])
    tri = torch.arange(9, dtype=torch.int32).reshape(3, 3)
    assert (rasterize(pos, tri, (5, 5)).rast[..., 3] == 2).all()
    assert (rasterize(pos, tri.flip(0), (5, 5)).rast[..., 3] == 1).all()
    assert (rasterize(pos, tri.flip(1), (5, 5)).rast[..., 3] == 2).all()  # both sides show


@pytest.mark.parametrize("scene", SCENES)
def test_parity(scene):
    pos, tri, resolution = SCENES[scene]()
    wanted = outputs_and_gradient(rasterize_ref, pos.double(), tri, resolution)
    got = outputs_and_gradient(rasterize, pos, tri, resolution)
    assert torch.equal(got[0][..., 3], wanted[0][..., 3].float())
    assert (wanted[0][..., 3] > 0).double().mean() > 0.2
    for a, b in zip(got, wanted, strict=True):
        largest = float(b.abs().max())
        torch.testing.assert_close(a.double(), b, rtol=PARITY["rasterize"], atol=PARITY["rasterize"] * largest)


@pytest.mark.parametrize("scene", ["flat", "perspective", "huge", "sphere"])
def test_every_pixel_asked_by_itself(scene):
    pos, tri, resolution = SCENES[scene]()
    rast = rasterize(pos[0], tri, resolution).rast[0]
    face, depth, sure = asked_one_by_one(pos[0], tri, resolution)
    assert sure.double().mean() > 0.9
    assert torch.equal(rast[sure][:, 3].long(), face[sure])
    seen = sure & (face > 0)
    torch.testing.assert_close(rast[seen][:, 2].double(), depth[seen], rtol=0, atol=1e-6)


def test_a_plane_to_the_horizon():
    """The ground, a triangle that reaches behind the camera: cut at the near plane, seen up to the horizon."""
    far = 1e4
    corners = torch.tensor([[-far, -1.0, -far], [far, -1, -far], [0, -1, far]])
    pos = perspective(corners, distance=0.0, near=0.01, far=3e4)
    rast = rasterize(pos, torch.tensor([[0, 1, 2]], dtype=torch.int32), (64, 64)).rast[0]
    rows = (rast[..., 3] > 0).all(1)
    assert rows.tolist() == [True] * 32 + [False] * 32
    assert not rast[32:, :, 3].any()


def test_nothing_beyond_near_and_far_is_seen():
    quad, tri = flat(torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])), torch.tensor([[0, 1, 2], [2, 1, 3]]).int()
    quad[:, 2] = torch.tensor([-2.0, 2, -2, 2])  # depth 2 x: seen in the middle half
    rast = rasterize(quad, tri, (4, 16)).rast[0]
    assert (rast[..., 3] > 0).tolist() == [[False] * 4 + [True] * 8 + [False] * 4] * 4


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("jitter", [0.0, 0.45])
def test_every_pixel_of_a_sheet_is_covered_once(seed, jitter):
    points, tri = sheet(9, jitter, seed)
    generator = torch.Generator().manual_seed(seed)
    angle, shift = torch.rand(1, generator=generator) * 6.3, torch.rand(2, generator=generator) * 0.06
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    points = (points @ turn.T) * (1.7 if seed % 2 else 0.6) + shift
    counts = torch.zeros(48 * 61, dtype=torch.int64)
    for part in fragments(flat(points), tri, (48, 61)):
        counts.index_add_(0, part.pixel, torch.ones_like(part.pixel))
    seen = rasterize(flat(points), tri, (48, 61)).rast[0, ..., 3].reshape(-1) > 0
    assert counts.max() == 1
    assert torch.equal(counts > 0, seen)
    x, y = torch.meshgrid((torch.arange(61) + 0.5) * 2 / 61 - 1, (torch.arange(48) + 0.5) * 2 / 48 - 1, indexing="xy")
    local = ((torch.stack([x, y], -1) - shift) @ turn) / (1.7 if seed % 2 else 0.6)
    inside = (local.abs() < 1 - 1e-3).all(-1).reshape(-1)
    assert inside.sum() > 200
    assert counts[inside].min() == 1


def test_sheets_whose_edges_run_through_the_centres():
    # Sixteen quads over sixteen pixels, moved by half of one: each centre is a vertex of six triangles.
    points, tri = sheet(16)
    counts = torch.zeros(256, dtype=torch.int64)
    for part in fragments(flat(points + 1 / 16), tri, (16, 16)):
        counts.index_add_(0, part.pixel, torch.ones_like(part.pixel))
    assert counts.max() == 1
    assert (counts.reshape(16, 16)[1:, 1:] == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_closed_surface_has_a_front_and_a_back_at_every_pixel(seed):
    vertices, tri = sphere(20, 31)
    generator = torch.Generator().manual_seed(seed)
    pos = perspective(vertices)
    pos[:, :2] += pos[:, 3:] * torch.rand(2, generator=generator) * 0.1
    corners = (pos[:, :2] / pos[:, 3:])[tri.long()].double()
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    front = (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) > 0
    counts = torch.zeros(2, 90 * 90, dtype=torch.int64)
    for part in fragments(pos, tri, (90, 90)):
        counts.index_put_((front[part.face].long(), part.pixel), torch.tensor(1), accumulate=True)
    assert torch.equal(counts[0], counts[1])
    assert counts.max() == 1
    nearest = rasterize(pos, tri, (90, 90)).rast[0, ..., 3].reshape(-1).long()
    assert torch.equal(nearest > 0, counts[1] > 0)
    assert front[nearest[nearest > 0] - 1].all()


def test_boxes_have_their_exact_area():
    vertices, tri = box(0.5)
    pos = torch.cat([vertices[:, :2], vertices[:, 2:] * 0.5, torch.ones(8, 1)], -1)
    assert (rasterize(pos, tri, (64, 48)).rast[..., 3] > 0).sum() == 32 * 24


def test_the_area_of_a_sphere_s_outline():
    vertices, tri = sphere(64, 128)
    pos, areas = perspective(vertices, focal=1.5), []
    # The outline of a ball of radius 1 from distance 3 is a circle: tangent of its half angle times the focal length.
    exact = math.pi * (1.5 * math.tan(math.asin(1 / 3))) ** 2 / 4 * 96 * 96
    for i in range(16):
        moved = pos.clone()
        moved[:, :2] += pos[:, 3:] * (torch.tensor([i % 4, i // 4]) / 4) * 2 / 96
        areas.append(int((rasterize(moved, tri, (96, 96)).rast[..., 3] > 0).sum()))
    assert sum(areas) / 16 == pytest.approx(exact, rel=2e-3)


def test_turning_everything_changes_nothing():
    """A quarter turn of the screen, and another order of the triangles."""
    pos, tri, _ = SCENES["perspective"]()
    pos, size = pos[0], (60, 60)
    rast, _ = rasterize(pos, tri, size)
    turned = torch.stack([-pos[:, 1], pos[:, 0], pos[:, 2], pos[:, 3]], -1)
    quarter = rasterize(turned, tri, size).rast
    same = quarter[0].flip(1).permute(1, 0, 2)  # pixel (i, j) has come to (59 - j, i)
    assert torch.equal(same[..., 3], rast[0, ..., 3])
    torch.testing.assert_close(same, rast[0], rtol=0, atol=1e-5)
    order = torch.randperm(len(tri), generator=torch.Generator().manual_seed(1))
    shuffled = rasterize(pos, tri[order], size).rast[0, ..., 3].long()
    names = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    assert torch.equal(names[shuffled], rast[0, ..., 3].long())


@pytest.mark.parametrize("scene", ["flat", "perspective"])
def test_gradients_by_finite_differences(scene):
    pos, tri, _ = SCENES[scene]()
    pos, tri, size = pos[:, :24].double(), tri[:8], (7, 9)

    def differentiable_part(pos):
        rast, rast_db = rasterize_ref(pos, tri, size)
        inside = (rast[..., :2].detach() > 1e-6).all(-1) & (rast[..., :2].detach().sum(-1) < 1 - 1e-6)
        return rast[..., :2] * inside[..., None], rast_db * inside[..., None] * 1e-2

    assert torch.autograd.gradcheck(differentiable_part, pos.requires_grad_(), atol=1e-5)


def test_each_output_alone_has_its_gradient():
    pos, tri, resolution = SCENES["perspective"]()
    for k in range(2):
        inputs = [x.clone().requires_grad_() for x in (pos, pos.double())]
        got, wanted = (
            torch.autograd.grad(function(x, tri, resolution)[k].square().sum(), x)[0]
            for function, x in zip((rasterize, rasterize_ref), inputs)
        )
        largest = float(wanted.abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=PARITY["rasterize"] * largest)


def test_depth_and_number_have_no_gradient():
    pos, tri, resolution = SCENES["perspective"]()
    rast = rasterize(pos.requires_grad_(), tri, resolution).rast
    assert not torch.autograd.grad(rast[..., 2:].sum(), pos)[0].any()


def test_second_derivatives():
    pos, tri, resolution = SCENES["sphere"]()
    results = []
    for function, x in ((rasterize, pos), (rasterize_ref, pos.double())):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x, tri, resolution).rast[..., :2].square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0].double())
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4 * float(results[1].abs().max()))


@pytest.mark.parametrize("scene", ["many small", "two images", "huge"])
def test_same_bits_for_any_number_of_threads(scene):
    results = by_threads(lambda: outputs_and_gradient(rasterize, *SCENES[scene]()))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("n_images", "n_vertices", "n_faces"), [(1, 5, 0), (1, 0, 0), (0, 4, 2), (3, 3, 0)])
def test_empty_meshes(n_images, n_vertices, n_faces):
    pos = torch.rand(n_images, n_vertices, 4, requires_grad=True)
    tri = torch.zeros(n_faces, 3, dtype=torch.int32)
    rast, rast_db = rasterize(pos, tri, (6, 7))
    assert rast.shape == rast_db.shape == (n_images, 6, 7, 4)
    assert not rast.any()
    (rast.sum() + rast_db.sum()).backward()
    assert pos.grad.shape == pos.shape
    assert not pos.grad.any()
    assert rasterize(pos.double(), tri, (6, 7)).rast.shape == rast.shape


def test_triangles_that_cover_nothing():
    line = torch.tensor([[-1.0, -1], [0, 0], [1, 1]])  # no area
    small = torch.tensor([[0.02, 0.02], [0.04, 0.02], [0.02, 0.04]])  # between the centres of 16 x 16 pixels
    beside = torch.tensor([[2.0, 2], [3, 2], [2, 3]])
    pos = torch.cat([flat(t) for t in (line, small, beside)] + [torch.tensor([[0.0, 0, -5, -1]] * 3)])
    tri = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [3, 3, 4], [0, 0, 0]], dtype=torch.int32)
    pos = pos.requires_grad_()
    rast, _ = rasterize(pos, tri, (16, 16))
    assert not rast.any()
    rast.sum().backward()
    assert not pos.grad.any()


def test_a_screen_that_is_much_larger_than_a_tile():
    pos = flat(torch.tensor([[-1.0, -1], [3, -1], [-1, 3]])).requires_grad_()
    rast, _ = rasterize(pos, torch.tensor([[0, 1, 2]], dtype=torch.int32), (3, 16384))
    assert (rast[..., 3] == 1).all()
    torch.testing.assert_close(rast[0, 0, :, 1], (torch.arange(16384) + 0.5) / 32768, rtol=0, atol=1e-6)
    rast[..., :2].square().sum().backward()
    assert pos.grad.isfinite().all()


def test_strided_inputs_are_read_right_and_left_alone():
    pos, tri, resolution = SCENES["perspective"]()
    wanted = outputs_and_gradient(rasterize, pos, tri, resolution)
    columns, rows = pos.transpose(1, 2).contiguous().transpose(1, 2), tri.T.contiguous().T
    before = columns.clone(), rows.clone()
    got = outputs_and_gradient(rasterize, columns, rows, resolution)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert torch.equal(columns, before[0])
    assert torch.equal(rows, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_vertices_that_are_no_numbers_are_refused(dtype, value):
    pos, tri, resolution = SCENES["flat"]()
    pos[0, 7, 2] = value
    with pytest.raises(ValueError, match="rasterize: pos must be finite, got NaN or infinity; check what produced it"):
        rasterize(pos.to(dtype), tri, resolution)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", [-1, 180, 2**31 - 1, -(2**31)])
def test_vertices_that_there_are_not_are_refused(dtype, index):
    pos, tri, resolution = SCENES["flat"]()
    tri[41, 1] = index
    with pytest.raises(ValueError, match=r"rasterize: tri must be in \[0, 180\), got an index outside"):
        rasterize(pos.to(dtype), tri, resolution)
    with pytest.raises(ValueError, match=r"fragments: tri must be in \[0, 180\)"):
        list(fragments(pos[0], tri, resolution))


def test_wrong_arguments_are_named():
    pos, tri = flat(torch.rand(4, 2)), torch.tensor([[0, 1, 2]], dtype=torch.int32)
    wrong = [
        ((pos[:, :3], tri, (4, 4)), ValueError, r"rasterize: pos must be of shape \[any, 4\]"),
        ((pos[None, None], tri, (4, 4)), ValueError, "rasterize: pos must be of shape"),
        ((pos.half(), tri, (4, 4)), TypeError, "rasterize: pos must be float32 or float64"),
        ((pos, tri.long(), (4, 4)), TypeError, "rasterize: tri must be int32, got torch.int64"),
        ((pos, tri[0], (4, 4)), ValueError, r"rasterize: tri must be of shape \[any, 3\]"),
        ((pos, tri, (4, 0)), ValueError, r"rasterize: resolution must be \(Hp, Wp\) of whole numbers from 1 to 16384"),
        ((pos, tri, (4, 4.0)), ValueError, "rasterize: resolution must be"),
        ((pos, tri, 4), ValueError, "rasterize: resolution must be"),
        ((pos, tri.to("meta"), (4, 4)), RuntimeError, "rasterize: tri must be on the device of pos"),
        ((pos.numpy(), tri, (4, 4)), TypeError, "rasterize: pos must be a tensor, got ndarray"),
    ]
    for arguments, error, sentence in wrong:
        with pytest.raises(error, match=sentence):
            rasterize(*arguments)
    with pytest.raises(ValueError, match="fragments: pos must be"):
        list(fragments(pos.double(), tri, (4, 4)))


def test_fragments_are_those_of_each_triangle_alone():
    pos, tri, resolution = SCENES["perspective"]()
    parts = list(fragments(pos[0], tri, resolution))
    face, pixel, values = (torch.cat(column) for column in zip(*parts))
    assert (face.diff() >= 0).all()
    for number in range(0, len(tri), 7):
        rast = rasterize(pos[0], tri[number : number + 1], resolution).rast[0].reshape(-1, 4)
        alone = rast[:, 3].nonzero()[:, 0]
        mine = face == number
        assert torch.equal(pixel[mine].sort().values, alone)
        torch.testing.assert_close(values[mine][pixel[mine].argsort()], rast[alone, :3], rtol=0, atol=1e-7)


def test_the_registered_form():
    pos, tri, _ = SCENES["perspective"]()
    torch.library.opcheck(torch.ops.mvdream_fast.rasterize.default, (pos.requires_grad_(), tri, 8, 9))


def test_compiles_in_one_graph():
    pos, tri, _ = SCENES["perspective"]()

    def loss(pos):
        return rasterize(pos * 1.5, tri, (16, 16)).rast[..., :2].square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = pos.clone().requires_grad_()
        results.append(torch.autograd.grad(function(x), x)[0])
    torch.testing.assert_close(*results)


def test_a_million_triangles():
    """A sheet of 708 x 708 squares over 512 x 512 pixels, no centre of which lies on a side of a square."""
    n = 708
    points, tri = sheet(n)
    rast, _ = rasterize(flat(points), tri, (512, 512))
    assert len(tri) > 1_000_000
    square = ((torch.arange(512) + 0.5) * n / 512).long()  # of a column, and of a row
    assert torch.equal((rast[0, ..., 3].long() - 1) % n**2, square * n + square[:, None])
