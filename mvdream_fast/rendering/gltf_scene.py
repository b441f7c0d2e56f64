"""What a glTF 2.0 file shows before anything moves: node trees, instances, skins and morph targets as parts."""

from collections.abc import Iterator

import numpy as np

from mvdream_fast.rendering.gltf import COMPRESSED, MAX_NODES, Document, needs
from mvdream_fast.rendering.gltf_material import look
from mvdream_fast.rendering.mesh import MeshError, Part
from mvdream_fast.rendering.polygons import face_normals, unit
from mvdream_fast.rendering.reading import MAX_FACES, Reading

POINTS_AND_LINES = {0: "points", 1: "lines", 2: "lines", 3: "lines"}
TRIANGLES, STRIP, FAN = 4, 5, 6


def read(content: bytes, reading: Reading) -> Iterator[Part]:
    """The parts of a .glb or .gltf, y up with the front at +Z. Raises: MeshError."""
    document = Document(content, reading)
    worlds = _worlds(document)
    for node, world in _drawn(document, worlds):
        matrices = _instances(document, node, world)
        mesh = document.get("meshes", node["mesh"])
        weights = node.get("weights", mesh.get("weights", []))
        joints = _joints(document, node["skin"], worlds) if "skin" in node else None
        for primitive in mesh["primitives"]:
            part = _part(document, primitive, weights, matrices, joints)
            if part is not None:
                yield part


def _worlds(document: Document) -> list[np.ndarray]:
    """Each node's transform to the world, [4, 4] float64."""
    nodes = document.tree.get("nodes", [])
    parents: dict[int, int] = {}
    for i, node in enumerate(nodes):
        for child in node.get("children", []):
            document.get("nodes", child)
            if child in parents:
                raise MeshError(f"nodes[{child}] has two parents")
            parents[child] = i
    worlds: dict[int, np.ndarray] = {}
    queue = [i for i in range(len(nodes)) if i not in parents]
    for i in queue:
        local = _local(nodes[i])
        worlds[i] = worlds[parents[i]] @ local if i in parents else local
        queue += nodes[i].get("children", [])
    if len(worlds) < len(nodes):
        raise MeshError("its nodes form a circle")
    return [worlds[i] for i in range(len(nodes))]


def _local(node: dict) -> np.ndarray:
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    values = [node.get(*item) for item in (("translation", [0, 0, 0]), ("rotation", [0, 0, 0, 1]), ("scale", [1] * 3))]
    return _trs(*(np.array([value], np.float64) for value in values))[0]


def _trs(translation: np.ndarray, rotation: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[K, 3], quaternions [K, 4] and [K, 3] -> [K, 4, 4]."""
    x, y, z, w = (rotation / np.maximum(np.linalg.norm(rotation, axis=1, keepdims=True), 1e-12)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    out = np.zeros((len(translation), 4, 4))
    out[:, :3, :3] = np.array(rows).transpose(2, 0, 1) * scale[:, None, :]
    out[:, :3, 3], out[:, 3, 3] = translation, 1
    return out


def _drawn(document: Document, worlds: list[np.ndarray]) -> Iterator[tuple[dict, np.ndarray]]:
    """The nodes with a mesh of the default scene, else of the first; without scenes, all nodes; else all meshes."""
    tree = document.tree
    nodes = tree.get("nodes", [])
    if not nodes:
        yield from (({"mesh": i}, np.eye(4)) for i in range(len(tree.get("meshes", []))))
        return
    if tree.get("scenes"):
        queue = list(document.get("scenes", tree.get("scene", 0)).get("nodes", []))
    else:
        queue = sorted(set(range(len(nodes))) - {child for node in nodes for child in node.get("children", [])})
    for i in queue:  # grows while it is read
        node = document.get("nodes", i)
        if len(queue) > MAX_NODES:
            raise MeshError("a scene holds a node twice")
        if not node.get("extensions", {}).get("KHR_node_visibility", {}).get("visible", True):
            continue
        if "mesh" in node:
            yield node, worlds[i]
        queue += node.get("children", [])


def _instances(document: Document, node: dict, world: np.ndarray) -> np.ndarray:
    """[K, 4, 4]: one, or those of EXT_mesh_gpu_instancing."""
    attributes = node.get("extensions", {}).get("EXT_mesh_gpu_instancing", {}).get("attributes", {})
    default = {"TRANSLATION": [0.0] * 3, "ROTATION": [0.0, 0, 0, 1], "SCALE": [1.0] * 3}
    named = {key: attributes[key] for key in default if key in attributes}
    if not named:
        return world[None]
    n = max(document.get("accessors", index)["count"] for index in named.values())
    if n > MAX_FACES:
        raise MeshError(f"a node has {n} instances, at most {MAX_FACES} are taken")
    given = {key: document.accessor(index).astype(float) for key, index in named.items()}
    return world @ _trs(*(given.get(key, np.tile(value, (n, 1))) for key, value in default.items()))


def _joints(document: Document, index: int, worlds: list[np.ndarray]) -> np.ndarray:
    """The skin's matrices from its bind pose to where its joints stand, [J, 4, 4]."""
    skin = document.get("skins", index)
    for joint in skin["joints"]:
        document.get("nodes", joint)
    joints = np.array([worlds[joint] for joint in skin["joints"]])
    if "inverseBindMatrices" not in skin:
        return joints
    inverse = document.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)
    return joints @ inverse[: len(joints)].astype(np.float64)


def _part(document, primitive: dict, weights: list, matrices: np.ndarray, joints: np.ndarray | None) -> Part | None:
    mode = primitive.get("mode", TRIANGLES)
    if mode in POINTS_AND_LINES:
        document.reading.note(f"{POINTS_AND_LINES[mode]} have no surface and are not drawn")
        return None
    attribute = _Attributes(document, primitive, weights)
    positions = attribute("POSITION")
    if positions is None:
        document.reading.note("a primitive without positions is not drawn")
        return None
    faces = _faces(document, primitive, mode, len(positions))
    document.reading.count_faces(len(faces) * len(matrices))
    normals = attribute("NORMAL")
    matrices = matrices if joints is None else matrices[:1]
    document.reading.count_vertices(len(positions) * len(matrices))
    positions, normals = _placed(attribute, positions, normals, matrices, joints)
    n, k = len(positions) // len(matrices), len(matrices)
    mirrored = np.linalg.det(matrices[:, :3, :3]) < 0
    faces = np.concatenate([(faces[:, ::-1] if m else faces) + i * n for i, m in enumerate(mirrored)])
    vertices = np.tile(np.arange(n), k)
    if normals is None:  # the specification asks for flat ones
        corners = faces.reshape(-1)
        normals = np.repeat(unit(face_normals(positions, faces)), 3, axis=0)
        positions, vertices, faces = positions[corners], vertices[corners], np.arange(len(corners)).reshape(-1, 3)
    return Part(
        positions.astype(np.float32),
        normals.astype(np.float32),
        faces=faces.astype(np.int32),
        **look(document, primitive, attribute, vertices),
    )


class _Attributes:
    """The attributes of a primitive by name, [N, width] float64 with its morph targets added, or None."""

    def __init__(self, document: Document, primitive: dict, weights: list):
        self.document, self.given = document, primitive["attributes"]
        compressed = [name for name in primitive.get("extensions", {}) if name in COMPRESSED]
        if compressed and "bufferView" not in document.get("accessors", self.given["POSITION"]):
            raise MeshError(needs(compressed))
        self.targets = [(w, t) for w, t in zip(weights, primitive.get("targets", [])) if w]
        self.n = None

    def __call__(self, name: str) -> np.ndarray | None:
        if name not in self.given:
            return None
        values = self._read(self.given[name], name)
        for weight, target in self.targets:
            if name in target:
                values = values + weight * self._read(target[name], name)
        return values

    def _read(self, index: int, name: str) -> np.ndarray:
        values = self.document.accessor(index)
        self.n = len(values) if self.n is None else self.n
        if len(values) != self.n:
            raise MeshError(f"{name} has {len(values)} values for {self.n} vertices")
        if name.startswith(("COLOR_", "WEIGHTS_")) and values.dtype.kind == "u":
            values = values / np.iinfo(values.dtype).max  # these are normalised always, whatever the accessor says
        if not np.isfinite(values).all():
            raise MeshError(f"{name}: a value is not a finite number")
        return values.astype(np.float64)


def _faces(document, primitive: dict, mode: int, n: int) -> np.ndarray:
    """Triangles [M, 3] of any of the three modes."""
    if "indices" in primitive:
        indices = document.accessor(primitive["indices"])[:, 0].astype(np.int64)
        if len(indices) and (indices.max() >= n or indices.min() < 0):
            raise MeshError(f"a face refers to vertex {indices.max()}, and there are {n}")
    else:
        indices = np.arange(n)
    count = max(len(indices) - 2, 0)
    i = np.arange(count)
    if mode == TRIANGLES:
        return indices[: len(indices) // 3 * 3].reshape(-1, 3)
    if mode == STRIP:
        return indices[np.stack([i, i + 1 + i % 2, i + 2 - i % 2], 1)]
    if mode == FAN:
        return indices[np.stack([i + 1, i + 2, 0 * i], 1)]
    raise MeshError(f"a primitive has mode {mode!r}, which glTF does not know")


def _placed(attribute, positions, normals, matrices: np.ndarray, joints: np.ndarray | None):
    """Positions and normals in the world, for each of `matrices` one copy; a skin's joints replace them."""
    if joints is not None and "JOINTS_0" in attribute.given:
        return _skinned(attribute, positions, normals, joints)
    moved = positions @ matrices[:, :3, :3].transpose(0, 2, 1) + matrices[:, None, :3, 3]
    if normals is not None:
        normals = unit(normals @ np.linalg.pinv(matrices[:, :3, :3])).reshape(-1, 3)
    return moved.reshape(-1, 3), normals


def _skinned(attribute, positions, normals, joints: np.ndarray):
    moved, turned, total = np.zeros_like(positions), np.zeros_like(positions), np.zeros((len(positions), 1))
    for k in range(len([name for name in attribute.given if name.startswith("JOINTS_")])):
        index, weights = attribute(f"JOINTS_{k}"), attribute(f"WEIGHTS_{k}")
        if index.max(initial=0) >= len(joints):
            raise MeshError(f"a vertex hangs on joint {int(index.max())}, and the skin has {len(joints)}")
        for column in range(index.shape[1]):
            matrix, weight = joints[index[:, column].astype(np.int64)], weights[:, column : column + 1]
            moved += weight * (np.einsum("nij,nj->ni", matrix[:, :3, :3], positions) + matrix[:, :3, 3])
            if normals is not None:
                turned += weight * np.einsum("nij,nj->ni", matrix[:, :3, :3], normals)
            total += weight
    moved = moved / np.where(total > 0, total, 1)
    return moved, None if normals is None else unit(turned)
