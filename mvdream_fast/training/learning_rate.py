"""The learning rate of every training in this package, as a share of its highest."""

import math
from typing import Literal


def rate(step: int, warmup: int, steps: int, decay: int, shape: Literal["linear", "cosine"] = "linear") -> float:
    """Linear warm-up over the first `warmup` updates, a plateau, a fall to zero over the last `decay` of `steps`.

    A plateau leaves the end open: a run is ended by resuming it with a decay, whenever its time is up. 0: no fall.
    """
    rise = min(1.0, (step + 1) / max(warmup, 1))
    left = min(1.0, max(0, steps - step) / decay) if decay > 0 else 1.0
    return rise * (left if shape == "linear" else 0.5 * (1 - math.cos(math.pi * left)))
