"""A training step of `mini` against the same model from diffusers' modules: same batch, same trainer, same numbers."""

import functools
import itertools

import numpy as np
import pytest
import torch
import trainings
from contest import faster, size, sizes, slower
from contestants import Contestant

from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import ImageSource, LatentSource, Shards
from mvdream_fast.data.shards import Sample, write_shard
from mvdream_fast.models.config import MINI
from mvdream_fast.rendering.orbits import PRESETS, orbit

N_SCENES, N_VIEWS = size(8, 2), trainings.N_VIEWS
LAYOUTS = {  # of diffusers, but for ours
    "reference": torch.contiguous_format,
    "diffusers channels_last": torch.channels_last,
    "ours": None,
}


@pytest.mark.timeout(1800)
def bench_step(contest):
    """Scenes of 4 views, 3D attention and cameras."""
    model = size("mini", "tiny")
    contest.run(
        f"training step {model}, {N_SCENES * N_VIEWS} images",
        "step",
        [
            Contestant(name, functools.partial(trainings.training, model, layout, N_SCENES), apart=True)
            for name, layout in LAYOUTS.items()
        ],
        work={"images": N_SCENES * N_VIEWS},
        goals=[faster(1.2, "reference"), faster(1.2, "diffusers channels_last")],
        budget_s=10,
        tolerance=1e-3,
    )


def bench_images(contest):
    """By images of a batch."""
    model = size("mini", "tiny")
    contest.scale(
        f"training step {model} by images",
        "step",
        "images",
        {
            n * N_VIEWS: {"ours": functools.partial(trainings.training, model, None, n)}
            for n in sizes((2, 4, 8, 16), (1, 2))
        },
        budget_s=10,
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Orbits of 16 views at 64 px: a shaded ball in one colour each, which packs like a render."""
    folder, n, side = tmp_path_factory.mktemp("shards"), 16, 64
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    light = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))
    cameras = orbit(PRESETS["embedded"], np.full(4, 0.5))
    meta = {"variants": [], "size": side, "columns": n, "c2w": cameras.c2w.reshape(n, 16).tolist(), "fovy": [0.7] * n}
    samples = []
    for k in range(size(256, 8)):
        views = np.zeros((n, side, side, 4), np.uint8)
        views[..., :3] = (light[..., None] * (k, 255 - k, 128)).astype(np.uint8)
        views[..., 3] = np.where(light > 0, 255, 0)
        samples.append(Sample(meta | {"key": f"ball{k}", "caption": f"a ball {k}"}, views))
    write_shard(folder / "train-00000.tar", samples)
    return Shards(folder)


def drawing(shards, source, multi_view: bool):
    steps = itertools.count()

    def call():
        shards.views.cache_clear()  # strips that were never decoded before
        return source.batch(Stream(0, next(steps), "batch"), N_SCENES, N_VIEWS, multi_view).images.shape[0]

    return call


@pytest.mark.parametrize("multi_view", [True, False], ids=["multi-view", "2d"])
def bench_batch(contest, shards, tmp_path, multi_view):
    """The batch of such a step: images, or latents of the cache."""
    shape = (MINI.unet.in_channels, MINI.latent_size, MINI.latent_size)
    latents = LatentSource(shards, lambda x: torch.zeros(len(x), *shape), tmp_path / "latents", shape, "k")
    for i in range(len(shards)):
        for background in range(3):
            latents._get(i, background, [0])
    sources = {"ours, from images": ImageSource(shards), "ours, from latents": latents}
    contest.run(
        f"batch of {N_SCENES * N_VIEWS}, {'multi-view' if multi_view else '2d'}",
        "call",
        {name: functools.partial(drawing, shards, source, multi_view) for name, source in sources.items()},
        work={"images": N_SCENES * N_VIEWS},
        goals=[slower(1, "ours, from images", "ours, from latents")],
    )
