"""hash_encode: the encoding alone on the paper's grid, with Dr.Jit's of the same numbers beside it."""

import functools

import peers_drjit
import pytest
import torch
from contest import faster, near_limit, passes, size, sizes
from contestants import Contestant
from peers import CUDA, DEVICE, compiled, need, need_gpu
from scenes import GATHERED_A_SAMPLE, INSIDE

from mvdream_fast import ops
from mvdream_fast.ops.hash_encode import HashGrid

N_POINTS = size(1 << 16, 32)
GRID = size(HashGrid(), HashGrid(n_levels=3, log2_size=8))


def inputs(n: int, d_table: bool = False, d_positions: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions in the unit cube, a table and a cotangent of the encoding."""
    draw = torch.Generator().manual_seed(0)
    positions = INSIDE * torch.rand(n, 3, generator=draw)
    table = torch.rand(GRID.n_entries, GRID.n_features, generator=draw)
    d_out = torch.randn(n, GRID.width, generator=draw)
    return positions.to(DEVICE).requires_grad_(d_positions), table.to(DEVICE).requires_grad_(d_table), d_out.to(DEVICE)


def torchs(function, n: int, *wanted: bool):
    positions, table, d_out = inputs(n, *wanted)
    leaves = [x for x in (table, positions) if x.requires_grad]

    def call():
        out = function(positions, table, GRID)
        return (out, *torch.autograd.grad(out, leaves, d_out)) if leaves else (out,)

    return call


def drjit(n: int, d_table: bool = False):
    positions, table, d_out = inputs(n)
    return peers_drjit.hash_grid(positions, table, GRID, d_out if d_table else None)


def tiny_cuda_nn(n: int):
    need("tinycudann")
    need_gpu("tiny-cuda-nn")
    import tinycudann

    options = {"n_levels": GRID.n_levels, "n_features_per_level": GRID.n_features, "log2_hashmap_size": GRID.log2_size}
    options |= {"otype": "HashGrid", "base_resolution": GRID.base_resolution, "per_level_scale": GRID.growth}
    theirs, (positions, table, _) = tinycudann.Encoding(3, options, dtype=torch.float32), inputs(n)
    theirs.params.data.copy_(table.flatten())

    def call():
        with torch.no_grad():
            return (theirs(positions),)

    return call


def work(n: int, wanted: int = 0) -> dict[str, float]:
    """Eight vertices a level: gathered forward, and for the table's gradient read, added to and written."""
    gathered = GATHERED_A_SAMPLE * n
    return {
        "samples": n,
        "gathered_samples": n,
        "gathered_bytes": gathered * (1 + 2 * wanted),
        "bytes": (12 + 4 * GRID.width) * n * (1 + wanted),
    }


@pytest.mark.parametrize("wanted", [(), (True,), (True, True)], ids=["forward", "table", "table+positions"])
def bench_hash_encode(contest, wanted):
    """Random points; gradients of a random cotangent."""
    makes = {"reference": ops.hash_encode_ref, "ours": ops.hash_encode}
    contestants = [Contestant(name, functools.partial(torchs, op, N_POINTS, *wanted)) for name, op in makes.items()]
    if len(wanted) < 2:
        seen = functools.partial(peers_drjit.grid_to_torch, grid=GRID)
        contestants.append(Contestant("Dr.Jit", functools.partial(drjit, N_POINTS, *wanted), seen))
    if not wanted:
        contestants.append(Contestant("tiny-cuda-nn", functools.partial(tiny_cuda_nn, N_POINTS)))
    gradients = ", gradients of " + " and ".join(("table", "positions")[: len(wanted)]) if wanted else ""
    contest.run(
        f"hash_encode {N_POINTS} points{gradients}",
        passes(bool(wanted)),
        contestants,
        work=work(N_POINTS, len(wanted)),
        goals=[faster(18, "reference"), *([] if wanted or CUDA else [near_limit(0.6)])],
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("wanted", [(), (True,)], ids=["forward", "table"])
def bench_compiled(contest, wanted):
    """Beside plain torch compiled, which takes minutes for 16 levels."""
    makes = {"reference": ops.hash_encode_ref, "torch.compile": compiled(ops.hash_encode_ref), "ours": ops.hash_encode}
    contest.run(
        f"hash_encode {N_POINTS} points, compiled",
        passes(bool(wanted)),
        {name: functools.partial(torchs, op, N_POINTS, *wanted) for name, op in makes.items()},
        work=work(N_POINTS, len(wanted)),
        goals=[faster(5, "torch.compile")],
    )


def bench_samples(contest):
    """Forward, by samples."""
    contest.scale(
        "hash_encode by samples",
        "forward",
        "samples",
        {n: {"ours": functools.partial(torchs, ops.hash_encode, n)} for n in sizes((10**4, 10**5, 10**6), (8, 16))},
        work=lambda n: work(int(n)),
    )
