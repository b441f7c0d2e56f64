"""Mesh files into the world frame: which formats there are, and one sentence for all that can be wrong with a file.

Each format has a reader of its own (gltf_scene, obj, ply, dae, off); trimesh reads STL and 3MF.
"""

import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mvdream_fast.rendering import dae, gltf_scene, obj, off, ply
from mvdream_fast.rendering.mesh import Mesh, MeshError, Part
from mvdream_fast.rendering.polygons import joined, part
from mvdream_fast.rendering.reading import Folder, Reading, has_colors, read_bytes

FOREIGN = ("fbx", "blend", "usd", "usdz", "3ds", "max", "wrl", "x3d")  # meshes that cannot be read: said so by name
# The files' frames (y up, front +Z, as glTF) to the world's (z up, front -Y).
WORLD_FROM_GLTF = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32)


def load_mesh(source: Path | bytes, file_type: str | None = None, siblings: Mapping[str, bytes] | None = None) -> Mesh:
    """Reads a mesh in any of FORMATS into the world frame (files are taken as y up with the front at +Z).

    Only `siblings` (or the folder's own files) are ever opened for materials and textures: no URI, no parent folder.
    What a file holds and an image of it does not is in the mesh's notes.
    Raises: MeshError for everything that the reader, the caps or an empty scene can object to.
    """
    name = source.name if isinstance(source, Path) else f"{file_type} mesh"
    file_type = (file_type or Path(name).suffix.lstrip(".")).lower()
    if file_type not in FORMATS:
        hint = "; convert it to GLB" if file_type in FOREIGN else ""
        raise MeshError(f"{name}: the format must be one of {', '.join(FORMATS)}{hint}")
    files = Folder(source) if siblings is None else siblings
    reading = Reading(files)
    try:
        with np.errstate(all="ignore"):  # numbers that are none are looked for in what comes out
            parts = list(READERS[file_type](read_bytes(source, name), reading))
        visible = _visible(parts, reading)
    except MeshError as error:
        raise MeshError(str(error) if name in str(error) else f"{name}: {error}") from None
    except Exception as error:
        # A damaged file reaches a zoo of exceptions in the parsers: the user needs one sentence with the file's name.
        raise MeshError(f"{name}: not a readable {file_type} mesh ({type(error).__name__}: {error})") from None
    mesh = Mesh(visible, tuple(reading.notes), tuple(getattr(files, "asked", ())))
    return mesh.rotated(WORLD_FROM_GLTF)


def _visible(parts: list[Part], reading: Reading) -> tuple[Part, ...]:
    solid = [part for part in parts if len(part.faces)]
    if not solid:
        raise MeshError("; ".join(["the mesh has no triangles", *reading.notes]))
    if not all(np.isfinite(part.positions).all() for part in solid):
        raise MeshError("a vertex is not a finite number")
    visible = tuple(part for part in solid if part.opacity > 0.01)
    if not visible:
        raise MeshError("all of the mesh is invisible")
    return visible


def _through_trimesh(file_type: str):
    """A reader for formats of triangles without colours, or whose colours are noted as left out (3MF)."""

    def read(content: bytes, reading: Reading) -> Iterator[Part]:
        import trimesh

        if has_colors(content):
            reading.note("the colours of a 3MF file are not drawn; convert it to GLB")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scene = trimesh.load_scene(io.BytesIO(content), file_type=file_type, process=False)
        for node in scene.graph.nodes_geometry:
            transform, name = scene.graph[node]
            geometry = scene.geometry[name]
            if len(getattr(geometry, "faces", ())):
                reading.count_faces(len(geometry.faces))
                positions = np.asarray(geometry.vertices, np.float64) @ transform[:3, :3].T + transform[:3, 3]
                positions, rows = joined(positions)  # STL repeats them in each face: all edges would be sharp
                yield part(positions, rows[geometry.faces])

    return read


READERS = {
    "glb": gltf_scene.read,
    "gltf": gltf_scene.read,
    "obj": obj.read,
    "dae": dae.read,
    "ply": ply.read,
    "off": off.read,
    **{kind: _through_trimesh(kind) for kind in ("stl", "3mf")},
}
FORMATS = tuple(READERS)
