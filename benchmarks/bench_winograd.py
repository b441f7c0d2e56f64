"""winograd_conv3x3: the UNet's convolutions beside torch's, channels last. FLOP are those of the direct way."""

import pytest
import torch
from contest import BACKWARD, faster, sizes
from peers import CUDA
from scenes import draw

from mvdream_fast import ops

# Channels and side of the images of a guided four-view step at widths 64, 160 and 320.
SHAPES = sizes([(64, 32), (128, 16), (256, 8), (256, 4), (160, 32), (320, 32), (640, 16), (1280, 8)], [(32, 8)])
IMAGES = 8
pytestmark = pytest.mark.skipif(CUDA, reason="winograd_conv3x3 is for CPUs; a GPU has torch's convolutions")


CASES = [(shape, backward) for shape in SHAPES for backward in BACKWARD if shape[0] <= 256 or not backward]


@pytest.mark.parametrize(("shape", "backward"), CASES, ids=str)
def bench_winograd(contest, shape, backward):
    """With backward at mini's sizes only: no training on a CPU has wider convolutions."""
    channels, side = shape
    x = 2 * draw(IMAGES, channels, side, side) - 1
    weight = (2 * draw(channels, channels, 3, 3, seed=1) - 1) / (9 * channels) ** 0.5
    leaves = [*(t.to(memory_format=torch.channels_last) for t in (x, weight)), draw(channels, seed=2)]
    factor = 3 if backward else 1
    contest.op(
        f"winograd {shape}",
        {"reference": ops.winograd_conv3x3_ref, "ours": ops.winograd_conv3x3},
        leaves,
        backward,
        work={
            "images": IMAGES,
            "flop": factor * 2 * 9 * channels * x.numel(),
            "bytes": factor * 4 * (2 * x.numel() + weight.numel()),
        },
        goals=[faster(1.2, "reference")],
        tolerance=1e-3,
    )
