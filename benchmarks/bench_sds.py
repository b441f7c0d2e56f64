"""One SDS step, ours against the same step of the same maths in plain torch and diffusers: time and peak memory.

`mini` is the embedded configuration; `paper` the paper's volume and recipe with a narrower model, so that a step fits a
small machine. "plain" takes the ops' references for the renderer and diffusers' UNet2DConditionModel under a regrouping
processor; the VAE is diffusers' own in both. Weights are random. A process of its own for each; ratios within one run.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

THREADS, WARM_UP = min(2, os.cpu_count() or 1), 2
STEPS = int(os.environ.get("MVDREAM_FAST_BENCH_STEPS", 5))
SIZES, CONTESTANTS = ("mini", "paper"), ("plain", "ours")
_results: dict[str, dict[str, dict]] = {}


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.timeout(1800)
def bench_step(benchmark, size, name):
    """The median of a few steps of a run, after two to warm up."""
    benchmark.group = f"sds step {size}"
    line = [sys.executable, __file__, size, name]
    result = {}

    def step():
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        result.update(json.loads(done.stdout.splitlines()[-1]))

    benchmark.pedantic(step, rounds=1)
    benchmark.extra_info |= result
    _results.setdefault(size, {})[name] = result


@pytest.fixture(scope="module", autouse=True)
def _ratios(request):
    """Prints, once all are through, how ours stands to plain torch: ratios within this run only."""
    yield
    lines = []
    for size, by_name in _results.items():
        for name, result in by_name.items():
            parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in result["parts"].items())
            lines.append(
                f"{size:6} {name:6} {result['step_s']:7.3f} s/step  {result['peak_mb']:6.0f} MB peak  ({parts})"
            )
        if len(by_name) == len(CONTESTANTS):
            speed = by_name["plain"]["step_s"] / by_name["ours"]["step_s"]
            memory = by_name["ours"]["peak_mb"] / by_name["plain"]["peak_mb"]
            lines.append(f"{size:6} ours against plain: {speed:.2f}x the speed, {memory:.2f}x the memory")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")


def measure(size: str, name: str) -> dict:
    """In this process: seconds of a step, its parts, and the process' high-water mark."""
    import torch

    from mvdream_fast.core.rng import Stream
    from mvdream_fast.diffusion.denoiser import TextCond
    from mvdream_fast.diffusion.schedule import NoiseSchedule
    from mvdream_fast.distill.state import RunState
    from mvdream_fast.guidance.sds import SDS, ScoreDistillation

    torch.set_num_threads(THREADS)
    model, config = configurations(size)
    unet, vae = build(model, name)
    if name == "plain":
        use_references()
    text = Stream(0, 0, "text").normal(2, model.text.context_length, model.unet.context_dim)
    schedule = NoiseSchedule.from_config(model.schedule)
    score = ScoreDistillation(unet, vae, schedule, TextCond(text[:1], text[1:]), config.guidance)
    state = RunState(config, "a benchmark", 0, SDS(score, config.cameras))
    seconds, parts = [], {}
    for step in range(WARM_UP + STEPS):
        start = time.perf_counter()
        record = state.step(step)
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
            for part, spent in record.seconds.items():
                parts[part] = parts.get(part, 0.0) + spent / STEPS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "step_s": statistics.median(seconds),
        "peak_mb": peak,
        "parts": parts,
        "n_samples": record.statistics["n_samples"],
    }


def configurations(size: str):
    from mvdream_fast.distill.config import replaced
    from mvdream_fast.distill.systems import SDS_PRESETS
    from mvdream_fast.models.config import MINI, SD21, UNetConfig, VAEConfig

    if size == "mini":
        return MINI, SDS_PRESETS["mini"]
    narrow = dataclasses.replace(
        SD21,
        unet=UNetConfig(model_channels=64, context_dim=256),
        vae=VAEConfig(block_out_channels=(32, 64, 128, 128)),
        text=dataclasses.replace(SD21.text, width=256),
    )
    # The references keep kilobytes a sample: the cap, the same for both, is what they have room for.
    first_stage = {"n_groups": (1,), "render_size": (64,), "milestones": (), "max_samples": 1 << 17}
    return narrow, replaced(SDS_PRESETS["paper"], samples_per_ray=128, **first_stage)


def build(model, name: str):
    import torch

    from mvdream_fast.models.unet import MultiViewUNet
    from mvdream_fast.models.vae import VAE

    torch.manual_seed(0)
    vae = VAE(model.vae, decoder=False).eval().requires_grad_(False)
    if name == "ours":
        return MultiViewUNet(model.unet).eval().requires_grad_(False), vae
    return PlainUNet(model), vae


class PlainUNet:
    """diffusers' UNet as guidance calls ours."""

    def __init__(self, model):
        from reference.diffusers_unet import diffusers_unet

        from mvdream_fast.core.rng import Stream
        from mvdream_fast.ops import MLP

        self.unet = diffusers_unet(model.unet, model.latent_size).eval().requires_grad_(False)
        width, draw = model.unet.time_embed_dim, Stream(0, 0, "camera").normal
        self.camera = MLP(draw(width, 16) / 4, draw(width) / 9, draw(width, width) / width**0.5, draw(width) / 9)

    def prepare_context(self, context):
        return context

    def __call__(self, z_t, times, context, camera, n_views, n_prompts):
        from reference.diffusers_unet import RegroupProcessor, add_camera

        from mvdream_fast.ops import camera_embedding

        if not hasattr(self, "n_views"):
            self.n_views = n_views
            self.unet.set_attn_processor(RegroupProcessor(n_views))
        add_camera(self.unet, camera_embedding(camera.repeat(n_prompts, 1), self.camera))
        context = context.repeat_interleave(n_views, 0)
        return self.unet(z_t.repeat(n_prompts, 1, 1, 1), times.repeat(n_prompts), context, return_dict=False)[0]


def use_references() -> None:
    """The renderer, the occupancy grid and the guidance of this process in plain torch."""
    from types import SimpleNamespace

    from mvdream_fast import ops
    from mvdream_fast.guidance import sds
    from mvdream_fast.scene.nerf import occupancy, renderer, volume

    def composite(sigmas, rgb, samples, background):
        return ops.composite_ref(sigmas, rgb, samples.t_starts, samples.t_ends, samples.packed_info, background)

    field = SimpleNamespace(field=ops.field_ref, field_density=ops.field_density_ref)
    for module, name, reference in (
        (renderer, "march_rays", ops.march_rays_ref),
        (renderer, "prune_samples", ops.prune_samples_ref),
        (renderer, "composite_samples", composite),
        (renderer, "render", ops.render_ref),
        (volume, "ops", field),
        (occupancy, "run_update", ops.update_occupancy_ref),
        (sds, "sds_target", ops.sds_target_ref),
    ):
        getattr(module, name)  # or the contestant would be ours
        setattr(module, name, reference)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    print(json.dumps(measure(*sys.argv[1:])))
