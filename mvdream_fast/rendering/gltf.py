"""The container of glTF 2.0 (ISO/IEC 12113): JSON, buffers, accessors, images, and which extensions can be read.

What the JSON describes (nodes, meshes, materials) is gltf_scene.py's. Everything is checked before it is allocated.
"""

import base64
import json
import urllib.parse
from functools import lru_cache

import numpy as np

from mvdream_fast.rendering import images
from mvdream_fast.rendering.mesh import MeshError
from mvdream_fast.rendering.reading import Reading

MAX_VALUES, MAX_NODES = 20_000_000, 5_000

READ = {
    "KHR_materials_emissive_strength", "KHR_materials_pbrSpecularGlossiness", "KHR_materials_unlit",
    "KHR_materials_variants", "KHR_mesh_quantization", "KHR_node_visibility", "KHR_texture_transform",
    "EXT_mesh_gpu_instancing", "EXT_texture_avif", "EXT_texture_webp",
}  # fmt: skip
# The renderer shows base colour under a light of its own: what these say changes nothing of it.
REFLECTIONS, LIGHTS, BEHAVIOUR = "only reflections change", "the light is the renderer's", "nothing moves in an image"
HARMLESS = {
    "KHR_materials_anisotropy": REFLECTIONS,
    "KHR_materials_clearcoat": REFLECTIONS,
    "KHR_materials_dispersion": REFLECTIONS,
    "KHR_materials_ior": REFLECTIONS,
    "KHR_materials_iridescence": REFLECTIONS,
    "KHR_materials_sheen": REFLECTIONS,
    "KHR_materials_specular": REFLECTIONS,
    "KHR_lights_punctual": LIGHTS,
    "EXT_lights_ies": LIGHTS,
    "EXT_lights_image_based": LIGHTS,
    "KHR_animation_pointer": BEHAVIOUR,
    "KHR_interactivity": BEHAVIOUR,
    "KHR_node_hoverability": BEHAVIOUR,
    "KHR_node_selectability": BEHAVIOUR,
    "KHR_xmp_json_ld": "it says who made the file",
    "MSFT_lod": "the finest level is the node itself",
}
# Compressed data may come with a plain copy for readers like this one; without it the file cannot be read.
COMPRESSED = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression")

COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF")
IMAGE_EXTENSIONS = {"EXT_texture_webp": "WEBP", "EXT_texture_avif": "AVIF"}


class Document:
    """A glTF file whose parts are fetched by index, and checked on the way."""

    def __init__(self, content: bytes, reading: Reading):
        self.reading = reading
        text, self.chunk = _chunks(content) if content[:4] == b"glTF" else (content, None)
        try:
            self.tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MeshError(f"its JSON is damaged ({type(error).__name__})") from None
        if not isinstance(self.tree, dict):
            raise MeshError("its JSON is no object")
        _check(self.tree)
        _check_extensions(self.tree, reading)
        self.buffer, self.image = lru_cache(None)(self._buffer), lru_cache(None)(self._image)

    def get(self, kind: str, index) -> dict:
        """`tree[kind][index]`. Raises: MeshError where there is no such thing."""
        items = self.tree.get(kind, [])
        if type(index) is not int or not 0 <= index < len(items):
            raise MeshError(f"refers to {kind}[{index!r}], and there are {len(items)}")
        return items[index]

    def accessor(self, index) -> np.ndarray:
        """[count, width] in the file's component type, or float32 where it is normalised."""
        accessor = self.get("accessors", index)
        dtype, width = np.dtype(COMPONENTS[accessor["componentType"]]), WIDTHS[accessor["type"]]
        count = _count(accessor["count"])
        if "bufferView" in accessor:
            values = self._strided(accessor, dtype, width, count)
        else:
            values = np.zeros((count, width), dtype)
        if "sparse" in accessor:
            sparse = accessor["sparse"]
            n, index_type = _count(sparse["count"]), np.dtype(COMPONENTS[sparse["indices"]["componentType"]])
            rows = self._strided(sparse["indices"], index_type, 1, n)[:, 0]
            if n and rows.max() >= count:
                raise MeshError("a sparse accessor replaces values that it does not have")
            values = values.copy()
            values[rows] = self._strided(sparse["values"], dtype, width, n)
        if accessor.get("normalized") and dtype.kind != "f":
            return np.maximum(values.astype(np.float32) / np.iinfo(dtype).max, -1)
        return values

    def view(self, index) -> memoryview:
        """The bytes of a bufferView."""
        view = self.get("bufferViews", index)
        start, length = _count(view.get("byteOffset", 0)), _count(view["byteLength"])
        data = self.buffer(view["buffer"])
        if start + length > len(data):
            raise MeshError(f"bufferViews[{index}] ends behind its buffer: the file is cut short")
        return data[start : start + length]

    def _strided(self, where: dict, dtype: np.dtype, width: int, count: int) -> np.ndarray:
        data, start = self.view(where["bufferView"]), _count(where.get("byteOffset", 0))
        size = dtype.itemsize * width
        stride = _count(self.get("bufferViews", where["bufferView"]).get("byteStride", 0)) or size
        if count and start + stride * (count - 1) + size > len(data):
            raise MeshError(f"an accessor of {count} values ends behind its bufferView: the file is cut short")
        if not count:
            return np.zeros((0, width), dtype)
        return np.ndarray((count, width), dtype, data, start, (stride, dtype.itemsize))

    def _buffer(self, index) -> memoryview:
        buffer = self.get("buffers", index)
        if "uri" in buffer:
            data = self._uri(buffer["uri"])
        elif index == 0 and self.chunk is not None:
            data = self.chunk
        else:
            compressed = [name for name in buffer.get("extensions", {}) if name in COMPRESSED]
            raise MeshError(needs(compressed) if compressed else f"buffers[{index}] has no data")
        if len(data) < _count(buffer["byteLength"]):
            raise MeshError(f"buffers[{index}] has {len(data)} bytes of {buffer['byteLength']}: the file is cut short")
        return memoryview(data)

    def _uri(self, uri: str) -> bytes:
        if uri.startswith("data:"):
            head, comma, data = uri.partition(",")
            if not comma:
                raise MeshError("a data URI has no data")
            plain = urllib.parse.unquote_to_bytes(data)
            return base64.b64decode(plain) if head.endswith(";base64") else plain
        data = self.reading.file(urllib.parse.unquote(uri))
        if data is None:
            raise MeshError(f"needs {uri!r}, which is not beside it")
        return data

    def texture(self, index) -> tuple[np.ndarray, dict]:
        """The pixels of a texture, [th, tw, 4] uint8, and its sampler's JSON."""
        texture = self.get("textures", index)
        extensions = texture.get("extensions", {})
        better = [name for name, kind in IMAGE_EXTENSIONS.items() if name in extensions and images.readable(kind)]
        source = extensions[better[0]]["source"] if better else texture.get("source")
        if source is None:
            raise MeshError(needs(list(extensions) or ["a texture without an image"]))
        return self.image(source), self.get("samplers", texture["sampler"]) if "sampler" in texture else {}

    def _image(self, index) -> np.ndarray:
        image = self.get("images", index)
        content = self._uri(image["uri"]) if "uri" in image else bytes(self.view(image["bufferView"]))
        return images.decode(content, IMAGE_FORMATS)


def _chunks(content: bytes) -> tuple[bytes, bytes | None]:
    """The JSON and the binary chunk of a GLB."""
    version = int.from_bytes(content[4:8], "little")
    if version != 2:
        raise MeshError(f"is glTF {version}, only glTF 2 can be read; convert it to GLB")
    if int.from_bytes(content[8:12], "little") > len(content):
        raise MeshError("the file is cut short")
    chunks, at = {}, 12
    while at + 8 <= len(content):
        length = int.from_bytes(content[at : at + 4], "little")
        chunks.setdefault(content[at + 4 : at + 8], content[at + 8 : at + 8 + length])
        at += 8 + length
    if b"JSON" not in chunks:
        raise MeshError("has no JSON chunk")
    return chunks[b"JSON"], chunks.get(b"BIN\0")


def _check(tree: dict) -> None:
    """The version, and counts that a small file can promise and that would cost minutes or gigabytes."""
    version = str(tree.get("asset", {}).get("version", "1.0"))
    if not version.startswith("2"):
        raise MeshError(f"is glTF {version}, only glTF 2 can be read; convert it to GLB")
    least = str(tree.get("asset", {}).get("minVersion", "2.0"))
    if least != "2.0":
        raise MeshError(f"needs glTF {least}, only glTF 2.0 can be read; export it as that")
    promised = sum(_count(accessor.get("count", 0)) for accessor in tree.get("accessors", []))
    for what, number, most in (("values", promised, MAX_VALUES), ("nodes", len(tree.get("nodes", [])), MAX_NODES)):
        if number > most:
            raise MeshError(f"promises {number} {what}, at most {most} are taken")


def _check_extensions(tree: dict, reading: Reading) -> None:
    unknown = [name for name in tree.get("extensionsRequired", []) if name not in READ and name not in HARMLESS]
    if unknown:
        raise MeshError(needs(unknown))
    for name in tree.get("extensionsUsed", []):
        if name not in READ and name not in HARMLESS and name not in (*COMPRESSED, "KHR_texture_basisu"):
            reading.note(f"{name}, which the file can do without, is not drawn")


def needs(names: list[str]) -> str:
    """The sentence that refuses a file."""
    return f"needs {', '.join(map(str, names))}, which cannot be read; export it without"


def _count(value) -> int:
    if type(value) is not int or value < 0:
        raise MeshError(f"a count or an offset is {value!r}")
    return value
