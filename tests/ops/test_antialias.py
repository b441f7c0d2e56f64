"""antialias: by hand, exact areas and their gradients by sub-pixel shifts, parity with plain torch, topology."""

import math

import pytest
import torch
from reference.meshes import box, flat, perspective, sheet, sphere
from scipy.spatial import ConvexHull
from threads import by_threads
from tolerances import PARITY

from mvdream_fast.ops.antialias import _forward, antialias, antialias_ref, edge_topology, edge_topology_ref
from mvdream_fast.ops.rasterize import rasterize

SQUARE = torch.tensor([[0, 1, 2], [2, 1, 3]], dtype=torch.int32)


def scene(n_images=2, size=(40, 47), n_channels=3):
    """color, rast, pos, tri of two spheres, one within sight of the other's edge, as one mesh."""
    vertices, tri = sphere(8, 11)
    points = torch.cat([vertices * 0.6 + torch.tensor([0.4, 0.07, 0.7]), vertices * 0.8 - torch.tensor([0.3, 0.1, 0])])
    tri = torch.cat([tri, tri + len(vertices)])
    pos = torch.stack([perspective(points + 0.03 * i) for i in range(n_images)])
    generator = torch.Generator().manual_seed(0)
    color = torch.rand(n_images, *size, n_channels, generator=generator)
    return color, rasterize(pos, tri, size).rast, pos, tri


def outputs_and_gradients(function, color, rast, pos, tri, *more):
    inputs = [x.detach().clone().requires_grad_() for x in (color, pos)]
    out = function(inputs[0], rast, inputs[1], tri, *more)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, cotangent)


def white(pos, tri, size):
    """The picture of a white mesh on black, with its outlines blended, summed up: an area in pixels."""
    rast = rasterize(pos, tri, size).rast.detach()
    return antialias((rast[..., 3:] > 0).to(pos.dtype), rast, pos, tri).sum()


def square(low, high):
    """A square of corners [2] in pixels of 16 x 16."""
    x = torch.stack([low, high]) / 8 - 1
    corners = torch.stack([torch.stack([x[i, 0], x[j, 1]]) for j in range(2) for i in range(2)])
    return flat(corners)


def test_by_hand():
    # A square from (3.7, 3.2) to (10.6, 10.2) on 16 x 16 pixels: the centres 4 to 10 across and 3 to 9 up are inside.
    pos = square(torch.tensor([3.7, 3.2]), torch.tensor([10.6, 10.2]))
    rast = rasterize(pos, SQUARE, (16, 16)).rast
    out = antialias((rast[..., 3:] > 0).float(), rast, pos, SQUARE)[0, ..., 0]
    # Pixel 3 has 0.3 of its width inside, pixel 10 has 0.6; row 3 has 0.8, row 10 has 0.2.
    torch.testing.assert_close(out[6, 2:6], torch.tensor([0, 0.3, 1, 1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(out[6, 9:12], torch.tensor([1, 0.6, 0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(out[2:5, 6], torch.tensor([0, 0.8, 1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(out[8:12, 6], torch.tensor([1, 1, 0.2, 0]), rtol=0, atol=1e-5)


def test_the_gradient_of_an_edge_by_hand():
    # Row j moves the upper corner by (j + 0.5 - 4) / 8 of its own way, the lower one by the rest; in row 4, too, where
    # the pixel at the edge shows the other triangle.
    pos = square(torch.tensor([4.0, 4.0]), torch.tensor([10.3, 12.0])).requires_grad_()
    rast = rasterize(pos, SQUARE, (16, 16)).rast.detach()
    color = (rast[..., 3:] > 0).float()
    out = antialias(color, rast, pos, SQUARE)
    (d_pos,) = torch.autograd.grad(out[:, 4:12, 6:].sum(), pos)
    rows = (torch.arange(4, 12) + 0.5 - 4) / 8
    moved = torch.stack([torch.zeros(()), (1 - rows).sum(), torch.zeros(()), rows.sum()])
    torch.testing.assert_close(d_pos[:, 0] / 8, moved, rtol=0, atol=1e-4)
    torch.testing.assert_close(d_pos[:, 3], -d_pos[:, 0] * pos[:, 0].detach(), rtol=0, atol=1e-3)
    assert not d_pos[:, 2].any()


def test_areas_of_squares_are_exact_but_for_their_corners():
    """An eighth of a pixel at each, and half of one where the diagonal ends: there a pixel at one triangle's outline
    may show the other, and is left as it is."""
    for shift in torch.rand(12, 2, generator=torch.Generator().manual_seed(0)):
        pos = square(shift + 3, shift + torch.tensor([9.7, 11.4]))
        assert float(white(pos, SQUARE, (16, 16))) == pytest.approx(6.7 * 8.4, abs=1.5)


@pytest.mark.parametrize("angle", [0.0, 0.3, 0.785])
def test_areas_and_their_gradients_by_sub_pixel_shifts(angle):
    """The mean over all places in a pixel is the area, and its gradient by the size the area's derivative, but for the
    few pixels at the ends of the diagonal."""
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    areas, slopes = [], []
    for i in range(100):
        half = torch.tensor(0.55, dtype=torch.float64, requires_grad=True)
        corners = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]], dtype=torch.float64) @ turn.T * half
        shift = torch.tensor([(i % 10 + 0.3) / 10, (i // 10 + 0.6) / 10], dtype=torch.float64) * 2 / 160
        area = white(flat(corners + shift).float(), SQUARE, (160, 160)).double()
        areas.append(area.item())
        slopes.append(torch.autograd.grad(area, half)[0].item())
    exact, exact_slope = (2 * 0.55 * 80) ** 2, 2 * (2 * 80) ** 2 * 0.55
    assert sum(areas) / 100 == pytest.approx(exact, rel=2e-3)
    assert sum(slopes) / 100 == pytest.approx(exact_slope, rel=1e-2)


def test_a_turned_box_pulls_its_outline():
    """In perspective: the outline is the convex hull of the corners, whose area has a derivative by the box's size."""
    vertices, tri = box()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)))[0]

    def corners(half):
        return perspective((vertices.to(half.dtype) @ turn.to(half.dtype).T) * half)

    def hull(half):
        pos = corners(torch.tensor(half, dtype=torch.float64))
        return ConvexHull((pos[:, :2] / pos[:, 3:] * 80).numpy()).volume  # of a polygon its area

    areas, slopes = [], []
    for i in range(36):
        half = torch.tensor(0.55, requires_grad=True)
        pos = corners(half)
        shift = torch.tensor([(i % 6 + 0.2) / 6, (i // 6 + 0.4) / 6, 0, 0]) * 2 / 160
        area = white(pos + shift * pos[:, 3:], tri, (160, 160))
        areas.append(area.item())
        slopes.append(torch.autograd.grad(area, half)[0].item())
    assert sum(areas) / 36 == pytest.approx(hull(0.55), rel=2e-3)
    assert sum(slopes) / 36 == pytest.approx((hull(0.5501) - hull(0.5499)) / 2e-4, rel=2e-2)


@pytest.mark.parametrize("n_rings", [12, 100])
def test_a_ball_pulls_its_outline_however_fine_it_is(n_rings):
    """Of the finer one hardly any pixel shows a triangle that has an edge in the outline."""
    vertices, tri = sphere(n_rings, 2 * n_rings)

    def exact(radius):
        return math.pi * (2 * math.tan(math.asin(radius / 3)) * 32) ** 2

    areas, slopes = [], []
    for i in range(9):
        radius = torch.tensor(0.9, requires_grad=True)
        pos = perspective(vertices * radius)
        shift = torch.tensor([(i % 3 + 0.2) / 3, (i // 3 + 0.4) / 3, 0, 0]) * 2 / 64
        area = white(pos + shift * pos[:, 3:], tri, (64, 64))
        areas.append(area.item())
        slopes.append(torch.autograd.grad(area, radius)[0].item())
    smaller = 2e-2 if n_rings == 12 else 1e-3  # a ball of flat sides is
    assert sum(areas) / 9 == pytest.approx(exact(0.9), rel=1e-3 + smaller)
    assert sum(slopes) / 9 == pytest.approx((exact(0.9001) - exact(0.8999)) / 2e-4, rel=1e-2 + smaller)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_of_several_outlines_between_two_pixels_the_nearest_counts(order):
    # Squares whose right sides are 0.3 and, farther away, 0.6 of a pixel right of the centre of pixel 6: as if there
    # were the first alone.
    squares = [square(torch.tensor([2.0, 2.0]), torch.tensor([right, 13.0])) for right in (6.8, 7.1)]
    squares[1][:, 2] = 0.5
    pos, tri = torch.cat([squares[i] for i in order]), torch.cat([SQUARE, SQUARE + 4])
    rast = rasterize(pos, tri, (16, 16)).rast
    out = antialias((rast[..., 3:] > 0).float(), rast, pos, tri)[0, 3:12, 5:8, 0]
    torch.testing.assert_close(out, torch.tensor([1, 0.8, 0]).expand(9, 3), rtol=0, atol=1e-5)


def test_parity():
    color, rast, pos, tri = scene()
    topology = edge_topology(tri)
    got = outputs_and_gradients(antialias, color, rast, pos, tri)
    wide = color.double(), rast.double(), pos.double(), tri, topology
    wanted = outputs_and_gradients(lambda *arguments: antialias_ref(*arguments)[0], *wide)
    assert (wanted[0] != color).any(-1).sum() > 100
    kept = _forward(color, rast, pos, tri, topology)[1], antialias_ref(*wide)[1]
    assert torch.equal(*kept)
    for name, a, b in zip(("antialias", *["antialias.gradients"] * 2), got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=PARITY[name], atol=PARITY[name] * max(1, float(b.abs().max())))


def test_gradients_of_the_reference_by_finite_differences():
    color, rast, pos, tri = scene(1, (13, 15), 2)
    topology = edge_topology(tri)

    def function(color, pos):
        return antialias_ref(color, rast.double(), pos, tri, topology)[0]

    inputs = [x.double().requires_grad_() for x in (color, pos)]
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12, fast_mode=True)


def test_second_derivatives():
    color, rast, pos, tri = scene(1)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).clone().requires_grad_() for x in (color, pos)]
        out = antialias(inputs[0], rast.to(dtype), inputs[1], tri)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), inputs))
    for got, wanted in zip(*results):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_colours_of_one_kind_stay_and_none_is_lost():
    _, rast, pos, tri = scene()
    same = antialias(torch.full((2, 40, 47, 2), 0.7), rast, pos, tri)
    torch.testing.assert_close(same, torch.full_like(same, 0.7), rtol=0, atol=1e-6)
    out = antialias((rast[..., 3:] > 0).float(), rast, pos, tri)
    assert out.min() >= 0
    assert out.max() <= 1
    assert ((out > 0) & (out < 1)).sum() > 50


def test_inner_edges_of_a_sheet_are_no_outline():
    points, tri = sheet(7, 0.4)
    pos = flat(points * 0.8)
    rast = rasterize(pos, tri, (50, 50)).rast
    color = torch.rand(1, 50, 50, 3, generator=torch.Generator().manual_seed(0))
    changed = (antialias(color, rast, pos, tri) != color).any(-1)[0]
    assert changed.any()
    assert not changed[8:42, 8:42].any()


def test_an_edge_that_folds_back_behind_the_camera_is_an_outline():
    """Two walls that meet at an edge in front of the camera, one of them running back past it on the same side."""
    corners = torch.tensor([[0.0, -9, 1], [0, 9, 1], [6, 0, 3], [6, 0, -4]])  # x, y and how far in front
    pos = torch.stack([corners[:, 0], corners[:, 1], corners[:, 2] * 0 + 0.1, corners[:, 2]], -1)
    tri = torch.tensor([[0, 1, 2], [1, 0, 3]], dtype=torch.int32)
    rast = torch.zeros(1, 8, 8, 4)
    rast[:, :, 4:, 3] = 1
    color = torch.rand(1, 8, 8, 1, generator=torch.Generator().manual_seed(0))
    crossed = pos.clone()
    crossed[:2, 0] = 0.05  # the edge lies at x = 4.2 pixels
    assert (antialias(color, rast, crossed, tri) != color)[0, :, 3:5].any(-1).any(-1).all()
    other_side = crossed.clone()
    other_side[3, 0] = -6  # now the second wall runs back on the other side: the edge is an inner one
    assert torch.equal(antialias(color, rast, other_side, tri), color)


def test_topology_by_hand():
    # Two triangles at an edge; a third on its own; three at one edge; a corner named twice.
    assert edge_topology(SQUARE).tolist() == [[3, -1, -1], [-1, -1, 0]]
    assert edge_topology(SQUARE[:1]).tolist() == [[-1, -1, -1]]
    fan = torch.tensor([[0, 1, 2], [1, 0, 3], [0, 1, 4]], dtype=torch.int32)
    assert edge_topology(fan).tolist() == [[-1] * 3] * 3
    assert edge_topology(torch.tensor([[0, 0, 1], [0, 1, 0]], dtype=torch.int32)).min() >= -1
    assert edge_topology(torch.zeros(0, 3, dtype=torch.int32)).shape == (0, 3)


@pytest.mark.parametrize("highest", [3, 30, 2**31 - 1])
def test_topology_of_any_numbers_is_that_of_plain_torch(highest):
    generator = torch.Generator().manual_seed(0)
    for n_faces in (0, 1, 200):
        tri = torch.randint(-highest - 1, highest, (n_faces, 3), generator=generator).int()
        tri[: n_faces // 3] = tri[n_faces // 3 : n_faces // 3 * 2].flip(1)  # some share their edges
        assert torch.equal(edge_topology(tri), edge_topology_ref(tri))
        columns = tri.T.contiguous().T
        assert torch.equal(edge_topology(columns), edge_topology_ref(tri))


@pytest.mark.parametrize("mesh", [box(), sphere(7, 9)])
def test_topology_of_closed_surfaces(mesh):
    _, tri = mesh
    across = edge_topology(tri)
    faces = {frozenset(f): f for f in map(tuple, tri.tolist())}
    for face, beyond in zip(tri.tolist(), across.tolist()):
        for k, other in enumerate(beyond):
            assert other not in face
            assert frozenset((face[(k + 1) % 3], face[(k + 2) % 3], other)) in faces


@pytest.mark.parametrize("n_images", [1, 2])
def test_same_bits_for_any_number_of_threads(n_images):
    results = by_threads(lambda: outputs_and_gradients(antialias, *scene(n_images)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("n_images", "n_channels", "n_faces"), [(0, 3, 2), (1, 0, 2), (1, 3, 0)])
def test_nothing(n_images, n_channels, n_faces):
    color = torch.rand(n_images, 3, 5, n_channels, requires_grad=True)
    pos = torch.rand(n_images, 4, 4, requires_grad=True)
    out = antialias(color, torch.zeros(n_images, 3, 5, 4), pos, torch.zeros(n_faces, 3, dtype=torch.int32))
    assert torch.equal(out, color)
    out.sum().backward()
    assert torch.equal(color.grad, torch.ones_like(color))
    assert not pos.grad.any()


def test_strided_inputs_and_a_topology_that_is_given():
    color, rast, pos, tri = scene()
    wanted = outputs_and_gradients(antialias, color, rast, pos, tri)
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (color, rast, pos, tri, edge_topology(tri))]
    got = outputs_and_gradients(antialias, *strided)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_that_there_are_not_are_refused(dtype):
    color, rast, pos, tri = (x.to(dtype) if x.is_floating_point() else x for x in scene())
    n_vertices = pos.shape[1]
    sentence = f"antialias: rast must be of a mesh with {len(tri)} triangles and {n_vertices} vertices"
    edge = (rast[0, 1:-1, 1:-1, 3] == 0).nonzero()[0] + 1
    for bad in (len(tri) + 1, -1, math.nan):
        broken = rast.clone()
        broken[0, edge[0], edge[1], 3] = bad
        with pytest.raises(ValueError, match=sentence):
            antialias(color, broken, pos, tri)
    broken, seen = tri.clone(), int(rast[0, :, :, 3][rast[0, :, :, 3] > 0][0]) - 1
    broken[seen] = n_vertices
    with pytest.raises(ValueError, match=sentence):
        antialias(color, rast, pos, broken)
    with pytest.raises(ValueError, match=sentence):
        antialias(color, rast, pos, tri, torch.full_like(tri, n_vertices))


def test_wrong_arguments_are_named():
    color, rast, pos, tri = scene()
    wrong = [
        ((color[0], rast, pos, tri), ValueError, "antialias: color must be of shape"),
        ((color, rast[..., :3], pos, tri), ValueError, "antialias: rast must be of shape"),
        ((color, rast, pos[0], tri), ValueError, r"antialias: pos must be of shape \[2, any, 4\]"),
        ((color, rast, pos.double(), tri), TypeError, "antialias: pos must be torch.float32 like rast"),
        ((color, rast, pos, tri.long()), TypeError, "antialias: tri must be int32"),
        ((color, rast, pos, tri, tri[:1]), ValueError, "antialias: topology must be of shape"),
        ((color, rast, pos, tri, tri.long()), TypeError, "antialias: topology must be int32"),
    ]
    for arguments, error, sentence in wrong:
        with pytest.raises(error, match=sentence):
            antialias(*arguments)


def test_the_registered_form():
    color, rast, pos, tri = scene(1, (9, 11))
    inputs = (color.requires_grad_(), rast, pos.requires_grad_(), tri, edge_topology(tri))
    torch.library.opcheck(torch.ops.mvdream_fast.antialias.default, inputs)
