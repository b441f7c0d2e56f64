"""Training of what cleans sampled latents before they are decoded: the autoencoder's `cleaner`, and nothing else.

It sees latents that the model's own UNet has touched (touched.py), exact ones with plain noise on them, and exact ones
that must stay.
"""

import torch
from torch import Tensor

from mvdream_fast.core import reads
from mvdream_fast.core.pinned import to_device
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import ImageSource
from mvdream_fast.models.vae import VAE
from mvdream_fast.training.touched import CHECKED, Scenes, TouchedOptions, TouchedTrainer
from mvdream_fast.training.unet import Parts

CLEANER_WIDTH = 128  # channels of a new one
NOISE = 0.3  # the largest deviation of plain noise, which differs from cell to cell
SHIFT = 0.7  # that of noise which a whole image shares, over the former
KEPT = 8  # every so manieth exact latents get no noise


class CleanerTrainer(TouchedTrainer[tuple[Tensor, Tensor]]):
    """One optimisation of an autoencoder's cleaner; the rest of the model is only read."""

    strengths = (0.4, 0.6)  # which begin at t = 201 and 401

    def __init__(self, parts: Parts, vae: VAE, source: ImageSource, options: TouchedOptions):
        super().__init__(parts, vae, source, options, "cleaner")

    def prepared(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """See `pairs`."""
        return self.pairs(scenes)

    def noisy(self, exact: Tensor) -> Tensor:
        """Exact latents [n, C, h, w] with noise of a random strength on each, part of it the same in all cells; every
        KEPT-th stays as it is."""
        stream, (n, channels, height, width) = Stream(self.options.seed, self.step, "cleaner/noise"), exact.shape
        strength = stream.uniform(n, 1, 1, 1, high=NOISE)
        strength[::KEPT] = 0
        noise = stream.normal(n, channels, height, width) + SHIFT * stream.normal(n, channels, 1, 1)
        return exact + to_device(strength * noise, self.device)

    def train_step(self) -> dict[str, float]:
        """One update; raises DivergedError before a weight is touched."""
        touched, exact = self.pooled()
        given, wanted = torch.cat([touched, self.noisy(exact)]), torch.cat([exact, exact])
        error = (self.vae.cleaned(given) - wanted).abs().mean()
        loss, before = reads.read(torch.stack([error.detach(), (given - wanted).abs().mean()]))
        self.check_finite(loss)
        (error * self.scale()).backward()
        return {"loss": loss, "without": before, "grad_norm": self.update()}

    @torch.no_grad()
    def checked(self) -> tuple[Tensor, dict[str, float]]:
        """Rows of images in [0, 1] that are not trained on, decoded from exact latents and touched ones, and how far
        these are from each other."""
        touched, exact = self.pairs(self.draw(CHECKED))
        rows = [self.vae.decode(x).clamp(-1, 1) / 2 + 0.5 for x in (exact, touched)]
        return torch.stack(rows), {"touched": (self.vae.cleaned(touched) - exact).abs().mean().item()}
