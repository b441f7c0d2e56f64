"""The protocol of what a text-to-3D run learns from: where to look, and how far the rendered views are from what they
should be. A new guidance is a class with these methods; distill/loop.py is where its kind is chosen.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from mvdream_fast.camera import Cameras
    from mvdream_fast.core.rng import Stream

Timing = Callable[[str], None]  # told the name of the part that has just ended, for the report's table of times


def no_timing(_: str) -> None:
    """For callers who don't measure."""


class Guidance(Protocol):
    """What the views should rather be. Everything random comes from the streams that are handed in."""

    def views(self, step: int, stream: "Stream") -> "Cameras":
        """The cameras of a step, B groups of V views, views fastest."""
        ...

    def score(
        self, rgb: Tensor, views: "Cameras", step: int, stream: "Stream", timing: Timing = no_timing
    ) -> tuple[Tensor, int]:
        """rgb [B*V, 3, Hp, Wp] in [0, 1], rendered from `views` -> (a scalar with a graph to rgb, the timestep that a
        model was asked at, or 0)."""
        ...

    def after_step(self, step: int, stream: "Stream") -> None:
        """What the guidance itself learns once the representation has been updated."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a resumed run needs beside the step's number, by name; often none."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the tensors of `state`."""
        ...


@runtime_checkable
class Outlined(Protocol):
    """What a guidance has besides that knows silhouettes, not colours alone."""

    def opacity_loss(self, opacity: Tensor, step: int) -> Tensor:
        """What is wanted of the opacity [B*V, Hp, Wp] in [0, 1] of the renders that `score` was given last: a scalar
        with a graph to it."""
        ...


def opacity_loss(guidance: Guidance, opacity: Tensor, step: int) -> Tensor:
    """A guidance's `Outlined.opacity_loss`; 0 of one that knows colours alone."""
    return guidance.opacity_loss(opacity, step) if isinstance(guidance, Outlined) else opacity.new_zeros(())


@runtime_checkable
class Fitting(Protocol):
    """What a guidance has besides that compares views with images as they are: sampled, redrawn or photographed."""

    def n_fitted(self, n_views: int, step: int) -> int:
        """How many of the n_views that a step renders, the last ones. They are shown unlit, and before the background
        itself where others have a random one."""
        ...


def n_fitted(guidance: Guidance, n_views: int, step: int) -> int:
    """A guidance's `Fitting.n_fitted`; 0 of one that fits no images."""
    return guidance.n_fitted(n_views, step) if isinstance(guidance, Fitting) else 0


class Stateless:
    """For a guidance that learns nothing itself and remembers nothing."""

    def after_step(self, step: int, stream: "Stream") -> None:
        """Nothing to learn."""

    def state(self) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to take over."""
