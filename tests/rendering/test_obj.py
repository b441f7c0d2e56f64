"""OBJ and MTL: every statement that decides a picture, against colours and corners worked by hand."""

import io

import numpy as np
import pytest
from gltf_builder import corners, encoded, quarters
from PIL import Image

from mvdream_fast.core.color import to_srgb
from mvdream_fast.rendering.mesh import Mesh, MeshError
from mvdream_fast.rendering.mesh_file import load_mesh
from mvdream_fast.rendering.polygons import triangulated

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
FOUR = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8).repeat(32, 0).repeat(32, 1)
SQUARE = "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
FACE = "f 1/1 2/2 3/3 4/4\n"


def load(text: str, **files) -> Mesh:
    siblings = {name.replace("_dot_", "."): data.encode() if isinstance(data, str) else data
                for name, data in files.items()}  # fmt: skip
    return load_mesh(text.encode() if isinstance(text, str) else text, "obj", siblings)


def with_mtl(mtl: str, face: str = FACE, vertices: str = SQUARE, **files) -> Mesh:
    text = f"mtllib a.mtl\n{vertices}usemtl paint\n{face}"
    return load(text, a_dot_mtl=f"newmtl paint\n{mtl}\n", **{"four_dot_png": encoded(FOUR)} | files)


def colors(mesh: Mesh) -> np.ndarray:
    """sRGB of 255 of each vertex, in the order of x and y."""
    (part,) = mesh.parts
    order = np.lexsort([part.positions[:, 0], part.positions[:, 2]])
    return np.round(to_srgb(part.colors[order, :3]) * 255).astype(int)


# Geometry


@pytest.mark.parametrize(
    "face",
    [
        "f 1 2 3 4",
        "f 1 2 3\nf 1 3 4",
        "f -4 -3 -2 -1",
        "f 1/1 2/2 3/3 4/4",
        "f 1/1/1 2/2/1 3/3/1 4/4/1",
        "f 1//1 2//1 3//1 4//1",
        "f 1 2 \\\n3 4",
        "f\t1  2\t3 4   # a square",
        "g a b\no thing\ns 1\nf 1 2 3 4",
        "fo 1 2 3 4",
    ],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_faces(face, ends):
    mesh = load((SQUARE + "vn 0 0 1\n" + face + "\n").replace("\n", ends))
    found = corners(mesh)
    assert found.shape == (2, 3, 3)
    area = np.cross(found[:, 1] - found[:, 0], found[:, 2] - found[:, 0])[:, 2] / 2
    np.testing.assert_allclose(area, [2, 2])
    np.testing.assert_allclose(mesh.parts[0].normals, [(0, -1, 0)] * len(mesh.parts[0].normals), atol=1e-6)


def test_negative_indices_count_from_where_they_stand():
    mesh = load("v 0 0 0\nv 1 0 0\nv 0 1 0\nf -3 -2 -1\nv 5 0 0\nv 6 0 0\nv 5 1 0\nf -3 -2 -1\n")
    np.testing.assert_allclose(corners(mesh)[:, 0], [(0, 0, 0), (5, 0, 0)])


def test_concave_polygons_keep_their_hole():
    """An L of six corners has an area of 3, whatever corner it begins at; a fan would fill its notch."""
    ell = [(0, 0), (2, 0), (2, 1), (1, 1), (1, 2), (0, 2)]
    for turn in range(6):
        points = np.array([(*p, 0) for p in ell[turn:] + ell[:turn]], float)
        found = points[triangulated(points, np.array([6]))].reshape(-1, 3, 3)
        area = np.cross(found[:, 1] - found[:, 0], found[:, 2] - found[:, 0])[:, 2] / 2
        assert area.sum() == pytest.approx(3)
        assert area.min() > 0


def test_polygons_of_several_kinds():
    points = np.array(
        [(0, 0, 0), (1, 0, 0), (0, 1, 0)] + [(x, y, 2) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))], float
    )
    assert triangulated(points, np.array([3, 4])).tolist() == [0, 1, 2, 3, 4, 5, 3, 5, 6]
    assert triangulated(points, np.array([2, 5]))[:3].tolist() == [2, 3, 4]


# Colours


def test_a_face_without_any_material_is_light_grey():
    assert (colors(load(SQUARE + FACE)) == 204).all()


def test_vertex_colors_are_srgb_in_ones_or_in_bytes():
    rows = [(0, 0.5, 1), (1, 0, 0), (0, 1, 0), (0.2, 0.4, 0.6)]
    expected = [[0, 128, 255], [255, 0, 0], [51, 102, 153], [0, 255, 0]]
    for scale, w in ((1, ""), (255, ""), (1, "1 ")):
        lines = (f"v {p} {w}{' '.join(str(c * scale) for c in row)}" for p, row in zip(
            ("-1 -1 0", "1 -1 0", "1 1 0", "-1 1 0"), rows))  # fmt: skip
        found = colors(load("\n".join(lines) + "\nf 1 2 3 4\n"))
        np.testing.assert_allclose(found, expected, atol=1)


def test_vertex_colors_stay_beside_a_material():
    colored = "v -1 -1 0 1 0 0\nv 1 -1 0 1 0 0\nv 1 1 0 1 0 0\nv -1 1 0 1 0 0\n"
    mesh = with_mtl("Kd 1 1 1", "f 1 2 3 4\n", colored)
    assert (colors(mesh) == (255, 0, 0)).all()
    assert mesh.parts[0].material == "paint"


def test_a_position_may_have_a_weight():
    np.testing.assert_allclose(corners(load("v 0 0 0 1\nv 1 0 0 1\nv 0 1 0 1\nf 1 2 3\n"))[0, 1], (1, 0, 0))


@pytest.mark.parametrize(
    ("mtl", "expected"),
    [
        ("Kd 0.2 0.4 0.6", (51, 102, 153)),
        ("kd 0.2 0.4 0.6", (51, 102, 153)),
        ("Kd 0.5", (128, 128, 128)),
        ("  Kd\t0.2\t0.4\t0.6  ", (51, 102, 153)),
        ("Kd spectral file.rfl 1", (204, 204, 204)),
        ("Ka 1 0 0\nKs 0 0 1\nNs 5\nillum 2", (204, 204, 204)),
        ("Kd 0 0 0", (0, 0, 0)),
    ],
)
def test_diffuse_colors_are_srgb(mtl, expected):
    assert (np.abs(colors(with_mtl(mtl)) - expected) <= 1).all()


@pytest.mark.parametrize(
    ("mtl", "opacity"),
    [("", 1), ("d 0.25", 0.25), ("d -halo 0.25", 0.25), ("Tr 0.25", 0.75), ("d 0.5\nTr 0.9", 0.5), ("d 1", 1)],
)
def test_opacity(renderer, mtl, opacity):
    mesh = with_mtl(f"Kd 1 0 0\n{mtl}")
    assert mesh.parts[0].opacity == pytest.approx(opacity)
    assert quarters(renderer, mesh)[0] == (255, 0, 0, round(opacity * 255 + 1e-3))


def test_a_map_is_multiplied_with_kd_in_linear_light(renderer):
    mid = encoded(np.full((4, 4, 3), 128, np.uint8))
    assert quarters(renderer, with_mtl("Kd 1 1 1\nmap_Kd mid.png", mid_dot_png=mid))[0] == (128, 128, 128, 255)
    # sRGB 0.5 is 0.214 of light, times 0.2159 is 0.0462: sRGB 60.8
    assert quarters(renderer, with_mtl("Kd .5 .5 .5\nmap_Kd mid.png", mid_dot_png=mid))[0] == (61, 61, 61, 255)
    assert quarters(renderer, with_mtl("map_Kd mid.png", mid_dot_png=mid))[0] == (128, 128, 128, 255)
    # Many exporters leave zeros beside a map.
    assert quarters(renderer, with_mtl("Kd 0 0 0\nmap_Kd mid.png", mid_dot_png=mid))[0] == (128, 128, 128, 255)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", [RED, GREEN, BLUE, WHITE]),
        ("-o 0.5 0 0", [GREEN, RED, WHITE, BLUE]),
        ("-o 0 0.5", [BLUE, WHITE, RED, GREEN]),
        ("-s 1 0.5 1", [BLUE, WHITE, BLUE, WHITE]),
        ("-s 0.5 0.5 -o 0 .5", [RED] * 4),
        ("-blendu on -blendv off -cc off -texres 256 -bm 1 -type sphere -t 0 0 0", [RED, GREEN, BLUE, WHITE]),
        ("-clamp on -o 1 0", [GREEN, GREEN, WHITE, WHITE]),
        ("-clamp off -o 1 0", [RED, GREEN, BLUE, WHITE]),
        ("-mm 0 0", [(0, 0, 0)] * 4),
        ("-mm 1 -1", [(0, 255, 255), (255, 0, 255), (255, 255, 0), (0, 0, 0)]),
    ],
)
def test_options_of_a_map(renderer, options, expected):
    mesh = with_mtl(f"Kd 1 1 1\nmap_Kd {options} four.png")
    assert quarters(renderer, mesh) == [(*rgb, 255) for rgb in expected]


@pytest.mark.parametrize("name", ["my four.png", "sub/four.png", "C:\\Users\\x\\four.png", '"four.png"'])
def test_names_of_maps(renderer, name):
    files = {"my four.png": encoded(FOUR), "four.png": encoded(FOUR)}
    mesh = load_mesh(
        f"mtllib a.mtl\n{SQUARE}usemtl my paint\n{FACE}".encode(), "obj",
        files | {"a.mtl": f"newmtl my paint\nKd 1 1 1\nmap_Kd -s 1 1 1 {name}\n".encode()},
    )  # fmt: skip
    assert quarters(renderer, mesh)[1] == (*GREEN, 255)
    assert mesh.notes == ()


def test_map_d_is_opacity(renderer):
    """Its lightness, or its alpha where it has one; together with d."""
    half = np.full((2, 2), 255, np.uint8)
    half[:, 0] = 0
    clear = np.dstack([np.zeros((2, 2, 3), np.uint8), half]).repeat(32, 0).repeat(32, 1)
    for mask in (encoded(half.repeat(32, 0).repeat(32, 1)), encoded(clear)):
        found = quarters(renderer, with_mtl("Kd 1 0 0\nd 0.6\nmap_d mask.png", mask_dot_png=mask))
        assert found[0] == (0, 0, 0, 0)
        assert found[1] == (255, 0, 0, 153)
        found = quarters(renderer, with_mtl("Kd 1 1 1\nmap_Kd four.png\nmap_d mask.png", mask_dot_png=mask))
        assert found == [(0, 0, 0, 0), (*GREEN, 255), (0, 0, 0, 0), (*WHITE, 255)]


def test_alpha_of_a_map_cuts_holes(renderer):
    leaf = np.dstack([FOUR, np.where(np.arange(64) < 32, 0, 255)[None].repeat(64, 0)]).astype(np.uint8)
    found = quarters(renderer, with_mtl("Kd 1 1 1\nmap_Kd leaf.png", leaf_dot_png=encoded(leaf)))
    assert found == [(0, 0, 0, 0), (*GREEN, 255), (0, 0, 0, 0), (*WHITE, 255)]


def test_emission(renderer):
    assert quarters(renderer, with_mtl("Kd 0 0 0\nKe 0.2 0.4 0"))[0] == (51, 102, 0, 255)
    assert quarters(renderer, with_mtl("Kd 0 0 0\nmap_Ke four.png"))[1] == (*GREEN, 255)


@pytest.mark.parametrize("without", ["f 1 2 3\n", "f 1/1 2 3/3\n"])
def test_faces_without_coordinates_go_without_the_map_alone(without):
    mesh = with_mtl("Kd 1 1 1\nmap_Kd four.png", FACE + without)
    assert [(part.texture is not None, len(part.faces)) for part in mesh.parts] == [(True, 2), (False, 1)]
    np.testing.assert_allclose(np.unique(mesh.parts[0].texture.uv, axis=0), [(0, 0), (0, 1), (1, 0), (1, 1)])


def test_no_program_reads_a_map(tmp_path, monkeypatch):
    """Pillow knows an EPS by its content, whatever its name, and hands it to Ghostscript."""
    script, log = tmp_path / "gs", tmp_path / "log"
    script.write_text(f"#!/bin/sh\necho called >> {log}\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) run\n%%EOF\n"
    with pytest.raises(MeshError, match="a texture is damaged, or not PNG, JPEG, WEBP"):
        with_mtl("map_Kd four.png", four_dot_png=eps)
    assert not log.exists()


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "TGA", "DDS", "PPM", "PCX", "SGI", "JPEG2000", "WEBP"])
def test_kinds_of_maps(renderer, kind):
    content = io.BytesIO()
    Image.fromarray(FOUR).save(content, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert quarters(renderer, with_mtl("map_Kd four.png", four_dot_png=content.getvalue()))[1] == (*GREEN, 255)


# Files beside


@pytest.mark.parametrize("linked", [{"a.obj", "a.mtl", "four.png"}, {"a.obj"}, {"a.mtl", "four.png"}])
def test_links_in_the_folder_are_followed(tmp_path, linked):
    """The hub's cache, DVC and git-annex keep files elsewhere, under names that are hashes."""
    store, folder = tmp_path / "blobs", tmp_path / "snapshot"
    store.mkdir()
    folder.mkdir()
    files = {"a.obj": f"mtllib a.mtl\n{SQUARE}usemtl m\n{FACE}".encode(), "four.png": encoded(FOUR),
             "a.mtl": b"newmtl m\nmap_Kd four.png\n"}  # fmt: skip
    for name, content in files.items():
        place = store / f"hash of {name[::3]}" if name in linked else folder / name
        place.write_bytes(content)
        if name in linked:
            (folder / name).symlink_to(f"../blobs/{place.name}")
    mesh = load_mesh(folder / "a.obj")
    assert mesh.parts[0].texture is not None
    assert mesh.notes == ()
    assert set(mesh.sources) == {str(folder / "a.mtl"), str(folder / "four.png")}
    (folder / "a.obj").unlink()
    (folder / "a.obj").write_bytes(files["a.obj"].replace(b"mtllib a.mtl", b"mtllib ../blobs/hash"))
    (store / "hash").write_bytes(files["a.mtl"])
    assert "the material file ../blobs/hash is not there" in load_mesh(folder / "a.obj").notes


@pytest.mark.parametrize("lines", ["mtllib a.mtl\nmtllib b.mtl", "mtllib a.mtl b.mtl"])
def test_several_libraries(lines):
    mesh = load(
        f"{lines}\n{SQUARE}usemtl one\nf 1 2 3\nusemtl two\nf 1 3 4\n",
        a_dot_mtl="newmtl one\nKd 1 0 0\n", b_dot_mtl="newmtl two\nKd 0 0 1\n",
    )  # fmt: skip
    assert [part.material for part in mesh.parts] == ["one", "two"]
    np.testing.assert_allclose([part.colors[0] for part in mesh.parts], [(1, 0, 0, 1), (0, 0, 1, 1)])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_text_in_other_encodings(encoding):
    mesh = load(
        f"mtllib a.mtl\n{SQUARE}usemtl grün\n{FACE}".encode(encoding),
        a_dot_mtl="newmtl grün\nKd 0 1 0\n".encode(encoding),
    )
    np.testing.assert_allclose(mesh.parts[0].colors[0], (0, 1, 0, 1))


def test_what_is_missing_is_said():
    mesh = load(f"mtllib gone.mtl\n{SQUARE}usemtl paint\n{FACE}l 1 2\n")
    assert mesh.notes == (
        "the material file gone.mtl is not there",
        "points, lines and free-form surfaces are not drawn",
        "the material paint is nowhere defined",
    )
    assert with_mtl("map_Kd gone.png").notes == ("the texture gone.png is not there and is not drawn",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 4\n", "a face refers to vertex 4, and there are 3"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 0 1 2\n", "a face refers to vertex 0, which is not there"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf -4 1 2\n", "a face refers to vertex -4, which is not there"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1/1 2/2 3/3\n", "a face refers to vertex 3, and there are 0"),
        ("v 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "a vertex has fewer than three numbers"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nl 1 2\n", "the mesh has no triangles; points, lines"),
        ("v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "a vertex is not a finite number"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 x 3\n", "not a readable obj mesh"),
        ("v 0 0 0\nv 1 0 0\nf 1 2\n", "the mesh has no triangles"),
    ],
)
def test_damaged_files(text, message):
    with pytest.raises(MeshError, match=f"obj mesh: {message}"):
        load(text)
