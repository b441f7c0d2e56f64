"""What tells things from backgrounds: the pairs that it learns from, its updates, and `train --stage matting`."""

from dataclasses import replace

import pytest
import torch
from test_batches import make_sample
from test_train import flags, make_trainer, tiny

from mvdream_fast.checkpoints.open import load_model, save_model
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import ImageSource, Shards
from mvdream_fast.data.shards import write_shard
from mvdream_fast.models.tokenizer import build_subset_vocabulary
from mvdream_fast.train import main
from mvdream_fast.training import runs
from mvdream_fast.training.initial_model import new_model
from mvdream_fast.training.matting import COLORS, OPACITY, SQUARED, MattingTrainer
from mvdream_fast.training.touched import CHECKED, TouchedOptions, with_network

__all__ = ["tiny"]  # a fixture


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Things that fill the middle of their images, half of it by half."""
    folder, samples = tmp_path_factory.mktemp("shards"), [make_sample(40 * i) for i in range(6)]
    for sample in samples:
        sample.views[..., 3] = 0
        sample.views[:, 3:12, 4:8, 3], sample.views[:, 3:12, 8:13, 3] = 255, 128
    write_shard(folder / "train-00000.tar", samples[:5])
    write_shard(folder / "held_out-00000.tar", samples[5:])
    return folder


def matting_trainer(data, **options) -> MattingTrainer:
    shards = Shards(data)
    model = with_network(new_model("mini", build_subset_vocabulary(shards.captions()), seed=0), "matting", 16, 0)
    parts = runs.Parts(model.config, model.unet, model.text, model.vae, model.tokenizer)
    options = TouchedOptions(**{"batch_size": 2, "steps": 8, "warmup": 1} | options)
    return MattingTrainer(parts, model.vae, ImageSource(shards), options)


def test_scenes_are_what_a_batch_of_the_same_stream_is(data):
    """And the images are the colours, so far as they are opaque, before a flat background."""
    trainer = matting_trainer(data)
    scenes = trainer.draw(1)
    stream = Stream(0, 1, "matting/scenes")
    batch = trainer.source.batch(stream, 2, 4, True)
    assert torch.equal(scenes.images, batch.images)
    assert torch.equal(scenes.cameras, batch.cameras)
    assert scenes.rgba.shape == (8, 4, 16, 16)
    rgba = scenes.rgba.float() / 255
    assert rgba[:, 3].unique().tolist() == pytest.approx([0, 128 / 255, 1])
    for image, (r, g, b, alpha) in zip(scenes.images / 2 + 0.5, rgba, strict=True):
        behind = image[:, :1, :1]
        torch.testing.assert_close(image, torch.stack([r, g, b]) * alpha + behind * (1 - alpha))


def test_what_is_seen_is_decoded_touched_then_exact(data):
    trainer = matting_trainer(data)
    scenes = trainer.draw(1)
    touched, exact = trainer.pairs(scenes)
    seen = trainer.prepared(scenes)
    with torch.no_grad():
        wanted = torch.cat([trainer.vae.plain(touched), trainer.vae.plain(exact)])
    torch.testing.assert_close(seen.decoded.float(), wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(seen.latents.float(), torch.cat([touched, exact]), rtol=1e-2, atol=1e-2)


def test_a_perfect_matte_has_no_error_and_others_what_they_are_off(data, monkeypatch):
    trainer = matting_trainer(data)
    seen = trainer.prepared(trainer.draw(1))
    rgba = torch.cat([seen.rgba, seen.rgba]).float() / 255
    alpha, colors = rgba[:, 3:], rgba[:, :3] * 2 - 1
    images = torch.cat([seen.images, seen.images]).float()
    behind = images[..., :1, :1]
    matte = type(trainer.vae.matte(seen.latents.float()))
    monkeypatch.setattr(trainer.vae, "apart", lambda *_: matte(colors, alpha, behind))
    errors, _ = trainer.errors(seen)
    assert errors.absolute < 1e-3  # half precision
    assert errors.colors == 0
    bits = -(alpha * alpha.clamp(1e-4, 1 - 1e-4).log() + (1 - alpha) * (1 - alpha.clamp(1e-4, 1 - 1e-4)).log()).mean()
    torch.testing.assert_close(errors.opacity, bits)
    monkeypatch.setattr(trainer.vae, "apart", lambda *_: matte(colors + 0.25, alpha, behind))
    off, _ = trainer.errors(seen)
    torch.testing.assert_close(off.colors, 0.25 * alpha.mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(off.absolute, 0.25 * alpha.mean(), rtol=1e-2, atol=1e-3)
    wanted = off.absolute + SQUARED * off.squared + OPACITY * off.opacity + COLORS * off.colors
    torch.testing.assert_close(off.loss, wanted)


def test_the_matting_alone_learns(data, monkeypatch):
    monkeypatch.setattr(MattingTrainer, "pool_size", 4)
    trainer = matting_trainer(data, lr=3e-3, steps=60)
    before = {name: x.clone() for name, x in trainer.vae.state_dict().items()}
    records = [trainer.train_step() for _ in range(60)]
    assert records[-1]["opacity"] < 0.5 * records[0]["opacity"]
    assert sum(r["loss"] for r in records[-4:]) < 0.6 * sum(r["loss"] for r in records[:4])
    changed = {name for name, x in trainer.vae.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {name for name in before if ".decoder.matting." in name}


def test_checked_scenes_are_others_and_are_shown_in_four_rows(data):
    trainer = matting_trainer(data)
    rows, errors = trainer.checked()
    assert rows.shape == (4, 8, 3, 16, 16)
    assert 0 <= rows.min() <= rows.max() <= 1
    assert (rows[2] == 0.5).all()  # its opacity before it is trained
    assert not torch.equal(trainer.draw(CHECKED).noise, trainer.draw(0).noise)
    assert set(errors) == {"absolute", "squared", "opacity", "colors"}


def test_an_autoencoder_without_one_is_refused(data):
    parts = make_trainer(data).parts
    with pytest.raises(ValueError, match="MattingTrainer: the autoencoder must have a decoder_matting, got none"):
        MattingTrainer(parts, parts.vae, ImageSource(Shards(data)), TouchedOptions())


def test_a_run_adds_it_and_leaves_all_else(data, tmp_path):
    save_model(new_model("mini", build_subset_vocabulary(Shards(data).captions()), seed=0), tmp_path / "first")
    main(flags(data, tmp_path / "run", stage="matting", init=str(tmp_path / "first"), steps=3))
    before, after = load_model(tmp_path / "first"), load_model(tmp_path / "run" / "model")
    assert after.config == replace(before.config, vae=replace(before.config.vae, decoder_matting=32))
    for part in ("unet", "text", "vae"):
        was, now = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        assert [name for name in was if not torch.equal(was[name], now[name])] == []
        new = {name for name in now if name not in was}
        assert all(".decoder.matting." in name for name in new)
        assert bool(new) == (part == "vae")
    assert after.vae.model.decoder.matting.conv_out.weight.any()
    assert list((tmp_path / "run" / "samples").glob("*.png"))
