"""On a GPU: the renderer's ops beside plain torch, and the UNets beside diffusers', what docs/gpu.md states.

Contestants take turns and the fastest turn of each counts; times are between CUDA events. What a contestant cannot run
is a line of the table and no failure of the others. MVDREAM_FAST_BENCH_CPU=1 runs all of it on a CPU, at toy sizes, to
see that it works; its times mean nothing.
"""

import copy
import dataclasses
import functools
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_render import BOX, CELLS, STEP, grid_of, rays_of
from reference.diffusers_unet import RegroupProcessor, add_camera, diffusers_unet

from mvdream_fast import ops
from mvdream_fast.camera import get_camera
from mvdream_fast.config import MINI, NAMED
from mvdream_fast.field.volume import Volume, VolumeConfig
from mvdream_fast.models.unet import MultiViewUNet

TOY = bool(os.environ.get("MVDREAM_FAST_BENCH_CPU"))
DEVICE = torch.device("cpu" if TOY else "cuda")
N_SAMPLES = 1 << (10 if TOY else 20)
N_EAGER = 1 << (10 if TOY else 18)  # plain torch keeps kilobytes a sample
N_VIEWS, TURNS = 4, 2 if TOY else 12
_figures: dict[str, float | str] = {}

pytestmark = [
    pytest.mark.skipif(not (TOY or torch.cuda.is_available()), reason="torch sees no CUDA device"),
    pytest.mark.timeout(600),
]


def milliseconds(call: Callable[[], object]) -> float:
    if TOY:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def compare(benchmark, contestants: dict[str, Callable[[], Callable[[], object]]], per: dict[str, float], unit: str):
    """Builds each contestant, lets them take turns, and notes milliseconds * per[name]; pytest-benchmark times all."""
    calls, best = {}, {}

    def attempt(name, work):
        try:
            return work()
        except Exception as error:
            _figures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
            calls.pop(name, None)

    for name, build in contestants.items():
        call = attempt(name, build)
        if call is not None and attempt(name, lambda call=call: [call(), call(), call()]) is not None:
            calls[name] = call

    def turn():
        for name, call in list(calls.items()):
            elapsed = attempt(name, lambda call=call: milliseconds(call))
            if elapsed is not None:
                best[name] = min(elapsed, best.get(name, float("inf")))

    benchmark.pedantic(turn, rounds=TURNS)
    for name, elapsed in best.items():
        _figures[f"{name}, {unit}"] = elapsed * per[name]


@functools.cache
def volume() -> Volume:
    config = VolumeConfig.mini() if TOY else VolumeConfig.paper()
    return Volume(config).to(DEVICE)


def field_call(op, n: int, backward: bool):
    v, generator = volume(), torch.Generator(DEVICE).manual_seed(0)
    positions = torch.rand(n, 3, generator=generator, device=DEVICE) * 2 - 1
    density, features = [*v.density_weights], [*v.feature_weights]
    weights = [v.table, *density, *features]
    cotangents = torch.randn(n, device=DEVICE), torch.randn(n, 3, device=DEVICE)

    def call():
        with torch.set_grad_enabled(backward):
            out = op(positions, v.table, density, features, v.spec)
        if backward:
            torch.autograd.grad(out, weights, cotangents)

    return call


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def bench_field(benchmark, backward):
    kind = "forward+backward" if backward else "forward"
    names = {f"field {kind}, ours": (ops.field, N_SAMPLES), f"field {kind}, plain torch": (ops.field_ref, N_EAGER)}
    contestants = {k: lambda op=op, n=n: field_call(op, n, backward) for k, (op, n) in names.items()}
    compare(benchmark, contestants, {k: 1e6 / n for k, (_, n) in names.items()}, "ns a sample")


def encode_call(op, n: int):
    v, grid = volume(), volume().spec.grid
    positions, d_out = torch.rand(n, 3, device=DEVICE), torch.randn(n, grid.n_levels * grid.n_features, device=DEVICE)
    return lambda: torch.autograd.grad(op(positions, v.table, grid), v.table, d_out)


def bench_hash_encode(benchmark):
    names = {
        "hash_encode, ours": (ops.hash_encode, N_SAMPLES),
        "hash_encode, plain torch": (ops.hash_encode_ref, N_EAGER),
    }
    contestants = {k: lambda op=op, n=n: encode_call(op, n) for k, (op, n) in names.items()}
    compare(benchmark, contestants, {k: 1e6 / n for k, (_, n) in names.items()}, "forward+backward, ns a sample")


def packed_views():
    """Four 64 x 64 views through a full grid: about four million samples."""
    rays, bits = rays_of("4x64x64"), grid_of("10 %" if TOY else "full").to(DEVICE)
    rays_o, rays_d = rays.rays_o.to(DEVICE), rays.rays_d.to(DEVICE)
    return rays_o, rays_d, bits, ops.march_rays(rays_o, rays_d, BOX, bits, CELLS, STEP)


def composite_call(op, samples):
    sigmas = (torch.rand(samples.n_samples, device=DEVICE) * 20).requires_grad_()
    rgb = torch.rand(samples.n_samples, 3, device=DEVICE, requires_grad=True)

    def call():
        out = op(sigmas, rgb, samples.t_starts, samples.t_ends, packed_info=samples.packed_info)
        torch.autograd.grad(out.rgb.sum() + out.opacity.sum(), (sigmas, rgb))

    return call


def bench_march_and_composite(benchmark):
    rays_o, rays_d, bits, samples = packed_views()
    arguments = rays_o, rays_d, BOX, bits, CELLS, STEP

    def reference(*values, packed_info):
        return ops.composite_ref(*values, packed_info)

    contestants = {
        "march_rays 4 x 64 x 64": lambda: lambda: ops.march_rays(*arguments),
        "composite forward+backward, ours": lambda: composite_call(ops.composite, samples),
        "composite forward+backward, plain torch": lambda: composite_call(reference, samples),
    }
    compare(benchmark, contestants, dict.fromkeys(contestants, 1e6 / samples.n_samples), "ns a sample")


def bench_render(benchmark):
    """A 512 x 512 view of a ball that fills a tenth of the grid; the paper's field."""
    from bench_render import Ball

    rays, bits, ball = rays_of("4x64x64" if TOY else "512x512"), grid_of("10 %").to(DEVICE), volume()
    rays_o, rays_d = rays.rays_o.to(DEVICE), rays.rays_d.to(DEVICE)
    hard = Ball(VolumeConfig.mini()).to(DEVICE)
    hard.volume = ball

    def view(field):
        return lambda: ops.render(rays_o, rays_d, field, BOX, bits, CELLS, STEP, None, alpha_thre=0.01)

    contestants = {"render, fused field (translucent)": lambda: view(ball), "render, ball": lambda: view(hard)}
    compare(benchmark, contestants, dict.fromkeys(contestants, 1.0), "ms a view")


@torch.no_grad()
def filled(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A model of the meta device with numbers of a trained model's sizes, made where it runs."""
    model.to_empty(device=DEVICE).requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1).add_(float(p.ndim == 1 and name.endswith("weight")))
    return model.to(dtype, memory_format=torch.channels_last)


def sd21_ours(config, side: int, tokens: int, dtype):
    with torch.device("meta"):
        unet = MultiViewUNet(config)
    unet = filled(unet, dtype)
    latents = torch.randn(N_VIEWS, config.in_channels, side, side, device=DEVICE, dtype=dtype)
    text = torch.randn(2, tokens, config.context_dim, device=DEVICE, dtype=dtype)
    camera, t = get_camera(N_VIEWS).to(DEVICE, dtype), torch.full((N_VIEWS,), 500, device=DEVICE)
    with torch.inference_mode():
        prepared = unet.prepare_context(text)

    def call():
        with torch.inference_mode():
            return unet(latents, t, prepared, camera, N_VIEWS, n_prompts=2)

    return call


def sd21_theirs(config, side: int, tokens: int, dtype):
    with torch.device("meta"):
        theirs = diffusers_unet(config, side)
    theirs = filled(theirs, dtype)
    theirs.set_attn_processor(RegroupProcessor(N_VIEWS))
    add_camera(theirs, torch.randn(2 * N_VIEWS, 4 * config.model_channels, device=DEVICE, dtype=dtype))
    latents = torch.randn(2 * N_VIEWS, config.in_channels, side, side, device=DEVICE, dtype=dtype)
    latents = latents.contiguous(memory_format=torch.channels_last)
    text = torch.randn(2 * N_VIEWS, tokens, config.context_dim, device=DEVICE, dtype=dtype)
    t = torch.full((2 * N_VIEWS,), 500, device=DEVICE)

    def call():
        with torch.inference_mode():
            return theirs(latents, t, text, return_dict=False)[0]

    return call


def bench_unet(benchmark):
    """A guided step of four views: eight images of 32 x 32 latents through Stable Diffusion 2.1's UNet, float16."""
    model = MINI if TOY else NAMED["sd21-4view"]
    config, side, tokens = model.unet, model.latent_size if TOY else 32, model.text.context_length
    dtype = torch.float32 if TOY else torch.float16
    arguments = config, side, tokens, dtype
    contestants = {
        "UNet sd21 guided step, ours": lambda: sd21_ours(*arguments),
        "UNet sd21 guided step, diffusers": lambda: sd21_theirs(*arguments),
    }
    compare(benchmark, contestants, dict.fromkeys(contestants, 1.0), "ms")
    gc.collect()


def bench_training_step(benchmark):
    """The embedded UNet's step, forward and backward, 256 scenes x 4 views in bfloat16."""
    torch.manual_seed(0)
    n = N_VIEWS * (2 if TOY else 256)
    unet = MultiViewUNet(dataclasses.replace(MINI.unet)).to(DEVICE)
    side, channels = MINI.latent_size, MINI.unet.in_channels
    latents = torch.randn(n, channels, side, side, device=DEVICE)
    text = torch.randn(n // N_VIEWS, MINI.text.context_length, MINI.unet.context_dim, device=DEVICE)
    camera, t = get_camera(N_VIEWS).repeat(n // N_VIEWS, 1).to(DEVICE), torch.randint(0, 1000, (n,), device=DEVICE)

    def call():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not TOY):
            out = unet(latents, t, text, camera, N_VIEWS)
        out.float().square().mean().backward()
        unet.zero_grad(set_to_none=True)

    name = "UNet mini, training"
    compare(benchmark, {name: lambda: call}, {name: 1e3 / n}, "us an image")


@pytest.fixture(scope="module", autouse=True)
def _table(request):
    """Prints all figures once all are through, and writes them to MVDREAM_FAST_BENCH_JSON where that is set."""
    yield
    lines = [f"{name:64} {x:>12.4g}" if isinstance(x, float) else f"{name:64} {x}" for name, x in _figures.items()]
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")
    if os.environ.get("MVDREAM_FAST_BENCH_JSON"):
        Path(os.environ["MVDREAM_FAST_BENCH_JSON"]).write_text(json.dumps(copy.deepcopy(_figures), indent=1))
