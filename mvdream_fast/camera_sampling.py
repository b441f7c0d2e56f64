"""The ranges that the cameras of a text-to-3D run are drawn from; no torch here. What draws them is camera.py."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from mvdream_fast.core.schema import Checked

Elevation = Annotated[float, Interval(ge=-90, le=90)]
Fovy = Annotated[float, Interval(gt=0, lt=180)]
Jitter = Annotated[float, Interval(ge=0, le=100)]
Distance = Annotated[float, Interval(gt=0, lt=1000)]


@dataclass(frozen=True)
class CameraSampling(Checked):
    """How SDS draws its cameras; the defaults are MVDream's (`paper`).

    `distance_range` is multiplied by 1/tan(fovy/2) ("tan": the same size in the image for every field of view), by
    1/sin(fovy/2) ("sin": 1 just frames the unit sphere), or taken as it is ("none"). `elevations="upstream"` copies
    MVDream-threestudio: half of its draws are uniform on the sphere but reach 19.47 degrees only, whatever the range.
    `perturb` then moves each view by itself: its position by up to the first number along each axis, the point it looks
    at and its upward axis by normal numbers of the second and the third deviation.
    """

    n_views: Annotated[int, Interval(ge=1, le=256)] = 4
    elevation_range_deg: tuple[Elevation, Elevation] = (0.0, 30.0)
    fovy_range_deg: tuple[Fovy, Fovy] = (15.0, 60.0)
    distance_range: tuple[Distance, Distance] = (0.8, 1.0)
    relative_distance: Literal["tan", "sin", "none"] = "tan"
    elevations: Literal["uniform", "upstream"] = "uniform"
    perturb: tuple[Jitter, Jitter, Jitter] = (0.0, 0.0, 0.0)

    @staticmethod
    def paper() -> "CameraSampling":
        """Elevation 0..30, fovy 15..60 degrees, distance U(0.8, 1)/tan(fovy/2)."""
        return CameraSampling()

    @staticmethod
    def mini() -> "CameraSampling":
        """The cameras that the embedded model was trained with: the unit sphere just fits the image."""
        return CameraSampling(fovy_range_deg=(30.0, 50.0), distance_range=(1.0, 1.05), relative_distance="sin")
