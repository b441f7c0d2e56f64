"""A surface's share of a training step beside a volume's: render, losses, gradients; and its slopes by either way."""

import pytest
import torch

from mvdream_fast.camera import evaluation_cameras, generate_rays
from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.base import Lighting
from mvdream_fast.scene.kinds import new_representation
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.shading import Shading
from mvdream_fast.scene.surface.config import SurfaceConfig
from mvdream_fast.scene.surface.distance import SignedDistance

pytestmark = pytest.mark.usefixtures("threads")
SIZE, N_POINTS = 64, 5120
COMMON = {"volume": "mini", "background": "grey", "samples_per_ray": 128}
WHOLE = {"sdf_levels": (0.0, 12.0, 12.0, 0.0), "cos_anneal": (0.0, 1.0, 1.0, 0.0)}
CONFIGS = {
    "volume": NerfConfig(**COMMON),
    "neus": SurfaceConfig(**COMMON, **WHOLE),
    "volsdf": SurfaceConfig(**COMMON, **WHOLE, sdf_opacity="volsdf"),
}


@pytest.mark.parametrize("lit", [False, True], ids=["albedo", "lit"])
@pytest.mark.parametrize("name", CONFIGS)
def bench_surface_step(benchmark, name, lit):
    """Four views of SIZE x SIZE of what there is at the start, with an occupancy grid that knows it."""
    representation = new_representation(CONFIGS[name], 0, lit)
    representation.after_step(0, Stream(0, 0, "occupancy"))
    rays = generate_rays(evaluation_cameras(4), SIZE, SIZE)
    lights = torch.tensor([[0.0, -3.0, 1.0]]).expand(len(rays.rays_o), 3)
    lighting = Lighting(Shading(0.9, 0.1), lights) if lit else None
    leaves = [p for group in representation.parameter_groups() for p in group["params"]]

    def call():
        out = representation.render(rays, Stream(0, 1, "render"), True, lighting)
        total = out.rgb.sum() + representation.regularizers(out, rays, 1)
        torch.autograd.grad(total, leaves, allow_unused=True)

    call()
    benchmark.group = f"surface_step {'lit' if lit else 'albedo'}"
    benchmark.pedantic(call, rounds=2 if lit else 5)


@pytest.mark.parametrize("mode", ["finite_difference", "analytic"])
@pytest.mark.parametrize("volume", ["mini", "paper"])
def bench_slopes(benchmark, volume, mode):
    """The gradient of the eikonal loss at N_POINTS: six distances each, or derivatives of derivatives."""
    field = SignedDistance(SurfaceConfig(volume=volume))
    positions = torch.rand(N_POINTS, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    leaves = [field.table, *field.density_weights]

    def call():
        loss = (field.gradients(positions, mode).norm(dim=-1) - 1).square().mean()
        torch.autograd.grad(loss, leaves)

    call()
    benchmark.group = f"slopes {volume}"
    benchmark.pedantic(call, rounds=3)
