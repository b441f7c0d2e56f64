"""texture: colours of a mip-mapped texture at the coordinates of every pixel."""

import pytest
from contest import BACKWARD, faster, size
from contestants import Contestant
from peers import need, need_gpu
from scenes import draw, sphere

from mvdream_fast import ops

SIDE, FACES, TEXELS = size(512, 16), size(100_000, 64), size(1024, 8)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("mode", ["linear", "linear-mipmap-linear"])
def bench_texture(contest, mode, backward):
    """The reference is in float64, which is plain torch."""
    pos, tri = sphere(FACES)
    rast, rast_db = ops.rasterize(pos, tri, (SIDE, SIDE))
    uv, uv_da = ops.interpolate(draw(len(pos), 2), rast, tri, rast_db, "all")
    tex = draw(1, TEXELS, TEXELS, 3, seed=1)

    def ours(tex):
        return ops.texture(tex, uv, uv_da, mode)

    def plain(tex):
        return ops.texture(tex.double(), uv.double(), uv_da.double(), mode).float()

    def nvdiffrast():
        need("nvdiffrast")
        need_gpu("nvdiffrast")
        import nvdiffrast.torch as dr

        return lambda: dr.texture(tex, uv, uv_da, filter_mode=mode)

    texels = (8 if mode == "linear-mipmap-linear" else 4) * 12
    contest.op(
        f"texture {TEXELS}x{TEXELS} {mode}",
        {"reference": plain, "ours": ours},
        [tex],
        backward,
        work={"pixels": SIDE**2, "bytes": (36 + texels) * (2 if backward else 1) * SIDE**2},
        goals=[faster(2, "reference")],
        tolerance=1e-3,
        others=[Contestant("nvdiffrast", nvdiffrast, case="nvdiffrast's")],
    )
