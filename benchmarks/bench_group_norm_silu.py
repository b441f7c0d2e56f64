"""group_norm_silu: the normalisation, embedding and activation before each of the UNet's convolutions."""

import pytest
import torch
import torch.nn.functional as F
from contest import BACKWARD, faster, sizes
from peers import CUDA, DEVICE, HALF, compiled

from mvdream_fast import ops

FULL = [(16, 320, 32, 32), (16, 1280, 8, 8)] if CUDA else [(8, 64, 32, 32), (8, 320, 32, 32), (8, 128, 8, 8)]
GROUPS, EPS = 32, 1e-5


def eager(x, weight, bias, emb):
    return F.silu(F.group_norm(x + emb[:, :, None, None], GROUPS, weight, bias, EPS))


def ours(x, weight, bias, emb):
    return ops.group_norm_silu(x, weight, bias, GROUPS, EPS, emb)


def reference(x, weight, bias, emb):
    return ops.group_norm_silu_ref(x, weight, bias, GROUPS, EPS, emb)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("shape", sizes(FULL, [(2, 64, 4, 4)]), ids=str)
def bench_group_norm_silu(contest, shape, backward):
    draw = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(shape, generator=draw, device=DEVICE, dtype=HALF).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1], generator=draw, device=DEVICE, dtype=HALF)
    emb = torch.randn(shape[:2], generator=draw, device=DEVICE, dtype=HALF)
    passes = 7 if backward else 3  # x twice and y; then x and d_y twice, d_x
    contest.op(
        f"group_norm_silu {shape}",
        {"reference": reference, "eager torch": eager, "torch.compile": compiled(eager), "ours": ours},
        [x, weight, bias, emb],
        backward,
        work={
            "elements": x.numel(),
            "flop": (40 if backward else 15) * x.numel(),
            "bytes": passes * x.numel() * x.element_size(),
        },
        goals=[faster(2.5, "eager torch")],
        tolerance=2e-2 if CUDA else 1e-4,
    )
