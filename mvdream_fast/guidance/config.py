"""How a diffusion model is asked what it wants of rendered views; no torch here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from mvdream_fast.core.ramp import ShareRamp, WeightRamp
from mvdream_fast.core.schema import Checked, Share

Limit = Annotated[float, Interval(gt=0, le=1e6)]


@dataclass(frozen=True)
class GuidanceConfig(Checked):
    """Defaults are MVDream's (`paper`). min_step and max_step are fractions of the schedule's timesteps."""

    kind: Literal["sds", "vsd"] = "sds"
    loss: Literal["x0", "sds"] = "x0"
    guidance_scale: Annotated[float, Interval(gt=-1e6, lt=1e6)] = 50.0
    # What the scale s multiplies is added to: eps_u + s (eps_c - eps_u), or eps_c + s (eps_c - eps_u).
    guided_from: Literal["uncond", "cond"] = "uncond"
    rescale: Share = 0.5
    min_step: ShareRamp = (0.0, 0.98, 0.02, 8000.0)
    max_step: ShareRamp = (0.0, 0.98, 0.50, 8000.0)
    # One timestep for all images of a step, or one for each group of views: in 2D mode that is each image.
    timesteps: Literal["shared", "each"] = "shared"
    # w(t) of the losses sds and vsd: 1 - abar, 1, or sqrt(abar) (1 - abar).
    weighting: Literal["sds", "uniform", "fantasia3d"] = "sds"
    # The largest magnitude of the gradient on a latent's value, before it is divided by the number of images.
    grad_clip: tuple[float, Limit, Limit, float] | None = None
    view_words: bool | None = (
        None  # "front view" and its like in the prompt, by where the camera stands; None: in 2D mode
    )
    # "front view" and "back view" are said within so many degrees of the front and of the back.
    view_words_deg: Annotated[float, Interval(ge=0, le=90)] = 45.0
    perp_neg: bool = False  # leads each view away from the words of its other sides
    # VSD alone.
    lora_rank: Annotated[int, Interval(ge=1, le=1024)] = 4
    lora_lr: Annotated[float, Interval(gt=0, lt=1)] = 1e-4
    camera_dropout: Share = 0.1
    particles: Annotated[int, Interval(ge=1, le=64)] = 1

    @property
    def scale_from_uncond(self) -> float:
        """The s of eps_u + s (eps_c - eps_u) that this guidance is: from eps_c it is one more than the scale."""
        return self.guidance_scale + (self.guided_from == "cond")

    def tells_sides(self, mode: str) -> bool:
        """Whether the prompt says from where a view is seen, in a mode of SDSConfig."""
        return mode == "2d" if self.view_words is None else self.view_words


@dataclass(frozen=True)
class SampledConfig(Checked):
    """Views that are sampled once, before the first step, and fitted as if they were photographs: in place of
    distillation (the method "reconstruct"), or, with `sampled_views`, beside it (guidance/reconstruction.py)."""

    sampled_views: Annotated[int, Interval(ge=0, le=64)] = 0  # evenly around, fitted beside distillation; 0: none
    sampled_scale: Annotated[float, Interval(gt=-1e6, lt=1e6)] = 7.5  # guidance scale of their sampling
    sampled_uncond: Literal["3d", "2d"] = "3d"  # how it asks without the prompt (SamplingGuidance.uncond_mode)
    sampled_steps: Annotated[int, Interval(ge=1, le=1000)] = 50  # of the sampler
    sampled_hull: bool = False  # a run begins as the solid that their silhouettes leave of space, in their colours
    sampled_between: bool = False  # as many more are sampled half-way between them, which carve that solid, too
    lambda_sampled: WeightRamp = (0.0, 1.0, 1.0, 0.0)  # of their squared error, summed over a view
    lambda_silhouette: WeightRamp = (0.0, 0.0, 0.0, 0.0)  # of opacity's squared distance to their silhouettes, summed

    @property
    def beside(self) -> bool:
        """Whether there are any beside distillation."""
        return self.sampled_views > 0


@dataclass(frozen=True)
class RepaintConfig(Checked):
    """Views that the model redraws, fitted in place of distillation from a step of the run on (guidance/repaint.py).
    The defaults are those that left the least fog, with an opaque loss of 300 (docs/ablations.md)."""

    repaint_from: Share = 1.0  # the share of the run after which it begins; 1: never
    repaint_every: Annotated[int, Interval(ge=1, le=10**6)] = 15  # steps between redrawn groups
    repaint_groups: Annotated[int, Interval(ge=1, le=1000)] = 3  # the last ones that are fitted
    repaint_strength: tuple[Share, Share] = (0.4, 0.2)  # how much noise they get: at the beginning, at the run's end
    repaint_steps: Annotated[int, Interval(ge=1, le=1000)] = 20  # of the sampler, over the whole schedule
    repaint_scale: Annotated[float, Interval(gt=-1e6, lt=1e6)] = 7.5  # its guidance scale

    @property
    def repaints(self) -> bool:
        """Whether there is any of it."""
        return self.repaint_from < 1

    def strength(self, step: int, first: int, n_steps: int) -> float:
        """How far the views of a step are noised, in a run of n_steps that repaints from `first` on: linear between the
        two strengths."""
        start, end = self.repaint_strength
        return start + (end - start) * (step - first) / (n_steps - first)
