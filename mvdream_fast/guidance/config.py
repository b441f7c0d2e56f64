"""How a diffusion model is asked what it wants of rendered views; no torch here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from mvdream_fast.core.ramp import Ramp, ShareRamp
from mvdream_fast.core.schema import Checked, Share


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
    timesteps: Literal["shared", "each"] = "shared"  # one timestep for all images of a step, or one for each scene
    weighting: Literal["sds", "uniform", "fantasia3d"] = "sds"  # w(t) of the losses sds and vsd
    grad_clip: Ramp | None = None  # the largest magnitude of a gradient on a latent
    view_words: bool = False  # "front view" and its like in the prompt, by where the camera stands
    perp_neg: bool = False
    # VSD alone.
    lora_rank: Annotated[int, Interval(ge=1, le=1024)] = 4
    lora_lr: Annotated[float, Interval(gt=0, lt=1)] = 1e-4
    camera_dropout: Share = 0.1
    particles: Annotated[int, Interval(ge=1, le=64)] = 1


@dataclass(frozen=True)
class RepaintConfig(Checked):
    """Views that are noised, denoised and fitted, from a step of the run on; see guidance/repaint.py."""

    repaint_from: Share = 1.0  # share of the run after which repainting begins; 1: never
    repaint_every: Annotated[int, Interval(ge=1, le=10**6)] = 20  # steps between repainted groups
    repaint_strength: ShareRamp = (0.0, 0.5, 0.2, 1.0)  # of the noise, from where repainting begins (0) to the end (1)
    repaint_steps: Annotated[int, Interval(ge=1, le=1000)] = 10  # denoising steps at strength 1
