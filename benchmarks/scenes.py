"""What the renderer's benches draw: rays of cameras around the box, grids of occupied cells, a ball, a mesh.

A tenth of the grid is a ball in the middle, as an object is. The grid and the box are the paper's.
"""

import math

import torch
from peers import DEVICE

from mvdream_fast import ops
from mvdream_fast.camera import Rays, generate_rays, orbit_cameras
from mvdream_fast.ops.march_rays import Samples, pack_bits
from mvdream_fast.scene.nerf.occupancy import default_step_size
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig

STEP, BOX, CELLS = default_step_size(1.0), (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0), 32
INSIDE = 0.999  # of a box: at its far faces a dense level wraps around, which Dr.Jit's and our paddings make differ
GRADIENT_A_SAMPLE, GATHERED_A_SAMPLE = 3, 16 * 8 * 8  # times the forward's arithmetic; levels, vertices, bytes
FIELD_FLOP = 2 * (2 * 32 * 64 + 64 * (1 + 3))  # the paper's two networks at one sample


def rays_of(n_views: int, side: int) -> Rays:
    rays = generate_rays(orbit_cameras(n_views, distance=3.0, fovy_deg=40.0), side, side)
    return Rays(rays.rays_o.to(DEVICE), rays.rays_d.to(DEVICE))


def grid_of(share: str) -> torch.Tensor:
    """Bits of a `full` grid, or of the ball that holds `10 %` of the box."""
    centres = (torch.arange(CELLS) + 0.5) / CELLS * 2 - 1
    radius = torch.stack(torch.meshgrid(centres, centres, centres, indexing="ij")).norm(dim=0)
    return pack_bits(radius < (0.576 if share == "10 %" else 9))


def marched(n_views: int, side: int, share: str) -> Samples:
    rays = rays_of(n_views, side)
    return ops.march_rays(rays.rays_o, rays.rays_d, BOX, grid_of(share).to(DEVICE), CELLS, STEP)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform numbers in [0, 1), the same on every device."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Ball(torch.nn.Module):
    """A volume with a hard ball in it, whatever its parameters say: rays end where a surface would end them."""

    def __init__(self, config: VolumeConfig):
        super().__init__()
        self.volume = Volume(config)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigmas, rgb = self.volume(positions)
        return sigmas * 0 + 100.0 * (positions.norm(dim=-1) < 0.5), rgb


def sphere(n_faces: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip space [V, 4] and triangles [F, 3] of a sphere that fills two thirds of the image."""
    n_rings = max(3, math.isqrt(n_faces // 4))
    theta = (torch.arange(n_rings + 1) / n_rings * math.pi)[:, None]
    phi = torch.arange(2 * n_rings) / n_rings * math.pi
    x, y, z = theta.sin() * phi.cos(), theta.cos().expand(-1, 2 * n_rings), theta.sin() * phi.sin()
    w = 3 - z
    pos = torch.stack([2.6 * x, 2.6 * y, 2 * w - 4.5, w], -1).reshape(-1, 4)
    ring, around = (
        t.reshape(-1) for t in torch.meshgrid(torch.arange(n_rings), torch.arange(2 * n_rings), indexing="ij")
    )
    after = (around + 1) % (2 * n_rings)
    a, b = ring * 2 * n_rings + around, ring * 2 * n_rings + after
    c, d = a + 2 * n_rings, b + 2 * n_rings
    tri = torch.cat([torch.stack([a, b, c], -1), torch.stack([b, d, c], -1)]).int()
    return pos.to(DEVICE), tri.to(DEVICE)
