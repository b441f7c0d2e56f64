"""Flat backgrounds: what renders with opacity are laid over before a model sees them. Backgrounds of scenes that are
optimised are scene/background.py's.
"""

import numpy as np
import torch
from torch import Tensor

from mvdream_fast.core.images import GREY
from mvdream_fast.core.rng import Stream

ON_GREY, ON_WHITE, ON_COLOR = range(3)
BACKGROUND_SHARES = (0.8, 0.1, 0.1)  # mostly one, so that little capacity goes into guessing it


def on_background(views: np.ndarray, color: Tensor) -> Tensor:
    """Straight-alpha RGBA [n, s, s, 4] uint8 over a colour [3] or [n, 3] in [0, 1]: [n, 3, s, s] in [-1, 1]."""
    rgba = torch.from_numpy(np.ascontiguousarray(views)).permute(0, 3, 1, 2).float() / 255
    alpha = rgba[:, 3:]
    return (rgba[:, :3] * alpha + color.expand(len(rgba), 3)[:, :, None, None] * (1 - alpha)) * 2 - 1


def background(kind: int, stream: Stream) -> Tensor:
    """A flat colour [3] in [0, 1] of a kind."""
    if kind == ON_COLOR:
        return stream.uniform(3)
    return torch.full((3,), {ON_GREY: GREY, ON_WHITE: 1.0}[kind])


def draw_background(stream: Stream) -> int:
    """A kind of background, by BACKGROUND_SHARES."""
    u = stream.uniform(1).item()
    return ON_GREY if u < BACKGROUND_SHARES[ON_GREY] else ON_WHITE if u < 1 - BACKGROUND_SHARES[ON_COLOR] else ON_COLOR
