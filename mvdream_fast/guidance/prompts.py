"""Words for what a camera sees: view-dependent prompts for priors that are told no camera.

Source: Poole et al. 2022, "DreamFusion", section 3.2; quarters as threestudio has them.
"""

import torch
from torch import Tensor

VIEW_WORDS = ("front view", "side view", "back view", "overhead view")


def view_words(c2w: Tensor) -> Tensor:
    """Which of VIEW_WORDS each view is, [V] for c2w [V, 4, 4]: by quarters around the front, or above 60 degrees."""
    x, y, z = c2w[:, :3, 3].unbind(1)
    azimuth = torch.rad2deg(torch.atan2(x, -y)).abs()
    row = torch.where(azimuth < 45, 0, torch.where(azimuth <= 135, 1, 2))
    return torch.where(torch.rad2deg(torch.atan2(z, torch.hypot(x, y))) > 60, 3, row)
