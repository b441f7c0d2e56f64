"""Text to 3D as a library: a short loop that renders views, asks the diffusion model, and updates a volume.

`TextTo3D(pipeline)(prompt) -> Asset`. Files, progress lines and reports are the command's (`sds.py`, `report.py`).
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mvdream_fast import run
from mvdream_fast.camera import Cameras, Rays, generate_rays, middle_cameras, sample_cameras
from mvdream_fast.config import SDSConfig, resolve_config
from mvdream_fast.errors import DivergedError, ModelError
from mvdream_fast.field.asset import Asset
from mvdream_fast.field.losses import opaque_loss, orientation_loss, sparsity_loss, z_variance_loss
from mvdream_fast.field.renderer import Rendered
from mvdream_fast.field.shading import ALBEDO, draw_light_positions, draw_shading
from mvdream_fast.guidance import Guidance, GuidanceConfig, ramp
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.rng import Stream

MAX_SKIPPED = 10  # consecutive steps with numbers that are not finite before the last checkpoint is restored
EMPTY_STEPS = 50  # consecutive steps without any visible density before the volume is started again
EMPTY_OPACITY = 1e-3


@dataclasses.dataclass
class Record:
    """What one step reports; also a line of log.jsonl."""

    step: int
    loss: float
    t: int
    opacity: float
    occupancy: float
    n_samples: int
    seconds: dict[str, float]
    skipped: bool = False


class Optimization:
    """The state of one run between steps: a volume, its optimiser, and counters. Everything random is keyed by step."""

    def __init__(self, config: SDSConfig, prompt: str, seed: int, teacher: "Teacher"):
        self.config, self.seed, self.teacher = config, seed, teacher
        self.asset = Asset(config, prompt, seed)
        self.optimizer = make_optimizer(self.asset, config)
        self.skipped = self.empty = self.restarts = 0

    def step(self, step: int) -> Record:
        """One update. A step with numbers that are not finite changes nothing but the counter."""
        clock = Clock()
        cameras = self.teacher.cameras(step, Stream(self.seed, step, "cameras"))
        rays, rendered, rgb = self._render(cameras, step)
        clock.lap("renderer")
        views = rgb.detach().requires_grad_()
        loss, t = self.teacher.score(views, cameras, step, Stream(self.seed, step, "guidance"))
        clock.lap("guidance")
        (d_views,) = torch.autograd.grad(loss, views)
        clock.lap("vae backward")
        total = self._regularizers(rays, rendered, step)
        finite = bool(d_views.isfinite().all() and total.isfinite())
        if finite:
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward([rgb, total], [d_views, torch.ones_like(total)])
            finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.asset.renderer.parameters())
        clock.lap("renderer backward")
        if finite:
            self.optimizer.step()
        self.skipped = 0 if finite else self.skipped + 1
        clock.lap("optimiser")
        self.asset.renderer.occupancy.update(step, self.asset.renderer.density, Stream(self.seed, step, "occupancy"))
        opacity = rendered.opacity.detach().mean().item()
        self._watch(opacity)
        clock.lap("occupancy")
        return Record(
            step, loss.item(), t, opacity, self.asset.renderer.occupancy.fraction, rendered.n_samples, clock.laps,
            not finite,
        )  # fmt: skip

    def _render(self, cameras: Cameras, step: int) -> tuple[Rays, Rendered, Tensor]:
        """Rays, what they met, and their colours as images [B*V, 3, Hp, Wp]."""
        config, device = self.config, self.asset.renderer.occupancy.ema.device
        size = config.render_size[config.stage(step)]
        cameras = cameras.to(device)
        shading, lights = ALBEDO, None
        if config.shading:
            stream = Stream(self.seed, step, "light")
            shading = draw_shading(stream, step)
            lights = draw_light_positions(stream, cameras.c2w[:, :3, 3], config.n_views)
            lights = lights.repeat_interleave(size * size, 0)
        stream = Stream(self.seed, step, "render")
        rays = generate_rays(cameras, size, size)
        rendered = self.asset.renderer(rays, stream, True, shading, lights)
        return rays, rendered, rendered.rgb.reshape(len(cameras), size, size, 3).permute(0, 3, 1, 2)

    def _regularizers(self, rays: Rays, rendered: Rendered, step: int) -> Tensor:
        """The weighted sum of the regularisers that are switched on at this step; a scalar with a graph."""
        config, total = self.config, rendered.opacity.sum() * 0
        weight = ramp(config.lambda_orient, step)
        if weight and rendered.normals is not None:
            directions = rays.rays_d[rendered.samples.ray_indices]
            total = total + weight * orientation_loss(rendered.weights, rendered.normals, directions, rendered.opacity)
        for schedule, loss, args in (
            (config.lambda_sparsity, sparsity_loss, (rendered.opacity,)),
            (config.lambda_opaque, opaque_loss, (rendered.opacity,)),
            (config.lambda_z_variance, z_variance_loss, (rendered.z_variance, rendered.opacity)),
        ):
            weight = ramp(schedule, step)
            if weight:
                total = total + weight * loss(*args)
        return total

    def _watch(self, opacity: float) -> None:
        """Starts an empty volume again, once; raises DivergedError the second time."""
        self.empty = self.empty + 1 if opacity < EMPTY_OPACITY else 0
        if self.empty < EMPTY_STEPS:
            return
        if self.restarts:
            raise DivergedError(
                f"density is empty after {EMPTY_STEPS} steps, again after a restart: occupancy "
                f"{100 * self.asset.renderer.occupancy.fraction:.0f} %; try another --seed or a lower --guidance-scale"
            )
        self.restarts, self.empty = 1, 0
        fresh = Asset(self.config, self.asset.prompt, self.seed + 1)
        self.asset.renderer.load_state_dict(fresh.state())
        self.optimizer = make_optimizer(self.asset, self.config)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs to go on with the same bytes."""
        tensors = {f"asset.{name}": value for name, value in self.asset.state().items()}
        for i, parameter in enumerate(_parameters(self.optimizer)):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{i}.{key}"] = value
        tensors["counters"] = torch.tensor([self.skipped, self.empty, self.restarts])
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes back to a `state`. Raises ModelError when it is of another configuration."""
        self.asset.restore({k[6:]: v for k, v in tensors.items() if k.startswith("asset.")})
        parameters = _parameters(self.optimizer)
        self.optimizer.state.clear()
        for name, value in tensors.items():
            if not name.startswith("optimizer."):
                continue
            _, index, key = name.split(".")
            parameter = parameters[int(index)]
            if key != "step" and value.shape != parameter.shape:
                raise ModelError(f"the checkpoint is of another configuration: {name} has shape {list(value.shape)}")
            self.optimizer.state[parameter][key] = value.clone() if key == "step" else value.to(parameter).clone()
        self.skipped, self.empty, self.restarts = tensors["counters"].tolist()


class Teacher(Protocol):
    """What an optimisation learns from: where to look at a step, and how good the rendered views are."""

    def cameras(self, step: int, stream: Stream) -> Cameras: ...

    def score(self, rgb: Tensor, cameras: Cameras, step: int, stream: Stream) -> tuple[Tensor, int]:
        """rgb [B*V, 3, Hp, Wp] in [0, 1] -> (loss with a graph to rgb, timestep or 0)."""
        ...


class Distillation:
    """Score distillation from a multi-view model, from random cameras."""

    def __init__(self, pipeline: MVDreamPipeline, prompt: str, config: SDSConfig):
        self.config = config
        text = pipeline.encode_prompt(prompt, config.negative_prompt, suffix=config.suffix)
        settings = GuidanceConfig(config.loss, config.guidance_scale, config.rescale, config.min_step, config.max_step)
        self.guidance = Guidance(
            pipeline.model.unet, pipeline.model.vae, pipeline.schedule, text.cond, text.uncond, settings
        )

    def cameras(self, step: int, stream: Stream) -> Cameras:
        return sample_cameras(self.config, stream, self.config.n_groups[self.config.stage(step)])

    def score(self, rgb: Tensor, cameras: Cameras, step: int, stream: Stream) -> tuple[Tensor, int]:
        out = self.guidance(rgb, cameras.c2w.to(rgb.device), self.config.n_views, step, stream)
        return out.loss, out.t


class Reconstruction:
    """A few-shot NeRF: V views are sampled once, and the volume is fitted to them from their own cameras."""

    def __init__(self, pipeline: MVDreamPipeline, prompt: str, config: SDSConfig, seed: int):
        self.views = middle_cameras(config)
        self.images = pipeline(prompt, n_views=config.n_views, negative_prompt=config.negative_prompt, seed=seed).tensor

    def cameras(self, step: int, stream: Stream) -> Cameras:
        return self.views

    def score(self, rgb: Tensor, cameras: Cameras, step: int, stream: Stream) -> tuple[Tensor, int]:
        target = torch.nn.functional.interpolate(self.images.to(rgb), rgb.shape[-2:], mode="area")
        return (rgb - target).square().sum() / len(rgb), 0


class Clock:
    """Wall time by part of a step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


def make_optimizer(asset: Asset, config: SDSConfig) -> torch.optim.AdamW:
    """AdamW with the recipe's learning rates: table, networks, background. Its weight decay of 0.01 is torch's default,
    which upstream uses without saying so."""
    renderer = asset.renderer
    volume = renderer.volume
    groups = [
        {"params": [volume.table], "lr": config.lr_encoding},
        {"params": [*volume.density_weights, *volume.feature_weights], "lr": config.lr_mlp},
        {"params": [*renderer.background.parameters()], "lr": config.lr_background},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(
        groups, betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
    )


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class TextTo3D:
    """Turns prompts into assets with one model; see `Optimization` for the loop's state."""

    def __init__(self, pipeline: MVDreamPipeline):
        self.pipeline = pipeline

    def __call__(
        self,
        prompt: str,
        preset: str = "mini",
        *,
        seed: int = 0,
        callback: Callable[[Record, Asset], None] | None = None,
        config: SDSConfig | None = None,
        checkpoints: Path | None = None,
        checkpoint_every: int = 100,
        interrupt: run.Interrupt | None = None,
        **overrides,
    ) -> Asset:
        """Optimises a volume for `prompt`.

        Args:
            preset: a key of SDS_PRESETS; `config` replaces it, `overrides` replace single fields (steps=300, ...).
            callback: called after every step with its Record and the growing Asset.
            checkpoints: a folder; the run saves there every `checkpoint_every` steps and goes on from what it holds.
            interrupt: when requested, the run saves and returns the asset as it is.

        Returns:
            Asset.

        Raises:
            ArgumentError: unknown preset, field or an unusable prompt.
            ModelError: a checkpoint of another configuration.
            DivergedError: numbers that are not finite, or an empty volume, after one recovery.
        """
        config = resolve_config(config or preset, **overrides)
        state = Optimization(config, prompt, seed, self.teacher(prompt, config, seed))
        first = self._resume(state, checkpoints)
        for step in range(first, config.steps):
            if interrupt is not None and interrupt.requested is not None:
                break
            record = state.step(step)
            if state.skipped >= MAX_SKIPPED:
                self._recover(state, checkpoints, step)
            if callback is not None:
                callback(record, state.asset)
            if checkpoints is not None and (step + 1) % checkpoint_every == 0:
                self._save(state, checkpoints, step + 1)
        else:
            step = config.steps
        if checkpoints is not None and first < config.steps:
            self._save(state, checkpoints, step)
        return state.asset

    def teacher(self, prompt: str, config: SDSConfig, seed: int) -> "Teacher":
        """What scores the views: score distillation, or, with method "reconstruct", sampled views to be fitted."""
        if config.method == "reconstruct":
            return Reconstruction(self.pipeline, prompt, config, seed)
        return Distillation(self.pipeline, prompt, config)

    def _resume(self, state: Optimization, folder: Path | None) -> int:
        saved = run.load_latest(folder) if folder is not None else None
        if saved is None:
            return 0
        step, tensors, meta = saved
        if meta.get("config") != _plain(state.config) or meta.get("seed") != state.seed:
            raise ModelError(f"the checkpoint in {folder} is of another configuration or seed; start a new run")
        state.restore(tensors)
        return step

    def _recover(self, state: Optimization, folder: Path | None, step: int) -> None:
        """Goes back to the last checkpoint's values, once; the streams go on from the present step."""
        saved = run.load_latest(folder) if folder is not None else None
        if saved is None or state.restarts:
            raise DivergedError(
                f"the last {MAX_SKIPPED} steps before step {step} gave numbers that are not finite; "
                "try another --seed, or a lower --guidance-scale or --lr"
            )
        state.restore(saved[1])
        state.restarts = 1

    def _save(self, state: Optimization, folder: Path, step: int) -> None:
        meta = {"config": _plain(state.config), "seed": state.seed, "prompt": state.asset.prompt}
        run.save_checkpoint(folder, step, state.state(), meta)


def _plain(config: SDSConfig) -> dict:
    """The configuration as JSON would give it back (lists for tuples)."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
