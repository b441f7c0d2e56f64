"""The diffusion training: UNet and text tower together, multi-view and 2D batches mixed, EMA, bit-exact resume.

Where batches come from is data/batches.py; the loop around the steps is loop.py; flags are train.py's.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mvdream_fast.camera import get_camera
from mvdream_fast.core import processes
from mvdream_fast.core.errors import DivergedError, ModelError
from mvdream_fast.core.processes import ALONE, Ranks
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.ahead import Ahead
from mvdream_fast.data.batches import Batch, Source
from mvdream_fast.diffusion.sampler import ddim_sample
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.models.config import ModelConfig
from mvdream_fast.models.tokenizer import Tokenizer
from mvdream_fast.training.learning_rate import rate

VALIDATION_BATCHES = 4
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
    caption_dropout: float = 0.1
    timestep_shift: float = 1.0  # over 1: more of the noisy steps, where text and camera are all there is to go by
    accumulate: int = 1
    weighting: Literal["none", "min-snr"] = "none"
    min_snr_gamma: float = 5.0
    clip: float = 1.0
    train_text: bool = True
    autocast: Literal["none", "bf16", "fp16"] = "none"
    seed: int = 0


@dataclass
class Parts:
    """The pieces of a model that training touches; the VAE is only read."""

    config: ModelConfig
    unet: nn.Module
    text: nn.Module
    vae: nn.Module
    tokenizer: Tokenizer


class TextAndUNet(nn.Module):
    """UNet and text tower as the one module that several processes share."""

    def __init__(self, unet: nn.Module, text: nn.Module):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, latents: Tensor, t: Tensor, ids: Tensor, cameras: Tensor | None, n_views: int) -> Tensor:
        return self.unet(latents, t, self.text(ids), cameras, n_views)


class Inputs(NamedTuple):
    """A batch with all that is random about its loss, on the CPU. B scenes of V views, views fastest.

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


class Trainer:
    """One optimisation of UNet and text tower. `step` is the number of updates done so far.

    Everything random is keyed by (seed, step, purpose), so the state is weights, EMA, Adam's moments and the step.
    Several processes (`ranks`) take equal shares of each batch; with `shard` they also share the weights' memory, and
    `parts` is then a copy for samples and validation, which the first process alone holds. `workers` more processes
    draw the coming batches.
    """

    def __init__(
        self, parts: Parts, source: Source, options: TrainOptions, ranks: Ranks = ALONE, shard: bool = False,
        workers: int = 0,
    ):  # fmt: skip
        self.parts, self.source, self.options, self.ranks, self.step = parts, source, options, ranks, 0
        self.device = next(parts.unet.parameters()).device
        self.schedule = NoiseSchedule.from_config(parts.config.schedule, self.device)
        parts.vae.requires_grad_(False).eval()
        parts.text.requires_grad_(options.train_text)
        self.denoiser = TextAndUNet(parts.unet, parts.text)
        self.model = _sharded(self.denoiser, ranks) if shard else processes.replicated(self.denoiser, ranks)
        self.shown = [p for p in self.denoiser.parameters() if p.requires_grad]
        trained = self.model if shard else self.denoiser
        self.named = {name: p for name, p in trained.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self._averaged = False
        self.ema = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.autocast == "fp16")
        self.ahead = Ahead(self.draw, workers, pin=self.device.type == "cuda")

    def train_step(self) -> dict[str, float]:
        """One update; returns its loss, gradient norm and mode. Raises DivergedError before a weight is touched."""
        options, total = self.options, 0.0
        for micro, drawn in enumerate(self.ahead(self.step)):
            with processes.unsynchronised(self.model, micro < options.accumulate - 1):
                loss = self._loss(drawn)
                self.scaler.scale(loss / options.accumulate).backward()
            total += loss.item() / options.accumulate
        total = self.ranks.mean(total)
        if not math.isfinite(total):
            raise DivergedError(f"the loss is {total} at step {self.step}; resume with a smaller learning rate")
        norm = self._update()
        return {"loss": total, "grad_norm": norm, "multi_view": float(drawn.cameras is not None)}

    def draw(self, step: int) -> list[Inputs]:
        """What an update learns from, of each micro-batch; a function of the step alone that needs no GPU."""
        options, out, multi_view = self.options, [], self._multi_view(step)
        share = {} if self.ranks.world == 1 else {"ranks": self.ranks}  # a source for one process needn't know of ranks
        for micro in range(options.accumulate):
            purpose = f"train/{micro}"
            stream = Stream(options.seed, step, f"{purpose}/batch")
            batch = self.source.batch(stream, options.batch_size, options.n_views, multi_view, **share)
            stream = Stream(options.seed, step, purpose)
            out.append(self._inputs(batch, stream, options.caption_dropout, None, self.ranks))
        return out

    def _multi_view(self, step: int) -> bool:
        """The mode is drawn per step, as published, so that every process of a step runs the same graph."""
        return Stream(self.options.seed, step, "mode").uniform(1).item() < self.options.multi_view_share

    def _update(self) -> float:
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * rate(self.step, options.warmup, options.steps, options.decay)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # The average warms up, so that a short run isn't the random start's average.
        decay = min(options.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, [p.float() for p in self.parameters], 1 - decay)
        return processes.number(norm)

    def loss(
        self, batch: Batch, stream: Stream, dropout: float, t: Tensor | None = None, ranks: Ranks = ALONE
    ) -> Tensor:
        """The mean squared error of the UNet's output at a random step of each scene (or at t [B]); scalar.

        `batch` is the share of `ranks`: what is random is drawn for all of them, so it is what one process would draw.
        """
        return self._loss(self._inputs(batch, stream, dropout, t, ranks))

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

    def _loss(self, drawn: Inputs) -> Tensor:
        latents, t, noise = self.latents(drawn), self._to_device(drawn.t), self._to_device(drawn.noise)
        cameras = drawn.cameras if drawn.cameras is None else self._to_device(drawn.cameras)
        # Validation runs on the first process alone, so it must not meet the others in a shared model.
        model = self.model if torch.is_grad_enabled() else self.denoiser
        with self._autocast():
            noisy = self.schedule.add_noise(latents, noise, t)
            out = model(noisy, t, self._to_device(drawn.ids), cameras, drawn.n_views)
        error = (out.float() - self.schedule.target(latents, noise, t)).square().flatten(1).mean(1)
        return (error * self._weights(t)).mean()

    @torch.no_grad()
    def latents(self, drawn: Inputs) -> Tensor:
        """The latents [B*V, C, h, w]: as cached, or a sample of the VAE's posterior."""
        images = self._to_device(drawn.images)
        return images if drawn.encoded else self.parts.vae.encode(images, self._to_device(drawn.posterior))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

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

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, `parts` holds the EMA weights (on the first process); outside it is as before, bit for bit.

        All processes enter together; what the first does inside may enter again.
        """
        if self._averaged:
            yield
            return
        average = [processes.whole(a, self.ranks) for a in self.ema]
        self._averaged = True
        try:
            with exchanged(self.shown, average) if self.ranks.first else nullcontext():
                yield
        finally:
            self._averaged = False

    @torch.no_grad()
    def validate(self, source: Source) -> dict[str, float]:
        """The averaged weights' loss in each mode: fixed batches, noise, and steps spread over the whole schedule."""
        losses, o, n_timesteps = {}, self.options, self.parts.config.schedule.n_timesteps
        with self.averaged():
            for name, multi_view in (("multi_view", True), ("2d", False)):
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
        camera = get_camera(v).to(self.device).repeat(2 * b, 1)
        with self.averaged():
            context = self.context([""] * b + prompts)

            def model(latents: Tensor, t: Tensor) -> Tensor:
                n = len(latents)  # both halves, or the prompts' alone where the guidance scale is 1
                return self.parts.unet(latents, t, context[-n // v :], camera[:n], v)

            with self._autocast():
                latents = ddim_sample(model, noise, self.schedule, SHEET_STEPS, guidance_scale)
        images = torch.cat([self.parts.vae.decode(group.float()) for group in latents.split(16)])
        return (images.clamp(-1, 1) / 2 + 0.5).unflatten(0, (b, v))

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name; whole tensors, whoever holds them. All processes call it."""
        tensors = {}
        for (name, p), average in zip(self.named.items(), self.ema):
            moments = self.optimizer.state.get(p, {})
            tensors |= {f"model.{name}": p.detach(), f"ema.{name}": average}
            tensors |= {f"adam.{key}.{name}": value for key, value in moments.items()}
        return {name: processes.whole(tensor, self.ranks) for name, tensor in tensors.items()}

    def meta(self) -> dict:
        return {
            "kind": "train-unet",
            "config": json.loads(self.parts.config.to_json()),
            "options": dataclasses.asdict(self.options),
            "vocabulary": self.parts.tokenizer.vocabulary,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, step: int, tensors: dict[str, Tensor], meta: dict) -> None:
        """Takes over a checkpoint's state. Raises ModelError when it is of another configuration."""
        check_same_model(meta, self.meta())
        names = {f"{kind}.{name}" for kind in ("model", "ema") for name in self.named}
        missing = sorted(names - set(tensors))
        if missing:
            raise ModelError(f"the checkpoint has no {missing[0]}; it was trained with other options")
        with torch.no_grad():
            for (name, p), average in zip(self.named.items(), self.ema):
                p.copy_(processes.placed(tensors[f"model.{name}"], p))
                average.copy_(processes.placed(tensors[f"ema.{name}"], average))
                restore_moments(self.optimizer, p, name, tensors)
        if meta.get("scaler"):
            self.scaler.load_state_dict(meta["scaler"])
        self.step = step


def spread_timesteps(stream: Stream, n: int, n_timesteps: int, shift: float = 1.0) -> Tensor:
    """n rising timesteps [n], one in each n-th of their distribution, for scenes in random order: a quieter gradient.

    The distribution is uniform for a shift of 1; with s the median is s / (s + 1) of the schedule.

    Source: the low-discrepancy sampler of Kingma et al. 2021 (variational diffusion models), appendix I.1; the shift is
    equation 23 of Esser et al. 2024 (Stable Diffusion 3).
    """
    u = (torch.arange(n, dtype=torch.float64) + stream.uniform(1).double()) / n
    return (shift * u / (1 + (shift - 1) * u) * n_timesteps).long().clamp(max=n_timesteps - 1)


def restore_moments(optimizer: torch.optim.Optimizer, p: nn.Parameter, name: str, tensors: dict[str, Tensor]) -> None:
    """Adam's moments of a weight, in the weight's memory layout, as AdamW itself makes them."""
    if f"adam.step.{name}" in tensors:
        state = {"step": tensors[f"adam.step.{name}"].to(p.device)}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.empty_like(p).copy_(processes.placed(tensors[f"adam.{key}.{name}"], p))
        optimizer.state[p] = state


def _sharded(denoiser: TextAndUNet, ranks: Ranks) -> nn.Module:
    """A copy of the model spread over all processes. The others than the first keep nothing of the original."""
    model = copy.deepcopy(denoiser)
    unet, text = model.unet, model.text
    # Units are called as modules and own all that they read: a ResBlock's convolutions, but not its norms.
    units = [conv for block in unet._res_blocks for conv in (block.in_layers[2], block.out_layers[3])]
    units += [transformer.transformer_blocks[0] for transformer in unet._transformers]
    units += list(text.model.encoder.layers)
    if not ranks.first:
        denoiser.to("meta")
    return processes.sharded(model, units, ranks)


@contextmanager
def exchanged(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Inside, the parameters hold `values`; outside they are as before, bit for bit."""
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, values)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)


def check_same_model(found: dict, wanted: dict) -> None:
    """Raises ModelError naming what differs between a checkpoint's meta and the run's."""
    if found.get("kind") != wanted["kind"]:
        raise ModelError(
            f"the checkpoint is of {found.get('kind')}, not of {wanted['kind']}; name another folder with -o"
        )
    for part, value in wanted["config"].items():
        other = found["config"].get(part)
        if other != value:
            keys = [k for k in value if other.get(k) != value[k]] if isinstance(value, dict) and other else [part]
            raise ModelError(
                f"the checkpoint is of another configuration: {part}.{keys[0]} differs; "
                "resume with the flags it was started with, or name another folder with -o"
            )
    if found.get("vocabulary") != wanted.get("vocabulary"):
        raise ModelError("the checkpoint has another vocabulary; resume with the shards it was started with")
