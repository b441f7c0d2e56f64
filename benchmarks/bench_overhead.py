"""A call of every UNet op on tensors too small to matter, recorded by autograd and not: what its Python costs.

Beside it the torch calls that do the op's work; the difference is what our checks and choices cost. Calls on CUDA
without a GPU, launched by us and by Triton, are launch_overhead.py's, in its own process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contest import Goal
from peers import DEVICE

from mvdream_fast import ops


def attention(recorded):
    q = _tensor(2, 1, 1, 16, recorded=recorded)
    rows = _tensor(1, 1, 2, 16, recorded=recorded)
    return lambda: ops.cross_view_attention(q, q, q, 2), lambda: F.scaled_dot_product_attention(rows, rows, rows)


def time_camera_embedding(recorded):
    t, camera = torch.zeros(1, device=DEVICE), _tensor(1, 16)
    mlps = [ops.MLP(_tensor(2, n), _tensor(2), _tensor(2, 2), _tensor(2)) for n in (2, 16)]
    weight, bias = _tensor(2, 2, recorded=recorded), _tensor(2)
    arguments = (t, camera, *mlps, weight, bias)
    return lambda: ops.time_camera_embedding(*arguments), lambda: ops.time_camera_embedding_ref(*arguments)


def group_norm_silu(recorded):
    x = _tensor(1, 2, 1, 1, recorded=recorded)
    weight, emb = _tensor(2), _tensor(1, 2)

    def eager():
        return F.silu(F.group_norm(x + emb[:, :, None, None], 1, weight, weight, 1e-5))

    return lambda: ops.group_norm_silu(x, weight, weight, 1, 1e-5, emb), eager


def geglu(recorded):
    x = _tensor(1, 2, recorded=recorded)

    def eager():
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    return lambda: ops.geglu(x), eager


def sds_target(recorded):
    z, abar = _tensor(4, 1, 1, 1, recorded=recorded), torch.tensor(0.5, device=DEVICE)
    arguments = (z, z, z, z, z, abar, 7.5)
    return lambda: ops.sds_target(*arguments), lambda: ops.sds_target_ref(*arguments)


def added(rows, _) -> float:
    return max(0.0, rows["ours"]["median_s"] - rows["reference"]["median_s"])


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("op", [attention, time_camera_embedding, group_norm_silu, geglu, sds_target])
def bench_overhead(contest, op, recorded):
    """Answers are compared at real sizes, in each op's own bench: here shapes differ from what one would write."""
    ours, torchs = op(recorded)
    contest.run(
        f"overhead {op.__name__} {'recorded' if recorded else 'plain'}",
        "call",
        {"reference": lambda: torchs, "ours": lambda: ours},
        work={"calls": 1},
        goals=[Goal("overhead of a call", 30e-6, added, ("ours", "reference"), "s", at_most=True)],
        seen=lambda out: len(out) if isinstance(out, tuple) else 1,
        budget_s=1,
    )


@pytest.mark.slow
def bench_launches(benchmark):
    """Microseconds by name, of our own launch and of Triton's; compared with each other there."""
    command = [sys.executable, str(Path(__file__).with_name("launch_overhead.py"))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def measured():
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True).stdout)

    benchmark.extra_info["us"] = benchmark.pedantic(measured, rounds=1)


def _tensor(*shape, recorded=False):
    return torch.randn(shape, device=DEVICE).requires_grad_(recorded)
