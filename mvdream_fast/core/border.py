"""What an image's border says of its background."""

import torch
from torch import Tensor


def off_border(images: Tensor) -> Tensor:
    """How far each pixel is from the median colour along its image's border, in the channel where that is most:
    [V, C, Hp, Wp] -> [V, 1, Hp, Wp]."""
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], dim=-1)
    return (images - border.median(-1).values[..., None, None]).abs().amax(1, keepdim=True)
