"""Signed distances to meshes, against shapes whose distance is a formula and triangles worked out by hand."""

import numpy as np
import pytest
import trimesh

from mvdream_fast.scene.mesh.distance import signed_distance, triangle_distance
from mvdream_fast.scene.mesh.mesh import Mesh


def of_trimesh(body):
    vertices = np.asarray(body.vertices, np.float32)
    return Mesh(vertices, np.asarray(body.faces, np.int32), np.ones_like(vertices))


def grid(resolution):
    axis = np.linspace(-1, 1, resolution + 1)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)


def test_distances_from_a_triangle_by_hand():
    corners = np.array([[0.0, 0, 0], [4, 0, 0], [0, 3, 0]])
    points = np.array([[1.0, 1, 2], [2, -5, 0], [-3, -4, 0], [4, 3, 0], [0.5, 0.5, 0]])
    # above it; beyond a side; beyond a corner; beyond the long side 3 x + 4 y = 12; in it
    expected = [2, 5, 5, (12 + 12 - 12) / 5, 0]
    found = triangle_distance(points, np.broadcast_to(corners, (5, 3, 3)))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_degenerate_triangle_is_its_longest_side():
    corners = np.array([[[0.0, 0, 0], [2, 0, 0], [1, 0, 0]]])
    np.testing.assert_allclose(triangle_distance(np.array([[1.0, 3, 4]]), corners), [5])


def test_a_box_of_twelve_large_triangles():
    sides = np.array([0.9, 1.1, 1.3])
    found = signed_distance(of_trimesh(trimesh.creation.box(sides)), 20, 1.0, 10.0)
    beyond = np.abs(grid(20)) - sides / 2
    expected = np.linalg.norm(beyond.clip(min=0), axis=-1) + beyond.max(-1).clip(max=0)
    assert np.array_equal(found < 0, expected < 0)
    # inside, the nearest of the sides is sometimes not among those with the nearest samples
    assert np.abs(found - expected).max() < 0.02
    np.testing.assert_allclose(found[expected > 0], expected[expected > 0], atol=2e-3)


def test_a_ball_is_cut_off_at_the_reach():
    ball = of_trimesh(trimesh.creation.icosphere(5, 0.6))
    found = signed_distance(ball, 24, 1.0, 0.2)
    expected = (np.linalg.norm(grid(24), axis=-1) - 0.6).clip(-0.2, 0.2)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_the_axes_are_x_y_z_and_a_part_within_another_is_inside():
    bodies = [trimesh.creation.box([0.4, 0.8, 1.2]), trimesh.creation.icosphere(3, 0.15)]
    bodies[0].apply_translation([0.5, 0.2, -0.3])
    bodies[1].apply_translation([0.5, 0.2, -0.3])
    found = signed_distance(of_trimesh(trimesh.util.concatenate(bodies)), 20, 1.0, 1.0)
    centre, half = np.array([0.5, 0.2, -0.3]), np.array([0.2, 0.4, 0.6])
    within = np.abs(grid(20) - centre) - half
    clear = np.abs(within).min(-1) > 1e-6
    assert np.array_equal((found < 0)[clear], (within < 0).all(-1)[clear])


@pytest.mark.parametrize("turn", [0.0, 0.7])
def test_a_torus_keeps_its_hole(turn):
    body = trimesh.creation.torus(0.5, 0.2, 64, 32)
    body.apply_transform(trimesh.transformations.rotation_matrix(turn, [1, 1, 0]))
    points = grid(16) @ trimesh.transformations.rotation_matrix(turn, [1, 1, 0])[:3, :3]
    expected = np.hypot(np.linalg.norm(points[..., :2], axis=-1) - 0.5, points[..., 2]) - 0.2
    found = signed_distance(of_trimesh(body), 16, 1.0, 2.0)
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_points_that_are_asked_for_are_those_of_the_grid():
    ball = of_trimesh(trimesh.creation.icosphere(3, 0.6))
    at = np.random.default_rng(0).integers(0, 17, (200, 3))
    found = signed_distance(ball, 16, 1.0, 0.3, at)
    np.testing.assert_array_equal(found, signed_distance(ball, 16, 1.0, 0.3)[tuple(at.T)])
    assert (np.abs(found) < 0.3).any()
    assert (found == np.float32(0.3)).any()
