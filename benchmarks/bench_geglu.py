"""geglu against the same in eager and compiled torch, forward and forward + backward apart."""

import pytest
import torch
import torch.nn.functional as F

from mvdream_fast.ops import geglu

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if CUDA else ("cpu", torch.float32)
SHAPES = [(16384, 2560), (4096, 5120), (1024, 10240)] if CUDA else [(2048, 1024), (8192, 512), (512, 2560)]


def eager(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


NAMES = {"ours": geglu, "eager torch": eager, "compiled torch": torch.compile(eager, dynamic=False)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_geglu(benchmark, name, gradients, shape):
    if name == "compiled torch" and not CUDA:
        pytest.skip("compiled torch is compared on a GPU, and there is none here")
    x = torch.randn(shape, device=DEVICE, dtype=DTYPE).requires_grad_(gradients)
    d_y = torch.randn(shape[0], shape[1] // 2, device=DEVICE, dtype=DTYPE)

    def call():
        y = NAMES[name](x)
        if gradients:
            torch.autograd.grad(y, x, d_y)
        if CUDA:
            torch.cuda.synchronize()

    call()
    benchmark.group = f"geglu {shape} {'forward+backward' if gradients else 'forward'} {DTYPE}"
    benchmark.pedantic(call, rounds=30, warmup_rounds=3)
