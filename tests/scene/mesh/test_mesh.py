"""Iso-surface, automatic threshold and mesh files, on shapes whose answers are known."""

import io
import json
import struct

import numpy as np
import pytest
import torch
import trimesh
from reference.studio import fresh_asset

from mvdream_fast.core.color import to_linear
from mvdream_fast.core.errors import ArgumentError, DivergedError, OutputError
from mvdream_fast.distill.systems import mini
from mvdream_fast.rendering import mesh as parts
from mvdream_fast.rendering.software import NumpyRenderer
from mvdream_fast.scene.mesh import export
from mvdream_fast.scene.mesh.mesh import (
    Mesh,
    extract_mesh,
    sample_grid,
    silhouette_threshold,
    smooth_normals,
    trilinear,
)


def ball(points, radius=0.5):
    """Density 100 at the centre falling through 50 at `radius`."""
    return 100 * torch.sigmoid(40 * (radius - points.norm(dim=-1)))


def axis_colors(points):
    """Red where x > 0, green where y < 0 (the front), blue where z > 0."""
    return torch.stack([points[:, 0] > 0, points[:, 1] < 0, points[:, 2] > 0], dim=-1).float()


def ball_mesh(**options):
    return extract_mesh(ball, axis_colors, radius=1.0, threshold=50.0, resolution=64, **options)


def test_ball_has_its_size_and_faces_outwards():
    mesh = ball_mesh()
    radii = np.linalg.norm(mesh.vertices, axis=1)
    assert abs(radii.mean() - 0.5) < 2e-3
    assert radii.std() < 2e-3
    body = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert body.is_watertight
    assert body.volume == pytest.approx(4 / 3 * np.pi * 0.125, rel=0.02)  # negative if the faces were inside out


def test_grid_axes_are_x_y_z():
    grid = sample_grid(lambda p: p @ torch.tensor([1.0, 10.0, 100.0]), 5, 1.0)
    assert grid[4, 2, 2] == pytest.approx(1)
    assert grid[2, 4, 2] == pytest.approx(10)
    assert grid[2, 2, 4] == pytest.approx(100)
    points = torch.rand(50, 3) * 2 - 1
    torch.testing.assert_close(
        trilinear(grid, points, 1.0), points @ torch.tensor([1.0, 10.0, 100.0]), atol=1e-4, rtol=0
    )
    assert trilinear(grid, torch.tensor([[1.5, 0, 0]]), 1.0).item() == 0


def test_surfaces_are_closed_at_the_box():
    mesh = extract_mesh(lambda p: 10 - p[:, 0] * 0, axis_colors, radius=1.0, threshold=5.0, grid=slab_grid())
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=True).is_watertight
    assert np.abs(mesh.vertices).max() <= 1.1


def slab_grid():
    grid = np.zeros((16, 16, 16), dtype=np.float32)
    grid[:, :, :8] = 10
    return grid


def test_floaters_go_and_large_parts_stay():
    def field(points):
        speck = ball(points - torch.tensor([0.9, 0.9, 0.9]), 0.022)
        return ball(points, 0.3) + ball(points - torch.tensor([0.0, 0.0, 0.7]), 0.15) + speck

    with_all = extract_mesh(field, axis_colors, radius=1.0, threshold=40.0, resolution=96, min_part=0.0)
    mesh = extract_mesh(field, axis_colors, radius=1.0, threshold=40.0, resolution=96)
    assert n_parts(with_all) == 3
    assert n_parts(mesh) == 2
    assert mesh.vertices[:, 0].max() < 0.5


def n_parts(mesh):
    return len(trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).split())


def test_decimation_keeps_the_shape():
    mesh = ball_mesh(max_faces=500)
    assert len(mesh.faces) <= 500
    assert len(mesh.colors) == len(mesh.vertices)
    assert np.linalg.norm(mesh.vertices, axis=1) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("max_faces", [500, 4])
def test_decimation_reaches_very_small_numbers(max_faces):
    """Also of a large scene, where each edge costs the simplifier more than it allows at first."""

    def bumpy(points):
        x, y, z = (points / 100).unbind(1)
        return 10 * (1 - points.norm(dim=1) / 50) + 1.5 * torch.sin(9 * x) * torch.sin(9 * y) * torch.sin(11 * z)

    mesh = extract_mesh(bumpy, axis_colors, radius=100.0, threshold=0.0, resolution=32, max_faces=max_faces)
    assert 0 < len(mesh.faces) <= max_faces


@pytest.mark.parametrize("density", [0.0, 7.0])
def test_a_field_without_surface_says_so(density):
    with pytest.raises(DivergedError, match="no surface at 5"):
        extract_mesh(lambda p: torch.full(p.shape[:1], density), axis_colors, radius=1.0, threshold=5.0, resolution=8)


def test_a_field_that_is_not_finite_says_so():
    with pytest.raises(DivergedError, match="not finite"):
        extract_mesh(lambda p: p[:, 0] * float("nan"), axis_colors, radius=1.0, threshold=5.0, resolution=8)


@pytest.mark.parametrize("most", [1.0, 0.3])  # 0.3: fog throughout
def test_threshold_is_found_from_the_silhouette(most):
    axis = torch.linspace(-1, 1, 65)
    u, v = torch.meshgrid(axis, axis, indexing="ij")
    rays_o = torch.stack([u.flatten(), v.flatten(), torch.full((u.numel(),), 3.0)], dim=-1)
    rays_d = torch.tensor([[0.0, 0.0, -1.0]]).expand_as(rays_o)
    opacity = most * (rays_o[:, :2].norm(dim=-1) < 0.4)
    threshold, iou = silhouette_threshold(sample_grid(ball, 96, 1.0), 1.0, rays_o, rays_d, opacity)
    assert iou > 0.99
    expected = ball(torch.tensor([[0.4, 0, 0]])).item()
    assert threshold == pytest.approx(expected, rel=0.02)
    mesh = extract_mesh(ball, axis_colors, radius=1.0, threshold=threshold, resolution=64)
    assert np.linalg.norm(mesh.vertices, axis=1).mean() == pytest.approx(0.4, abs=0.02)


def test_glb_axes_colors_and_material():
    data = export.glb_bytes(ball_mesh())
    length = struct.unpack("<I", data[12:16])[0]
    tree = json.loads(data[20 : 20 + length])
    primitive = tree["meshes"][0]["primitives"][0]
    material = tree["materials"][primitive["material"]]
    assert material["doubleSided"] is True
    assert material["pbrMetallicRoughness"] == {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    assert set(primitive["attributes"]) == {"POSITION", "COLOR_0", "NORMAL"}
    color = tree["accessors"][primitive["attributes"]["COLOR_0"]]
    assert (color["componentType"], color["type"]) == (5126, "VEC4")
    (body,) = trimesh.load(io.BytesIO(data), file_type="glb", process=False).geometry.values()
    rgb = np.asarray(body.visual.vertex_attributes["color"])[:, :3] > 0.5
    x, y, z = body.vertices.T
    clear = (np.abs(body.vertices) > 0.02).all(axis=1)
    assert (rgb[clear, 0] == (x > 0)[clear]).all()
    assert (rgb[clear, 1] == (z > 0)[clear]).all()  # the front, green, looks to +Z in glTF
    assert (rgb[clear, 2] == (y > 0)[clear]).all()  # up is +Y


def test_linear_colors_match_the_standard():
    np.testing.assert_allclose(to_linear(np.array([0, 0.02, 0.5, 1])), [0, 0.0015479876, 0.2140411, 1], atol=1e-7)


@pytest.mark.parametrize(("ending", "up"), [("ply", "z"), ("ply", "y"), ("obj", "z"), ("obj", "y")])
def test_other_formats_keep_axes_and_srgb(tmp_path, ending, up):
    grey = Mesh(ball_mesh().vertices, ball_mesh().faces, np.full_like(ball_mesh().vertices, 0.5))
    export.save_mesh(grey, tmp_path / f"a.{ending}", up)
    body = trimesh.load(tmp_path / f"a.{ending}", force="mesh", process=False)
    expected = (
        grey.vertices if up == "z" else np.stack([grey.vertices[:, 0], grey.vertices[:, 2], -grey.vertices[:, 1]], 1)
    )
    np.testing.assert_allclose(body.vertices, expected, atol=1e-5)
    assert abs(int(body.visual.vertex_colors[0, 0]) - 128) <= 1


def test_bad_targets_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"\.glb, \.obj or \.ply, got \.stl"):
        export.save_mesh(ball_mesh(), tmp_path / "a.stl")
    with pytest.raises(OutputError, match="cannot write"):
        export.save_mesh(ball_mesh(), tmp_path / "missing" / "a.glb")


class Chair(torch.nn.Module):
    """A seat, a back and four thin legs as an analytic field; `soft` is how gradually its surfaces fade."""

    BOXES = (((0, 0, 0), (0.4, 0.4, 0.06)), ((0, 0.35, 0.4), (0.4, 0.06, 0.4)),
             *(((x, y, -0.35), (0.06, 0.06, 0.35)) for x in (-0.33, 0.33) for y in (-0.33, 0.33)))  # fmt: skip

    def __init__(self, soft):
        super().__init__()
        self.soft = soft

    def forward(self, positions):
        outside = torch.full(positions.shape[:1], 9.0)
        for centre, half in self.BOXES:
            distance = ((positions - torch.tensor(centre)).abs() - torch.tensor(half)).amax(-1)
            outside = torch.minimum(outside, distance)
        return 80 * torch.sigmoid(-outside / self.soft), torch.full((len(positions), 3), 0.5)


def test_an_asset_has_the_usual_number_of_triangles_unless_others_are_asked_for(tmp_path):
    asset = fresh_asset(mini())
    asset.representation.volume = Chair(0.012)
    whole = asset.mesh(max_faces=0)
    assert len(whole.faces) > 30_000
    mesh = asset.save_glb(tmp_path / "chair.glb")
    assert 29_000 < len(mesh.faces) <= 30_000
    assert len(trimesh.load(tmp_path / "chair.glb", force="mesh").faces) == len(mesh.faces)
    assert mesh.n_open_edges() == whole.n_open_edges() == 0


@pytest.mark.parametrize("soft", [0.005, 0.012])
def test_mesh_and_volume_have_the_same_silhouette(soft):
    asset = fresh_asset(mini())
    asset.representation.volume = Chair(soft)
    cameras = asset.orbit(
        6, elevation_deg=20.0, azimuth_start_deg=10.0
    )  # not the views that the threshold was found in
    volume = asset.render(cameras, 96).opacity > 0.5
    mesh = asset.mesh(96)
    plain = np.zeros_like(mesh.vertices)
    part = parts.Part(mesh.vertices, plain, np.zeros((len(plain), 4), np.float32), mesh.faces)
    drawn = NumpyRenderer().render(parts.Mesh((part,)), cameras.c2w.numpy(), cameras.fovy.numpy(), 96, 1)
    solid = torch.from_numpy(drawn[..., 3] > 127)
    iou = (solid & volume).sum((1, 2)) / (solid | volume).sum((1, 2))
    assert volume.float().mean() > 0.05
    assert iou.min() >= 0.95, iou


def test_open_edges_are_counted_and_seams_are_none():
    """A box of twelve triangles; without one it is open at three edges, with one turned over at as many."""
    body = trimesh.creation.box()
    vertices, faces = np.asarray(body.vertices, np.float32), np.asarray(body.faces, np.int32)
    colors = np.zeros_like(vertices)
    whole = Mesh(vertices, faces, colors)
    assert (whole.n_open_edges(), Mesh(vertices, faces[1:], colors).n_open_edges()) == (0, 3)
    turned = np.concatenate([faces[:1, ::-1], faces[1:]])
    assert Mesh(vertices, turned, colors).n_open_edges() == 3
    soup = Mesh(vertices[faces.reshape(-1)], np.arange(36, dtype=np.int32).reshape(12, 3), colors[faces.reshape(-1)])
    assert soup.n_open_edges() == 0
    assert whole.describe() == "8 vertices, 12 triangles; watertight"
    assert Mesh(vertices, faces[1:], colors).describe().endswith("; not watertight: it is open at 3 edges")


def test_normals_by_hand():
    """A vertex of a square and of a triangle twice as large that stands on it; one of no triangle looks up."""
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 2], [9, 9, 9]], np.float32)
    faces = np.array([[0, 1, 2], [0, 3, 1]], np.int32)  # areas 1/2, upwards, and 1, to +y
    normals = smooth_normals(vertices, faces)
    expected = [[0, 2, 1], [0, 2, 1], [0, 0, 1], [0, 1, 0], [0, 0, 1]]
    expected = np.array(expected) / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(normals, expected, atol=1e-6)
