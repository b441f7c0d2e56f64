"""group_norm_silu with embedding against the same in eager and compiled torch, forward and forward + backward apart."""

import pytest
import torch
import torch.nn.functional as F

from mvdream_fast.ops import group_norm_silu

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if CUDA else ("cpu", torch.float32)
SHAPES = [(16, 320, 32, 32), (16, 1280, 8, 8)] if CUDA else [(8, 64, 32, 32), (8, 320, 32, 32), (8, 128, 8, 8)]


def eager(x, weight, bias, groups, eps, emb):
    return F.silu(F.group_norm(x + emb[:, :, None, None], groups, weight, bias, eps))


NAMES = {"ours": group_norm_silu, "eager torch": eager, "compiled torch": torch.compile(eager, dynamic=False)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_group_norm_silu(benchmark, name, gradients, shape):
    if name == "compiled torch" and not CUDA:
        pytest.skip("compiled torch is compared on a GPU, and there is none here")
    x = torch.randn(shape, device=DEVICE, dtype=DTYPE).to(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], device=DEVICE, dtype=DTYPE) for _ in range(2))
    emb = torch.randn(shape[:2], device=DEVICE, dtype=DTYPE)
    leaves = [a.detach().requires_grad_(gradients) for a in (x, weight, bias, emb)]
    d_y = torch.randn_like(x)

    def call():
        y = NAMES[name](*leaves[:3], 32, 1e-5, leaves[3])
        if gradients:
            torch.autograd.grad(y, leaves, d_y)
        if CUDA:
            torch.cuda.synchronize()

    call()
    benchmark.group = f"group_norm_silu {shape} {'forward+backward' if gradients else 'forward'} {DTYPE}"
    benchmark.pedantic(call, rounds=30, warmup_rounds=3)
