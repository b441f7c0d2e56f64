"""The files of meshes that were optimised: their own triangles, whole, with unit normals, a sheet and places on it."""

import io
import json
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from mvdream_fast.scene.mesh.export import mesh_files
from mvdream_fast.scene.tets.config import TetsConfig, TexturedMeshConfig
from mvdream_fast.scene.tets.tets import Tets
from mvdream_fast.scene.tets.textured import TexturedMesh

TETS = TetsConfig(volume="mini", background="grey", tets_resolution=32)
FROM_GLTF = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # (x, y, z) is the world's (x, -z, y)


def torus(points):
    ring = torch.stack([points[:, :2].norm(dim=1) - 0.5, points[:, 2]], 1)
    return ring.norm(dim=1) - 0.2


def made(kind):
    """A mesh of each kind, and the vertices [n, 3] and the number of triangles that were optimised."""
    tets = Tets.from_sdf(TETS, torus)
    if kind == "tets":
        return tets.mesh(texture=128), tets.body().vertices.detach().numpy(), len(tets.body().faces)
    config = TexturedMeshConfig(volume="mini", background="grey", mesh_colors=kind, texture_size=128)
    mesh = TexturedMesh.from_representation(config, tets)
    return mesh.mesh(texture=128), mesh.vertices.numpy(), len(mesh.faces)


def gltf_arrays(data):
    """The arrays of a GLB's one primitive by name, and its image, read from the bytes alone."""
    magic, version, length, n_json, kind = struct.unpack("<IIIII", data[:20])
    assert (magic, version, length, kind) == (0x46546C67, 2, len(data), 0x4E4F534A)
    tree, body = json.loads(data[20 : 20 + n_json]), data[28 + n_json :]
    (primitive,) = tree["meshes"][0]["primitives"]
    types = {5126: "<f4", 5125: "<u4", 5123: "<u2"}
    widths = {"SCALAR": 1, "VEC2": 2, "VEC3": 3}

    def array(index):
        accessor = tree["accessors"][index]
        view = tree["bufferViews"][accessor["bufferView"]]
        start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
        count = accessor["count"] * widths[accessor["type"]]
        return np.frombuffer(body, types[accessor["componentType"]], count, start).reshape(accessor["count"], -1)

    arrays = {name: array(index) for name, index in primitive["attributes"].items()}
    arrays["faces"] = array(primitive["indices"]).reshape(-1, 3)
    view = tree["bufferViews"][tree["images"][0]["bufferView"]]
    start = view.get("byteOffset", 0)
    return arrays, Image.open(io.BytesIO(body[start : start + view["byteLength"]]))


def obj_arrays(files):
    """The same of an OBJ and of what lies beside it, each array by the corners of the triangles."""
    lines = files["a.obj"].decode().splitlines()
    rows = {
        kind: np.array([line.split()[1:4] for line in lines if line.startswith(kind + " ")]) for kind in ("v", "vn")
    }
    uvs = np.array([line.split()[1:3] for line in lines if line.startswith("vt ")], float)
    corners = np.array([re.findall(r"(\d+)/(\d+)/(\d+)", line) for line in lines if line.startswith("f ")], int) - 1
    sheet = re.search(r"map_Kd (.*)", files["a.mtl"].decode()).group(1)
    arrays = {
        "POSITION": rows["v"].astype(float)[corners[..., 0]].reshape(-1, 3),
        "TEXCOORD_0": uvs[corners[..., 1]].reshape(-1, 2),
        "NORMAL": rows["vn"].astype(float)[corners[..., 2]].reshape(-1, 3),
        "faces": np.arange(3 * len(corners)).reshape(-1, 3),
    }
    return arrays, Image.open(io.BytesIO(files[sheet]))


@pytest.mark.parametrize("ending", ["glb", "obj"])
@pytest.mark.parametrize("kind", ["tets", "field", "texture"])
def test_the_file_holds_the_mesh_that_was_optimised(kind, ending):
    mesh, vertices, n_faces = made(kind)
    files = mesh_files(mesh, f"a.{ending}")
    arrays, sheet = gltf_arrays(files["a.glb"]) if ending == "glb" else obj_arrays(files)
    assert len(arrays["faces"]) == n_faces
    places, corner = np.unique((arrays["POSITION"] @ FROM_GLTF.T).round(5), axis=0, return_inverse=True)
    np.testing.assert_allclose(places, np.unique(vertices.round(5), axis=0), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(arrays["NORMAL"], axis=1), 1, atol=1e-3)
    assert arrays["TEXCOORD_0"].min() >= 0
    assert arrays["TEXCOORD_0"].max() <= 1
    assert sheet.size == (128, 128)
    # Each edge is passed once in each direction, and a torus has Euler's number 0.
    welded = corner.reshape(-1)[arrays["faces"].astype(np.int64)]
    ways = np.stack([welded, np.roll(welded, -1, 1)], -1).reshape(-1, 2)
    assert len(np.unique(ways, axis=0)) == len(ways)
    assert {tuple(way) for way in ways} == {(b, a) for a, b in ways}
    assert len(places) - len(ways) // 2 + n_faces == 0
    # Outwards: the normals agree with the turn of the triangles, and the volume is a torus's, 2 pi^2 R r^2.
    a, b, c = (places[welded[:, k]] for k in range(3))
    turned = np.cross(b - a, c - a)
    normals = (arrays["NORMAL"] @ FROM_GLTF.T)[arrays["faces"][:, 0].astype(np.int64)]
    assert ((turned * normals).sum(1) > 0).mean() > 0.98
    assert (a * np.cross(b, c)).sum() / 6 == pytest.approx(2 * np.pi**2 * 0.5 * 0.2**2, rel=0.05)
