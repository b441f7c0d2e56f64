"""From noise to latents: DDIM as a plain function, and the loop that lets a diffusers scheduler do it instead.

A `model_fn(latents, t)` hides the UNet, its text and its cameras. With guidance it gets [uncond; cond] in one batch,
the unconditional half first, as `Denoiser` answers; with a guidance scale of 1 the conditional half alone.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mvdream_fast.core import reads
from mvdream_fast.core.arguments import finite, is_a
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.schema import is_tuple
from mvdream_fast.diffusion.denoiser import ModelFn
from mvdream_fast.diffusion.schedule import Convention, NoiseSchedule, skipped
from mvdream_fast.models.config import ScheduleConfig

_PREDICTION = {"eps": "epsilon", "v": "v_prediction"}  # diffusers' words
_OPTIONAL = ("trained_betas", "rescale_betas_zero_snr", "timestep_spacing", "steps_offset")  # of ScheduleConfig, too
# What is asked of a scheduler of diffusers; alphas_cumprod, because one without it counts noise in another way.
_PARTS = ("config", "set_timesteps", "scale_model_input", "step", "alphas_cumprod")
Generators = torch.Generator | list[torch.Generator]
Callback = Callable[[int, int, Tensor], None]  # steps done, steps in all, latents [n, C, h, w]


@torch.no_grad()
def ddim_sample(
    model_fn: ModelFn,
    noise: Tensor,
    schedule: NoiseSchedule,
    n_steps: int,
    guidance_scale: float,
    convention: Convention = "ldm",
    callback: Callback | None = None,
    *,
    eta: float = 0.0,
    fresh: Callable[[], Tensor] | None = None,
    skip: int = 0,
) -> Tensor:
    """Denoises `noise` [n, C, h, w] with DDIM; nothing is clipped, but by the
    threshold of a schedule that has one.

    `skip` leaves out as many of the first timesteps, for image to image: `noise` is then the latents of an image as
    `schedule.add_noise` makes them at the timestep that comes next.

    "ldm" visits another number of timesteps than `n_steps` where it doesn't divide 1000 (30 gives 31). `eta` > 0, up to
    1, adds what `fresh` draws, noise [n, C, h, w], at every step, the last included, as upstream does (1 is DDPM's
    variance).

    Returns: latents, shape and dtype of `noise`.
    Raises: ArgumentError for a number of steps that leaves the schedule, or an eta beyond 0 and 1; ValueError for
        eta > 0 without `fresh`.
    Source: Song et al., "Denoising diffusion implicit models", eq. 12 and 16.
    """
    eta = check_eta("ddim_sample", eta)
    if eta and fresh is None:
        raise ValueError(f"ddim_sample: fresh must be given for eta > 0, got eta {eta}; pass what draws noise")
    timesteps = schedule.timesteps(n_steps, convention)
    abar = reads.read(schedule.alphas_cumprod.double())
    following = _following(schedule, timesteps, n_steps, convention)
    last = 1.0 if schedule.config.set_alpha_to_one else abar[0]
    schedule, latents = schedule.to(noise.device), noise
    times = torch.tensor(timesteps, device=noise.device)  # at once: each number that is sent waits for the device
    for i, t in list(enumerate(timesteps))[skip:]:
        out = guided(model_fn, latents, times[i], guidance_scale)
        abar_prev = abar[following[i]] if following[i] >= 0 else last
        sigma = eta * ((1 - abar_prev) / (1 - abar[t]) * (1 - abar[t] / abar_prev)) ** 0.5
        x0, noise_pred = schedule.to_x0(latents, out, times[i]), schedule.to_noise(latents, out, times[i])
        x0 = _thresholded(x0, schedule.config)
        # Rounded, what is left beside the fresh noise may be below zero at zero terminal SNR.
        latents = abar_prev**0.5 * x0 + max(1 - abar_prev - sigma**2, 0.0) ** 0.5 * noise_pred
        if sigma and fresh is not None:
            latents = latents + sigma * fresh().to(latents)
        if callback:
            callback(i + 1, len(timesteps), latents)
    return latents


def translate(
    model_fn: ModelFn, latents: Tensor, noise: Tensor, schedule: NoiseSchedule, n_steps: int, guidance_scale: float,
    strength: float,
) -> tuple[Tensor, int]:  # fmt: skip
    """Image to image: `latents` [n, C, h, w] noised up to `strength` of DDIM's n_steps, then denoised.

    Any strength but 0 takes one step at least; 0 leaves the latents as they are.

    Returns: latents, and the timestep that they were noised to, 0 for none.
    Source: Meng et al. 2022, "SDEdit".
    """
    if not strength:
        return latents, 0
    timesteps = schedule.timesteps(n_steps)
    skip = skipped(len(timesteps), strength)
    noised = schedule.add_noise(latents, noise, timesteps[skip])
    return ddim_sample(model_fn, noised, schedule, n_steps, guidance_scale, skip=skip), timesteps[skip]


def _thresholded(x0: Tensor, config: ScheduleConfig) -> Tensor:
    """Images [n, C, h, w] scaled into [-1, 1], each so that the share `config.threshold` of its values keeps its order.

    Source: Saharia et al. 2022, "Imagen", section 2.3 (dynamic thresholding).
    """
    if config.threshold is None:
        return x0
    size = torch.quantile(x0.float().abs().flatten(1), config.threshold, dim=1).clamp(1, config.threshold_max)
    size = size.to(x0.dtype)[:, None, None, None]
    return x0.clamp(-size, size) / size


def _following(schedule: NoiseSchedule, timesteps: list[int], n_steps: int, convention: Convention) -> list[int]:
    """The timestep that each step leads to; a negative one is the end. diffusers subtracts one and the same stride."""
    if convention == "ldm" and schedule.config.timestep_spacing == "leading":
        return [*timesteps[1:], -1]
    return [t - schedule.config.n_timesteps // n_steps for t in timesteps]


@torch.no_grad()
def scheduler_sample(
    model_fn: ModelFn,
    noise: Tensor,
    scheduler: Any,
    n_steps: int,
    guidance_scale: float,
    callback: Callback | None = None,
    *,
    generator: Generators | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Denoises `noise` [n, C, h, w] with any diffusers scheduler (a copy: the given one keeps its state).

    The scheduler's own settings count (betas, prediction type, spacing); take them from `diffusers_settings`.
    `generator` feeds the schedulers that add noise: one for all images, or one for each, which may be the same.

    Returns: latents, shape and dtype of `noise`.
    Raises: ArgumentError for an eta that the scheduler doesn't know, or one that goes from images to noise.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(n_steps, device=noise.device)
    extra = _step_options(scheduler, generator, eta)
    latents, timesteps = noise * scheduler.init_noise_sigma, scheduler.timesteps
    if len(timesteps) > 1 and timesteps[0] < timesteps[-1]:
        kind = type(scheduler).__name__
        raise ArgumentError(f"scheduler: it must go from noise to images, got {kind}; take one that isn't inverse")
    for i, t in enumerate(timesteps):
        out = guided(model_fn, scheduler.scale_model_input(latents, t), t, guidance_scale)
        latents = scheduler.step(out, t, latents, **extra).prev_sample.to(noise.dtype)
        if callback:
            callback(i + 1, len(timesteps), latents)
    return latents


def guided(model_fn: ModelFn, latents: Tensor, t: Tensor, guidance_scale: float) -> Tensor:
    """One call of the model with classifier-free guidance: uncond + scale*(cond - uncond), [n, C, h, w].

    A scale of 1 is the conditional output alone, and only that half is computed.
    Source: Ho & Salimans, "Classifier-free diffusion guidance", 2022.
    """
    if guidance_scale == 1:
        return model_fn(latents, t).to(latents.dtype)
    uncond, cond = model_fn(torch.cat([latents, latents]), t).to(latents.dtype).chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def diffusers_settings(config: ScheduleConfig) -> dict[str, Any]:
    """Keyword arguments that make a diffusers scheduler follow the model's noise schedule and prediction type.

    Any scheduler takes them, but for a model with zero terminal SNR or a threshold, which need one that knows
    `rescale_betas_zero_snr` or `thresholding`. Spacing and offset of the timesteps are among them where the model has
    its own. DDIM and DDPM clip, so they need `clip_sample=False` besides, which the others don't know.
    """
    usual = ScheduleConfig()
    own = {name: getattr(config, name) for name in _OPTIONAL if getattr(config, name) != getattr(usual, name)}
    if config.threshold is not None:
        own |= {"thresholding": True, "dynamic_thresholding_ratio": config.threshold}
        own |= {"sample_max_value": config.threshold_max}
    return {
        "num_train_timesteps": config.n_timesteps,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.linear_start,
        "beta_end": config.linear_end,
        "prediction_type": _PREDICTION[config.prediction],
        **{name: list(value) if is_tuple(value) else value for name, value in own.items()},
    }


def check_eta(op: str, eta: float) -> float:
    """The share of DDPM's variance that is noise anew, as a Python number. Raises ArgumentError."""
    return finite(op, "eta", eta, "0 is DDIM, 1 has DDPM's variance", 0, 1)


def check_scheduler(scheduler: Any, schedule: NoiseSchedule, eta: float = 0.0) -> None:
    """Refuses a diffusers scheduler that reads the model's output, or places its noise, in another way than `schedule`.

    Raises: ArgumentError.
    """
    config, table = getattr(scheduler, "config", {}), getattr(scheduler, "alphas_cumprod", None)
    lacking = [name for name in _PARTS if not hasattr(scheduler, name)]
    if lacking or not is_a(config, Mapping) or table is None:
        got = repr(scheduler) if isinstance(scheduler, (str, type)) else type(scheduler).__name__
        wanted = f"a diffusers scheduler{' with ' if lacking else ''}{', '.join(lacking)}"
        raise ArgumentError(
            f"scheduler: it must be {wanted}, got {got}; construct a DPMSolverMultistepScheduler or "
            "EulerDiscreteScheduler of diffusers_settings()"
        )
    wanted, given = _PREDICTION[schedule.prediction], config.get("prediction_type", "epsilon")
    if given != wanted:
        raise ArgumentError(f"scheduler: prediction_type must be {wanted} for this model, got {given}; construct it so")
    clips = ("clip_sample", "thresholding") if schedule.config.threshold is None else ()
    for name in (*clips, "use_flow_sigmas"):
        if config.get(name):
            raise ArgumentError(
                f"scheduler: {name} must be False for this model, got {config[name]}; construct it with {name}=False"
            )
    own = schedule.alphas_cumprod.cpu()
    if table.shape != own.shape or not torch.allclose(table.cpu().float(), own, rtol=1e-3, atol=1e-5):
        raise ArgumentError("scheduler: its betas must be the model's, got others; take them from diffusers_settings()")
    more = [p.name for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty]
    if len(more) != 3:
        raise ArgumentError(
            "scheduler: its step must ask for the model's output, timestep and latents alone, "
            f"got {', '.join(more)} of {type(scheduler).__name__}; take another"
        )
    _step_options(scheduler, None, eta)


def _step_options(scheduler: Any, generator: Generators | None, eta: float) -> dict[str, Any]:
    """What the scheduler's step takes besides. Raises ArgumentError for an eta that it would pass over."""
    known = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in known:
        raise ArgumentError(
            f"scheduler: eta must be 0 for a {type(scheduler).__name__}, which has no such setting, got {eta:g}; "
            "take DDIMScheduler, or leave eta out"
        )
    return {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in known}
