"""rasterize: which triangle each pixel shows; with interpolate behind it, a coloured sphere."""

import functools

import pytest
import torch
from contest import BACKWARD, even, faster, named, passes, size, sizes, within
from contestants import Contestant
from peers import CUDA, need, need_gpu
from scenes import draw, sphere

from mvdream_fast import ops

SIDE, MANY, FEW = size(512, 16), size(100_000, 64), size(10_000, 36)


def seen(out):
    """Triangles as whole numbers; of the rest, weights, depths and slopes."""
    rast, slopes = out
    return rast[..., 3].int(), rast[..., :3].float(), slopes.float()


def rasterized(op, n_faces: int, side: int):
    pos, tri = sphere(n_faces)
    pos = pos[None].double() if op is ops.rasterize_ref else pos
    return lambda: op(pos, tri, (side, side))


def nvdiffrast(n_faces: int, side: int):
    need("nvdiffrast")
    need_gpu("nvdiffrast")
    import nvdiffrast.torch as dr

    pos, tri = sphere(n_faces)
    context = dr.RasterizeCudaContext()
    return lambda: dr.rasterize(context, pos[None].contiguous(), tri, (side, side))


def work(n_faces: float, side: int) -> dict[str, float]:
    """Three vertices a triangle are read, eight numbers a pixel written."""
    return {"triangles": n_faces, "pixels": side * side, "bytes": 8 * n_faces + 12 * n_faces + 32 * side * side}


def bench_rasterize(contest):
    by_name = {"reference": ops.rasterize_ref, "ours": ops.rasterize}
    makes = {name: functools.partial(rasterized, op, FEW, SIDE) for name, op in by_name.items()}
    contestants = [Contestant(name, make, seen) for name, make in makes.items()]
    # Compared with nobody: it has other rules for pixels on an edge.
    contestants.append(Contestant("nvdiffrast", functools.partial(nvdiffrast, FEW, SIDE), case="nvdiffrast's rules"))
    contest.run(
        f"rasterize {FEW} triangles at {SIDE}",
        "forward",
        contestants,
        work=work(FEW, SIDE),
        goals=[faster(10, "reference")],
        tolerance=1e-3,
    )


def drawing(backward: bool, reference: bool, n_faces: int, side: int):
    """A call that draws and colours the sphere: its colours, and the gradients of places and colours."""
    pos, tri = sphere(n_faces)
    color, d_out = draw(len(pos), 3), draw(1, side, side, 3, seed=1)
    leaves = [x.requires_grad_(backward) for x in (pos, color)]

    def call():
        if reference:
            rast, _ = ops.rasterize_ref(pos[None].double(), tri, (side, side))
            out, _ = ops.interpolate_ref(color.double(), rast, tri, None, [])
        else:
            out, _ = ops.interpolate(color, ops.rasterize(pos, tri, (side, side)).rast, tri)
        return (out, *torch.autograd.grad(out, leaves, d_out.to(out.dtype))) if backward else (out,)

    return call


@pytest.mark.parametrize("backward", BACKWARD)
def bench_beside_plain_torch(contest, backward):
    """rasterize and interpolate of three attributes, in float64 where it is plain torch."""
    contest.run(
        f"rasterize + interpolate {FEW} triangles at {SIDE}",
        passes(backward),
        {
            "reference": functools.partial(drawing, backward, True, FEW, SIDE),
            "ours": functools.partial(drawing, backward, False, FEW, SIDE),
        },
        work=work(FEW, SIDE),
        goals=[faster(10, "reference")],
        tolerance=1e-3,
    )


@pytest.mark.parametrize("backward", BACKWARD)
def bench_threads(contest, backward):
    """100,000 triangles on one thread and on two."""
    threads = sizes((1, 2), (1,))
    one, two = (named("ours", n, "threads") for n in (threads[0], threads[-1]))
    contest.scale(
        f"rasterize + interpolate {MANY} triangles at {SIDE} by threads",
        passes(backward),
        "threads",
        {n: {"ours": functools.partial(drawing, backward, False, MANY, SIDE)} for n in threads},
        work=lambda _: work(MANY, SIDE),
        goals=[] if CUDA else [faster(1.7, one, two), within(40e-3 if backward else 12e-3, two)],
    )


def bench_faces(contest):
    """By triangles, at 512 x 512."""
    counts = sizes((10_000, 100_000, 1_000_000), (36, 64))
    contest.scale(
        f"rasterize + interpolate at {SIDE} by faces",
        "forward",
        "faces",
        {n: {"ours": functools.partial(drawing, False, False, n, SIDE)} for n in counts},
        work=lambda n: work(n, SIDE),
        goals=[even("faces", counts[-1], counts[0], 1.1)],
    )


def bench_resolution(contest):
    """By pixels, of 10,000 triangles."""
    sides = sizes((256, 512, 1024, 2048), (8, 16))
    contest.scale(
        f"rasterize + interpolate {FEW} triangles by pixels",
        "forward",
        "pixels",
        {side**2: {"ours": functools.partial(drawing, False, False, FEW, side)} for side in sides},
        work=lambda n: work(FEW, int(n**0.5)),
        goals=[even("pixels", sides[-1] ** 2, sides[0] ** 2, 1.1)],
    )
