"""The rasteriser's ops: a sphere of many triangles, forward and forward + backward, beside plain torch.

Rows of one group are ratios of one run. On a machine that others use, the least of many rounds is the figure to read.
"""

import math
import time

import pytest
import torch

from mvdream_fast import ops

SIZE = 512
ROUNDS = 20


one_and_two_threads = pytest.mark.parametrize("threads", [1, 2], ids=["1 thread", "2 threads"], indirect=True)


def sphere(n_faces):
    """Clip space [V, 4] and triangles [F, 3] of a sphere that fills two thirds of the picture."""
    n_rings = max(3, math.isqrt(n_faces // 4))
    theta = (torch.arange(n_rings + 1) / n_rings * math.pi)[:, None]
    phi = torch.arange(2 * n_rings) / n_rings * math.pi
    x, y, z = theta.sin() * phi.cos(), theta.cos().expand(-1, 2 * n_rings), theta.sin() * phi.sin()
    w = 3 - z
    pos = torch.stack([2.6 * x, 2.6 * y, 2 * w - 4.5, w], -1).reshape(-1, 4)
    ring, around = (
        t.reshape(-1) for t in torch.meshgrid(torch.arange(n_rings), torch.arange(2 * n_rings), indexing="ij")
    )
    after = (around + 1) % (2 * n_rings)
    a, b = ring * 2 * n_rings + around, ring * 2 * n_rings + after
    c, d = a + 2 * n_rings, b + 2 * n_rings
    return pos, torch.cat([torch.stack([a, b, c], -1), torch.stack([b, d, c], -1)]).int()


def drawing(n_faces, size=SIZE, backward=False, reference=False):
    """A call that draws and colours the sphere."""
    pos, tri = sphere(n_faces)
    color = torch.rand(len(pos), 3, generator=torch.Generator().manual_seed(0))
    pos, color = pos.requires_grad_(backward), color.requires_grad_(backward)
    d_out = torch.rand(1, size, size, 3)

    def call():
        if reference:
            rast, _ = ops.rasterize_ref(pos[None].double(), tri, (size, size))
            out, _ = ops.interpolate_ref(color.double(), rast, tri, None, [])
        else:
            out, _ = ops.interpolate(color, ops.rasterize(pos, tri, (size, size)).rast, tri)
        if backward:
            torch.autograd.grad(out, (pos, color), d_out.to(out.dtype))

    return call


@one_and_two_threads
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
def bench_rasterize_and_interpolate(benchmark, threads, backward):
    """100,000 triangles at 512 x 512."""
    call = drawing(100_000, backward=backward)
    benchmark.group = f"rasterize + interpolate {'with backward' if backward else 'forward'}"
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=2)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
def bench_two_threads_beside_one(benchmark, backward):
    """One and two threads taking turns, so that what else runs falls on both; the goal of 1.7 needs two idle cores."""
    call, seconds, before = drawing(100_000, backward=backward), {1: [], 2: []}, torch.get_num_threads()

    def turns():
        for n_threads, spent in seconds.items():
            torch.set_num_threads(n_threads)
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)

    benchmark.pedantic(turns, rounds=ROUNDS, warmup_rounds=2)
    torch.set_num_threads(before)
    benchmark.extra_info["speed_up"] = min(seconds[1]) / min(seconds[2])
    print(f"two threads {benchmark.extra_info['speed_up']:.2f}x one")  # shown by -s


@pytest.mark.parametrize("reference", [False, True], ids=["ours", "plain torch"])
def bench_beside_plain_torch(benchmark, reference):
    """10,000 triangles at 512 x 512."""
    benchmark.group = "rasterize + interpolate of 10,000 triangles"
    benchmark.pedantic(drawing(10_000, reference=reference), rounds=3 if reference else ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize(("n_faces", "size"), [(10_000, 512), (100_000, 512), (1_000_000, 512), (10_000, 2048)])
def bench_cost(benchmark, n_faces, size):
    """How it grows with triangles and with pixels."""
    benchmark.group = "rasterize + interpolate by triangles and pixels"
    benchmark.pedantic(drawing(n_faces, size), rounds=ROUNDS // 2, warmup_rounds=1)


@one_and_two_threads
@pytest.mark.parametrize(
    ("op", "backward"),
    [("edge_topology", False), *((op, backward) for op in ("antialias", "texture") for backward in (False, True))],
)
def bench_the_others(benchmark, threads, op, backward):
    """antialias of the same picture, with its topology at hand; a mip-mapped texture of 1024 x 1024 texels."""
    pos, tri = sphere(100_000)
    rast, rast_db = ops.rasterize(pos, tri, (SIZE, SIZE))
    generator = torch.Generator().manual_seed(0)
    color = torch.rand(1, SIZE, SIZE, 3, generator=generator).requires_grad_(backward)
    tex = torch.rand(1, 1024, 1024, 3, generator=generator).requires_grad_(backward)
    uv, uv_da = ops.interpolate(torch.rand(len(pos), 2, generator=generator), rast, tri, rast_db, "all")
    across = ops.edge_topology(tri)
    pos = pos.requires_grad_(backward)
    calls = {
        "edge_topology": lambda: ops.edge_topology(tri),
        "antialias": lambda: ops.antialias(color, rast, pos, tri, across),
        "texture": lambda: ops.texture(tex, uv, uv_da, "linear-mipmap-linear"),
    }
    inputs = (tex,) if op == "texture" else (color, pos)

    def call():
        out = calls[op]()
        if backward:
            torch.autograd.grad(out.sum(), inputs)

    benchmark.group = f"{op} {'with backward' if backward else 'forward'}"
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
