"""How a diffusion model is asked what it wants of rendered views; no torch here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from mvdream_fast.core.ramp import ShareRamp
from mvdream_fast.core.schema import Checked, Share


@dataclass(frozen=True)
class GuidanceConfig(Checked):
    """Defaults are MVDream's (`paper`). min_step and max_step are fractions of the schedule's timesteps."""

    loss: Literal["x0", "sds"] = "x0"
    guidance_scale: Annotated[float, Interval(gt=-1e6, lt=1e6)] = 50.0
    rescale: Share = 0.5
    min_step: ShareRamp = (0.0, 0.98, 0.02, 8000.0)
    max_step: ShareRamp = (0.0, 0.98, 0.50, 8000.0)
