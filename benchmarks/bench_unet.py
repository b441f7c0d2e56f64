"""Ours against diffusers' UNet under a regrouping processor: guided four-view sampling, time and peak memory.

Every contestant lives in a process of its own, with the same numbers in its weights and two threads; that process times
its own steps, and its high-water mark is taken over the sampling alone. The three take turns, a few steps each, so that
a machine that becomes slower does so for all of them: the time of a contestant is the median of all its steps. The rows
of pytest-benchmark are our turns; the comparison is printed at the end, beside what Amdahl's law allows to who makes
all but the products free: the share of glue in the better layout's step, from a profile of it.
"""

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import multiprocessing as mp
import os
import statistics
import sys
import time
import zlib
from pathlib import Path

import pytest

THREADS, GUIDANCE, N_VIEWS = 2, 7.5, 4
TURNS, STEPS_OF_A_TURN = 5, {"mini": 10}
SIZES = ("mini", "width-64", "width-160", "width-320")
THEIRS = ("diffusers-contiguous", "diffusers-channels_last")
CONTESTANTS = (*THEIRS, "ours")
# What no fusion saves: convolutions, linear layers and attention. All other operations are glue.
PRODUCTS = {
    f"aten::{name}"
    for name in [
        "mkldnn_convolution",
        "thnn_conv2d",
        "_slow_conv2d_forward",
        "addmm",
        "mm",
        "bmm",
        "baddbmm",
        "mkldnn_linear",
        "_scaled_dot_product_flash_attention_for_cpu",
    ]
}
_lines: list[str] = []


@pytest.mark.parametrize("size", [pytest.param(s, marks=[pytest.mark.slow] * (s == "width-320")) for s in SIZES])
@pytest.mark.timeout(3600)
def bench_sampling(benchmark, size):
    """Guided DDIM steps of 4 views (8 images a step), after a turn to warm up: five turns of two or ten steps each."""
    n_steps = int(os.environ.get("MVDREAM_FAST_BENCH_STEPS", STEPS_OF_A_TURN.get(size, 2)))
    times, peaks = {name: [] for name in CONTESTANTS}, dict.fromkeys(CONTESTANTS, 0.0)
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(Contestant(size, name)) for name in CONTESTANTS}

        def turn(name):
            seconds, peak = processes[name].ask(n_steps)
            times[name] += seconds
            peaks[name] = max(peaks[name], peak)

        for name in CONTESTANTS:
            processes[name].ask(1)  # warm-up: first-touch of memory, packing, oneDNN's code generation
        benchmark.pedantic(turn, args=("ours",), setup=lambda: [turn(name) for name in THEIRS] and None, rounds=TURNS)
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        better = min(THEIRS, key=medians.get)
        share = processes[better].ask(PRODUCTS)
    speed, memory = medians[better] / medians["ours"], peaks["ours"] / min(peaks[name] for name in THEIRS)
    benchmark.extra_info |= {"steps": n_steps, "median_step_s": medians, "peak_mb": peaks, "products": share}
    _lines.extend(f"{size:10} {n:24} {medians[n]:8.3f} s/step {peaks[n]:8.0f} MB peak" for n in CONTESTANTS)
    _lines.append(f"{size:10} ours against the better layout: {speed:.2f}x the speed, {memory:.2f}x the memory")
    _lines.append(
        f"{size:10} glue is {1 - share:.0%} of {better}'s step: without it Amdahl allows {1 / share:.2f}x, "
        f"of which ours reaches {speed * share:.0%}"
    )


@pytest.fixture(scope="module", autouse=True)
def _ratios(request):
    """Prints, once all are through, how ours stands to the better layout of diffusers: ratios within this run only."""
    yield
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *_lines, sep="\n")


class Contestant:
    """A fresh process that holds one model.

    `ask(n_steps)` samples in it: (seconds of each step, peak MB). `ask(names)` samples under the profiler: the share of
    a step that the operations of these names take.
    """

    def __init__(self, size: str, name: str):
        context = mp.get_context("spawn")
        self.pipe, self.other = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.other, size, name), daemon=True)

    def __enter__(self):
        self.process.start()
        self.other.close()  # so that the end of the process is the end of the pipe
        return self

    def ask(self, request: int | set[str]) -> tuple[list[float], float] | float:
        try:
            self.pipe.send(request)
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(10)
            raise RuntimeError(f"the contestant ended with code {self.process.exitcode}, see its output") from error

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.pipe.send(0)
        self.process.join(10)


def _serve(pipe, size: str, name: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import torch

    torch.set_num_threads(THREADS)
    sample = _sampler(size, name)
    gc.collect()
    while request := pipe.recv():
        if isinstance(request, set):
            pipe.send(_share_of(request, sample))
            continue
        _reset_high_water()
        ticks = [time.perf_counter()]
        sample(request, lambda *_, ticks=ticks: ticks.append(time.perf_counter()))
        pipe.send(([b - a for a, b in itertools.pairwise(ticks)], _high_water_mb()))


def _share_of(names: set[str], sample, n_steps: int = 2) -> float:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        sample(n_steps, None)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    if not any(name in times for name in names):
        raise RuntimeError(f"none of the products was seen, only {', '.join(sorted(times))}")
    return sum(time for name, time in times.items() if name in names) / sum(times.values())


def _config(size: str):
    from mvdream_fast.models.config import MINI, UNetConfig

    if size == "mini":
        return MINI.unet, MINI.latent_size, MINI.text.context_length, MINI.schedule
    width = int(size.split("-")[1])
    unet = dataclasses.replace(UNetConfig(), model_channels=width, num_head_channels=32 if width % 64 else 64)
    return unet, 32, 77, dataclasses.replace(MINI.schedule, prediction="eps")


def _sampler(size: str, name: str):
    """A function of the steps and a callback; diffusers and our package are imported in every process alike."""
    import torch
    from reference.diffusers_unet import RegroupProcessor, add_camera, diffusers_unet, to_diffusers

    from mvdream_fast.camera import get_camera
    from mvdream_fast.diffusion.sampler import ddim_sample
    from mvdream_fast.diffusion.schedule import NoiseSchedule
    from mvdream_fast.models.unet import MultiViewUNet
    from mvdream_fast.ops import MLP, camera_embedding

    config, side, n_tokens, schedule_config = _config(size)
    with torch.device("meta"):
        unet = MultiViewUNet(config)
        shapes = {key: p.shape for key, p in unet.named_parameters()}
        theirs = diffusers_unet(config, side) if name != "ours" else None
    schedule = NoiseSchedule.from_config(schedule_config)
    torch.manual_seed(0)
    noise = torch.randn(N_VIEWS, config.in_channels, side, side)
    text = torch.randn(2, n_tokens, config.context_dim)
    camera = get_camera(N_VIEWS)
    if name == "ours":
        _fill(unet, shapes, {key: key for key in shapes})
        prepared = unet.prepare_context(text)

        def model(latents, t):  # the sampler gives [uncond; cond], whose latents are the same
            return unet(latents[:N_VIEWS], t, prepared, camera, N_VIEWS, n_prompts=len(latents) // N_VIEWS)

    else:
        _fill(theirs, shapes, to_diffusers(shapes, config))
        theirs.set_attn_processor(RegroupProcessor(N_VIEWS))
        mlp = MLP(*(_numbers(key, shapes[key]) for key in shapes if key.startswith("camera_embed.")))
        add_camera(theirs, camera_embedding(camera.repeat(2, 1), mlp))
        layout = getattr(torch, name.split("-")[1].replace("contiguous", "contiguous_format"))
        theirs.to(memory_format=layout)
        wide = text.repeat_interleave(N_VIEWS, 0)

        def model(latents, t):
            return theirs(latents.contiguous(memory_format=layout), t, wide, return_dict=False)[0]

    return lambda n_steps, tick: ddim_sample(model, noise, schedule, n_steps, GUIDANCE, callback=tick)


def _fill(model, shapes: dict, names: dict[str, str]) -> None:
    """Gives a model on the meta device memory and numbers, one tensor at a time: no second model weighs on the peak."""
    import torch

    model.to_empty(device="cpu").requires_grad_(False)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for ours, name in names.items():
            parameters.pop(name).copy_(_numbers(ours, shapes[ours]))
    if parameters:
        raise RuntimeError(f"no numbers for {', '.join(parameters)}")


def _numbers(name: str, shape):
    """A parameter's values, from its LDM name alone: a trained model's sizes, nowhere zero as a fresh one is."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator)
    return values.mul_(values[0].numel() ** -0.5 if len(shape) > 1 else 0.1).add_(
        float(len(shape) == 1 and name.endswith("weight"))
    )


def _reset_high_water() -> None:
    """Gives freed memory back and starts the mark anew, so that building the model leaves no trace in it (Linux)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _high_water_mb() -> float:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        import psutil

        return psutil.Process().memory_info().rss / 2**20
