"""A surface's share of a training step beside a volume's: render, losses, gradients; and its slopes by either way."""

import functools

import distillations
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


def step(config, lit: bool, side: int):
    """Four views of what there is at the start, with an occupancy grid that knows it; the loss."""
    representation = new_representation(config, 0, lit)
    representation.after_step(0, Stream(0, 0, "occupancy"))
    rays = generate_rays(evaluation_cameras(4), side, side)
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
    """Three shapes: each answers for itself. Ours beside plain torch is the next contest."""
    goals = [slower(2, "ours, volume", name) for name in CONFIGS if name != "ours, volume"]
    contest.run(
        f"surface step {'lit' if lit else 'albedo'}",
        "step",
        [Contestant(name, functools.partial(step, config, lit, SIDE), case=name) for name, config in CONFIGS.items()],
        work={"pixels": 4 * SIDE**2},
        goals=goals,
    )


def bench_beside_plain_torch(contest):
    """NeuS with the ops' references in the same renderer, at a size that they have memory for."""
    side = size(16, 4)
    make = functools.partial(step, CONFIGS["ours, NeuS"], False, side)
    contest.run(
        f"surface step 4x{side}x{side} NeuS, plain torch",
        "step",
        {"reference": functools.partial(distillations.in_plain_torch, make), "ours": make},
        work={"pixels": 4 * side**2},
        goals=[faster(5, "reference")],
        tolerance=1e-2,  # which samples are pruned is decided by sums that round otherwise
    )


@pytest.mark.parametrize("volume", ["mini", "paper"])
def bench_slopes(contest, volume):
    """The gradient of the eikonal loss: six distances a point, or derivatives of derivatives, each beside plain torch
    at mini's size. Their values are two definitions of a slope, which tests/scene/surface compares."""
    field = SignedDistance(SurfaceConfig(volume=volume))
    positions = torch.rand(N_POINTS, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():  # a sphere's slopes are 1, and its loss is what rounding leaves
        last = field.density_weights[-1]
        last.copy_(torch.randn(last.shape, generator=torch.Generator().manual_seed(1)))
        field.table.copy_(torch.randn(field.table.shape, generator=torch.Generator().manual_seed(2)) / 10)
    leaves = [field.table, *field.density_weights]

    def make(mode):
        def call():
            loss = (field.gradients(positions, mode).norm(dim=-1) - 1).square().mean()
            return loss, torch.autograd.grad(loss, leaves)

        return call

    def plain(mode):
        return distillations.in_plain_torch(lambda: make(mode))

    modes = {"analytic": "analytic", "finite difference": "finite_difference"}
    by_name = {"reference": plain, "ours": make} if volume == "mini" else {"ours": make}
    contest.run(
        f"slopes of {N_POINTS} points, {volume}",
        "forward+backward",
        [
            Contestant(f"{name}, {told}", functools.partial(build, mode), case=mode)
            for told, mode in modes.items()
            for name, build in by_name.items()
        ],
        work={"points": N_POINTS},
        goals=[faster(3, *(f"ours, {told}" for told in modes))],
        tolerance=1e-3,
    )
