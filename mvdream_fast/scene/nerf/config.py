"""What a NeRF is made of and how it learns, as frozen values, and the memory that takes; no torch here."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Interval

from mvdream_fast.core.ramp import WeightRamp
from mvdream_fast.core.schema import Checked, Share

if TYPE_CHECKING:
    from mvdream_fast.ops.field import FieldSpec

BYTES_PER_SAMPLE = 80  # of a training step of the renderer
LIT_BYTES_PER_SAMPLE = 340  # with normals by differences, measured; by derivatives some 9,000, of far fewer samples
PRUNE_BYTES = 8192 * 110  # a block of rays before pruning on a CPU, per sample of a ray
MARCHED_BYTES = 28  # of a sample before pruning on a GPU: two distances, a position, a density, whether it stays, room
FEATURES_AT_ONCE = 1 << 18  # samples whose features the field's kernels write down together
VolumeName = Literal["paper", "mini", "coarse"]
LearningRate = Annotated[float, Interval(ge=0, lt=10)]


def rays_at_once(gpu_memory: int, samples_per_ray: int) -> int:
    """Rays whose samples before pruning fit into a quarter of a GPU's memory, were every cell on their way occupied."""
    return gpu_memory // 4 // (samples_per_ray * MARCHED_BYTES)


@dataclass(frozen=True)
class VolumeConfig:
    """A volume over [-radius, radius]^3; the defaults are the MVDream paper's."""

    radius: float = 1.0
    n_levels: int = 16
    n_features: int = 2
    log2_size: int = 19
    base_resolution: int = 16
    top_resolution: int = 4096
    width: int = 64
    n_hidden: int = 1
    bias_scale: float = 10.0
    bias_std: float = 0.5
    density_activation: Literal["softplus", "exp"] = "softplus"
    color_sigmoid: bool = True

    @classmethod
    def paper(cls) -> "VolumeConfig":
        """12,599,920 table parameters, networks 32-64-1 and 32-64-3."""
        return cls()

    @classmethod
    def mini(cls) -> "VolumeConfig":
        """A small volume for the embedded model on a CPU: 12 levels, 2^15 entries each, top resolution 256."""
        return cls(n_levels=12, log2_size=15, top_resolution=256, width=32)

    @classmethod
    def coarse(cls) -> "VolumeConfig":
        """What a handful of views can tell: 7 levels, no cell finer than an eightieth of the box's side."""
        return cls(n_levels=7, log2_size=15, base_resolution=8, top_resolution=80, width=32)

    @classmethod
    def named(cls, name: VolumeName, radius: float) -> "VolumeConfig":
        """That of a setting `volume`."""
        return replace({"paper": cls.paper, "mini": cls.mini, "coarse": cls.coarse}[name](), radius=radius)

    @property
    def growth(self) -> float:
        """Ratio of neighbouring resolutions (1.447269237440378 for the paper's 16 to 4096 in 16 levels)."""
        if self.n_levels == 1:
            return 1.0
        return math.exp(math.log(self.top_resolution / self.base_resolution) / (self.n_levels - 1))

    @property
    def spec(self) -> "FieldSpec":
        """What `ops.field` wants to know of it."""
        from mvdream_fast.ops.field import FieldSpec
        from mvdream_fast.ops.hash_encode import HashGrid

        grid = HashGrid(self.n_levels, self.n_features, self.log2_size, self.base_resolution, self.growth)
        return FieldSpec(grid, self.radius, self.bias_scale, self.bias_std, self.density_activation, self.color_sigmoid)


@dataclass(frozen=True)
class HashGridConfig(Checked):
    """What a volume and a surface on a hash grid have in common; the defaults are MVDream's recipe. Weights of losses
    are ramps."""

    usual_faces: ClassVar[int] = 30_000  # at most, of its mesh unless others are asked for
    volume: VolumeName = "paper"
    radius: Annotated[float, Interval(gt=0, le=100)] = 1.0  # the volume fills [-radius, radius]^3
    background: Literal["learned", "grey", "white"] = "learned"
    background_aug_prob: Share = 0.5
    samples_per_ray: Annotated[int, Interval(ge=1, le=4096)] = 512
    max_samples: Annotated[int, Interval(ge=1, le=1 << 31)] = 1 << 23
    lambda_orient: WeightRamp = (0.0, 0.0, 0.0, 0.0)
    lambda_sparsity: WeightRamp = (0.0, 0.0, 0.0, 0.0)
    lambda_opaque: WeightRamp = (0.0, 0.0, 0.0, 0.0)
    lambda_z_variance: WeightRamp = (0.0, 0.0, 0.0, 0.0)
    lr_encoding: Annotated[float, Interval(gt=0, lt=10)] = 0.01
    lr_mlp: LearningRate = 0.001
    lr_background: LearningRate = 0.001

    def volume_config(self) -> VolumeConfig:
        """The volume that `volume` names."""
        return VolumeConfig.named(self.volume, self.radius)

    def memory(self, n_rays: int, gpu_memory: int | None = None, lit: bool = False) -> dict[str, int]:
        """Estimated bytes by part of a training step of n_rays; nothing is allocated for it. gpu_memory: of the GPU
        that it takes place on, None for a CPU. lit: with normals."""
        return self._memory(n_rays, gpu_memory, LIT_BYTES_PER_SAMPLE if lit else BYTES_PER_SAMPLE)

    def _memory(self, n_rays: int, gpu_memory: int | None, bytes_per_sample: int) -> dict[str, int]:
        volume = self.volume_config()
        samples = min(self.max_samples, n_rays * self.samples_per_ray)
        before_pruning = PRUNE_BYTES * self.samples_per_ray
        if gpu_memory is not None:
            block = min(n_rays, rays_at_once(gpu_memory, self.samples_per_ray))
            before_pruning = block * self.samples_per_ray * MARCHED_BYTES
        features = 4 * volume.n_levels * volume.n_features * min(samples, FEATURES_AT_ONCE)
        return {
            "the renderer's samples": samples * bytes_per_sample + before_pruning + features,
            "the volume and its optimiser": 16 * volume.spec.grid.n_entries * volume.n_features,
        }


@dataclass(frozen=True)
class NerfConfig(HashGridConfig):
    """A density volume on a hash grid (nerf.py).

    normals: where light asks for them, by derivatives of the density (the papers' way; the backward pass is second
    order), or by differences at a hundredth of a scene unit, which a CPU makes many times faster.
    """

    shape: Literal["volume"] = "volume"
    normals: Literal["analytic", "finite_difference"] = "analytic"
