"""Multi-view training renders, 16 views of 64 px an asset: views a second on one core, loading apart.

Stand-ins for the furniture of the embedded model: DATA's median of 4,300 faces, and its 95th percentile of 45,000; one
in plain colours, one textured.
"""

import numpy as np
import pytest

SIZE, PER_SIDE = 64, 4


def stand_in(n_faces: int, textured: bool):
    """A knobbly ring of about so many faces."""
    import trimesh

    from mvdream_fast.rendering.mesh import Mesh, Part, Texture

    sections = max(8, int((n_faces / 2) ** 0.5))
    ring = trimesh.creation.torus(0.7, 0.25, major_sections=sections, minor_sections=n_faces // (2 * sections))
    positions = np.asarray(ring.vertices, np.float32)
    positions = positions * (1 + 0.1 * np.sin(9 * positions[:, :1]))
    texture = np.random.default_rng(0).integers(0, 256, (512, 512, 4), dtype=np.uint8) if textured else None
    if textured:
        texture[..., 3] = 255
    part = Part(
        positions,
        np.asarray(ring.vertex_normals, np.float32),
        np.tile(np.float32([0.45, 0.45, 0.45, 1]), (len(positions), 1)),
        np.asarray(ring.faces, np.int32),
        Texture(texture, np.ascontiguousarray(positions[:, :2])) if textured else None,
    )
    return Mesh((part,)).normalised()


@pytest.fixture(scope="module", params=["gl", "numpy"])
def renderer(request):
    from mvdream_fast.core.errors import ArgumentError
    from mvdream_fast.rendering.dataset import make_renderer

    try:
        return make_renderer(request.param)
    except ArgumentError as error:
        pytest.skip(f"no OpenGL here: {error}")


@pytest.mark.parametrize("n_faces", [4_300, 45_000])
@pytest.mark.parametrize("textured", [False, True], ids=["plain", "textured"])
def bench_orbit(benchmark, request, renderer, n_faces, textured):
    from mvdream_fast.rendering.orbits import PRESETS, orbit

    mesh, cameras = stand_in(n_faces, textured), orbit(PRESETS["embedded"], np.full(4, 0.5))
    benchmark.group = f"orbit of 16 views, {n_faces} faces"

    def draw():
        return renderer.render(mesh, cameras.c2w, cameras.fovy, SIZE, PER_SIDE)

    draw()
    benchmark.pedantic(draw, rounds=5)
    rate = len(cameras.c2w) / benchmark.stats.stats.median
    benchmark.extra_info["views_per_s"] = rate
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{renderer.name:40} {n_faces:6} faces, {'textured' if textured else 'plain':8} {rate:6.0f} views/s")
