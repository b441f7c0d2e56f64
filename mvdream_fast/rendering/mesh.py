"""Meshes as the renderers need them: parts of triangles that share a material, in linear light.

Here: the parts, normalising, recolouring. Not here: reading files (mesh_file.py) and drawing.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from mvdream_fast.core.color import to_linear, to_srgb
from mvdream_fast.core.errors import InputFileError

HOLE = 0.5  # alpha under this is a hole where a format names no limit of its own


class MeshError(InputFileError):
    """A mesh that is missing, unreadable, empty or too large; the message names it."""


@dataclass(frozen=True)
class Texture:
    """An image with its place on the vertices of a part. Outside [0, 1] it is repeated, or its edge goes on."""

    pixels: np.ndarray  # [th, tw, 4] uint8: sRGB and straight alpha, top row first
    uv: np.ndarray  # [N, 2] float32: (0, 0) is the image's top left corner, v goes down
    repeat: tuple[bool, bool] = (True, True)
    nearest: bool = False  # texels are squares, not blended with their neighbours


@dataclass(frozen=True)
class Part:
    """Triangles that share a material. A fragment is colour times texture, in linear light, then shown as sRGB."""

    positions: np.ndarray  # [N, 3] float32
    normals: np.ndarray  # [N, 3] float32, zero where the file's normals cancel
    colors: np.ndarray  # [N, 4] float32: linear light and alpha
    faces: np.ndarray  # [M, 3] int32, counter-clockwise from outside
    texture: Texture | None = None
    emission: tuple[float, float, float] = (0.0, 0.0, 0.0)  # linear light that is added, whatever the light
    emission_texture: Texture | None = None
    blend: bool = False  # alpha is opacity; else a fragment is solid, or a hole where alpha is under `cutoff`
    cutoff: float = 0.0
    double_sided: bool = True  # single-sided faces are not seen from behind
    lit: bool = True
    material: str = ""

    @property
    def opacity(self) -> float:
        """1 for what is solid, else the mean alpha of what is not wholly clear."""
        if not self.blend:
            return 1.0
        alpha = self.texture.pixels[..., 3] if self.texture is not None else np.full(1, 255)
        seen = alpha[alpha > 0]
        return float(self.colors[:, 3].mean() * (seen.mean() / 255 if seen.size else 0))


@dataclass(frozen=True)
class Mesh:
    """An object in the world frame: z up, its front looking to -Y."""

    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()  # what of the file is not drawn, and why
    sources: tuple[str, ...] = ()  # the files that were looked for beside the mesh's own, found or not

    @property
    def n_faces(self) -> int:
        """Triangles of all parts."""
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
        return self._each(lambda p: replace(p, positions=((p.positions - centre) / size).astype(np.float32)))

    def rotated(self, matrix: np.ndarray) -> "Mesh":
        """Applies a 3x3 rotation to positions and normals."""
        turn = np.asarray(matrix, np.float32).T
        return self._each(lambda p: replace(p, positions=p.positions @ turn, normals=p.normals @ turn))

    def brightened(self, gain: float) -> "Mesh":
        """Untextured colours times `gain` in sRGB, held below 1 without changing their hue."""
        return self._each(lambda p: p if p.texture is not None else _colored(p, _gained(_shown(p), gain)))

    def opaque(self) -> "Mesh":
        """The same mesh with every part solid and without emission; what is wholly clear in a texture stays a hole."""
        return self._each(_solid)

    def recolored(self, parts: list[int], target: ArrayLike, flat: bool = False) -> "Mesh":
        """Paints the listed parts in an sRGB colour; light and dark details of textures stay unless `flat`."""
        painted = list(self.parts)
        for i in parts:
            painted[i] = _paint(painted[i], np.asarray(target, np.float32), flat)
        return replace(self, parts=tuple(painted))

    def _each(self, change) -> "Mesh":
        return replace(self, parts=tuple(map(change, self.parts)))


def grey_where_nothing_is_said(n: int) -> np.ndarray:
    """Colours [n, 4] for formats without a colour of their own: sRGB 0.8."""
    return np.tile(np.array([*to_linear(np.full(3, 0.8)), 1], np.float32), (n, 1))


def _shown(part: Part) -> np.ndarray:
    return to_srgb(part.colors[:, :3])


def _colored(part: Part, srgb: np.ndarray) -> Part:
    colors = np.hstack([to_linear(srgb), part.colors[:, 3:]]).astype(np.float32)
    return replace(part, colors=colors)


def _gained(colors: np.ndarray, gain: float) -> np.ndarray:
    return colors * np.minimum(gain, 1 / np.maximum(colors.max(1, keepdims=True), 1e-3))


def _solid(part: Part) -> Part:
    part = replace(part, emission=(0.0, 0.0, 0.0), emission_texture=None)
    if not part.blend:
        return part
    colors = np.hstack([part.colors[:, :3], np.ones_like(part.colors[:, 3:])])
    return replace(part, colors=colors, blend=False, cutoff=HOLE)


def _paint(part: Part, target: np.ndarray, flat: bool) -> Part:
    """Replaces hue and saturation by the target's; lightness relative to the part's own mean stays. Nothing glows."""
    weights = np.array([0.3, 0.59, 0.11], np.float32)
    part = replace(part, emission=(0.0, 0.0, 0.0), emission_texture=None)
    if part.texture is None or flat:
        light = _shown(part) @ weights
        ratio = np.ones_like(light) if flat else np.clip(light / max(light.mean(), 1e-3), 0.6, 1.25)
        if part.texture is not None:
            part = _textured(part, part.texture, np.full_like(part.texture.pixels[..., :3], 255))
        return _colored(part, np.clip(ratio[:, None] * target, 0, 1))
    light = (part.texture.pixels[..., :3].astype(np.float32) / 255) @ weights
    solid = part.texture.pixels[..., 3] > 127
    mean = light[solid].mean() if solid.any() else light.mean()
    ratio = np.clip(light / max(float(mean), 0.05), 0.55, 1.3)
    painted = _textured(part, part.texture, np.clip(ratio[..., None] * target * 255, 0, 255))
    return _colored(painted, np.ones_like(part.colors[:, :3]))


def _textured(part: Part, texture: Texture, rgb: np.ndarray) -> Part:
    pixels = texture.pixels.copy()
    pixels[..., :3] = rgb
    return replace(part, texture=replace(texture, pixels=pixels))
