"""Training of what cleans sampled latents before they are decoded: the autoencoder's `cleaner`, and nothing else.

Images are encoded, noised half-way and denoised again by the model's own UNet with their caption and cameras, as
strongly guided as when it draws: their latents have its flaws, and still mean the same image. The others are exact
ones with plain noise on them, and exact ones that must stay.
"""

import json
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mvdream_fast.checkpoints.manifest import build, owner
from mvdream_fast.checkpoints.open import Model, needed
from mvdream_fast.core import reads
from mvdream_fast.core.pinned import to_device
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.ahead import Ahead
from mvdream_fast.data.batches import Source
from mvdream_fast.diffusion.denoiser import Denoiser, TextCond
from mvdream_fast.diffusion.sampler import translate
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.models.vae import VAE
from mvdream_fast.training.unet import Parts
from mvdream_fast.training.update import BaseTrainer

N_STEPS = 5  # of a whole sampling, in steps of 200 of SD's schedule; the last two or three are taken
STRENGTHS = (0.4, 0.6)  # of the image to image that begins at t = 201 and 401
GUIDANCE = (1.0, 10.0)  # scales are drawn between these
CLEANER_WIDTH = 128  # channels of a new one
CHECKED = -1  # the place of scenes that are looked at, and not trained on
POOL = 256  # batches of scenes: the steps after them take their latents again, which nothing need make anew
NOISE = 0.3  # the largest deviation of plain noise, which differs from cell to cell
SHIFT = 0.7  # that of noise which a whole image shares, over the former
KEPT = 8  # every so manieth exact latents get no noise


@dataclass(frozen=True)
class CleanerOptions:
    """What shapes the numbers of a run. The learning rate falls to zero over `steps`."""

    steps: int = 6000
    batch_size: int = 4  # scenes of n_views views, each once touched by the UNet and once exact
    n_views: int = 4
    lr: float = 1e-3
    warmup: int = 50
    ema: float = 0.995
    clip: float = 1.0
    seed: int = 0


class Scenes(NamedTuple):
    """B scenes of V views, views fastest, and all that is random about their latents.

    images [B*V, 3, Hp, Wp] in [-1, 1]; cameras [B*V, 16]; ids [1 + B, L], of no caption and of the scenes'; noise
    [B*V, C, h, w]; one strength and one scale of guidance for all.
    """

    images: Tensor
    cameras: Tensor
    ids: Tensor
    noise: Tensor
    strength: float
    guidance: float


class CleanerTrainer(BaseTrainer):
    """One optimisation of an autoencoder's cleaner; the rest of the model is only read."""

    options: CleanerOptions

    def __init__(self, parts: Parts, vae: VAE, source: Source, options: CleanerOptions):
        self.parts, self.vae, self.source = parts, vae.float(), source
        for module in (parts.unet, parts.text, vae):
            module.requires_grad_(False).eval()
        if vae.cleaner is None:
            raise ValueError("CleanerTrainer: the autoencoder must have a cleaner (decoder_cleaner), got none")
        trained = vae.cleaner.requires_grad_(True).parameters()
        optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        sizes = json.loads(parts.config.to_json())["vae"]
        super().__init__(vae, optimizer, options, {"kind": "train-cleaner", "config": {"vae": sizes}})
        self.schedule = NoiseSchedule.from_config(parts.config.schedule, self.device)
        self.pool: dict[int, tuple[Tensor, Tensor]] = {}
        self.ahead = Ahead(self.draw)

    def draw(self, place: int) -> Scenes:
        """The scenes of a place in the pool, on the CPU."""
        options, config = self.options, self.parts.config
        stream = Stream(options.seed, place, "cleaner/scenes")
        batch = self.source.batch(stream, options.batch_size, options.n_views, True)
        if batch.cameras is None:
            raise TypeError("CleanerTrainer: the source must know the cameras of its scenes, got single images")
        side = batch.images.shape[-1] // config.vae.downsampling
        noise = stream.normal(len(batch.images), config.vae.latent_channels, side, side)
        ids = self.parts.tokenizer.encode(["", *batch.captions]).ids
        strength = STRENGTHS[int(stream.integers(0, len(STRENGTHS), 1))]
        scale = stream.uniform(1, low=GUIDANCE[0], high=GUIDANCE[1]).item()
        return Scenes(batch.images, batch.cameras, ids, noise, strength, scale)

    @torch.no_grad()
    def pairs(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """Latents [B*V, C, h, w] of the images as the UNet leaves them, and exact ones."""
        images, cameras, ids, noise = (to_device(x, self.device) for x in scenes[:4])
        exact, states = self.vae.encode(images), self.parts.text(ids)
        text = TextCond(states[1:], states[:1].expand(len(ids) - 1, -1, -1))
        denoise = Denoiser(self.parts.unet, text, self.options.n_views).for_sampler(cameras)
        settings = self.schedule, N_STEPS, scenes.guidance, scenes.strength
        return translate(denoise, exact, noise, *settings)[0], exact

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
        place = self.step % POOL
        if place not in self.pool:
            self.pool[place] = self.pairs(self.ahead(place))
        touched, exact = self.pool[place]
        given, wanted = torch.cat([touched, self.noisy(exact)]), torch.cat([exact, exact])
        error = (self.vae.cleaned(given) - wanted).abs().mean()
        loss, before = reads.read(torch.stack([error.detach(), (given - wanted).abs().mean()]))
        self.check_finite(loss)
        (error * self.scale()).backward()
        return {"loss": loss, "without": before, "grad_norm": self.update()}


def with_cleaner(model: Model, seed: int) -> Model:
    """The model with a network that cleans latents before they are decoded, as yet without effect."""
    vae = needed(model.vae, "vae")
    if not isinstance(vae, VAE) or vae.cleaner is not None:
        return model
    config = replace(model.config, vae=replace(model.config.vae, decoder_cleaner=CLEANER_WIDTH))
    torch.manual_seed(seed)
    cleaning = build("vae", config)
    owner("vae", cleaning).load_state_dict(owner("vae", vae).state_dict(), strict=False)
    return replace(model, config=config, vae=cleaning)
