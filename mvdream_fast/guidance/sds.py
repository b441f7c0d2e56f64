"""Score distillation: what the diffusion model wants of rendered views, as a scalar to differentiate.

Knows latents, noise and the denoiser; knows no scene: images come in as a tensor that carries its own graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, normalize_camera, sample_cameras
from mvdream_fast.camera_sampling import CameraSampling
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.pinned import to_device
from mvdream_fast.core.ramp import ramp
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import Denoiser, TextCond
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.guidance.base import Timing, no_timing
from mvdream_fast.guidance.config import GuidanceConfig
from mvdream_fast.guidance.prompts import view_words
from mvdream_fast.models.unet import MultiViewUNet
from mvdream_fast.models.vae import VAE
from mvdream_fast.ops.sds_target import sds_target


@dataclass(frozen=True)
class SDSLoss:
    """`loss` is differentiable; `t` is the timestep it was taken at.

    target: [B*V, C, h, w], the latents that the model would rather see; constant.
    """

    loss: Tensor
    t: int
    target: Tensor


def distance(z: Tensor, target: Tensor) -> Tensor:
    """sum (z - target)^2 / (2 B V): [B*V, ...] twice -> a scalar."""
    return (z - target).square().sum() / (2 * len(z))


class ScoreDistillation:
    """Scores rendered views with a frozen diffusion model. The UNet runs without a graph, the VAE encoder with one.

    Args: text: of the one prompt (B = 1), in the UNet's dtype; None where every call brings its own.
        sample_posterior: False takes the mean of the VAE's posterior.
    """

    def __init__(
        self, unet: MultiViewUNet, vae: VAE, schedule: NoiseSchedule, text: TextCond | None, config: GuidanceConfig,
        sample_posterior: bool = True,
    ):  # fmt: skip
        self.unet, self.vae, self.schedule, self.text, self.config = unet, vae, schedule, text, config
        self.sample_posterior = sample_posterior
        self._denoisers: dict[tuple[int, int], Denoiser] = {}  # by the numbers of groups and of views

    def timestep(self, step: int, stream: Stream) -> int:
        """One timestep for all images of the step, uniform over the annealed range (ends included)."""
        n = len(self.schedule.alphas_cumprod)
        low = int(n * ramp(self.config.min_step, step))
        high = min(max(int(n * ramp(self.config.max_step, step)), low), n - 1)
        return int(stream.integers(low, high + 1))

    def __call__(
        self,
        rgb: Tensor,
        c2w: Tensor | None,
        n_views: int,
        step: int,
        stream: Stream,
        timing: Timing = no_timing,
        text: TextCond | None = None,
    ) -> SDSLoss:
        """L = sum (z - sg(target))^2 / (2 B V), whose gradient on the latents is that of the published formula.

        Args:
            rgb: [B*V, 3, Hp, Wp] in [0, 1], views fastest; resized to the model's image size (bilinear).
            c2w: [B*V, 4, 4] poses, normalised here; None asks the model in 2D mode (then n_views is 1).
            timing: called after the encoder ("vae") and after the UNet ("unet").
            text: of each of the B groups; None takes the one prompt for all.

        Returns:
            SDSLoss.

        Source: Shi et al. 2023, "MVDream", section 3.3; Poole et al. 2022, "DreamFusion", equation 3.
        """
        t = self.timestep(step, stream)
        z = self.encode(rgb, stream)
        timing("vae")
        noise = stream.normal(*z.shape, device=z.device).to(z.dtype)
        with torch.no_grad():
            times = torch.full((len(z),), t, device=z.device)
            z_t = self.schedule.add_noise(z.detach(), noise, times)
            camera = None if c2w is None else normalize_camera(c2w)
            uncond, cond = self._denoiser(len(z_t) // n_views, n_views, text)(z_t, times, camera).chunk(2)
        result = sds_target(
            z, z_t, cond, uncond, noise, self.schedule.alphas_cumprod[t].reshape(1), self.config.guidance_scale,
            self.schedule.prediction, self.config.rescale, self.config.loss, n_views,
        )  # fmt: skip
        timing("unet")
        # A zero-valued second term is not needed: d/dz of this is exactly `result.gradient`.
        return SDSLoss(distance(z, result.target), t, result.target)

    def _denoiser(self, n_groups: int, n_views: int, text: TextCond | None) -> Denoiser:
        if text is not None:
            return Denoiser(self.unet, text, n_views)
        if self.text is None:
            raise ValueError(
                "ScoreDistillation: text must be given once or with each call, got None; encode the prompt"
            )
        if (n_groups, n_views) not in self._denoisers:
            self._denoisers[n_groups, n_views] = Denoiser(self.unet, self.text.repeat(n_groups), n_views)
        return self._denoisers[n_groups, n_views]

    @torch.no_grad()
    def decode(self, target: Tensor) -> Tensor:
        """A target as images [B*V, 3, Hp, Wp] in [0, 1]; needs the VAE's decoder."""
        return (self.vae.decode(target) / 2 + 0.5).clamp(0, 1)

    def encode(self, rgb: Tensor, stream: Stream) -> Tensor:
        """Images in [0, 1] to scaled latents [B*V, C, h, w]; differentiable in the posterior's mean and deviation."""
        size = self.vae.config.image_size
        if rgb.shape[-2:] != (size, size):
            rgb = torch.nn.functional.interpolate(rgb, (size, size), mode="bilinear", align_corners=False)
        side = size // self.vae.config.downsampling
        noise = stream.normal(len(rgb), self.vae.config.latent_channels, side, side, device=rgb.device)
        return self.vae.encode(rgb * 2 - 1, noise.to(rgb.dtype) if self.sample_posterior else None)


class SDS:
    """Guidance by score distillation with a multi-view model, from random cameras.

    With `every` = k the model is asked every k-th step; the steps between pull the same views towards the same answer,
    compared as latents or as pixels (`match`). k = 1 is the paper's recipe.

    Args: n_groups: the number of groups of views at a step.
    """

    def __init__(
        self, score: ScoreDistillation, cameras: CameraSampling, n_groups: Callable[[int], int] = lambda _: 1,
        every: int = 1, match: Literal["latents", "pixels"] = "latents",
    ):  # fmt: skip
        self.distillation, self.cameras, self.n_groups, self.every, self.match = score, cameras, n_groups, every, match
        self._target: Tensor | None = None  # of the last answer; held only while it is to be used again

    def views(self, step: int, stream: Stream) -> Cameras:
        """Random cameras, as many groups as the step has."""
        return sample_cameras(self.cameras, stream, self.n_groups(step))

    def score(
        self, rgb: Tensor, views: Cameras, step: int, stream: Stream, timing: Timing = no_timing
    ) -> tuple[Tensor, int]:
        """See `Guidance`; asks the model, or goes on from its last answer."""
        if step % self.every == 0:
            return self._ask(rgb, views, step, stream, timing)
        if self._target is None:
            raise ModelError(f"the checkpoint does not hold the model's answer that step {step} goes on from")
        if self.match == "latents":
            loss = distance(self.distillation.encode(rgb, stream), self._target)
        else:
            loss = distance(_resized(rgb, self._target), self._target)
        timing("vae")
        return loss, 0

    def _ask(self, rgb: Tensor, views: Cameras, step: int, stream: Stream, timing: Timing) -> tuple[Tensor, int]:
        out = self._answer(rgb, views, step, stream, timing)
        target, loss = out.target, out.loss
        if self.match == "pixels":
            target = self.distillation.decode(target)
            timing("vae")
            loss = distance(_resized(rgb, target), target)
        self._target = target if self.every > 1 else None
        return loss, out.t

    def _answer(self, rgb: Tensor, views: Cameras, step: int, stream: Stream, timing: Timing) -> SDSLoss:
        return self.distillation(rgb, to_device(views.c2w, rgb.device), self.cameras.n_views, step, stream, timing)

    def after_step(self, step: int, stream: Stream) -> None:
        """The model stays as it is."""

    def state(self) -> dict[str, Tensor]:
        """The answer in use, for steps that go on from it."""
        return {} if self._target is None else {"target": self._target}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the answer in use."""
        target = tensors.get("target")
        self._target = None if target is None else target.to(self.distillation.schedule.alphas_cumprod.device)


class SingleViewSDS(SDS):
    """The same from the model's 2D mode, which knows no cameras: each view by itself, told its side in words.

    Args: sides: text of the prompt with each of prompts.VIEW_WORDS, B = 4.
    Source: Poole et al. 2022, "DreamFusion", section 3.2 (view-dependent prompts).
    """

    def __init__(
        self, score: ScoreDistillation, cameras: CameraSampling, sides: TextCond,
        n_groups: Callable[[int], int] = lambda _: 1, every: int = 1, match: Literal["latents", "pixels"] = "latents",
    ):  # fmt: skip
        super().__init__(score, cameras, n_groups, every, match)
        self._sides = sides

    def _answer(self, rgb: Tensor, views: Cameras, step: int, stream: Stream, timing: Timing) -> SDSLoss:
        rows = view_words(views.c2w).to(self._sides.cond.device)
        text = TextCond(self._sides.cond[rows], self._sides.uncond[rows])
        return self.distillation(rgb, None, 1, step, stream, timing, text)


def _resized(rgb: Tensor, like: Tensor) -> Tensor:
    """The images at the size of others."""
    if rgb.shape[-2:] == like.shape[-2:]:
        return rgb
    return torch.nn.functional.interpolate(rgb, like.shape[-2:], mode="bilinear", align_corners=False)
