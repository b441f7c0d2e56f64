"""COLLADA: pycollada parses it and places the geometries; here their inputs and effects become parts.

pycollada's own binding forgets colours, texture sets, wrap modes and how opacity is meant. Colours are sRGB, as viewers
take them (three.js, MeshLab): the format is silent.
"""

import io
from collections.abc import Callable, Iterator
from urllib.parse import unquote

import numpy as np

from mvdream_fast.core.color import to_linear
from mvdream_fast.core.images import to_bytes
from mvdream_fast.rendering import images
from mvdream_fast.rendering.images import mirrored, with_alpha
from mvdream_fast.rendering.mesh import HOLE, MeshError, Part, Texture
from mvdream_fast.rendering.mtl import UNSAID
from mvdream_fast.rendering.polygons import joined, part, triangulated
from mvdream_fast.rendering.reading import Reading, check_archive

# The document's axes to right, up and backwards.
Y_UP_FROM = {
    "Y_UP": np.eye(3),
    "Z_UP": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "X_UP": np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]),
}
LUMINANCE = np.array([0.212671, 0.715160, 0.072169])  # COLLADA 1.5, chapter 8, "transparent"


def read(content: bytes, reading: Reading) -> Iterator[Part]:
    """One part for each primitive with a material, in every place that the scene gives it. Raises: MeshError."""
    from collada import Collada
    from collada.common import DaeBrokenRefError, DaeUnsupportedError
    from collada.lineset import LineSet

    check_archive(content)  # the parser would unpack one
    document = Collada(io.BytesIO(content), ignore=[DaeBrokenRefError, DaeUnsupportedError])
    up = None if document.assetInfo is None else document.assetInfo.upaxis
    turn = Y_UP_FROM[up or "Y_UP"]
    for error in document.errors:
        reading.note(str(error))
    for bound in _bound(document, reading):
        for primitive in bound.original.primitives:
            if isinstance(primitive, LineSet):
                reading.note("points and lines have no surface and are not drawn")
            elif len(primitive.index):
                node = bound.materialnodebysymbol.get(primitive.material)
                yield _part(primitive, turn @ bound.matrix[:3], node, reading)


def _bound(document, reading: Reading) -> Iterator:
    """Every geometry of the scene in its place; without a scene, all there are."""
    from collada.controller import BoundSkin

    if document.scene is None:
        yield from (geometry.bind(np.eye(4), {}) for geometry in document.geometries)
        return
    yield from document.scene.objects("geometry")
    for controller in document.scene.objects("controller"):
        if isinstance(controller, BoundSkin):
            reading.note("a skin is shown in its bind shape")
            yield controller.geometry
        else:
            reading.note("a morphed geometry is shown as it is without its targets")
            yield controller.original.source_geometry.bind(controller.matrix, controller.materialnodebysymbol)


def _part(primitive, matrix: np.ndarray, node, reading: Reading) -> Part:
    counts = getattr(primitive, "vcounts", None)
    index = np.asarray(primitive.index).reshape(-1, primitive.nindices)
    counts = np.full(len(index) // 3, 3) if counts is None else np.asarray(counts)
    points = _input(primitive, "VERTEX", index)
    if points is None:
        raise MeshError("a primitive has no input for its vertices")
    corner = triangulated(points, counts)
    reading.count_faces(len(corner) // 3)
    index, points = index[corner], points[corner] @ matrix[:, :3].T + matrix[:, 3]
    positions, rows = joined(points)  # smooth where no normals are given
    normals, colors = (_input(primitive, kind, index) for kind in ("NORMAL", "COLOR"))
    if normals is not None:
        linear = matrix[:, :3]
        normals = normals @ np.linalg.pinv(linear)
    effect = _Effect(node, primitive, reading)
    color = np.tile(effect.color, (len(index), 1))
    if colors is not None:
        color[:, :3] *= to_linear(np.clip(colors[:, :3], 0, 1))
        color[:, 3] *= colors[:, 3] if colors.shape[1] > 3 else 1
    uv = _input(primitive, "TEXCOORD", index, effect.texture_set)
    look = effect.look if uv is not None else effect.look | {"texture": None, "emission_texture": None}
    blend = look.pop("blend", False) or bool(color[:, 3].min() < 1)
    uv = None if uv is None else uv[:, :2]
    return part(positions, rows.reshape(-1, 3), normals, color, uv, blend=blend, cutoff=HOLE, **look)


def _input(primitive, semantic: str, index: np.ndarray, number: str | None = None) -> np.ndarray | None:
    """The values of an input at the corners, of set `number` if there is one."""
    inputs = primitive.sources.get(semantic) or []
    if not inputs:
        return None
    offset, _, _, _, source = next((item for item in inputs if number is not None and item[3] == number), inputs[0])
    rows = index[:, offset]
    if len(rows) and (rows.max() >= len(source.data) or rows.min() < 0):
        raise MeshError(f"a face refers to {semantic} {rows.max()}, and there are {len(source.data)}")
    values = np.asarray(source.data, float)[rows]
    if not np.isfinite(values).all():
        raise MeshError(f"{semantic}: a value is not a finite number")
    return values


class _Effect:
    """The effect of a primitive: `colour` [4] (linear light and opacity), and what Part wants to know beside it."""

    def __init__(self, node, primitive, reading: Reading):
        self.reading, self.texture_set = reading, None
        self.sets = {name: number for name, _, number in node.inputs} if node else {}
        material = node.target if node else None
        effect = material.effect if material else None
        if material is None or effect is None:
            self.color, self.look = np.array([*to_linear(np.array(UNSAID)), 1]), {}
            return
        base, diffuse = self._channel(effect.diffuse, UNSAID if effect.shadingtype != "constant" else (0, 0, 0))
        emission, glow = self._channel(effect.emission, (0, 0, 0))
        opacity, clear = self._opacity(effect)
        if clear is not None:
            pixels = with_alpha(None if diffuse is None else self._pixels(effect.diffuse), clear)
            diffuse = self._place(effect.transparent if diffuse is None else effect.diffuse, pixels)
        self.color = np.array([*base, opacity])
        self.look = {
            "texture": diffuse,
            "emission": tuple(map(float, emission)),
            "emission_texture": glow,
            "blend": opacity < 1 or clear is not None,
            "material": str(material.name or material.id or ""),
        }

    def _channel(self, value, default) -> tuple[np.ndarray, Callable | None]:
        """Linear colour [3] and texture of a colour, a number or a texture."""
        if hasattr(value, "sampler"):
            pixels = self._pixels(value)
            return (np.ones(3), self._place(value, pixels)) if pixels is not None else (
                to_linear(np.array(UNSAID)), None)  # fmt: skip
        rgb = np.array(default if value is None else value, float).reshape(-1)[:3]
        return to_linear(np.clip(np.broadcast_to(rgb, 3), 0, 1)), None

    def _opacity(self, effect) -> tuple[float, np.ndarray | None]:
        """One number, or an image of alpha [h, w]: COLLADA's four ways to say how clear a thing is."""
        said = {str(n.tag).rpartition("}")[2]: n for n in effect.xmlnode.iter()}  # pycollada has defaults of its own
        mode = said["transparent"].get("opaque", "A_ONE") if "transparent" in said else "A_ONE"
        share = float(effect.transparency) if "transparency" in said else 1.0
        if hasattr(effect.transparent, "sampler"):
            pixels = self._pixels(effect.transparent)
            if pixels is None:
                return 1.0, None
            amount = pixels[..., 3] / 255 if mode.startswith("A") else (pixels[..., :3] / 255) @ LUMINANCE
            alpha = amount * share if mode.endswith("ONE") else 1 - amount * share
            return 1.0, to_bytes(alpha)
        rgba = np.array([*effect.transparent, 1.0][:4], float) if "transparent" in said else np.ones(4)
        amount = rgba[3] if mode.startswith("A") else rgba[:3] @ LUMINANCE
        return float(np.clip(amount * share if mode.endswith("ONE") else 1 - amount * share, 0, 1)), None

    def _pixels(self, texture) -> np.ndarray | None:
        path = texture.sampler.surface.image.path
        content = self.reading.file(path)
        if content is None:  # it is a URI, which not every exporter knows
            content = self.reading.file(unquote(path))
        if content is None:
            self.reading.note(f"the texture {path} is not there and is not drawn")
            return None
        return images.decode(content)

    def _place(self, texture, pixels: np.ndarray) -> Callable[[np.ndarray], Texture]:
        """The image on COLLADA's coordinates, whose v goes up."""
        self.texture_set = self.sets.get(texture.texcoord)
        wrap = {str(n.tag).rpartition("}")[2]: n.text for n in texture.sampler.xmlnode.iter()}
        modes = wrap.get("wrap_s", "WRAP"), wrap.get("wrap_t", "WRAP")
        repeat = modes[0] in ("WRAP", "MIRROR"), modes[1] in ("WRAP", "MIRROR")
        mirror = modes[0] == "MIRROR", modes[1] == "MIRROR"
        nearest = texture.sampler.magfilter == "NEAREST"
        return lambda uv: mirrored(Texture(pixels, np.stack([uv[:, 0], 1 - uv[:, 1]], 1), repeat, nearest), mirror)
