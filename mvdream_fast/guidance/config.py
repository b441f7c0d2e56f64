"""How a diffusion model is asked what it wants of rendered views; no torch here."""

from dataclasses import dataclass
from typing import Literal

from mvdream_fast.core.ramp import Ramp


@dataclass(frozen=True)
class GuidanceConfig:
    """Defaults are MVDream's (`paper`). min_step and max_step are fractions of the schedule's timesteps."""

    loss: Literal["x0", "sds"] = "x0"
    guidance_scale: float = 50.0
    rescale: float = 0.5
    min_step: Ramp = (0.0, 0.98, 0.02, 8000.0)
    max_step: Ramp = (0.0, 0.98, 0.50, 8000.0)
