"""Guidance by views that the model redraws: the sharp end of a run that distillation has left soft.

Every few steps one group of views from random cameras is noised, less and less over the rest of the run, and denoised
with its cameras; the steps between fit the representation to the last such groups as to photographs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, normalize_camera, sample_cameras
from mvdream_fast.camera_sampling import CameraSampling
from mvdream_fast.core import reads
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.pinned import to_device
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import Denoiser, TextCond, guided_call
from mvdream_fast.diffusion.sampler import ModelFn, translate
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.guidance.base import Guidance, Timing, n_fitted, no_timing, opacity_loss
from mvdream_fast.guidance.config import RepaintConfig
from mvdream_fast.guidance.prompts import WITHIN_DEG, tell
from mvdream_fast.guidance.reconstruction import squared_error
from mvdream_fast.models.deepfloyd import UNet
from mvdream_fast.models.pixels import Codec

STATE = "repainted."  # before the names of its own tensors in a state


class Painter:
    """Redraws views as what the prompt says, keeping what the noise leaves of them.

    Args: text: of the prompt (B = 1), or of the prompt with each of prompts.VIEW_WORDS (B = 4), so that each view is
        told its side.
        single: asks the model in 2D mode: each view by itself, without its camera.
        graphs: False makes no CUDA graphs.
        within_deg: of the front and of the back, where a view is told so.
    Raises: ArgumentError for a number of steps that leaves the schedule.
    """

    def __init__(
        self, unet: UNet, vae: Codec, schedule: NoiseSchedule, text: TextCond, config: RepaintConfig,
        single: bool = False, graphs: bool = True, within_deg: float = WITHIN_DEG,
    ):  # fmt: skip
        self.unet, self.vae, self.schedule, self.text, self.config = unet, vae, schedule, text, config
        self.single, self.within_deg = single, within_deg
        self._guided_call = guided_call(graphs)
        try:
            schedule.timesteps(config.repaint_steps)
        except ArgumentError as error:
            raise ArgumentError(f"repaint_steps: {error}") from error

    @torch.no_grad()
    def __call__(self, rgb: Tensor, cameras: Cameras, strength: float, stream: Stream) -> tuple[Tensor, int]:
        """One group of views [V, 3, Hp, Wp] in [0, 1] -> the same redrawn, of the model's size, and the timestep that
        they were noised to; with strength 0 they only pass through the autoencoder."""
        size, config = self.vae.config.image_size, self.config
        images = torch.nn.functional.interpolate(rgb, (size, size), mode="bilinear", align_corners=False)
        latents = self.vae.encode(images * 2 - 1)
        noise = stream.normal(*latents.shape, device=latents.device).to(latents)
        latents, t = translate(
            self._denoise(cameras), latents, noise, self.schedule, config.repaint_steps, config.repaint_scale, strength
        )
        return (self.vae.decode(latents) / 2 + 0.5).clamp(0, 1), t

    def _denoise(self, cameras: Cameras) -> ModelFn:
        guided, text = self.config.repaint_scale != 1, self.text
        if len(text.cond) > 1:
            text, _ = tell(text, cameras.c2w, within_deg=self.within_deg)
        elif self.single:
            text = text.repeat(len(cameras))
        if self.single:
            return Denoiser(self.unet, text, 1, guided, self._guided_call).for_sampler()
        camera = to_device(normalize_camera(cameras.c2w), text.cond.device)
        return Denoiser(self.unet, text, len(cameras), guided, self._guided_call).for_sampler(camera)


@dataclass(frozen=True)
class Group:
    """Redrawn views [V, 3, Hp, Wp] in [0, 1] and where they were seen from."""

    images: Tensor
    cameras: Cameras


class Repaint:
    """Another guidance until the step `first`; from there on, redrawn views. One group of them a step.

    A group is redrawn every `repaint_every` steps, and at every step until there are `repaint_groups`.

    Args: paint: a Painter. n_steps: of the whole run.
    """

    def __init__(
        self, before: Guidance, paint: Callable[[Tensor, Cameras, float, Stream], tuple[Tensor, int]],
        cameras: CameraSampling, config: RepaintConfig, first: int, n_steps: int,
    ):  # fmt: skip
        self.before, self.paint, self.cameras, self.config = before, paint, cameras, config
        self.first, self.n_steps = first, n_steps
        self.groups: list[Group] = []  # the oldest first
        self._known: Group | None = None  # what the step's views are of; None where they are to be redrawn
        self._fresh: Group | None = None  # redrawn in this step, kept once it is over

    def strength(self, step: int) -> float:
        """How far the views of a step are noised."""
        return self.config.strength(step, self.first, self.n_steps)

    def views(self, step: int, stream: Stream) -> Cameras:
        """The other guidance's; then one group of random cameras, or those of a group that has been redrawn."""
        if step < self.first:
            return self.before.views(step, stream)
        self._known = self._fresh = None
        if len(self.groups) < self.config.repaint_groups or (step - self.first) % self.config.repaint_every == 0:
            return sample_cameras(self.cameras, stream)
        self._known = self.groups[int(stream.integers(0, len(self.groups)))]
        return self._known.cameras

    def score(
        self, rgb: Tensor, views: Cameras, step: int, stream: Stream, timing: Timing = no_timing
    ) -> tuple[Tensor, int]:
        """See `Guidance`; the other's loss, then the squared error to the redrawn views."""
        if step < self.first:
            return self.before.score(rgb, views, step, stream, timing)
        group, t = self._known, 0
        if group is None:
            images, t = self.paint(rgb.detach(), views, self.strength(step), stream)
            group = self._fresh = Group(images, views)
            timing("unet")
        return squared_error(rgb, group.images), t

    def opacity_loss(self, opacity: Tensor, step: int) -> Tensor:
        """The other guidance's; of redrawn views only colours are known."""
        return opacity_loss(self.before, opacity, step) if step < self.first else opacity.new_zeros(())

    def n_fitted(self, n_views: int, step: int) -> int:
        """The other guidance's; then all."""
        return n_fitted(self.before, n_views, step) if step < self.first else n_views

    def after_step(self, step: int, stream: Stream) -> None:
        """The other guidance's; then keeps what was redrawn, unless it has numbers that are not finite."""
        if step < self.first:
            self.before.after_step(step, stream)
        elif self._fresh is not None and all(reads.read(self._fresh.images.isfinite().all()[None])):
            self.groups = [*self.groups, self._fresh][-self.config.repaint_groups :]

    def state(self) -> dict[str, Tensor]:
        """The other guidance's, and the redrawn groups: images [G, V, 3, Hp, Wp], c2w and fovy."""
        if not self.groups:
            return self.before.state()
        own = {
            "images": torch.stack(
                [group.images.cpu() for group in self.groups]
            ),  # on the CPU: as a file gives them back
            "c2w": torch.stack([group.cameras.c2w for group in self.groups]),
            "fovy": torch.stack([group.cameras.fovy for group in self.groups]),
        }
        return self.before.state() | {STATE + name: value for name, value in own.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over both."""
        own = [tensors[STATE + name] for name in ("images", "c2w", "fovy")] if STATE + "images" in tensors else []
        self.groups = [Group(images.clone(), Cameras(c2w, fovy)) for images, c2w, fovy in zip(*own)]
        self.before.restore({name: value for name, value in tensors.items() if not name.startswith(STATE)})
