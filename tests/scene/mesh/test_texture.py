"""Baking: texels show the point of the surface that they lie on, seams are padded, and the GLB carries all of it."""

import dataclasses
import io
import json
import struct

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from mvdream_fast.core.errors import OutputError
from mvdream_fast.rendering import mesh_file
from mvdream_fast.scene.mesh import export, texture
from mvdream_fast.scene.mesh.mesh import Mesh, extract_mesh


def ball(points):
    return 100 * torch.sigmoid(40 * (0.5 - points.norm(dim=-1)))


def position_colors(points):
    """A colour for every place: so a texel tells where on the surface it was taken."""
    return (points + 1) / 2


@pytest.fixture(scope="module")
def baked() -> Mesh:
    mesh = extract_mesh(ball, position_colors, radius=1.0, threshold=50.0, resolution=24)
    return texture.bake_texture(mesh, position_colors, 256)


def sampled(mesh: Mesh, uvs: np.ndarray) -> np.ndarray:
    """The texture's nearest texels at uvs [n, 2], in [0, 1]."""
    size = len(mesh.texture)
    x, y = np.clip((uvs * size).astype(int), 0, size - 1).T
    return mesh.texture[size - 1 - y, x] / 255


def test_every_vertex_finds_its_own_place_in_the_sheet(baked):
    assert baked.uvs.min() >= 0
    assert baked.uvs.max() <= 1
    error = np.abs(sampled(baked, baked.uvs) - (baked.vertices + 1) / 2)
    assert error.max() < 0.03  # a texel or two of a 0.5 ball


def test_points_within_triangles_find_theirs_too(baked):
    weights = np.random.default_rng(0).dirichlet((1, 1, 1), len(baked.faces))[:, :, None]
    uvs = (weights * baked.uvs[baked.faces]).sum(axis=1)
    points = (weights * baked.vertices[baked.faces]).sum(axis=1)
    assert np.abs(sampled(baked, uvs) - (points + 1) / 2).max() < 0.03


def test_the_surface_is_the_same(baked):
    plain = extract_mesh(ball, position_colors, radius=1.0, threshold=50.0, resolution=24)
    assert len(baked.faces) == len(plain.faces)
    assert trimesh.Trimesh(baked.vertices, baked.faces).area == pytest.approx(
        trimesh.Trimesh(plain.vertices, plain.faces).area, rel=1e-5
    )
    out = baked.vertices / np.linalg.norm(baked.vertices, axis=1, keepdims=True)
    assert (baked.normals * out).sum(axis=1).min() > 0.95


def test_seams_are_padded():
    sheet = np.zeros((9, 9, 3), dtype=np.uint8)
    covered = np.zeros((9, 9), dtype=bool)
    covered[2:4, 2:4], covered[7, 7] = True, True
    sheet[2:4, 2:4], sheet[7, 7] = (255, 0, 0), (0, 0, 255)
    spread = texture.spread_over_gaps(sheet, covered)
    assert (spread[0, 0] == (255, 0, 0)).all()
    assert (spread[8, 8] == (0, 0, 255)).all()
    assert set(map(tuple, spread.reshape(-1, 3))) == {(255, 0, 0), (0, 0, 255)}
    assert not texture.spread_over_gaps(sheet * 0, covered & False).any()


def test_texels_by_hand():
    vertices = np.array([[0, 0, 0], [4, 0, 0], [0, 4, 0]], dtype=np.float32)
    faces = np.array([[0, 1, 2]], dtype=np.int32)
    uvs = np.array([[0, 0], [1, 0], [0, 1]], dtype=np.float32)
    positions, covered = texture.texel_positions(vertices, faces, uvs, 4)
    # Row 0 is the top, v = 1; centres on the long edge, a right one, belong to what lies beyond.
    assert (covered == np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=bool)).all()
    np.testing.assert_allclose(positions[3, 1], [1.5, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(positions[1, 0], [0.5, 2.5, 0], atol=1e-6)
    assert not positions[~covered].any()


def test_a_triangle_without_area_is_no_texel():
    vertices = np.zeros((3, 3), dtype=np.float32)
    uvs = np.full((3, 2), 0.5, dtype=np.float32)
    _, covered = texture.texel_positions(vertices, np.array([[0, 1, 2]]), uvs, 8)
    assert not covered.any()


def test_glb_carries_texture_uvs_normals_and_a_matt_material(baked):
    data = export.glb_bytes(baked)
    tree = json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])
    primitive = tree["meshes"][0]["primitives"][0]
    assert {"POSITION", "NORMAL", "TEXCOORD_0"} <= set(primitive["attributes"])
    material = tree["materials"][primitive["material"]]
    assert material["doubleSided"] is True
    pbr = material["pbrMetallicRoughness"]
    assert (pbr["metallicFactor"], pbr["roughnessFactor"]) == (0.0, 1.0)
    assert "baseColorTexture" in pbr
    assert all("uri" not in image for image in tree["images"])
    (body,) = trimesh.load(io.BytesIO(data), file_type="glb", process=False).geometry.values()
    picture = np.asarray(body.visual.material.baseColorTexture.convert("RGB"))
    assert (picture == baked.texture).all()
    # glTF's (x, y, z) is the world's (x, -z, y): up is +Y, the front +Z. The uvs come back from the lower left.
    world = body.vertices @ export.Y_UP
    np.testing.assert_allclose(world, baked.vertices, atol=1e-6)
    np.testing.assert_allclose(body.visual.uv, baked.uvs, atol=1e-6)


def test_a_ply_keeps_vertex_colors_and_normals_and_says_what_it_cannot_hold(baked, tmp_path):
    said = []
    export.save_mesh(baked, tmp_path / "a.ply", "z", said.append)
    assert said == ["a.ply: PLY holds no texture, only its colours at the vertices; GLB and OBJ hold it"]
    body = trimesh.load(tmp_path / "a.ply", process=False)
    assert np.abs(body.visual.vertex_colors[:, :3] / 255 - (baked.vertices + 1) / 2).max() < 0.01
    np.testing.assert_allclose(body.vertex_normals, baked.normals, atol=1e-5)
    head = (tmp_path / "a.ply").read_bytes().split(b"end_header")[0].decode()
    assert "comment PLY holds no texture" in head
    plain = dataclasses.replace(baked, texture=None, uvs=None)
    export.save_mesh(plain, tmp_path / "b.ply", "z", said.append)
    assert len(said) == 1
    assert b"no texture" not in (tmp_path / "b.ply").read_bytes()


QUAD = Mesh(  # stands upright, with its front to -Y; the sheet is red over blue, green over white
    vertices=np.array([[0, 0, 0], [1, 0, 0], [1, 0, 2], [0, 0, 2]], np.float32),
    faces=np.array([[0, 1, 2], [0, 2, 3]], np.int32),
    colors=np.full((4, 3), 0.5, np.float32),
    normals=np.tile(np.array([[0, -1, 0]], np.float32), (4, 1)),
    uvs=np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32),
    texture=np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8),
)


@pytest.mark.parametrize(
    ("up", "rows"),
    [
        ("z", ["v 0 0 0", "v 1 0 0", "v 1 0 2", "v 0 0 2", "vn 0 -1 0"]),
        ("y", ["v 0 0 0", "v 1 0 0", "v 1 2 0", "v 0 2 0", "vn 0 0 1"]),
    ],
)
def test_an_obj_by_hand(up, rows):
    files = export.mesh_files(QUAD, "my chair.obj", up)
    assert list(files) == ["my chair.obj", "my_chair_texture.png", "my_chair.mtl"]
    found = [
        " ".join(f"{float(x):g}" if x[-1:].isdigit() and "/" not in x else x for x in line.split())
        for line in files["my chair.obj"].decode().replace("-0.00000000", "0.0").splitlines()
    ]
    want = [
        "mtllib my_chair.mtl",
        "usemtl my_chair_texture",
        *rows,
        *rows[4:] * 3,
        "vt 0 0",
        "vt 1 0",
        "vt 1 1",
        "vt 0 1",
    ]
    assert [line for line in found if line] == [*want, "f 1/1/1 2/2/2 3/3/3", "f 1/1/1 3/3/3 4/4/4"]
    material = files["my_chair.mtl"].decode().split("\n")
    assert material[0] == "newmtl my_chair_texture"
    assert {"Kd 1.00000000 1.00000000 1.00000000", "Ks 0.00000000 0.00000000 0.00000000"} <= set(material)
    assert material[-1] == "map_Kd my_chair_texture.png"
    with Image.open(io.BytesIO(files["my_chair_texture.png"])) as picture:
        np.testing.assert_array_equal(np.asarray(picture), QUAD.texture)


def test_an_obj_comes_back_with_texture_and_normals(baked, tmp_path):
    """Through a reader of its own rules, and through the renderers' reader."""
    export.save_mesh(baked, tmp_path / "a.obj")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mtl", "a.obj", "a_texture.png"]
    body = trimesh.load(tmp_path / "a.obj", process=False, maintain_order=True)
    np.testing.assert_array_equal(np.asarray(body.visual.material.image.convert("RGB")), baked.texture)
    (part,) = mesh_file.load_mesh(tmp_path / "a.obj").parts
    uvs = part.texture.uv * (1, -1) + (0, 1)  # from the lower left, as ours
    order = np.lexsort(np.round(uvs, 5).T), np.lexsort(np.round(baked.uvs, 5).T)
    np.testing.assert_allclose(uvs[order[0]], baked.uvs[order[1]], atol=1e-5)
    np.testing.assert_allclose(part.positions[order[0]], baked.vertices[order[1]], atol=1e-5)
    np.testing.assert_allclose(part.normals[order[0]], baked.normals[order[1]], atol=1e-4)
    np.testing.assert_array_equal(part.texture.pixels[..., :3], baked.texture)


def test_an_obj_is_written_whole_or_not_at_all(tmp_path):
    export.save_mesh(QUAD, tmp_path / "a.obj")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = dataclasses.replace(QUAD, texture=255 - QUAD.texture, vertices=QUAD.vertices * 2)
    (tmp_path / "a.mtl").unlink()
    (tmp_path / "a.mtl").mkdir()
    with pytest.raises(OutputError, match=r"a\.mtl: it is not a regular file"):
        export.save_mesh(other, tmp_path / "a.obj")
    (tmp_path / "a.mtl").rmdir()
    (tmp_path / "a.mtl").write_bytes(before["a.mtl"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_a_texture_an_obj_is_one_file(tmp_path):
    plain = dataclasses.replace(QUAD, texture=None, uvs=None)
    text = export.mesh_files(plain, "a.obj", "z")["a.obj"].decode()
    assert list(export.mesh_files(plain, "a.obj")) == ["a.obj"]
    assert "vn 0.00000000 -1.00000000 0.00000000" in text
    assert "f 1//1 2//2 3//3" in text
    assert "mtllib" not in text
