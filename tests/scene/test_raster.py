"""Images of meshes: where a point falls, how large a ball looks, and what pulls at its outline."""

import dataclasses
import math

import pytest
import torch

from mvdream_fast.camera import Cameras, evaluation_cameras, generate_rays, orbit_cameras
from mvdream_fast.ops import antialias, edge_topology
from mvdream_fast.scene.base import Lighting
from mvdream_fast.scene.raster import Body, clip_matrices, compose, see
from mvdream_fast.scene.shading import Shading
from mvdream_fast.scene.tets.lattice import Lattice, positions_of
from mvdream_fast.scene.tets.losses import vertex_normals
from mvdream_fast.scene.tets.marching import march

REACH, SIZE, RADIUS = 3**0.5, 96, 0.5


def ball_distances():
    return positions_of(Lattice(64), torch.device("cpu")).norm(dim=1) - RADIUS


def body_of(sdf):
    vertices, faces = march(Lattice(64), sdf, torch.zeros(len(sdf), 3))
    return Body(vertices, vertex_normals(vertices, faces), faces, edge_topology(faces))


def rendered(body, rays, background=None, lighting=None):
    seen = see(body, rays, REACH)
    background = torch.zeros(len(rays.rays_o), 3) if background is None else background
    return compose(seen, torch.ones(len(seen.pixel), 3), rays, background, lighting)


def apparent_radius(radius, distance, fovy, size):
    """Of a ball in the middle of an image, in pixels: the tangent of the cone that touches it."""
    return math.tan(math.asin(radius / distance)) * size / 2 / math.tan(fovy / 2)


def test_points_along_a_ray_fall_on_its_pixel():
    cameras, size = orbit_cameras(3, 25.0, 10.0, distance=2.5, fovy_deg=50.0), (6, 10)
    rays = generate_rays(cameras, *size)
    matrices = clip_matrices(cameras, size, REACH).double()
    for distance in (1.0, 2.5, 4.0):
        points = (rays.rays_o + distance * rays.rays_d).view(3, 60, 3).double()
        clip = points @ matrices[:, :, :3].transpose(1, 2) + matrices[:, None, :, 3]
        x, y, z = (clip[..., :3] / clip[..., 3:]).unbind(-1)
        column, row = ((x + 1) / 2 * 10 - 0.5).view(3, 6, 10), ((y + 1) / 2 * 6 - 0.5).view(3, 6, 10)
        torch.testing.assert_close(column, torch.arange(10.0).double().expand(3, 6, 10), atol=1e-4, rtol=0)
        torch.testing.assert_close(row, torch.arange(6.0).double()[:, None].expand(3, 6, 10), atol=1e-4, rtol=0)
        assert z.abs().max() < 1


def test_a_ball_has_its_size_depth_and_normals():
    rays = generate_rays(evaluation_cameras(4), SIZE, SIZE)
    body = body_of(ball_distances())
    out, seen = rendered(body, rays), see(body, rays, REACH)
    expected = math.pi * apparent_radius(RADIUS, 3, math.radians(40), SIZE) ** 2
    for opacity in out.opacity.view(4, -1):
        assert opacity.sum().item() == pytest.approx(expected, rel=0.005)
    assert out.depth.view(4, SIZE, SIZE)[:, SIZE // 2, SIZE // 2].tolist() == pytest.approx([2.5] * 4, abs=0.01)
    towards = seen.positions / seen.positions.norm(dim=1, keepdim=True)
    assert (seen.normals * towards).sum(1).min() > 0.99


def test_the_outline_is_pulled_as_the_area_grows():
    """d(area)/d(radius) of the image of a ball; its opacity has no gradient but that of the outline."""
    sdf = ball_distances().requires_grad_()
    rays = generate_rays(evaluation_cameras(1), SIZE, SIZE)
    (gradient,) = torch.autograd.grad(rendered(body_of(sdf), rays).opacity.sum(), sdf)

    def area(radius):
        return math.pi * apparent_radius(radius, 3, math.radians(40), SIZE) ** 2

    expected = (area(RADIUS + 1e-4) - area(RADIUS - 1e-4)) / 2e-4
    assert -gradient.sum().item() == pytest.approx(expected, rel=0.03)


def test_the_background_shows_where_there_is_nothing():
    rays = generate_rays(evaluation_cameras(2), 24, 24)
    background = torch.rand(len(rays.rays_o), 3, generator=torch.Generator().manual_seed(0))
    out = rendered(body_of(ball_distances()), rays, background)
    nothing, solid = out.opacity == 0, out.opacity == 1
    assert torch.equal(out.rgb[nothing], background[nothing])
    assert (out.rgb[solid] == 1).float().mean() > 0.9  # the rest lends to its neighbours at the outline
    assert nothing.any()
    assert solid.any()


def test_a_light_shades_by_the_cosine():
    rays = generate_rays(evaluation_cameras(1, elevation_deg=0.0), 33, 33)
    at_camera = Lighting(Shading(0.8, 0.2), rays.rays_o)
    out = rendered(body_of(ball_distances()), rays, lighting=at_camera)
    image = out.rgb[:, 0].view(33, 33)
    assert image[16, 16].item() == pytest.approx(1.0, abs=0.01)
    seen = see(body_of(ball_distances()), rays, REACH)
    way = torch.nn.functional.normalize(rays.rays_o[seen.pixel] - seen.positions, dim=1)
    expected = 0.8 * (seen.normals * way).sum(1).clamp(min=0) + 0.2
    solid = out.opacity[seen.pixel] == 1
    got = out.rgb[seen.pixel, 0]
    assert ((got - expected).abs()[solid] < 1e-5).float().mean() > 0.85


def test_plain_rays_are_unlit():
    rays = generate_rays(evaluation_cameras(2, elevation_deg=0.0), 33, 33)
    plain = torch.arange(2 * 33 * 33) >= 33 * 33
    out, dark, unlit = (
        rendered(body_of(ball_distances()), rays, lighting=lighting).rgb.reshape(2, -1)
        for lighting in (
            Lighting(Shading(0.8, 0.2), rays.rays_o, plain),
            Lighting(Shading(0.8, 0.2), rays.rays_o),
            None,
        )
    )
    assert torch.equal(out[0], dark[0])
    assert torch.equal(out[1], unlit[1])
    assert not torch.equal(dark[1], unlit[1])


def test_a_camera_in_the_middle_of_the_mesh_draws_what_is_before_it():
    c2w = torch.eye(4)[None]
    rays = generate_rays(Cameras(c2w, torch.tensor([1.0])), 8, 8)
    out = rendered(body_of(ball_distances()), rays)
    torch.testing.assert_close(out.depth, torch.full((64,), RADIUS), atol=0.01, rtol=0)


def test_rays_without_cameras_are_refused():
    rays = dataclasses.replace(generate_rays(evaluation_cameras(1), 4, 4), cameras=None)
    with pytest.raises(ValueError, match="rays must carry their cameras and size"):
        see(body_of(ball_distances()), rays, REACH)


def test_an_outline_that_is_hidden_blends_nothing():
    """A small ball behind a large one, and a small one before it, which has an outline of its own."""

    def two(y):
        points = positions_of(Lattice(64), torch.device("cpu"))
        small = (points - torch.tensor([0.0, y, 0.0])).norm(dim=1) - 0.15
        return body_of(torch.minimum(points.norm(dim=1) - 0.4, small))

    rays = generate_rays(evaluation_cameras(1, 0.0), SIZE, SIZE)
    alone = rendered(body_of(ball_distances() + 0.1), rays)
    assert (rendered(two(0.7), rays).opacity - alone.opacity).abs().max() < 1e-5
    before = see(two(-0.7), rays, REACH)
    colors = (before.positions[:, 1:2] < -0.5).float().expand(-1, 3)  # white before black
    out = compose(before, colors, rays, torch.zeros(len(rays.rays_o), 3))
    shown = math.pi * apparent_radius(0.15, 2.3, math.radians(40), SIZE) ** 2
    assert out.rgb[:, 0].sum().item() == pytest.approx(shown, rel=0.03)  # a ball of five cells is a little small
    assert ((out.rgb[:, 0] > 0) & (out.rgb[:, 0] < 1)).sum() > 20


def square(left, right):
    """A square sheet at z = 0 from x = left to x = right, in the plane that a camera above looks at."""
    vertices = torch.tensor([[left, -0.5, 0.0], [right, -0.5, 0], [right, 0.5, 0], [left, 0.5, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
    return Body(vertices, vertex_normals(vertices, faces), faces, edge_topology(faces))


def test_the_border_of_a_sheet_by_hand():
    """Twenty pixels a unit: the sides are 0.3 and 0.8 of a pixel beyond centres, in rows 10 to 29."""
    c2w = torch.eye(4)[None].clone()
    c2w[0, 2, 3] = 10.0
    rays = generate_rays(Cameras(c2w, torch.tensor([2 * math.atan(0.1)])), 40, 40)  # 40 pixels are 2 units there
    left = (9.5 + 0.3) / 20 - 1  # centre of pixel 9, and 0.3 on
    right = (29.5 + 0.8) / 20 - 1
    row = rendered(square(left, right), rays).opacity.view(40, 40)[20]
    # from pixel 10's centre it is 0.7 to the left side: pixel 9 is covered by 0.2; from 29's 0.8: pixel 30 by 0.3
    assert row[8:11].tolist() == pytest.approx([0, 0.2, 1], abs=1e-3)
    assert row[28:32].tolist() == pytest.approx([1, 1, 0.3, 0], abs=1e-3)


def test_gradients_of_outlines_are_those_of_differences():
    rays = generate_rays(orbit_cameras(2, 30.0), 24, 24)
    body = body_of(ball_distances())
    seen = see(body, rays, REACH)
    image = torch.rand(2, 24, 24, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rast, clip = seen.rast.double(), seen.clip.double().requires_grad_()
    weights = torch.rand(image.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(at):
        return (weights * antialias(image, rast, at, body.faces, body.topology)).sum()

    (gradient,) = torch.autograd.grad(value(clip), clip)
    moved = gradient.abs().sum(2).flatten().argsort(descending=True)[:12]
    for vertex in moved.tolist():
        for axis in range(2):
            step = torch.zeros_like(clip).view(-1, 4)
            step[vertex, axis] = 1e-7
            step = step.view(clip.shape)
            difference = (value(clip.detach() + step) - value(clip.detach() - step)) / 2e-7
            assert gradient.view(-1, 4)[vertex, axis].item() == pytest.approx(difference.item(), rel=1e-4, abs=1e-5)
