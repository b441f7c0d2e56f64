"""geglu: the UNet's gated GELU on one tensor, twice as wide as what comes out."""

import pytest
import torch
import torch.nn.functional as F
from contest import BACKWARD, faster, sizes
from peers import CUDA, DEVICE, HALF, compiled

from mvdream_fast import ops

FULL = [(16384, 2560), (4096, 5120), (1024, 10240)] if CUDA else [(2048, 1024), (8192, 512), (512, 2560)]
FLOP = 20  # an output: the error function is about a dozen multiply-adds


def eager(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("shape", sizes(FULL, [(6, 16)]), ids=str)
def bench_geglu(contest, shape, backward):
    x = torch.randn(shape, device=DEVICE, dtype=HALF)
    passes = 4 if backward else 1.5  # x and y, half as wide; then x, d_y and d_x
    contest.op(
        f"geglu {shape}",
        {
            "reference": ops.geglu_ref,
            "eager torch": eager,
            "torch.compile": compiled(eager),
            "ours": ops.geglu,
        },
        [x],
        backward,
        work={
            "elements": x.numel(),
            "flop": (3 if backward else 1) * FLOP * x.numel() / 2,
            "bytes": passes * x.numel() * x.element_size(),
        },
        goals=[faster(2, "eager torch")],
        tolerance=5e-3 if CUDA else 1e-5,
    )
