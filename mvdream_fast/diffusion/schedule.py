"""The noise schedule: how much of an image is left at each timestep, and what the UNet's output means there.

The steps that a sampler visits are chosen here; the sampler itself isn't. Importing this module imports no torch, so
that a command can refuse a number of steps at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.models.config import ScheduleConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Convention = Literal["ldm", "diffusers"]


@dataclass(frozen=True)
class NoiseSchedule:
    """z_t = alphas[t] x0 + sigmas[t] noise, with alphas² = alphas_cumprod and alphas² + sigmas² = 1.

    `t` is an int or an integer tensor, scalar or one for each image of the batch. Every method computes in float32 at
    least and returns the dtype of its first argument.
    """

    alphas_cumprod: Tensor  # [T] float32
    alphas: Tensor  # [T] float32
    sigmas: Tensor  # [T] float32
    prediction: Literal["eps", "v"] = "eps"

    @staticmethod
    def from_config(config: ScheduleConfig, device: torch.device | str = "cpu") -> NoiseSchedule:
        """Betas are the squares of evenly spaced numbers; computed in float64, kept in float32.

        Source: LDM's make_beta_schedule("linear"); diffusers calls it "scaled_linear".
        """
        import torch

        ends = (config.linear_start**0.5, config.linear_end**0.5)
        betas = torch.linspace(*ends, config.n_timesteps, dtype=torch.float64) ** 2
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        tables = (alphas_cumprod, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())
        return NoiseSchedule(*(table.float().to(device) for table in tables), prediction=config.prediction)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        tables = (self.alphas_cumprod, self.alphas, self.sigmas)
        return NoiseSchedule(*(table.to(device) for table in tables), prediction=self.prediction)

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
        return tuple(table.to(like.device)[t.reshape(-1)].reshape(shape) for table in (self.alphas, self.sigmas))


def ddim_timesteps(n_steps: int, convention: Convention = "ldm", n_timesteps: int = 1000) -> list[int]:
    """The timesteps that DDIM visits, highest first; the last is always 1.

    "diffusers" (its "leading" spacing with an offset of 1) visits n_steps of them. "ldm" counts up in steps of
    c = n_timesteps // n_steps to the end of the range, so it makes another number of steps where n_steps doesn't
    divide n_timesteps: 30 gives 31. Both agree where it does.

    Raises: ArgumentError, naming the nearest number of steps that works, if a timestep would be out of range.
    Source: LDM's make_ddim_timesteps; diffusers' DDIMScheduler.set_timesteps.
    """
    if convention not in ("ldm", "diffusers"):
        raise ArgumentError(
            f"ddim_timesteps: convention must be ldm or diffusers, got {convention!r}; ldm is upstream's"
        )
    if not _works(n_steps, convention, n_timesteps):
        raise ArgumentError(
            f"ddim_timesteps: {n_steps} steps ask for a timestep outside 0..{n_timesteps - 1}; "
            f"the nearest number that works is {nearest_n_steps(n_steps, convention, n_timesteps)}"
        )
    return list(reversed(_ascending(n_steps, convention, n_timesteps)))


def nearest_n_steps(n_steps: int, convention: Convention = "ldm", n_timesteps: int = 1000) -> int:
    """The number of steps nearest to `n_steps` that `ddim_timesteps` accepts; of two equally near, the larger."""
    valid = (s for s in range(1, n_timesteps + 1) if _works(s, convention, n_timesteps))
    return min(valid, key=lambda s: (abs(s - n_steps), -s))


def _works(n_steps: int, convention: Convention, n_timesteps: int) -> bool:
    return 1 <= n_steps <= n_timesteps and _ascending(n_steps, convention, n_timesteps)[-1] < n_timesteps


def _ascending(n_steps: int, convention: Convention, n_timesteps: int) -> range:
    stride = n_timesteps // n_steps
    end = n_timesteps if convention == "ldm" else n_steps * stride
    return range(1, end + 1, stride)
