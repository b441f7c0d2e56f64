"""What a volume learns from: where to look at a step, and how far the rendered views are from what they should be.

Score distillation asks the diffusion model every step; reconstruction fits views that were sampled once. The volume and
its optimiser live in optimization.py.
"""

from typing import Protocol

import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, middle_cameras, sample_cameras
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.distill.recipes import SDSConfig
from mvdream_fast.guidance.sds import Guidance, GuidanceConfig, GuidanceLoss, Lap, distance, no_lap
from mvdream_fast.pipeline import MVDreamPipeline


class Teacher(Protocol):
    """The interface. A teacher may also have `state() -> dict[str, Tensor]` and `restore(tensors)`, which go into
    checkpoints."""

    def cameras(self, step: int, stream: Stream) -> Cameras: ...

    def score(self, rgb: Tensor, cameras: Cameras, step: int, stream: Stream, lap: Lap = no_lap) -> tuple[Tensor, int]:
        """rgb [B*V, 3, Hp, Wp] in [0, 1] -> (loss with a graph to rgb, timestep or 0); `lap` is told what took time."""
        ...


class Distillation:
    """Score distillation from a multi-view model, from random cameras.

    With `updates_per_guidance` = k the model is asked every k-th step; the steps between pull the same views towards
    the same answer, compared as latents or as pixels. k = 1 is the paper's recipe.
    """

    def __init__(self, pipeline: MVDreamPipeline, prompt: str, config: SDSConfig):
        self.config = config
        silent = lambda _: None  # noqa: E731 (the command has named unknown words once)
        text = pipeline.encode_prompt(prompt, config.negative_prompt, suffix=config.suffix, warn=silent)
        settings = GuidanceConfig(config.loss, config.guidance_scale, config.rescale, config.min_step, config.max_step)
        cond, uncond = text.cond.to(pipeline.dtype), text.uncond.to(pipeline.dtype)
        self.guidance = Guidance(pipeline.model.unet, pipeline.model.vae, pipeline.schedule, cond, uncond, settings)
        self._target: Tensor | None = None  # of the last answer; held only while it is to be used again

    def cameras(self, step: int, stream: Stream) -> Cameras:
        return sample_cameras(self.config, stream, self.config.n_groups[self.config.stage(step)])

    def score(self, rgb: Tensor, cameras: Cameras, step: int, stream: Stream, lap: Lap = no_lap) -> tuple[Tensor, int]:
        if step == self.config.asked(step):
            return self._ask(rgb, cameras, step, stream, lap)
        if self._target is None:
            raise ModelError(f"the checkpoint does not hold the model's answer that step {step} goes on from")
        if self.config.match == "latents":
            loss = self.guidance.match_latents(rgb, self._target, stream)
        else:
            loss = distance(_resized(rgb, self._target), self._target)
        lap("vae")
        return loss, 0

    def _ask(self, rgb: Tensor, cameras: Cameras, step: int, stream: Stream, lap: Lap) -> tuple[Tensor, int]:
        out = self._answer(rgb, cameras, step, stream, lap)
        if self.config.match == "latents":
            self._target = out.target if self.config.updates_per_guidance > 1 else None
            return out.loss, out.t
        target = self.guidance.picture(out.target)
        lap("vae")
        self._target = target if self.config.updates_per_guidance > 1 else None
        return distance(_resized(rgb, target), target), out.t

    def _answer(self, rgb: Tensor, cameras: Cameras, step: int, stream: Stream, lap: Lap) -> GuidanceLoss:
        return self.guidance(rgb, cameras.c2w.to(rgb.device), self.config.n_views, step, stream, lap)

    def state(self) -> dict[str, Tensor]:
        """The answer in use, for steps that go on from it."""
        return {} if self._target is None else {"target": self._target}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        target = tensors.get("target")
        self._target = None if target is None else target.to(self.guidance.text.device)


class SingleViewDistillation(Distillation):
    """The same from the model's 2D mode, which knows no cameras: each view by itself, told its side in words.

    Source: Poole et al. 2022, "DreamFusion", section 3.2 (view-dependent prompts).
    """

    def __init__(self, pipeline: MVDreamPipeline, prompt: str, config: SDSConfig):
        super().__init__(pipeline, prompt, config)
        sides = [f"{prompt}, {words}" for words in VIEW_WORDS]
        text = pipeline.encode_prompt(sides, config.negative_prompt, suffix=config.suffix, warn=lambda _: None)
        self._sides, self._negative = text.cond.to(pipeline.dtype), text.uncond.to(pipeline.dtype)

    def _answer(self, rgb: Tensor, cameras: Cameras, step: int, stream: Stream, lap: Lap) -> GuidanceLoss:
        rows = view_words(cameras.c2w).to(self._sides.device)
        text = torch.cat([self._sides[rows], self._negative[rows]])
        return self.guidance(rgb, None, 1, step, stream, lap, text)


VIEW_WORDS = ("front view", "side view", "back view", "overhead view")


def view_words(c2w: Tensor) -> Tensor:
    """Which of VIEW_WORDS each view is, [V] for c2w [V, 4, 4]: by quarters around the front, or above 60 degrees.

    Source: Poole et al. 2022, "DreamFusion", section 3.2; quarters as threestudio has them.
    """
    x, y, z = c2w[:, :3, 3].unbind(1)
    azimuth = torch.rad2deg(torch.atan2(x, -y)).abs()
    row = torch.where(azimuth < 45, 0, torch.where(azimuth <= 135, 1, 2))
    return torch.where(torch.rad2deg(torch.atan2(z, torch.hypot(x, y))) > 60, 3, row)


class Reconstruction:
    """A few-shot NeRF: V views are sampled once, and the volume is fitted to them from their own cameras."""

    def __init__(self, pipeline: MVDreamPipeline, prompt: str, config: SDSConfig, seed: int):
        self.views = middle_cameras(config)
        self.images = pipeline(
            prompt, config.n_views, negative_prompt=config.negative_prompt, seed=seed, warn=lambda _: None
        ).tensor

    def cameras(self, step: int, stream: Stream) -> Cameras:
        return self.views

    def score(self, rgb: Tensor, cameras: Cameras, step: int, stream: Stream, lap: Lap = no_lap) -> tuple[Tensor, int]:
        target = torch.nn.functional.interpolate(self.images.to(rgb), rgb.shape[-2:], mode="area")
        return (rgb - target).square().sum() / len(rgb), 0


def _resized(rgb: Tensor, like: Tensor) -> Tensor:
    """The images at the size of others."""
    if rgb.shape[-2:] == like.shape[-2:]:
        return rgb
    return torch.nn.functional.interpolate(rgb, like.shape[-2:], mode="bilinear", align_corners=False)
