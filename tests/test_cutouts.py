"""Views without their backgrounds: what the pipeline returns, `generate --cutouts` writes and a run fits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference.random_model import TINY, random_model

from mvdream_fast import generate
from mvdream_fast.checkpoints.open import save_model
from mvdream_fast.core import cli
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.distill.config import replaced
from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.systems import mvdream_solid
from mvdream_fast.guidance.base import opacity_loss
from mvdream_fast.pipeline import MVDreamPipeline

MATTED = replace(TINY, vae=replace(TINY.vae, block_out_channels=(16,), patch_size=4, image_size=32, decoder_matting=8))
FEW = {"n_steps": 2}
FIT = replaced(
    mvdream_solid("fast"), steps=3, sampled_steps=2, sampled_scale=3.0, render_size=(16,), tets_resolution=32
)


@pytest.fixture(scope="module")
def pipe() -> MVDreamPipeline:
    return MVDreamPipeline(random_model(config=MATTED), "cpu", "float32")


@pytest.fixture(scope="module")
def plain() -> MVDreamPipeline:
    return MVDreamPipeline(random_model(), "cpu", "float32")


def test_views_come_with_what_stands_before_their_backgrounds(pipe):
    kept = []
    views = pipe("a red car", 3, **FEW, callback=lambda *step: kept.append(step[2]))
    with torch.no_grad():
        matte = pipe.vae.matte(kept[-1])
    assert views.cutout.shape == (3, 4, 32, 32)
    torch.testing.assert_close(views.cutout[:, :3], (matte.foreground / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(views.cutout[:, 3:], matte.alpha, rtol=0, atol=1e-5)
    torch.testing.assert_close(views.tensor, (matte.image / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert matte.alpha.std() > 1e-3


def test_each_prompt_has_its_own(pipe):
    a, b = pipe(["a red car", "a green chair"], 2, **FEW)
    torch.testing.assert_close(pipe("a green chair", 2, **FEW, seed=1).cutout, b.cutout, rtol=0, atol=1e-5)
    assert not torch.equal(a.cutout, b.cutout)


def test_they_are_rgba_images(pipe):
    views = pipe("a red car", 2, **FEW)
    for image, cutout in zip(views.cutouts, views.cutout, strict=True):
        assert image.mode == "RGBA"
        assert np.abs(np.asarray(image) / 255 - cutout.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_models_that_cannot_tell_have_none(pipe, plain):
    views = plain("a red car", 2, **FEW)
    assert views.cutout is None
    with pytest.raises(ArgumentError, match="cutouts: the model must have a decoder that tells a thing from its back"):
        _ = views.cutouts
    assert pipe.tells_things_apart
    assert not plain.tells_things_apart


def command(*arguments: str) -> int:
    try:
        argv = ["a red car", "--steps", "2", "--device", "cpu", "--threads", "1", "--dtype", "float32", *arguments]
        cli.run(generate.main, generate.Flags, prog="generate", argv=argv)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_generate_writes_them_on_request(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(random_model(config=MATTED), tmp_path / "model")
    common = ("--model", "model", "--n-views", "2")
    assert command(*common, "-o", "without") == 0
    assert not list(Path("without").glob("cutout*"))
    assert command(*common, "-o", "with", "--cutouts") == 0
    views = MVDreamPipeline.from_pretrained("model", "cpu", "float32")("a red car", 2, **FEW)
    for i, image in enumerate(views.cutouts):
        found = Image.open(f"with/cutout_{i}.png")
        assert found.mode == "RGBA"
        assert np.abs(np.asarray(found).astype(int) - np.asarray(image)).max() <= 1
        assert Path(f"with/view_{i}.png").read_bytes() == Path(f"without/view_{i}.png").read_bytes()


def test_generate_refuses_before_it_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(random_model(), tmp_path / "model")
    assert command("--model", "model", "--cutouts", "-o", "out") == 2
    assert "--cutouts: the model must have a decoder that tells a thing" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("method", ["sds", "reconstruct"])
def test_a_run_fits_straight_colours_and_told_silhouettes(pipe, method):
    config = FIT if method == "sds" else replaced(FIT, method="reconstruct", sampled_views=0)
    guidance = new_guidance(pipe, "a red car", config, seed=5)
    how = {"n_steps": 2, "guidance_scale": 3.0, "uncond_mode": config.sampled.sampled_uncond, "seed": 5}
    drawn = pipe("a red car", 4, negative_prompt=config.negative_prompt, warn=lambda _: None, **how).cutout
    images, silhouettes, _ = guidance.known()
    assert torch.equal(images, drawn[:, :3])
    assert torch.equal(silhouettes, drawn[:, 3:])


def test_a_run_without_silhouettes_fits_the_views_as_they_are(pipe):
    config = replaced(FIT, lambda_silhouette=(0.0, 0.0, 0.0, 0.0))
    guidance = new_guidance(pipe, "a red car", config, seed=5)
    how = {"n_steps": 2, "guidance_scale": 3.0, "uncond_mode": config.sampled.sampled_uncond, "seed": 5}
    drawn = pipe("a red car", 4, negative_prompt=config.negative_prompt, warn=lambda _: None, **how).tensor
    assert torch.equal(guidance.images.flatten(0, 1), drawn)
    assert guidance.shown is None
    assert opacity_loss(guidance, torch.rand(8, 16, 16), 0) == 0
