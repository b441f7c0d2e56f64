"""The diffusion training loop: UNet and text tower together, multi-view and 2D batches mixed, EMA, bit-exact resume.

Where batches come from is data/batches.py; the autoencoder's own loop is training_vae.py; flags are train.py's.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mvdream_fast import run
from mvdream_fast.camera import get_camera
from mvdream_fast.config import ModelConfig
from mvdream_fast.data.batches import Batch, Source
from mvdream_fast.errors import DivergedError, ModelError
from mvdream_fast.models.tokenizer import Tokenizer
from mvdream_fast.rng import Stream
from mvdream_fast.sampler import ddim_sample
from mvdream_fast.schedule import NoiseSchedule

VALIDATION_BATCHES = 4
SHEET_STEPS = 20
SHEET_SEED = 7
Report = Callable[[], dict[str, float]]  # validates, draws sheets; the figures for the log


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


class Trainer:
    """One optimisation of UNet and text tower. `step` is the number of updates done so far.

    Everything random is keyed by (seed, step, purpose), so the state is weights, EMA, Adam's moments and the step.
    """

    def __init__(self, parts: Parts, source: Source, options: TrainOptions):
        self.parts, self.source, self.options, self.step = parts, source, options, 0
        self.device = next(parts.unet.parameters()).device
        self.schedule = NoiseSchedule.from_config(parts.config.schedule, self.device)
        parts.vae.requires_grad_(False).eval()
        parts.text.requires_grad_(options.train_text)
        modules = {"unet": parts.unet, "text": parts.text}
        named = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        self.named = {name: p for name, p in named.items() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.ema = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.autocast == "fp16")

    def train_step(self) -> dict[str, float]:
        """One update; returns its loss, gradient norm and mode. Raises DivergedError before a weight is touched."""
        options, total, multi_view = self.options, 0.0, self._multi_view()
        for micro in range(options.accumulate):
            purpose = f"train/{micro}"
            batch = self.source.batch(
                Stream(options.seed, self.step, f"{purpose}/batch"), options.batch_size, options.n_views, multi_view
            )
            loss = self.loss(batch, Stream(options.seed, self.step, purpose), options.caption_dropout)
            self.scaler.scale(loss / options.accumulate).backward()
            total += loss.item() / options.accumulate
        if not math.isfinite(total):
            raise DivergedError(f"the loss is {total} at step {self.step}; resume with a smaller --lr")
        norm = self._update()
        return {"loss": total, "grad_norm": norm, "multi_view": float(multi_view)}

    def _multi_view(self) -> bool:
        """The mode is drawn per step, as published, so that every process of a step runs the same graph."""
        return Stream(self.options.seed, self.step, "mode").uniform(1).item() < self.options.multi_view_share

    def _update(self) -> float:
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * trapezoid(self.step, options.warmup, options.steps, options.decay)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, options.clip).item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # The average warms up, so that a short run isn't the random start's average.
        decay = min(options.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, [p.float() for p in self.parameters], 1 - decay)
        return norm

    def loss(self, batch: Batch, stream: Stream, dropout: float, t: Tensor | None = None) -> Tensor:
        """The mean squared error of the UNet's output at a random step of each scene (or at t [B]); scalar."""
        latents = self.latents(batch, stream)
        n, v = len(batch.captions), batch.n_views
        drawn = spread_timesteps(stream, n, self.parts.config.schedule.n_timesteps)
        t = (drawn if t is None else t).repeat_interleave(v).to(self.device)  # the views of a scene share t
        noise = stream.normal(*latents.shape, device=self.device)
        drop = (stream.uniform(n) < dropout).tolist()
        captions = ["" if gone else caption for gone, caption in zip(drop, batch.captions)]
        with self._autocast():
            out = self.parts.unet(
                self.schedule.add_noise(latents, noise, t), t, self.context(captions), batch.cameras, v
            )
        error = (out.float() - self.schedule.target(latents, noise, t)).square().flatten(1).mean(1)
        return (error * self._weights(t)).mean()

    def latents(self, batch: Batch, stream: Stream) -> Tensor:
        """The batch's latents [B*V, C, h, w]: as cached, or a sample of the VAE's posterior."""
        if batch.encoded:
            return batch.pictures.to(self.device)
        images = batch.pictures.to(self.device)
        vae = self.parts.config.vae
        height, width = (side // vae.downsampling for side in images.shape[2:])
        noise = stream.normal(len(images), vae.latent_channels, height, width, device=self.device)
        with torch.no_grad():
            return self.parts.vae.encode(images, noise)

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

    def averaged(self):
        """Inside, the modules hold the EMA weights; outside they are as before, bit for bit."""
        return exchanged(self.parameters, self.ema)

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
        """Everything that a resumed run needs, by name."""
        tensors = {}
        for (name, p), average in zip(self.named.items(), self.ema):
            moments = self.optimizer.state.get(p, {})
            tensors |= {f"model.{name}": p.detach(), f"ema.{name}": average}
            tensors |= {f"adam.{key}.{name}": value for key, value in moments.items()}
        return tensors

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
                p.copy_(tensors[f"model.{name}"])
                average.copy_(tensors[f"ema.{name}"])
                restore_moments(self.optimizer, p, name, tensors)
        if meta.get("scaler"):
            self.scaler.load_state_dict(meta["scaler"])
        self.step = step


def trapezoid(step: int, warmup: int, steps: int, decay: int) -> float:
    """The learning rate's factor: linear warm-up, a plateau, a linear fall over the last `decay` of `steps` updates.

    A plateau leaves the end open: a run is ended by resuming it with --decay, whenever its time is up.
    """
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return rise * min(1.0, max(0, steps - step) / decay) if decay else rise


def spread_timesteps(stream: Stream, n: int, n_timesteps: int) -> Tensor:
    """n rising timesteps [n], one in each n-th of the schedule, for scenes in random order: a quieter gradient.

    Source: the low-discrepancy sampler of Kingma et al. 2021 (variational diffusion models), appendix I.1.
    """
    offsets = (torch.arange(n, dtype=torch.float64) + stream.uniform(1).double()) / n
    return (offsets * n_timesteps).long().clamp(max=n_timesteps - 1)


def restore_moments(optimizer: torch.optim.Optimizer, p: nn.Parameter, name: str, tensors: dict[str, Tensor]) -> None:
    """Adam's moments of a weight, in the weight's memory layout, as AdamW itself makes them."""
    if f"adam.step.{name}" in tensors:
        state = {"step": tensors[f"adam.step.{name}"].to(p.device)}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.empty_like(p).copy_(tensors[f"adam.{key}.{name}"])
        optimizer.state[p] = state


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


@dataclass(frozen=True)
class LoopOptions:
    """When the loop stops, and what it writes on the way (minutes of wall time, or steps; 0 = never)."""

    steps: int
    checkpoint_minutes: float = 5.0
    sheet_minutes: float = 15.0
    validate_minutes: float = 10.0
    log_every: int = 10
    checkpoint_steps: int = 0
    report_steps: int = 0


class Loop:
    """Runs a trainer to a number of steps: log lines, checkpoints, and `report` every so often.

    Works on anything with `step`, `train_step()`, `state()` and `meta()`.
    """

    def __init__(self, trainer, folder: Path, options: LoopOptions, report: Report | None = None):
        self.trainer, self.folder, self.options, self.report = trainer, folder, options, report
        self.log = run.JsonlLog(folder / "log.jsonl")
        self.checkpoints = folder / "checkpoints"

    def resume(self) -> bool:
        """Continues from the folder's latest checkpoint; False where there is none."""
        latest = run.load_latest(self.checkpoints)
        if latest is None:
            return False
        self.trainer.restore(*latest)
        self.log.truncate_after(self.trainer.step)
        return True

    def save(self) -> None:
        run.save_checkpoint(self.checkpoints, self.trainer.step, self.trainer.state(), self.trainer.meta())

    def run(self) -> int:
        """Trains until `steps` or until a signal asks to stop; always leaves a checkpoint. Returns the exit code."""
        options, now = self.options, time.monotonic()
        saved, reported, window, since = now, now, [], now
        with run.Interrupt() as interrupt:
            while self.trainer.step < options.steps and interrupt.requested is None:
                window.append(self.trainer.train_step())
                now = time.monotonic()
                if self.trainer.step % options.log_every == 0:
                    self._log(window, (now - since) / len(window))
                    window, since = [], now
                if self.report and self._due(options.sheet_minutes, now - reported, options.report_steps):
                    self._report()
                    reported = since = time.monotonic()
                if self._due(options.checkpoint_minutes, now - saved, options.checkpoint_steps):
                    self.save()
                    saved = since = time.monotonic()
        if self.report and interrupt.requested is None:
            self._report()
        self.save()
        return interrupt.exit_code

    def _due(self, minutes: float, seconds: float, steps: int) -> bool:
        """Whether the time is over, or the step is one of every `steps`; the last step has its own save and report."""
        at_step = bool(steps) and self.trainer.step % steps == 0 and self.trainer.step < self.options.steps
        return at_step or (bool(minutes) and seconds > 60 * minutes)

    def _log(self, window: list[dict[str, float]], seconds: float) -> None:
        means = {key: sum(w[key] for w in window) / len(window) for key in window[0]}
        self._say({"seconds_per_step": seconds, **means})

    def _report(self) -> None:
        self._say(self.report())

    def _say(self, record: dict[str, float]) -> None:
        self.log.write({"step": self.trainer.step, **record})
        print(f"step {self.trainer.step}: " + " ".join(f"{k} {x:.4g}" for k, x in record.items()), flush=True)


def sheet(images: Tensor) -> "object":
    """A PIL image with one row for each prompt of [B, V, 3, Hp, Wp] in [0, 1]."""
    from PIL import Image

    rows = torch.cat([torch.cat(list(row), dim=2) for row in images], dim=1)
    return Image.fromarray((rows.permute(1, 2, 0) * 255).round().byte().numpy())
