"""Volume, occupancy grid and background put together: rays in, colours, opacities and depths out.

Training marches with jitter, prunes without gradient, and evaluates the field with gradient on the kept samples only;
evaluation renders in chunks without gradient. The field, its losses and its optimiser are the caller's.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mvdream_fast.core import memory, reads
from mvdream_fast.core.rng import Stream
from mvdream_fast.ops.composite import composite_samples
from mvdream_fast.ops.march_rays import Samples, join_samples, march_rays, prune_samples
from mvdream_fast.ops.render import render
from mvdream_fast.scene.background import seen_behind
from mvdream_fast.scene.base import Lighting, Rendered
from mvdream_fast.scene.nerf.config import rays_at_once
from mvdream_fast.scene.nerf.occupancy import OccupancyGrid, default_step_size
from mvdream_fast.scene.shading import ALBEDO, Shading, analytic_normals, finite_difference_normals, shade

if TYPE_CHECKING:
    from mvdream_fast.camera import Rays

NORMALS = ("none", "analytic", "finite_difference")
_RAYS_PER_PRUNE = 8192  # on a CPU


@dataclass(frozen=True)
class VolumeRendered(Rendered):
    """A rendered batch of rays.

    n_samples: samples whose field was evaluated with gradient (training) or at all.
    Only in training: z_variance [R], weights [S], samples, positions [S, 3], normals [S, 3] if the renderer makes them,
    n_marched (samples before pruning), and step_scale (1; larger where the cap on samples coarsened the step).
    """

    n_samples: int
    z_variance: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    samples: Samples | None = None
    positions: torch.Tensor | None = None
    normals: torch.Tensor | None = None
    n_marched: int = 0
    step_scale: int = 1


class Renderer(nn.Module):
    """Renders a volume inside its occupancy grid, in front of a background.

    volume: positions [P, 3] -> (sigmas [P], rgb [P, 3]); its `density` method (positions -> [P]), if it has one, serves
    pruning and finite differences. background: rays_d [R, 3], stream, training -> [R, 3].
    normals: "none", "analytic" (needs a field that can be differentiated twice) or "finite_difference".
    max_samples: cap on the samples of one training call; a call above it marches again with a doubled step, up to 64
    times the step, and then keeps the nearest samples of every ray. `n_capped` counts such calls.
    """

    def __init__(
        self,
        volume: nn.Module,
        occupancy: OccupancyGrid,
        background: nn.Module,
        n_samples_per_ray: int = 512,
        normals: str = "none",
        normal_eps: float = 0.01,
        alpha_thre: float = 0.01,
        early_stop_eps: float = 1e-4,
        max_samples: int | None = None,
        near: float = 0.0,
        far: float = float("inf"),
    ):
        super().__init__()
        if normals not in NORMALS:
            raise ValueError(f"Renderer: normals must be one of {', '.join(NORMALS)}, got {normals!r}; pick one")
        self.volume, self.occupancy, self.background = volume, occupancy, background
        self.step_size = default_step_size(occupancy.radius, n_samples_per_ray)
        self.normals, self.normal_eps = normals, normal_eps
        self.alpha_thre, self.early_stop_eps = alpha_thre, early_stop_eps
        self.max_samples, self.near, self.far = max_samples, near, far
        self.n_capped = 0
        self.most_rays: int | None = None  # marched at once where reads wait; None for as many as memory allows

    def forward(
        self,
        rays: "Rays",
        stream: Stream | None = None,
        training: bool = False,
        shading: Shading = ALBEDO,
        lights: torch.Tensor | None = None,
        plain: torch.Tensor | None = None,
        behind: Stream | None = None,
    ) -> VolumeRendered:
        """Render rays [R]. Training needs a stream (jitter, background); shading needs lights, [R, 3] or [3]; the rest
        is as in `Lighting`.

        Evaluation shows the albedo in front of the learned background: all of `Lighting` is ignored there.
        """
        if not training:
            return self._evaluate(rays)
        if stream is None:
            raise ValueError("Renderer: stream must be a Stream in training, got None; pass rng.Stream(...)")
        if shading.needs_normals and (self.normals == "none" or lights is None):
            raise ValueError(
                f"Renderer: shading must be plain albedo without normals or lights, got {shading}; "
                "build the renderer with normals and pass lights"
            )
        return self._train(rays, stream, Lighting(shading, lights, plain, behind))

    def density(self, positions: torch.Tensor) -> torch.Tensor:
        """Densities of positions [P, 3] in scene units, [P]."""
        density = getattr(self.volume, "density", None)
        return self.volume(positions)[0] if density is None else density(positions)

    @torch.no_grad()
    def _evaluate(self, rays: "Rays") -> VolumeRendered:
        grid = self.occupancy
        background = self.background(rays.rays_d)
        out = render(
            *(rays.rays_o, rays.rays_d, self.volume, grid.aabb, grid.bits, grid.resolution, self.step_size),
            *(background, self.near, self.far, min(self.alpha_thre, grid.mean), self.early_stop_eps),
        )
        return VolumeRendered(out.rgb, out.opacity, out.depth, out.n_samples)

    def _train(self, rays: "Rays", stream: Stream, lighting: Lighting) -> VolumeRendered:
        jitter = stream.uniform(rays.rays_o.shape[0], device=rays.rays_o.device)
        samples, n_marched, step_scale = self._sample(rays, jitter)
        positions = samples.positions(rays.rays_o, rays.rays_d).detach()
        positions.requires_grad_(self.normals == "analytic")
        sigmas, rgb = self.volume(positions)
        normals = self._normals(sigmas, positions)
        if lighting.shading is not ALBEDO:
            rgb = self._shade(rgb, normals, positions, samples, lighting)
        background = seen_behind(self.background, rays.rays_d, stream, lighting)
        out = composite_samples(sigmas, rgb, samples, background)
        return VolumeRendered(
            *(out.rgb, out.opacity, out.depth, samples.n_samples, out.z_variance, out.weights),
            *(samples, positions.detach(), normals, n_marched, step_scale),
        )

    def _sample(self, rays: "Rays", jitter: torch.Tensor) -> tuple[Samples, int, int]:
        """The samples to evaluate with gradient, how many were marched for them, and the factor on the step."""
        scale, (samples, n_marched) = 1, self._march_and_prune(rays, jitter, 1)
        if self.max_samples is None or samples.n_samples <= self.max_samples:
            return samples, n_marched, scale
        self.n_capped += 1
        while samples.n_samples > self.max_samples and scale < 64:
            scale *= 2
            samples, n_marched = self._march_and_prune(rays, jitter, scale)
        if samples.n_samples > self.max_samples:
            order = torch.arange(samples.n_samples, device=jitter.device)
            nearest = order - samples.packed_info[samples.ray_indices, 0]
            samples = samples.select(nearest < self.max_samples // samples.n_rays)
        return samples, n_marched, scale

    @torch.no_grad()
    def _march_and_prune(self, rays: "Rays", jitter: torch.Tensor, scale: int) -> tuple[Samples, int]:
        """In blocks of rays, so that the samples before pruning are never all in memory; on a GPU, which each block
        waits for twice (how many samples were marched, how many are left), in one where memory allows."""
        grid, mean = self.occupancy, self.occupancy.mean_later()
        parts, n_marched, size = [], 0, self._rays_per_prune(rays.rays_o.device)
        for i in range(0, max(rays.rays_o.shape[0], 1), size):
            rays_o, rays_d, part = (x[i : i + size] for x in (rays.rays_o, rays.rays_d, jitter))
            marched = march_rays(
                *(rays_o, rays_d, grid.aabb, grid.bits, grid.resolution, self.step_size * scale),
                *(part, self.near, self.far),
            )
            n_marched += marched.n_samples
            sigmas = self._marched_sigmas(marched, rays_o, rays_d)
            # Asked for only now: the march has waited for its own numbers, so the mean, sent before, is there.
            parts.append(prune_samples(marched, sigmas, min(self.alpha_thre, mean()), self.early_stop_eps))
        return join_samples(parts) if len(parts) > 1 else parts[0], n_marched

    def _marched_sigmas(self, marched: Samples, rays_o: torch.Tensor, rays_d: torch.Tensor) -> torch.Tensor:
        return self.density(marched.positions(rays_o, rays_d))

    def _rays_per_prune(self, device: torch.device) -> int:
        if not reads.reads_wait(device):
            return _RAYS_PER_PRUNE
        most = math.ceil(2 * 3**0.5 * self.occupancy.radius / self.step_size)  # samples along the box's diagonal
        fitting = rays_at_once(memory.total(str(device)), most)
        return max(_RAYS_PER_PRUNE, fitting if self.most_rays is None else min(fitting, self.most_rays))

    def _normals(self, sigmas: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        if self.normals == "analytic":
            return analytic_normals(sigmas, positions)
        if self.normals == "finite_difference":
            return finite_difference_normals(self.density, positions, self.normal_eps)
        return None

    def _shade(self, rgb, normals, positions, samples: Samples, lighting: Lighting) -> torch.Tensor:
        lights = lighting.lights
        if not lighting.shading.needs_normals or lights is None:
            normals, lights = torch.zeros_like(positions), torch.zeros(3, device=positions.device)
        lights = lights.expand(samples.n_rays, 3)[samples.ray_indices]
        lit = shade(rgb, normals, positions.detach(), lights, lighting.shading)
        return lit if lighting.plain is None else torch.where(lighting.plain[samples.ray_indices][:, None], rgb, lit)
