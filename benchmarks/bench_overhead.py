"""A call of every UNet op on tensors too small to matter, recorded by autograd and not: what its Python costs.

Beside it the torch calls that do the op's work; the difference is what our checks and choices cost. A table at the end.
A second one has calls on CUDA without a GPU, launched by us and by Triton: launch_overhead.py, in its own process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mvdream_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_best: dict[str, dict[str, float]] = {}
_launches: dict[str, dict[str, float]] = {}


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


@pytest.mark.parametrize("name", ["ours", "torch"])
@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("op", [attention, time_camera_embedding, group_norm_silu, geglu, sds_target])
def bench_overhead(benchmark, op, recorded, name):
    call = op(recorded)[name == "torch"]
    benchmark.group = f"overhead {op.__name__} {'recorded' if recorded else 'plain'}"
    benchmark.pedantic(call, rounds=200, iterations=20, warmup_rounds=5)
    if benchmark.stats:  # none under --benchmark-disable
        _best.setdefault(benchmark.group, {})[name] = 1e6 * benchmark.stats.stats.min


def bench_launches(benchmark):
    command = [sys.executable, str(Path(__file__).with_name("launch_overhead.py"))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def measured():
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True).stdout)

    _launches.update(benchmark.pedantic(measured, rounds=1))
    benchmark.extra_info["us"] = _launches


@pytest.fixture(scope="module", autouse=True)
def _table(request):
    """Prints, once all are through, the fastest of each in microseconds: what a busy machine adds is not the op's."""
    yield
    lines = [f"{'call':46} {'ours':>8} {'torch':>8} {'more':>8}  us"]
    for group, by_name in _best.items():
        if len(by_name) == 2:
            ours, torchs = by_name["ours"], by_name["torch"]
            lines.append(f"{group:46} {ours:8.1f} {torchs:8.1f} {ours - torchs:8.1f}")
    lines.append(f"\n{'a call under no_grad, by a stub for a driver':46} {'ours':>8} {'Triton':>8}  us")
    lines += [f"{name:46} {x['ours']:8.1f} {x['triton']:8.1f}" for name, x in _launches.items()]
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")


def _tensor(*shape, recorded=False):
    return torch.randn(shape, device=DEVICE).requires_grad_(recorded)
