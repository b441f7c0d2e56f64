"""What a surface is made of and how it learns, as frozen values, and the memory that takes; no torch here."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Interval

from mvdream_fast.core.ramp import ShareRamp, WeightRamp
from mvdream_fast.scene.nerf.config import HashGridConfig, LearningRate, VolumeConfig

TOP_RESOLUTION = 2048
SURFACE_BYTES_PER_SAMPLE = 440  # of a lit training step; measured: 390 to 430, not lit 280
Levels = Annotated[float, Interval(ge=1, le=32)]
Exponent = Annotated[float, Interval(ge=-1, le=1)]


@dataclass(frozen=True)
class SurfaceConfig(HashGridConfig):
    """A signed distance on a hash grid (surface.py); the defaults are those of threestudio's textmesh-if.

    deviation: v at the start; the inverse standard deviation of the opacity around the surface is exp(10 v), learned.
    deviation_least: what v is at least: guidance that finds nothing to like widens it until nothing is to be seen.
    sdf_levels: how many levels of the hash grid there are, from the coarsest on; a fraction of one is none.
    cos_anneal: 0, every direction meets the surface, even at its silhouette; 1, as the angle has it (NeuS).
    sdf_normals: by differences at the distance of the finest level's cells, or by derivatives, which are slower.
    """

    shape: Literal["surface"] = "surface"
    sdf_opacity: Literal["neus", "volsdf"] = "neus"
    sphere_radius: Annotated[float, Interval(gt=0, le=100)] = 0.5  # of what there is before the first step
    deviation: Exponent = 0.3
    deviation_least: tuple[float, Exponent, Exponent, float] = (0.0, -1.0, -1.0, 0.0)
    sdf_levels: tuple[float, Levels, Levels, float] = (2000.0, 8.0, 16.0, 6000.0)
    cos_anneal: ShareRamp = (0.0, 0.0, 1.0, 10_000.0)
    sdf_normals: Literal["finite_difference", "analytic"] = "finite_difference"
    lambda_eikonal: WeightRamp = (0.0, 1000.0, 1000.0, 0.0)
    lr_deviation: LearningRate = 0.001

    def volume_config(self) -> VolumeConfig:
        """The hash grid that `volume` names, of which the finest cells are no finer than a surface is asked for."""
        volume = super().volume_config()
        return replace(volume, top_resolution=min(volume.top_resolution, TOP_RESOLUTION))

    def memory(self, n_rays: int, gpu_memory: int | None = None, lit: bool = False) -> dict[str, int]:
        """Estimated bytes by part of a training step of n_rays, as a volume's with more for each sample."""
        return self._memory(n_rays, gpu_memory, SURFACE_BYTES_PER_SAMPLE)
