"""Score distillation: what the diffusion model wants of four rendered views, as a scalar to differentiate.

Knows latents, noise and the UNet; knows no volume: images come in as a tensor that carries its own graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mvdream_fast.camera import normalize_camera
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.distill.recipes import Ramp
from mvdream_fast.ops.sds_target import sds_target

Lap = Callable[[str], None]  # told the name of the part that has just ended, for the report's timing split


def no_lap(_: str) -> None:
    """For callers who don't measure."""


def ramp(schedule: Ramp, step: int) -> float:
    """The value of a linear ramp at `step`, constant outside it."""
    start, first, last, end = schedule
    if end <= start:
        return last if step >= end else first
    return first + (last - first) * min(max((step - start) / (end - start), 0.0), 1.0)


@dataclass(frozen=True)
class GuidanceConfig:
    """How the denoiser is asked. Defaults are MVDream's (`paper`)."""

    loss: Literal["x0", "sds"] = "x0"
    guidance_scale: float = 50.0
    rescale: float = 0.5
    min_step: Ramp = (0, 0.98, 0.02, 8000)  # fractions of the schedule's timesteps
    max_step: Ramp = (0, 0.98, 0.50, 8000)
    sample_posterior: bool = True


@dataclass(frozen=True)
class GuidanceLoss:
    """`loss` is differentiable; `t` is the timestep it was taken at, `grad_norm` the norm of d loss / d latents.

    `target` [B*V, C, h, w]: the latents that the model would rather see; constant.
    """

    loss: Tensor
    t: int
    grad_norm: Tensor
    target: Tensor


def distance(z: Tensor, target: Tensor) -> Tensor:
    """sum (z - target)^2 / (2 B V): [B*V, ...] twice -> a scalar."""
    return (z - target).square().sum() / (2 * len(z))


class Guidance:
    """Scores rendered views of one prompt with a frozen multi-view model.

    The text tower is not needed any more: `cond` and `uncond` are its outputs. The UNet runs without a graph, the VAE
    encoder with one.
    """

    def __init__(self, unet, vae, schedule: NoiseSchedule, cond: Tensor, uncond: Tensor, config: GuidanceConfig):
        """cond, uncond: [1, L, Dt], text of the prompt and of the negative prompt, in the UNet's dtype."""
        self.unet, self.vae, self.schedule, self.config = unet, vae, schedule, config
        self.text = torch.cat([cond, uncond])  # [2, L, Dt]
        self._contexts: dict[int, object] = {}

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
        lap: Lap = no_lap,
        text: Tensor | None = None,
    ) -> GuidanceLoss:
        """L = sum (z - sg(target))^2 / (2 B V), whose gradient on the latents is that of FACTS' formulas.

        Args:
            rgb: [B*V, 3, Hp, Wp] in [0, 1], views fastest; resized to the model's image size (bilinear).
            c2w: [B*V, 4, 4] poses, normalised here; None asks the model in 2D mode (then n_views is 1).
            lap: called after the encoder ("vae") and after the UNet ("unet").
            text: [2*B, L, Dt] of each group's own prompt, then negative prompt; None takes the one prompt for all.

        Returns:
            GuidanceLoss.

        Source: Shi et al. 2023, "MVDream", section 3.3; Poole et al. 2022, "DreamFusion", equation 3.
        """
        t = self.timestep(step, stream)
        z = self.encode(rgb, stream)
        lap("vae")
        noise = stream.normal(*z.shape, device=z.device).to(z.dtype)
        with torch.no_grad():
            z_t = self.schedule.add_noise(z.detach(), noise, t)
            camera = None if c2w is None else normalize_camera(c2w)
            cond, uncond = self.predict(z_t, t, camera, n_views, text)
        result = sds_target(
            z, z_t, cond, uncond, noise, self.schedule.alphas_cumprod[t].reshape(1), self.config.guidance_scale,
            self.schedule.prediction, self.config.rescale, self.config.loss, n_views,
        )  # fmt: skip
        lap("unet")
        # A zero-valued second term is not needed: d/dz of this is exactly `result.gradient`.
        return GuidanceLoss(distance(z, result.target), t, result.gradient.norm(), result.target)

    def match_latents(self, rgb: Tensor, target: Tensor, stream: Stream) -> Tensor:
        """The loss of `rgb` against an earlier answer's target, without asking the model again."""
        return distance(self.encode(rgb, stream), target)

    @torch.no_grad()
    def picture(self, target: Tensor) -> Tensor:
        """A target as images [B*V, 3, Hp, Wp] in [0, 1]; needs the VAE's decoder."""
        return (self.vae.decode(target) / 2 + 0.5).clamp(0, 1)

    def encode(self, rgb: Tensor, stream: Stream) -> Tensor:
        """Images in [0, 1] to scaled latents [B*V, C, h, w]; differentiable in the posterior's mean and deviation."""
        size = self.vae.config.image_size
        if rgb.shape[-2:] != (size, size):
            rgb = torch.nn.functional.interpolate(rgb, (size, size), mode="bilinear", align_corners=False)
        side = size // self.vae.config.downsampling
        noise = stream.normal(len(rgb), self.vae.config.latent_channels, side, side, device=rgb.device)
        return self.vae.encode(rgb * 2 - 1, noise.to(rgb.dtype) if self.config.sample_posterior else None)

    def predict(
        self, z_t: Tensor, t: int, camera: Tensor | None, n_views: int, text: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The model's raw outputs with the prompt and with the negative one, from one call; in the dtype of z_t."""
        n_groups, dtype = len(z_t) // n_views, self.text.dtype
        if text is None and n_groups not in self._contexts:
            context = self.text.repeat_interleave(n_groups, dim=0)
            self._contexts[n_groups] = self.unet.prepare_context(context)
        context = self._contexts[n_groups] if text is None else text
        times = torch.full((len(z_t),), t, device=z_t.device)
        camera = camera if camera is None else camera.to(dtype)
        out = self.unet(z_t.to(dtype), times, context, camera, n_views, n_prompts=2)
        return out.to(z_t.dtype).chunk(2)
