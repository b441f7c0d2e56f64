"""Marching, compositing and rendering with a tenth of the grid occupied and all of it, references beside ours.

A tenth is a ball in the middle, as an object is. Rays are those of four cameras around it. The field of `render` is a
fresh paper-size volume made dense inside the ball, so that rays end where a surface would end them.
"""

import statistics

import pytest
import torch
from reference.memory import peak_memory, settled_memory

from mvdream_fast import ops
from mvdream_fast.camera import generate_rays, orbit_cameras
from mvdream_fast.core.rng import Stream
from mvdream_fast.ops.march_rays import pack_bits
from mvdream_fast.scene.background import EnvironmentMap
from mvdream_fast.scene.nerf.occupancy import OccupancyGrid, default_step_size
from mvdream_fast.scene.nerf.renderer import Renderer
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig

pytestmark = pytest.mark.usefixtures("threads")
STEP, BOX, CELLS = default_step_size(1.0), (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0), 32
VIEWS = {"4x64x64": (4, 64), "512x512": (1, 512)}
LARGE = {"full": (4, 64), "10 %": (4, 256)}  # views of about as many samples: 4 and 7 million
_seconds: dict[str, float] = {}
_bytes: dict[str, float] = {}


def rays_of(views):
    n_views, side = (VIEWS | LARGE)[views]
    return generate_rays(orbit_cameras(n_views, distance=3.0, fovy_deg=40.0), side, side)


def grid_of(share):
    """Bits of a full grid, or of the ball that holds a tenth of the box."""
    centres = (torch.arange(CELLS) + 0.5) / CELLS * 2 - 1
    radius = torch.stack(torch.meshgrid(centres, centres, centres, indexing="ij")).norm(dim=0)
    return pack_bits(radius < (0.576 if share == "10 %" else 9))


def measure(benchmark, group, name, call, rounds=7, **extra):
    call()
    benchmark.group = group
    benchmark.pedantic(call, rounds=rounds)
    benchmark.extra_info |= extra
    _seconds[f"{group}: {name}"] = statistics.median(benchmark.stats.stats.data)


@pytest.mark.parametrize("name", ["ours", "reference"])
@pytest.mark.parametrize("share", ["10 %", "full"])
@pytest.mark.parametrize("views", VIEWS)
def bench_march(benchmark, views, share, name):
    rays, bits = rays_of(views), grid_of(share)
    march = ops.march_rays if name == "ours" else ops.march_rays_ref
    n_samples = ops.march_rays(rays.rays_o, rays.rays_d, BOX, bits, CELLS, STEP).n_samples

    def call():
        march(rays.rays_o, rays.rays_d, BOX, bits, CELLS, STEP)

    rounds = 7 if name == "ours" else 1
    measure(benchmark, f"march {views} {share}", name, call, rounds, n_samples=n_samples)


@pytest.mark.parametrize("name", ["ours", "reference"])
def bench_prune(benchmark, name):
    """Half of the samples seen: those in front, with a density that varies."""
    rays = rays_of("4x64x64")
    samples = ops.march_rays(rays.rays_o, rays.rays_d, BOX, grid_of("full"), CELLS, STEP)
    sigmas = torch.rand(samples.n_samples, generator=torch.Generator().manual_seed(0)) * 20
    prune = ops.prune_samples if name == "ours" else ops.prune_samples_ref

    def call():
        prune(samples, sigmas, 0.01, 1e-2)

    measure(benchmark, "prune 4x64x64 full", name, call, 5, n_samples=samples.n_samples)


@pytest.mark.parametrize("name", ["ours", "reference"])
@pytest.mark.parametrize("cells", ["all", "half"])
def bench_update_occupancy(benchmark, cells, name):
    """All cells of the paper's grid, or half of them as after the warm-up."""
    generator = torch.Generator().manual_seed(0)
    ema, values = torch.rand(2, CELLS**3, generator=generator)
    chosen = None if cells == "all" else torch.randint(0, CELLS**3, (CELLS**3 // 2,), generator=generator)
    values = values if chosen is None else values[: len(chosen)]
    update = ops.update_occupancy if name == "ours" else ops.update_occupancy_ref

    def call():
        update(ema, values, chosen)

    measure(benchmark, f"update_occupancy 32^3 {cells}", name, call, 20)


@pytest.mark.parametrize("name", ["ours", "reference"])
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("share", ["10 %", "full"])
def bench_composite(benchmark, share, gradients, name):
    rays = rays_of("4x64x64")
    samples = ops.march_rays(rays.rays_o, rays.rays_d, BOX, grid_of(share), CELLS, STEP)
    sigmas = (torch.rand(samples.n_samples) * 20).requires_grad_(gradients)
    rgb = torch.rand(samples.n_samples, 3).requires_grad_(gradients)
    composite = ops.composite_ref if name == "reference" else _composite

    def call():
        out = composite(sigmas, rgb, samples.t_starts, samples.t_ends, samples.packed_info)
        if gradients:
            torch.autograd.grad(out.rgb.sum() + out.opacity.sum(), (sigmas, rgb))

    kind = "forward+backward" if gradients else "forward"
    measure(benchmark, f"composite 4x64x64 {share} {kind}", name, call, n_samples=samples.n_samples)


def _composite(sigmas, rgb, t_starts, t_ends, packed_info):
    return ops.composite(sigmas, rgb, t_starts, t_ends, packed_info=packed_info)


class Ball(torch.nn.Module):
    """A volume with a hard ball in it, whatever its parameters say."""

    def __init__(self, config):
        super().__init__()
        self.volume = Volume(config)

    def forward(self, positions):
        sigmas, rgb = self.volume(positions)
        return sigmas * 0 + 100.0 * (positions.norm(dim=-1) < 0.5), rgb


@pytest.mark.parametrize("share", ["10 %", "full"])
@pytest.mark.parametrize("config", ["paper", "mini"])
def bench_render(benchmark, config, share):
    rays, volume = rays_of("512x512"), Ball(getattr(VolumeConfig, config)())
    grid = grid_of(share)

    def call():
        return ops.render(rays.rays_o, rays.rays_d, volume, BOX, grid, CELLS, STEP, None, alpha_thre=0.01)

    measure(benchmark, f"render 512x512 {config}", share, call, 3, n_samples=call().n_samples)


@pytest.mark.parametrize("config", ["paper", "mini"])
def bench_training_step(benchmark, config):
    """March, prune, field, composite and all gradients of four 64 x 64 views of a ball."""
    volume, rays = Volume(getattr(VolumeConfig, config)()), rays_of("4x64x64")
    renderer = Renderer(volume, OccupancyGrid(), EnvironmentMap())
    renderer.occupancy.update(0, volume.density, Stream(0, 0, "occupancy"))

    def call():
        volume.zero_grad()
        out = renderer(rays, Stream(0, 1, "render"), training=True)
        out.rgb.sum().backward()
        return out

    measure(benchmark, "training step 4x64x64", config, call, 3, n_samples=call().n_samples)


@pytest.mark.parametrize("share", ["10 %", "full"])
def bench_training_memory(benchmark, share):
    """Peak of a training step beyond parameters and their gradients, in bytes a sample that is evaluated with gradient.

    Thin everywhere, so that rays keep all of the samples that the grid allows. Up to 40 MB of it are the field's
    scratch, whatever the number of samples.
    """
    volume, rays = Volume(VolumeConfig(bias_scale=0.0)), rays_of(share)
    renderer = Renderer(volume, OccupancyGrid(), EnvironmentMap(), alpha_thre=0.0)
    renderer.occupancy.bits.copy_(grid_of(share))

    def call():
        out = renderer(rays, Stream(0, 1, "render"), training=True)
        out.rgb.sum().backward()
        return out.n_samples

    n_samples = call()
    volume.zero_grad()
    before = settled_memory()
    benchmark.pedantic(call, rounds=1)
    gradients = sum(p.numel() * 4 for p in volume.parameters())
    extra = (peak_memory() - before - gradients) / n_samples
    benchmark.extra_info |= {"bytes_per_sample": extra, "n_samples": n_samples}
    _bytes[f"training step, grid {share}"] = extra


@pytest.fixture(scope="module", autouse=True)
def _ratios(request):
    """Prints the medians, and how much faster a tenth of the grid is than all of it."""
    yield
    lines = [f"{name:60} {seconds * 1e3:10.1f} ms" for name, seconds in _seconds.items()]
    lines += [f"{name:60} {value:10.1f} B a sample" for name, value in _bytes.items()]
    for label, full, tenth in [
        *((f"march {v}, 10 % against full", f"march {v} full: ours", f"march {v} 10 %: ours") for v in VIEWS),
        ("render 512x512 paper, 10 % against full", "render 512x512 paper: full", "render 512x512 paper: 10 %"),
    ]:
        if full in _seconds and tenth in _seconds:
            lines.append(f"{label:60} {_seconds[full] / _seconds[tenth]:10.1f}x")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")
