"""What an image's border says of its background."""

import torch
from torch import Tensor


def border_median(images: Tensor) -> Tensor:
    """The median colour along each image's border, a channel at a time: [V, C, Hp, Wp] -> [V, C, 1, 1]."""
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], dim=-1)
    return border.median(-1).values[..., None, None]


def off_border(images: Tensor) -> Tensor:
    """How far each pixel is from `border_median`, in the channel where that is most: [V, C, Hp, Wp] ->
    [V, 1, Hp, Wp]."""
    return (images - border_median(images)).abs().amax(1, keepdim=True)
