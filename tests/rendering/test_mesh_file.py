"""Reading meshes: formats, axes, materials, caps, and damaged files that may only raise MeshError."""

import io
import json
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import trimesh
from PIL import Image

from mvdream_fast.core.color import to_linear, to_srgb
from mvdream_fast.core.errors import InputFileError
from mvdream_fast.rendering import polygons, reading
from mvdream_fast.rendering.catalogue import parse_properties, read_folder, read_sweethome3d
from mvdream_fast.rendering.mesh import Mesh, MeshError, Part, Texture
from mvdream_fast.rendering.mesh_file import load_mesh
from mvdream_fast.scene.mesh.export import mesh_files
from mvdream_fast.scene.mesh.mesh import Mesh as SceneMesh


def arrow() -> trimesh.Trimesh:
    """Long towards +Z (glTF's front), high towards +Y, with its low corner at the origin."""
    mesh = trimesh.creation.box(extents=(1, 2, 4))
    mesh.apply_translation((0.5, 1, 2))
    return mesh


@pytest.mark.parametrize("suffix", ["glb", "gltf", "obj", "dae", "ply", "stl", "3mf", "off"])
def test_every_format_arrives_in_the_world_frame(tmp_path, suffix):
    path = tmp_path / f"arrow.{suffix}"
    if suffix == "gltf":
        for name, content in trimesh.exchange.gltf.export_gltf(trimesh.Scene(arrow())).items():
            (tmp_path / ("arrow.gltf" if name.endswith(".gltf") else name)).write_bytes(content)
    else:
        arrow().export(path)
    mesh = load_mesh(path)
    points = np.concatenate([part.positions for part in mesh.parts])
    # x stays, glTF's front (+Z) becomes -Y, glTF's up (+Y) becomes z
    np.testing.assert_allclose(points.min(0), (0, -4, 0), atol=1e-5)
    np.testing.assert_allclose(points.max(0), (1, 0, 2), atol=1e-5)
    assert mesh.n_faces == 12


def test_normals_of_a_box_are_its_faces(tmp_path):
    arrow().export(tmp_path / "box.obj", include_normals=False)
    part = load_mesh(tmp_path / "box.obj").parts[0]
    largest = np.abs(part.normals).max(1)
    np.testing.assert_allclose(largest, 1, atol=1e-5)


@pytest.mark.parametrize(("suffix", "more"), [("obj", {"include_normals": False}), ("stl", {}), ("3mf", {})])
def test_normals_of_a_sphere_stay_smooth(tmp_path, suffix, more):
    trimesh.creation.icosphere(subdivisions=3).export(tmp_path / f"ball.{suffix}", **more)
    part = load_mesh(tmp_path / f"ball.{suffix}").parts[0]
    assert len(part.positions) == 642
    cosine = (part.normals * part.positions).sum(1)
    assert cosine.min() > 0.999


def one_part(positions, **more) -> Mesh:
    n = len(positions)
    faces = np.arange(n, dtype=np.int32).reshape(-1, 3)
    zeros = np.zeros((n, 3), np.float32)
    colors = np.tile(np.float32([*to_linear(np.full(3, 0.5)), 1]), (n, 1))
    return Mesh((Part(np.asarray(positions, np.float32), zeros, colors, faces, **more),))


def shown(part: Part) -> np.ndarray:
    """The colours of a part as sRGB, [N, 3]."""
    return to_srgb(part.colors[:, :3])


def test_normalised_to_the_ball_and_to_the_box():
    mesh = one_part([(10, 0, 0), (16, 0, 0), (10, 8, 0)])
    ball = mesh.normalised("sphere").parts[0].positions
    np.testing.assert_allclose(ball, [(-0.6, -0.8, 0), (0.6, -0.8, 0), (-0.6, 0.8, 0)], atol=1e-6)
    box = mesh.normalised("box").parts[0].positions
    np.testing.assert_allclose(box.max(0) - box.min(0), (0.75, 1, 0), atol=1e-6)


def test_creases_need_little_memory_and_do_not_depend_on_their_blocks(monkeypatch):
    """What a million faces take is told from 80,000: their own normals, and one block of pairs."""
    ball = trimesh.creation.icosphere(subdivisions=6)
    positions, faces = np.asarray(ball.vertices), np.asarray(ball.faces, np.int32)
    monkeypatch.setattr(polygons, "CORNERS_AT_A_TIME", 5000)
    tracemalloc.start()
    blocks = polygons._creased(positions, faces)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 700 * len(faces)
    monkeypatch.setattr(polygons, "CORNERS_AT_A_TIME", faces.size)
    np.testing.assert_array_equal(polygons._creased(positions, faces), blocks)


def test_a_point_has_no_extent():
    with pytest.raises(MeshError, match="no extent"):
        one_part([(1, 1, 1)] * 3).normalised()


def write_obj(folder, mtl: str, name: str = "thing") -> None:
    (folder / f"{name}.obj").write_text(
        f"mtllib {name}.mtl\nusemtl stuff\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nf 1/1 2/2 3/3\n"
    )
    (folder / f"{name}.mtl").write_text("newmtl stuff\n" + mtl)


@pytest.mark.parametrize(("line", "opacity"), [("d 0.25", 0.25), ("Tr 0.25", 0.75), ("", 1.0), ("d 1.0", 1.0)])
def test_opacity_of_an_mtl(tmp_path, line, opacity):
    write_obj(tmp_path, f"Kd 0.2 0.4 0.6\n{line}\n")
    part = load_mesh(tmp_path / "thing.obj").parts[0]
    assert part.opacity == pytest.approx(opacity)
    np.testing.assert_allclose(shown(part)[0], (0.2, 0.4, 0.6), atol=1e-5)
    assert part.material == "stuff"


def test_a_texture_with_an_exporters_absolute_path_is_found_by_its_name(tmp_path):
    Image.new("RGB", (600, 4), (255, 0, 0)).save(tmp_path / "wood.png")
    write_obj(tmp_path, "Kd 1 1 1\nmap_Kd C:/Users/somebody/textures/wood.png\n")
    texture = load_mesh(tmp_path / "thing.obj").parts[0].texture.pixels
    assert texture.shape == (4, 512, 4)
    np.testing.assert_array_equal(texture[0, 0], (255, 0, 0, 255))


def test_nothing_outside_the_folder_is_opened(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "secret.png")
    inner = tmp_path / "inner"
    inner.mkdir()
    write_obj(inner, f"Kd 1 1 1\nmap_Kd ../secret.png\nmap_Ks {tmp_path}/secret.png\n")
    assert load_mesh(inner / "thing.obj").parts[0].texture is None
    tree = {"asset": {"version": "2.0"}, "buffers": [{"uri": "../secret.png", "byteLength": 36}], "meshes": [
        {"primitives": [{"attributes": {"POSITION": 0}}]}], "nodes": [{"mesh": 0}], "scenes": [{"nodes": [0]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}]}  # fmt: skip
    (inner / "thing.gltf").write_text(json.dumps(tree))
    with pytest.raises(MeshError, match="thing.gltf"):
        load_mesh(inner / "thing.gltf")


def test_caps(tmp_path, monkeypatch):
    trimesh.creation.icosphere(subdivisions=2).export(tmp_path / "ball.glb")
    monkeypatch.setattr(reading, "MAX_FACES", 100)
    with pytest.raises(MeshError, match=r"ball.glb: the mesh has 320 faces, at most 100 are taken; decimate it first"):
        load_mesh(tmp_path / "ball.glb")
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 1000)
    with pytest.raises(MeshError, match="ball.glb: the file has"):
        load_mesh(tmp_path / "ball.glb")


def test_a_16k_texture_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (16384, 16384)).save(tmp_path / "huge.png")
    write_obj(tmp_path, "Kd 1 1 1\nmap_Kd huge.png\n")
    with pytest.raises(MeshError, match="thing.obj: a texture has 16384 x 16384 pixels"):
        load_mesh(tmp_path / "thing.obj")


@pytest.mark.parametrize(
    ("name", "member"), [("bomb.3mf", "3D/3dmodel.model"), ("bomb.dae", "bomb.dae"), ("bomb.dae", "doc.kml")]
)
@pytest.mark.parametrize("before", [b"", b"\0", b"not PK"])
def test_an_archive_bomb_is_refused(tmp_path, monkeypatch, name, member, before):
    """The readers find a zip by its end, whatever it begins with."""
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 1 << 20)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, b" " * (2 << 20))
    (tmp_path / name).write_bytes(before + content.getvalue())
    with pytest.raises(MeshError, match=f"{name}: unpacks to 2 MB"):
        load_mesh(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"glTF", b"\x00" * 100, b"v 1 2\nf 1 2 3\n", b"v nan 0 0\n" * 3 + b"f 1 2 3\n"]
)
@pytest.mark.parametrize("suffix", ["glb", "obj", "ply", "stl", "3mf", "dae", "off"])
def test_junk_is_a_mesh_error(tmp_path, suffix, content):
    path = tmp_path / f"junk.{suffix}"
    path.write_bytes(content)
    with pytest.raises(MeshError, match=f"junk.{suffix}"):
        load_mesh(path).normalised()


def small_glb(**changes) -> bytes:
    """One triangle, with parts of its JSON replaced."""
    tree = {
        "asset": {"version": "2.0"},
        "buffers": [{"byteLength": 36}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
    }
    text = json.dumps(tree | changes).encode()
    text += b" " * (-len(text) % 4)
    blob = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0)], "<f4").tobytes()
    size = struct.pack("<II", 2, 12 + 8 + len(text) + 8 + len(blob))
    return (
        b"glTF" + size + struct.pack("<I", len(text)) + b"JSON" + text + struct.pack("<I", len(blob)) + b"BIN\0" + blob
    )


def test_a_small_file_cannot_promise_the_world():
    assert load_mesh(small_glb(), "glb").n_faces == 1
    endless = {"componentType": 5126, "count": 4_000_000_000, "type": "VEC3"}
    with pytest.raises(MeshError, match="promises 4000000000 values"):
        load_mesh(small_glb(accessors=[endless]), "glb")
    with pytest.raises(MeshError, match="promises 200000 nodes"):
        load_mesh(small_glb(nodes=[{"mesh": 0}] * 200_000, scenes=[{"nodes": list(range(200_000))}]), "glb")
    with pytest.raises(MeshError):
        load_mesh(b'{"asset":' * 200_000, "gltf")


def test_mutated_files_raise_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("glb", "obj", "ply"):
        whole = trimesh.creation.box().export(file_type=suffix)
        whole = whole.encode() if isinstance(whole, str) else whole
        for _ in range(60):
            content = bytearray(whole)
            for _ in range(rng.integers(1, 6)):
                content[rng.integers(len(content))] = rng.integers(256)
            content = bytes(content[: rng.integers(1, len(content) + 1)])
            try:
                load_mesh(content, suffix).normalised()
            except MeshError:
                continue


def test_unknown_format(tmp_path):
    (tmp_path / "thing.fbx").write_bytes(b"Kaydara")
    with pytest.raises(MeshError, match=r"thing.fbx: the format must be one of glb.*; convert it to GLB"):
        load_mesh(tmp_path / "thing.fbx")
    assert [e.id for e in read_folder(tmp_path)] == ["thing-fbx"]
    with pytest.raises(MeshError, match="is glTF 1.0, only glTF 2 can be read; convert it to GLB"):
        load_mesh(b'{"asset": {"version": "1.0"}}', "gltf")


def test_painting_keeps_light_and_dark():
    texture = np.full((2, 2, 4), 255, np.uint8)
    texture[0, :, :3], texture[1, :, :3] = 100, 80
    mesh = one_part([(0, 0, 0), (1, 0, 0), (0, 1, 0)], texture=Texture(texture, np.zeros((3, 2), np.float32)))
    painted = mesh.recolored([0], (0.8, 0.1, 0.1)).parts[0]
    assert painted.texture.pixels[0, 0, 0] > painted.texture.pixels[1, 0, 0] > 150
    np.testing.assert_allclose(painted.texture.pixels[..., 0].mean() / 255, 0.8, atol=0.02)
    np.testing.assert_array_equal(mesh.parts[0].texture.pixels, texture)
    flat = mesh.recolored([0], (0.8, 0.1, 0.1), flat=True).parts[0]
    assert (flat.texture.pixels[..., :3] == 255).all()


def test_brightening_holds_the_hue():
    mesh = one_part([(0, 0, 0), (1, 0, 0), (0, 1, 0)])
    part = mesh.parts[0]
    part.colors[:, :3] = to_linear(np.array([(0.5, 0.5, 0.5), (1, 0.5, 0), (0.9, 0.45, 0)]))
    bright = shown(mesh.brightened(1.2).parts[0])
    np.testing.assert_allclose(bright, [(0.6, 0.6, 0.6), (1, 0.5, 0), (1, 0.5, 0)], atol=1e-6)


def test_java_properties():
    head, rows = parse_properties("# c\nname=A \\u00e9\nname#2=Two\nname#1=One\ntags#1=a, b\nbroken\n")
    assert head == {"name": "A é"}
    assert rows == [{"name": "One", "tags": "a, b"}, {"name": "Two"}]


def make_library(folder) -> None:
    """A small furniture library: a plain box, and the same box with a model rotation about y."""
    box = arrow().export(file_type="obj", include_texture=False)
    properties = (
        "name=Tiny\nlicense=Creative Commons Attribution 3.0\n"
        "name#1=Chair\nmodel#1=/tiny/chair/chair.obj\ncategory#1=Office\ntags#1=Seat\ncreator#1=Ann\n"
        "name#2=Chair\nmodel#2=/tiny/chair/chair.obj\ncreator#2=Bob\nmodelRotation#2=0 0 1 0 1 0 -1 0 0\n"
        "name#3=Gone\nmodel#3=/tiny/gone/../../gone.obj\n"
    )
    with zipfile.ZipFile(folder / "tiny.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", properties.encode("iso-8859-1"))
        archive.writestr("tiny/chair/chair.obj", box)


def test_a_furniture_library(tmp_path):
    make_library(tmp_path)
    first, turned, gone = read_sweethome3d(tmp_path)
    assert [first.id, turned.id, gone.id] == ["tiny-chair-chair", "tiny-chair-chair-2", "tiny-gone"]
    assert (first.name, first.category, first.tags, first.creator) == ("Chair", "Office", ("Seat",), "Ann")
    assert first.licence == "CC-BY-3.0"
    points = first.load().parts[0].positions
    np.testing.assert_allclose(points.max(0) - points.min(0), (1, 4, 2), atol=1e-4)
    # the rotation maps glTF z (the long side) to x
    points = turned.load().parts[0].positions
    np.testing.assert_allclose(points.max(0), (4, 1, 2), atol=1e-4)
    with pytest.raises(MeshError, match="gone.obj: not readable in tiny.sh3f"):
        gone.load()


def test_how_to_get_the_libraries(tmp_path):
    with pytest.raises(InputFileError, match="apt-get download sweethome3d-furniture"):
        read_sweethome3d(tmp_path)
    (tmp_path / "bad.sh3f").write_bytes(b"PK")
    with pytest.raises(InputFileError, match=r"bad.sh3f is not a sweethome3d library"):
        read_sweethome3d(tmp_path)


def test_captions_of_a_folder(tmp_path):
    for name in ("red_car.glb", "dog.glb", "cat-02.glb"):
        arrow().export(tmp_path / name)
    (tmp_path / "captions.csv").write_text("dog.glb,a good\x07 \x1b[31mdog\n../../etc/passwd,nope\ncat-02,\x00\x01\n")
    entries = {e.id: e for e in read_folder(tmp_path)}
    assert set(entries) == {"red-car-glb", "dog-glb", "cat-02-glb"}
    assert entries["dog-glb"].caption == "a good [31mdog"
    assert (entries["cat-02-glb"].caption, entries["cat-02-glb"].name) == (None, "cat 02")
    assert (entries["red-car-glb"].caption, entries["red-car-glb"].name) == (None, "red car")


def test_ids_are_short_and_unique(tmp_path):
    for name in ("a b.stl", "a-b.stl", "x" * 120 + ".stl"):
        arrow().export(tmp_path / name)
    ids = [e.id for e in read_folder(tmp_path)]
    assert len(set(ids)) == 3
    assert all(len(i) <= 64 for i in ids)


def test_a_long_name_that_is_no_utf_8_has_an_id(tmp_path):
    (tmp_path / os.fsdecode(b"Stuhl f\xfcr die K\xfcche " * 4 + b".stl")).write_bytes(b"not read")
    (entry,) = read_folder(tmp_path)
    assert len(entry.id) == 64
    assert entry.id.startswith("stuhl-f-r-die-k-che-stuhl")


def test_a_store_is_not_asked_for_each_file(tmp_path, monkeypatch):
    """A system call for each of 800,000 files is hours of a shared store (docs/scale.md)."""
    stat, asked = os.stat, []
    monkeypatch.setattr(os, "stat", lambda path, *args, **kwargs: asked.append(path) or stat(path, *args, **kwargs))
    for name in ("one/a.glb", "one/deeper/b.glb", "c.glb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    asked.clear()
    assert [e.id for e in read_folder(tmp_path)] == ["c-glb", "one-a-glb", "one-deeper-b-glb"]
    assert not [path for path in asked if str(path).endswith(".glb")]


def test_a_folder_without_meshes(tmp_path):
    with pytest.raises(InputFileError, match="no meshes in .*glb, gltf, obj"):
        read_folder(tmp_path)
    with pytest.raises(InputFileError, match="is not a folder of meshes"):
        read_folder(tmp_path / "nothing")


OFF_SQUARE = "4 {faces} 0\n-1 -1 0{0}\n1 -1 0{1}\n# a comment\n1 1 0{2}\n-1 1 0{3}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("OFF " + OFF_SQUARE.format("", "", "", "", faces=1) + "4 0 1 2 3\n", [(204, 204, 204, 255)] * 4),
        ("OFF\n" + OFF_SQUARE.format("", "", "", "", faces=1) + "4 0 1 2 3 255 128 0\n", [(255, 128, 0, 255)] * 4),
        ("OFF\n" + OFF_SQUARE.format("", "", "", "", faces=1) + "4 0 1 2 3 1.0 0.5 0 0.2\n", [(255, 128, 0, 51)] * 4),
        ("COFF\n" + OFF_SQUARE.format(*[" 255 0 0 255", " 0 0 255 255"] * 2, faces=1) + "4 0 1 2 3\n",
         [(255, 0, 0, 255), (0, 0, 255, 255)] * 2),
        ("CNOFF\n" + OFF_SQUARE.format(*[" 0 0 1 0 255 0 255"] * 4, faces=1) + "4 0 1 2 3\n", [(0, 255, 0, 255)] * 4),
    ],
)  # fmt: skip
def test_colors_of_off_files(text, expected):
    (part,) = load_mesh(text.encode(), "off").parts
    around = np.argsort(np.arctan2(part.positions[:, 2], part.positions[:, 0]))
    rgba = np.hstack([shown(part), part.colors[:, 3:]])[around]
    np.testing.assert_array_equal(np.round(rgba * 255), expected)
    assert len(part.faces) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("OFF\n3 2 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "promises more rows than the file has"),
        ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", "a face refers to a vertex that is not there: there are 3"),
        ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n4 0 1 2\n", "a face refers to a vertex that is not there"),
        ("4OFF\n3 1 0\n", "is no text OFF"),
    ],
)
def test_damaged_off_files(text, message):
    with pytest.raises(MeshError, match=f"off mesh: {message}"):
        load_mesh(text.encode(), "off")


def test_colors_of_3mf_are_said_to_be_left_out():
    plain = trimesh.creation.box().export(file_type="3mf")
    assert load_mesh(plain, "3mf").notes == ()
    colored = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(plain)) as old, zipfile.ZipFile(colored, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"<object ", b'<object pid="1" pindex="0" '))
    assert load_mesh(colored.getvalue(), "3mf").notes == ("the colours of a 3MF file are not drawn; convert it to GLB",)


def our_mesh(**more) -> SceneMesh:
    """A square in the world frame that looks to the front, -Y, in the four sRGB colours of OURS."""
    vertices = np.array([(-1, 0, -1), (1, 0, -1), (1, 0, 1), (-1, 0, 1)], np.float32)
    faces = np.array([(0, 1, 2), (0, 2, 3)], np.int32)
    return SceneMesh(vertices, faces, np.array(OURS, np.float32) / 255, **more)


OURS = [(255, 0, 0), (10, 128, 240), (204, 204, 204), (3, 60, 7)]


@pytest.mark.parametrize("kind", ["glb", "ply", "obj"])
def test_our_own_meshes_come_back_with_their_colors(kind):
    mesh = our_mesh()
    (part,) = load_mesh(mesh_files(mesh, f"a.{kind}")[f"a.{kind}"], kind).parts
    at = [int(np.abs(part.positions - corner).sum(1).argmin()) for corner in mesh.vertices]
    np.testing.assert_allclose(part.positions[at], mesh.vertices, atol=1e-6)
    np.testing.assert_allclose(shown(part)[at] * 255, OURS, atol=0.01)


@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_our_own_texture_comes_back(kind):
    texture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    uvs = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], np.float32)
    files = mesh_files(our_mesh(texture=texture, uvs=uvs), f"a.{kind}")
    (part,) = load_mesh(files[f"a.{kind}"], kind, files).parts
    np.testing.assert_array_equal(part.texture.pixels[..., :3], texture)
    at = [int(np.abs(part.positions - corner).sum(1).argmin()) for corner in our_mesh().vertices]
    np.testing.assert_allclose(part.texture.uv[at], np.stack([uvs[:, 0], 1 - uvs[:, 1]], 1), atol=1e-6)
    np.testing.assert_array_equal(part.colors, np.ones((4, 4)))


@pytest.mark.parametrize("kind", ["obj", "off"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_kind(kind, end):
    """And a separator that is none: in a comment it ends nothing."""
    text = {
        "obj": "# a\u2028f 9 9 9\nmtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl red\nf 1 2 3\n",
        "off": "OFF\n# a\u2028b\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n",
    }
    material = "newmtl red\n# a\u2028Kd 0 0 1\nKd 1 0 0\n".replace("\n", end).encode()
    (part,) = load_mesh(text[kind].replace("\n", end).encode(), kind, {"a.mtl": material}).parts
    assert len(part.faces) == 1
    if kind == "obj":
        np.testing.assert_allclose(shown(part)[:, :3], np.broadcast_to((1, 0, 0), (3, 3)), atol=1e-6)


def test_a_mesh_without_any_color_is_light_gray():
    mesh = load_mesh(trimesh.creation.box().export(file_type="stl"), "stl")
    np.testing.assert_allclose(shown(mesh.parts[0]), 0.8, atol=1e-6)
