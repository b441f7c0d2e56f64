"""Which extensions a glTF may need, and damaged files: one sentence, never a crash or a huge allocation."""

import json
import tracemalloc

import numpy as np
import pytest
from gltf_builder import SQUARE, SQUARE_FACES, Builder, corners, skinned, sparse, two_scenes

from mvdream_fast.rendering import gltf, reading
from mvdream_fast.rendering.mesh import MeshError
from mvdream_fast.rendering.mesh_file import load_mesh

SQUARE_CORNERS = np.array(SQUARE, float)[SQUARE_FACES].reshape(-1, 3, 3)


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
        ("asset", {"version": "2.0", "minVersion": "2.1"}, "needs glTF 2.1, only glTF 2.0 can be read"),
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
    many = builder.add("accessors", {"componentType": 5126, "count": 600_000, "type": "VEC3"})
    extension = {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": many}}}
    with pytest.raises(MeshError, match="the mesh has 1200000 faces, at most 1000000 are taken"):
        builder.show(builder.square(), extensions=extension).load()
    builder.tree["accessors"][many]["count"] = 6_000_000
    with pytest.raises(MeshError, match="a node has 6000000 instances, at most 1000000 are taken"):
        builder.load()


@pytest.mark.parametrize(("n_instances", "n_nodes"), [(2_000, 1), (1, 100), (40, 50)])
def test_vertices_of_instances_are_counted_before_they_are_made(monkeypatch, n_instances, n_nodes):
    """One face of many vertices, in many places: 2 kB of a file would be gigabytes of positions."""
    monkeypatch.setattr(reading, "MAX_VERTICES", 1_000_000)
    builder = Builder()
    vertices = builder.add("accessors", {"componentType": 5126, "count": 20_000, "type": "VEC3"})
    places = builder.add("accessors", {"componentType": 5126, "count": n_instances, "type": "VEC3"})
    extension = {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": places}}}
    builder.show({"attributes": {"POSITION": vertices}, "indices": builder.accessor([0, 1, 2], "u2")})
    builder.tree["nodes"] = [{"mesh": 0, "extensions": extension}] * n_nodes
    builder.tree["scenes"] = [{"nodes": list(range(n_nodes))}]
    content = builder.glb()
    tracemalloc.start()
    with pytest.raises(MeshError, match="the mesh has .* vertices, at most 1000000 are taken"):
        load_mesh(content, "glb")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 << 20


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
