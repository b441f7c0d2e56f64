"""Normals and smoothness on two triangles, worked out by hand, and on shapes where they must vanish."""

import math

import pytest
import torch

from mvdream_fast.ops import edge_topology
from mvdream_fast.scene.tets.losses import laplacian, normal_consistency, unique_edges, vertex_normals

# Two right triangles at a right angle: A C B faces up, A B D faces x.
A, B, C, D = (0.0, 0, 0), (0.0, 1, 0), (1.0, 0, 0), (0.0, 0, 1)
VERTICES = torch.tensor([A, B, C, D], dtype=torch.float64)
FACES = torch.tensor([[0, 2, 1], [0, 1, 3]], dtype=torch.int32)
TETRAHEDRON = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], dtype=torch.int32)


def edges_of(faces):
    return unique_edges(faces, edge_topology(faces))


def test_normals_are_the_mean_of_the_faces_around():
    half = 0.5**0.5
    expected = torch.tensor([[half, 0, half], [half, 0, half], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(vertex_normals(VERTICES, FACES), expected)


def test_larger_faces_weigh_more():
    wide = VERTICES.clone()
    wide[2, 0] = 3.0  # three times the area: A's normal is (1, 0, 3)
    torch.testing.assert_close(vertex_normals(wide, FACES)[0], torch.tensor([1.0, 0, 3]).double() / 10**0.5)


def test_a_vertex_of_no_area_points_up():
    flat = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    normals = vertex_normals(flat, torch.tensor([[0, 1, 2]], dtype=torch.int32))
    assert normals.tolist() == [[0, 0, 1]] * 3
    normals.sum().backward()
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize(("faces", "n"), [(FACES, 5), (TETRAHEDRON, 6)])
def test_each_edge_is_there_once(faces, n):
    edges = edges_of(faces)
    expected = {tuple(sorted((t[i], t[i - 1]))) for t in faces.tolist() for i in range(3)}
    assert len(edges) == n
    assert {tuple(sorted(e)) for e in edges.tolist()} == expected


def test_normal_consistency_by_hand():
    # A and B agree; the other four edges join (1, 0, 1)/sqrt(2) with x or z
    loss = normal_consistency(vertex_normals(VERTICES, FACES), edges_of(FACES))
    assert loss.item() == pytest.approx(4 * (1 - 0.5**0.5) / 5)


def test_laplacian_by_hand():
    # 3 A - B - C - D = -(1, 1, 1); 3 B - A - C - D = (-1, 3, -1); 2 C - A - B = (2, -1, 0); 2 D - A - B = (0, -1, 2)
    loss = laplacian(VERTICES, edges_of(FACES))
    assert loss.item() == pytest.approx((math.sqrt(3) + math.sqrt(11) + 2 * math.sqrt(5)) / 4)


def test_a_plane_is_consistent_and_its_middle_smooth():
    n = 5
    x, y = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    vertices = torch.stack([x, y, 0 * x], -1).view(-1, 3).double()
    a = (torch.arange(n - 1)[:, None] * n + torch.arange(n - 1)).flatten()
    faces = torch.stack([a, a + n, a + n + 1, a, a + n + 1, a + 1], 1).view(-1, 3).int()
    edges = edges_of(faces)
    assert normal_consistency(vertex_normals(vertices, faces), edges).item() == pytest.approx(0, abs=1e-12)
    of_middle = vertices.clone().requires_grad_()
    laplacian(of_middle, edges).backward()
    bumped = vertices.clone()
    bumped[12, 2] = 1.0  # it has six neighbours, each of which it pulls up by 1
    assert laplacian(bumped, edges) > laplacian(vertices, edges) + 6 / 25


def test_gradients_are_those_of_differences():
    draw = torch.Generator().manual_seed(0)
    vertices = torch.randn(4, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    edges = edges_of(TETRAHEDRON)
    assert torch.autograd.gradcheck(lambda v: vertex_normals(v, TETRAHEDRON), vertices)
    assert torch.autograd.gradcheck(lambda v: normal_consistency(vertex_normals(v, TETRAHEDRON), edges), vertices)
    assert torch.autograd.gradcheck(lambda v: laplacian(v, edges), vertices)


def test_nothing_costs_nothing():
    nothing = torch.zeros(0, 3, requires_grad=True)
    faces = torch.zeros(0, 3, dtype=torch.int32)
    edges = edges_of(faces)
    loss = laplacian(nothing, edges) + normal_consistency(vertex_normals(nothing, faces), edges)
    loss.backward()
    assert loss.item() == 0
