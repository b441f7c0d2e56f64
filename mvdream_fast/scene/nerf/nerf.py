"""The hash-grid NeRF as a representation: a volume, its occupancy and a background, with what a run does to them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mvdream_fast.camera import evaluation_cameras, generate_rays
from mvdream_fast.core.ramp import ramp
from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.background import new_background
from mvdream_fast.scene.base import Lighting, Rendered, Statistic
from mvdream_fast.scene.losses import opaque_loss, orientation_loss, sparsity_loss, z_variance_loss
from mvdream_fast.scene.mesh.mesh import Mesh, extract_mesh, sample_grid, silhouette_threshold
from mvdream_fast.scene.mesh.texture import bake_texture
from mvdream_fast.scene.nerf.config import HashGridConfig
from mvdream_fast.scene.nerf.occupancy import OccupancyGrid
from mvdream_fast.scene.nerf.renderer import Renderer, VolumeRendered
from mvdream_fast.scene.nerf.volume import Volume
from mvdream_fast.scene.saved import check_state

if TYPE_CHECKING:
    from mvdream_fast.camera import Rays

SILHOUETTE_VIEWS, SILHOUETTE_SIZE = 8, 96  # renders that a mesh's threshold is found with


class Nerf(Renderer):
    """A Representation (scene/base.py): the renderer with its learning rates, losses, mesh and state.

    Args: normals: how they are made, as in `Renderer`; it can be shaded only with them.
    """

    volume: Volume
    usual_faces: int = HashGridConfig.usual_faces
    usual_texture: int | None = None  # which takes seconds, and looks like colours at the vertices from afar

    def __init__(self, config: HashGridConfig, stream: Stream | None = None, normals: str = "none"):
        volume = self._new_volume(config, stream)
        super().__init__(
            volume,
            OccupancyGrid(radius=volume.config.radius),
            new_background(config.background, config.background_aug_prob, stream),
            n_samples_per_ray=config.samples_per_ray,
            normals=normals,
            max_samples=config.max_samples,
        )
        self.config, self.n_samples = config, 0

    @property
    def radius(self) -> float:
        """The volume lies in [-radius, radius]^3."""
        return self.occupancy.radius

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.occupancy.ema.device

    def _new_volume(self, config: HashGridConfig, stream: Stream | None) -> Volume:
        return Volume(config.volume_config(), stream)

    def render(
        self, rays: "Rays", stream: Stream | None = None, training: bool = False, lighting: Lighting | None = None
    ) -> VolumeRendered:
        """Rays [R] in front of the background; see `Renderer`."""
        rendered = self(rays, stream, training, *(lighting or Lighting()))
        self.n_samples = rendered.n_samples
        return rendered

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Table, networks, background; what has no parameters is left out."""
        config, volume = self.config, self.volume
        groups = [
            {"params": [volume.table], "lr": config.lr_encoding},
            {"params": [*volume.density_weights, *volume.feature_weights], "lr": config.lr_mlp},
            {"params": [*self.background.parameters()], "lr": config.lr_background},
        ]
        return [group for group in groups if group["params"]]

    def regularizers(self, rendered: Rendered, rays: "Rays", step: int) -> Tensor:
        """Orientation, sparsity, opaqueness and variance of depth, those that are switched on at this step."""
        if not isinstance(rendered, VolumeRendered) or rendered.z_variance is None:
            raise TypeError("Nerf: rendered must be a training render of this volume; pass training=True to render")
        config, opacity, z_variance = self.config, rendered.opacity, rendered.z_variance
        total, samples, weights = opacity.sum() * 0, rendered.samples, rendered.weights
        weight = ramp(config.lambda_orient, step)
        if weight and rendered.normals is not None and samples is not None and weights is not None:
            directions = rays.rays_d[samples.ray_indices]
            total = total + weight * orientation_loss(weights, rendered.normals, directions, opacity)
        for schedule, loss in (
            (config.lambda_sparsity, lambda: sparsity_loss(opacity)),
            (config.lambda_opaque, lambda: opaque_loss(opacity)),
            (config.lambda_z_variance, lambda: z_variance_loss(z_variance, opacity)),
        ):
            weight = ramp(schedule, step)
            if weight:
                total = total + weight * loss()
        return total

    def after_step(self, step: int, stream: Stream) -> None:
        """Updates the occupancy grid, where it is time."""
        self.occupancy.update(step, self.density, stream)

    def statistics(self) -> dict[str, Statistic]:
        """Share of occupied cells, and samples of the last step whose field was evaluated with gradient."""
        return {"occupancy": self.occupancy.fraction_later(), "n_samples": self.n_samples}

    def restart(self, seed: int) -> None:
        """Takes the values of a fresh volume of this seed."""
        self.load_state_dict(type(self)(self.config, Stream(seed, 0, "volume")).state_dict())

    def save_memory(self, n_rays: int) -> None:
        """Half of the samples that a step could have had; a step above that marches in larger steps. On a GPU at most
        half of the rays at once, too."""
        most = min(self.max_samples or 1 << 62, n_rays * self.config.samples_per_ray)
        self.max_samples, self.most_rays = max(most // 2, n_rays), n_rays // 2

    def colors(self, positions: Tensor) -> Tensor:
        """The field's colours at positions [P, 3] in scene units, [P, 3] in [0, 1]."""
        return self.volume(positions.to(self.device))[1]

    def mesh(self, resolution: int = 128, max_faces: int | None = None, texture: int | None = None) -> Mesh:
        """The iso-surface whose silhouette agrees best with the rendered ones, coloured by the field."""
        grid = sample_grid(self._density_there, resolution, self.radius)
        cameras = evaluation_cameras(SILHOUETTE_VIEWS)
        rays = generate_rays(cameras.to(self.device), SILHOUETTE_SIZE, SILHOUETTE_SIZE)
        with torch.no_grad():
            opacity = self.render(rays).opacity
        threshold, _ = silhouette_threshold(grid, self.radius, rays.rays_o.cpu(), rays.rays_d.cpu(), opacity)
        mesh = extract_mesh(
            self._density_there,
            self.colors,
            radius=self.radius,
            threshold=threshold,
            grid=grid,
            max_faces=max_faces,
        )
        return mesh if texture is None else bake_texture(mesh, self.colors, texture)

    def _density_there(self, positions: Tensor) -> Tensor:
        return self.density(positions.to(self.device))

    def state(self) -> dict[str, Tensor]:
        """Parameters and occupancy by name; live, not copies."""
        return self.state_dict()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Raises ModelError when names or shapes differ or a number is not finite."""
        check_state("volume", self.state(), tensors)
        self.load_state_dict(tensors)
