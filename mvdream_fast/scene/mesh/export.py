"""Writes a Mesh as GLB, OBJ or PLY: the one place where the world's axes and colours become a file format's.

glTF is Y-up with the front at +Z, and its vertex colours are linear; the world is z-up with the front at -Y, sRGB.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from mvdream_fast.core.color import to_linear
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.files import write_together
from mvdream_fast.core.images import to_bytes
from mvdream_fast.scene.mesh.mesh import Mesh

Y_UP = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=np.float32)  # (x, y, z) -> (x, z, -y)
VIEWER_FOVY_DEG, VIEWER_ELEVATION_DEG = 40.0, 15.0


def glb_bytes(mesh: Mesh, name: str = "asset") -> bytes:
    """The mesh as binary glTF 2.0: Y up, matt and double-sided, with the texture, or else float linear COLOR_0."""
    if mesh.texture is not None:
        return _binary(_textured(mesh, mesh.texture, name).export(file_type="glb", include_normals=True))
    scene = _scene(mesh, to_linear(mesh.colors.astype(np.float64)), name)
    return _binary(scene.export(file_type="glb", include_normals=True, tree_postprocessor=_add_material))


def _binary(exported: object) -> bytes:
    """What trimesh made for a binary format; its `export` gives other types for others."""
    if not isinstance(exported, bytes):
        raise TypeError(f"trimesh's export must give bytes here, got {type(exported).__name__}; see its release notes")
    return exported


def viewer_html(mesh: Mesh) -> str:
    """A page that turns the mesh in a browser: trimesh's viewer, which carries its own three.js and fetches nothing.

    That viewer shows colours as they are, so they go in as sRGB; of the vertices, even where there is a texture.
    """
    from trimesh.viewer.notebook import scene_to_html

    scene = _scene(mesh, mesh.colors, "asset")
    away = scene.scale / 2 / np.sin(np.radians(VIEWER_FOVY_DEG / 2))  # all of it stays in view while it is turned
    scene.set_camera(
        (-np.radians(VIEWER_ELEVATION_DEG), 0.0, 0.0), away, scene.centroid, fov=(VIEWER_FOVY_DEG, VIEWER_FOVY_DEG)
    )
    vars(scene)["export"] = partial(scene.export, include_normals=True, tree_postprocessor=_add_material)
    # White things show on grey.
    return scene_to_html(scene).replace("THREE.Color(0xffffff)", "THREE.Color(0x808080)")


def _textured(mesh: Mesh, texture: np.ndarray, name: str):
    """A trimesh scene, Y up, with the mesh's texture and normals."""
    import trimesh
    from PIL import Image
    from trimesh.visual import TextureVisuals
    from trimesh.visual.material import PBRMaterial

    material = PBRMaterial(
        name="texture",
        baseColorTexture=Image.fromarray(texture),
        baseColorFactor=[255, 255, 255, 255],
        metallicFactor=0.0,
        roughnessFactor=1.0,
        doubleSided=True,
    )
    visual = TextureVisuals(uv=mesh.uvs, material=material)
    normals = _turned(mesh.normals, Y_UP)
    body = trimesh.Trimesh(mesh.vertices @ Y_UP.T, mesh.faces, process=False, visual=visual, vertex_normals=normals)
    scene = trimesh.Scene()
    scene.add_geometry(body, geom_name=name, node_name=name)
    return scene


def _scene(mesh: Mesh, colors: np.ndarray, name: str):
    """A trimesh scene, Y up, with float colours [n, 3] that trimesh carries as a custom attribute."""
    import trimesh

    rgba = np.concatenate([colors, np.ones((len(colors), 1))], axis=1).astype(np.float32)
    body = trimesh.Trimesh(
        mesh.vertices @ Y_UP.T,
        mesh.faces,
        process=False,
        vertex_attributes={"_COLOR": rgba},
        vertex_normals=_turned(mesh.normals, Y_UP),
    )
    scene = trimesh.Scene()
    scene.add_geometry(body, geom_name=name, node_name=name)
    return scene


def _add_material(tree: dict) -> None:
    """trimesh writes no material for vertex colours, and its own COLOR_0 has 8 bits, which bands dark linear values."""
    tree["materials"] = [
        {
            "name": "vertex colours",
            "doubleSided": True,
            "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0},
        }
    ]
    for mesh in tree.get("meshes", []):
        for primitive in mesh["primitives"]:
            primitive["attributes"]["COLOR_0"] = primitive["attributes"].pop("_COLOR")
            primitive["material"] = 0


def mesh_files(mesh: Mesh, name: str, up: Literal["y", "z"] = "y") -> dict[str, bytes]:
    """The mesh in the format of the name's ending, as files by name: the one of that name, then those that it names.

    GLB is one file, always Y-up. OBJ and PLY take `up`, and carry sRGB colours and the mesh's normals. An OBJ with a
    texture is three files. PLY has no place for one: its colours at the vertices are left, and a comment that says so.

    Raises: ArgumentError for another ending.
    """
    file_type = name.rpartition(".")[2].lower()
    if file_type not in ("glb", "obj", "ply"):
        raise ArgumentError(f"a mesh can be written as .glb, .obj or .ply, got .{file_type}")
    if file_type == "glb":
        return {name: glb_bytes(mesh)}
    return _obj(mesh, name, up) if file_type == "obj" else {name: _ply(mesh, up)}


def _obj(mesh: Mesh, name: str, up: str) -> dict[str, bytes]:
    """The OBJ, and where it has a texture a PNG and an MTL. Their names hold no spaces, which would end them."""
    from PIL import Image
    from trimesh.exchange.obj import export_obj
    from trimesh.visual import TextureVisuals
    from trimesh.visual.material import SimpleMaterial

    body, stem = _body(mesh, up), re.sub(r"\s", "_", name.rpartition(".")[0])
    if mesh.texture is not None:
        matt = {"diffuse": [255] * 4, "ambient": [0, 0, 0, 255], "specular": [0, 0, 0, 255], "glossiness": 0.0}
        material = SimpleMaterial(Image.fromarray(mesh.texture), name=f"{stem}_texture", **matt)
        body.visual = TextureVisuals(uv=mesh.uvs, material=material)
    text, beside = export_obj(
        body,
        include_normals=mesh.normals is not None,
        return_texture=True,
        mtl_name=f"{stem}.mtl",
        header=None,  # pyright: ignore[reportArgumentType] # trimesh annotates str, and says None for none
    )
    return {name: text.encode(), **beside}


def _ply(mesh: Mesh, up: str) -> bytes:
    data = _binary(_body(mesh, up).export(file_type="ply", vertex_normal=mesh.normals is not None))
    if mesh.texture is None:
        return data
    note = b"comment PLY holds no texture: these are its colours at the vertices\n"
    return data.replace(b"element vertex", note + b"element vertex", 1)


def _body(mesh: Mesh, up: str):
    """A trimesh mesh with the vertices' colours as bytes."""
    import trimesh

    turn = Y_UP if up == "y" else np.eye(3, dtype=np.float32)
    normals, colors = _turned(mesh.normals, turn), to_bytes(mesh.colors)
    return trimesh.Trimesh(
        mesh.vertices @ turn.T, mesh.faces, process=False, vertex_colors=colors, vertex_normals=normals
    )


def _turned(normals: np.ndarray | None, turn: np.ndarray) -> np.ndarray | None:
    return None if normals is None else normals @ turn.T


def save_mesh(mesh: Mesh, path: Path | str, up: Literal["y", "z"] = "y", say: Callable[[str], None] = print) -> None:
    """Writes the mesh in the format of the file's ending, with the files beside it that it names, all or nothing.

    `say` is told what the format cannot hold. Raises ArgumentError, OutputError.
    """
    path = Path(path)
    write_together({path.with_name(name): data for name, data in mesh_files(mesh, path.name, up).items()})
    if mesh.texture is not None and path.suffix.lower() == ".ply":
        say(f"{path.name}: PLY holds no texture, only its colours at the vertices; GLB and OBJ hold it")
