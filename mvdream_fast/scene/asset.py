"""A 3D asset: a volume with its occupancy and background, rendered, meshed, saved and loaded. No diffusion here."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, generate_rays, orbit_cameras
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.files import atomic_write
from mvdream_fast.core.rng import Stream
from mvdream_fast.distill.recipes import SDSConfig
from mvdream_fast.models.config import from_dict
from mvdream_fast.scene.background import EnvironmentMap, FixedBackground
from mvdream_fast.scene.mesh.export import save_mesh
from mvdream_fast.scene.mesh.mesh import Mesh, extract_mesh, sample_grid, silhouette_threshold
from mvdream_fast.scene.mesh.texture import bake_texture
from mvdream_fast.scene.nerf.occupancy import OccupancyGrid
from mvdream_fast.scene.nerf.renderer import Renderer
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig

EVAL_DISTANCE, EVAL_FOVY_DEG = 3.0, 40.0  # frames the unit sphere; MVDream-threestudio's evaluation camera
FLAT_COLOURS = {"grey": 0.5, "white": 1.0}


@dataclasses.dataclass(frozen=True)
class RenderedViews:
    """Rendered images: rgb [V, 3, Hp, Wp] and opacity, depth [V, Hp, Wp]."""

    rgb: Tensor
    opacity: Tensor
    depth: Tensor

    def images(self) -> list:
        """The colours as PIL images."""
        return [to_image(x) for x in self.rgb]


def to_image(rgb: Tensor):
    """[3, Hp, Wp] in [0, 1] as a PIL image."""
    from PIL import Image

    return Image.fromarray((rgb.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


class Asset:
    """What a text-to-3D run makes. `renderer` holds every parameter; `prompt` and `seed` say where it came from."""

    def __init__(self, config: SDSConfig, prompt: str = "", seed: int = 0):
        self.config, self.prompt, self.seed = config, prompt, seed
        volume_config = VolumeConfig.paper() if config.volume == "paper" else VolumeConfig.mini()
        volume = Volume(volume_config, Stream(seed, 0, "volume"))
        occupancy = OccupancyGrid(radius=volume_config.radius)
        self.renderer = Renderer(
            volume,
            occupancy,
            _background(config),
            n_samples_per_ray=config.samples_per_ray,
            normals="analytic" if config.shading else "none",
            max_samples=config.max_samples,
        )

    @property
    def radius(self) -> float:
        return self.renderer.occupancy.radius

    def to(self, device: torch.device | str) -> "Asset":
        self.renderer.to(device)
        return self

    def orbit(self, n_views: int = 4, elevation_deg: float = 15.0, azimuth_start_deg: float = 0.0) -> Cameras:
        """Evenly spaced evaluation cameras that frame the unit sphere."""
        return orbit_cameras(n_views, elevation_deg, azimuth_start_deg, 360.0, EVAL_DISTANCE, EVAL_FOVY_DEG)

    @torch.no_grad()
    def render(self, cameras: Cameras | None = None, size: int = 256) -> RenderedViews:
        """Images from `cameras` (default: four around the asset), size x size pixels, without gradient."""
        cameras = self.orbit() if cameras is None else cameras
        out = self.renderer(generate_rays(cameras.to(self.device), size, size))
        shape = (len(cameras), size, size)
        return RenderedViews(
            out.rgb.reshape(*shape, 3).permute(0, 3, 1, 2), out.opacity.reshape(shape), out.depth.reshape(shape)
        )

    def mesh(self, resolution: int = 128, max_faces: int | None = None, texture: int | None = None) -> Mesh:
        """The iso-surface whose silhouette agrees best with the rendered ones, coloured by the field.

        texture: pixels a side of a texture to bake the field's colours into; None colours the vertices.
        Raises DivergedError when the volume holds no surface.
        """
        grid = sample_grid(self.density, resolution, self.radius)
        cameras = self.orbit(8)
        rays = generate_rays(cameras, 96, 96)
        opacity = self.render(cameras, 96).opacity.flatten()
        threshold, _ = silhouette_threshold(grid, self.radius, rays.rays_o, rays.rays_d, opacity)
        mesh = extract_mesh(
            self.density,
            self.colors,
            radius=self.radius,
            threshold=threshold,
            grid=grid,
            max_faces=max_faces,
        )
        return mesh if texture is None else bake_texture(mesh, self.colors, texture)

    @property
    def device(self) -> torch.device:
        return self.renderer.occupancy.ema.device

    def density(self, positions: Tensor) -> Tensor:
        """The field's densities at positions [P, 3] in scene units, [P]."""
        return self.renderer.density(positions.to(self.device))

    def colors(self, positions: Tensor) -> Tensor:
        """The field's colours at positions [P, 3] in scene units, [P, 3] in [0, 1]."""
        return self.renderer.volume(positions.to(self.device))[1]

    def save_glb(
        self, path: Path | str, resolution: int = 128, max_faces: int | None = None, texture: int | None = None
    ) -> Mesh:
        """Writes the mesh (GLB, OBJ or PLY by the ending) and returns it."""
        mesh = self.mesh(resolution, max_faces, texture)
        save_mesh(mesh, path)
        return mesh

    def frames(self, n_frames: int = 120, size: int = 128, elevation_deg: float = 15.0) -> np.ndarray:
        """One turn around the asset, which closes its loop: [n_frames, size, size, 3] uint8."""
        cameras = self.orbit(n_frames, elevation_deg)
        frames = [
            (self.render(Cameras(c[None], f[None]), size).rgb[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
            for c, f in zip(cameras.c2w, cameras.fovy, strict=True)
        ]
        return np.stack([frame.cpu().numpy() for frame in frames])

    def turntable(self, *paths: Path | str, n_frames: int = 120, size: int = 128, elevation_deg: float = 15.0) -> None:
        """Writes an animation of one turn, 30 frames a second, as WebP (or MP4 with the `video` extra)."""
        from mvdream_fast.scene.mesh.animation import save_animation

        frames = self.frames(n_frames, size, elevation_deg)
        for path in paths:
            save_animation(frames, path)

    def state(self) -> dict[str, Tensor]:
        return self.renderer.state_dict()

    def save(self, path: Path | str) -> None:
        """Writes parameters, occupancy and configuration to one safetensors file, whole or not at all."""
        from safetensors.torch import save

        meta = {"kind": "asset", "prompt": self.prompt, "seed": self.seed, "config": dataclasses.asdict(self.config)}
        tensors = {name: value.contiguous().cpu() for name, value in self.state().items()}
        atomic_write(Path(path), save(tensors, {"asset": json.dumps(meta)}))

    @staticmethod
    def load(path: Path | str) -> "Asset":
        """Reads what `save` wrote. Raises ModelError for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads((file.metadata() or {})["asset"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            config = from_dict(SDSConfig, meta["config"], str(path))
            asset = Asset(config, str(meta["prompt"]), int(meta["seed"]))
            asset.restore(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ModelError(f"cannot read the asset {path}: {error}") from error
        return asset

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Loads `state`'s tensors. Raises ModelError when names or shapes differ or a number is not finite."""
        expected = {name: tuple(value.shape) for name, value in self.state().items()}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if expected != found:
            wrong = sorted(set(expected.items()) ^ set(found.items()))
            raise ModelError(f"the saved volume is of another configuration: {wrong[0][0]} {list(wrong[0][1])}")
        for name, value in tensors.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ModelError(f"the saved volume holds numbers that are not finite in {name}")
        self.renderer.load_state_dict(tensors)


def _background(config: SDSConfig) -> torch.nn.Module:
    kind: Literal["learned", "grey", "white"] = config.background
    if kind == "learned":
        return EnvironmentMap(augment_prob=config.background_aug_prob)
    return FixedBackground((FLAT_COLOURS[kind],) * 3)
