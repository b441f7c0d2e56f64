"""Alpha matting of decoded images: what stands before the background, and how much of each pixel it fills.

It is a part of an autoencoder's decoder (`decoder_matting` in vae.py); training/matting.py teaches it.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvdream_fast.core.border import border_median
from mvdream_fast.models.blocks import zero
from mvdream_fast.models.config import VAEConfig
from mvdream_fast.models.functional import group_norm

SQUARES = 2  # pixels a side that are one place of the finest level
SLOPE = 4.0  # of tanh, through which it sees how far a pixel is from the background
BEHIND, LEAST = 4, 1e-4  # the power of 1 - alpha by which a pixel tells of the background, and what all count at least


class Matte(NamedTuple):
    """n images in [-1, 1], not clamped: foreground * alpha + background * (1 - alpha).

    foreground [n, 3, Hp, Wp], of no meaning where alpha is 0; alpha [n, 1, Hp, Wp] in [0, 1]; background [n, 3, 1, 1].
    """

    foreground: Tensor
    alpha: Tensor
    background: Tensor

    @property
    def image(self) -> Tensor:
        """[n, 3, Hp, Wp]."""
        return torch.lerp(self.background.expand_as(self.foreground), self.foreground, self.alpha)


class Matting(nn.Module):
    """A small U-Net on decoded images before flat backgrounds, down to the latents' resolution, where it sees these.

    Before it is trained, alpha is 1/2 and the foreground the decoded image.

    Raises: ValueError where the autoencoder's down-sampling is no power of 2 from 4 on.
    Source: Xu et al. 2017, "Deep Image Matting", predict alpha from an image and a coarse hint; here the hint is how
        far a pixel is from the border's median colour.
    """

    def __init__(self, width: int, config: VAEConfig):
        super().__init__()
        n_levels = (config.downsampling // SQUARES).bit_length()
        if n_levels < 2 or SQUARES << (n_levels - 1) != config.downsampling:
            raise ValueError(
                f"VAE: decoder_matting must be null but for a down-sampling of 4, 8, 16, ..., got {config.downsampling}"
            )
        widths = [width << level for level in range(n_levels)]
        groups, pairs = config.norm_num_groups, [*pairwise(widths)]
        self.conv_in = nn.Conv2d(6 * SQUARES**2, width, 3, padding=1)
        # One block where there are most places, two elsewhere.
        self.down = nn.ModuleList(_residuals(w, groups, 1 + (level > 0)) for level, w in enumerate(widths[:-1]))
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.latents_in = nn.Conv2d(config.latent_channels, widths[-1], 1)
        self.middle = _residuals(widths[-1], groups, 2)
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
        self.up = nn.ModuleList(_residuals(w, groups, 2) for w in widths[:-1])
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = zero(nn.Conv2d(width, 4 * SQUARES**2, 3, padding=1))

    def forward(self, decoded: Tensor, latents: Tensor) -> Matte:
        """decoded [n, 3, Hp, Wp], about [-1, 1]; latents [n, C, h, w], scaled, that it was decoded from."""
        away = torch.tanh(SLOPE * (decoded - border_median(decoded)))
        x = F.pixel_unshuffle(torch.cat([decoded, away], dim=1), SQUARES)
        x, skips = self.conv_in(x.contiguous(memory_format=torch.channels_last)), []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            skips.append(block(x))
            x = shrink(skips[-1])
        x = self.middle(x + self.latents_in(latents))
        for block, grow in reversed([*zip(self.up, self.grow, strict=True)]):
            x = block(F.interpolate(grow(x), scale_factor=2) + skips.pop())
        out = F.pixel_shuffle(self.conv_out(group_norm(self.norm_out, x)), SQUARES)
        alpha = torch.sigmoid(out[:, 3:])
        behind = (1 - alpha.detach()) ** BEHIND + LEAST
        background = (decoded * behind).sum((2, 3), keepdim=True) / behind.sum((2, 3), keepdim=True)
        return Matte(decoded + out[:, :3], alpha, background)


class _Residual(nn.Module):
    """norm - SiLU - conv, twice, added to the input; the identity before it is trained."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, width, eps=1e-6) for _ in range(2))
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), zero(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """[n, width, h, w], and so is what it returns."""
        return x + self.conv2(group_norm(self.norm2, self.conv1(group_norm(self.norm1, x))))


def _residuals(width: int, groups: int, n: int) -> nn.Sequential:
    return nn.Sequential(*(_Residual(width, groups) for _ in range(n)))
