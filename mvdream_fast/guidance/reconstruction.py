"""Guidance by known images: a few-shot NeRF, and known views beside another guidance."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.camera import Cameras
from mvdream_fast.core.border import off_border
from mvdream_fast.core.ramp import Ramp, is_ever_on, ramp
from mvdream_fast.core.rng import Stream
from mvdream_fast.guidance.base import Guidance, Stateless, Timing, n_fitted, no_timing, opacity_loss

Outlines = tuple[Tensor, Cameras]  # silhouettes [V, 1, Hp, Wp] in [0, 1], and where they are seen from
NOTHING: Ramp = (0.0, 0.0, 0.0, 0.0)
CROSS = (((3, 1), (1, 0)), ((1, 3), (0, 1)))  # a pixel's neighbours above and below, and beside it
EDGE = 0.8  # of the largest difference of a pixel and its neighbours, from which on a pixel is wholly of the thing
# The largest difference of a channel from the background's: up to the first it is background, from the second on not.
CLOSE, FAR = 0.05, 0.12


class Reconstruction(Stateless):
    """Images [V, 3, Hp, Wp] in [0, 1], seen from their own cameras at every step.

    Args:
        silhouettes: [V, 1, Hp, Wp] in [0, 1], where they are known; else they are guessed (`shown`).
        between: silhouettes and cameras of others, that only say where there is nothing.
    """

    def __init__(
        self, images: Tensor, cameras: Cameras, silhouette_weight: Ramp = NOTHING, silhouettes: Tensor | None = None,
        between: Outlines | None = None,
    ):  # fmt: skip
        self.images, self.cameras, self.silhouette_weight = images, cameras, silhouette_weight
        self.between = between
        self.shown = _needed(silhouettes, images, silhouette_weight)

    def known(self) -> tuple[Tensor, Tensor, Cameras]:
        """The images, their silhouettes [V, 1, Hp, Wp] and their cameras."""
        return self.images, shown(self.images) if self.shown is None else self.shown, self.cameras

    def views(self, step: int, stream: Stream) -> Cameras:
        """The images' own cameras."""
        return self.cameras

    def score(
        self, rgb: Tensor, views: Cameras, step: int, stream: Stream, timing: Timing = no_timing
    ) -> tuple[Tensor, int]:
        """See `Guidance`; the squared error, no timestep."""
        return squared_error(rgb, self.images, self.shown), 0

    def opacity_loss(self, opacity: Tensor, step: int) -> Tensor:
        """The weighted squared distance to the images' silhouettes."""
        if self.shown is None:
            return opacity.new_zeros(())
        return ramp(self.silhouette_weight, step) * squared_error(opacity[:, None], self.shown)

    def n_fitted(self, n_views: int, step: int) -> int:
        """All."""
        return n_views


class Anchored:
    """Another guidance, and beside its views one group of known ones a step.

    Args:
        images [G, V, 3, Hp, Wp] in [0, 1], cameras of each group.
        weight: of the known views' squared error, summed over a view's pixels, as `Reconstruction` has it; a ramp over
            the steps.
        silhouettes: [G, V, 1, Hp, Wp] in [0, 1], where they are known; else they are guessed (`shown`).
        between: silhouettes and cameras of others, that only say where there is nothing.
    """

    def __init__(
        self, free: Guidance, images: Tensor, cameras: list[Cameras], weight: Ramp, silhouette_weight: Ramp = NOTHING,
        silhouettes: Tensor | None = None, between: Outlines | None = None,
    ):  # fmt: skip
        self.between = between
        self.free, self.images, self.cameras, self.weight = free, images, cameras, weight
        self.silhouette_weight = silhouette_weight
        self.shown = _needed(silhouettes, images, silhouette_weight)
        self._group = 0

    def known(self) -> tuple[Tensor, Tensor, Cameras]:
        """The known images [G*V, 3, Hp, Wp], their silhouettes [G*V, 1, Hp, Wp] and their cameras."""
        images = self.images.flatten(0, 1)
        c2w, fovy = (torch.cat([getattr(group, name) for group in self.cameras]) for name in ("c2w", "fovy"))
        return images, shown(images) if self.shown is None else self.shown.flatten(0, 1), Cameras(c2w, fovy)

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
        there = None if self.shown is None else self.shown[self._group]
        return loss + ramp(self.weight, step) * squared_error(rgb[n:], self.images[self._group], there), t

    def opacity_loss(self, opacity: Tensor, step: int) -> Tensor:
        """The other guidance's, and the known views' weighted squared distance to their silhouettes."""
        n = len(opacity) - self.images.shape[1]
        loss = opacity_loss(self.free, opacity[:n], step)
        if self.shown is None:
            return loss
        return loss + ramp(self.silhouette_weight, step) * squared_error(opacity[n:, None], self.shown[self._group])

    def n_fitted(self, n_views: int, step: int) -> int:
        """The known ones, and those of the other guidance."""
        known = self.images.shape[1]
        return known + n_fitted(self.free, n_views - known, step)

    def after_step(self, step: int, stream: Stream) -> None:
        """The other guidance's."""
        self.free.after_step(step, stream)

    def state(self) -> dict[str, Tensor]:
        """The other guidance's."""
        return self.free.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The other guidance's."""
        self.free.restore(tensors)


def _needed(silhouettes: Tensor | None, images: Tensor, weight: Ramp) -> Tensor | None:
    """The silhouettes [..., 1, Hp, Wp] of images [..., 3, Hp, Wp]: as they are known, or guessed where a loss of this
    weight needs them."""
    if silhouettes is not None or not is_ever_on(weight):
        return silhouettes
    return shown(images.flatten(0, -4)).view(*images.shape[:-3], 1, *images.shape[-2:])


def squared_error(rgb: Tensor, images: Tensor, shown: Tensor | None = None) -> Tensor:
    """Summed over a view's pixels, averaged over the views; the larger are first shrunk to the size of the others.

    shown: [V, 1, Hp, Wp], how far each pixel counts, 0 to 1: where an image shows its background, and at an edge, where
    it shows some of both, a thing must not take on the background's colour.
    """
    size = min(rgb.shape[-2:], images.shape[-2:])
    rgb, target = (F.interpolate(x, size, mode="area") for x in (rgb, images.to(rgb)))
    error = (rgb - target).square()
    if shown is not None:
        error = error * F.interpolate(shown.to(rgb), size, mode="area").square()
    return error.sum() / len(rgb)


def shown(images: Tensor) -> Tensor:
    """How far each pixel shows something in front of a flat background: [V, 3, Hp, Wp] -> [V, 1, Hp, Wp] in [0, 1].

    The background is each image's median colour along its border, as far as it can be reached from there: a grey thing
    before grey keeps what an outline of another grey closes in. At an edge it is the share of what stands beside it.
    """
    differs = off_border(_smoothed(images))
    like = differs < FAR
    behind = torch.zeros_like(like)
    behind[..., 0, :], behind[..., -1, :] = like[..., 0, :], like[..., -1, :]
    behind[..., 0], behind[..., -1] = like[..., 0], like[..., -1]
    while True:
        down, right = (F.max_pool2d(behind.float(), size, 1, padding) for size, padding in CROSS)
        grown = (down.maximum(right) > 0) & like
        if torch.equal(grown, behind):
            break
        behind = grown
    whole = (EDGE * F.max_pool2d(differs, 3, 1, 1)).clamp(min=FAR)
    share = ((differs - CLOSE) / (whole - CLOSE)).clamp(0, 1)
    beside = F.max_pool2d(behind.float(), 3, 1, 1) > 0
    return torch.where(beside, share, torch.ones_like(share))


def _smoothed(images: Tensor) -> Tensor:
    """Each pixel with a quarter of its neighbours' part, along both axes: what a decoder adds pixel by pixel goes."""
    kernel = images.new_tensor([0.25, 0.5, 0.25])
    wide = F.pad(images.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(wide, (kernel[:, None] * kernel)[None, None]).view_as(images)
