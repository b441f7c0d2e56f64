"""A training step of `mini` against the same model from diffusers' modules in eager torch: same batch, same trainer.

Both run training/unet.py's trainer (text tower, loss, backward, clipping, fused AdamW, average), with the same numbers
in their weights; only the UNet's modules differ. What the step could gain at most is told by Amdahl's law from the
share of diffusers' step that is glue (normalisation, activations, copies, additions) and not convolutions or matrix
products.
"""

import copy
import itertools
import statistics

import pytest

THREADS, N_SCENES, N_VIEWS, ROUNDS = 2, 8, 4, 12
CONTESTANTS = ("diffusers-contiguous", "diffusers-channels_last", "ours")
ARITHMETIC = ("convolution", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "scaled_dot_product", "flash",
              "_fused_adamw")  # fmt: skip
MULTI_VIEW_SHARE = 0.7  # of the steps
_results: dict[str, tuple[float, float, float]] = {}
_batches: dict[str, dict[str, float]] = {}


@pytest.fixture(scope="module")
def setting():
    """mini with 700 words, every weight drawn (a fresh model's last layers are zero), and one batch of latents."""
    import torch

    from mvdream_fast.camera import get_camera
    from mvdream_fast.core.rng import Stream
    from mvdream_fast.data.batches import Batch
    from mvdream_fast.models.config import MINI
    from mvdream_fast.models.tokenizer import build_subset_vocabulary
    from mvdream_fast.training.runs import new_model

    torch.set_num_threads(THREADS)
    captions = [f"a {color} armchair with cushions" for color in ("red", "blue", "green", "white") * 2]
    model = new_model("mini", build_subset_vocabulary(captions), seed=0)
    with torch.no_grad():
        for parameter in (p for p in model.unet.parameters() if not p.any()):
            parameter.normal_(std=0.02)
    size, channels = MINI.latent_size, MINI.unet.in_channels
    latents = Stream(0, 0, "latents").normal(N_SCENES * N_VIEWS, channels, size, size)
    batch = Batch(latents, get_camera(N_VIEWS).repeat(N_SCENES, 1), captions, N_VIEWS, encoded=True)
    return model, batch


@pytest.mark.parametrize("contestant", CONTESTANTS)
def bench_step(benchmark, setting, contestant):
    """8 scenes of 4 views, 3D attention and cameras."""
    benchmark.group = "training step of mini, 32 images"
    trainer = make_trainer(*setting, contestant)
    loss = trainer.train_step()["loss"]
    for _ in range(2):
        trainer.train_step()
    benchmark.pedantic(trainer.train_step, rounds=ROUNDS)
    _results[contestant] = statistics.median(benchmark.stats.stats.data), glue_share(trainer), loss


@pytest.mark.parametrize("kind", ["images", "latents"])
@pytest.mark.parametrize("mode", ["multi-view", "2d"])
def bench_batch(benchmark, shards, tmp_path_factory, kind, mode):
    """The batch of such a step: strips that were never decoded before, or latents of the cache."""
    import torch

    from mvdream_fast.core.rng import Stream
    from mvdream_fast.data.batches import ImageSource, LatentSource
    from mvdream_fast.models.config import MINI

    benchmark.group = "batch of 32 images"
    shape = (MINI.unet.in_channels, MINI.latent_size, MINI.latent_size)
    source, steps = ImageSource(shards), itertools.count()
    if kind == "latents":
        file = tmp_path_factory.mktemp("cache") / "latents"
        source = LatentSource(shards, lambda images: torch.zeros(len(images), *shape), file, shape, "k")
        for i in range(len(shards)):
            for background in range(3):
                source._get(i, background, [0])

    def draw():
        source.batch(Stream(0, next(steps), "batch"), N_SCENES, N_VIEWS, mode == "multi-view")

    benchmark.pedantic(draw, setup=shards.views.cache_clear, rounds=ROUNDS)
    _batches.setdefault(kind, {})[mode] = statistics.median(benchmark.stats.stats.data)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """256 orbits of 16 views at 64 px: a shaded ball in one colour each, which packs like a render."""
    import numpy as np

    from mvdream_fast.data.batches import Shards
    from mvdream_fast.data.shards import Sample, write_shard
    from mvdream_fast.rendering.orbits import PRESETS, orbit

    folder, n, size = tmp_path_factory.mktemp("shards"), 16, 64
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    light = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))
    cameras = orbit(PRESETS["embedded"], np.full(4, 0.5))
    meta = {"variants": [], "size": size, "columns": n, "c2w": cameras.c2w.reshape(n, 16).tolist(), "fovy": [0.7] * n}
    samples = []
    for k in range(256):
        views = np.zeros((n, size, size, 4), np.uint8)
        views[..., :3] = (light[..., None] * (k, 255 - k, 128)).astype(np.uint8)
        views[..., 3] = np.where(light > 0, 255, 0)
        samples.append(Sample(meta | {"key": f"ball{k}", "caption": f"a ball {k}"}, views))
    write_shard(folder / "train-00000.tar", samples)
    return Shards(folder)


def make_trainer(model, batch, contestant: str):
    from mvdream_fast.training.unet import Parts, Trainer, TrainOptions

    unet = copy.deepcopy(model.unet) if contestant == "ours" else from_diffusers(model.unet, contestant)
    parts = Parts(model.config, unet, copy.deepcopy(model.text), model.vae, model.tokenizer)

    class Same:
        def batch(self, *_):
            return batch

    return Trainer(parts, Same(), TrainOptions(n_views=N_VIEWS, multi_view_share=1.0, caption_dropout=0.0))


def from_diffusers(ours, contestant: str):
    """diffusers' UNet with our numbers, behind the signature of ours."""
    import torch
    from reference.diffusers_unet import RegroupProcessor, add_camera, diffusers_unet, load_ldm
    from torch import nn

    layout = getattr(torch, contestant.split("-")[1].replace("contiguous", "contiguous_format"))

    class FromDiffusers(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet, self.camera = diffusers_unet(ours.config, 8), copy.deepcopy(ours.camera_embed)
            load_ldm(self.unet, ours.state_dict(), ours.config)
            self.unet.set_attn_processor(RegroupProcessor(N_VIEWS))
            self.to(memory_format=layout)

        def forward(self, latents, t, context, camera, n_views):
            add_camera(self.unet, self.camera(camera))
            wide = context.repeat_interleave(n_views, 0)
            return self.unet(latents.contiguous(memory_format=layout), t, wide, return_dict=False)[0]

    return FromDiffusers()


def glue_share(trainer) -> float:
    """The share of a step's time that is neither convolution nor product nor attention nor the optimiser's own."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(2):
            trainer.train_step()
    times = {event.key: event.self_cpu_time_total for event in recorded.key_averages()}
    glue = sum(time for name, time in times.items() if not any(word in name for word in ARITHMETIC))
    return glue / sum(times.values())


@pytest.fixture(scope="module", autouse=True)
def _ratios(request):
    """Prints how ours stands to the better layout of diffusers: ratios within this run only."""
    yield
    lines = [f"{name:24} {s:7.3f} s a step, {glue:5.1%} glue, loss {x:.6f}" for name, (s, glue, x) in _results.items()]
    theirs = [_results[name] for name in CONTESTANTS[:2] if name in _results]
    if "ours" in _results and theirs:
        seconds, share, loss = min(theirs)
        speed, limit = seconds / _results["ours"][0], 1 / (1 - share)
        lines.append(f"ours against the better layout: {speed:.2f}x; without any glue: {limit:.2f}x, of which "
                     f"{speed / limit:.0%}; losses differ by {abs(loss - _results['ours'][2]):.1e}")  # fmt: skip
    for kind, seconds in _batches.items():
        mean = MULTI_VIEW_SHARE * seconds["multi-view"] + (1 - MULTI_VIEW_SHARE) * seconds["2d"]
        share = f", {mean / (mean + _results['ours'][0]):.1%} of our step" if "ours" in _results else ""
        lines.append(f"drawing a batch of {kind}: {mean * 1e3:.1f} ms{share}")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")
