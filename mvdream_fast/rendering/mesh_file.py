"""Meshes as the renderers need them: parts of triangles with colours, opacity and textures, loaded through trimesh.

Here: reading a file under caps, normalising, recolouring. Not here: catalogues (catalogue.py) and drawing.
"""

import io
import json
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mvdream_fast.core.errors import InputFileError

FORMATS = ("glb", "gltf", "obj", "dae", "ply", "stl", "3mf", "off")
FOREIGN = ("fbx", "blend", "usd", "usdz", "3ds", "max", "wrl", "x3d")  # meshes that cannot be read: said so by name
MAX_FILE_BYTES = 256 << 20
MAX_FACES = 1_000_000
MAX_VALUES, MAX_NODES = 20_000_000, 5_000  # of a glTF
MAX_TEXTURE_PIXELS = 8192 * 8192
TEXTURE_SIZE = 512
CREASE_COSINE = 0.7  # edges sharper than 45 degrees stay sharp
MAX_VALENCE = 64
CORNERS_AT_A_TIME = 1 << 18


class MeshError(InputFileError):
    """A mesh that is missing, unreadable, empty or too large; the message names it."""


@dataclass(frozen=True)
class Part:
    """Triangles that share a material. Colours are sRGB in [0, 1] and multiply the texture."""

    positions: np.ndarray  # [N, 3] float32
    normals: np.ndarray  # [N, 3] float32, zero where the file's normals cancel
    uv: np.ndarray  # [N, 2] float32, v upwards
    colours: np.ndarray  # [N, 3] float32
    faces: np.ndarray  # [M, 3] int32
    opacity: float = 1.0
    texture: np.ndarray | None = None  # [th, tw, 4] uint8, top row first
    material: str = ""


@dataclass(frozen=True)
class Mesh:
    """An object in the world frame: z up, its front looking to -Y."""

    parts: tuple[Part, ...]

    @property
    def n_faces(self) -> int:
        return sum(len(part.faces) for part in self.parts)

    def normalised(self, fit: str = "sphere") -> "Mesh":
        """Centres the bounding box; scales the farthest vertex to radius 1 ("sphere") or the longest side to 1 ("box").

        Raises: MeshError where there is no extent.
        """
        used = np.concatenate([part.positions[np.unique(part.faces)] for part in self.parts]).astype(np.float64)
        low, high = used.min(0), used.max(0)
        centre = (low + high) / 2
        size = np.linalg.norm(used - centre, axis=1).max() if fit == "sphere" else (high - low).max()
        if not np.isfinite(size) or size <= 0:
            raise MeshError("the mesh has no extent")
        parts = [replace(p, positions=((p.positions - centre) / size).astype(np.float32)) for p in self.parts]
        return Mesh(tuple(parts))

    def rotated(self, matrix: np.ndarray) -> "Mesh":
        """Applies a 3x3 rotation to positions and normals."""
        turn = np.asarray(matrix, np.float32).T
        return Mesh(tuple(replace(p, positions=p.positions @ turn, normals=p.normals @ turn) for p in self.parts))

    def brightened(self, gain: float) -> "Mesh":
        """Untextured colours times `gain`, held below 1 without changing their hue."""
        return Mesh(
            tuple(p if p.texture is not None else replace(p, colours=_gained(p.colours, gain)) for p in self.parts)
        )

    def opaque(self) -> "Mesh":
        """The same mesh with every part solid."""
        return Mesh(tuple(replace(part, opacity=1.0) for part in self.parts))

    def recoloured(self, parts: list[int], target: np.ndarray, flat: bool = False) -> "Mesh":
        """Paints the listed parts in an sRGB colour; light and dark details of textures stay unless `flat`."""
        painted = list(self.parts)
        for i in parts:
            painted[i] = _paint(painted[i], np.asarray(target, np.float32), flat)
        return Mesh(tuple(painted))


# trimesh's frames (y up, front +Z, as glTF) to the world's (z up, front -Y).
WORLD_FROM_GLTF = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32)


def load_mesh(source: Path | bytes, file_type: str | None = None, siblings: Mapping[str, bytes] | None = None) -> Mesh:
    """Reads a mesh in any of FORMATS into the world frame (files are taken as y up with the front at +Z).

    Only `siblings` (or the folder's own files) are ever opened for materials and textures: no URI, no parent folder.
    Raises: MeshError for everything that trimesh, the caps or an empty scene can object to.
    """
    name = source.name if isinstance(source, Path) else f"{file_type} mesh"
    file_type = (file_type or Path(name).suffix.lstrip(".")).lower()
    if file_type not in FORMATS:
        hint = "; convert it to GLB" if file_type in FOREIGN else ""
        raise MeshError(f"{name}: the format must be one of {', '.join(FORMATS)}{hint}")
    try:
        content = _read(source, name)
        _check_archive(content)
        _check_gltf(content, file_type)
        scene = _parse(content, file_type, siblings if siblings is not None else _Folder(source))
        instances = list(_flatten(scene))
        _check_faces(sum(len(geometry.faces) for geometry, _ in instances))
        parts = [part for part in map(_part, instances) if part is not None]
    except MeshError as error:
        raise MeshError(str(error) if name in str(error) else f"{name}: {error}") from None
    except Exception as error:
        # A damaged file reaches a zoo of exceptions in the parsers: the user needs one sentence with the file's name.
        raise MeshError(f"{name}: not a readable {file_type} mesh ({type(error).__name__}: {error})") from None
    if not parts:
        raise MeshError(f"{name}: all of the mesh is invisible")
    return Mesh(tuple(parts)).rotated(WORLD_FROM_GLTF)


def _check_faces(n_faces: int) -> None:
    if not n_faces:
        raise MeshError("the mesh has no triangles")
    if n_faces > MAX_FACES:
        raise MeshError(f"the mesh has {n_faces} faces, at most {MAX_FACES} are taken; decimate it first")


class _Folder(Mapping):
    """The files beside a mesh as name -> bytes; names that lead out of the folder do not exist."""

    def __init__(self, source):
        self.root = source.resolve().parent if isinstance(source, Path) else None

    def __getitem__(self, name: str) -> bytes:
        path = (self.root / name).resolve() if self.root else None
        if path is None or not path.is_relative_to(self.root) or not path.is_file():
            raise KeyError(name)
        return _read(path, name)

    def __iter__(self):
        return iter(())

    def __len__(self) -> int:
        return 0


def _read(source: Path | bytes, name: str) -> bytes:
    size = len(source) if isinstance(source, bytes) else os.stat(source).st_size
    if size > MAX_FILE_BYTES:
        raise MeshError(f"{name}: the file has {size >> 20} MB, at most {MAX_FILE_BYTES >> 20} are taken")
    return source if isinstance(source, bytes) else source.read_bytes()


def _check_archive(content: bytes) -> None:
    """A 3MF is a zip: its unpacked size is capped as well."""
    if content[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            total = sum(info.file_size for info in archive.infolist())
        if total > MAX_FILE_BYTES:
            raise MeshError(f"unpacks to {total >> 20} MB, at most {MAX_FILE_BYTES >> 20} are taken")


def _check_gltf(content: bytes, file_type: str) -> None:
    """Counts that a small glTF can promise and that would cost minutes or gigabytes before anything else objects."""
    if file_type == "glb":
        length = int.from_bytes(content[12:16], "little")
        content = content[20 : 20 + length]
    elif file_type != "gltf":
        return
    tree = json.loads(content)
    version = str(tree.get("asset", {}).get("version", "1.0"))
    if not version.startswith("2"):
        raise MeshError(f"is glTF {version}, only glTF 2 can be read; convert it to GLB")
    promised = sum(int(accessor.get("count", 0)) for accessor in tree.get("accessors", []))
    for what, number, most in (("values", promised, MAX_VALUES), ("nodes", len(tree.get("nodes", [])), MAX_NODES)):
        if number > most:
            raise MeshError(f"promises {number} {what}, at most {most} are taken")


def _parse(content: bytes, file_type: str, siblings: Mapping[str, bytes]):
    import trimesh
    from PIL import Image

    class Resolver(trimesh.resolvers.Resolver):
        def __init__(self):
            pass

        def get(self, name: str) -> bytes:
            return _lookup(siblings, str(name))

        def keys(self):
            return list(siblings)

        def write(self, name, data):
            raise PermissionError(name)

        def namespaced(self, namespace):
            return self

    # Pillow's own limit would make trimesh drop a large texture silently; _texture refuses it with a sentence.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trimesh.load(
                io.BytesIO(content), file_type=file_type, resolver=Resolver(), force="scene", process=False
            )
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _lookup(siblings: Mapping[str, bytes], name: str) -> bytes:
    """The file of that name, else of its last path component or word: exporters leave their own absolute paths."""
    name = name.replace("\\", "/").removeprefix("./")
    for candidate in dict.fromkeys((name, name.rpartition("/")[2], (name.split() or [""])[-1].rpartition("/")[2])):
        try:
            return siblings[candidate]
        except KeyError:
            continue
    raise KeyError(name)


def _flatten(scene):
    """Every instance of every geometry as (mesh, 4x4 transform)."""
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        if hasattr(geometry, "faces") and len(geometry.faces):
            yield geometry, np.asarray(transform)


def _part(item) -> Part | None:
    geometry, transform = item
    positions = np.asarray(geometry.vertices, np.float64) @ transform[:3, :3].T + transform[:3, 3]
    faces = np.asarray(geometry.faces, np.int32)
    if not np.isfinite(positions).all():
        raise MeshError("a vertex is not a finite number")
    has_normals = "vertex_normals" in geometry._cache.cache
    rgb, opacity, texture, uv, name = _material(geometry)
    if opacity <= 0.01:
        return None
    colours = np.broadcast_to(np.asarray(rgb, np.float32), positions.shape)
    if has_normals:
        linear = transform[:3, :3]
        rotation = np.linalg.inv(linear).T if abs(np.linalg.det(linear)) > 1e-12 else np.eye(3)
        normals = _unit(np.nan_to_num(np.asarray(geometry.vertex_normals, np.float64)) @ rotation.T)
    else:
        normals, corners, faces = _welded(_creased(positions, faces), faces)
        positions, colours, uv = positions[corners], colours[corners], uv[corners]
    return Part(
        positions.astype(np.float32), normals.astype(np.float32), uv, colours.copy(), faces, opacity, texture, name
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _creased(positions: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Corner normals [3M, 3] for files without any: each face's own, averaged with its neighbours at the corner that
    turn by less than CREASE_COSINE (by area, so that slivers do not tilt them)."""
    a, b, c = (positions[faces[:, i]] for i in range(3))
    area = np.cross(b - a, c - a)
    unit = _unit(area)
    total = np.empty((faces.size, 3))
    for begin, end, corner, other in _neighbours(faces, len(positions)):
        near = (unit[corner // 3] * unit[other // 3]).sum(1) > CREASE_COSINE
        corner, weight = corner[near] - begin, area[other[near] // 3]
        total[begin:end] = np.stack([np.bincount(corner, weight[:, k], end - begin) for k in range(3)], 1)
    return np.where((total**2).sum(1, keepdims=True) > 0, _unit(total), np.repeat(unit, 3, axis=0))


def _welded(normals: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joins corners of a vertex that have the same normal: normals [K, 3], their vertices [K], new faces [M, 3]."""
    steps = np.round(normals * 1000).astype(np.int64) + 1024
    key = ((faces.reshape(-1).astype(np.int64) << 33) | (steps[:, 0] << 22) | (steps[:, 1] << 11)) + steps[:, 2]
    _, first, index = np.unique(key, return_index=True, return_inverse=True)
    return normals[first], faces.reshape(-1)[first], index.reshape(-1, 3).astype(np.int32)


def _neighbours(faces: np.ndarray, n_vertices: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """All pairs of corners (rows of faces.reshape(-1)) that share a vertex, each with itself included.

    They come as (begin, end, corner, other), those of corners begin..end at a time: a million faces have many. A corner
    of a vertex with more than MAX_VALENCE is paired with itself only: pairs grow with the square.
    """
    vertex = faces.reshape(-1)
    order = np.argsort(vertex, kind="stable")
    valence = np.bincount(vertex, minlength=n_vertices)
    first = np.cumsum(valence) - valence
    count = np.where(valence[vertex] > MAX_VALENCE, 1, valence[vertex])
    for begin in range(0, len(vertex), CORNERS_AT_A_TIME):
        end = min(begin + CORNERS_AT_A_TIME, len(vertex))
        repeats = count[begin:end]
        corner = np.repeat(np.arange(begin, end), repeats)
        within = np.arange(len(corner)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        crowded = valence[vertex[corner]] > MAX_VALENCE
        yield begin, end, corner, np.where(crowded, corner, order[(first[vertex[corner]] + within) % len(order)])


def _material(geometry):
    """Colour [3] or [N, 3], opacity, texture, uv [N, 2] and material name of a trimesh geometry."""
    n = len(geometry.vertices)
    visual = geometry.visual
    uv = getattr(visual, "uv", None)
    has_uv = uv is not None and len(uv) == n and np.isfinite(uv).all()
    uv = np.asarray(uv, np.float32) if has_uv else np.zeros((n, 2), np.float32)
    material = getattr(visual, "material", None)
    if material is None:
        colours = np.asarray(getattr(visual, "vertex_colors", None), np.float32).reshape(-1, 4)
        if len(colours) != n or visual.kind is None:
            return np.full(3, 0.8, np.float32), 1.0, None, uv, ""
        return colours[:, :3] / 255, float(colours[:, 3].mean() / 255), None, uv, ""
    name = str(getattr(material, "name", "") or "")
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    rgba = getattr(material, "baseColorFactor", None)
    rgba = getattr(material, "diffuse", None) if rgba is None else rgba
    rgba = np.asarray([204, 204, 204, 255] if rgba is None else rgba, np.float32).reshape(-1)
    rgba = rgba / 255 if rgba.max() > 1 else rgba
    opacity = _opacity(material, float(rgba[3]) if len(rgba) > 3 else 1.0)
    texture = _texture(image) if image is not None and has_uv else None
    rgb = rgba[:3] if texture is None else _tint(rgba[:3], texture)
    return rgb, opacity, texture, uv, name


def _opacity(material, default: float) -> float:
    """MTL's `d` (or 1 - `Tr`) reaches us only as a list of strings in `kwargs`."""
    extra = getattr(material, "kwargs", None) or {}
    try:
        if "d" in extra:
            return float(np.clip(float(extra["d"][-1]), 0, 1))
        if "tr" in extra:
            return float(np.clip(1 - float(extra["tr"][-1]), 0, 1))
    except (TypeError, ValueError, IndexError):
        pass
    return default


def _texture(image) -> np.ndarray:
    """RGBA uint8 with sides of at most TEXTURE_SIZE, decoded at reduced size where the format can."""
    from PIL import Image

    if image.width * image.height > MAX_TEXTURE_PIXELS:
        raise MeshError(f"a texture has {image.width} x {image.height} pixels; make it smaller")
    image.draft("RGB", (TEXTURE_SIZE, TEXTURE_SIZE))
    image = image.convert("RGBA")
    if max(image.size) > TEXTURE_SIZE:
        image = image.resize([max(1, min(TEXTURE_SIZE, side)) for side in image.size], Image.Resampling.BOX)
    return np.asarray(image)


def _tint(rgb: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """The factor on a texture: exporters leave a dark or arbitrary diffuse beside it, so only gray ones take a hue."""
    mean = texture[..., :3].reshape(-1, 3).mean(0) / 255
    if rgb.max() < 0.05 or (mean.max() - mean.min()) > 0.08:
        return np.ones(3, np.float32)
    return rgb / rgb.max()


def _gained(colours: np.ndarray, gain: float) -> np.ndarray:
    return (colours * np.minimum(gain, 1 / np.maximum(colours.max(1, keepdims=True), 1e-3))).astype(np.float32)


def _paint(part: Part, target: np.ndarray, flat: bool) -> Part:
    """Replaces hue and saturation by the target's; lightness relative to the part's own mean stays."""
    weights = np.array([0.3, 0.59, 0.11], np.float32)
    if part.texture is None or flat:
        light = part.colours @ weights
        ratio = np.ones_like(light) if flat else np.clip(light / max(light.mean(), 1e-3), 0.6, 1.25)
        texture = part.texture
        if texture is not None:
            texture = texture.copy()
            texture[..., :3] = 255
        return replace(part, colours=np.clip(ratio[:, None] * target, 0, 1).astype(np.float32), texture=texture)
    light = (part.texture[..., :3].astype(np.float32) / 255) @ weights
    solid = part.texture[..., 3] > 127
    mean = light[solid].mean() if solid.any() else light.mean()
    ratio = np.clip(light / max(float(mean), 0.05), 0.55, 1.3)
    texture = part.texture.copy()
    texture[..., :3] = np.clip(ratio[..., None] * target * 255, 0, 255)
    return replace(part, colours=np.ones_like(part.colours), texture=texture)
