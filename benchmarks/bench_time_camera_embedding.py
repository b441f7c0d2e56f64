"""time_camera_embedding: what the step and the cameras add to every block of the UNet, in one matrix product."""

import functools

import pytest
import torch
from contest import BACKWARD, faster, size, sizes
from peers import compiled
from scenes import draw

from mvdream_fast import ops

# (images, width of the sinusoid, width of the embedding, numbers added to all blocks): mini and the released size
SHAPES = sizes([(8, 64, 256, 3840), (8, 320, 1280, 20160)], [(2, 8, 16, 24)])


def weights(*shape: int, seed: int) -> torch.Tensor:
    return (2 * draw(*shape, seed=seed) - 1) * (3 / shape[-1]) ** 0.5


def numbers(n: int, width: int, wide: int, out: int) -> list[torch.Tensor]:
    time = [weights(wide, width, seed=1), weights(wide, seed=2), weights(wide, wide, seed=3), weights(wide, seed=4)]
    camera = [weights(wide, 16, seed=5), weights(wide, seed=6), weights(wide, wide, seed=7), weights(wide, seed=8)]
    projections = [weights(out, wide, seed=9), weights(out, seed=10)]
    return [1000 * draw(n), draw(n, 16, seed=11), *time, *camera, *projections]


def embed(op, t, camera, *rest):
    return op(t, camera, ops.MLP(*rest[:4]), ops.MLP(*rest[4:8]), *rest[8:])


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_time_camera_embedding(contest, shape, backward):
    n, width, wide, out = shape
    plain = functools.partial(embed, ops.time_camera_embedding_ref)
    leaves = numbers(*shape)
    products = wide * width + wide * wide + 16 * wide + wide * wide + out * wide
    factor = 3 if backward else 1
    contest.op(
        f"time_camera_embedding {shape}",
        {
            "reference": plain,
            "torch.compile": compiled(plain),
            "ours": functools.partial(embed, ops.time_camera_embedding),
        },
        leaves,
        backward,
        differentiable=range(2, len(leaves)),
        work={"images": n, "flop": 2 * factor * n * products, "bytes": 4 * factor * products},
    )


def bench_camera_embedding(contest):
    """The camera's part alone, which a run computes once."""
    n, _, wide, _ = SHAPES[-1]
    _, camera, *rest = numbers(*SHAPES[-1])
    mlp = ops.MLP(*rest[4:8])

    def plain(camera):
        hidden = torch.nn.functional.silu(camera @ mlp.w0.T + mlp.b0)
        return hidden @ mlp.w2.T + mlp.b2

    contest.op(
        f"camera_embedding {n} cameras",
        {"reference": plain, "ours": lambda camera: ops.camera_embedding(camera, mlp)},
        [camera],
        backward=False,
        work={"cameras": n, "flop": 2 * n * wide * (16 + wide), "bytes": 4 * wide * (16 + wide)},
        goals=[faster(size(0.95, 0), "reference")],
    )
