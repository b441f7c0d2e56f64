"""The renderer without OpenGL: numpy on top of ops.rasterize, and the constants of the look that both renderers share.

World frame and camera axes are camera.py's (z up, OpenGL camera axes).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mvdream_fast.core.color import to_linear, to_srgb
from mvdream_fast.core.images import to_bytes
from mvdream_fast.rendering.mesh import Mesh, Part, Texture

# Ambient + up + headlight + key, raised by 10 % so that a white object comes out white.
AMBIENT, SKY, HEADLIGHT, KEY = 0.385, 0.165, 0.44, 0.275
KEY_DIRECTION = np.array([-0.46, -0.62, 0.64], np.float32) / np.linalg.norm([-0.46, -0.62, 0.64])
SOLID = 0.998  # alpha from which a blended fragment hides what is behind it
LINEAR = to_linear(np.arange(256) / 255).astype(np.float32)  # of 8-bit sRGB


def view_projection(c2w: np.ndarray, fovy: float) -> np.ndarray:
    """World -> clip space, float64 [4, 4]; near and far planes hug the unit ball (the normalised object)."""
    distance = float(np.linalg.norm(c2w[:3, 3]))
    near, far = max(distance - 1.05, 0.02 * distance), distance + 1.05
    f = 1 / np.tan(fovy / 2)
    projection = np.array(
        [[f, 0, 0, 0], [0, f, 0, 0], [0, 0, (far + near) / (near - far), 2 * far * near / (near - far)], [0, 0, -1, 0]]
    )
    return projection @ np.linalg.inv(c2w.astype(np.float64))


class NumpyRenderer:
    """The same images as GLRenderer, slower, anywhere."""

    name = "numpy"

    def render(
        self, mesh: Mesh, c2w: np.ndarray, fovy: np.ndarray, size: int, samples: int = 4, lit: bool = True
    ) -> np.ndarray:
        """Returns straight-alpha RGBA uint8 [V, size, size, 4]; see GLRenderer.render."""
        return np.stack([self._view(mesh, pose, float(f), size, samples, lit) for pose, f in zip(c2w, fovy)])

    def _view(self, mesh, c2w, fovy, size, samples, lit) -> np.ndarray:
        side = size * samples
        eye = c2w[:3, 3].astype(np.float32)
        parts = [_project(part, view_projection(c2w, fovy)) for part in mesh.parts]
        depth = np.full(side * side, np.inf, np.float32)
        image = np.zeros((side * side, 4), np.float32)  # premultiplied
        for part in parts:
            _draw_solid(part, depth, image, side, eye, lit)
        glass = [part for part in parts if part.source.blend]
        for part in sorted(glass, key=lambda p: -np.linalg.norm(p.source.positions.mean(0) - eye)):
            _draw_glass(part, depth, image, side, eye, lit)
        return _resolve(image.reshape(size, samples, size, samples, 4))


@dataclass(frozen=True)
class _Projected:
    source: Part
    clip: np.ndarray  # [N, 4] float32, y downwards: row 0 of a picture is its top
    faces: np.ndarray  # [M, 3] int32, those that face the camera or have no back


def _project(part: Part, matrix: np.ndarray) -> _Projected:
    clip = np.hstack([part.positions, np.ones((len(part.positions), 1), np.float32)]) @ matrix.T
    clip[:, 1] *= -1
    faces = part.faces
    if not part.double_sided:
        towards = np.linalg.det(clip[faces][:, :, [0, 1, 3]])  # of which sign, also where a corner is behind the camera
        faces = faces[towards < 0]
    return _Projected(part, clip.astype(np.float32), np.ascontiguousarray(faces, dtype=np.int32))


@dataclass
class _Fragments:
    pixel: np.ndarray  # [K] index into the image
    face: np.ndarray  # [K] row of _Projected.faces
    weights: np.ndarray  # [K, 3] perspective-correct barycentric
    depth: np.ndarray  # [K]

    def take(self, index: np.ndarray) -> "_Fragments":
        return _Fragments(self.pixel[index], self.face[index], self.weights[index], self.depth[index])


def _weights(uv: np.ndarray) -> np.ndarray:
    return np.hstack([uv, 1 - uv.sum(1, keepdims=True)])


def _all_fragments(part: _Projected, side: int) -> Iterator[_Fragments]:
    """All covered pixel centres of all triangles, in the order of the faces."""
    import torch

    from mvdream_fast.ops.rasterize import fragments

    for face, pixel, values in fragments(torch.from_numpy(part.clip), torch.from_numpy(part.faces), (side, side)):
        yield _Fragments(pixel.numpy(), face.numpy(), _weights(values[:, :2].numpy()), values[:, 2].numpy())


def _nearest_fragments(part: _Projected, side: int) -> _Fragments:
    """The nearest triangle of each covered pixel."""
    import torch

    from mvdream_fast.ops.rasterize import rasterize

    with torch.no_grad():
        rast, _ = rasterize(torch.from_numpy(part.clip), torch.from_numpy(part.faces), (side, side))
    rows = rast.numpy().reshape(-1, 4)
    pixel = np.flatnonzero(rows[:, 3])
    rows = rows[pixel]
    return _Fragments(pixel, rows[:, 3].astype(np.int64) - 1, _weights(rows[:, :2]), rows[:, 2])


def _draw_solid(part: _Projected, depth, image, side, eye, lit) -> None:
    limit = SOLID if part.source.blend else part.source.cutoff
    for f in _all_fragments(part, side) if limit > 0 else [_nearest_fragments(part, side)]:
        f = f.take(np.flatnonzero(f.depth < depth[f.pixel]))
        if limit > 0:
            f = _nearest(f.take(np.flatnonzero(_base(part, f)[:, 3] >= limit)), side)
        depth[f.pixel] = f.depth
        image[f.pixel, :3], image[f.pixel, 3] = _shade(part, f, _base(part, f), eye, lit), 1.0


def _nearest(f: _Fragments, side: int) -> _Fragments:
    """Of each pixel the nearest fragment, of equals the first."""
    f = f.take(np.lexsort((-np.arange(len(f.pixel)), -f.depth)))  # the last that is written to a pixel stays
    winner = np.full(side * side, -1)
    winner[f.pixel] = np.arange(len(f.pixel))
    return f.take(winner[winner >= 0])


def _draw_glass(part: _Projected, depth, image, side, eye, lit) -> None:
    """Blends every fragment in front of the solid parts, in the order of the faces, as the graphics card does."""
    for f in _all_fragments(part, side):
        f = f.take(np.flatnonzero(f.depth < depth[f.pixel]))
        f = f.take(np.flatnonzero(_base(part, f)[:, 3] < SOLID))
        f = f.take(np.argsort(f.pixel, kind="stable"))
        first = np.searchsorted(f.pixel, f.pixel, "left")
        layer = np.arange(len(f.pixel)) - first
        base = _base(part, f)
        rgb, alpha = _shade(part, f, base, eye, lit), base[:, 3:]
        for k in range(int(layer.max(initial=-1)) + 1):
            at = np.flatnonzero(layer == k)
            color = np.hstack([rgb[at] * alpha[at], alpha[at]])
            image[f.pixel[at]] = color + (1 - alpha[at]) * image[f.pixel[at]]


def _blend(part: _Projected, f: _Fragments, values: np.ndarray) -> np.ndarray:
    """A vertex attribute [N, C] at the fragments, [K, C]."""
    return np.einsum("kc,kcd->kd", f.weights.astype(np.float32), values[part.faces[f.face]])


def _texel(part: _Projected, f: _Fragments, texture: Texture) -> np.ndarray:
    """Linear light and alpha in [0, 1], [K, 4]; bilinear unless the texture says otherwise."""
    height, width = texture.pixels.shape[:2]
    uv = _blend(part, f, texture.uv).astype(np.float64)
    half = 0.0 if texture.nearest else 0.5
    x, y = (np.where(r, t % 1, np.clip(t, -1, 2)) * n - half for t, r, n in zip(uv.T, texture.repeat, (width, height)))
    x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    u, v = (x - x0)[:, None], (y - y0)[:, None]

    def at(dx: int, dy: int) -> np.ndarray:
        column, row = (
            t % n if r else np.clip(t, 0, n - 1) for t, r, n in zip((x0 + dx, y0 + dy), texture.repeat, (width, height))
        )
        texels = texture.pixels[row, column]
        return np.hstack([LINEAR[texels[:, :3]], texels[:, 3:] / 255])

    if texture.nearest:
        return at(0, 0)
    top, bottom = (at(0, dy) * (1 - u) + at(1, dy) * u for dy in (0, 1))
    return top * (1 - v) + bottom * v


def _base(part: _Projected, f: _Fragments) -> np.ndarray:
    """Base colour in linear light, and alpha: [K, 4]."""
    base = _blend(part, f, part.source.colors)
    if part.source.texture is not None:
        base = base * _texel(part, f, part.source.texture)
    return np.clip(base, 0, 1).astype(np.float32)


def _shade(part: _Projected, f: _Fragments, base: np.ndarray, eye: np.ndarray, lit: bool) -> np.ndarray:
    """sRGB [K, 3]: base colour under the light, and what the part itself sends out."""
    rgb = to_srgb(base[:, :3])
    if lit and part.source.lit:
        rgb = np.clip(rgb * _light(part, f, eye)[:, None], 0, 1)
    if any(part.source.emission):
        glow = np.array(part.source.emission)
        if part.source.emission_texture is not None:
            glow = glow * _texel(part, f, part.source.emission_texture)[:, :3]
        rgb = to_srgb(np.clip(to_linear(rgb) + glow, 0, 1))
    return rgb.astype(np.float32)


def _light(part: _Projected, f: _Fragments, eye: np.ndarray) -> np.ndarray:
    """How bright a white surface looks at the fragments, [K]."""
    view = _unit(eye - _blend(part, f, part.source.positions))
    corners = part.source.positions[part.faces[f.face]]
    face = _unit(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))
    face *= np.where((face * view).sum(1, keepdims=True) < 0, -1, 1)
    smooth = _blend(part, f, part.source.normals)
    normal = np.where((smooth * smooth).sum(1, keepdims=True) > 0.25, _unit(smooth), face)
    normal *= np.where((normal * face).sum(1, keepdims=True) < 0, -1, 1)
    shade = AMBIENT + SKY * normal[:, 2]
    return shade + HEADLIGHT * np.maximum((normal * view).sum(1), 0) + KEY * np.maximum(normal @ KEY_DIRECTION, 0)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _resolve(samples: np.ndarray) -> np.ndarray:
    """[s, n, s, n, 4] premultiplied -> [s, s, 4] uint8 straight alpha."""
    mean = samples.mean((1, 3))
    rgb = mean[..., :3] / np.maximum(mean[..., 3:], 1e-6)
    return to_bytes(np.concatenate([rgb, mean[..., 3:]], -1))
