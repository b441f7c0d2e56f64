"""glTF's container, accessors, primitives, node trees, skins and morph targets, against corners worked by hand."""

import json
import struct

import numpy as np
import pytest
from gltf_builder import SQUARE, SQUARE_FACES, Builder, corners

from mvdream_fast.rendering import gltf
from mvdream_fast.rendering.mesh import Mesh, MeshError
from mvdream_fast.rendering.mesh_file import load_mesh

SQUARE_CORNERS = np.array(SQUARE, float)[SQUARE_FACES].reshape(-1, 3, 3)
EYE = np.eye(4).reshape(-1).tolist()


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


def sparse(builder: Builder, rows, values, count: int, **base) -> int:
    return builder.add(
        "accessors",
        {"componentType": 5126, "count": count, "type": "VEC3"}
        | base
        | {
            "sparse": {
                "count": len(rows),
                "indices": {"componentType": 5123, "bufferView": builder.view(np.array(rows, "<u2").tobytes())},
                "values": {"bufferView": builder.view(np.array(values, "<f4").tobytes())},
            }
        },
    )


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


def two_scenes() -> Builder:
    builder = Builder()
    builder.show(builder.square())
    builder.show(builder.square(), translation=[5, 0, 0])
    builder.tree["scenes"] = [{"nodes": [0]}, {"nodes": [1]}]
    return builder


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


def skinned() -> Builder:
    """A square whose upper corners hang on a joint that stands one higher than in its bind pose."""
    builder = Builder()
    square = builder.square(
        JOINTS_0=builder.accessor([(0, 1, 0, 0)] * 4, "u1"),
        WEIGHTS_0=builder.accessor([(1, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0.5, 0.5, 0, 0)]),
    )
    builder.show(square, skin=0, translation=[100, 0, 0])  # which a skin does not follow
    inverse = np.eye(4)
    inverse[1, 3] = -2  # bound at y = 2
    matrices = builder.accessor([EYE, inverse.T.reshape(-1).tolist()])
    builder.tree["nodes"] += [{"children": [2]}, {"translation": [0, 3, 0]}]
    builder.tree["scenes"][0]["nodes"].append(1)
    builder.tree["skins"] = [{"joints": [1, 2], "inverseBindMatrices": matrices}]
    return builder


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


def test_morphed_colours():
    builder = Builder()
    square = builder.square(COLOR_0=[(0.5, 0, 0)] * 4)
    builder.show(square | {"targets": [{"COLOR_0": builder.accessor([(0.25, 0.5, -1)] * 4)}]})
    builder.tree["meshes"][0]["weights"] = [1]
    np.testing.assert_allclose(builder.load().parts[0].colours, [(0.75, 0.5, 0, 1)] * 4)


# What a file needs


@pytest.mark.parametrize(
    "name", ["KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_texture_basisu", "ACME_holograms"]
)
def test_extensions_that_cannot_be_read_are_named(name):
    builder = Builder(extensionsRequired=[name])
    with pytest.raises(MeshError, match=f"glb mesh: needs {name}, which cannot be read; export it without"):
        builder.show(builder.square()).load()


def test_what_a_file_can_do_without_is_noted():
    builder = Builder(extensionsUsed=["KHR_materials_transmission", "KHR_materials_ior", "KHR_lights_punctual"])
    mesh = builder.show(builder.square()).load()
    assert mesh.notes == ("KHR_materials_transmission, which the file can do without, is not drawn",)


@pytest.mark.parametrize("name", sorted(gltf.READ | set(gltf.HARMLESS)))
def test_extensions_that_are_read_or_change_nothing(name):
    builder = Builder(extensionsRequired=[name], extensionsUsed=[name])
    mesh = builder.show(builder.square()).load()
    np.testing.assert_array_equal(corners(mesh), SQUARE_CORNERS)
    assert mesh.notes == ()


def test_draco_with_and_without_its_fallback():
    extension = {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": {"POSITION": 0}}}
    builder = Builder(extensionsUsed=["KHR_draco_mesh_compression"])
    builder.show(builder.square() | {"extensions": extension})
    np.testing.assert_array_equal(corners(builder.load()), SQUARE_CORNERS)
    del builder.tree["accessors"][builder.tree["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]["bufferView"]
    with pytest.raises(MeshError, match="needs KHR_draco_mesh_compression"):
        builder.load()


def test_meshopt_with_and_without_its_fallback():
    builder = Builder(extensionsUsed=["EXT_meshopt_compression"])
    builder.show(builder.square())
    for view in builder.tree["bufferViews"]:
        view["extensions"] = {"EXT_meshopt_compression": {"buffer": 1, "count": 4, "byteStride": 12}}
    np.testing.assert_array_equal(corners(builder.load()), SQUARE_CORNERS)
    fallback = {"byteLength": len(builder.blob), "extensions": {"EXT_meshopt_compression": {"fallback": True}}}
    builder.tree["buffers"] = [{"byteLength": 4}, fallback]
    for view in builder.tree["bufferViews"]:
        view["buffer"] = 1
    with pytest.raises(MeshError, match="needs EXT_meshopt_compression"):
        builder.load()


def test_basisu_with_and_without_its_fallback():
    builder = Builder(extensionsUsed=["KHR_texture_basisu"])
    source = builder.add("images", builder.image(np.full((2, 2), 7, np.uint8)))
    texture = {"source": source, "extensions": {"KHR_texture_basisu": {"source": 5}}}
    base = {"index": builder.add("textures", texture)}
    builder.show(builder.square() | {"material": builder.material({"baseColorTexture": base})})
    assert builder.load().parts[0].texture.pixels[0, 0].tolist() == [7, 7, 7, 255]
    assert builder.load().notes == ()
    del texture["source"]
    with pytest.raises(MeshError, match="needs KHR_texture_basisu, which cannot be read"):
        builder.load()


# Damaged files


def damage(path: str, value) -> Builder:
    """A square with one value of its tree replaced: `accessors/0/count`."""
    builder = Builder()
    builder.show(builder.square())
    *way, last = path.split("/")
    place = builder.tree
    for step in way:
        place = place[int(step) if isinstance(place, list) else step]
    place[int(last) if isinstance(place, list) else last] = value
    return builder


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("accessors/0/count", 400, "an accessor of 400 values ends behind its bufferView: the file is cut short"),
        ("accessors/0/count", 4_000_000_000, "promises 4000000014 values, at most 20000000"),
        ("accessors/0/count", -1, "a count or an offset is -1"),
        ("accessors/0/count", 2.5, "a count or an offset is 2.5"),
        ("accessors/1/count", 3, "NORMAL has 3 values for 4 vertices"),
        ("accessors/0/bufferView", 77, r"refers to bufferViews\[77\], and there are 4"),
        ("accessors/0/bufferView", -1, r"refers to bufferViews\[-1\]"),
        ("accessors/0/componentType", 1, "not a readable glb mesh"),
        ("bufferViews/0/byteLength", 10_000, r"bufferViews\[0\] ends behind its buffer: the file is cut short"),
        ("bufferViews/0/buffer", 1, r"refers to buffers\[1\], and there are 1"),
        ("meshes/0/primitives/0/attributes/POSITION", 9, r"refers to accessors\[9\]"),
        ("meshes/0/primitives/0/material", 0, r"refers to materials\[0\], and there are 0"),
        ("meshes/0/primitives/0/mode", 7, "a primitive has mode 7"),
        ("nodes/0/mesh", 3, r"refers to meshes\[3\]"),
        ("nodes/0/children", [0], "its nodes form a circle"),
        ("nodes/0/matrix", [1, 2], "not a readable glb mesh"),
        ("nodes/0/translation", [float("nan"), 0, 0], "a vertex is not a finite number"),
        ("scenes/0/nodes", [4], r"refers to nodes\[4\]"),
        ("scenes/0/nodes", [0] * 5001, "a scene holds a node twice"),
        ("nodes", [{"mesh": 0}] * 5001, "promises 5001 nodes, at most 5000 are taken"),
        ("asset", {"version": "1.0"}, "is glTF 1.0, only glTF 2 can be read"),
        ("nodes/0/skin", 0, r"refers to skins\[0\]"),
    ],
)
def test_damaged_trees(path, value, message):
    with pytest.raises(MeshError, match=message):
        damage(path, value).load()


def test_indices_and_values_that_are_out_of_range():
    builder = Builder()
    square = builder.square() | {"indices": builder.accessor([0, 1, 4], "u1")}
    with pytest.raises(MeshError, match="a face refers to vertex 4, and there are 4"):
        builder.show(square).load()
    builder = Builder()
    with pytest.raises(MeshError, match="POSITION: a value is not a finite number"):
        builder.show(builder.square(POSITION=[(np.nan, 0, 0), *SQUARE[1:]])).load()
    builder = skinned()
    builder.tree["skins"][0]["joints"] = [1]
    with pytest.raises(MeshError, match="a vertex hangs on joint 1, and the skin has 1"):
        builder.load()
    builder = Builder()
    moved = sparse(builder, [4], [(0, 0, 0)], 4)
    with pytest.raises(MeshError, match="a sparse accessor replaces values that it does not have"):
        builder.show(builder.square(POSITION=moved)).load()


def test_nodes_with_two_parents():
    builder = two_scenes()
    builder.tree["nodes"] += [{"children": [0]}, {"children": [0]}]
    with pytest.raises(MeshError, match=r"nodes\[0\] has two parents"):
        builder.load()


def test_instances_are_counted_before_they_are_made():
    builder = Builder()
    many = builder.add("accessors", {"componentType": 5126, "count": 6_000_000, "type": "VEC3"})
    extension = {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": many}}}
    with pytest.raises(MeshError, match="the mesh has 12000000 faces, at most 1000000 are taken"):
        builder.show(builder.square(), extensions=extension).load()


def test_a_file_that_is_cut_anywhere():
    whole = skinned().glb()
    for end in range(0, len(whole) - 1, 19):
        with pytest.raises(MeshError):
            load_mesh(whole[:end], "glb")


def test_mutated_files_raise_nothing_else():
    rng, builder = np.random.default_rng(1), skinned()
    base = builder.texture(np.zeros((4, 4, 3)))
    builder.tree["meshes"][0]["primitives"][0]["material"] = builder.material({"baseColorTexture": base})
    whole = builder.glb()
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        try:
            load_mesh(bytes(content), "glb").normalised()
        except MeshError:
            continue


def test_json_that_is_none():
    for content in (b"[]", b"{", b'"a"', b"\xff\xfe", json.dumps({"asset": {"version": "2.0"}}).encode()):
        with pytest.raises(MeshError, match="gltf mesh"):
            load_mesh(content, "gltf")
