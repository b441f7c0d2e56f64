"""A surface's share of a training step beside a volume's: render, losses, gradients; and its slopes by either way."""

import functools

import pytest
import torch
from contest import faster, size, slower
from contestants import Contestant

from mvdream_fast.camera import evaluation_cameras, generate_rays
from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.base import Lighting
from mvdream_fast.scene.kinds import new_representation
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.shading import Shading
from mvdream_fast.scene.surface.config import SurfaceConfig
from mvdream_fast.scene.surface.distance import SignedDistance

SIDE, N_POINTS = size(64, 4), size(5120, 16)
COMMON = {"volume": "mini", "background": "grey", "samples_per_ray": size(128, 16)}
WHOLE = {"sdf_levels": (0.0, 12.0, 12.0, 0.0), "cos_anneal": (0.0, 1.0, 1.0, 0.0)}
CONFIGS = {
    "ours, volume": NerfConfig(**COMMON),
    "ours, NeuS": SurfaceConfig(**COMMON, **WHOLE),
    "ours, VolSDF": SurfaceConfig(**COMMON, **WHOLE, sdf_opacity="volsdf"),
}


def step(config, lit: bool):
    """Four views of what there is at the start, with an occupancy grid that knows it."""
    representation = new_representation(config, 0, lit)
    representation.after_step(0, Stream(0, 0, "occupancy"))
    rays = generate_rays(evaluation_cameras(4), SIDE, SIDE)
    lights = torch.tensor([[0.0, -3.0, 1.0]]).expand(len(rays.rays_o), 3)
    lighting = Lighting(Shading(0.9, 0.1), lights) if lit else None
    leaves = [p for group in representation.parameter_groups() for p in group["params"]]

    def call():
        out = representation.render(rays, Stream(0, 1, "render"), True, lighting)
        total = out.rgb.sum() + representation.regularizers(out, rays, 1)
        torch.autograd.grad(total, leaves, allow_unused=True)
        return total

    return call


@pytest.mark.parametrize(
    "lit", [pytest.param(False, id="albedo"), pytest.param(True, id="lit", marks=pytest.mark.slow)]
)
def bench_surface_step(contest, lit):
    """Three shapes: each answers for itself."""
    goals = [slower(2, "ours, volume", name) for name in CONFIGS if name != "ours, volume"]
    contest.run(
        f"surface step {'lit' if lit else 'albedo'}",
        "step",
        [Contestant(name, functools.partial(step, config, lit), case=name) for name, config in CONFIGS.items()],
        work={"pixels": 4 * SIDE**2},
        goals=goals,
    )


@pytest.mark.parametrize("volume", ["mini", "paper"])
def bench_slopes(contest, volume):
    """The gradient of the eikonal loss: six distances a point, or derivatives of derivatives. Their values are
    two definitions of a slope, which tests/scene/surface compares."""
    field = SignedDistance(SurfaceConfig(volume=volume))
    positions = torch.rand(N_POINTS, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    leaves = [field.table, *field.density_weights]

    def make(mode):
        def call():
            loss = (field.gradients(positions, mode).norm(dim=-1) - 1).square().mean()
            torch.autograd.grad(loss, leaves)
            return loss

        return call

    names = {"ours, analytic": "analytic", "ours, finite difference": "finite_difference"}
    contest.run(
        f"slopes of {N_POINTS} points, {volume}",
        "forward+backward",
        [Contestant(name, functools.partial(make, mode), case=mode) for name, mode in names.items()],
        work={"points": N_POINTS},
        goals=[faster(3, *names)],
    )
