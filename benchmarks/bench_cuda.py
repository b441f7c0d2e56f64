"""On a GPU: the renderer's ops beside plain torch, and the UNets beside diffusers', what docs/gpu_measured.md states.

Contestants take turns, timed between CUDA events; calls of less than a millisecond are queued, up to 20 a turn, so that
it is not a launch that is timed. What one cannot run is a line of the table and no loss to the others' figures, though
its test fails. MVDREAM_FAST_BENCH_CPU=1 runs all of it on a CPU, at toy sizes, to see that it works.
"""

import contextlib
import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_render import BOX, CELLS, STEP, Ball, grid_of

from mvdream_fast import ops
from mvdream_fast.camera import generate_rays, get_camera, orbit_cameras
from mvdream_fast.models.config import MINI, NAMED
from mvdream_fast.models.unet import MultiViewUNet
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig

TOY = os.environ.get("MVDREAM_FAST_BENCH_CPU") == "1"
DEVICE = torch.device("cpu" if TOY else "cuda")
N_SAMPLES, N_VIEWS, N_SCENES = 1 << (10 if TOY else 20), 4, 2 if TOY else 256
# Who has had the least turns and a second of them sits the others out: plain torch is slow.
TURNS, LEAST_TURNS, BUDGET_MS = (2, 2, 0) if TOY else (25, 5, 1000)
Built = tuple[Callable[[], object], float]  # a call, and what a millisecond of it is in the unit of its row
_figures: dict[str, dict[str, object]] = {}

pytestmark = [
    pytest.mark.skipif(not (TOY or torch.cuda.is_available()), reason="torch sees no CUDA device"),
    pytest.mark.timeout(600),
]


def milliseconds(call: Callable[[], object], n: int = 1) -> float:
    """Of one call, in a queue of n of them."""
    if TOY:
        start = time.perf_counter()
        for _ in range(n):
            call()
        return 1e3 * (time.perf_counter() - start) / n
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(n):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / n


def prepared(build: Callable[[], Built]) -> tuple[Callable[[], object], float, int, float]:
    """What was built, warmed up, the calls that make a turn, and the MB that it takes at most, its model included."""
    gc.collect()
    before = 0 if TOY else torch.cuda.memory_allocated()
    call, factor = build()
    for _ in range(3):
        call()
    if not TOY:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    n = max(1, min(20, round(1 / max(milliseconds(call), 1e-3))))
    return call, factor, n, 0.0 if TOY else (torch.cuda.max_memory_allocated() - before) / 2**20


@contextlib.contextmanager
def noting(name: str):
    """Makes a failure the figure of `name`, whatever it is: the others' figures count."""
    try:
        yield
    except Exception as error:
        _figures[name] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"}


def compare(benchmark, unit: str, builds: dict[str, Callable[[], Built]], memory: bool = False) -> None:
    """Builds the contestants, lets them take turns and notes milliseconds * factor; pytest-benchmark times all."""
    ready, times = {}, {name: [] for name in builds}
    for name, build in builds.items():
        with noting(name):
            ready[name] = prepared(build)

    def turn():
        for name, (call, _, n, _) in ready.items():
            hungry = len(times[name]) < LEAST_TURNS or n * sum(times[name]) < BUDGET_MS
            if hungry and name not in _figures:
                with noting(name):
                    times[name].append(milliseconds(call, n))

    benchmark.pedantic(turn, rounds=TURNS)
    failed = [name for name in builds if name in _figures]
    for name, (_, factor, _, peak_mb) in ready.items():
        if name not in failed:
            fastest, median = (function(times[name]) * factor for function in (min, statistics.median))
            _figures[name] = {"fastest": fastest, "median": median, "unit": unit, "turns": len(times[name])}
            _figures[name] |= {"peak_mb": peak_mb} if memory else {}
    if failed:
        pytest.fail(f"{'; '.join(failed)} could not run: see the table", pytrace=False)


@functools.cache
def volume() -> Volume:
    return Volume(VolumeConfig.mini() if TOY else VolumeConfig.paper()).to(DEVICE)


def points_call(op: str, kind: str, backward: bool, n: int) -> Built:
    v, x = volume(), torch.rand(n, 3, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    function, inputs, arguments = getattr(ops, op + kind), [v.table], (x, v.table, v.spec.grid)
    d_out = [torch.randn(n, v.spec.grid.width, device=DEVICE)]
    if op == "field":
        inputs, networks = [*v.parameters()], ([*v.density_weights], [*v.feature_weights])
        arguments = (x * 2 - 1, v.table, *networks, v.spec)
        d_out = [torch.randn(n, device=DEVICE), torch.randn(n, 3, device=DEVICE)]

    def call():
        with torch.set_grad_enabled(backward):
            out = function(*arguments)
        if backward:
            torch.autograd.grad(out, inputs, d_out)

    return call, 1e6 / n


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("op", ["field", "hash_encode"])
def bench_points(benchmark, op, backward):
    """Uniform points in the paper's field; the points get no gradient."""
    sizes = {"ours": ("", N_SAMPLES), "plain torch": ("_ref", N_SAMPLES)}
    if op == "field" and not backward:
        sizes["ours, 4 times the samples"] = "", 4 * N_SAMPLES
    sizes["ours, a 32nd of the samples"] = "", N_SAMPLES >> 5  # few enough to be encoded where they are used
    row = f"{op} {'forward+backward' if backward else 'forward'}"
    builds = {f"{row}, {who}": partial(points_call, op, k, backward, n) for who, (k, n) in sizes.items()}
    compare(benchmark, "ns a sample", builds)


@functools.cache
def marched(n_views: int):
    """A march of 64 x 64 views through a full grid, about 2^20 samples each; its samples; what a ms is of one's ns."""
    rays = generate_rays(orbit_cameras(n_views, distance=3.0, fovy_deg=40.0), *[8 if TOY else 64] * 2)
    rays_o, rays_d, bits = (x.to(DEVICE) for x in (rays.rays_o, rays.rays_d, grid_of("full")))
    march = partial(ops.march_rays, rays_o, rays_d, BOX, bits, CELLS, STEP)
    samples = march()
    return march, samples, 1e6 / samples.n_samples


def composite_call(op, n_views: int) -> Built:
    _, samples, factor = marched(n_views)
    sigmas = (torch.rand(samples.n_samples, device=DEVICE) * 20).requires_grad_()
    rgb = torch.rand(samples.n_samples, 3, device=DEVICE, requires_grad=True)

    def call():
        out = op(sigmas, rgb, samples.t_starts, samples.t_ends, packed_info=samples.packed_info)
        torch.autograd.grad(out.rgb.sum() + out.opacity.sum(), (sigmas, rgb))

    return call, factor


@pytest.mark.parametrize("n_views", [1, 4])
def bench_march_and_composite(benchmark, n_views):
    """Composite's samples are the march's; ours checks its packing on every call, which waits for the GPU."""
    builds = {f"march_rays {n_views} x 64 x 64": lambda: marched(n_views)[::2]}
    for who, op in (("ours", ops.composite), ("plain torch", ops.composite_ref)):
        builds[f"composite forward+backward {n_views} x 64 x 64, {who}"] = partial(composite_call, op, n_views)
    compare(benchmark, "ns a sample", builds)


def scan_call(op, product: bool) -> Built:
    _, samples, factor = marched(4)
    values = torch.rand(samples.n_samples, device=DEVICE, requires_grad=True)
    d_out = torch.rand_like(values)

    def call():
        torch.autograd.grad(op(values, samples.packed_info, product, True), values, d_out)

    return call, factor


@pytest.mark.parametrize("product", [False, True], ids=["sum", "product"])
def bench_packed_scan(benchmark, product):
    """Exclusive scans along the march's rays."""
    row, contestants = (
        f"packed_scan forward+backward, {'product' if product else 'sum'}",
        (("ours", ops.packed_scan), ("plain torch", ops.packed_scan_ref)),
    )
    compare(benchmark, "ns a sample", {f"{row}, {who}": partial(scan_call, op, product) for who, op in contestants})


def bench_update_occupancy(benchmark):
    """All of as many cells as the other ops have samples: 32 times the paper's grid."""

    def build(op) -> Built:
        return partial(op, *torch.rand(2, N_SAMPLES, device=DEVICE)), 1e6 / N_SAMPLES

    contestants = (("ours", ops.update_occupancy), ("plain torch", ops.update_occupancy_ref))
    compare(benchmark, "ns a cell", {f"update_occupancy, {who}": partial(build, op) for who, op in contestants})


def view_call(name: str, fovy_deg: float, ball: bool) -> Built:
    rays, field = generate_rays(orbit_cameras(1, distance=3.0, fovy_deg=fovy_deg), *[64 if TOY else 512] * 2), volume()
    if ball:
        field = Ball(VolumeConfig.mini()).to(DEVICE)
        field.volume = volume()
    scene = (rays.rays_o.to(DEVICE), rays.rays_d.to(DEVICE), field, BOX, grid_of("10 %").to(DEVICE), CELLS, STEP, None)
    call = partial(ops.render, *scene, alpha_thre=0.01)
    _figures[f"{name}: evaluations"] = {"fastest": call().n_samples / len(rays.rays_o), "unit": "a ray"}
    return call, 1.0


def bench_render(benchmark):
    """512 x 512 pixels of a tenth of the grid: bench_render's view with a kernel and with Python, and a closer one."""
    views = {"fused field": (40.0, False), "fused field, closer": (29.0, False), "ball": (40.0, True)}
    builds = {f"render, {name}": partial(view_call, f"render, {name}", *view) for name, view in views.items()}
    compare(benchmark, "ms a view", builds)


@torch.no_grad()
def filled(make: Callable[[], torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    """A model with numbers of a trained model's sizes, made where it runs."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device=DEVICE).requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1).add_(float(p.ndim == 1 and name.endswith("weight")))
    return model.to(dtype, memory_format=torch.channels_last)


def guided_step(who: str, mode: Callable) -> Built:
    """As the pipeline asks: ours takes the latents of both prompts once, diffusers' takes them twice."""
    whole, dtype = (MINI, torch.float32) if TOY else (NAMED["sd21-4view"], torch.float16)
    config, side, n = whole.unet, whole.latent_size, N_VIEWS * (2 if who == "diffusers" else 1)
    random = partial(torch.randn, device=DEVICE, dtype=dtype)
    latents = random(n, config.in_channels, side, side).contiguous(memory_format=torch.channels_last)
    t, text = torch.full((n,), 500, device=DEVICE), random(2, whole.text.context_length, config.context_dim)
    if who == "diffusers":
        from reference.diffusers_unet import RegroupProcessor, add_camera, diffusers_unet

        model = filled(lambda: diffusers_unet(config, side), dtype)
        model.set_attn_processor(RegroupProcessor(N_VIEWS))
        add_camera(model, random(n, config.time_embed_dim))
        step = partial(model, latents, t, text.repeat_interleave(N_VIEWS, 0), return_dict=False)
    else:
        model = filled(lambda: MultiViewUNet(config), dtype)
        camera = get_camera(N_VIEWS).to(DEVICE, dtype)
        step = partial(model, latents, t, model.prepare_context(text), camera, N_VIEWS, n_prompts=2)

    def call():
        with mode():
            step()

    return call, 1.0


def bench_unet(benchmark):
    """A guided step of four views: eight images of 32 x 32 latents through Stable Diffusion 2.1's UNet, float16."""
    modes = {"ours": torch.inference_mode, "ours, no_grad": torch.no_grad, "diffusers": torch.inference_mode}
    builds = {f"UNet sd21 guided step, {who}": partial(guided_step, who, mode) for who, mode in modes.items()}
    compare(benchmark, "ms", builds, memory=True)


def training_call() -> Built:
    n, config, side = N_SCENES * N_VIEWS, MINI.unet, MINI.latent_size
    unet, latents = MultiViewUNet(config).to(DEVICE), torch.randn(n, config.in_channels, side, side, device=DEVICE)
    text = torch.randn(N_SCENES, MINI.text.context_length, config.context_dim, device=DEVICE)
    camera, t = get_camera(N_VIEWS).repeat(N_SCENES, 1).to(DEVICE), torch.randint(0, 1000, (n,), device=DEVICE)

    def call():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = unet(latents, t, text, camera, N_VIEWS)
        out.float().square().mean().backward()
        unet.zero_grad(set_to_none=True)

    return call, 1e3 / n


def bench_training_step(benchmark):
    """The embedded UNet's step, forward and backward, 256 scenes x 4 views in bfloat16."""
    name = "UNet mini, training"
    compare(benchmark, "us an image", {name: training_call}, memory=True)
    speeds = {key: 1e6 / _figures[name][key] for key in ("fastest", "median")}
    _figures[f"{name}, speed"] = speeds | {"unit": "images/s"}


def line(name: str, x: dict) -> str:
    """A figure of the table; behind ours the speed against who did the same, by the fastest turns and the medians."""
    if "error" in x:
        return f"{name:62} {x['error']}"
    words = f"{name:62} {x['fastest']:10.4g} {x.get('median', x['fastest']):10.4g} {x['unit']:12}"
    words += f" {x['peak_mb']:7.0f} MB" if "peak_mb" in x else ""
    row, is_ours, _ = name.partition(", ours")
    for rival in (_figures.get(f"{row}, {who}", {}) for who in ("plain torch", "diffusers") if is_ours):
        words += "".join(f" {rival[key] / x[key]:7.2f}x" for key in ("fastest", "median") if key in rival)
    return words


@pytest.fixture(scope="module", autouse=True)
def _table(request):
    """Prints all figures once all are through, and writes them to MVDREAM_FAST_BENCH_JSON where that is set."""
    yield
    device = "a CPU, toy sizes" if TOY else torch.cuda.get_device_name()
    lines = [f"{f'{device}, torch {torch.__version__}':62} {'fastest':>10} {'median':>10}"]
    lines += [line(name, x) for name, x in _figures.items()]
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")
    if os.environ.get("MVDREAM_FAST_BENCH_JSON"):
        report = {"device": device, "torch": torch.__version__, "figures": _figures}
        Path(os.environ["MVDREAM_FAST_BENCH_JSON"]).write_text(json.dumps(report, indent=1))
