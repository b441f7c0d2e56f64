"""Score distillation: what the diffusion model wants of rendered views, as a scalar to differentiate.

Knows latents, noise and the denoiser; knows no scene: images come in as a tensor that carries its own graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, normalize_camera, sample_cameras
from mvdream_fast.camera_sampling import CameraSampling
from mvdream_fast.core import reads
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.pinned import to_device
from mvdream_fast.core.ramp import ramp
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import Denoiser, TextCond, ask, guided_call
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.guidance.base import Timing, no_timing
from mvdream_fast.guidance.config import GuidanceConfig
from mvdream_fast.guidance.prompts import led_away, tell
from mvdream_fast.models.captured import Captured
from mvdream_fast.models.deepfloyd import UNet
from mvdream_fast.models.pixels import Codec
from mvdream_fast.ops.sds_target import sds_target


@dataclass(frozen=True)
class SDSLoss:
    """`loss` is differentiable; `t` is the timestep it was taken at, of several the rounded mean.

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

    On CUDA everything from the images to their gradient is one graph (models/captured.py).

    Args: text: of the one prompt (B = 1), in the UNet's dtype; None where every call brings its own.
        sample_posterior: False takes the mean of the VAE's posterior.
        graphs: False makes no CUDA graphs.
    """

    def __init__(
        self, unet: UNet, vae: Codec, schedule: NoiseSchedule, text: TextCond | None, config: GuidanceConfig,
        sample_posterior: bool = True, graphs: bool = True,
    ):  # fmt: skip
        self.unet, self.vae, self.schedule, self.text, self.config = unet, vae, schedule, text, config
        self.sample_posterior = sample_posterior
        self._guided_call = guided_call(graphs)
        self._whole = Captured("score distillation", _with_gradient, enabled=graphs)
        self._denoisers: dict[tuple[int, int], tuple[TextCond, Denoiser]] = {}  # by the numbers of groups and of views

    def timestep(self, step: int, stream: Stream) -> int:
        """One timestep for all images of the step, uniform over the annealed range (ends included)."""
        return int(stream.integers(*self._timestep_range(step)))

    def timesteps(self, step: int, stream: Stream, n_groups: int, n_views: int) -> list[int]:
        """The timesteps of B groups of V images as the configuration wants them: one for all, or B*V, where those of a
        group are the same; drawn as `timestep` is."""
        if self.config.timesteps == "shared":
            return [self.timestep(step, stream)]
        return reads.read(stream.integers(*self._timestep_range(step), n_groups).repeat_interleave(n_views))

    def _timestep_range(self, step: int) -> tuple[int, int]:
        """The first timestep of the annealed range, and the one after its last."""
        n = len(self.schedule.alphas_cumprod)
        low = int(n * ramp(self.config.min_step, step))
        return low, min(max(int(n * ramp(self.config.max_step, step)), low), n - 1) + 1

    def __call__(
        self,
        rgb: Tensor,
        c2w: Tensor | None,
        n_views: int,
        step: int,
        stream: Stream,
        timing: Timing = no_timing,
        text: TextCond | None = None,
        for_target: bool = False,
        away_weights: Tensor | None = None,
    ) -> SDSLoss:
        """L = sum (z - sg(target))^2 / (2 B V), whose gradient on the latents is that of the published formula.

        Args:
            rgb: [B*V, 3, Hp, Wp] in [0, 1], views fastest; resized to the model's image size (bilinear).
            c2w: [B*V, 4, 4] poses, normalised here; None asks the model in 2D mode (then n_views is 1).
            timing: called after the encoder ("vae") and after the UNet ("unet"); a graph is "unet" as a whole.
            text: of each of the B groups, or of each image; None takes the one prompt for all.
            for_target: the loss will not be differentiated, so a graph need not hold its gradient.
            away_weights: [K, B*V], how strongly each image is led away from `text.away`, which needs them.

        Returns:
            SDSLoss. Where it comes from a graph its loss has first derivatives only.

        Source: Shi et al. 2023, "MVDream", section 3.3; Poole et al. 2022, "DreamFusion", equation 3.
        """
        drawn = self.timesteps(step, stream, len(rgb) // n_views, n_views)
        posterior, noise = self._noise(rgb, stream), self._noise(rgb, stream)
        camera = None if c2w is None else to_device(normalize_camera(c2w), rgb.device)
        t, at = round(sum(drawn) / len(drawn)), to_device(torch.tensor(drawn), rgb.device)
        denoiser = self._denoiser(len(rgb) // n_views, n_views, text)
        wishes = Wishes(self.schedule, self.config, n_views)
        numbers = noise, at, self._limit(step, rgb.device), away_weights
        if self._whole.is_active(rgb.device) and not for_target:
            loss, target, d_rgb = self._whole(
                self.unet, self.vae, wishes, denoiser.n_prompts, rgb, posterior if self.sample_posterior else None,
                *numbers, None if camera is None else camera.to(denoiser.dtype), *denoiser.told(),
            )  # fmt: skip
            timing("unet")
            return SDSLoss(with_known_gradient(loss, rgb, d_rgb), t, target)
        z = self._encode(rgb, posterior)
        timing("vae")
        z_t = self.schedule.add_noise(z.detach(), noise.to(z.dtype), at)
        target = wishes.target(z, z_t, denoiser(z_t, at, camera), *numbers)
        timing("unet")
        # A zero-valued second term is not needed: d/dz of this is exactly the gradient that sds_target names.
        return SDSLoss(distance(z, target), t, target)

    def _limit(self, step: int, device: torch.device) -> Tensor | None:
        """The largest magnitude of the gradient at a step, [1]."""
        schedule = self.config.grad_clip
        return None if schedule is None else to_device(torch.tensor([ramp(schedule, step)]), device)

    def _denoiser(self, n_groups: int, n_views: int, text: TextCond | None) -> Denoiser:
        if text is not None:
            return Denoiser(self.unet, text, n_views, captured=self._guided_call)
        if self.text is None:
            raise ValueError(
                "ScoreDistillation: text must be given once or with each call, got None; encode the prompt"
            )
        known = self._denoisers.get((n_groups, n_views))
        if known is None or known[0] is not self.text or known[1].unet is not self.unet:
            own = Denoiser(self.unet, self.text.repeat(n_groups), n_views, captured=self._guided_call)
            known = self._denoisers[n_groups, n_views] = self.text, own
        return known[1]

    @torch.no_grad()
    def decode(self, target: Tensor) -> Tensor:
        """A target as images [B*V, 3, Hp, Wp] in [0, 1]; needs the VAE's decoder."""
        return (self.vae.decode(target) / 2 + 0.5).clamp(0, 1)

    def encode(self, rgb: Tensor, stream: Stream) -> Tensor:
        """Images in [0, 1] to scaled latents [B*V, C, h, w]; differentiable in the posterior's mean and deviation."""
        return self._encode(rgb, self._noise(rgb, stream))

    def _encode(self, rgb: Tensor, noise: Tensor) -> Tensor:
        return encoded(self.vae, rgb, noise if self.sample_posterior else None)

    def _noise(self, rgb: Tensor, stream: Stream) -> Tensor:
        """Standard normal latents of the images, [B*V, C, h, w], float32."""
        side = self.vae.config.image_size // self.vae.config.downsampling
        return stream.normal(len(rgb), self.vae.config.latent_channels, side, side, device=rgb.device)


def encoded(vae: Codec, rgb: Tensor, noise: Tensor | None) -> Tensor:
    """Latents of images in [0, 1] of any size: a sample of their posterior, without noise its mean."""
    size = vae.config.image_size
    if rgb.shape[-2:] != (size, size):
        rgb = torch.nn.functional.interpolate(rgb, (size, size), mode="bilinear", align_corners=False)
    return vae.encode(rgb * 2 - 1, noise if noise is None else noise.to(rgb.dtype))


class Wishes(NamedTuple):
    """How a model's predictions become the latents that it would rather see."""

    schedule: NoiseSchedule
    config: GuidanceConfig
    n_views: int

    def target(
        self, z: Tensor, z_t: Tensor, out: Tensor, noise: Tensor, at: Tensor, limit: Tensor | None = None,
        away_weights: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Those latents, [n, C, h, w], n = B*V, from what the model says of z_t without and with the prompt and, [K*n,
        ...], with what to be led away from: `out` [G*n, C, h, w]. at: [1] or [n]; limit [1]; away_weights [K, n]."""
        config, n = self.config, len(z)
        uncond, cond = out[:n], out[n : 2 * n]
        if away_weights is not None:
            cond = led_away(cond, uncond, out[2 * n :], away_weights)
        return sds_target(
            z, z_t, cond, uncond, noise.to(z.dtype), self.schedule.alphas_cumprod[at], config.scale_from_uncond,
            self.schedule.prediction, config.rescale, config.loss, self.n_views, config.weighting, limit,
        ).target  # fmt: skip


def _with_gradient(
    unet: UNet, vae: Codec, wishes: Wishes, n_prompts: int, rgb: Tensor, posterior: Tensor | None,
    noise: Tensor, at: Tensor, limit: Tensor | None, away_weights: Tensor | None, camera: Tensor | None, *told: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, target and the loss' gradient on rgb: `ScoreDistillation` as a function of nothing but its arguments."""
    with torch.enable_grad():
        rgb = rgb.detach().requires_grad_()
        z = encoded(vae, rgb, posterior)
        z_t = wishes.schedule.add_noise(z.detach(), noise.to(z.dtype), at)
        out = ask(unet, z_t, at, camera, wishes.n_views, n_prompts, *told)
        target = wishes.target(z, z_t, out, noise, at, limit, away_weights)
        loss = distance(z, target)
        (d_rgb,) = torch.autograd.grad(loss, rgb)
    return loss.detach(), target, d_rgb


def with_known_gradient(loss: Tensor, rgb: Tensor, d_rgb: Tensor) -> Tensor:
    """The value of `loss`, with a graph to rgb whose gradient is d_rgb."""
    return loss + ((rgb - rgb.detach()) * d_rgb).sum()


class SDS:
    """Guidance by score distillation with a multi-view model, from random cameras.

    With `every` = k the model is asked every k-th step; the steps between pull the same views towards the same answer,
    compared as latents or as pixels (`match`). k = 1 is the paper's recipe.

    Args: n_groups: the number of groups of views at a step. sides: text of the prompt with each of prompts.VIEW_WORDS,
        B = 4, where each view is told its side in words; None: they share the one prompt of `score`.
    Source: Poole et al. 2022, "DreamFusion", section 3.2 (view-dependent prompts).
    """

    def __init__(
        self, score: ScoreDistillation, cameras: CameraSampling, n_groups: Callable[[int], int] = lambda _: 1,
        every: int = 1, match: Literal["latents", "pixels"] = "latents", sides: TextCond | None = None,
    ):  # fmt: skip
        self.distillation, self.cameras, self.n_groups, self.every, self.match = score, cameras, n_groups, every, match
        self.sides = sides
        self._target: Tensor | None = None  # of the last answer; held only while it is to be used again
        self._usable: reads.Later | None = None  # whether all of that is finite

    def views(self, step: int, stream: Stream) -> Cameras:
        """Random cameras, as many groups as the step has."""
        return sample_cameras(self.cameras, stream, self.n_groups(step))

    def score(
        self, rgb: Tensor, views: Cameras, step: int, stream: Stream, timing: Timing = no_timing
    ) -> tuple[Tensor, int]:
        """See `Guidance`; asks the model, or goes on from its last answer. One with numbers that are not finite spoils
        one step, not all that it was for: the next one asks again."""
        if step % self.every == 0 or (self._usable is not None and not all(self._usable.get())):
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
        self._hold(target if self.every > 1 else None)
        return loss, out.t

    def _hold(self, target: Tensor | None) -> None:
        self._target = target
        self._usable = None if target is None else reads.Later(target.isfinite().all()[None])

    def _answer(self, rgb: Tensor, views: Cameras, step: int, stream: Stream, timing: Timing) -> SDSLoss:
        return self.distillation(rgb, views.c2w, self.cameras.n_views, step, stream, timing, *self._told(views))

    def _told(self, views: Cameras) -> tuple[TextCond | None, bool, Tensor | None]:
        """What a question to the model ends with: the text, whether it's for a target alone, and Perp-Neg's weights."""
        text, weights = None, None
        if self.sides is not None:
            config = self.distillation.config
            text, weights = tell(self.sides, views.c2w, config.perp_neg, config.view_words_deg)
        return text, self.match == "pixels", weights

    def after_step(self, step: int, stream: Stream) -> None:
        """The model stays as it is."""

    def state(self) -> dict[str, Tensor]:
        """The answer in use, for steps that go on from it."""
        return {} if self._target is None else {"target": self._target}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the answer in use."""
        target = tensors.get("target")
        self._hold(None if target is None else target.to(self.distillation.schedule.alphas_cumprod.device))


class SingleViewSDS(SDS):
    """The same from the model's 2D mode, which knows no cameras: each view by itself."""

    def _answer(self, rgb: Tensor, views: Cameras, step: int, stream: Stream, timing: Timing) -> SDSLoss:
        return self.distillation(rgb, None, 1, step, stream, timing, *self._told(views))


def _resized(rgb: Tensor, like: Tensor) -> Tensor:
    """The images at the size of others."""
    if rgb.shape[-2:] == like.shape[-2:]:
        return rgb
    return torch.nn.functional.interpolate(rgb, like.shape[-2:], mode="bilinear", align_corners=False)
