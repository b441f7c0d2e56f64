"""The renderer's part of a training step: march, prune, field, composite and all gradients of four views."""

import functools

import distillations
import pytest
import torch
from contest import even, faster, memory_a, size, sizes
from scenes import FIELD_FLOP, GATHERED_A_SAMPLE, GRADIENT_A_SAMPLE, grid_of, rays_of

from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.background import EnvironmentMap
from mvdream_fast.scene.nerf.occupancy import OccupancyGrid
from mvdream_fast.scene.nerf.renderer import Renderer
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig


def step(config: VolumeConfig, side: int, share: str | None):
    """Four views of side x side; the grid is what the volume's densities make of it, or a share of it."""
    torch.manual_seed(0)  # the background's weights are drawn from torch's own generator
    volume, rays = Volume(config), rays_of(4, side)
    renderer = Renderer(volume, OccupancyGrid(), EnvironmentMap(), alpha_thre=0.0 if share else 0.01)
    renderer = renderer.to(rays.rays_o.device)
    if share:
        renderer.occupancy.bits.copy_(grid_of(share))
    else:
        renderer.occupancy.update(0, volume.density, Stream(0, 0, "occupancy"))

    def call():
        volume.zero_grad()
        out = renderer(rays, Stream(0, 1, "render"), training=True)
        out.rgb.sum().backward()
        return out

    return call


def work(n_samples: int, config: VolumeConfig) -> dict[str, float]:
    held = 4 * sum(p.numel() for p in Volume(config).parameters())
    return {
        "samples": n_samples,
        "flop": GRADIENT_A_SAMPLE * FIELD_FLOP * n_samples,
        "gathered_bytes": GRADIENT_A_SAMPLE * GATHERED_A_SAMPLE * n_samples,
        "bytes": 120 * n_samples,
        "held_bytes": held,
    }


def colors(out):
    return out.rgb


@pytest.mark.parametrize("name", ["paper", "mini"])
def bench_nerf_step(contest, name):
    config, side = getattr(VolumeConfig, name)(), size(64, 4)
    make = functools.partial(step, config, side, None)
    n_samples = make()().n_samples
    contest.run(f"NeRF step 4x{side}x{side} {name}", "step", {"ours": make}, work=work(n_samples, config), seen=colors)


def bench_beside_plain_torch(contest):
    """The ops' references in the same renderer, at a size that they have memory for."""
    config, side = VolumeConfig.mini(), size(16, 4)
    make = functools.partial(step, config, side, None)
    contest.run(
        f"NeRF step 4x{side}x{side} mini, plain torch",
        "step",
        {"reference": functools.partial(distillations.in_plain_torch, make), "ours": make},
        work=work(make()().n_samples, config),
        goals=[faster(5, "reference")],
        seen=colors,
        tolerance=1e-2,  # which samples are pruned is decided by sums that round otherwise
    )


@pytest.mark.parametrize(
    ("share", "side"),
    sizes([("10 %", 64), ("10 %", 128), pytest.param("full", 64, marks=pytest.mark.slow)], [("full", 4)]),
)
def bench_memory(contest, share, side):
    """Bytes a sample that is evaluated with gradient, beyond parameters and gradients: thin everywhere, so that rays
    keep all samples that the grid allows. Up to 40 MB of it are the field's scratch, however few the samples."""
    config = size(VolumeConfig(bias_scale=0.0), VolumeConfig.mini())
    make = functools.partial(step, config, side, share)
    n_samples = make()().n_samples
    contest.run(
        f"NeRF step memory, 4x{side}x{side}, grid {share}",
        "step",
        {"ours": make},
        work=work(n_samples, config),
        goals=[memory_a("samples", 64)],
        seen=colors,
    )


def bench_resolution(contest):
    """By pixels of the four views."""
    config, sides = VolumeConfig.mini(), sizes((16, 32, 64), (2, 4))
    pixels = [4 * side * side for side in sides]
    contest.scale(
        "NeRF step mini by pixels",
        "step",
        "pixels",
        {n: {"ours": functools.partial(step, config, side, None)} for n, side in zip(pixels, sides, strict=True)},
        goals=[even("pixels", pixels[0], pixels[-1], 1.5)],
        seen=colors,
    )


def bench_views(contest):
    """By views of 32 x 32: four more are four times one, but for what a step costs by itself."""
    config, side = VolumeConfig.mini(), size(32, 2)
    volume = Volume(config)
    renderer = Renderer(volume, OccupancyGrid(), EnvironmentMap())

    def make(n_views: int):
        rays = rays_of(n_views, side)

        def call():
            with torch.no_grad():
                return renderer(rays, Stream(0, 1, "render"))

        return call

    device = rays_of(1, 1).rays_o.device
    renderer.to(device).occupancy.update(0, volume.density, Stream(0, 0, "occupancy"))
    counts = sizes((1, 4, 16), (1, 2))
    contest.scale(
        "NeRF views", "forward", "views", {n: {"ours": functools.partial(make, n)} for n in counts}, seen=colors
    )
