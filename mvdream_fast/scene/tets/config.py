"""What a mesh that is optimised is made of and how it learns, as frozen values, and the memory that takes; no torch."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval

from mvdream_fast.core.ramp import WeightRamp
from mvdream_fast.core.schema import Checked, Share
from mvdream_fast.scene.nerf.config import LearningRate, VolumeConfig, VolumeName

BYTES_PER_PIXEL = 320  # of a training step: images of 4 to 6 numbers, some twice, their gradients, and the field's
BYTES_PER_POINT = 144  # of the lattice: distance and shift with gradient and two moments, coordinates, edges' marks
BYTES_PER_TEXEL = 72  # colour, gradient, two moments, the mip-map chain and its gradient


@dataclass(frozen=True)
class MeshColors(Checked):
    """The colours of a mesh, what is behind it, and what is shown."""

    usual_faces: ClassVar[int] = 0  # its mesh is the very one that was optimised
    volume: VolumeName = "paper"  # the field whose colours the surface has
    radius: Annotated[float, Interval(gt=0, le=100)] = 1.0  # the field, and what is drawn, fill [-radius, radius]^3
    background: Literal["learned", "grey", "white"] = "learned"
    background_aug_prob: Share = 0.5
    lr_encoding: Annotated[float, Interval(gt=0, lt=10)] = 0.01
    lr_mlp: LearningRate = 0.01
    lr_background: LearningRate = 0.01

    def volume_config(self) -> VolumeConfig:
        """The volume that `volume` names."""
        return VolumeConfig.named(self.volume, self.radius)

    def _memory(self, n_rays: int) -> dict[str, int]:
        volume = self.volume_config()
        return {
            "the renderer's images": n_rays * BYTES_PER_PIXEL,
            "the volume and its optimiser": 16 * volume.spec.grid.n_entries * volume.n_features,
        }


@dataclass(frozen=True)
class TetsConfig(MeshColors):
    """A surface on a lattice of tetrahedra (tets.py); the defaults are those of Magic3D's second stage.

    With shows="normals" renders are the normals as colours before black, (n + 1) / 2, which is what the geometry stage
    of ProlificDreamer shows its guidance.
    """

    shape: Literal["tets"] = "tets"
    tets_resolution: Literal[32, 64, 128] = 128  # planes of points a side
    sphere_radius: Annotated[float, Interval(gt=0, le=100)] = 0.5  # of what a fresh one shows
    shows: Literal["colors", "normals"] = "colors"
    lambda_normal_consistency: WeightRamp = (0.0, 1e4, 1e4, 0.0)
    lambda_laplacian: WeightRamp = (0.0, 0.0, 0.0, 0.0)
    lr_geometry: LearningRate = 0.01

    def memory(self, n_rays: int, gpu_memory: int | None = None, lit: bool = False) -> dict[str, int]:
        """Estimated bytes by part of a training step of n_rays; the same on a GPU."""
        n_points = self.tets_resolution**3 // 4
        return {**self._memory(n_rays), "the tetrahedra and their optimiser": n_points * BYTES_PER_POINT}


@dataclass(frozen=True)
class TexturedMeshConfig(MeshColors):
    """A fixed mesh whose colours are optimised (textured.py); the defaults are those of ProlificDreamer's third stage.

    Colours are a field's at the surface, or, with mesh_colors="texture", those of a texture on its UV coordinates.
    """

    shape: Literal["textured-mesh"] = "textured-mesh"
    mesh_colors: Literal["field", "texture"] = "field"
    texture_size: Annotated[int, Interval(ge=16, le=8192)] = 1024  # pixels a side
    lr_texture: LearningRate = 0.01
    lr_mlp: LearningRate = 0.001
    lr_background: LearningRate = 0.001

    def memory(self, n_rays: int, gpu_memory: int | None = None, lit: bool = False) -> dict[str, int]:
        """Estimated bytes by part of a training step of n_rays; the same on a GPU."""
        parts = self._memory(n_rays)
        if self.mesh_colors == "texture":
            parts["the texture and its optimiser"] = self.texture_size**2 * BYTES_PER_TEXEL
        return parts
