"""Marching tetrahedra: sixteen cases by hand, shapes whose area and volume are known, gradients by differences."""

import itertools
import math

import pytest
import torch

from mvdream_fast.scene.tets.lattice import EDGES, Lattice, positions_of
from mvdream_fast.scene.tets.marching import TRIANGLES, march

CPU = torch.device("cpu")

# Outlines, counter-clockwise from outside, through the edges ij between points i and j, by which points are inside.
# Worked out on a tetrahedron with point 0 at the origin and 1, 2, 3 on the axes x, y, z.
OUTLINES = {
    "": "", "0": "01 02 03", "1": "01 13 12", "2": "02 12 23", "3": "03 23 13",
    "01": "02 03 13 12", "02": "03 01 12 23", "03": "01 02 23 13", "12": "01 13 23 02", "13": "12 01 03 23",
    "23": "02 12 13 03", "012": "03 13 23", "013": "02 23 12", "023": "01 12 13", "123": "01 03 02", "0123": "",
}  # fmt: skip


def outline(triangles) -> list[str]:
    """The edges around some triangles of one case, which share all of their other sides."""
    sides = [(t[i], t[(i + 1) % 3]) for t in triangles for i in range(3)]
    after = {a: b for a, b in sides if (b, a) not in sides}
    around = [min(after)] if after else []
    while after and (nxt := after[around[-1]]) != around[0]:
        around.append(nxt)
    return ["".join(map(str, EDGES[i])) for i in around]


def turned(around: list[str]) -> list[str]:
    """The same circle from its first edge in the order of the alphabet."""
    start = around.index(min(around)) if around else 0
    return around[start:] + around[:start]


@pytest.mark.parametrize("inside", OUTLINES)
def test_each_of_the_sixteen_cases(inside):
    case = sum(1 << int(i) for i in inside)
    assert turned(outline(TRIANGLES[case])) == turned(OUTLINES[inside].split())
    assert len(TRIANGLES[case]) == max(len(OUTLINES[inside].split()) - 2, 0)


def test_each_case_faces_outwards():
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    middles = torch.stack([(corners[i] + corners[j]) / 2 for i, j in EDGES])
    for case, triangles in enumerate(TRIANGLES):
        inside = torch.tensor([bool(case >> i & 1) for i in range(4)])
        for triangle in triangles:
            a, b, c = middles[list(triangle)]
            way = corners[~inside].mean(0) - corners[inside].mean(0)
            assert torch.linalg.cross(b - a, c - a) @ way > 0


def surface_of(sdf, resolution=64, deformation=None):
    lattice = Lattice(resolution)
    points = positions_of(lattice, CPU)
    return march(lattice, sdf(points), torch.zeros_like(points) if deformation is None else deformation)


def ball(points):
    return points.norm(dim=1) - 0.5


def box(points):
    """Of the sides 0.8, 1, 1.2; not a distance outside, but of the right sign and linear across the sides."""
    return (points.abs() - torch.tensor([0.4, 0.5, 0.6])).amax(1)


def torus(points):
    return torch.hypot(points[:, :2].norm(dim=1) - 0.5, points[:, 2]) - 0.2


def measures(surface) -> tuple[float, float]:
    """Area and volume; the volume is negative where triangles face inwards."""
    a, b, c = surface.vertices.double()[surface.faces.long()].unbind(1)
    normal = torch.linalg.cross(b - a, c - a) / 2
    return float(normal.norm(dim=1).sum()), float((a * normal).sum() / 3)


def assert_closed(surface) -> int:
    """Every side of a triangle is once that of one other, the other way round. Returns the Euler number."""
    sides = [tuple(pair) for t in surface.faces.tolist() for pair in zip(t, t[1:] + t[:1], strict=True)]
    assert len(set(sides)) == len(sides)
    assert {(b, a) for a, b in sides} == set(sides)
    assert sorted({i for side in sides for i in side}) == list(range(len(surface.vertices)))
    return len(surface.vertices) - len(sides) // 2 + len(surface.faces)


@pytest.mark.parametrize(
    ("shape", "area", "volume", "euler", "tolerance"),
    [
        (ball, math.pi, math.pi / 6, 2, 0.005),
        (torus, 4 * math.pi**2 * 0.5 * 0.2, 2 * math.pi**2 * 0.5 * 0.2**2, 0, 0.02),
        (box, 2 * (0.8 * 1 + 1 * 1.2 + 0.8 * 1.2), 0.8 * 1 * 1.2, 2, 0.04),  # 12 of edges, cut by half a spacing
    ],
)
def test_shapes_of_known_area_and_volume(shape, area, volume, euler, tolerance):
    surface = surface_of(shape)
    assert measures(surface) == pytest.approx((area, volume), rel=tolerance)
    assert assert_closed(surface) == euler


def test_a_finer_lattice_is_nearer():
    errors = [abs(measures(surface_of(ball, n))[1] - math.pi / 6) for n in (16, 32, 64)]
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


def test_where_the_distance_is_linear_the_surface_is_exact():
    surface = surface_of(lambda p: p @ torch.tensor([0.3, 0.5, -0.8]) - 0.07, 16)
    inner = (surface.vertices.abs() < 1 - 3 / 8).all(1)
    assert inner.sum() > 50
    off = surface.vertices[inner] @ torch.tensor([0.3, 0.5, -0.8]) - 0.07
    assert off.abs().max() < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_noise_makes_closed_surfaces_that_face_outwards(seed):
    lattice = Lattice(12)
    draw = torch.Generator().manual_seed(seed)
    sdf, deformation = torch.randn(lattice.n_points, generator=draw), torch.randn(lattice.n_points, 3, generator=draw)
    surface = march(lattice, sdf - 0.3, deformation)
    assert_closed(surface)
    assert measures(surface)[1] > 0


def test_what_is_inside_at_the_border_is_closed_there():
    surface = surface_of(lambda p: p.new_full((len(p),), -1.0), 8)
    assert assert_closed(surface) == 2
    assert surface.vertices.abs().max() < 1
    assert measures(surface)[1] > 0


def test_a_single_point_inside_is_wrapped_by_its_fourteen_neighbours():
    lattice = Lattice(8)
    centre = (positions_of(lattice, CPU) == 0).all(1)
    surface = march(lattice, torch.where(centre, -1.0, 1.0), torch.zeros(lattice.n_points, 3))
    assert (len(surface.vertices), len(surface.faces)) == (14, 24)  # a rhombic dodecahedron, its rhombi halved
    halves = sorted(tuple(v) for v in surface.vertices.mul(8).tolist())
    along = [tuple(s * 2.0 * (k == axis) for k in range(3)) for axis in range(3) for s in (1, -1)]
    assert halves == sorted([*along, *itertools.product((1.0, -1.0), repeat=3)])


def test_gradients_are_those_of_differences():
    lattice, draw = Lattice(6), torch.Generator().manual_seed(1)
    sdf = torch.randn(lattice.n_points, generator=draw, dtype=torch.float64)
    sdf = sdf.sign() * (0.2 + sdf.abs())  # none changes its side
    deformation = torch.randn(lattice.n_points, 3, generator=draw, dtype=torch.float64)
    assert len(march(lattice, sdf, deformation).faces) > 20

    def vertices(*inputs):
        return march(lattice, *inputs).vertices

    assert torch.autograd.gradcheck(vertices, (sdf.requires_grad_(), deformation.requires_grad_()))


def test_points_move_at_most_half_of_the_spacing():
    lattice = Lattice(8)
    points = positions_of(lattice, CPU)
    surface = surface_of(ball, 8, torch.full_like(points, 1e6))
    still = surface_of(ball, 8)
    torch.testing.assert_close(surface.vertices - still.vertices, torch.full_like(still.vertices, 0.125))


def test_without_a_crossing_there_is_nothing_but_a_graph():
    lattice = Lattice(8)
    sdf = torch.ones(lattice.n_points, requires_grad=True)
    surface = march(lattice, sdf, torch.zeros(lattice.n_points, 3))
    assert (surface.vertices.shape, surface.faces.shape) == ((0, 3), (0, 3))
    surface.vertices.sum().backward()
    assert sdf.grad is not None
    assert not sdf.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, d: (s[1:], d), "sdf must be"),
        (lambda s, d: (s, d[:, :2]), "deformation must be"),
        (lambda s, d: (s.index_fill(0, torch.tensor([3]), math.nan), d), "sdf must be finite"),
        (lambda s, d: (s, d.index_fill(0, torch.tensor([3]), math.inf)), "deformation must be finite"),
    ],
)
def test_what_fits_no_lattice_is_refused(change, message):
    lattice = Lattice(8)
    inputs = change(torch.ones(lattice.n_points), torch.zeros(lattice.n_points, 3))
    with pytest.raises(ValueError, match=message):
        march(lattice, *inputs)
