"""Pixels in the place of an autoencoder's latents, for models that diffuse images themselves.

Has what `models/vae.py` has, so that nothing else asks which of the two a model holds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvdream_fast.models.config import VAEConfig
from mvdream_fast.models.vae import VAE


class Pixels(nn.Module):
    """Images in [-1, 1] to squares of pixels and back, without loss and without weights; differentiable both ways.

    A model with `patch_size` 1 sees the images as they are; with p it sees each p x p square as 3 p^2 channels.
    """

    has_decoder = True

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()  # where an autoencoder's weights would be

    def drop_decoder(self) -> None:
        """Nothing to free."""

    def encode_in(self, dtype: torch.dtype) -> None:
        """Nothing that works in a dtype of its own."""

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """What the UNet sees of images; as nothing is uncertain, noise changes nothing.

        Args: images [B, 3, Hp, Wp] in [-1, 1]; Hp and Wp must be multiples of the patch size.
        Returns: [B, 3 p^2, Hp / p, Wp / p].
        Raises: ValueError if the images have another shape.
        """
        p = self.config.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % p or images.shape[3] % p:
            raise ValueError(
                f"Pixels.encode: images must be [B, 3, Hp, Wp] with sides that are multiples of {p}, "
                f"got {tuple(images.shape)}"
            )
        return (F.pixel_unshuffle(images, p) - self.config.shift_factor) * self.config.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images, about [-1, 1] but not clamped, [B, 3, Hp, Wp], of [B, 3 p^2, h, w].

        Raises: ValueError if the number of channels is another.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"Pixels.decode: latents must be [B, {self.config.latent_channels}, h, w], got {tuple(latents.shape)}"
            )
        return F.pixel_shuffle(latents / self.config.scale_factor + self.config.shift_factor, self.config.patch_size)

    def matte(self, latents: Tensor) -> None:
        """Pixels say nothing of what is behind them."""


Codec = VAE | Pixels  # what a model's images go through on their way to the UNet and back
