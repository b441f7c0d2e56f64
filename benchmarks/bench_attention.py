"""cross_view_attention beside torch's kernels and xformers at MVDream's shapes.

Every contestant gets tensors that were regrouped beforehand, except ours and its reference, which regroup.
"""

import functools
import math

import pytest
import torch
from contest import BACKWARD, differentiated, passes, sizes, slower
from contestants import Contestant
from peers import CUDA, DEVICE, HALF, compiled, sdpa, xformers
from torch.nn.attention import SDPBackend

from mvdream_fast.ops import cross_view_attention, cross_view_attention_ref

VIEWS = 4
# (images, tokens of a view, heads, width): the levels of a 256^2 image with guidance, and 512^2's first level
GPU_SHAPES = [(8, 1024, 5, 64), (8, 256, 10, 64), (8, 64, 20, 64), (8, 4096, 5, 64)]
FULL = GPU_SHAPES if CUDA else [(8, 64, 4, 64), (8, 256, 5, 64)]
REGROUPED = {
    "SDPA": sdpa(),
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA math": sdpa(SDPBackend.MATH),
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "xformers": xformers,
}


def ours(q, k, v):
    return cross_view_attention(q, k, v, VIEWS)


def reference(q, k, v):
    return cross_view_attention_ref(q, k, v, VIEWS)


def rows_of(shape, regrouped: bool) -> list[torch.Tensor]:
    """q, k and v as a packed projection leaves them, or regrouped to [B, H, V*N, D]."""
    images, tokens, heads, width = shape
    packed = torch.randn(images, tokens, 3, heads, width, generator=torch.Generator().manual_seed(0))
    rows = packed.to(DEVICE, HALF).unbind(2)
    if regrouped:
        rows = [x.reshape(images // VIEWS, VIEWS * tokens, heads, width).transpose(1, 2) for x in rows]
    return list(rows)


def back(shape, out):
    """What was regrouped, as our answer is."""
    images, tokens, heads, width = shape
    return tuple(x.transpose(1, 2).reshape(images, tokens, heads, width) for x in torch.utils._pytree.tree_leaves(out))


def call_of(function, shape, regrouped: bool, backward: bool):
    rows = rows_of(shape, regrouped)
    d_out = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, HALF)
    if regrouped:
        d_out = d_out.reshape(shape[0] // VIEWS, -1, *shape[2:]).transpose(1, 2)
    return differentiated(function, rows, backward, range(3), [d_out])


def work(shape, backward: bool) -> dict[str, float]:
    images, tokens, heads, width = shape
    return {
        "tokens": VIEWS * tokens,
        "flop": (14 if backward else 4) * images * VIEWS * tokens * tokens * heads * width,
        "bytes": (11 if backward else 4) * math.prod(shape) * HALF.itemsize,
    }


def contestants(shape, backward: bool) -> list[Contestant]:
    plain = {"reference": reference, "torch.compile": compiled(reference), "ours": ours}
    return [
        *(Contestant(name, functools.partial(call_of, f, shape, False, backward)) for name, f in plain.items()),
        *(
            Contestant(name, functools.partial(call_of, f, shape, True, backward), functools.partial(back, shape))
            for name, f in REGROUPED.items()
        ),
    ]


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("shape", sizes(FULL, [(4, 3, 2, 16)]), ids=str)
def bench_attention(contest, shape, backward):
    contest.run(
        f"attention {shape}",
        passes(backward),
        contestants(shape, backward),
        work=work(shape, backward),
        goals=[slower(1.02, "SDPA")],
        tolerance=1e-2 if CUDA else 1e-4,
    )


def bench_tokens(contest):
    """Forward, by tokens of a scene: four views of each."""
    shapes = {VIEWS * n: (8, n, 4, 64) for n in sizes((16, 64, 256, 1024), (2, 4))}
    contest.scale(
        "attention by tokens",
        "forward",
        "tokens",
        {n: {"ours": functools.partial(call_of, ours, shape, False, False)} for n, shape in shapes.items()},
        work=lambda n: work(shapes[int(n)], False),
    )


def bench_threads(contest):
    shape = sizes(FULL, [(4, 3, 2, 16)])[-1]
    make = functools.partial(call_of, ours, shape, False, False)
    contest.scale(
        "attention by threads",
        "forward",
        "threads",
        {n: {"ours": make} for n in sizes((1, 2), (1,))},
        work=lambda _: work(shape, False),
        tolerance=1e-4,
    )
