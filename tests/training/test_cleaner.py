"""What cleans sampled latents: the pairs that it learns from, its updates, and the run of `train --stage cleaner`."""

from dataclasses import replace

import pytest
import torch
from test_train import data, flags, make_trainer, tiny

from mvdream_fast.checkpoints.open import load_model, save_model
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.data.batches import ImageSource, Shards
from mvdream_fast.diffusion import denoiser as module
from mvdream_fast.models.config import SamplingGuidance
from mvdream_fast.models.tokenizer import build_subset_vocabulary
from mvdream_fast.train import main
from mvdream_fast.training import runs
from mvdream_fast.training.cleaner import KEPT, NOISE, CleanerTrainer
from mvdream_fast.training.initial_model import new_model
from mvdream_fast.training.touched import CHECKED, GUIDANCE, TouchedOptions, with_network

__all__ = ["data", "tiny"]  # fixtures


def cleaner_trainer(data, **options) -> CleanerTrainer:
    shards = Shards(data)
    model = with_network(new_model("mini", build_subset_vocabulary(shards.captions()), seed=0), "cleaner", 128, 0)
    parts = runs.Parts(model.config, model.unet, model.text, model.vae, model.tokenizer)
    return CleanerTrainer(
        parts, model.vae, ImageSource(shards), TouchedOptions(**{"batch_size": 2, "steps": 8, "warmup": 1} | options)
    )


def test_scenes_are_a_function_of_seed_and_place(data):
    trainer = cleaner_trainer(data)
    a, b, other = (trainer.draw(place) for place in (1, 1, 2))
    assert a.images.shape == (8, 3, 16, 16)
    assert a.cameras.shape == (8, 16)
    assert a.noise.shape == (8, 4, 4, 4)
    assert len(a.ids) == 1 + 2
    assert all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))
    assert a[5:] == b[5:]
    for different in (other, cleaner_trainer(data, seed=1).draw(1), trainer.draw(CHECKED)):
        assert not torch.equal(a.noise, different.noise)


def test_all_strengths_come_and_guidance_stays_in_its_range(data):
    trainer = cleaner_trainer(data, batch_size=1)
    scenes = [trainer.draw(place) for place in range(30)]
    assert {s.strength for s in scenes} == set(CleanerTrainer.strengths)
    scales = [s.guidance for s in scenes]
    assert GUIDANCE[0] <= min(scales) < 3
    assert 8 < max(scales) < GUIDANCE[1]


@pytest.mark.parametrize("strength", CleanerTrainer.strengths)
def test_a_perfect_denoiser_leaves_nothing_to_clean(data, strength, monkeypatch):
    """It knows the image and says the v of it, twice: so noise, timesteps and the order of the halves fit together."""
    trainer = cleaner_trainer(data)
    scenes = trainer.draw(1)._replace(strength=strength)
    exact, schedule, asked = trainer.vae.encode(scenes.images), trainer.schedule, []

    class Perfect:
        def __init__(self, unet, text, n_views, guided, captured):
            assert (guided, captured) == (True, None)
            assert (len(text.cond), len(text.uncond), n_views) == (2, 2, 4)
            assert torch.equal(text.uncond[0], text.uncond[1])
            assert not torch.equal(text.cond[0], text.uncond[0])

        def for_sampler(self, cameras):
            assert torch.equal(cameras, scenes.cameras)
            return self.answer

        def answer(self, latents, t):
            asked.append(int(t))
            alpha, sigma = schedule.alphas[t], schedule.sigmas[t]
            v = (alpha * latents[: len(exact)] - exact) / sigma
            return torch.cat([v, v])

    monkeypatch.setattr(module, "Denoiser", Perfect)
    touched, clean = trainer.pairs(scenes)
    assert torch.equal(clean, exact)
    assert asked == {0.4: [201, 1], 0.6: [401, 201, 1]}[strength]
    # The last step ends at the schedule's first noise level, sigma 0.03, with the noise that was put on.
    torch.testing.assert_close(touched, schedule.add_noise(exact, scenes.noise, 0), rtol=0, atol=2e-3)


def test_a_model_that_draws_away_from_single_images_is_touched_so(data, monkeypatch):
    """Without the prompt it is asked in 2D mode, as the pipeline asks it: no cameras, each view by itself."""
    trainer, asked = cleaner_trainer(data), []
    usual = replace(trainer.parts.config, guidance=SamplingGuidance(3.5, "2d"))
    for p in trainer.parts.unet.parameters():  # of a new one many are zero
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    scenes = trainer.draw(1)
    before = trainer.pairs(scenes)[0]
    trainer.parts = replace(trainer.parts, config=usual)
    plain = module.Denoiser

    def counted(unet, text, n_views, guided, captured):
        asked.append((len(text.cond), n_views, guided))
        return plain(unet, text, n_views, guided, captured)

    monkeypatch.setattr(module, "Denoiser", counted)
    assert not torch.equal(trainer.pairs(scenes)[0], before)
    assert asked == [(8, 1, False), (2, 4, False)]


def test_the_unet_leaves_its_marks(data):
    trainer = cleaner_trainer(data)
    touched, exact = trainer.pairs(trainer.draw(1))
    assert not touched.requires_grad
    assert (touched - exact).std() > 0.05


def test_noise_of_every_strength_but_on_some(data):
    trainer = cleaner_trainer(data)
    exact = torch.zeros(4 * KEPT, 4, 8, 8)
    noise = trainer.noisy(exact)
    kept, rest = noise[::KEPT], noise[[i for i in range(len(noise)) if i % KEPT]]
    assert not kept.any()
    strengths = (rest - rest.mean((2, 3), keepdim=True)).flatten(1).std(1)
    assert strengths.min() < 0.2 * NOISE
    assert 0.8 * NOISE < strengths.max() < 1.1 * NOISE
    shared = rest.mean((2, 3)).std(1) / strengths  # over its own, with the rest of 1 / 8 that a mean of 64 cells has
    assert 0.5 < shared.mean() < 0.9
    assert torch.equal(noise, trainer.noisy(exact))
    trainer.step += 1
    assert not torch.equal(noise, trainer.noisy(exact))


def test_the_cleaner_alone_learns(data):
    trainer = cleaner_trainer(data, lr=3e-3, steps=40)
    before = {name: x.clone() for name, x in trainer.vae.state_dict().items()}
    records = [trainer.train_step() for _ in range(40)]
    assert records[0]["loss"] == records[0]["without"]  # it begins without effect
    last = records[-8:]
    assert sum(r["loss"] for r in last) < 0.9 * sum(r["without"] for r in last)
    changed = {name for name, x in trainer.vae.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {name for name in before if ".decoder.cleaner." in name}


def test_an_autoencoder_without_a_cleaner_is_refused(data):
    parts = make_trainer(data).parts
    with pytest.raises(ValueError, match="must have a decoder_cleaner"):
        CleanerTrainer(parts, parts.vae, ImageSource(Shards(data)), TouchedOptions())


@pytest.fixture
def model(data, tmp_path):
    whole = new_model("mini", build_subset_vocabulary(Shards(data).captions()), seed=0)
    save_model(whole, tmp_path / "first")
    return tmp_path / "first"


def test_a_run_adds_a_cleaner_and_leaves_all_else(data, model, tmp_path):
    args = {"stage": "cleaner", "init": str(model)}
    main(flags(data, tmp_path / "straight", steps=4, **args))
    before, after = load_model(model), load_model(tmp_path / "straight" / "model")
    assert after.config == replace(before.config, vae=replace(before.config.vae, decoder_cleaner=128))
    assert after.tokenizer.vocabulary == before.tokenizer.vocabulary
    for part in ("unet", "text", "vae"):
        was, now = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        assert [name for name in was if not torch.equal(was[name], now[name])] == []
        new = {name for name in now if name not in was}
        assert all(".decoder.cleaner." in name for name in new)
        assert bool(new) == (part == "vae")
    assert after.vae.cleaner.conv_out.weight.any()
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(before.vae.decode(z), after.vae.decode(z))
    # One that is there already is trained on.
    main(flags(data, tmp_path / "more", stage="cleaner", init=str(tmp_path / "straight" / "model"), steps=2))
    more = load_model(tmp_path / "more" / "model")
    assert more.config == after.config
    assert not torch.equal(more.vae.cleaner.conv_out.weight, after.vae.cleaner.conv_out.weight)


def test_models_without_an_autoencoder_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "load_model", lambda *_: new_model("pixels", build_subset_vocabulary([]), seed=0))
    with pytest.raises(ArgumentError, match="--stage cleaner needs a model with an autoencoder, got pixels"):
        main(flags(data, tmp_path, stage="cleaner", init="pixels"))
