"""The state of a text-to-3D run between steps: a volume, its optimiser and counters, and what one step does to them.

Everything random is keyed by (seed, step), so a state and a step's number are all that a resumed run needs. Files,
checkpoints and the loop over steps live in text_to_3d.py.
"""

import dataclasses
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, Rays, generate_rays
from mvdream_fast.core.errors import DivergedError, ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.distill.recipes import SDSConfig
from mvdream_fast.guidance.sds import ramp
from mvdream_fast.guidance.teachers import Teacher
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.losses import opaque_loss, orientation_loss, sparsity_loss, z_variance_loss
from mvdream_fast.scene.nerf.renderer import Rendered
from mvdream_fast.scene.shading import ALBEDO, draw_light_positions, draw_shading

MAX_SKIPPED = 10  # consecutive steps with numbers that are not finite before the last good state is restored
EMPTY_STEPS = 50  # consecutive steps without any visible density before the volume is started again
EMPTY_OPACITY = 1e-3


@dataclasses.dataclass
class Record:
    """What one step reports; also a line of log.jsonl.

    `t` is 0 where the model was not asked. `seconds` by part; "rest" is everything between two steps and the little
    that no part names. `event` is a sentence where something went wrong and was mended.
    """

    step: int
    loss: float
    t: int
    opacity: float
    occupancy: float
    n_samples: int
    seconds: dict[str, float]
    skipped: bool = False
    event: str = ""

    def plain(self) -> dict:
        """As JSON can say it: null for a number that is not finite."""
        fields = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


class GrownAsset(Asset):
    """An asset with the records of the run that made it."""

    def __init__(self, config: SDSConfig, prompt: str = "", seed: int = 0):
        super().__init__(config, prompt, seed)
        self.records: list[dict] = []

    def report(self, path: Path | str) -> Path:
        """Writes one self-contained page: the asset to turn, its turntable, curves, settings and times."""
        from mvdream_fast.distill.report import asset_report

        return asset_report(self, self.records, Path(path))


class Optimization:
    """The state of one run between steps: a volume, its optimiser, and counters. Everything random is keyed by step."""

    def __init__(self, config: SDSConfig, prompt: str, seed: int, teacher: Teacher, device: torch.device | str = "cpu"):
        self.config, self.seed, self.teacher = config, seed, teacher
        self.asset = GrownAsset(config, prompt, seed)
        self.asset.to(device)
        self.optimizer = make_optimizer(self.asset, config)
        self.skipped = self.empty = self.restarts = 0
        self.halved = False
        self.event = ""
        self._clock = Clock()

    def step(self, step: int) -> Record:
        """One update. A step with numbers that are not finite changes nothing but the counter."""
        clock, renderer = self._clock, self.asset.renderer
        loss, t, rendered, finite = self._gradients(step, clock)
        if finite:
            self.optimizer.step()
        self.skipped = 0 if finite else self.skipped + 1
        clock.lap("optimiser")
        renderer.occupancy.update(step, renderer.density, Stream(self.seed, step, "occupancy"))
        clock.lap("occupancy")
        opacity = math.nan if rendered is None else rendered.opacity.detach().mean().item()
        self._watch(opacity)
        event, self.event = self.event, ""
        clock.lap("rest")
        return Record(
            step, loss.item(), t, opacity, renderer.occupancy.fraction, rendered.n_samples if rendered else 0,
            clock.take(), not finite, event,
        )  # fmt: skip

    def rehearse(self) -> None:
        """The work of a step at the last resolution, the largest, without an update: so that a run whose resolution
        grows finds out at its start whether it will have the memory. Changes nothing."""
        self._gradients(self.config.asked(self.config.steps - 1), Clock())
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, step: int, clock: "Clock") -> tuple[Tensor, int, Rendered | None, bool]:
        """Leaves the step's gradients in the parameters: (loss, timestep, what was rendered, all of it finite)."""
        asked = self.config.asked(step)
        cameras = self.teacher.cameras(asked, Stream(self.seed, asked, "cameras"))
        clock.lap("rest")
        if not (cameras.c2w.isfinite().all() and cameras.fovy.isfinite().all()):
            return torch.tensor(math.nan), 0, None, False
        rays, rendered, rgb = self._render(cameras, step)
        clock.lap("renderer")
        views = rgb.detach().requires_grad_()
        loss, t = self.teacher.score(views, cameras, step, Stream(self.seed, step, "guidance"), clock.lap)
        (d_views,) = torch.autograd.grad(loss, views)
        clock.lap("vae")
        total = self._regularizers(rays, rendered, step)
        finite = bool(loss.isfinite() and d_views.isfinite().all() and total.isfinite())
        if finite:
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward([rgb, total], [d_views, torch.ones_like(total)])
            finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.asset.renderer.parameters())
        clock.lap("renderer")
        return loss.detach(), t, rendered, finite

    def _render(self, cameras: Cameras, step: int) -> tuple[Rays, Rendered, Tensor]:
        """Rays, what they met, and their colours as images [B*V, 3, Hp, Wp]."""
        config, device = self.config, self.asset.device
        size = config.render_size[config.stage(step)]
        cameras = cameras.to(device)
        shading, lights = ALBEDO, None
        if config.shading:
            stream = Stream(self.seed, step, "light")
            shading = draw_shading(stream, step, config.shading_from)
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
        self.restart(f"density was empty for {EMPTY_STEPS} steps: the volume is started again from another seed")

    def restart(self, event: str) -> None:
        """Starts the volume again from the next seed; its streams go on. Counts as the run's one recovery."""
        self.restarts, self.skipped, self.empty, self.event = 1, 0, 0, event
        fresh = Asset(self.config, self.asset.prompt, self.seed + 1)
        self.asset.renderer.load_state_dict(fresh.state())
        self.optimizer = make_optimizer(self.asset, self.config)

    def halve(self) -> None:
        """Allows a step half of the samples that it could have had; a step above that marches in larger steps."""
        self.halved, self.event = True, "memory ran out: from here on a step takes half of the samples"
        renderer = self.asset.renderer
        size = max(self.config.render_size)
        rays = size * size * self.config.n_views * max(self.config.n_groups)
        most = min(renderer.max_samples or 1 << 62, rays * self.config.samples_per_ray)
        renderer.max_samples = max(most // 2, rays)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs to go on with the same bytes."""
        tensors = {f"asset.{name}": value for name, value in self.asset.state().items()}
        for i, parameter in enumerate(_parameters(self.optimizer)):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{i}.{key}"] = value
        for name, value in _state_of(self.teacher).items():
            tensors[f"teacher.{name}"] = value
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
            self.optimizer.state[parameter][key] = value.to(parameter).clone()
        if hasattr(self.teacher, "restore"):
            self.teacher.restore({k[8:]: v for k, v in tensors.items() if k.startswith("teacher.")})
        self.skipped, self.empty, self.restarts = tensors["counters"].tolist()


class Clock:
    """Wall time by part, without a gap: a part lasts from the end of the one before."""

    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._last: float | None = None

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """The times since the last call."""
        laps, self._laps = self._laps, {}
        return laps


def _state_of(teacher: Teacher) -> dict[str, Tensor]:
    return teacher.state() if hasattr(teacher, "state") else {}


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
