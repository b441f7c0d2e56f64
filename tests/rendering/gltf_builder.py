"""Small glTF files for tests, built attribute by attribute; and how a mesh looks from the front."""

import base64
import io
import json
import struct

import numpy as np
from PIL import Image

from mvdream_fast.rendering.mesh import Mesh
from mvdream_fast.rendering.mesh_file import load_mesh
from mvdream_fast.rendering.orbits import look_at_origin

COMPONENTS = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
TYPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}
# A square of side 2 in the plane z = 0 that faces +Z, the front; (0, 0) is the image's top left corner.
SQUARE = [(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)]
SQUARE_UV = [(0, 1), (1, 1), (1, 0), (0, 0)]
SQUARE_FACES = [0, 1, 2, 0, 2, 3]
# What 8-bit sRGB values are in linear light (IEC 61966-2-1).
LINEAR = {0: 0.0, 64: 0.0512695, 128: 0.2158605, 192: 0.5271151, 255: 1.0}


class Builder:
    """A glTF tree and its binary data; indices come back from each method."""

    def __init__(self, **tree):
        self.tree = {"asset": {"version": "2.0"}, "bufferViews": [], "accessors": []} | tree
        self.blob = bytearray()

    def add(self, kind: str, item: dict) -> int:
        self.tree.setdefault(kind, []).append(item)
        return len(self.tree[kind]) - 1

    def view(self, data: bytes, **more) -> int:
        self.blob += b"\0" * (-len(self.blob) % 4)
        self.blob += data
        place = {"buffer": 0, "byteOffset": len(self.blob) - len(data), "byteLength": len(data)}
        return self.add("bufferViews", place | more)

    def accessor(self, values, dtype: str = "f4", stride: int = 0, **more) -> int:
        """`stride` bytes from one value to the next, with something else in between."""
        array = np.asarray(values, f"<{dtype}")
        array = array.reshape(len(array), -1)
        item = {"componentType": COMPONENTS[dtype], "count": len(array), "type": TYPES[array.shape[1]]}
        if stride:
            rows = [row.tobytes().ljust(stride, b"\xee") for row in array]
            return self.add("accessors", item | {"bufferView": self.view(b"".join(rows), byteStride=stride)} | more)
        return self.add("accessors", item | {"bufferView": self.view(array.tobytes())} | more)

    def square(self, **attributes) -> dict:
        """A primitive; values of attributes are values or indices of accessors, None leaves one out."""
        given = {"POSITION": SQUARE, "NORMAL": [(0, 0, 1)] * 4, "TEXCOORD_0": SQUARE_UV} | attributes
        indices = {k: v if isinstance(v, int) else self.accessor(v) for k, v in given.items() if v is not None}
        return {"attributes": indices, "indices": self.accessor(SQUARE_FACES, "u2")}

    def show(self, *primitives: dict, **node) -> "Builder":
        """A node with a mesh of the primitives in scene 0."""
        mesh = self.add("meshes", {"primitives": list(primitives)})
        index = self.add("nodes", {"mesh": mesh} | node)
        self.tree.setdefault("scenes", [{"nodes": []}])[0]["nodes"].append(index)
        return self

    def image(self, pixels, kind: str = "PNG", **options) -> dict:
        """An image in a bufferView."""
        return {"bufferView": self.view(encoded(pixels, kind, **options)), "mimeType": f"image/{kind.lower()}"}

    def texture(self, pixels, sampler: dict | None = None) -> dict:
        """A textureInfo."""
        texture = {"source": self.add("images", self.image(pixels))}
        if sampler is not None:
            texture["sampler"] = self.add("samplers", sampler)
        return {"index": self.add("textures", texture)}

    def material(self, base: dict | None = None, **more) -> int:
        """`base` is pbrMetallicRoughness."""
        return self.add("materials", {"pbrMetallicRoughness": base or {}} | more)

    def json(self, uri: str | None = None) -> bytes:
        buffer = {"byteLength": len(self.blob)} | ({"uri": uri} if uri else {})
        return json.dumps({"buffers": [buffer]} | self.tree).encode()

    def data_uri(self) -> str:
        return "data:application/octet-stream;base64," + base64.b64encode(bytes(self.blob)).decode()

    def glb(self) -> bytes:
        text = self.json()
        text += b" " * (-len(text) % 4)
        blob = bytes(self.blob) + b"\0" * (-len(self.blob) % 4)
        head = b"glTF" + struct.pack("<II", 2, 28 + len(text) + len(blob))
        return head + struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(blob), b"BIN\0") + blob

    def load(self) -> Mesh:
        return load_mesh(self.glb(), "glb")


def sparse(builder: Builder, rows, values, count: int, **base) -> int:
    """An accessor of `count` vectors whose `rows` are replaced."""
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


def two_scenes() -> Builder:
    """A square at 0 in the first scene, one at x = 5 in the second."""
    builder = Builder()
    builder.show(builder.square())
    builder.show(builder.square(), translation=[5, 0, 0])
    builder.tree["scenes"] = [{"nodes": [0]}, {"nodes": [1]}]
    return builder


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
    matrices = builder.accessor([np.eye(4).reshape(-1), inverse.T.reshape(-1)])
    builder.tree["nodes"] += [{"children": [2]}, {"translation": [0, 3, 0]}]
    builder.tree["scenes"][0]["nodes"].append(1)
    builder.tree["skins"] = [{"joints": [1, 2], "inverseBindMatrices": matrices}]
    return builder


def encoded(pixels, kind: str = "PNG", **options) -> bytes:
    """[h, w] or [h, w, 3 or 4] as a file of an image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels, np.uint8))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corners(mesh: Mesh) -> np.ndarray:
    """All corners of all triangles in the file's own axes, [M, 3, 3]."""
    points = np.concatenate([part.positions[part.faces] for part in mesh.parts])
    return np.stack([points[..., 0], points[..., 2], -points[..., 1]], -1)


def picture(renderer, mesh: Mesh, azimuth: float = 0.0, lit: bool = False, samples: int = 1) -> np.ndarray:
    """RGBA [32, 32, 4] of a normalised mesh; the square's quarters are in the middle at rows and columns 10 and 21."""
    pose = look_at_origin(azimuth, 0, 1.03 / np.sin(np.radians(20)))[None]
    return renderer.render(mesh.normalised(), pose, np.radians([40.0]).astype(np.float32), 32, samples, lit)[0]


def quarters(renderer, mesh: Mesh, **more) -> list[tuple[int, ...]]:
    """The colours of the square's quarters: top left, top right, bottom left, bottom right."""
    view = picture(renderer, mesh, **more)
    return [tuple(view[y, x].tolist()) for y in (10, 21) for x in (10, 21)]
