"""winograd_conv3x3 against torch's convolution, channels last."""

import pytest
import torch
import torch.nn.functional as F

from mvdream_fast.ops import winograd_conv3x3

# Channels and side of the images of a guided four-view step at widths 64, 160 and 320.
SHAPES = [(64, 32), (128, 16), (256, 8), (256, 4), (160, 32), (320, 32), (640, 16), (1280, 8)]


@pytest.mark.parametrize("name", ["torch", "ours"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_winograd(benchmark, name, shape):
    channels, side = shape
    x = torch.randn(8, channels, side, side).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    bias = torch.randn(channels)

    def call():
        if name == "torch":
            return F.conv2d(x, weight, bias, padding=1)
        return winograd_conv3x3(x, weight, bias)

    benchmark.group = f"winograd {shape}"
    with torch.no_grad():
        benchmark.pedantic(call, rounds=8, warmup_rounds=2)
