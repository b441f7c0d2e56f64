"""DreamBooth: the loss and its pull back equal their formula, 2D mode is 2D, the token has its row, adapters merge
exactly. test_tuning_runs.py has the command."""

import copy
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference.random_model import TINY, random_model
from torch import nn

from mvdream_fast import dreambooth
from mvdream_fast.checkpoints.open import Model, save_model
from mvdream_fast.core import cli, run_folder
from mvdream_fast.core.errors import DivergedError
from mvdream_fast.core.files import read_json
from mvdream_fast.core.rng import Stream
from mvdream_fast.models import lora
from mvdream_fast.models.config import SamplingGuidance, TextConfig
from mvdream_fast.models.text import TextEncoder
from mvdream_fast.models.tokenizer import CLIP_ROWS, Tokenizer
from mvdream_fast.models.unet import MultiViewUNet
from mvdream_fast.training import step_estimate
from mvdream_fast.training.unet import Parts, spread_timesteps
from mvdream_fast.tuning import tune
from mvdream_fast.tuning.dreambooth import (
    AdapterPreservation,
    DreamBoothOptions,
    DreamBoothTrainer,
    Preservation,
    lr_share,
)
from mvdream_fast.tuning.photos import PhotoSource

PROMPT = "a photo of a sks chair"
ESTIMATE = functools.cache(step_estimate.estimate_step)  # the same for every run here, and a second of work


@pytest.fixture(scope="module")
def base() -> Model:
    """Guided away from single images, as the embedded model is."""
    return random_model(config=dataclasses.replace(TINY, guidance=SamplingGuidance(uncond_mode="2d")))


@pytest.fixture(scope="module")
def model(base, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(base, folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder, draws = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(draws.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step_estimate, "estimate_step", ESTIMATE)


def trainer(base: Model, lora_rank: int = 0, **options) -> DreamBoothTrainer:
    model = copy.deepcopy(base)
    if lora_rank:
        lora.add_adapters(model.unet.requires_grad_(False), lora_rank)
    pictures = Stream(0, 0, "photos").uniform(3, 3, 16, 16, low=-1, high=1)
    parts = Parts(model.config, model.unet, model.text, model.vae, model.tokenizer)
    options = {"batch_size": 2, "lr": 1e-3, "clip": 1e9} | options
    return DreamBoothTrainer(parts, PhotoSource(pictures, "a red car"), DreamBoothOptions(**options))


def command(*arguments) -> int:
    """The exit code of the command, run in this process."""
    try:
        cli.run(dreambooth.main, dreambooth.Flags, prog="dreambooth", argv=[str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def wanted(photos: Path, model: str, *more) -> tuple:
    return ("--instance_data_dir", photos, "--instance_prompt", PROMPT, "--model", model, "--threads", 1, *more)


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return run_folder.load_latest(folder / "checkpoints")[1]


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


# The loss


@pytest.mark.parametrize("weight", [0.0, 1.0, 1e3])
def test_the_pull_on_known_numbers(weight):
    """theta_0 = (1, -2, 3), (5); theta = (1.5, -2, 2), (4): ||.||_1 / N = (0.5 + 0 + 1 + 1) / 4."""
    parameters = [nn.Parameter(torch.tensor([1.0, -2.0, 3.0])), nn.Parameter(torch.tensor([5.0]))]
    pull = Preservation(parameters, weight)
    with torch.no_grad():
        parameters[0].copy_(torch.tensor([1.5, -2.0, 2.0]))
        parameters[1].fill_(4.0)
    parameters[0].grad = torch.tensor([10.0, 20.0, 30.0])
    assert pull.backward() == 2.5 / 4
    torch.testing.assert_close(parameters[0].grad, torch.tensor([10 + weight / 4, 20.0, 30 - weight / 4]))
    if weight:
        assert parameters[1].grad.tolist() == [-weight / 4]
    else:
        assert parameters[1].grad is None


@pytest.mark.parametrize("weight", [0.0, 1.0, 1e4])
def test_one_step_is_the_whole_formula(base, weight, monkeypatch):
    """L_LDM in 2D mode plus lambda ||theta - theta_0||_1 / N, written out with autograd, gradient by gradient."""
    one = trainer(base, preservation=weight)
    initial = [p.detach().clone() for p in one.parts.unet.parameters()]
    with torch.no_grad():
        for i, p in enumerate(one.parts.unet.parameters()):
            p.add_(Stream(0, i, "moved").normal(*p.shape), alpha=1e-3)
    twin = copy.deepcopy(one.parts.unet)

    stream, schedule = Stream(0, 0, "train/0"), one.schedule
    batch = one.source.batch(Stream(0, 0, "train/0/batch"), 2, 1, False)
    z = one.parts.vae.encode(batch.images, stream.normal(2, 4, 8, 8))
    t = spread_timesteps(stream, 2, 1000)
    noise = stream.normal(*z.shape)
    a, s = schedule.alphas[t][:, None, None, None], schedule.sigmas[t][:, None, None, None]
    context = one.parts.text(one.parts.tokenizer.encode(["a red car"] * 2).ids)
    out = twin(a * z + s * noise, t, context.detach())  # no camera, one view
    denoising = (out - (a * noise - s * z)).square().mean()
    n = sum(p.numel() for p in twin.parameters())
    distance = sum((p - p0).abs().sum() for p, p0 in zip(twin.parameters(), initial)) / n
    whole = denoising + weight * distance
    whole.backward()

    found = {}
    monkeypatch.setattr(one.scaler, "step", lambda _: found.update({n: p.grad for n, p in one.named.items()}))
    record = one.train_step()
    assert record["loss"] == pytest.approx(whole.item(), rel=1e-5)
    assert record["denoising"] == pytest.approx(denoising.item(), rel=1e-5)
    assert record["distance"] == pytest.approx(distance.item(), rel=1e-5)
    for name, p in twin.named_parameters():
        if p.grad is None or (not weight and found[f"unet.{name}"] is None):
            assert found[f"unet.{name}"] is None, name
        else:
            torch.testing.assert_close(found[f"unet.{name}"], p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("weight", "ends"), [(0.0, [3.0, 0.1]), (2.0, [2.5, 0.0]), (20.0, [0.0, 0.0])])
def test_weights_that_are_needed_go_and_the_others_stay(weight, ends):
    """The loss (p - 3)^2 + (q - 0.1)^2 with lambda/2 (|p| + |q|) has its minimum lambda/4 nearer to zero, or there."""
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    pull, rate_of = Preservation(weights, weight), 0.01
    for _ in range(600):
        for p in weights:
            p.grad = None
        ((weights[0] - 3).square() + (weights[1] - 0.1).square()).sum().backward()
        pull.backward()
        with torch.no_grad():
            for p in weights:
                p.sub_(rate_of * p.grad)
    assert [p.item() for p in weights] == pytest.approx(ends, abs=rate_of * weight / 2 + 1e-3)


def test_2d_mode_has_no_camera_and_one_view(base, monkeypatch):
    one, calls = trainer(base), []
    forward = MultiViewUNet.forward

    def spy(self, latents, t, context, camera=None, n_views=1, n_prompts=1):
        calls.append((len(latents), camera, n_views))
        return forward(self, latents, t, context, camera, n_views, n_prompts)

    monkeypatch.setattr(MultiViewUNet, "forward", spy)
    before = {name: p.detach().clone() for name, p in one.parts.unet.named_parameters()}
    one.train_step()
    assert calls == [(2, None, 1)]
    moved = {name for name, p in one.parts.unet.named_parameters() if not torch.equal(p, before[name])}
    assert any("attn1" in name for name in moved)
    assert not any("camera_embed" in name for name in moved)


def test_what_is_trained(base):
    frozen = trainer(base)
    assert all(name.startswith("unet.") for name in frozen.named)
    both = trainer(base, train_text=True)
    assert {name.split(".")[0] for name in both.named} == {"unet", "text"}
    assert both.preservation.n == sum(p.numel() for p in base.unet.parameters())  # theta is the UNet's alone
    states = [p.clone() for p in both.parts.text.parameters()]
    both.train_step()
    assert any(not torch.equal(p, was) for p, was in zip(both.parts.text.parameters(), states))
    assert all(not p.requires_grad for p in both.parts.vae.parameters())


def test_the_learning_rate():
    warm = DreamBoothOptions(warmup=4, steps=104)
    assert [lr_share(warm, s) for s in (0, 1, 3, 4, 100)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear, cosine = (dataclasses.replace(warm, lr_scheduler=kind) for kind in ("linear", "cosine"))
    assert [lr_share(linear, s) for s in (3, 4, 54, 104)] == [1.0, 1.0, 0.5, 0.0]
    assert lr_share(cosine, 54) == pytest.approx(0.5)
    assert lr_share(cosine, 29) == pytest.approx(0.853553, abs=1e-6)
    one_lr = DreamBoothOptions()
    assert (one_lr.lr, one_lr.batch_size, one_lr.steps, one_lr.preservation, one_lr.weight_decay) == (
        2e-6, 4, 600, 1.0, 0.0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_mixed_precision_trains_float32_weights(base, kind):
    one = trainer(base, autocast=kind)
    record = one.train_step()
    assert np.isfinite(record["loss"])
    assert {p.dtype for p in one.parameters} == {torch.float32}
    exact = trainer(base).train_step()
    assert record["loss"] == pytest.approx(exact["loss"], rel=0.03)


def test_accumulation_and_checkpointing(base):
    plain, saving = trainer(base), trainer(base)
    saving.parts.unet.gradient_checkpointing = True
    assert plain.train_step() == saving.train_step()
    assert_same(plain.state(), saving.state())
    twice = trainer(base, accumulate=2)
    twice.train_step()
    assert twice.step == 1


def test_photos_are_encoded_once_to_the_means(base):
    model = copy.deepcopy(base)
    parts = Parts(model.config, model.unet, model.text, model.vae, model.tokenizer)
    plan = tune.Plan({"instance_prompt": "a red car"}, model.config)
    photos = np.full((2, 16, 16, 4), 255, np.uint8)
    photos[1, ..., 3] = 0  # transparent: grey
    source = tune.photo_source(plan, photos, parts)
    batch = source.batch(Stream(0, 0, "x"), 2, 1, False)
    assert batch.encoded
    with torch.no_grad():
        wanted = base.vae.encode(torch.stack([torch.ones(3, 16, 16), torch.zeros(3, 16, 16)]))
    torch.testing.assert_close(source.images, wanted)
    one = DreamBoothTrainer(parts, source, DreamBoothOptions(batch_size=2))
    drawn = one.draw(0)[0]
    assert torch.equal(one.latents(drawn), drawn.images)


# Low-rank adapters


def context_of(model: Model) -> torch.Tensor:
    return model.text(model.tokenizer.encode(["a red car"]).ids)


@torch.no_grad()
def test_adapters_begin_as_nothing_and_merge_exactly(base):
    one = trainer(base, lora_rank=3)
    latents, t = Stream(0, 0, "z").normal(4, 4, 8, 8), torch.tensor([10, 200, 500, 900])
    camera, context = Stream(0, 0, "c").normal(4, 16), context_of(base)
    unet = one.parts.unet
    torch.testing.assert_close(unet(latents, t, context, camera, 4), base.unet(latents, t, context, camera, 4))
    assert all("lora_" in name for name in one.named)
    with torch.enable_grad():
        for _ in range(3):
            one.train_step()
    tuned = unet(latents, t, context, camera, 4)
    assert (tuned - base.unet(latents, t, context, camera, 4)).abs().max() > 1e-3
    plain = copy.deepcopy(base.unet)
    state = lora.merged_state(unet)
    assert state.keys() == base.unet.state_dict().keys()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(latents, t, context, camera, 4), tuned, rtol=1e-4, atol=1e-5)
    changed = {name for name, value in state.items() if not torch.equal(value, base.unet.state_dict()[name])}
    assert changed
    assert all(any(part in name for part in ("to_q", "to_k", "to_v", "to_out.0")) for name in changed)


def test_the_pull_on_adapters_is_that_on_the_weights_they_stand_for(base):
    one = trainer(base, lora_rank=2, preservation=100.0)
    layers = lora.adapted(one.parts.unet)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.lora_B["default"].weight.copy_(Stream(0, i, "b").normal(*layer.lora_B["default"].weight.shape))
    n = sum(p.numel() for p in base.unet.parameters())
    assert isinstance(one.preservation, AdapterPreservation)
    assert one.preservation.n == n
    merged, plain = lora.merged_state(one.parts.unet), base.unet.state_dict()
    distance = sum((merged[name] - plain[name]).abs().sum().item() for name in plain) / n
    assert one.preservation.backward() == pytest.approx(distance, rel=1e-5)
    a, b = layers[0].lora_A["default"].weight, layers[0].lora_B["default"].weight
    sign = (b @ a).sign()
    torch.testing.assert_close(b.grad, 100 / n * sign @ a.detach().T)
    torch.testing.assert_close(a.grad, 100 / n * b.detach().T @ sign)


@pytest.mark.parametrize(("flags", "graphs"), [((), True), (("--no-graphs",), False)])
def test_graphs_are_made_unless_they_are_switched_off(flags, graphs, photos, model, monkeypatch):
    made = []

    class Noted(DreamBoothTrainer):
        def train_step(self):
            made.append(self)
            raise DivergedError("that will do")

    monkeypatch.setattr(tune, "DreamBoothTrainer", Noted)
    assert command(*wanted(photos, model, "-o", "run", *flags)) == DivergedError.exit_code
    assert made[0]._descent.enabled == graphs
    settings = read_json(Path("run/config.json"))["settings"]
    assert "graphs" not in settings  # a resume chooses anew


# The token


def test_the_token_gets_a_row_of_its_own(base):
    model = copy.deepcopy(base)
    rows = base.text.model.embeddings.token_embedding.weight
    assert model.tokenizer.encode("a sks chair").unknown == [["sks"]]
    tune.add_token(model, "sks")
    assert model.tokenizer.encode("a sks chair").unknown == [[]]
    assert model.config.text.vocabulary_size == len(rows) + 1 == len(model.tokenizer.vocabulary)
    grown = model.text.model.embeddings.token_embedding.weight
    assert torch.equal(grown[:-1], rows)
    torch.testing.assert_close(grown[-1], rows[4:].mean(0))
    assert model.tokenizer.encode("a sks chair").ids[0, 2] == len(rows)
    tune.add_token(model, "SKS")  # a tuned model is tuned again
    assert len(model.tokenizer.vocabulary) == len(rows) + 1
    for _ in range(2):
        tune.add_token(model, "\ufb01x")  # a ligature is read as two letters
    assert model.tokenizer.vocabulary[len(rows) + 1 :] == ["<word:fix>"]


def test_clips_own_table_has_the_token():
    config = TextConfig(width=8, n_layers=1, n_heads=1, mlp_width=8, skip_last=0, context_length=16)
    base = random_model()
    config_of = dataclasses.replace(base.config, text=config)
    with torch.device("meta"):
        text = TextEncoder(config)
    model = Model(config_of, text=text, tokenizer=Tokenizer(config))
    tune.add_token(model, "sks")
    assert model.config.text.vocabulary_size == CLIP_ROWS
    assert model.tokenizer.encode("sks").ids[0, :4].tolist() == [49406, 48136, 49407, 0]  # one token, a rare one
