"""cross_view_attention against torch's kernels and xformers at MVDream's shapes, forward and forward + backward apart.

Contestants of one shape are one group; every one of them gets tensors regrouped beforehand except ours, which regroups.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvdream_fast.ops import cross_view_attention, cross_view_attention_ref

VIEWS = 4
# (images, tokens of a view, heads, width): the levels of a 256^2 image with guidance, and 512^2's first level
GPU_SHAPES = [(8, 1024, 5, 64), (8, 256, 10, 64), (8, 64, 20, 64), (8, 4096, 5, 64)]
CPU_SHAPES = [(8, 64, 4, 64), (8, 256, 5, 64)]
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if CUDA else ("cpu", torch.float32)


def sdpa(backend):
    def call(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def xformers(q, k, v):
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


REGROUPED = {
    "sdpa": F.scaled_dot_product_attention,
    "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "xformers": xformers,
}
OURS = {
    "ours": lambda q, k, v: cross_view_attention(q, k, v, VIEWS),
    "reference": lambda q, k, v: cross_view_attention_ref(q, k, v, VIEWS),
    "compiled reference": torch.compile(lambda q, k, v: cross_view_attention_ref(q, k, v, VIEWS), dynamic=False),
}
ONLY_GPU = ("sdpa cudnn", "sdpa efficient", "xformers", "compiled reference")


def contestant(name, shape, gradients):
    """A call without arguments on fresh tensors; skips what this machine cannot run, by name."""
    if name in ONLY_GPU and not CUDA:
        pytest.skip(f"{name} is compared on a GPU, and there is none here")
    if name == "xformers":
        pytest.importorskip("xformers", reason="xformers is not installed")
    images, tokens, heads, width = shape
    packed = torch.randn(images, tokens, 3, heads, width, device=DEVICE, dtype=DTYPE)
    rows = packed.unbind(2)
    if name in REGROUPED:
        rows = [x.reshape(images // VIEWS, VIEWS * tokens, heads, width).transpose(1, 2) for x in rows]
    rows = [x.detach().requires_grad_(gradients) for x in rows]
    function = (REGROUPED | OURS)[name]
    d_out = torch.randn(rows[0].shape, device=DEVICE, dtype=DTYPE)

    def call():
        out = function(*rows)
        if gradients:
            torch.autograd.grad(out, rows, d_out)
        if CUDA:
            torch.cuda.synchronize()

    return call


@pytest.mark.parametrize("name", [*REGROUPED, *OURS])
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", GPU_SHAPES if CUDA else CPU_SHAPES, ids=str)
def bench_attention(benchmark, name, gradients, shape):
    call = contestant(name, shape, gradients)
    call()
    benchmark.group = f"attention {shape} {'forward+backward' if gradients else 'forward'} {DTYPE}"
    benchmark.extra_info["flops"] = (
        (14 if gradients else 4) * shape[0] * VIEWS * math.prod(shape) * shape[1] // shape[0]
    )
    benchmark.pedantic(call, rounds=30, warmup_rounds=3)
