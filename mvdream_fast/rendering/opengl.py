"""Draws a mesh from many cameras into RGBA with moderngl on EGL: Mesa's llvmpipe on a CPU, or any headless GPU driver.

The look (light, glass, holes, emission, box-filtered edges) is software.py's; a test holds the two together.
"""

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mvdream_fast.rendering.mesh import Mesh, Part, Texture
from mvdream_fast.rendering.software import (
    AMBIENT,
    HEADLIGHT,
    KEY,
    KEY_DIRECTION,
    LINEAR,
    SKY,
    SOLID,
    view_projection,
)

if TYPE_CHECKING:
    import moderngl

ATLAS = 1024  # views are drawn side by side into targets of about this side: fewer switches of the frame buffer

VERTEX = """
#version 330
uniform mat4 mvp;
in vec3 position; in vec3 normal; in vec4 colour; in vec2 uv; in vec2 glow_uv;
out vec3 p; out vec3 n; out vec4 c; out vec2 t; out vec2 g;
void main() { gl_Position = mvp * vec4(position, 1.0); p = position; n = normal; c = colour; t = uv; g = glow_uv; }
"""

FRAGMENT = """
#version 330
uniform sampler2D image, glow_image;  // linear light
uniform float lit;
uniform vec2 alphas;  // fragments from the first to under the second are drawn
uniform bool blend, double_sided;
uniform vec3 eye, key_direction, emission;
uniform vec4 light;  // ambient, sky, headlight, key
in vec3 p; in vec3 n; in vec4 c; in vec2 t; in vec2 g;
out vec4 result;
vec3 to_srgb(vec3 x) {
    return mix(1.055 * pow(max(x, 0.0031308), vec3(1.0 / 2.4)) - 0.055, x * 12.92, lessThanEqual(x, vec3(0.0031308)));
}
vec3 to_linear(vec3 x) {
    return mix(pow((x + 0.055) / 1.055, vec3(2.4)), x / 12.92, lessThanEqual(x, vec3(0.04045)));
}
void main() {
    vec4 base = clamp(c * texture(image, t), 0.0, 1.0);
    if (base.a < alphas.x || base.a >= alphas.y || !(double_sided || gl_FrontFacing)) discard;
    vec3 view = normalize(eye - p);
    vec3 face = normalize(cross(dFdx(p), dFdy(p)));
    if (dot(face, view) < 0.0) face = -face;
    // Normals that cancelled on double-sided sheets are short: the face's own takes over.
    vec3 m = dot(n, n) > 0.25 ? normalize(n) : face;
    if (dot(m, face) < 0.0) m = -m;
    float shade = light.x + light.y * m.z + light.z * max(dot(m, view), 0.0);
    shade += light.w * max(dot(m, key_direction), 0.0);
    vec3 rgb = clamp(to_srgb(base.rgb) * mix(1.0, shade, lit), 0.0, 1.0);
    if (emission != vec3(0.0)) {
        vec3 glow = emission * texture(glow_image, g).rgb;
        rgb = to_srgb(clamp(to_linear(rgb) + glow, 0.0, 1.0));
    }
    float alpha = blend ? base.a : 1.0;
    result = vec4(rgb * alpha, alpha);
}
"""

COPY_VERTEX = """
#version 330
void main() { vec2 q = vec2((gl_VertexID << 1) & 2, gl_VertexID & 2); gl_Position = vec4(q * 2.0 - 1.0, 0.0, 1.0); }
"""

COPY_FRAGMENT = """
#version 330
uniform sampler2D image;
uniform int n;
out vec4 result;
void main() {
    ivec2 corner = ivec2(gl_FragCoord.xy) * n;
    vec4 sum = vec4(0.0);
    for (int y = 0; y < n; ++y) for (int x = 0; x < n; ++x) sum += texelFetch(image, corner + ivec2(x, y), 0);
    result = sum.a > 0.0 ? vec4(sum.rgb / sum.a, sum.a / float(n * n)) : vec4(0.0);
}
"""


def new_context() -> "moderngl.Context":
    """A headless OpenGL context; raises whatever moderngl raises where there is no EGL.

    Triton is loaded before it, where it is installed. Mesa makes the names of its LLVM known to the whole process;
    Triton's own LLVM, loaded after that, would call into Mesa's for functions of the same names, and crash.
    """
    import moderngl

    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
    settings: dict[str, Any] = {"backend": "egl"}  # of any type, not the dictionaries that moderngl annotates
    return moderngl.create_context(standalone=True, **settings)


class GLRenderer:
    """An OpenGL context of its own, for one process; raises whatever moderngl raises where there is no EGL."""

    def __init__(self):
        import moderngl

        self.gl = moderngl
        _keep_one_thread()
        self.context = new_context()
        self.name = f"OpenGL ({self.context.info['GL_RENDERER']})"
        self.program = self.context.program(vertex_shader=VERTEX, fragment_shader=FRAGMENT)
        self.copy = self.context.program(vertex_shader=COPY_VERTEX, fragment_shader=COPY_FRAGMENT)
        self.triangle = self.context.vertex_array(self.copy, [])
        self.white = self._texture(Texture(np.full((1, 1, 4), 255, np.uint8), np.zeros((1, 2), np.float32)))
        self._uniform("glow_image").value = 1
        self._uniform("light").value = (AMBIENT, SKY, HEADLIGHT, KEY)
        self._uniform("key_direction").value = tuple(KEY_DIRECTION)
        self.targets: dict = {}

    def _uniform(self, name: str, program: "moderngl.Program | None" = None) -> "moderngl.Uniform":
        found = (self.program if program is None else program)[name]
        if not isinstance(found, self.gl.Uniform):
            raise TypeError(f"GLRenderer: {name} must be a uniform of the shaders, got {type(found).__name__}")
        return found

    def render(
        self, mesh: Mesh, c2w: np.ndarray, fovy: np.ndarray, size: int, samples: int = 4, lit: bool = True
    ) -> np.ndarray:
        """Returns straight-alpha RGBA uint8 [V, size, size, 4]; `samples` a side are box-averaged into a pixel.

        c2w [V, 4, 4] with OpenGL axes, fovy [V] in radians; `lit=False` gives base colours, without light.
        """
        batches = self._upload(mesh)
        try:
            return self._draw(batches, c2w, fovy, size, samples, lit)
        finally:
            for batch in batches:
                for resource in (batch.array, *batch.buffers, *(t for t in batch.textures if t is not self.white)):
                    resource.release()

    def _draw(self, batches, c2w, fovy, size, samples, lit):
        columns = max(1, ATLAS // (size * samples))
        # Eight bits of colour times a small alpha would keep few of the colour's.
        dtype = "f2" if any(batch.look.blend for batch in batches) else "f1"
        big, big_color, small = self._target(columns * size, samples, dtype)
        out = np.empty((len(c2w), size, size, 4), np.uint8)
        for start in range(0, len(c2w), columns * columns):
            chunk = range(start, min(start + columns * columns, len(c2w)))
            big.use()
            self.context.scissor = None
            self.context.clear(0.0, 0.0, 0.0, 0.0, depth=1.0)
            for slot, view in enumerate(chunk):
                self._view(batches, c2w[view], float(fovy[view]), slot, columns, size * samples, lit)
            atlas = self._resolve(big_color, small, samples)
            for slot, view in enumerate(chunk):
                y, x = slot // columns * size, slot % columns * size
                out[view] = atlas[y : y + size, x : x + size][::-1]
        return out

    def _view(self, batches, c2w, fovy, slot, columns, tile, lit):
        rectangle = (slot % columns * tile, slot // columns * tile, tile, tile)
        self.context.viewport = rectangle
        self.context.scissor = rectangle
        mvp, eye = view_projection(c2w, fovy), c2w[:3, 3]
        self._uniform("mvp").write(mvp.T.astype("f4").tobytes())
        self._uniform("eye").value = tuple(eye)
        self.context.enable_only(self.gl.DEPTH_TEST | self.gl.BLEND)
        self.context.blend_func = self.gl.ONE, self.gl.ONE_MINUS_SRC_ALPHA
        for batch in batches:
            self._render(batch, lit, (SOLID if batch.look.blend else batch.look.cutoff, 2.0))
        # What is seen through is drawn last, far to near, and hides nothing behind it.
        self.context.fbo.depth_mask = False
        glass = [batch for batch in batches if batch.look.blend]
        for batch in sorted(glass, key=lambda b: -np.linalg.norm(b.centre - eye)):
            self._render(batch, lit, (0.0, SOLID))
        self.context.fbo.depth_mask = True

    def _render(self, batch: "_Batch", lit: bool, alphas: tuple[float, float]) -> None:
        look = batch.look
        self._uniform("lit").value = float(lit and look.lit)
        self._uniform("alphas").value = alphas
        self._uniform("blend").value, self._uniform("double_sided").value = look.blend, look.double_sided
        self._uniform("emission").value = look.emission
        for unit, texture in enumerate(batch.textures):
            texture.use(unit)
        batch.array.render()

    def _resolve(self, source, small, samples) -> np.ndarray:
        small.use()
        self.context.scissor = None
        self.context.enable_only(self.gl.NOTHING)
        source.use(0)
        self._uniform("n", self.copy).value = samples
        self.triangle.render(self.gl.TRIANGLES, vertices=3)
        return np.frombuffer(small.read(components=4, alignment=1), np.uint8).reshape(small.height, small.width, 4)

    def _target(self, side: int, samples: int, dtype: str):
        key = (side, samples, dtype)
        if key not in self.targets:
            large = (side * samples, side * samples)
            color = self.context.texture(large, 4, dtype=dtype)
            big = self.context.framebuffer([color], self.context.depth_renderbuffer(large))
            small = self.context.framebuffer([self.context.texture((side, side), 4)])
            self.targets[key] = big, color, small
        return self.targets[key]

    def _upload(self, mesh: Mesh) -> list["_Batch"]:
        """One draw call for all plain parts that look the same but for their colours, and one for each other part."""
        groups: dict = {}
        for i, part in enumerate(mesh.parts):
            plain = part.texture is None and part.emission_texture is None and not part.blend
            key = (part.cutoff, part.double_sided, part.lit, part.emission) if plain else i
            groups.setdefault(key, []).append(part)
        return [self._batch(parts) for parts in groups.values()]

    def _batch(self, parts: list[Part]) -> "_Batch":
        offsets = np.cumsum([0] + [len(p.positions) for p in parts[:-1]])
        data = np.concatenate([_rows(part) for part in parts])
        faces = np.concatenate([p.faces + o for p, o in zip(parts, offsets)]).astype("i4")
        vertices, indices = self.context.buffer(data.tobytes()), self.context.buffer(faces.tobytes())
        layout = [(vertices, "3f 3f 4f 2f 2f", "position", "normal", "colour", "uv", "glow_uv")]
        array = self.context.vertex_array(self.program, layout, indices)
        look = parts[0]
        textures = [self.white if t is None else self._texture(t) for t in (look.texture, look.emission_texture)]
        return _Batch(array, textures, look, data[:, :3].mean(0), (vertices, indices))

    def _texture(self, texture: Texture):
        """Half floats, so that texels are blended as linear light and come back as the 8-bit values they were."""
        height, width = texture.pixels.shape[:2]
        values = np.dstack([LINEAR[texture.pixels[..., :3]], texture.pixels[..., 3:] / 255]).astype("f2")
        uploaded = self.context.texture((width, height), 4, values.tobytes(), alignment=1, dtype="f2")
        uploaded.repeat_x, uploaded.repeat_y = texture.repeat
        if texture.nearest:
            uploaded.filter = (self.gl.NEAREST, self.gl.NEAREST)
        else:
            uploaded.build_mipmaps()
            uploaded.filter = (self.gl.LINEAR_MIPMAP_LINEAR, self.gl.LINEAR)
        return uploaded


def _rows(part: Part) -> np.ndarray:
    """The vertices as the shader takes them, [N, 14] float32."""
    uvs = [np.zeros((len(part.positions), 2)) if t is None else t.uv for t in (part.texture, part.emission_texture)]
    return np.hstack([part.positions, part.normals, part.colors, *uvs]).astype("f4")


def _keep_one_thread() -> None:
    """llvmpipe starts a thread for each core by itself, which fights with our one process a core."""
    os.environ.setdefault("LP_NUM_THREADS", "0")


@dataclass(frozen=True)
class _Batch:
    array: "moderngl.VertexArray"
    textures: list  # of the colour and of the emission
    look: Part  # whose settings all of it shares
    centre: np.ndarray
    buffers: "tuple[moderngl.Buffer, ...]"
