"""What a pipeline is asked with, as the values that it works with; anything else is one sentence (ArgumentError)."""

import secrets

import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, get_camera, normalize_camera
from mvdream_fast.core.arguments import whole
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.models.config import ModelConfig


def poses_of(camera: Cameras | Tensor | None, n_views: int, angles_deg: tuple[float, float, float]) -> Tensor:
    """What the UNet is told of the cameras, [V, 16] on the CPU."""
    try:
        if camera is None:
            elevation_deg, azimuth_start_deg, azimuth_span_deg = angles_deg
            return get_camera(n_views, elevation_deg, azimuth_start_deg, azimuth_span_deg)
        poses = normalize_camera(camera.c2w if isinstance(camera, Cameras) else camera).float().cpu()
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    if not len(poses):
        raise ArgumentError(
            "pipeline: camera must hold at least 1 pose, got none; leave it out for 4 around the object"
        )
    if not poses.isfinite().all():
        raise ArgumentError("pipeline: camera must hold finite numbers, got one that is not; check the poses")
    return poses


def n_steps_and_seed(n_steps: int, seed: int | None) -> tuple[int, int]:
    """Both as Python's numbers; a seed of None is drawn."""
    n_steps = whole("pipeline", "n_steps", n_steps, "50 is the default")
    if seed is None:
        return n_steps, secrets.randbelow(2**31)
    return n_steps, whole("pipeline", "seed", seed, "0 is the default", 0)


def check_call(mode: str, config: ModelConfig, camera: object, generator: object, callback: object) -> None:
    """Refuses a mode that the model doesn't have, and arguments of another kind."""
    if mode not in ("3d", "2d"):
        raise ArgumentError(f"pipeline: mode must be 3d or 2d, got {mode!r}; 3d gives views of one object")
    if mode not in config.modes:
        raise ArgumentError(f"pipeline: mode must be 2d, got 3d; {config.name} draws single images, without cameras")
    if mode == "2d" and camera is not None:
        raise ArgumentError("pipeline: camera must be None in 2d mode, got poses; leave them out or take 3d")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentError(
            f"pipeline: generator must be one torch.Generator, got {type(generator).__name__}; or give a seed"
        )
    if callback is not None and not callable(callback):
        raise ArgumentError(
            f"pipeline: callback must be a function (done, total, latents), got {type(callback).__name__}"
        )
