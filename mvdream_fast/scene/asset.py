"""A 3D asset: what a text-to-3D run has made, rendered, meshed, saved and loaded. No diffusion here."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, check_cameras, evaluation_cameras, generate_rays
from mvdream_fast.core.arguments import user_path, whole
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.files import atomic_write
from mvdream_fast.core.images import to_bytes
from mvdream_fast.core.machine import choose_device
from mvdream_fast.core.run_folder import read_tensors
from mvdream_fast.scene.base import Representation
from mvdream_fast.scene.kinds import config_from_dict, new_representation
from mvdream_fast.scene.mesh.export import save_mesh
from mvdream_fast.scene.mesh.mesh import Mesh


@dataclasses.dataclass(frozen=True)
class RenderedViews:
    """Rendered images: rgb [V, 3, Hp, Wp] and opacity, depth [V, Hp, Wp]."""

    rgb: Tensor
    opacity: Tensor
    depth: Tensor


Settings = dict[str, Any]


class Asset:
    """A representation with where it came from: prompt, seed, and the settings of its run as JSON can say them."""

    def __init__(
        self, representation: Representation, prompt: str = "", seed: int = 0, settings: Settings | None = None
    ):
        self.representation, self.prompt, self.seed = representation, prompt, seed
        self.settings: Settings = settings or {}

    @property
    def radius(self) -> float:
        """The asset lies in [-radius, radius]^3."""
        return self.representation.radius

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.representation.device

    def to(self, device: torch.device | str) -> "Asset":
        """Moves it to another device, and returns it."""
        self.representation.to(choose_device(device))
        return self

    def orbit(self, n_views: int = 4, elevation_deg: float = 15.0, azimuth_start_deg: float = 0.0) -> Cameras:
        """Evenly spaced evaluation cameras that frame the unit sphere."""
        return evaluation_cameras(n_views, elevation_deg, azimuth_start_deg)

    @torch.no_grad()
    def render(self, cameras: Cameras | None = None, size: int = 256) -> RenderedViews:
        """Images from `cameras` (default: four around the asset), size x size pixels, without gradient."""
        cameras = self.orbit() if cameras is None else check_cameras("Asset.render", cameras)
        size = whole("Asset.render", "size", size, "it counts pixels a side")
        out = self.representation.render(generate_rays(cameras.to(self.device), size, size))
        shape = (len(cameras), size, size)
        return RenderedViews(
            out.rgb.reshape(*shape, 3).permute(0, 3, 1, 2), out.opacity.reshape(shape), out.depth.reshape(shape)
        )

    def mesh(self, resolution: int = 128, max_faces: int | None = None, texture: int | None = None) -> Mesh:
        """Its surface as triangles.

        resolution: points a side of the grid that the surface is taken from. max_faces: at most this many triangles,
        or where the shape allows no so few, as few as there can be; None: as many as is usual for what it is, 30,000 of
        a volume or a surface, all of a mesh that was optimised itself; 0: all of any. texture: pixels a side of a
        texture to bake the colours into; None colours the vertices.
        Raises DivergedError when there is no surface.
        """
        op = "Asset.mesh"
        resolution = whole(op, "resolution", resolution, "128 is the default", 8, 512)
        if max_faces is None:
            max_faces = self.representation.usual_faces
        elif max_faces != 0:
            max_faces = whole(op, "max_faces", max_faces, "0 keeps them all", 4)
        texture = None if texture is None else whole(op, "texture", texture, "None colours the vertices", 16, 8192)
        return self.representation.mesh(resolution, max_faces, texture)

    def save_glb(
        self, path: Path | str, resolution: int = 128, max_faces: int | None = None, texture: int | None = None
    ) -> Mesh:
        """Writes the mesh (GLB, OBJ or PLY by the ending) and returns it."""
        path = user_path(path)
        mesh = self.mesh(resolution, max_faces, texture)
        save_mesh(mesh, path)
        return mesh

    def frames(self, n_frames: int = 120, size: int = 128, elevation_deg: float = 15.0) -> np.ndarray:
        """One turn around the asset, which closes its loop: [n_frames, size, size, 3] uint8."""
        n_frames = whole("Asset.frames", "n_frames", n_frames, "120 is the default")
        cameras = self.orbit(n_frames, elevation_deg)
        frames = [
            to_bytes(self.render(Cameras(c[None], f[None]), size).rgb[0].movedim(0, -1))
            for c, f in zip(cameras.c2w, cameras.fovy, strict=True)
        ]
        return np.stack(frames)

    def turntable(self, *paths: Path | str, n_frames: int = 120, size: int = 128, elevation_deg: float = 15.0) -> None:
        """Writes an animation of one turn, 30 frames a second, as WebP (or MP4 with the `video` extra)."""
        from mvdream_fast.scene.mesh.animation import save_animation

        places = [user_path(path) for path in paths]
        frames = self.frames(n_frames, size, elevation_deg)
        for path in places:
            save_animation(frames, path)

    def state(self) -> dict[str, Tensor]:
        """The representation's tensors, live."""
        return self.representation.state()

    def save(self, path: Path | str) -> None:
        """Writes the representation and the settings to one safetensors file, whole or not at all."""
        from safetensors.torch import save

        meta = {"kind": "asset", "prompt": self.prompt, "seed": self.seed, "config": self.settings}
        tensors = {name: value.contiguous().cpu() for name, value in self.state().items()}
        atomic_write(path, save(tensors, {"asset": json.dumps(meta)}))

    @staticmethod
    def load(path: Path | str) -> "Asset":
        """Reads what `save` wrote. Raises ModelError for anything else."""
        from safetensors import SafetensorError

        path = user_path(path)
        try:
            tensors, meta = read_tensors(Path(path), "asset")
            config, seed = config_from_dict(dict(meta["config"]), str(path)), int(meta["seed"])
            asset = Asset(new_representation(config, seed), str(meta["prompt"]), seed, meta["config"])
            asset.representation.restore(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ModelError(f"cannot read the asset {path}: {error}") from error
        return asset
