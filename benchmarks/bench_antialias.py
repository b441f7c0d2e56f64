"""antialias, and the topology of a mesh that it needs once: silhouettes of a sphere of many triangles."""

import pytest
from contest import BACKWARD, faster, size
from contestants import Contestant
from peers import need, need_gpu
from scenes import draw, sphere

from mvdream_fast import ops
from mvdream_fast.ops.antialias import edge_topology_ref

SIDE, FACES = size(512, 16), size(100_000, 64)


@pytest.mark.parametrize("backward", BACKWARD)
def bench_antialias(contest, backward):
    """With the topology at hand, as of a mesh that keeps its triangles; the reference is in float64."""
    pos, tri = sphere(FACES)
    rast = ops.rasterize(pos, tri, (SIDE, SIDE)).rast
    across = ops.edge_topology(tri)

    def plain(color, pos):
        return ops.antialias(color.double(), rast.double(), pos.double(), tri, across).float()

    def nvdiffrast(color, pos):
        need("nvdiffrast")
        need_gpu("nvdiffrast")
        import nvdiffrast.torch as dr

        return dr.antialias(color, rast, pos[None], tri)

    factor = 2 if backward else 1
    contest.op(
        f"antialias {SIDE}x{SIDE}",
        {"reference": plain, "ours": lambda color, pos: ops.antialias(color, rast, pos, tri, across)},
        [draw(1, SIDE, SIDE, 3), pos],
        backward,
        work={"pixels": SIDE**2, "triangles": FACES, "bytes": 40 * factor * SIDE**2},
        goals=[faster(2, "reference")],
        tolerance=1e-3,
        others=[Contestant("nvdiffrast", lambda: lambda: nvdiffrast(draw(1, SIDE, SIDE, 3), pos), case="nvdiffrast's")],
    )


def bench_edge_topology(contest):
    _, tri = sphere(FACES)
    contest.op(
        f"edge_topology {FACES} triangles",
        {"reference": edge_topology_ref, "ours": ops.edge_topology},
        [tri],
        backward=False,
        work={"triangles": FACES, "bytes": 24 * FACES},
        goals=[faster(2, "reference")],
    )
