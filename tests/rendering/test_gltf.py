"""glTF's container, accessors, primitives, node trees, skins and morph targets, against corners worked by hand."""

import struct

import numpy as np
import pytest
from gltf_builder import SQUARE, SQUARE_FACES, Builder, corners, skinned, sparse, two_scenes

from mvdream_fast.rendering.mesh import Mesh, MeshError
from mvdream_fast.rendering.mesh_file import load_mesh

SQUARE_CORNERS = np.array(SQUARE, float)[SQUARE_FACES].reshape(-1, 3, 3)


def box(mesh: Mesh) -> list[list[float]]:
    """The smallest and the largest corner in the file's axes."""
    points = corners(mesh).reshape(-1, 3)
    return [points.min(0).round(5).tolist(), points.max(0).round(5).tolist()]


def file_normals(mesh: Mesh) -> np.ndarray:
    normals = np.concatenate([part.normals for part in mesh.parts])
    return np.stack([normals[:, 0], normals[:, 2], -normals[:, 1]], 1)


# Accessors


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("dtype", "largest"), [("i1", 127), ("u1", 255), ("i2", 32767), ("u2", 65535)])
def test_component_types_of_positions(dtype, largest, normalized):
    """KHR_mesh_quantization: c / largest where normalised, else c; negative ends are cut at -1."""
    low = 0 if dtype[0] == "u" else -largest - 1
    builder = Builder(extensionsRequired=["KHR_mesh_quantization"])
    values = [(low, low, 0), (largest, low, 0), (largest, largest, 0), (low, largest, 0)]
    square = builder.square(POSITION=builder.accessor(values, dtype, stride=8, normalized=normalized))
    expected = [max(low / largest, -1), 1] if normalized else [low, largest]
    assert box(builder.show(square).load()) == [[expected[0]] * 2 + [0], [expected[1]] * 2 + [0]]


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
def test_component_types_of_indices(dtype):
    builder = Builder()
    square = builder.square() | {"indices": builder.accessor(SQUARE_FACES, dtype)}
    np.testing.assert_array_equal(corners(builder.show(square).load()), SQUARE_CORNERS)


def test_strides_and_offsets():
    """Interleaved: what lies between the values of one attribute is not its own."""
    builder = Builder()
    positions = builder.accessor(SQUARE, "f4", stride=28)
    builder.tree["accessors"][positions]["byteOffset"] = 0
    square = builder.square(POSITION=positions)
    np.testing.assert_array_equal(corners(builder.show(square).load()), SQUARE_CORNERS)
    # The same view read from its second value on.
    builder = Builder()
    positions = builder.accessor([(9, 9, 9), *SQUARE], "f4", stride=16)
    builder.tree["accessors"][positions] |= {"byteOffset": 16, "count": 4}
    square = builder.square(POSITION=positions)
    np.testing.assert_array_equal(corners(builder.show(square).load()), SQUARE_CORNERS)


def test_sparse_accessors_with_and_without_a_view():
    builder = Builder()
    base = builder.view(np.array(SQUARE, "<f4").tobytes())
    moved = sparse(builder, [2], [(1, 5, 0)], 4, bufferView=base)
    assert box(builder.show(builder.square(POSITION=moved)).load()) == [[-1, -1, 0], [1, 5, 0]]
    # Without a view all else is zero.
    builder = Builder()
    moved = sparse(builder, [1, 2], [(1, 0, 0), (1, 1, 0)], 4)
    assert box(builder.show(builder.square(POSITION=moved)).load()) == [[0, 0, 0], [1, 1, 0]]


def test_an_accessor_without_a_view_is_zeros():
    builder = Builder()
    uv = builder.add("accessors", {"componentType": 5126, "count": 4, "type": "VEC2"})
    base = builder.texture(np.array([[50, 90]], np.uint8), {"magFilter": 9728})
    square = builder.square(TEXCOORD_0=uv) | {"material": builder.material({"baseColorTexture": base})}
    (part,) = builder.show(square).load().parts
    np.testing.assert_array_equal(part.texture.uv, np.zeros((4, 2)))


# Containers


def test_data_uris_and_files_with_escaped_names(tmp_path):
    builder = Builder()
    builder.show(builder.square())
    np.testing.assert_array_equal(corners(load_mesh(builder.json(builder.data_uri()), "gltf")), SQUARE_CORNERS)
    path = tmp_path / "a.gltf"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "my data ü.bin").write_bytes(builder.blob)
    path.write_bytes(builder.json("sub/my%20data%20%C3%BC.bin"))
    mesh = load_mesh(path)
    np.testing.assert_array_equal(corners(mesh), SQUARE_CORNERS)
    assert mesh.sources == (str(tmp_path / "sub" / "my data ü.bin"),)


@pytest.mark.parametrize("uri", ["../secret.bin", "%2e%2e/secret.bin", "/etc/hostname", "file:///etc/hostname"])
def test_no_uri_leads_out_of_the_folder(tmp_path, uri):
    builder = Builder()
    builder.show(builder.square())
    (tmp_path / "secret.bin").write_bytes(builder.blob)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "a.gltf").write_bytes(builder.json(uri))
    with pytest.raises(MeshError, match="which is not beside it"):
        load_mesh(inner / "a.gltf")


def test_a_glb_may_have_foreign_chunks():
    builder = Builder()
    data = builder.show(builder.square()).glb() + struct.pack("<I4s", 4, b"XTRA") + b"abcd"
    np.testing.assert_array_equal(corners(load_mesh(data, "glb")), SQUARE_CORNERS)


# Primitives


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    ("mode", "order"), [(4, SQUARE_FACES), (5, [0, 1, 3, 2]), (6, [0, 1, 2, 3]), (5, [0, 1, 3, 2, 2])]
)
def test_triangles_strips_and_fans(mode, order, indexed):
    """All of them cover the square once, and turn to the front."""
    builder = Builder()
    if indexed:
        square = builder.square() | {"indices": builder.accessor(order, "u1")}
    else:
        positions = builder.accessor(np.array(SQUARE)[order])
        square = {"attributes": {"POSITION": positions}}
    found = corners(builder.show(square | {"mode": mode}).load())
    area = np.cross(found[:, 1] - found[:, 0], found[:, 2] - found[:, 0])[:, 2] / 2
    assert sorted(area.tolist())[-2:] == [2, 2]
    assert area.sum() == 4


@pytest.mark.parametrize(("mode", "what"), [(0, "points"), (1, "lines"), (2, "lines"), (3, "lines")])
def test_points_and_lines_are_left_out_with_their_reason(mode, what):
    builder = Builder()
    mesh = builder.show(builder.square(), builder.square() | {"mode": mode}).load()
    assert len(mesh.parts) == 1
    assert mesh.notes == (f"{what} have no surface and are not drawn",)
    builder.tree["meshes"][0]["primitives"].pop(0)
    with pytest.raises(MeshError, match=f"the mesh has no triangles; {what} have no surface and are not drawn"):
        builder.load()


def test_missing_normals_are_flat():
    builder = Builder()
    roof = [(-1, 0, 0), (0, 0, 1), (0, 1, 1), (-1, 1, 0), (1, 0, 0), (1, 1, 0)]
    primitive = {
        "attributes": {"POSITION": builder.accessor(roof)},
        "indices": builder.accessor([0, 1, 2, 0, 2, 3, 1, 4, 5, 1, 5, 2], "u1"),
    }
    s = np.sqrt(0.5)
    expected = np.repeat([(-s, 0, s), (s, 0, s)], 6, axis=0)
    np.testing.assert_allclose(file_normals(builder.show(primitive).load()), expected, atol=1e-6)


# Node trees


def test_translation_rotation_and_scale_of_a_tree():
    """Scaled to 2 x 6 x 2, turned 90 degrees about y (z becomes x), moved; then the parent's move and double size."""
    builder = Builder()
    mesh = builder.add("meshes", {"primitives": [builder.square()]})
    s = np.sqrt(0.5)
    child = {"mesh": mesh, "translation": [1, 2, 3], "rotation": [0, s, 0, s], "scale": [1, 3, 1]}
    builder.tree |= {"nodes": [{"children": [1], "translation": [10, 0, 0], "scale": [2, 2, 2]}, child]}
    builder.tree |= {"scenes": [{"nodes": [0]}], "scene": 0}
    mesh = builder.load()
    assert box(mesh) == [[12, -2, 4], [12, 10, 8]]
    np.testing.assert_allclose(file_normals(mesh), [(1, 0, 0)] * 4, atol=1e-6)


def test_a_matrix_is_column_major():
    builder = Builder()
    matrix = [0, 2, 0, 0, -1, 0, 0, 0, 0, 0, 1, 0, 5, 6, 7, 1]  # x -> 2y, y -> -x, then (5, 6, 7)
    assert box(builder.show(builder.square(), matrix=matrix).load()) == [[4, 4, 7], [6, 8, 7]]


def test_normals_under_uneven_scales():
    """A slope of 45 degrees that is stretched along x is less steep: its normal is (1, 2) / sqrt 5."""
    builder = Builder()
    slope = builder.square(
        POSITION=[(0, 1, 0), (1, 0, 0), (1, 0, 1), (0, 1, 1)], NORMAL=[(np.sqrt(0.5), np.sqrt(0.5), 0)] * 4
    )
    mesh = builder.show(slope, scale=[2, 1, 1]).load()
    np.testing.assert_allclose(file_normals(mesh), [(1 / np.sqrt(5), 2 / np.sqrt(5), 0)] * 4, atol=1e-6)


def test_an_odd_number_of_mirrors_turns_triangles_over():
    builder = Builder()
    mesh = builder.show(builder.square(), scale=[-1, 1, 1]).load()
    found = corners(mesh)
    area = np.cross(found[:, 1] - found[:, 0], found[:, 2] - found[:, 0])[:, 2] / 2
    assert area.tolist() == [2, 2]
    np.testing.assert_allclose(file_normals(mesh), [(0, 0, 1)] * 4, atol=1e-6)


def test_the_default_scene_else_the_first_else_all():
    builder = two_scenes()
    assert box(builder.load()) == [[-1, -1, 0], [1, 1, 0]]
    builder.tree["scene"] = 1
    assert box(builder.load()) == [[4, -1, 0], [6, 1, 0]]
    del builder.tree["scene"], builder.tree["scenes"]
    assert box(builder.load()) == [[-1, -1, 0], [6, 1, 0]]
    del builder.tree["nodes"]
    assert len(builder.load().parts) == 2


def test_one_mesh_in_two_places():
    builder = Builder()
    builder.show(builder.square())
    builder.tree["nodes"].append({"mesh": 0, "translation": [5, 0, 0]})
    builder.tree["scenes"][0]["nodes"].append(1)
    mesh = builder.load()
    assert (len(mesh.parts), box(mesh)) == (2, [[-1, -1, 0], [6, 1, 0]])


def test_hidden_nodes_hide_what_hangs_on_them():
    builder = two_scenes()
    builder.tree["nodes"][0] |= {"children": [1], "extensions": {"KHR_node_visibility": {"visible": False}}}
    builder.tree |= {"scenes": [{"nodes": [0]}], "extensionsRequired": ["KHR_node_visibility"]}
    with pytest.raises(MeshError, match="no triangles"):
        builder.load()
    builder.tree["nodes"][0]["extensions"]["KHR_node_visibility"]["visible"] = True
    assert len(builder.load().parts) == 2


def test_instances_of_the_extension():
    """Places, turns (normalised shorts) and sizes of copies; one of them mirrored."""
    builder = Builder(extensionsRequired=["EXT_mesh_gpu_instancing"])
    attributes = {
        "TRANSLATION": builder.accessor([(0, 0, 0), (10, 0, 0)]),
        "ROTATION": builder.accessor([(0, 0, 0, 32767), (0, 32767, 0, 0)], "i2", normalized=True),
        "SCALE": builder.accessor([(1, 1, 1), (2, 1, -1)]),
    }
    extension = {"EXT_mesh_gpu_instancing": {"attributes": attributes}}
    (part,) = builder.show(builder.square(), translation=[0, 5, 0], extensions=extension).load().parts
    assert box(Mesh((part,))) == [[-1, 4, 0], [12, 6, 0]]
    found = corners(Mesh((part,)))
    area = np.cross(found[:, 1] - found[:, 0], found[:, 2] - found[:, 0])[:, 2] / 2
    # Half a turn about y shows the back, and the mirror along z leaves that: to the front it is (-, +, +) x (-).
    np.testing.assert_allclose(np.abs(area), [2, 2, 4, 4], atol=1e-5)
    np.testing.assert_allclose(np.sign(area), np.sign(file_normals(Mesh((part,)))[[0, 0, 4, 4], 2]))


# Skins and morph targets


def test_a_skin_stands_where_its_joints_stand():
    found = skinned().load().parts[0].positions[:, [0, 2]]
    np.testing.assert_allclose(found, [(-1, -1), (1, -1), (1, 2), (-1, 1.5)], atol=1e-6)


def test_skins_without_matrices_and_with_weights_of_bytes():
    builder = skinned()
    del builder.tree["skins"][0]["inverseBindMatrices"]
    attributes = builder.tree["meshes"][0]["primitives"][0]["attributes"]
    weights = [(255, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 0, 0)]
    attributes["WEIGHTS_0"] = builder.accessor(weights, "u1", normalized=True)
    # A second set: the last corner hangs on joint 1 by it.
    attributes["JOINTS_1"] = builder.accessor([(1, 0, 0, 0)] * 4, "u2")
    attributes["WEIGHTS_1"] = builder.accessor([(0, 0, 0, 0)] * 3 + [(65535, 0, 0, 0)], "u2", normalized=True)
    found = builder.load().parts[0].positions[:, [0, 2]]
    np.testing.assert_allclose(found, [(-1, -1), (1, -1), (1, 4), (-1, 4)], atol=1e-6)


def test_morph_targets_with_their_default_weights():
    builder = Builder()
    wide = builder.accessor([(-1, 0, 0), (1, 0, 0), (1, 0, 0), (-1, 0, 0)])
    high = sparse(builder, [2, 3], [(0, 4, 0), (0, 4, 0)], 4)
    square = builder.square() | {"targets": [{"POSITION": wide}, {"POSITION": high}]}
    builder.show(square)
    assert box(builder.load()) == [[-1, -1, 0], [1, 1, 0]]  # no weights: none applies
    builder.tree["meshes"][0]["weights"] = [1, 0.5]
    assert box(builder.load()) == [[-2, -1, 0], [2, 3, 0]]
    builder.tree["nodes"][0]["weights"] = [0, 1]
    assert box(builder.load()) == [[-1, -1, 0], [1, 5, 0]]


def test_morphed_colors():
    builder = Builder()
    square = builder.square(COLOR_0=[(0.5, 0, 0)] * 4)
    builder.show(square | {"targets": [{"COLOR_0": builder.accessor([(0.25, 0.5, -1)] * 4)}]})
    builder.tree["meshes"][0]["weights"] = [1]
    np.testing.assert_allclose(builder.load().parts[0].colors, [(0.75, 0.5, 0, 1)] * 4)
