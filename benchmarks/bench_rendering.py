"""Multi-view training renders, 16 views of 64 px an asset, by OpenGL and in numpy; loading apart.

Stand-ins for the furniture of the embedded model: DATA's median of 4,300 faces, and its 95th percentile of 45,000; one
in plain colours, one textured. Two ways of ours beside each other: other renderers shade otherwise, so their pictures
would not agree.
"""

import functools

import numpy as np
import pytest
import torch
from contest import size, sizes, within
from contestants import Contestant, Unavailable

SIDE, PER_SIDE = size(64, 8), size(4, 1)
VIEWS = 16


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


def orbiting(way: str, n_faces: int, textured: bool):
    """A call that draws an orbit: the share of its pixels that show the ring."""
    from mvdream_fast.core.errors import ArgumentError
    from mvdream_fast.rendering.dataset import make_renderer
    from mvdream_fast.rendering.orbits import PRESETS, orbit

    try:
        renderer = make_renderer(way)
    except ArgumentError as error:
        raise Unavailable(f"no OpenGL here: {error}") from error
    mesh, cameras = stand_in(n_faces, textured), orbit(PRESETS["embedded"], np.full(4, 0.5))
    return lambda: renderer.render(mesh, cameras.c2w, cameras.fovy, SIDE, PER_SIDE)


def covered(images) -> torch.Tensor:
    return torch.tensor(float(np.mean(np.asarray(images)[..., 3] > 127)))


@pytest.mark.parametrize("n_faces", sizes([4_300, 45_000], [200]))
@pytest.mark.parametrize("textured", [False, True], ids=["plain", "textured"])
def bench_orbit(contest, n_faces, textured):
    names = {"ours, OpenGL": "gl", "ours, numpy": "numpy"}
    contest.run(
        f"orbit of {VIEWS} views, {n_faces} faces, {'textured' if textured else 'plain'}",
        "call",
        [Contestant(name, functools.partial(orbiting, way, n_faces, textured), covered) for name, way in names.items()],
        work={"views": VIEWS, "pixels": VIEWS * SIDE**2},
        goals=[within(VIEWS / 60, "ours, OpenGL")],
        tolerance=0.05,
    )
