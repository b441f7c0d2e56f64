"""Views that a run samples once, each set no more often than that: what views.png shows, and what its guidance fits.
What is sampled is the pipeline's; how it is fitted is guidance/reconstruction.py's.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from mvdream_fast.camera import Cameras, middle_cameras
from mvdream_fast.diffusion.views import Views
from mvdream_fast.distill.config import SDSConfig
from mvdream_fast.guidance.reconstruction import Outlines, shown

if TYPE_CHECKING:
    from mvdream_fast.pipeline import MVDreamPipeline

N_SHOWN = 4  # views in views.png
SHOWN_STEPS = 25  # of the sampler, where the run fits no such views


class Sampled(NamedTuple):
    """V views as the model draws them: images [V, 3, Hp, Wp] in [0, 1], their cameras, and, of a model that tells
    things from backgrounds, straight colours and opacity, [V, 4, Hp, Wp] in [0, 1]. between: silhouettes of as many
    views half-way between them, and cameras of those."""

    images: Tensor
    cameras: Cameras
    cutouts: Tensor | None = None
    between: Outlines | None = None

    def fitted(self, silhouettes: bool) -> tuple[Tensor, Cameras, Tensor | None]:
        """What a guidance fits: images, cameras and silhouettes [V, 1, Hp, Wp], where these are known and wanted; the
        images are then straight colours, which mean nothing outside."""
        if self.cutouts is None or not silhouettes:
            return self.images, self.cameras, None
        return self.cutouts[:, :3], self.cameras, self.cutouts[:, 3:]


class Sampler:
    """Samples views of prompts with one model, and keeps what it has sampled for whoever asks for the same again."""

    def __init__(self, pipeline: "MVDreamPipeline"):
        self.pipeline = pipeline
        self._views: dict[tuple[object, ...], Views] = {}
        self._between: dict[tuple[object, ...], Tensor] = {}

    def first_views(self, prompt: str, config: SDSConfig, seed: int) -> Views:
        """Four views, so that a bad prompt is seen before the long part: those that the run fits, or, where it fits
        none or more of them, others, as strongly guided."""
        if config.n_fitted == N_SHOWN and config.mode == "3d":
            return self._drawn(prompt, config, seed)
        settings: dict[str, Any] = {**_settings(config, seed), "n_steps": SHOWN_STEPS}
        return self.pipeline(prompt, N_SHOWN, suffix=self.pipeline.suffix, mode=config.mode, **settings)

    def sampled(self, prompt: str, config: SDSConfig, seed: int) -> Sampled:
        """What a stage fits, in place of distillation or beside it, evenly around."""
        cameras = dataclasses.replace(config.cameras, n_views=config.n_fitted)
        views, between = self._drawn(prompt, config, seed), None
        if config.sampled.sampled_between:
            outlines = self._outlines(prompt, config, seed)
            between = outlines, middle_cameras(cameras, azimuth_start_deg=180.0 / cameras.n_views)
        return Sampled(views.tensor, middle_cameras(cameras), views.cutout, between)

    def _drawn(self, prompt: str, config: SDSConfig, seed: int) -> Views:
        key = _key(prompt, config, seed)
        if key not in self._views:
            self._views[key] = self.pipeline(prompt, config.n_fitted, **_settings(config, seed))
        return self._views[key]

    def _outlines(self, prompt: str, config: SDSConfig, seed: int) -> Tensor:
        """Silhouettes of the views between, [V, 1, Hp, Wp]."""
        key = _key(prompt, config, seed)
        if key not in self._between:
            more = self.pipeline.between(self._drawn(prompt, config, seed), **_settings(config, seed))
            self._between[key] = shown(more.tensor) if more.cutout is None else more.cutout[:, 3:]
        return self._between[key]


def silent(_: str) -> None:
    """Says nothing of unknown words: the command has named them once."""


def _key(prompt: str, config: SDSConfig, seed: int) -> tuple[object, ...]:
    return prompt, config.n_fitted, *_settings(config, seed).values()


def _settings(config: SDSConfig, seed: int) -> dict[str, Any]:
    """What the pipeline is told, views and views between alike."""
    how = config.sampled
    return {
        "n_steps": how.sampled_steps, "guidance_scale": how.sampled_scale, "uncond_mode": how.sampled_uncond,
        "negative_prompt": config.negative_prompt, "seed": seed, "warn": silent,
    }  # fmt: skip
