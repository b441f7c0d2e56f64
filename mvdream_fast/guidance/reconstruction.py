"""Guidance by known images: a few-shot NeRF, and known views beside another guidance."""

import torch
from torch import Tensor

from mvdream_fast.camera import Cameras
from mvdream_fast.core.ramp import Ramp, ramp
from mvdream_fast.core.rng import Stream
from mvdream_fast.guidance.base import Guidance, Stateless, Timing, no_timing


class Reconstruction(Stateless):
    """Images [V, 3, Hp, Wp] in [0, 1], seen from their own cameras at every step."""

    def __init__(self, images: Tensor, cameras: Cameras):
        self.images, self.cameras = images, cameras

    def views(self, step: int, stream: Stream) -> Cameras:
        """The images' own cameras."""
        return self.cameras

    def score(
        self, rgb: Tensor, views: Cameras, step: int, stream: Stream, timing: Timing = no_timing
    ) -> tuple[Tensor, int]:
        """See `Guidance`; the squared error, no timestep."""
        return squared_error(rgb, self.images), 0


class Anchored:
    """Another guidance, and beside its views one group of known ones a step.

    Args:
        images [G, V, 3, Hp, Wp] in [0, 1], cameras of each group.
        weight: of the known views' squared error, summed over a view's pixels, as `Reconstruction` has it; a ramp over
            the steps.
    """

    def __init__(self, free: Guidance, images: Tensor, cameras: list[Cameras], weight: Ramp):
        self.free, self.images, self.cameras, self.weight = free, images, cameras, weight
        self._group = 0

    def views(self, step: int, stream: Stream) -> Cameras:
        """The other guidance's, then one group's."""
        free = self.free.views(step, stream)
        self._group = int(stream.integers(0, len(self.images)))
        known = self.cameras[self._group]
        return Cameras(torch.cat([free.c2w, known.c2w.to(free.c2w)]), torch.cat([free.fovy, known.fovy.to(free.fovy)]))

    def score(
        self, rgb: Tensor, views: Cameras, step: int, stream: Stream, timing: Timing = no_timing
    ) -> tuple[Tensor, int]:
        """See `Guidance`; the other's loss and the known views' squared error."""
        n = len(rgb) - self.images.shape[1]
        loss, t = self.free.score(rgb[:n], Cameras(views.c2w[:n], views.fovy[:n]), step, stream, timing)
        return loss + ramp(self.weight, step) * squared_error(rgb[n:], self.images[self._group]), t

    def after_step(self, step: int, stream: Stream) -> None:
        """The other guidance's."""
        self.free.after_step(step, stream)

    def state(self) -> dict[str, Tensor]:
        """The other guidance's."""
        return self.free.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The other guidance's."""
        self.free.restore(tensors)


def squared_error(rgb: Tensor, images: Tensor) -> Tensor:
    """Summed over a view's pixels, averaged over the views; the images are first brought to the size of rgb."""
    target = torch.nn.functional.interpolate(images.to(rgb), rgb.shape[-2:], mode="area")
    return (rgb - target).square().sum() / len(rgb)
