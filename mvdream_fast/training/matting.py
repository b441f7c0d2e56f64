"""Training of what tells things from the backgrounds of decoded images: the autoencoder's `matting`, and nothing else.

Renders know their opacity and their colours without a background. It sees them decoded, from exact latents and from
latents that the model's own UNet has touched (touched.py).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.core import reads
from mvdream_fast.core.pinned import to_device
from mvdream_fast.data.batches import ImageSource
from mvdream_fast.models.matting import Matte
from mvdream_fast.models.vae import VAE
from mvdream_fast.training.touched import CHECKED, Scenes, TouchedOptions, TouchedTrainer
from mvdream_fast.training.unet import Parts

MATTING_WIDTH = 32  # channels of a new one, at its finest level
SQUARED, OPACITY, COLORS = 2.0, 0.5, 0.5  # what errors count beside the absolute one of the whole image
SURE = 1e-4  # no opacity is taken for surer, so that no error is infinite


class Seen(NamedTuple):
    """n images that are decoded, [n, 3, Hp, Wp] in half precision, from latents [n, C, h, w]; and what they should be:
    images [n, 3, Hp, Wp] in [-1, 1] of things in straight colours and opacity, rgba [n, 4, Hp, Wp] uint8."""

    decoded: Tensor
    latents: Tensor
    images: Tensor
    rgba: Tensor


class Errors(NamedTuple):
    """Means over n images: of the absolute and the squared error of the image; of the cross-entropy of the opacity; of
    the absolute error of straight colours, by how far they are seen; and what is learned from, of all."""

    absolute: Tensor
    squared: Tensor
    opacity: Tensor
    colors: Tensor

    @property
    def loss(self) -> Tensor:
        """A scalar with a graph."""
        return self.absolute + SQUARED * self.squared + OPACITY * self.opacity + COLORS * self.colors


class MattingTrainer(TouchedTrainer[Seen]):
    """One optimisation of an autoencoder's matting; the rest of the model is only read."""

    strengths = (0.4, 0.6, 0.8)  # which begin at t = 201, 401 and 601
    pool_size = 512

    def __init__(self, parts: Parts, vae: VAE, source: ImageSource, options: TouchedOptions):
        super().__init__(parts, vae, source, options, "matting")

    @torch.no_grad()
    def prepared(self, scenes: Scenes) -> Seen:
        """Each image twice: touched, then exact."""
        latents = torch.cat(self.pairs(scenes))
        decoded = self.vae.plain(latents).half()
        return Seen(decoded, latents.half(), scenes.images.half(), scenes.rgba)

    def errors(self, seen: Seen) -> tuple[Errors, Matte]:
        """What is wrong with the mattes of decoded images, and the mattes."""
        dtype = next(self.vae.parameters()).dtype
        decoded, latents, images = (to_device(x, self.device).to(dtype) for x in seen[:3])
        rgba = to_device(seen.rgba, self.device).to(dtype) / 255
        images, rgba = (torch.cat([x, x]) for x in (images, rgba))
        matte = self.vae.apart(decoded, latents)
        wanted, colors = rgba[:, 3:], rgba[:, :3] * 2 - 1
        error = matte.image - images
        return Errors(
            error.abs().mean(), error.square().mean(),
            F.binary_cross_entropy(matte.alpha.clamp(SURE, 1 - SURE), wanted),
            ((matte.foreground - colors).abs() * wanted).mean(),
        ), matte  # fmt: skip

    def train_step(self) -> dict[str, float]:
        """One update; raises DivergedError before a weight is touched."""
        errors, _ = self.errors(self.pooled())
        loss, *parts = reads.read(torch.stack([errors.loss.detach(), *(x.detach() for x in errors)]))
        self.check_finite(loss)
        (errors.loss * self.scale()).backward()
        return {"loss": loss, **dict(zip(errors._fields, parts, strict=True)), "grad_norm": self.update()}

    @torch.no_grad()
    def checked(self) -> tuple[Tensor, dict[str, float]]:
        """Rows of images in [0, 1] that are not trained on: touched, as they are decoded, then as they are told apart,
        then their opacity, then as they should be; and the errors of touched and exact ones together."""
        seen = self.prepared(self.draw(CHECKED))
        errors, matte = self.errors(seen)
        n = len(seen.images)
        rows = (seen.decoded[:n], matte.image[:n], matte.alpha[:n].expand(-1, 3, -1, -1) * 2 - 1, seen.images)
        told = {name: x.item() for name, x in errors._asdict().items()}
        return torch.stack([x.float().to(self.device).clamp(-1, 1) / 2 + 0.5 for x in rows]), told
