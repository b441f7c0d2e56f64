"""PLY in its three encodings: colours, alpha, polygons, strips, textures; and what is refused."""

import numpy as np
import pytest
from gltf_builder import corners, encoded, quarters

from mvdream_fast.core.color import to_srgb
from mvdream_fast.rendering.mesh import Mesh, MeshError
from mvdream_fast.rendering.mesh_file import load_mesh

SQUARE = [(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)]
UV = [(0, 0), (1, 0), (1, 1), (0, 1)]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
FOUR = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8).repeat(32, 0).repeat(32, 1)
NUMPY = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
         "double": "f8"}  # fmt: skip
FORMATS = ["ascii", "binary_little_endian", "binary_big_endian"]


def ply(form: str, *elements, comments: tuple[str, ...] = ()) -> bytes:
    """Elements are (name, ["type name" or "list type type name"], rows); a list in a row is a tuple."""
    head = ["ply", f"format {form} 1.0", *(f"comment {c}" for c in comments)]
    body = b""
    for name, properties, rows in elements:
        head += [f"element {name} {len(rows)}", *(f"property {p}" for p in properties)]
        for row in rows:
            words = []
            for declared, value in zip(properties, row, strict=True):
                types = declared.split()[:-1]
                if types[0] == "list":
                    words += [(types[1], len(value)), *((types[2], v) for v in value)]
                else:
                    words.append((types[0], value))
            if form == "ascii":
                body += (" ".join(str(value) for _, value in words) + "\n").encode()
            else:
                order = "<" if "little" in form else ">"
                body += b"".join(np.array(value, order + NUMPY[kind]).tobytes() for kind, value in words)
    return "\n".join([*head, "end_header", ""]).encode() + body


XYZ = ["float x", "float y", "float z"]
FACES = ("face", ["list uchar int vertex_indices"], [((0, 1, 2, 3),)])


def load(content: bytes, **files) -> Mesh:
    return load_mesh(content, "ply", {k.replace("_dot_", "."): v for k, v in files.items()})


def colors(mesh: Mesh) -> np.ndarray:
    """sRGB and alpha of 255 of each vertex, in the order of x and y."""
    (part,) = mesh.parts
    order = np.lexsort([part.positions[:, 0], part.positions[:, 2]])
    rgba = np.hstack([to_srgb(part.colors[order, :3]), part.colors[order, 3:]])
    return np.round(rgba * 255).astype(int)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["float", "double", "char", "short", "int"])
def test_encodings_and_types_of_positions(form, kind):
    found = corners(load(ply(form, ("vertex", [f"{kind} {a}" for a in "xyz"], SQUARE), FACES)))
    area = np.cross(found[:, 1] - found[:, 0], found[:, 2] - found[:, 0])[:, 2] / 2
    np.testing.assert_allclose(area, [2, 2])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("names", [("vertex_indices", "uchar", "int"), ("vertex_index", "int", "uint")])
def test_polygons_of_mixed_length(form, names):
    name, length, kind = names
    faces = (
        "face",
        ["uchar flags", f"list {length} {kind} {name}"],
        [(7, (0, 1, 2)), (7, (0, 2, 3)), (7, (0, 1, 2, 3))],
    )
    assert load(ply(form, ("vertex", XYZ, SQUARE), faces)).n_faces == 4


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("names", ["red green blue alpha", "r g b a", "diffuse_red diffuse_green diffuse_blue alpha"])
def test_vertex_colors_of_bytes_are_srgb(form, names):
    given = [(255, 0, 0, 255), (0, 128, 0, 255), (1, 2, 3, 255), (255, 255, 255, 255)]
    rows = [(*p, *c) for p, c in zip(SQUARE, given)]
    mesh = load(ply(form, ("vertex", XYZ + [f"uchar {n}" for n in names.split()], rows), FACES))
    np.testing.assert_array_equal(colors(mesh), [given[0], given[1], given[3], given[2]])
    assert not mesh.parts[0].blend


@pytest.mark.parametrize("form", FORMATS)
def test_colors_of_floats_and_shorts(form):
    floats = [(*p, 0.5, 0.25, 1.0) for p in SQUARE]
    assert (colors(load(ply(form, ("vertex", [*XYZ, "float red", "float green", "float blue"], floats), FACES)))
            == (128, 64, 255, 255)).all()  # fmt: skip
    shorts = [(*p, 65535, 32896, 0) for p in SQUARE]
    assert (colors(load(ply(form, ("vertex", [*XYZ, "ushort red", "ushort green", "ushort blue"], shorts), FACES)))
            == (255, 128, 0, 255)).all()  # fmt: skip


def test_alpha_is_opacity(renderer):
    rows = [(*p, 255, 0, 0, 51) for p in SQUARE]
    kinds = [*XYZ, "uchar red", "uchar green", "uchar blue", "uchar alpha"]
    mesh = load(ply("ascii", ("vertex", kinds, rows), FACES))
    assert quarters(renderer, mesh)[0] == (255, 0, 0, 51)


@pytest.mark.parametrize("form", FORMATS)
def test_colors_of_faces(form, renderer):
    kinds = ["list uchar int vertex_indices", "uchar red", "uchar green", "uchar blue"]
    faces = ("face", kinds, [((0, 1, 2), *RED), ((0, 2, 3), *BLUE)])
    found = quarters(renderer, load(ply(form, ("vertex", XYZ, SQUARE), faces)))
    assert (found[0], found[3]) == ((*BLUE, 255), (*RED, 255))


def test_no_colors_are_light_grey():
    assert (colors(load(ply("ascii", ("vertex", XYZ, SQUARE), FACES))) == (204, 204, 204, 255)).all()


@pytest.mark.parametrize("names", ["s t", "u v", "texture_u texture_v"])
def test_a_texture_on_coordinates_of_vertices(names, renderer):
    rows = [(*p, *uv) for p, uv in zip(SQUARE, UV)]
    content = ply("binary_little_endian", ("vertex", XYZ + [f"float {n}" for n in names.split()], rows), FACES,
                  comments=("TextureFile my four.png",))  # fmt: skip
    mesh = load_mesh(content, "ply", {"my four.png": encoded(FOUR)})
    assert quarters(renderer, mesh) == [(*RED, 255), (*GREEN, 255), (*BLUE, 255), (*WHITE, 255)]
    assert load(content).notes == ("the texture my four.png is not there and is not drawn",)


@pytest.mark.parametrize("form", FORMATS)
def test_textures_on_coordinates_of_faces(form, renderer):
    """MeshLab's: a list of coordinates and the number of the texture in each face."""
    kinds = ["list uchar int vertex_indices", "list uchar float texcoord", "int texnumber"]
    rows = [((0, 1, 2), (0, 0, 1, 0, 1, 1), 0), ((0, 2, 3), (0, 0, 1, 1, 0, 1), 1)]
    content = ply(
        form, ("vertex", XYZ, SQUARE), ("face", kinds, rows), comments=("TextureFile a.png", "TextureFile b.png")
    )
    mesh = load(content, a_dot_png=encoded(FOUR), b_dot_png=encoded(255 - FOUR))
    found = quarters(renderer, mesh)
    assert (found[0], found[3]) == ((0, 255, 255, 255), (*WHITE, 255))


@pytest.mark.parametrize("form", FORMATS)
def test_faces_without_coordinates_go_without_the_texture_alone(form, renderer):
    """Also beside a face of two corners at the end, and with lists of mixed length."""
    kinds = ["list uchar int vertex_indices", "list uchar float texcoord"]
    rows = [((0, 1, 2), ()), ((0, 2, 3), (0, 0, 1, 1, 0, 1)), ((0, 1), (0, 0, 0, 0))]
    content = ply(form, ("vertex", XYZ, SQUARE), ("face", kinds, rows), comments=("TextureFile a.png",))
    mesh = load(content, a_dot_png=encoded(FOUR))
    assert [part.texture is not None for part in mesh.parts] == [False, True]
    found = quarters(renderer, mesh)
    assert (found[0], found[3]) == ((*RED, 255), (204, 204, 204, 255))
    rows = [((0, 1, 2, 3), tuple(float(x) for uv in UV for x in uv)), rows[1]]
    both = load(content := ply(form, ("vertex", XYZ, SQUARE), ("face", kinds, rows), comments=("TextureFile a.png",)),
                a_dot_png=encoded(FOUR))  # fmt: skip
    assert quarters(renderer, both) == [(*RED, 255), (*GREEN, 255), (*BLUE, 255), (*WHITE, 255)]
    assert len(both.parts) == len(load(content).parts) == 1


@pytest.mark.parametrize("form", FORMATS)
def test_strips(form):
    strips = ("tristrips", ["list int int vertex_indices"], [((0, 1, 3, 2, -1, 0, 1, 2),)])
    found = corners(load(ply(form, ("vertex", XYZ, SQUARE), strips)))
    area = np.cross(found[:, 1] - found[:, 0], found[:, 2] - found[:, 0])[:, 2] / 2
    np.testing.assert_allclose(area, [2, 2, 2])


@pytest.mark.parametrize("form", FORMATS)
def test_normals_and_elements_that_are_not_ours(form):
    rows = [(*p, 0, 1, 0) for p in SQUARE]
    camera = ("camera", ["float fov", "list int float pose"], [(1.0, (1, 2, 3)), (2.0, ())])
    mesh = load(ply(form, camera, ("vertex", [*XYZ, "float nx", "float ny", "float nz"], rows), FACES))
    np.testing.assert_allclose(mesh.parts[0].normals, [(0, 0, 1)] * 4, atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([((0, 1, 9),)], "a face refers to vertex 9, and there are 4"),
        ([((0, 1, -2),)], "a face refers to vertex"),
        ([], "the mesh has no triangles"),
    ],
)
def test_faces_that_cannot_be(form, rows, message):
    faces = ("face", ["list uchar int vertex_indices"], rows)
    with pytest.raises(MeshError, match=f"ply mesh: {message}"):
        load(ply(form, ("vertex", XYZ, SQUARE), faces))


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_is_cut_anywhere(form):
    mixed = ("face", ["list uchar int vertex_indices"], [((0, 1, 2),), ((0, 1, 2, 3),)])
    whole = ply(form, ("vertex", XYZ, SQUARE), mixed)
    for end in range(0, len(whole) - 1, 3):
        with pytest.raises(MeshError):
            load(whole[:end])


def test_promises_of_a_header():
    content = ply("binary_little_endian", ("vertex", XYZ, SQUARE), FACES)
    with pytest.raises(MeshError, match="promises more rows than the file has bytes"):
        load(content.replace(b"element vertex 4", b"element vertex 4000000000"))
    with pytest.raises(MeshError, match="its format is none of ascii"):
        load(content.replace(b"binary_little_endian", b"binary_middle_endian"))
    with pytest.raises(MeshError, match="is no PLY"):
        load(b"solid thing")
