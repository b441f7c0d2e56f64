"""The noise schedule: how much of an image is left at each timestep, and what the UNet's output means there.

The steps that a sampler visits are chosen here; the sampler itself isn't. Importing this module imports no torch, so
that a command can refuse a number of steps at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.models.config import ScheduleConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Convention = Literal["ldm", "diffusers"]
Spacing = Literal["leading", "linspace", "trailing"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """z_t = alphas[t] x0 + sigmas[t] noise, with alphas² = alphas_cumprod and alphas² + sigmas² = 1.

    `t` is an int or an integer tensor, scalar or one for each image of the batch. Every method computes in float32 at
    least and returns the dtype of its first argument.
    """

    alphas_cumprod: Tensor  # [T] float32
    alphas: Tensor  # [T] float32
    sigmas: Tensor  # [T] float32
    config: ScheduleConfig

    @property
    def prediction(self) -> Literal["eps", "v"]:
        """What the model predicts: eps or v."""
        return self.config.prediction

    @staticmethod
    def from_config(config: ScheduleConfig, device: torch.device | str = "cpu") -> NoiseSchedule:
        """The tables of a configuration, computed in float64 and kept in float32.

        Source: LDM's make_beta_schedule("linear") is diffusers' "scaled_linear".
        """
        import torch

        alphas_cumprod = torch.cumprod(1 - torch.tensor(config.betas(), dtype=torch.float64), dim=0)
        if config.rescale_betas_zero_snr:
            # Shifted so that nothing is left at the last timestep, scaled so that the first keeps its value.
            # Source: Lin et al., "Common diffusion noise schedules and sample steps are flawed", 2023, algorithm 1.
            root = alphas_cumprod.sqrt()
            alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        tables = (alphas_cumprod, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())
        alphas_cumprod, alphas, sigmas = (table.float().to(device) for table in tables)
        return NoiseSchedule(alphas_cumprod, alphas, sigmas, config)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule on another device."""
        tables = ("alphas_cumprod", "alphas", "sigmas")
        return replace(self, **{name: getattr(self, name).to(device) for name in tables})

    def timesteps(self, n_steps: int, convention: Convention = "ldm") -> list[int]:
        """The timesteps that DDIM visits, highest first; see `ddim_timesteps`."""
        config = self.config
        return ddim_timesteps(n_steps, convention, config.n_timesteps, config.timestep_spacing, config.steps_offset)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Returns: z_t, the shape of x0."""
        alpha, sigma = self._at(t, x0)
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def to_x0(self, z_t: Tensor, out: Tensor, t: Tensor | int) -> Tensor:
        """The clean latents that the model's output `out` at z_t stands for; not clipped."""
        alpha, sigma = self._at(t, z_t)
        if self.prediction == "v":
            return (alpha * z_t - sigma * out).to(z_t.dtype)
        return ((z_t - sigma * out) / alpha).to(z_t.dtype)

    def to_noise(self, z_t: Tensor, out: Tensor, t: Tensor | int) -> Tensor:
        """The noise that the model's output `out` at z_t stands for."""
        if self.prediction == "eps":
            return out.to(z_t.dtype)
        alpha, sigma = self._at(t, z_t)
        return (alpha * out + sigma * z_t).to(z_t.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What the model should output at add_noise(x0, noise, t).

        Source: v = alpha noise - sigma x0, Salimans & Ho, "Progressive distillation", 2022.
        """
        if self.prediction == "eps":
            return noise.to(x0.dtype)
        alpha, sigma = self._at(t, x0)
        return (alpha * noise - sigma * x0).to(x0.dtype)

    def _at(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at t, [n or 1, 1, 1, ...]: never 0-dimensional, which would compute in half precision."""
        import torch

        t = torch.as_tensor(t, device=like.device)
        if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(like))):
            raise ValueError(
                f"schedule: t must be one number or one for each of the {len(like)} images, got {list(t.shape)}; "
                "repeat it for the views of a scene"
            )
        shape = (-1, *(1 for _ in like.shape[1:]))
        alpha, sigma = (table.to(like.device)[t.reshape(-1)].reshape(shape) for table in (self.alphas, self.sigmas))
        return alpha, sigma


def ddim_timesteps(
    n_steps: int,
    convention: Convention = "ldm",
    n_timesteps: int = 1000,
    spacing: Spacing = "leading",
    steps_offset: int = 1,
) -> list[int]:
    """The timesteps that DDIM visits, highest first.

    With leading spacing the last is `steps_offset`. "diffusers" visits n_steps of them. "ldm" counts up in steps of
    c = n_timesteps // n_steps to the end of the range, so it makes another number of steps where n_steps doesn't
    divide n_timesteps: 30 gives 31. Both agree where it does. The other spacings are diffusers' in either convention,
    and know no offset.

    Raises: ArgumentError, naming the nearest number of steps that works, if a timestep would be out of range.
    Source: LDM's make_ddim_timesteps; diffusers' DDIMScheduler.set_timesteps.
    """
    if convention not in ("ldm", "diffusers"):
        raise ArgumentError(
            f"ddim_timesteps: convention must be ldm or diffusers, got {convention!r}; ldm is upstream's"
        )
    rest = (convention, n_timesteps, spacing, steps_offset)
    if not _works(n_steps, *rest):
        raise ArgumentError(
            f"ddim_timesteps: {n_steps} steps ask for a timestep outside 0..{n_timesteps - 1}; "
            f"the nearest number that works is {nearest_n_steps(n_steps, *rest)}"
        )
    return _ascending(n_steps, *rest)[::-1]


def skipped(n_steps: int, strength: float) -> int:
    """How many of the first of n_steps image to image leaves out: any strength but 0 takes one step at least."""
    return min(round((1 - strength) * n_steps), n_steps - 1)


def nearest_n_steps(
    n_steps: int,
    convention: Convention = "ldm",
    n_timesteps: int = 1000,
    spacing: Spacing = "leading",
    steps_offset: int = 1,
) -> int:
    """The number of steps nearest to `n_steps` that `ddim_timesteps` accepts; of two equally near, the larger."""
    rest = (convention, n_timesteps, spacing, steps_offset)
    return min((s for s in range(1, n_timesteps + 1) if _works(s, *rest)), key=lambda s: (abs(s - n_steps), -s))


def _works(n_steps: int, convention: Convention, n_timesteps: int, spacing: Spacing, offset: int) -> bool:
    inside = 1 <= n_steps <= n_timesteps
    return inside and _ascending(n_steps, convention, n_timesteps, spacing, offset)[-1] < n_timesteps


def _ascending(n_steps: int, convention: Convention, n_timesteps: int, spacing: Spacing, offset: int) -> list[int]:
    if spacing == "leading":
        stride = n_timesteps // n_steps
        end = n_timesteps if convention == "ldm" else n_steps * stride
        return list(range(offset, offset + end, stride))
    import numpy as np  # its rounding of the ends and halves is part of diffusers' spacings

    if spacing == "linspace":
        spaced = np.linspace(0, n_timesteps - 1, n_steps)
    else:
        spaced = np.arange(n_timesteps, 0, -n_timesteps / n_steps)[::-1].round() - 1
    return spaced.round().astype(int).tolist()
