"""A number that changes linearly over the steps of a run: loss weights, ranges of timesteps."""

from typing import Annotated

from annotated_types import Interval

from mvdream_fast.core.schema import Share

Weight = Annotated[float, Interval(ge=0, le=1e6)]  # of a loss
Ramp = tuple[float, float, float, float]  # (start step, value there, value at the end, end step), linear and clamped
WeightRamp = tuple[float, Weight, Weight, float]
ShareRamp = tuple[float, Share, Share, float]


def is_ever_on(schedule: Ramp) -> bool:
    """Whether a linear ramp is other than zero at any step."""
    return any(schedule[1:3])


def ramp(schedule: Ramp, step: int) -> float:
    """The value of a linear ramp at `step`, constant outside it."""
    start, first, last, end = schedule
    if end <= start:
        return last if step >= end else first
    return first + (last - first) * min(max((step - start) / (end - start), 0.0), 1.0)
