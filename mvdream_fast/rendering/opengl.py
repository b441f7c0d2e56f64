"""Draws a mesh from many cameras into RGBA with moderngl on EGL: Mesa's llvmpipe on a CPU, or any headless GPU driver.

The look (light, glass, cut-out textures, box-filtered edges) is software.py's; a test holds the two together.
"""

import os

import numpy as np

from mvdream_fast.rendering.mesh_file import Mesh, Part
from mvdream_fast.rendering.software import AMBIENT, HEADLIGHT, KEY, KEY_DIRECTION, SKY, view_projection

ATLAS = 1024  # views are drawn side by side into targets of about this side: fewer switches of the frame buffer

VERTEX = """
#version 330
uniform mat4 mvp;
in vec3 position; in vec3 normal; in vec2 uv; in vec3 colour;
out vec3 p; out vec3 n; out vec2 t; out vec3 c;
void main() { gl_Position = mvp * vec4(position, 1.0); p = position; n = normal; t = uv; c = colour; }
"""

FRAGMENT = """
#version 330
uniform sampler2D image;
uniform float opacity, lit;
uniform vec3 eye, key_direction;
uniform vec4 light;  // ambient, sky, headlight, key
in vec3 p; in vec3 n; in vec2 t; in vec3 c;
out vec4 result;
void main() {
    vec4 texel = texture(image, t);
    if (texel.a < 0.5) discard;
    vec3 view = normalize(eye - p);
    vec3 face = normalize(cross(dFdx(p), dFdy(p)));
    if (dot(face, view) < 0.0) face = -face;
    // Normals that cancelled on double-sided sheets are short: the face's own takes over.
    vec3 m = dot(n, n) > 0.25 ? normalize(n) : face;
    if (dot(m, face) < 0.0) m = -m;
    float shade = light.x + light.y * m.z + light.z * max(dot(m, view), 0.0);
    shade += light.w * max(dot(m, key_direction), 0.0);
    vec3 base = clamp(c * texel.rgb, 0.0, 1.0);
    vec3 rgb = clamp(base * mix(1.0, shade, lit), 0.0, 1.0);
    result = vec4(rgb * opacity, opacity);
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


class GLRenderer:
    """An OpenGL context of its own, for one process; raises whatever moderngl raises where there is no EGL."""

    def __init__(self):
        import moderngl

        self.gl = moderngl
        _keep_one_thread()
        self.context = moderngl.create_context(standalone=True, backend="egl")
        self.name = f"OpenGL ({self.context.info['GL_RENDERER']})"
        self.program = self.context.program(vertex_shader=VERTEX, fragment_shader=FRAGMENT)
        self.copy = self.context.program(vertex_shader=COPY_VERTEX, fragment_shader=COPY_FRAGMENT)
        self.triangle = self.context.vertex_array(self.copy, [])
        self.white = self._texture(np.full((1, 1, 4), 255, np.uint8))
        self.program["light"].value = (AMBIENT, SKY, HEADLIGHT, KEY)
        self.program["key_direction"].value = tuple(KEY_DIRECTION)
        self.targets: dict = {}

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
                for resource in batch.resources:
                    resource.release()

    def _draw(self, batches, c2w, fovy, size, samples, lit):
        columns = max(1, ATLAS // (size * samples))
        big, big_colour, small = self._target(columns * size, samples)
        self.program["lit"].value = float(lit)
        out = np.empty((len(c2w), size, size, 4), np.uint8)
        for start in range(0, len(c2w), columns * columns):
            chunk = range(start, min(start + columns * columns, len(c2w)))
            big.use()
            self.context.scissor = None
            self.context.clear(0.0, 0.0, 0.0, 0.0, depth=1.0)
            for slot, view in enumerate(chunk):
                self._view(batches, c2w[view], float(fovy[view]), slot, columns, size * samples)
            atlas = self._resolve(big_colour, small, samples)
            for slot, view in enumerate(chunk):
                y, x = slot // columns * size, slot % columns * size
                out[view] = atlas[y : y + size, x : x + size][::-1]
        return out

    def _view(self, batches, c2w, fovy, slot, columns, tile):
        rectangle = (slot % columns * tile, slot // columns * tile, tile, tile)
        self.context.viewport = rectangle
        self.context.scissor = rectangle
        mvp, eye = view_projection(c2w, fovy), c2w[:3, 3]
        self.program["mvp"].write(mvp.T.astype("f4").tobytes())
        self.program["eye"].value = tuple(eye)
        self.context.enable_only(self.gl.DEPTH_TEST | self.gl.BLEND)
        self.context.blend_func = self.gl.ONE, self.gl.ONE_MINUS_SRC_ALPHA
        for batch in sorted(batches, key=lambda b: (b.opacity < 1, -np.linalg.norm(b.centre - eye))):
            # Glass is drawn last, far to near, and hides nothing behind it.
            self.context.fbo.depth_mask = batch.opacity >= 1
            self.program["opacity"].value = batch.opacity
            batch.texture.use(0)
            batch.array.render()
        self.context.fbo.depth_mask = True

    def _resolve(self, source, small, samples) -> np.ndarray:
        small.use()
        self.context.scissor = None
        self.context.enable_only(self.gl.NOTHING)
        source.use(0)
        self.copy["n"].value = samples
        self.triangle.render(self.gl.TRIANGLES, vertices=3)
        return np.frombuffer(small.read(components=4, alignment=1), np.uint8).reshape(small.height, small.width, 4)

    def _target(self, side: int, samples: int):
        if (side, samples) not in self.targets:
            large = (side * samples, side * samples)
            colour = self.context.texture(large, 4)
            big = self.context.framebuffer([colour], self.context.depth_renderbuffer(large))
            small = self.context.framebuffer([self.context.texture((side, side), 4)])
            self.targets[side, samples] = big, colour, small
        return self.targets[side, samples]

    def _upload(self, mesh: Mesh) -> list["_Batch"]:
        """One draw call for all plain opaque parts, and one for each textured or translucent part."""
        plain = [p for p in mesh.parts if p.texture is None and p.opacity >= 1]
        rest = [[p] for p in mesh.parts if not (p.texture is None and p.opacity >= 1)]
        return [self._batch(parts) for parts in ([plain] if plain else []) + rest]

    def _batch(self, parts: list[Part]) -> "_Batch":
        offsets = np.cumsum([0] + [len(p.positions) for p in parts[:-1]])
        data = np.concatenate([np.hstack([p.positions, p.normals, p.uv, p.colours]) for p in parts]).astype("f4")
        faces = np.concatenate([p.faces + o for p, o in zip(parts, offsets)]).astype("i4")
        vertices, indices = self.context.buffer(data.tobytes()), self.context.buffer(faces.tobytes())
        layout = [(vertices, "3f 3f 2f 3f", "position", "normal", "uv", "colour")]
        array = self.context.vertex_array(self.program, layout, indices)
        texture = self.white if parts[0].texture is None else self._texture(parts[0].texture)
        resources = [array, vertices, indices] + ([] if texture is self.white else [texture])
        return _Batch(array, texture, parts[0].opacity, data[:, :3].mean(0), resources)

    def _texture(self, pixels: np.ndarray):
        height, width = pixels.shape[:2]
        texture = self.context.texture((width, height), 4, pixels[::-1].tobytes(), alignment=1)
        texture.build_mipmaps()
        texture.filter = (self.gl.LINEAR_MIPMAP_LINEAR, self.gl.LINEAR)
        return texture


def _keep_one_thread() -> None:
    """llvmpipe starts a thread for each core by itself, which fights with our one process a core."""
    os.environ.setdefault("LP_NUM_THREADS", "0")


class _Batch:
    def __init__(self, array, texture, opacity, centre, resources):
        self.array, self.texture, self.opacity = array, texture, opacity
        self.centre, self.resources = centre, resources
