"""interpolate: attributes of the vertices in every pixel, with the derivatives that a mip map needs and without."""

import pytest
from contest import BACKWARD, faster, size
from contestants import Unavailable
from peers import compiled
from scenes import draw, sphere

from mvdream_fast import ops

SIDE, FACES = size(512, 16), size(100_000, 64)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("derivatives", [False, True], ids=["values", "values+derivatives"])
def bench_interpolate(contest, derivatives, backward):
    pos, tri = sphere(FACES)
    rast, rast_db = ops.rasterize(pos, tri, (SIDE, SIDE))
    leaves = [draw(len(pos), 2), rast, *([rast_db] if derivatives else [])]

    def plain(attr, rast, rast_db=None):
        return ops.interpolate_ref(attr[None], rast, tri, rast_db, [0, 1] if derivatives else [])

    def ours(attr, rast, rast_db=None):
        return ops.interpolate(attr, rast, tri, rast_db, "all" if derivatives else None)

    def seen(answer):  # the triangle's number has no gradient, and its place is filled as one likes
        out, gradients = answer if backward else (answer, ())
        return [*out, *(g[..., :2] if g.shape == rast.shape else g for g in gradients[:2]), *gradients[2:]]

    def compiler(*_):
        raise Unavailable("the gradients that torch 2.13 compiles of it end the process on two threads")

    crashes = backward and derivatives  # a fault of the code that inductor writes; on one thread it runs
    factor = (3 if backward else 1) * (3 if derivatives else 1)
    contest.op(
        f"interpolate {SIDE}x{SIDE}{', derivatives' if derivatives else ''}",
        {"reference": plain, "torch.compile": compiler if crashes else compiled(plain), "ours": ours},
        leaves,
        backward,
        work={"pixels": SIDE**2, "flop": 12 * factor * SIDE**2, "bytes": 24 * factor * SIDE**2},
        goals=[faster(2, "reference")],
        tolerance=1e-3,
        seen=seen,
    )
