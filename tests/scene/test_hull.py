"""The visual hull of views against solids whose hull is known."""

import numpy as np
import pytest
import torch

from mvdream_fast.camera import orbit_cameras
from mvdream_fast.core.errors import DivergedError
from mvdream_fast.scene.kinds import begun
from mvdream_fast.scene.mesh.hull import Hull, _closed
from mvdream_fast.scene.tets.config import TetsConfig

SIZE, FOVY, DISTANCE = 64, 40.0, 3.0


def views_of_a_ball(n_views: int, radius: float = 0.5, elevation: float = 15.0):
    """Silhouettes [V, 1, S, S] of a ball in the middle by the angle between each ray and the ray to its centre, and
    images: red where x > 0 is seen, else blue."""
    cameras = orbit_cameras(n_views, elevation, 0.0, 360.0, DISTANCE, FOVY)
    half = np.tan(np.radians(FOVY) / 2)
    at = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    x, y = np.meshgrid(at * half, -at * half)
    cosine = 1 / np.sqrt(1 + x**2 + y**2)
    there = cosine >= np.sqrt(1 - (radius / DISTANCE) ** 2)
    silhouettes = torch.from_numpy(there).float().expand(n_views, 1, SIZE, SIZE)
    images = []
    for c2w in cameras.c2w.double().numpy():
        rays = np.stack([x, y, -np.ones_like(x)], -1) / np.sqrt(1 + x**2 + y**2)[..., None] @ c2w[:3, :3].T
        along = -(rays @ c2w[:3, 3])
        depth = along - np.sqrt(np.maximum(radius**2 - DISTANCE**2 + along**2, 0))
        right = (c2w[:3, 3] + depth[..., None] * rays)[..., 0] > 0
        images.append(np.stack([right & there, 0 * there, ~right & there], 0))
    return torch.from_numpy(np.stack(images)).float(), silhouettes, cameras


def test_many_views_of_a_ball_leave_a_ball():
    mesh = Hull(*views_of_a_ball(16)).mesh(64)
    distance = np.linalg.norm(mesh.vertices, axis=1)
    level = np.abs(mesh.vertices[:, 2]) < 0.3  # above and below no view from the side can carve
    assert np.abs(distance[level] - 0.5).max() < 2 * DISTANCE * np.tan(np.radians(FOVY) / 2) / SIZE
    assert distance.min() > 0.45
    assert mesh.n_open_edges() == 0


def test_nothing_is_lost_of_what_all_views_see():
    """A hull holds the thing: every point of the ball, and none that one view does not cover."""
    hull = Hull(*views_of_a_ball(4))
    points = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    assert (hull.occupancy(0.45 * points) > 0.9).all()
    assert (hull.occupancy(torch.tensor([[0.0, 0.8, 0.0], [0.8, 0.0, 0.0], [0.0, 0.0, 0.9]])) == 0).all()
    assert (hull.occupancy(torch.tensor([[50.0, 0.0, 0.0], [0.0, -4.0, 1.0]])) == 0).all()  # behind cameras, outside


def test_it_is_where_the_cameras_say():
    """A view that sees only its left half, and its opposite its right one: the thing is on the first one's left."""
    images, silhouettes, cameras = views_of_a_ball(4, elevation=0.0)
    silhouettes = silhouettes.clone()
    silhouettes[0, :, :, SIZE // 2 :] = 0
    silhouettes[2, :, :, : SIZE // 2] = 0
    vertices = torch.from_numpy(Hull(images, silhouettes, cameras).mesh(64).vertices)
    right = cameras.c2w[0, :3, 0]
    assert (vertices @ right).max() < 0.05
    assert (vertices @ right).min() < -0.4


def test_its_colours_are_those_of_the_views():
    mesh = Hull(*views_of_a_ball(8)).mesh(64)
    clear = (np.abs(mesh.vertices[:, 0]) > 0.15) & (np.abs(mesh.vertices[:, 2]) < 0.3)
    red = mesh.vertices[clear, 0] > 0
    assert mesh.colors[clear][red, 0].min() > 0.8
    assert mesh.colors[clear][~red, 2].min() > 0.8
    assert mesh.colors[:, 1].max() == 0


def views_of_a_leg(shift: int):
    """Four level views of a ball on a stick, which half of them have so many pixels farther to the right."""
    images, silhouettes, cameras = views_of_a_ball(4, 0.3, elevation=0.0)
    silhouettes = silhouettes.clone()
    for k, by in enumerate((0, 0, shift, shift)):
        silhouettes[k, 0, SIZE // 2 : SIZE - 8, SIZE // 2 + by - 1 : SIZE // 2 + by + 1] = 1
    return Hull(images, silhouettes, cameras)


@pytest.mark.parametrize(("shift", "there"), [(0, True), (2, True), (3, True), (9, False)])
def test_what_is_thin_stays_where_views_disagree_by_few_pixels(shift, there):
    hull = views_of_a_leg(shift)
    lowest = hull.mesh(64).vertices[:, 2].min()
    assert (lowest < -0.7) == there
    assert (lowest > -0.55) != there  # the widened ball explains the top of it
    plain = hull.occupancy(torch.tensor([[0.0, 0.0, -0.5]]))
    assert (plain > 0.9) == (shift == 0)  # two pixels do not overlap


def test_each_view_sees_something_where_it_shows_the_thing():
    hull = views_of_a_leg(2)
    axis = torch.linspace(-1, 1, 65)
    points = torch.cartesian_prod(axis, axis, axis)
    inside = hull._inside(points)
    before = inside.min(0).values
    after = hull.explained(points, inside, before)
    assert (after >= before).all()
    added = after > before
    assert 0 < added.float().mean() < 0.001
    assert (points[added, 2] < -0.2).all()  # the ball, on which all agree, is as it was
    for occupancy, lost in ((before, True), (after, False)):
        unseen = (hull.silhouettes > 0.5) & ~hull._sees(points[occupancy > 0.4])
        assert unseen.any(1).flatten(1).any(1).any() == lost


def test_where_views_agree_nothing_is_added():
    hull = Hull(*views_of_a_ball(8))
    axis = torch.linspace(-1, 1, 65)
    points = torch.cartesian_prod(axis, axis, axis)
    inside = hull._inside(points)
    assert torch.equal(hull.explained(points, inside, inside.min(0).values), inside.min(0).values)


def views_of_a_ball_and_a_stick(gap: int):
    """Four level views of a ball, and of a stick so many pixels under it."""
    images, silhouettes, cameras = views_of_a_ball(4, 0.3, elevation=0.0)
    silhouettes = silhouettes.clone()
    below = int(silhouettes[0, 0].any(1).nonzero().max()) + 1 + gap
    silhouettes[:, 0, below : SIZE - 4, SIZE // 2 - 2 : SIZE // 2 + 2] = 1
    return Hull(images, silhouettes, cameras), below - gap


@pytest.mark.parametrize(("gap", "is_joined"), [(0, True), (2, True), (4, True), (6, False), (9, False)])
def test_a_gap_that_no_view_shows_clearly_is_closed(gap, is_joined):
    hull, row = views_of_a_ball_and_a_stick(gap)
    mesh = hull.mesh(64)
    below, middle = (DISTANCE * np.tan(np.radians(FOVY) / 2) * (1 - 2 * y / SIZE) for y in (row + gap, row + gap / 2))
    assert mesh.vertices[:, 2].min() < below - 0.2  # the stick is there
    assert (np.abs(mesh.vertices[:, 2] - middle) < 0.04).any() == is_joined


def test_closing_fills_gaps_and_leaves_the_rest():
    grid = torch.zeros(20, 20, 20)
    grid[4:8, 5:15, 5:15], grid[12:16, 5:15, 5:15] = 1, 0.75  # four cells between them
    assert torch.equal(_closed(grid, 1), grid)
    closed = _closed(grid, 2)
    assert (closed[8:12, 5:15, 5:15] == 0.75).all()
    closed[8:12, 5:15, 5:15] = 0
    assert torch.equal(closed, grid)
    edge = torch.zeros(9, 9, 9)
    edge[:, 3, 3] = 1
    assert torch.equal(_closed(edge, 3), edge)  # up to the border nothing is taken away, and nothing is added


def test_specks_that_stand_alone_are_dropped():
    images, silhouettes, cameras = views_of_a_ball(4, 0.5, elevation=0.0)
    silhouettes = silhouettes.clone()
    silhouettes[:, 0, 4:6, SIZE // 2 - 1 : SIZE // 2 + 1] = 1
    assert Hull(images, silhouettes, cameras).mesh(64).vertices[:, 2].max() < 0.7


def test_a_view_that_shows_nothing_is_passed_over():
    images, silhouettes, cameras = views_of_a_ball(4)
    silhouettes = silhouettes.clone()
    silhouettes[2] = 0
    assert len(Hull(images, silhouettes, cameras).mesh(32).faces) > 100


def test_nothing_at_all_is_refused():
    images, silhouettes, cameras = views_of_a_ball(4)
    with pytest.raises(DivergedError, match="the sampled views show nothing"):
        Hull(images, torch.zeros_like(silhouettes), cameras).mesh(32)


def test_tetrahedra_begin_from_it_in_its_colours():
    hull = Hull(*views_of_a_ball(8))
    tets = begun(TetsConfig(volume="coarse", background="grey", tets_resolution=64), hull)
    mesh, own = hull.mesh(64), tets.mesh()
    bounds = [np.stack([m.vertices.min(0), m.vertices.max(0)]) for m in (mesh, own)]
    np.testing.assert_allclose(*bounds, atol=0.03)
    red = own.colors[own.vertices[:, 0] > 0.3]
    assert red[:, 0].mean() > 0.85
    assert red[:, 2].mean() < 0.15
