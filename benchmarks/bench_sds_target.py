"""sds_target: guidance, the denoised image and the gradient of a step of score distillation, of four views' latents."""

import functools

import pytest
import torch
from contest import faster, size, sizes
from peers import CUDA, compiled
from scenes import draw

from mvdream_fast import ops

SHAPES = sizes([(4, 4, 32, 32), (64, 4, 64, 64)], [(4, 4, 4, 4)])


def numbers(shape) -> list[torch.Tensor]:
    """z, z_t, both predictions, the noise, and how much of the image is left in z_t."""
    return [*(2 * draw(*shape, seed=i) - 1 for i in range(5)), draw(1)[0]]


@pytest.mark.parametrize("mode", ["x0", "sds"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sds_target(contest, shape, mode):
    target = functools.partial(ops.sds_target, guidance_scale=50.0, mode=mode)
    plain = functools.partial(ops.sds_target_ref, guidance_scale=50.0, mode=mode)
    leaves = numbers(shape)
    n = leaves[0].numel()
    contest.op(
        f"sds_target {shape} {mode}",
        {"reference": plain, "torch.compile": compiled(plain), "ours": target},
        leaves,
        backward=False,
        work={"elements": n, "flop": 20 * n, "bytes": 28 * n},
        goals=[faster(2, "reference")] if CUDA else (),
    )


def bench_views(contest):
    """By views: four of each scene."""
    side = size(32, 4)

    def make(n, op):
        leaves = numbers((n, 4, side, side))
        return lambda: op(*leaves, 50.0)

    contest.scale(
        "sds_target by views",
        "forward",
        "views",
        {n: {"ours": functools.partial(make, n, ops.sds_target)} for n in sizes((4, 16, 64), (4, 8))},
        work=lambda n: {"views": n, "bytes": 28 * n * 4 * side * side},
    )
