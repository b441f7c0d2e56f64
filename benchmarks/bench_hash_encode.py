"""The hash-grid encoding alone on the paper's grid: plain torch beside ours, forward and forward+backward apart."""

import pytest
import torch

from mvdream_fast import ops
from mvdream_fast.ops.hash_encode import HashGrid

pytestmark = pytest.mark.usefixtures("threads")
N_POINTS = 1 << 16


@pytest.mark.parametrize("encode", [ops.hash_encode, ops.hash_encode_ref], ids=["ours", "reference"])
@pytest.mark.parametrize("wanted", ["forward", "table", "table+positions"])
def bench_hash_encode(benchmark, wanted, encode):
    """Random points in the unit cube, gradients of a random cotangent."""
    grid, generator = HashGrid(), torch.Generator().manual_seed(0)
    positions = torch.rand(N_POINTS, 3, generator=generator).requires_grad_(wanted.endswith("positions"))
    table = torch.rand(grid.n_entries, grid.n_features, generator=generator).requires_grad_(wanted != "forward")
    d_out = torch.randn(N_POINTS, grid.width, generator=generator)
    inputs = [x for x in (positions, table) if x.requires_grad]

    def call():
        out = encode(positions, table, grid)
        if inputs:
            torch.autograd.grad(out, inputs, d_out)

    call()
    benchmark.group = f"hash_encode {wanted}"
    benchmark.pedantic(call, rounds=5 if encode is ops.hash_encode else 2)
    benchmark.extra_info["ns_per_sample"] = benchmark.stats.stats.median / N_POINTS * 1e9
