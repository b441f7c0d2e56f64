"""What both networks beside the decoder learn from: images whose latents the model's own UNet has touched.

They are encoded, noised part of the way and denoised again with their caption and cameras, as strongly guided as when
the model draws: their latents have its flaws, and still mean the same image. The networks are cleaner.py's and
matting.py's.
"""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from mvdream_fast.checkpoints.manifest import build, owner
from mvdream_fast.checkpoints.open import Model, needed
from mvdream_fast.core.pinned import to_device
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.ahead import Ahead
from mvdream_fast.data.batches import ImageSource
from mvdream_fast.diffusion.denoiser import TextCond, model_fn
from mvdream_fast.diffusion.sampler import translate
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.models.vae import VAE
from mvdream_fast.training.unet import Parts
from mvdream_fast.training.update import BaseTrainer

N_STEPS = 5  # of a whole sampling, in steps of 200 of SD's schedule; the last ones are taken
GUIDANCE = (1.0, 10.0)  # scales are drawn between these
CHECKED = -1  # the place of scenes that are looked at, and not trained on
Pooled = TypeVar("Pooled")


@dataclass(frozen=True)
class TouchedOptions:
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
    [B*V, C, h, w]; rgba [B*V, 4, Hp, Wp] uint8, what the images show, in straight colours; one strength and one scale
    of guidance for all.
    """

    images: Tensor
    cameras: Tensor
    ids: Tensor
    noise: Tensor
    rgba: Tensor
    strength: float
    guidance: float


class TouchedTrainer(BaseTrainer, ABC, Generic[Pooled]):
    """One optimisation of a network of an autoencoder's decoder; the rest of the model is only read.

    Args: part: the network's name among the decoder's modules.
    """

    options: TouchedOptions
    strengths: ClassVar[tuple[float, ...]]  # of the image to image, one of them for each batch
    pool_size: ClassVar[int] = 256  # batches of scenes: the steps after them take these again, made already

    def __init__(self, parts: Parts, vae: VAE, source: ImageSource, options: TouchedOptions, part: str):
        self.parts, self.vae, self.source, self.part = parts, vae.float(), source, part
        for module in (parts.unet, parts.text, vae):
            module.requires_grad_(False).eval()
        if getattr(vae.config, f"decoder_{part}") is None:
            raise ValueError(f"{type(self).__name__}: the autoencoder must have a decoder_{part}, got none")
        trained = vae.model.decoder.get_submodule(part).requires_grad_(True).parameters()
        optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        sizes = json.loads(parts.config.to_json())["vae"]
        super().__init__(vae, optimizer, options, {"kind": f"train-{part}", "config": {"vae": sizes}})
        self.schedule = NoiseSchedule.from_config(parts.config.schedule, self.device)
        self.pool: dict[int, Pooled] = {}
        self.ahead = Ahead(self.draw)

    def draw(self, place: int) -> Scenes:
        """The scenes of a place in the pool, on the CPU."""
        options, config = self.options, self.parts.config
        stream = Stream(options.seed, place, f"{self.part}/scenes")
        batch, rgba = self.source.scenes(stream, options.batch_size, options.n_views)
        if batch.cameras is None:
            raise AssertionError  # scenes have them
        side = batch.images.shape[-1] // config.vae.downsampling
        noise = stream.normal(len(batch.images), config.vae.latent_channels, side, side)
        ids = self.parts.tokenizer.encode(["", *batch.captions]).ids
        strength = self.strengths[int(stream.integers(0, len(self.strengths), 1))]
        scale = stream.uniform(1, low=GUIDANCE[0], high=GUIDANCE[1]).item()
        return Scenes(batch.images, batch.cameras, ids, noise, rgba, strength, scale)

    @torch.no_grad()
    def pairs(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """Latents [B*V, C, h, w] of the images as the UNet leaves them, and exact ones."""
        images, cameras, ids, noise = (to_device(x, self.device) for x in scenes[:4])
        exact, states = self.vae.encode(images), self.parts.text(ids)
        text = TextCond(states[1:], states[:1].expand(len(ids) - 1, -1, -1))
        uncond_mode = self.parts.config.guidance.uncond_mode
        denoise = model_fn(self.parts.unet, text, cameras, self.options.n_views, uncond_mode=uncond_mode)
        settings = self.schedule, N_STEPS, scenes.guidance, scenes.strength
        return translate(denoise, exact, noise, *settings)[0], exact

    def pooled(self) -> Pooled:
        """What the coming update learns from."""
        place = self.step % self.pool_size
        if place not in self.pool:
            self.pool[place] = self.prepared(self.ahead(place))
        return self.pool[place]

    @abstractmethod
    def prepared(self, scenes: Scenes) -> Pooled:
        """What is kept of scenes."""


def with_network(model: Model, part: str, width: int, seed: int) -> Model:
    """The model with a new network of its decoder, of so many channels, its weights as yet random; or as it is, where
    it has one, or no autoencoder."""
    vae = needed(model.vae, "vae")
    if not isinstance(vae, VAE) or getattr(vae.config, f"decoder_{part}") is not None:
        return model
    config = replace(model.config, vae=replace(model.config.vae, **{f"decoder_{part}": width}))
    torch.manual_seed(seed)
    wider = build("vae", config)
    owner("vae", wider).load_state_dict(owner("vae", vae).state_dict(), strict=False)
    return replace(model, config=config, vae=wider)
