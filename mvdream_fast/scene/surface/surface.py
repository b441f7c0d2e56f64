"""The surface as a representation: a signed distance with its occupancy and a background, rendered by the opacity of
the pieces of rays near its zero level.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mvdream_fast.camera import Rays
from mvdream_fast.core import reads
from mvdream_fast.core.ramp import ramp
from mvdream_fast.core.rng import Stream
from mvdream_fast.ops.composite import composite_samples
from mvdream_fast.ops.march_rays import Samples
from mvdream_fast.scene.background import seen_behind
from mvdream_fast.scene.base import Lighting, Rendered, Statistic
from mvdream_fast.scene.losses import eikonal_loss
from mvdream_fast.scene.mesh.mesh import Mesh, extract_mesh
from mvdream_fast.scene.mesh.texture import bake_texture
from mvdream_fast.scene.nerf.nerf import Nerf
from mvdream_fast.scene.nerf.renderer import VolumeRendered
from mvdream_fast.scene.shading import ALBEDO
from mvdream_fast.scene.surface.config import SurfaceConfig
from mvdream_fast.scene.surface.distance import SignedDistance
from mvdream_fast.scene.surface.opacity import Nodes, density_of, nodes_of, optical_depths

EIKONAL_NODES, EIKONAL_ANYWHERE = 4096, 1024  # points of a step where the slope is looked at: on rays, and in the box
OPAQUE = 12.0  # where a ray has come so many standard deviations below the surface, exp(-12) of it are left


@dataclass(frozen=True)
class SurfaceRendered(VolumeRendered):
    """A rendered batch of rays; in training also points [E, 3], some of those on the rays and some of the whole box.

    positions [N, 3] are the samples' ends, normals [S, 3] the means of those at both ends.
    """

    points: Tensor | None = None


class Surface(Nerf):
    """A Representation (scene/base.py): a NeRF whose opacity comes from a signed distance that it learns.

    The field is asked at the ends of the samples, which neighbours share: two of them make the opacity of a sample, the
    mean of their colours its colour. Nothing is rendered differently without gradients, but the jitter.

    Args: normals: how they are made, "none", "finite_difference" or "analytic"; it can be shaded only with them.
    Source: Wang et al. 2021, "NeuS", arXiv 2106.10689; Tsalicoglou et al. 2023, "TextMesh", arXiv 2304.12439.
    """

    volume: SignedDistance
    config: SurfaceConfig
    steps_done: Tensor  # [1] int64

    def __init__(self, config: SurfaceConfig, stream: Stream | None = None, normals: str = "none"):
        super().__init__(config, stream, normals)
        self.register_buffer("steps_done", torch.zeros(1, dtype=torch.int64))
        self._slope: reads.Later | None = None
        self._set_step(0)

    def _new_volume(self, config: SurfaceConfig, stream: Stream | None) -> SignedDistance:
        return SignedDistance(config, stream)

    def _set_step(self, step: int) -> None:
        """Levels and annealing as they are for a training step of this number."""
        self.steps_done.fill_(step)
        self._step = step
        self.volume.n_active = min(int(ramp(self.config.sdf_levels, step) + 1e-6), self.volume.config.n_levels)
        self.cos_ratio = ramp(self.config.cos_anneal, step)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of a volume, and the deviation."""
        return [*super().parameter_groups(), {"params": [self.volume.deviation], "lr": self.config.lr_deviation}]

    def regularizers(self, rendered: Rendered, rays: Rays, step: int) -> Tensor:
        """Those of a volume, and that of Eikonal: the distance grows by one a unit of length."""
        total, weight = super().regularizers(rendered, rays, step), ramp(self.config.lambda_eikonal, step)
        if not weight or not isinstance(rendered, SurfaceRendered) or rendered.points is None:
            return total
        slopes = torch.linalg.vector_norm(self.volume.gradients(rendered.points, self.config.sdf_normals), dim=-1)
        self._slope = reads.Later(slopes.detach().mean(0, keepdim=True))
        return total + weight * eikonal_loss(slopes)

    def after_step(self, step: int, stream: Stream) -> None:
        """Bounds the deviation, updates the occupancy grid, opens levels, and anneals, where it is time."""
        self.volume.deviation.data.clamp_(min=ramp(self.config.deviation_least, step))
        self.occupancy.update(step, self._densest_near, stream)
        self._set_step(step + 1)

    def _densest_near(self, positions: Tensor) -> Tensor:
        """The largest density [P] within half a cell's diagonal of positions [P, 3], if the slope is 1: what there is
        of a surface in a cell may be next to nothing. 0 where all of that lies so deep that no ray comes there."""
        reach = 3**0.5 * self.radius / self.occupancy.resolution
        distances, inverse_std = self.volume.distances(positions), self.volume.inverse_std
        density = density_of(self.config.sdf_opacity, distances - reach, inverse_std)
        return density.masked_fill(distances + reach < -OPAQUE / inverse_std, 0.0)

    def statistics(self) -> dict[str, Statistic]:
        """Those of a volume; the standard deviation around the surface, the active levels, and the mean slope where the
        last step's loss looked."""
        deviation = reads.Later(1 / self.volume.inverse_std.detach())
        own: dict[str, Statistic] = {"deviation": lambda: deviation.get()[0], "levels": float(self.volume.n_active)}
        slope = self._slope
        if slope is not None:
            own["slope"] = lambda: slope.get()[0]
        return super().statistics() | own

    def restart(self, seed: int) -> None:
        """Takes the values of a fresh surface of this seed, at this step."""
        step = self._step
        super().restart(seed)
        self._set_step(step)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Raises ModelError when names or shapes differ or a number is not finite."""
        super().restore(tensors)
        self._set_step(reads.read(self.steps_done)[0])

    def mesh(self, resolution: int = 128, max_faces: int | None = None, texture: int | None = None) -> Mesh:
        """The zero level, coloured by the field."""
        mesh = extract_mesh(
            lambda positions: -self.volume.distances(positions.to(self.device)),
            self.colors,
            radius=self.radius,
            threshold=0.0,
            resolution=resolution,
            max_faces=max_faces,
        )
        return mesh if texture is None else bake_texture(mesh, self.colors, texture)

    def _marched_sigmas(self, marched: Samples, rays_o: Tensor, rays_d: Tensor) -> Tensor:
        nodes = nodes_of(marched)
        return self._sigmas(self.volume.distances(nodes.points.positions(rays_o, rays_d)), nodes, marched)

    def _sigmas(self, distances: Tensor, nodes: Nodes, samples: Samples) -> Tensor:
        """The samples' densities [S] that give them their opacities, of the distances at the nodes [N]."""
        lengths = samples.t_ends - samples.t_starts
        ends = nodes.starts(distances), nodes.ends(distances)
        inverse_std, kind = self.volume.inverse_std, self.config.sdf_opacity
        return optical_depths(kind, *ends, lengths, inverse_std, self.cos_ratio) / lengths

    @torch.no_grad()
    def _evaluate(self, rays: Rays) -> VolumeRendered:
        parts, size, jitter = [], self._rays_per_prune(rays.rays_o.device), rays.rays_o.new_zeros(len(rays.rays_o))
        for i in range(0, max(len(rays.rays_o), 1), size):
            part = Rays(rays.rays_o[i : i + size], rays.rays_d[i : i + size])
            samples, _ = self._march_and_prune(part, jitter[i : i + size], 1)
            nodes = nodes_of(samples)
            distances, rgb = self.volume.distances_and_colors(nodes.points.positions(part.rays_o, part.rays_d))
            sigmas, background = self._sigmas(distances, nodes, samples), self.background(part.rays_d)
            parts.append((composite_samples(sigmas, nodes.means(rgb), samples, background), len(distances)))
        whole = [torch.cat([getattr(out, name) for out, _ in parts]) for name in ("rgb", "opacity", "depth")]
        return VolumeRendered(*whole, n_samples=sum(n for _, n in parts))

    def _train(self, rays: Rays, stream: Stream, lighting: Lighting) -> SurfaceRendered:
        jitter = stream.uniform(rays.rays_o.shape[0], device=rays.rays_o.device)
        samples, n_marched, step_scale = self._sample(rays, jitter)
        nodes = nodes_of(samples)
        positions = nodes.points.positions(rays.rays_o, rays.rays_d).detach()
        distances, rgb = self.volume.distances_and_colors(positions)
        normals = None
        if self.normals != "none":
            normals = normalize(self.volume.gradients(positions, self.normals), dim=-1)
        if lighting.shading is not ALBEDO:
            rgb = self._shade(rgb, normals, positions, nodes.points, lighting)
        background = seen_behind(self.background, rays.rays_d, stream, lighting)
        out = composite_samples(self._sigmas(distances, nodes, samples), nodes.means(rgb), samples, background)
        return SurfaceRendered(
            *(out.rgb, out.opacity, out.depth, len(positions), out.z_variance, out.weights, samples, positions),
            None if normals is None else normalize(nodes.means(normals), dim=-1),
            *(n_marched, step_scale, self._points(positions, stream)),
        )

    def _points(self, positions: Tensor, stream: Stream) -> Tensor:
        device = positions.device
        box = stream.uniform(EIKONAL_ANYWHERE, 3, low=-self.radius, high=self.radius, device=device)
        if not len(positions):
            return box
        drawn = (stream.uniform(EIKONAL_NODES, device=device) * len(positions)).long().clamp(max=len(positions) - 1)
        return torch.cat([positions[drawn], box])
