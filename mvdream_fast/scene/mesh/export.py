"""Writes a Mesh as GLB, OBJ or PLY: the one place where the world's axes and colours become a file format's.

glTF is Y-up with the front at +Z, and its vertex colours are linear; the world is z-up with the front at -Y, sRGB.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from mvdream_fast.core.colour import to_linear
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.files import atomic_write
from mvdream_fast.scene.mesh.mesh import Mesh

Y_UP = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=np.float32)  # (x, y, z) -> (x, z, -y)
VIEWER_FOVY_DEG, VIEWER_ELEVATION_DEG = 40.0, 15.0


def glb_bytes(mesh: Mesh, name: str = "asset") -> bytes:
    """The mesh as binary glTF 2.0: Y up, matt and double-sided, with the texture, or else float linear COLOR_0."""
    if mesh.texture is not None:
        return _textured(mesh, name).export(file_type="glb", include_normals=True)
    scene = _scene(mesh, to_linear(mesh.colors.astype(np.float64)), name)
    return scene.export(file_type="glb", include_normals=True, tree_postprocessor=_add_material)


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
    plain = scene.export
    scene.export = lambda **options: plain(**options, include_normals=True, tree_postprocessor=_add_material)
    # White things show on grey.
    return scene_to_html(scene).replace("THREE.Color(0xffffff)", "THREE.Color(0x808080)")


def _textured(mesh: Mesh, name: str):
    """A trimesh scene, Y up, with the mesh's texture and normals."""
    import trimesh
    from PIL import Image

    material = trimesh.visual.material.PBRMaterial(
        name="texture",
        baseColorTexture=Image.fromarray(mesh.texture),
        baseColorFactor=[255, 255, 255, 255],
        metallicFactor=0.0,
        roughnessFactor=1.0,
        doubleSided=True,
    )
    visual = trimesh.visual.TextureVisuals(uv=mesh.uvs, material=material)
    normals = None if mesh.normals is None else mesh.normals @ Y_UP.T
    body = trimesh.Trimesh(mesh.vertices @ Y_UP.T, mesh.faces, process=False, visual=visual, vertex_normals=normals)
    scene = trimesh.Scene()
    scene.add_geometry(body, geom_name=name, node_name=name)
    return scene


def _scene(mesh: Mesh, colors: np.ndarray, name: str):
    """A trimesh scene, Y up, with float colours [n, 3] that trimesh carries as a custom attribute."""
    import trimesh

    rgba = np.concatenate([colors, np.ones((len(colors), 1))], axis=1).astype(np.float32)
    body = trimesh.Trimesh(mesh.vertices @ Y_UP.T, mesh.faces, process=False, vertex_attributes={"_COLOR": rgba})
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


def mesh_bytes(mesh: Mesh, file_type: Literal["glb", "obj", "ply"], up: Literal["y", "z"] = "y") -> bytes:
    """The mesh in one of three formats. GLB is always Y-up; OBJ and PLY take `up` and carry sRGB colours."""
    if file_type == "glb":
        return glb_bytes(mesh)
    if file_type not in ("obj", "ply"):
        raise ArgumentError(f"a mesh can be written as .glb, .obj or .ply, got .{file_type}")
    import trimesh

    vertices = mesh.vertices @ Y_UP.T if up == "y" else mesh.vertices
    colors = (mesh.colors * 255).round().astype(np.uint8)
    body = trimesh.Trimesh(vertices, mesh.faces, process=False, vertex_colors=colors)
    data = body.export(file_type=file_type)
    return data.encode() if isinstance(data, str) else data


def save_mesh(mesh: Mesh, path: Path | str, up: Literal["y", "z"] = "y") -> None:
    """Writes the mesh in the format of the file's ending, whole or not at all. Raises ArgumentError, OutputError."""
    path = Path(path)
    atomic_write(path, mesh_bytes(mesh, path.suffix.lstrip(".").lower(), up))
