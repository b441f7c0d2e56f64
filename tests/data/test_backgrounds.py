"""Flat backgrounds behind renders: opacity, and how often each kind comes."""

import numpy as np
import torch

from mvdream_fast.core.rng import Stream
from mvdream_fast.data import backgrounds
from mvdream_fast.data.backgrounds import on_background


def test_backgrounds_show_through_alpha():
    views = np.zeros((1, 1, 3, 4), np.uint8)
    views[0, 0, :, 0], views[0, 0, :, 3] = 255, (0, 255, 51)  # red: absent, opaque, one fifth
    out = on_background(views, torch.tensor([0.0, 0.5, 1.0]))[0, :, 0]
    assert torch.allclose(
        out.T, torch.tensor([[-1, 0, 1], [1, -1, -1], [0.2 * 2 - 1, 0.4 * 2 - 1, 0.8 * 2 - 1]]), atol=1e-6
    )


def test_the_share_of_each_background():
    kinds = [backgrounds.draw_background(Stream(0, i, "b")) for i in range(2000)]
    shares = [kinds.count(k) / 2000 for k in (backgrounds.ON_GREY, backgrounds.ON_WHITE, backgrounds.ON_COLOR)]
    assert np.allclose(shares, backgrounds.BACKGROUND_SHARES, atol=0.03)
