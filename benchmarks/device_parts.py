"""What benchmarks/device.py measures, a function each; it is not imported where torch is not wanted.

A part yields (what, figures) as soon as it knows them. With MVDREAM_FAST_BENCH_CPU=1 every line of it runs on a CPU, at
toy sizes.
"""

import functools
import json
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_attention import GPU_SHAPES, VIEWS
from device_work import (
    DEVICE,
    N_SAMPLES,
    N_VIEWS,
    TOY,
    diffusers_step,
    filled,
    marched,
    milliseconds,
    training_step,
    volume,
)
from peers import sdpa
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from mvdream_fast import ops
from mvdream_fast.camera import get_camera, orbit_cameras
from mvdream_fast.diffusion.denoiser import Denoiser, TextCond, guided_call
from mvdream_fast.models.config import MINI, NAMED, SD21
from mvdream_fast.models.unet import MultiViewUNet

ROOT = Path(__file__).parents[1]
Found = Iterator[tuple[str, dict[str, Any]]]


def versions() -> Found:
    """The machine, as `doctor` sees it, and the driver."""
    done = subprocess.run([sys.executable, "-m", "mvdream_fast.doctor", "--json"], capture_output=True, text=True)
    yield "doctor", json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-300:]}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv"]
        yield "nvidia-smi", {"said": subprocess.run(query, capture_output=True, text=True).stdout}


def parity() -> Found:
    """The ops on the device against their references, by the tests of their own files."""
    chosen = ["tests/ops/test_geglu.py"] if TOY else ["tests/ops/test_cuda_gpu.py", "tests/ops/test_geglu.py"]
    line = [sys.executable, "-m", "pytest", "-q", "-x" if TOY else "--maxfail=50", "-rf", "-m", "not slow", *chosen]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.strip().splitlines()
    yield "tests", {"exit code": done.returncode, "said": lines[-1:], "failed": [x for x in lines if x[:6] == "FAILED"]}


@functools.cache
def full_size():
    """The UNet that guided steps are measured with, and its inputs: sd21-4view in float16, or the embedded one."""
    whole, dtype = (MINI, torch.float32) if TOY else (NAMED["sd21-4view"], torch.float16)
    random = functools.partial(torch.randn, device=DEVICE, dtype=dtype)
    unet = filled(lambda: MultiViewUNet(whole.unet), dtype)
    text = TextCond(*random(2, 1, whole.text.context_length, whole.unet.context_dim))
    latents = random(N_VIEWS, whole.unet.in_channels, whole.latent_size, whole.latent_size)
    return unet, text, latents, get_camera(N_VIEWS).to(DEVICE, dtype)


def graphs() -> Found:
    """A guided call from a graph, with other latents, steps and cameras, against the same call without one."""
    unet, text, latents, camera = full_size()
    eager, graph = (Denoiser(unet, text, N_VIEWS, captured=c) for c in (None, guided_call()))
    for k in range(4):
        t = torch.tensor(900 - 250 * k, device=latents.device)
        arguments = (torch.randn_like(latents), t, camera.roll(k, 0))
        a, b = eager(*arguments), graph(*arguments)
        yield f"guided call {k}", _compared(a, b)
    eager, graph = (_score(graphs=on) for on in (False, True))
    rgb = torch.rand(N_VIEWS, 3, 64, 64, device=latents.device)
    for k in range(4):
        yield f"score distillation {k}", _compared(*(_gradient(score, rgb, k) for score in (eager, graph)))


def _compared(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    return {
        "equal": torch.equal(a, b),
        "largest difference": float((a - b).abs().max()),
        "largest": float(a.abs().max()),
    }


def _score(graphs: bool = True) -> Any:
    """Score distillation with the full-size model and random numbers, as `sds` sets it up."""
    from mvdream_fast.core.machine import encoder_dtype
    from mvdream_fast.diffusion.schedule import NoiseSchedule
    from mvdream_fast.distill.systems import SDS_PRESETS
    from mvdream_fast.guidance.sds import ScoreDistillation

    whole, (unet, text, latents, _) = MINI if TOY else SD21, full_size()
    vae = _encoder()
    vae.encode_in(encoder_dtype(latents.dtype, latents.device))
    schedule = NoiseSchedule.from_config(whole.schedule, DEVICE)
    return ScoreDistillation(unet, vae, schedule, text, SDS_PRESETS["mini" if TOY else "paper"].guidance, graphs=graphs)


@functools.cache
def _encoder() -> Any:
    from mvdream_fast.models.vae import VAE

    whole = MINI if TOY else SD21
    return filled(lambda: VAE(whole.vae, decoder=False), torch.float32).eval()


def _gradient(score: Any, rgb: torch.Tensor, step: int) -> torch.Tensor:
    """d loss / d rgb of a step; the same for the same step, whoever asks."""
    from mvdream_fast.core.rng import Stream

    views = rgb.clone().requires_grad_()
    c2w = orbit_cameras(N_VIEWS).c2w.roll(step, 0).to(DEVICE)
    result = score(views, c2w, N_VIEWS, 100 * step, Stream(0, step, "device"))
    return torch.autograd.grad(result.loss, views)[0]


def guided_step() -> Found:
    """A guided step of the full-size UNet: ours and diffusers', eager and as graphs; all the GPU time of it."""
    unet, text, latents, camera = full_size()
    t = torch.tensor(500, device=DEVICE)
    eager, graph = (Denoiser(unet, text, N_VIEWS, captured=c) for c in (None, guided_call()))
    theirs = diffusers_step()
    calls = {"ours": lambda: eager(latents, t, camera), "ours, graph": lambda: graph(latents, t, camera)}
    calls |= {"diffusers": theirs, "diffusers, graph": theirs if TOY else graphed(theirs)}
    yield from turns("guided step", calls, unit="ms")
    for name in ("ours", "diffusers"):
        yield f"guided step, {name}: busy", busy(calls[name])


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The same work as one CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def turns(title: str, calls: dict[str, Callable[[], object]], unit: str = "ms", rounds: int = 15) -> Found:
    """Fastest and median GPU time of each contestant, which take turns; a contestant that fails is out."""
    times: dict[str, list[float]] = {}
    for _ in range(2 if TOY else rounds):
        for name in list(calls):
            try:
                if name not in times:
                    for _ in range(3):
                        calls[name]()
                    times[name] = []
                times[name].append(milliseconds(calls[name], 1 if TOY else 5))
            except Exception as error:
                del calls[name]
                yield f"{title}, {name}", {"error": f"{type(error).__name__}: {error}"[:200]}
    for name in calls:
        yield f"{title}, {name}", {unit: min(times[name]), "median": statistics.median(times[name])}


def busy(call: Callable[[], object]) -> dict[str, Any]:
    """Milliseconds that the GPU works on a call, and the kernels that take most of them."""
    with profile(activities=[ProfilerActivity.CPU if TOY else ProfilerActivity.CUDA]) as profiler:
        call()
    events = profiler.key_averages()
    own = {e.key: (e.self_cpu_time_total if TOY else e.self_device_time_total) / 1e3 for e in events}
    longest = sorted(own, key=lambda key: -own[key])[:12]
    return {"ms": sum(own.values()), "kernels": sum(e.count for e in events), "longest": {k: own[k] for k in longest}}


def launches() -> Found:
    """Processor time of a call, not waiting for the device: the UNet's ops at shapes whose kernels are short."""
    dtype = torch.float32 if TOY else torch.float16
    random = functools.partial(torch.randn, device=DEVICE, dtype=dtype)
    q, k, v = random(3, 8, 64, 20, 64)
    x, weight, hidden = random(8, 320, 8, 8), random(320), random(8 * 64, 2560)
    calls = {
        "cross_view_attention": lambda: ops.cross_view_attention(q, k, v, 4),
        "group_norm_silu": lambda: ops.group_norm_silu(x, weight, weight, 32),
        "geglu": lambda: ops.geglu(hidden),
        "torch.empty_like": lambda: torch.empty_like(hidden),
    }
    with torch.no_grad():
        for name, call in calls.items():
            times = [unsynchronised(call, 5 if TOY else 50) for _ in range(3 if TOY else 20)]
            yield f"launch, {name}", {"us": min(times)}


def unsynchronised(call: Callable[[], object], n: int) -> float:
    """Microseconds of the processor a call, n of them into an empty queue."""
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        call()
    return 1e6 * (time.perf_counter() - start) / n


def attention() -> Found:
    """GPU time of attention at each level's shape, against torch's backends; and other tiles than the table's."""
    backends = {"torch's choice": F.scaled_dot_product_attention}
    if not TOY:
        backends |= {name: sdpa(getattr(SDPBackend, f"{name.upper()}_ATTENTION")) for name in ("cudnn", "flash")}
    for shape in [(8, 16, 2, 64)] if TOY else GPU_SHAPES:
        images, tokens, heads, width = shape
        packed = torch.randn(images, tokens, 3, heads, width, device=DEVICE, dtype=torch.float32 if TOY else torch.half)
        rows = packed.unbind(2)
        wide = [x.reshape(images // VIEWS, VIEWS * tokens, heads, width).transpose(1, 2).contiguous() for x in rows]
        camera = torch.randn(images, heads, width, device=DEVICE, dtype=packed.dtype)
        cameras = {f"camera_{name}": camera for name in "qkv"}
        calls = {name: functools.partial(call, *wide) for name, call in backends.items()}
        calls["ours, strided"] = functools.partial(ops.cross_view_attention, *rows, VIEWS)
        calls["ours, camera vectors"] = functools.partial(ops.cross_view_attention, *rows, VIEWS, **cameras)
        flops = 4 * images * VIEWS * tokens**2 * heads * width
        with torch.no_grad():
            for what, figures in turns(f"attention {shape}", calls):
                rate = {"TFLOP/s": flops / figures["ms"] / 1e9} if "ms" in figures else {}
                yield what, figures | rate


def field() -> Found:
    """The field, forward and with backward, by size of the table and order of the points. A batch at once goes level by
    level, in slices of 2^15 all levels at once: the same work by the two ways that the library has."""
    from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig

    n, piece = (1 << 10, 1 << 8) if TOY else (N_SAMPLES, 1 << 15)
    for log2_size in (15,) if TOY else (15, 17, 19):
        v = Volume(VolumeConfig(log2_size=log2_size)).to(DEVICE)
        inputs, networks = [*v.parameters()], ([*v.density_weights], [*v.feature_weights])
        d_out = [torch.randn(n, device=DEVICE), torch.randn(n, 3, device=DEVICE)]
        for order, x in (("uniform", torch.rand(n, 3, device=DEVICE) * 2 - 1), ("marched", _marched_points(n))):

            def forward(x=x, v=v, networks=networks):
                return ops.field(x, v.table, *networks, v.spec)

            def backward(x=x, forward=forward, inputs=inputs, d_out=d_out):
                torch.autograd.grad(forward(x), inputs, [d[: len(x)] for d in d_out])

            calls = {}
            for what, call, context in (("forward", forward, torch.no_grad), ("both", backward, torch.enable_grad)):
                calls[f"{what}, at once"] = _under(context, call, [x])
                calls[f"{what}, in slices"] = _under(context, call, x.split(piece))
            for what, figures in turns(f"field 2^{log2_size}, {order} points", calls):
                yield what, figures | ({"ns a sample": 1e6 * figures["ms"] / n} if "ms" in figures else {})


def _marched_points(n: int) -> torch.Tensor:
    """Points along rays, in the order in which a march makes them, in [-1, 1]^3: [n, 3]."""
    march, samples = marched(1)
    points = samples.positions(*march.args[:2])  # of the march's rays
    return (points.repeat(-(-n // len(points)), 1)[:n] / points.abs().max()).contiguous()


def _under(context: Callable[[], Any], call: Callable[[torch.Tensor], object], pieces) -> Callable[[], None]:
    def run():
        with context():
            for piece in pieces:
                call(piece)

    return run


def sds_step() -> Found:
    """A step of score distillation, `paper`, both stages: unsynchronised, then part by part, then its waits."""
    from mvdream_fast.distill.state import RunState
    from mvdream_fast.distill.systems import SDS_PRESETS
    from mvdream_fast.guidance.sds import SDS

    config = SDS_PRESETS["mini" if TOY else "paper"]
    for stage, first in enumerate((0, *config.milestones)):
        groups = config.n_groups[stage]
        state = RunState(config, "a benchmark", 0, SDS(_score(), config.cameras, lambda _, n=groups: n), DEVICE)
        steps = iter(range(first, first + 10_000))
        for _ in range(2 if TOY else 24):  # past the occupancy grid's start, and what is compiled or recorded at first
            state.step(next(steps))
        yield f"stage {stage + 1}", {"ms": milliseconds(lambda s=state, k=steps: s.step(next(k)), 2 if TOY else 50)}
        yield f"stage {stage + 1}, by part", _by_part(state, steps)
        yield f"stage {stage + 1}, waits", _waits(lambda s=state, k=steps: s.step(next(k)))


def _by_part(state: Any, steps: Iterator[int]) -> dict[str, Any]:
    """Milliseconds of each part, with the device waited for at its end."""
    clock, sums, n = state._clock, {}, 2 if TOY else 20
    part = clock.part

    def waiting(name: str) -> None:
        if not TOY:
            torch.cuda.synchronize()
        part(name)

    clock.part = waiting
    for _ in range(n):
        record = state.step(next(steps))
        for name, seconds in (record.seconds if record else {}).items():
            sums[name] = sums.get(name, 0.0) + 1e3 * seconds / n
    clock.part = part
    return {"ms": sums}


def _waits(call: Callable[[], object]) -> dict[str, Any]:
    """How often torch says that a call waits for the device, and where; waits inside C++ are not seen."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not TOY:
            torch.cuda.set_sync_debug_mode("warn")
        for _ in range(4):
            call()
        if not TOY:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return {"a step": len(places) / 4, "places": {place: places.count(place) for place in sorted(set(places))}}


def training() -> Found:
    """The embedded UNet's training step on many scenes."""
    call, n_images = training_step()
    for what, figures in turns("training step", {"ours": call}):
        yield what, figures | ({"images a second": 1e3 * n_images / figures["ms"]} if "ms" in figures else {})


def nerfacc() -> Found:
    """Weights and colours of packed samples, forward and backward, by nerfacc and by our functions of its names."""
    from mvdream_fast import nerfacc_compat

    libraries = {"ours": nerfacc_compat}
    try:
        import nerfacc as theirs  # pyright: ignore[reportMissingImports]  # only where it is installed

        libraries["nerfacc"] = theirs
    except ImportError as error:
        yield "nerfacc", {"error": str(error)}
    n_rays, a_ray = (64, 8) if TOY else (65_536, 85)
    ray_indices = torch.arange(n_rays, device=DEVICE).repeat_interleave(a_ray)
    t_starts = torch.rand(n_rays, a_ray, device=DEVICE).sort(1).values.flatten()
    sigmas, rgbs = torch.rand(n_rays * a_ray, device=DEVICE), torch.rand(n_rays * a_ray, 3, device=DEVICE)

    def call(library):
        density, color = sigmas.clone().requires_grad_(), rgbs.clone().requires_grad_()
        t_ends = t_starts + 0.01
        weights, _, _ = library.render_weight_from_density(
            t_starts, t_ends, density, ray_indices=ray_indices, n_rays=n_rays
        )
        colors = library.accumulate_along_rays(weights, color, ray_indices=ray_indices, n_rays=n_rays)
        torch.autograd.grad(colors.sum(), (density, color))

    calls = {name: functools.partial(call, library) for name, library in libraries.items()}
    yield from turns(f"weights and colours of {n_rays * a_ray} samples", calls)


def counters() -> Found:
    """L2's hit rate and bytes from memory of the field's kernels, where Nsight Compute is installed."""
    if not shutil.which("ncu"):
        yield "ncu", {"error": "Nsight Compute (ncu) is not on PATH"}
        return
    metrics = "lts__t_sector_hit_rate.pct,dram__bytes.sum,gpu__time_duration.sum"
    line = ["ncu", "--csv", "--metrics", metrics, "--kernel-name", "regex:field|encode|scatter", "--launch-count", "12"]
    code = (
        "import sys; sys.path[:0] = ['benchmarks', 'tests', 'tests/ops', '.']; import device_parts as d; d.one_field()"
    )
    done = subprocess.run([*line, sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    yield "ncu", {"said": done.stdout.splitlines()[-40:], "error": done.stderr[-300:]}


def one_field() -> None:
    """What `counters` looks at: the paper's field, forward and backward, once in a slice and once at once."""
    v = volume()
    networks = ([*v.density_weights], [*v.feature_weights])
    for n in (1 << 15, N_SAMPLES):
        x = torch.rand(n, 3, device=DEVICE) * 2 - 1
        density, color = ops.field(x, v.table, *networks, v.spec)
        torch.autograd.grad(density.sum() + color.sum(), [*v.parameters()])
