"""The state of a stage of a text-to-3D run between steps: a representation, its optimiser and counters, and a step.

Everything random is keyed by (seed, step), so a state and a step's number are all that a resumed run needs. Files,
checkpoints and the loop over steps live in loop.py.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, Rays, generate_rays
from mvdream_fast.core import reads
from mvdream_fast.core.arguments import user_path
from mvdream_fast.core.errors import ArgumentError, DivergedError, ModelError
from mvdream_fast.core.machine import choose_device
from mvdream_fast.core.rng import Stream
from mvdream_fast.distill.config import SDSConfig, settings_of
from mvdream_fast.guidance.base import Guidance, n_fitted, opacity_loss
from mvdream_fast.models.config import ModelConfig
from mvdream_fast.scene.asset import Asset, Settings
from mvdream_fast.scene.base import Lighting, Rendered, Representation, Statistic
from mvdream_fast.scene.kinds import new_representation
from mvdream_fast.scene.particles import Particles, seed_of
from mvdream_fast.scene.shading import ALBEDO, draw_light_positions, draw_shading

MAX_SKIPPED = 10  # consecutive steps with numbers that are not finite before the last good state is restored
EMPTY_STEPS = 50  # consecutive steps without anything to see before the representation is started again
EMPTY_OPACITY = 1e-3


@dataclasses.dataclass
class Record:
    """What one step reports; also a line of log.jsonl.

    `t` is 0 where the model was not asked. `statistics` are the representation's. `seconds` by part; "rest" is
    everything between two steps and the little that no part names. `event` is a sentence where something went wrong and
    was mended.
    """

    step: int
    loss: float
    t: int
    opacity: float
    statistics: dict[str, float]
    seconds: dict[str, float]
    skipped: bool = False
    event: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON can say it: statistics by their own names, null for a number that is not finite."""
        fields = dataclasses.asdict(self)
        fields |= fields.pop("statistics")
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


class GrownAsset(Asset):
    """An asset with the records of the run that made it."""

    def __init__(
        self, representation: Representation, prompt: str = "", seed: int = 0, settings: Settings | None = None
    ):
        super().__init__(representation, prompt, seed, settings)
        self.records: list[dict[str, Any]] = []

    def report(self, path: Path | str) -> Path:
        """Writes one self-contained page: the asset to turn, its turntable, curves, settings and times."""
        from mvdream_fast.distill.report import asset_report

        return asset_report(self, self.records, user_path(path))


class RunState:
    """One stage of a run between steps.

    Args:
        representation: what to optimise; by default a fresh one of the recipe's, or as many as it has particles, the
            first of which is the asset.
        before: the steps of the stages before this one. Records and errors count the run's steps, all else the stage's.
        handed_over: the representation is what the stage before has made, so a restart goes back to it.
        model: that the guidance asks, for advice where memory runs out.
    """

    def __init__(
        self, config: SDSConfig, prompt: str, seed: int, guidance: Guidance, device: torch.device | str = "cpu",
        representation: Representation | None = None, before: int = 0, handed_over: bool = False,
        model: ModelConfig | None = None,
    ):  # fmt: skip
        self.config, self.seed, self.guidance, self.before, self.model = config, seed, guidance, before, model
        self.representation = _representation(config, seed, representation)
        self.representation.to(choose_device(device))
        self.start = {name: x.clone() for name, x in self.representation.state().items()} if handed_over else {}
        shown = self.representation.first if isinstance(self.representation, Particles) else self.representation
        self.asset = GrownAsset(shown, prompt, seed, settings_of(config))
        self.optimizer = make_optimizer(self.representation, config)
        self.skipped: int = 0
        self.empty: int = 0
        self.restarts: int = 0
        self.halved = False
        self.event = ""
        self._clock = Clock()
        self._unread: tuple[Record, reads.Later, dict[str, Statistic]] | None = None

    def step(self, step: int) -> Record | None:
        """One update. A step with numbers that are not finite changes nothing but the counter.

        Returns: what it reports. Where reads wait for the device that is known one step late: what the step before
            reported, None if that has been told. `settle` tells the rest.
        """
        clock = self._clock
        loss, t, rendered, finite = self._gradients(step, clock)
        if rendered is not None:
            set_rates(self.optimizer, self.config.lr_share(step))
            # torch's fused optimisers skip a step by it, unread; its own GradScaler sets it, its stubs don't name it
            self.optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()  # pyright: ignore[reportUnknownMemberType] # torch leaves its closure unannotated
        clock.part("optimiser")
        self.representation.after_step(step, Stream(self.seed, step, "occupancy"))
        clock.part("occupancy")
        self.guidance.after_step(step, Stream(self.seed, step, "guidance's own"))
        opacity = torch.full_like(loss, math.nan) if rendered is None else rendered.opacity.detach().mean()
        numbers = reads.Later(torch.stack([finite.double(), loss.double(), opacity.double()]))
        statistics = self.representation.statistics()
        before = self.settle()
        clock.part("rest")
        self._unread = Record(self.before + step, math.nan, t, math.nan, {}, clock.take()), numbers, statistics
        return before if reads.reads_wait(self.representation.device) else self.settle()

    def settle(self) -> Record | None:
        """What the last step reports, if `step` has not told yet; counts and mends what went wrong in it."""
        if self._unread is None:
            return None
        (record, numbers, statistics), self._unread = self._unread, None
        finite, record.loss, record.opacity = numbers.get()
        record.statistics = {name: x() if callable(x) else x for name, x in statistics.items()}
        record.skipped = not finite
        self.skipped = self.skipped + 1 if record.skipped else 0
        self._watch(record)
        record.event, self.event = self.event, ""
        return record

    def rehearse(self) -> None:
        """The work of a step at the last resolution, the largest, without an update: so that a run whose resolution
        grows finds out at its start whether it will have the memory. Changes nothing."""
        kept = self.guidance.state()  # a resumed run may be about to go on from an answer
        self._gradients(self.config.asked(self.config.steps - 1), Clock())
        self.guidance.restore(kept)
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, step: int, clock: "Clock") -> tuple[Tensor, int, Rendered | None, Tensor]:
        """Leaves the step's gradients in the parameters: (loss, timestep, what was rendered, all of it finite [])."""
        asked = self.config.asked(step)
        cameras = self.guidance.views(asked, Stream(self.seed, asked, "cameras"))
        clock.part("rest")
        if not _are_finite(cameras):
            device = self.representation.device
            return torch.tensor(math.nan, device=device), 0, None, torch.tensor(False, device=device)
        rays, rendered, rgb = self._render(cameras, step)
        clock.part("renderer")
        views = rgb.detach().requires_grad_()
        loss, t = self.guidance.score(views, cameras, step, Stream(self.seed, step, "guidance"), clock.part)
        (d_views,) = torch.autograd.grad(loss, views)
        clock.part("vae")
        total = self.representation.regularizers(rendered, rays, step)
        total = total + opacity_loss(self.guidance, rendered.opacity.view(len(rgb), *rgb.shape[-2:]), asked)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([rgb, total], [d_views, torch.ones_like(total)])
        gradients = [p.grad for p in parameters(self.optimizer) if p.grad is not None]
        finite = torch.stack([x.isfinite().all() for x in (loss, d_views, total, *gradients)]).all()
        clock.part("renderer")
        return loss.detach(), t, rendered, finite

    def _render(self, cameras: Cameras, step: int) -> tuple[Rays, Rendered, Tensor]:
        """Rays, what they met, and their colours as images [B*V, 3, Hp, Wp]."""
        size = self.config.render_size[self.config.phase(step)]
        cameras = cameras.to(self.representation.device)
        lighting = self._lighting(cameras, size, step)
        rays = generate_rays(cameras, size, size)
        rendered = self.representation.render(rays, Stream(self.seed, step, "render"), True, lighting)
        return rays, rendered, rendered.rgb.reshape(len(cameras), size, size, 3).permute(0, 3, 1, 2)

    def _lighting(self, cameras: Cameras, size: int, step: int) -> Lighting | None:
        """The light on a step's views, of so many pixels a side, and what is behind them.

        Both are those of the step whose answer is used: else that answer would hold for other images. Views that are
        compared with images have neither light nor a random background, which the images don't show.
        """
        config, asked, n_views = self.config, self.config.asked(step), len(cameras)
        fitted, shading, lights, plain = n_fitted(self.guidance, n_views, asked), ALBEDO, None, None
        behind = Stream(self.seed, asked, "behind") if config.updates_per_guidance > 1 else None
        if config.shading and fitted < n_views:
            stream = Stream(self.seed, asked, "light")
            shading = draw_shading(stream, asked, config.shading_from, soft=config.soft_shading)
            lights = draw_light_positions(stream, cameras.c2w[:, :3, 3], config.cameras.n_views)
            lights = lights.repeat_interleave(size * size, 0)
        if fitted:
            pixels = torch.arange(n_views * size * size, device=cameras.c2w.device)
            plain = pixels >= (n_views - fitted) * size * size
        if lights is plain is behind is None:
            return None
        return Lighting(shading, lights, plain, behind)

    def _watch(self, record: Record) -> None:
        """Starts an empty representation again, once; raises DivergedError the second time."""
        self.empty = self.empty + 1 if record.opacity < EMPTY_OPACITY else 0
        if self.empty < EMPTY_STEPS:
            return
        if self.restarts:
            known = ", ".join(f"{name} {value:.3g}" for name, value in record.statistics.items())
            raise DivergedError(
                f"density is empty after {EMPTY_STEPS} steps, again after a restart: {known}; "
                "try another --seed or a lower --guidance-scale"
            )
        self.restart(f"density was empty for {EMPTY_STEPS} steps")

    def restart(self, happened: str) -> None:
        """Starts again from what was handed over, or else from the values of the next seed; the streams go on. Counts
        as the stage's one recovery."""
        self.restarts, self.skipped, self.empty = 1, 0, 0
        if self.start:
            self.event = f"{happened}: the stage begins again with what it was handed"
            self.representation.restore(self.start)
        else:
            self.event = f"{happened}: the volume is started again from another seed"
            self.representation.restart(self.seed + 1)
        self.optimizer = make_optimizer(self.representation, self.config)

    def halve(self) -> None:
        """Allows a step half of the memory that it could have taken."""
        self.halved, self.event = True, "memory ran out: from here on a step takes half of the samples"
        self.representation.save_memory(self.config.n_rays())

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs to go on with the same bytes, once the last step is settled."""
        tensors = {f"asset.{name}": value for name, value in self.representation.state().items()}
        tensors |= {f"start.{name}": value for name, value in self.start.items()}
        for i, parameter in enumerate(parameters(self.optimizer)):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{i}.{key}"] = value
        tensors |= {f"guidance.{name}": value for name, value in self.guidance.state().items()}
        tensors["counters"] = torch.tensor([self.skipped, self.empty, self.restarts, self.halved])
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes back to a `state`. Raises ModelError when it is of another configuration."""
        self.representation.restore(_under("asset.", tensors))
        self.start = _under("start.", tensors)
        learned = parameters(self.optimizer)
        self.optimizer.state.clear()
        for name, value in _under("optimizer.", tensors).items():
            index, key = name.split(".")
            parameter = learned[int(index)]
            if key != "step" and value.shape != parameter.shape:
                raise ModelError(f"the checkpoint is of another configuration: {name} has shape {list(value.shape)}")
            self.optimizer.state[parameter][key] = value.to(parameter).clone()
        self.guidance.restore(_under("guidance.", tensors))
        self.skipped, self.empty, self.restarts, *halved = reads.read(tensors["counters"])
        if any(halved) and not self.halved:  # which runs of older versions don't say
            self.halved = True
            self.representation.save_memory(self.config.n_rays())


def is_skipping(tensors: dict[str, Tensor]) -> bool:
    """Whether a `state` is of a run whose last step gave numbers that are not finite."""
    return reads.read(tensors["counters"])[0] > 0


def _representation(config: SDSConfig, seed: int, given: Representation | None) -> Representation:
    """What is to be optimised: what was given, or a fresh representation of the recipe's, or its particles."""
    n = config.guidance.particles
    if given is not None:
        held = len(given.particles) if isinstance(given, Particles) else 1
        if held != n:
            raise ArgumentError(
                f"particles must be {held}, the number in the representation that was given, got {n}; give the "
                "scene.particles.Particles of as many"
            )
        return given
    seeds = [seed_of(seed, i) for i in range(n)]
    particles = [new_representation(config.representation, s, lit=config.shading) for s in seeds]
    return particles[0] if len(particles) == 1 else Particles(particles)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _are_finite(cameras: Cameras) -> bool:
    """Cameras are made on the CPU: to look at them waits for nobody."""
    return bool(cameras.c2w.isfinite().all() and cameras.fovy.isfinite().all())


class Clock:
    """Wall time by part, without a gap: a part lasts from the end of the one before."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last: float | None = None

    def part(self, name: str) -> None:
        """The part of this name has just ended."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """The times since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def make_optimizer(representation: Representation, config: SDSConfig) -> torch.optim.AdamW:
    """AdamW with the recipe's settings and the representation's learning rates. The paper's weight decay of 0.01 is
    torch's default, which upstream uses without saying so."""
    optimizer = torch.optim.AdamW(
        representation.parameter_groups(), betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay,
        fused=True,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Every group's learning rate as a share of its first one."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["initial_lr"]


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """What an optimiser updates, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]
