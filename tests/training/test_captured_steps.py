"""Training steps as graphs leave the same bytes as eager ones: weights, moments, averages, losses; every trainer's.

The graphs are reference/graph_stand_in.py's, which refuses what CUDA would.
"""

import numpy as np
import pytest
import torch
from reference.graph_stand_in import GraphStandIn
from reference.random_model import CAPTIONS, NARROW_SD21, ONE_LEVEL, random_model
from reference.waits import Waits

from mvdream_fast.checkpoints.open import Model, load_model
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import Batch
from mvdream_fast.models import lora
from mvdream_fast.training.unet import Parts, Trainer, TrainOptions
from mvdream_fast.training.vae import VAEOptions, VAETrainer
from mvdream_fast.tuning.dreambooth import DreamBoothOptions, DreamBoothTrainer
from mvdream_fast.tuning.photos import PhotoSource

STEPS = 6


pytestmark = pytest.mark.usefixtures("capturable_without_a_word")


class Noise:
    """Images and captions at random, with cameras in multi-view mode."""

    def __init__(self, size: int):
        self.size = size

    def batch(self, stream, n_scenes, n_views, multi_view, **_):
        n, v = (n_scenes, n_views) if multi_view else (n_scenes * n_views, 1)
        captions = [CAPTIONS[i] for i in stream.integers(0, 3, n).tolist()]
        cameras = stream.normal(n * v, 16) if multi_view else None
        return Batch(2 * self.images(stream, n * v) - 1, cameras, captions, v, False)

    def images(self, stream, n):
        return stream.uniform(n, 3, self.size, self.size)


def parts_of(model: Model) -> Parts:
    return Parts(model.config, model.unet, model.text, model.vae, model.tokenizer)


def unet_trainer(graphs: bool, config=ONE_LEVEL, model: Model | None = None, **options) -> Trainer:
    model = model or random_model(config=config)
    options = {
        "batch_size": 2,
        "n_views": 2,
        "lr": 1e-3,
        "warmup": 1,
        "multi_view_share": 0.5,
        "ema": 0.9,
        "seed": 6,
    } | options
    source = Noise(model.config.vae.image_size)
    return Trainer(parts_of(model), source, TrainOptions(**options), graphs=graphs)


def tuner(graphs: bool, lora_rank: int = 0, checkpointing: bool = False, **options) -> DreamBoothTrainer:
    model = random_model(prediction="eps", config=ONE_LEVEL)
    if lora_rank:
        model.unet.requires_grad_(False)
        lora.add_adapters(model.unet, lora_rank)
    model.unet.gradient_checkpointing = checkpointing
    photos = Stream(0, 0, "photos").uniform(5, 3, 16, 16) * 2 - 1
    options = {"batch_size": 2, "lr": 1e-3, "preservation": 10.0} | options
    parts = parts_of(model)
    parts.unet.train(), parts.text.train(options.get("train_text", False))
    return DreamBoothTrainer(parts, PhotoSource(photos, "a red car"), DreamBoothOptions(**options), graphs)


def vae_trainer(graphs: bool, **options) -> VAETrainer:
    model = random_model()
    return VAETrainer(model.config, model.vae, Noise(16), VAEOptions(steps=STEPS, batch_size=3, warmup=1, **options),
                      graphs=graphs)  # fmt: skip


def same_bytes(make, steps: int = STEPS) -> list[dict[str, float]]:
    """Trains with graphs and without; returns the records."""
    runs = []
    for graphs in (True, False):
        trainer = make(graphs)
        records = [trainer.train_step() for _ in range(steps)]
        runs.append((records, {name: x.clone() for name, x in trainer.state().items()}))
    (ours, state), (eager, wanted) = runs
    assert ours == eager
    assert state.keys() == wanted.keys()
    for name, x in state.items():
        assert torch.equal(x, wanted[name]), name
    return ours


def graphs() -> int:
    return len(GraphStandIn.made)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 3},
        {"autocast": "bf16"},
        {"autocast": "fp16", "accumulate": 2},
        {"weighting": "min-snr", "train_text": False, "caption_dropout": 0.5},
    ],
    ids=lambda options: ",".join(map(str, options)) or "plain",
)
def test_unet_and_text_tower(options):
    """Of both modes: a step in 2D leaves the camera's layers without a gradient, so the optimiser passes them by."""
    records = same_bytes(lambda graphs: unet_trainer(graphs, **options))
    assert {r["multi_view"] for r in records} == {0.0, 1.0}
    assert graphs() == 2
    assert GraphStandIn.replays == STEPS * options.get("accumulate", 1) - 2


@pytest.mark.parametrize("layout", ["narrow sd21", "embedded"])
def test_other_layouts(layout):
    def make(graphs: bool) -> Trainer:
        if layout == "embedded":
            return unet_trainer(graphs, model=load_model("embedded", torch.float32), multi_view_share=1.0)
        return unet_trainer(graphs, NARROW_SD21, multi_view_share=1.0)

    same_bytes(make, 3)
    assert (graphs(), GraphStandIn.replays) == (1, 2)


def test_gradients_that_are_recomputed():
    def make(graphs: bool) -> Trainer:
        trainer = unet_trainer(graphs, multi_view_share=1.0)
        trainer.parts.unet.gradient_checkpointing = True
        return trainer

    same_bytes(make, 4)
    assert (graphs(), GraphStandIn.replays) == (1, 3)


def test_steps_that_the_scaler_leaves_out():
    """float16 overflows at first; the scale falls, and a graph sees the new one."""

    def make(graphs: bool) -> Trainer:
        trainer = unet_trainer(graphs, autocast="fp16", multi_view_share=1.0)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        return trainer

    records = same_bytes(make)
    assert records[0]["grad_norm"] == 0.0
    assert GraphStandIn.replays == STEPS - 1


def test_what_lies_between_steps_is_seen(tmp_path):
    """Validation, a sample, a restored checkpoint, other weights, and a switch of what is trained."""
    trainers = [unet_trainer(graphs) for graphs in (True, False)]

    def step(n: int) -> None:
        for _ in range(n):
            one, two = (trainer.train_step() for trainer in trainers)
            assert one == two

    step(3)
    saved = [(t.step, {k: v.clone() for k, v in t.state().items()}, t.meta()) for t in trainers]
    figures = [trainer.validate(Noise(16)) for trainer in trainers]
    assert figures[0] == figures[1]
    assert torch.equal(*(trainer.sample(["a red car"], 2, 2.0) for trainer in trainers))
    step(2)
    for trainer, state in zip(trainers, saved, strict=True):
        trainer.restore(*state)
    step(2)
    for trainer in trainers:
        other = random_model(seed=1, config=ONE_LEVEL).unet.state_dict()
        with torch.no_grad():
            for name, p in trainer.parts.unet.named_parameters():
                p.data = other[name].clone()
    step(4)
    for trainer in trainers:
        trainer.parts.unet.eval()
    step(4)
    ours, eager = (trainer.state() for trainer in trainers)
    assert all(torch.equal(ours[name], eager[name]) for name in eager)
    assert graphs() == 6  # of both modes: as they were, with other weights, and in eval mode


def test_a_resumed_run_has_the_same_bytes_as_one_that_was_not_stopped():
    whole, first, second = unet_trainer(True), unet_trainer(True), unet_trainer(True)
    for _ in range(STEPS):
        whole.train_step()
    for _ in range(3):
        first.train_step()
    second.restore(first.step, first.state(), first.meta())
    for _ in range(3, STEPS):
        second.train_step()
    assert all(torch.equal(x, second.state()[name]) for name, x in whole.state().items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2, "train_text": True, "autocast": "bf16"},
        {"lora_rank": 2},
        {"lora_rank": 2, "checkpointing": True, "accumulate": 2},
    ],
    ids=lambda options: ",".join(map(str, options)) or "plain",
)
def test_dreambooth(options):
    records = same_bytes(lambda graphs: tuner(graphs, **options))
    assert graphs() == 1
    assert records[-1]["distance"] > 0


def test_dreambooth_3d_alternates_between_photos_and_views():
    """The last tuning's mixture: once multi-view steps have moved the camera's layers, 2D steps pull them back."""

    def make(graphs: bool) -> DreamBoothTrainer:
        trainer = tuner(graphs, n_views=2, multi_view_share=0.5)
        trainer.source = Noise(16)
        return trainer

    records = same_bytes(make, 8)
    assert {r["multi_view"] for r in records} == {0.0, 1.0}
    assert graphs() == 2


@pytest.mark.parametrize("options", [{}, {"decoder_only": True, "ema": 0.0}], ids=["whole", "decoder"])
def test_the_autoencoder(options):
    records = same_bytes(lambda graphs: vae_trainer(graphs, **options))
    assert (graphs(), GraphStandIn.replays) == (1, STEPS - 1)
    assert np.isfinite([r["psnr"] for r in records]).all()


@pytest.mark.parametrize(
    ("make", "reads"),
    [
        (lambda: unet_trainer(False, accumulate=3), {"reads.py:read": 1, "processes.py:number": 1}),
        (lambda: vae_trainer(False), {"reads.py:read": 1, "processes.py:number": 1}),
        (lambda: tuner(False, lora_rank=2), {"reads.py:read": 2, "processes.py:number": 1}),
        (lambda: tuner(False), {"reads.py:read": 2, "processes.py:number": 1}),
    ],
    ids=["unet", "vae", "adapters", "dreambooth"],
)
def test_how_often_a_step_asks_the_device(make, reads):
    """The losses, the gradients' norm and the distance from the first weights; each question is a wait on a GPU."""
    trainer = make()
    trainer.train_step()
    drawn = trainer.draw(trainer.step)
    trainer.ahead = lambda step: drawn
    with Waits() as waits:
        trainer.train_step()
    assert waits.at == reads
