"""The diffusion training: UNet and text tower together, multi-view and 2D batches mixed, EMA, bit-exact resume.

Where batches come from is data/batches.py; the loop around the steps is loop.py; flags are train.py's.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mvdream_fast.camera import get_camera
from mvdream_fast.core import processes, reads
from mvdream_fast.core.pinned import to_device
from mvdream_fast.core.processes import ALONE, Ranks
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.ahead import Ahead
from mvdream_fast.data.batches import Batch, Source, Turns
from mvdream_fast.diffusion.denoiser import Denoiser, TextCond
from mvdream_fast.diffusion.sampler import ddim_sample
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.models.blocks import Downsample, MultiViewTransformer, Upsample
from mvdream_fast.models.captured import Captured
from mvdream_fast.models.config import ModelConfig
from mvdream_fast.models.pixels import Codec
from mvdream_fast.models.text import TextEncoder
from mvdream_fast.models.tokenizer import Tokenizer
from mvdream_fast.models.unet import MultiViewUNet
from mvdream_fast.training.learning_rate import rate
from mvdream_fast.training.update import BaseTrainer

VALIDATION_BATCHES = 4
MODES = {"multi_view": True, "2d": False}
SHEET_STEPS = 20
SHEET_SEED = 7


@dataclass(frozen=True)
class TrainOptions:
    """What shapes the numbers of a run; a resumed run with the same options continues bit for bit."""

    batch_size: int = 8  # scenes of n_views views
    n_views: int = 4
    lr: float = 3e-4
    warmup: int = 200
    steps: int = 0  # the run's end, which `decay` counts back from
    decay: int = 0  # last updates, over which the learning rate falls to zero; 0: it stays
    weight_decay: float = 0.01
    ema: float = 0.9995
    multi_view_share: float = 0.7
    wide_share: float = 0.0  # of multi-view steps: twice as many views of half as many scenes
    caption_dropout: float = 0.1
    timestep_shift: float = 1.0  # over 1: more of the noisy steps, where text and camera are all there is to go by
    accumulate: int = 1
    weighting: Literal["none", "min-snr"] = "none"
    min_snr_gamma: float = 5.0
    clip: float = 1.0
    train_text: bool = True
    autocast: Literal["none", "bf16", "fp16"] = "none"
    data_order: Literal["random", "epochs"] = "random"  # epochs: no orbit twice in multi-view steps before all were
    seed: int = 0


@dataclass
class Parts:
    """The pieces of a model that training touches; the VAE is only read."""

    config: ModelConfig
    unet: MultiViewUNet
    text: TextEncoder
    vae: Codec
    tokenizer: Tokenizer


class TextAndUNet(nn.Module):
    """UNet and text tower as the one module that several processes share."""

    def __init__(self, unet: MultiViewUNet, text: TextEncoder):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, latents: Tensor, t: Tensor, ids: Tensor, cameras: Tensor | None, n_views: int) -> Tensor:
        """The UNet's output [B*V, C, h, w] for the captions' token ids [B, L]."""
        return self.unet(latents, t, self.text(ids), cameras, n_views)


class Inputs(NamedTuple):
    """A batch with all that is random about its loss. B scenes of V views, views fastest.

    images, cameras, n_views, encoded: as in Batch; t [B*V] timesteps; noise [B*V, C, h, w]; posterior: the same for
    the autoencoder, or None where the images are encoded; ids [B, L] of the captions that were not dropped.
    """

    images: Tensor
    cameras: Tensor | None
    n_views: int
    encoded: bool
    t: Tensor
    noise: Tensor
    posterior: Tensor | None
    ids: Tensor


class Trainer(BaseTrainer):
    """One optimisation of UNet and text tower. Everything random is keyed by (seed, step, purpose).

    Several processes (`ranks`) take equal shares of each batch; with `shard` they also share the weights' memory, each
    `shard` of them one copy, and `parts` is then a copy for samples and validation, which the first process alone
    holds. `workers` more processes draw the coming batches. Of a single process, forward and backward are a CUDA graph
    unless `graphs` is False.
    """

    kind = "train-unet"  # of its checkpoints
    options: TrainOptions

    def __init__(
        self, parts: Parts, source: Source, options: TrainOptions, ranks: Ranks = ALONE, shard: int = 0,
        workers: int = 0, graphs: bool = True,
    ):  # fmt: skip
        self.parts, self.source = parts, source
        parts.vae.requires_grad_(False).eval()
        parts.text.requires_grad_(options.train_text)
        self.module = TextAndUNet(parts.unet, parts.text)
        self.model = _sharded(self.module, ranks, options, shard) if shard else processes.replicated(self.module, ranks)
        trained = self.model if shard else self.module
        optimizer = torch.optim.AdamW(
            [p for p in trained.parameters() if p.requires_grad], lr=options.lr, weight_decay=options.weight_decay,
            fused=True,
        )  # fmt: skip
        about = {
            "kind": self.kind, "config": json.loads(parts.config.to_json()), "vocabulary": parts.tokenizer.vocabulary
        }  # fmt: skip
        super().__init__(
            trained, optimizer, options, about, options.autocast == "fp16", ranks, self.module if shard else None
        )
        self.schedule = NoiseSchedule.from_config(parts.config.schedule, self.device)
        alone = self.model is self.module  # what processes tell each other is not captured
        self._descent = Captured("a training step", self._descend, self.parameters, graphs and alone)
        self.ahead = Ahead(self.draw, workers, pin=self.device.type == "cuda")

    def train_step(self) -> dict[str, float]:
        """One update; returns its loss, gradient norm and mode. Raises DivergedError before a weight is touched."""
        accumulate, losses = self.options.accumulate, []
        for micro, drawn in enumerate(self.ahead(self.step)):
            with processes.unsynchronised(self.model, micro < accumulate - 1):
                scale = self.scale() / accumulate
                told = (self.options, self.schedule), self.module, self.parts.vae
                losses += self._descent(*told, scale, *self._placed(drawn))
        total = self.ranks.mean(sum(loss / accumulate for loss in reads.read(torch.stack(losses))))
        self.check_finite(total)
        norm = self.update()
        return {"loss": total, "grad_norm": norm, "multi_view": float(drawn.cameras is not None)}

    def _descend(self, settings: Any, module: nn.Module, vae: Codec, scale: Tensor, *drawn: Any) -> tuple[Tensor]:
        """Adds the gradients of `scale` times a micro-batch's loss; returns the loss.

        Settings and modules are the trainer's own: a graph is told of them, so that it is made anew where they change.
        """
        loss = self._loss(Inputs(*drawn))
        (loss * scale).backward()
        return (loss.detach(),)

    def draw(self, step: int) -> list[Inputs]:
        """What an update learns from, of each micro-batch; a function of the step alone that needs no GPU."""
        options, out, multi_view = self.options, [], self._multi_view(step)
        n_scenes, n_views = self._sizes(step, multi_view)
        share = {} if self.ranks.world == 1 else {"ranks": self.ranks}  # a source for one process needn't know of ranks
        for micro in range(options.accumulate):
            purpose = f"train/{micro}"
            stream = self._source_stream(step, micro, multi_view)
            batch = self.source.batch(stream, n_scenes, n_views, multi_view, **share)
            stream = Stream(options.seed, step, purpose)
            out.append(self._inputs(batch, stream, options.caption_dropout, None, self.ranks))
        return out

    def _source_stream(self, step: int, micro: int, multi_view: bool) -> Stream:
        """What the source draws a micro-batch by."""
        options, purpose = self.options, f"train/{micro}/batch"
        if options.data_order == "random" or not multi_view:
            return Stream(options.seed, step, purpose)
        before = self._multi_view_steps(step) * options.accumulate + micro
        return Turns(options.seed, step, purpose, before * options.batch_size)

    def _multi_view_steps(self, step: int) -> int:
        """How many there were before a step, where they come in turn."""
        return math.floor(step * self.options.multi_view_share)

    def _multi_view(self, step: int) -> bool:
        """The mode is drawn per step, as published, so that every process of a step runs the same graph."""
        if self.options.data_order == "epochs":
            return self._multi_view_steps(step + 1) > self._multi_view_steps(step)
        return Stream(self.options.seed, step, "mode").uniform(1).item() < self.options.multi_view_share

    def _sizes(self, step: int, multi_view: bool) -> tuple[int, int]:
        """Scenes and views of each in a step."""
        n_scenes, n_views, wide = self.options.batch_size, self.options.n_views, self.options.wide_share
        if wide and multi_view and Stream(self.options.seed, step, "wide").uniform(1).item() < wide:
            return n_scenes // 2, 2 * n_views
        return n_scenes, n_views

    def lr_share(self) -> float:
        """The learning rate at this step, as a share of its highest."""
        options = self.options
        return rate(self.step, options.warmup, options.steps, options.decay)

    def loss(
        self, batch: Batch, stream: Stream, dropout: float, t: Tensor | None = None, ranks: Ranks = ALONE
    ) -> Tensor:
        """The mean squared error of the UNet's output at a random step of each scene (or at t [B]); scalar.

        `batch` is the share of `ranks`: what is random is drawn for all of them, so it is what one process would draw.
        """
        return self._loss(self._placed(self._inputs(batch, stream, dropout, t, ranks)))

    def _inputs(self, batch: Batch, stream: Stream, dropout: float, t: Tensor | None, ranks: Ranks) -> Inputs:
        n, v, config = ranks.world * len(batch.captions), batch.n_views, self.parts.config
        shape, posterior = batch.images.shape[1:], None
        if not batch.encoded:
            sides = (side // config.vae.downsampling for side in shape[1:])
            shape = (config.vae.latent_channels, *sides)
            posterior = ranks.part(stream.normal(n * v, *shape))
        spread = ranks.part(spread_timesteps(stream, n, config.schedule.n_timesteps, self.options.timestep_shift))
        t = (spread if t is None else t).repeat_interleave(v)  # the views of a scene share t
        noise = ranks.part(stream.normal(n * v, *shape))
        drop = ranks.part((stream.uniform(n) < dropout).tolist())
        captions = ["" if gone else caption for gone, caption in zip(drop, batch.captions)]
        ids = self.parts.tokenizer.encode(captions).ids
        return Inputs(batch.images, batch.cameras, v, batch.encoded, t, noise, posterior, ids)

    def _placed(self, drawn: Inputs) -> Inputs:
        """The tensors on the device, without waiting for it."""
        tensors = {name: x for name, x in drawn._asdict().items() if isinstance(x, Tensor)}
        return drawn._replace(**{name: to_device(x, self.device) for name, x in tensors.items()})

    def _loss(self, drawn: Inputs) -> Tensor:
        """As `loss`, of tensors on the device."""
        latents, t, noise = self.latents(drawn), drawn.t, drawn.noise
        # Validation runs on the first process alone, so it must not meet the others in a shared model.
        model = self.model if torch.is_grad_enabled() else self.module
        with self._autocast():
            noisy = self.schedule.add_noise(latents, noise, t)
            out = model(noisy, t, drawn.ids, drawn.cameras, drawn.n_views)
        error = (out.float() - self.schedule.target(latents, noise, t)).square().flatten(1).mean(1)
        return (error * self._weights(t)).mean()

    @torch.no_grad()
    def latents(self, drawn: Inputs) -> Tensor:
        """The latents [B*V, C, h, w]: as cached, or a sample of the VAE's posterior."""
        return drawn.images if drawn.encoded else self.parts.vae.encode(drawn.images, drawn.posterior)

    def context(self, captions: list[str]) -> Tensor:
        """Text states [B, L, width] of the captions."""
        return self.parts.text(self.parts.tokenizer.encode(captions).ids.to(self.device))

    def _weights(self, t: Tensor) -> Tensor:
        """Loss weights [B*V]. Source of min-SNR: Hang et al. 2023, for both parameterisations."""
        if self.options.weighting == "none":
            return torch.ones_like(t, dtype=torch.float32)
        abar = self.schedule.alphas_cumprod[t]
        snr = abar / (1 - abar)
        below = snr + 1 if self.schedule.prediction == "v" else snr
        return snr.clamp(max=self.options.min_snr_gamma) / below

    def _autocast(self):
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = kinds.get(self.options.autocast)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @torch.no_grad()
    def validate(self, source: Source, modes: Mapping[str, bool] = MODES) -> dict[str, float]:
        """The averaged weights' loss in each mode (its name, and whether it is multi-view): fixed batches, fixed noise,
        and steps spread over the whole schedule."""
        losses, o, n_timesteps = {}, self.options, self.parts.config.schedule.n_timesteps
        with self.averaged():
            for name, multi_view in modes.items():
                total = 0.0
                for i in range(VALIDATION_BATCHES):
                    batch = source.batch(Stream(0, i, f"validation/{name}/batch"), o.batch_size, o.n_views, multi_view)
                    n = len(batch.captions)
                    t = (torch.arange(n) * VALIDATION_BATCHES + i + 0.5) / (n * VALIDATION_BATCHES) * n_timesteps
                    total += self.loss(batch, Stream(0, i, f"validation/{name}"), 0.0, t.long()).item()
                losses[f"val_{name}"] = total / VALIDATION_BATCHES
        return losses

    @torch.no_grad()
    def sample(self, prompts: list[str], n_views: int, guidance_scale: float, seed: int = SHEET_SEED) -> Tensor:
        """Images [B, V, 3, Hp, Wp] in [0, 1] of the averaged weights, from the front on, at 15 degrees."""
        config, b, v = self.parts.config, len(prompts), n_views
        size = config.latent_size
        noise = Stream(seed, 0, "sheet").normal(b * v, config.unet.in_channels, size, size, device=self.device)
        camera = get_camera(v).to(self.device).repeat(b, 1)
        with self.averaged():
            uncond, cond = self.context([""] * b + prompts).chunk(2)
            with self._autocast():
                denoiser = Denoiser(self.parts.unet, TextCond(cond, uncond), v, guided=guidance_scale != 1)
                model_fn = denoiser.for_sampler(camera)
                latents = ddim_sample(model_fn, noise, self.schedule, SHEET_STEPS, guidance_scale)
        images = torch.cat([self.parts.vae.decode(group.float()) for group in latents.split(16)])
        return (images.clamp(-1, 1) / 2 + 0.5).unflatten(0, (b, v))


def spread_timesteps(stream: Stream, n: int, n_timesteps: int, shift: float = 1.0) -> Tensor:
    """n rising timesteps [n], one in each n-th of their distribution, for scenes in random order: a quieter gradient.

    The distribution is uniform for a shift of 1; with s the median is s / (s + 1) of the schedule.

    Source: the low-discrepancy sampler of Kingma et al. 2021 (variational diffusion models), appendix I.1; the shift is
    equation 23 of Esser et al. 2024 (Stable Diffusion 3).
    """
    u = (torch.arange(n, dtype=torch.float64) + stream.uniform(1).double()) / n
    return (shift * u / (1 + (shift - 1) * u) * n_timesteps).long().clamp(max=n_timesteps - 1)


Units = list[list[nn.Module]]


def sharding_units(module: TextAndUNet) -> tuple[Units, Units]:
    """What is gathered together while it computes, of the UNet and of the text tower, in processes that share a model.

    Each is called as a module and owns all that it reads: the convolutions of a ResBlock, whose norms and embedding are
    read by others, but all of a transformer. With gradient checkpointing such a unit is recomputed as it is gathered.
    """
    unet = module.unet
    units: Units = [[block.in_layers[2], block.out_layers[3]] for block in unet._res_blocks]
    whole = (MultiViewTransformer, Downsample, Upsample)
    layers: list[nn.Module] = [layer for layer in unet.modules() if isinstance(layer, whole)]
    units += [[layer] for layer in layers]
    return units, [[layer] for layer in module.text.model.encoder.layers]


def shard_model(module: TextAndUNet, ranks: Ranks, group: int, half: bool) -> TextAndUNet:
    """Spreads the model over `group` processes each, in place; with `half` the UNet's units travel in bfloat16.

    Under autocast the UNet's features are bfloat16, and lose nothing. The text tower adds up its layers in float32.
    """
    unet, text = sharding_units(module)
    processes.sharded(module, text if half else unet + text, unet if half else [], ranks, group)
    return module


def _sharded(module: TextAndUNet, ranks: Ranks, options: TrainOptions, group: int) -> nn.Module:
    """A sharded copy of the model. The other processes than the first keep nothing of the original."""
    model = copy.deepcopy(module)
    if not ranks.first:
        module.to("meta")
    return shard_model(model, ranks, group, options.autocast == "bf16")
