"""examples/widen_latents.py: a model with more latent channels says of the old ones what it said."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import widen_latents
from reference.random_model import TINY, TINY_PIXELS, random_model
from test_batches import make_sample

from mvdream_fast.checkpoints.open import load_model, save_model
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import ImageSource, Shards
from mvdream_fast.data.shards import write_shard
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.training.vae import Linear, linear_start, reconstruction, settle

N = 5
BASE = replace(
    TINY,
    unet=replace(TINY.unet, in_channels=7, out_channels=7),
    vae=replace(
        TINY.vae, block_out_channels=(32,), latent_channels=7, patch_size=4, decoder_width=64, decoder_cleaner=16,
        scale_factor=1.25, image_size=16,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    samples, rng = [make_sample(20 * i) for i in range(8)], np.random.default_rng(0)
    for sample in samples:  # of many components
        sample.views[..., :3] = rng.integers(0, 256, (*sample.views.shape[:3], 3)) // 4 + sample.views[..., :3] // 2
    write_shard(folder / "train-00000.tar", samples)
    return folder


@pytest.fixture(scope="module")
def images(shards):
    return ImageSource(Shards(shards)).images(Stream(0, 1, "test"), 64)


def narrow(images) -> "widen_latents.Model":
    model = random_model(config=BASE)
    with torch.no_grad():
        linear_start(model.vae, Linear.fit(images, 4))
        settle(model.vae)
    return model


def test_the_old_channels_stay_and_the_picture_gets_nearer(images):
    model = narrow(images)
    wide = widen_latents.with_channels(model, N)
    z = torch.randn(4, 7 + N, 4, 4, generator=torch.Generator().manual_seed(1))
    context, camera = torch.randn(1, 5, 32), torch.randn(4, 16)
    with torch.no_grad():
        said = model.unet(z[:, :7], torch.tensor(300), context, camera, 4)
        torch.testing.assert_close(wide.unet(z, torch.tensor(300), context, camera, 4)[:, :7], said)
        assert not wide.unet(z, torch.tensor(300), context, camera, 4)[:, 7:].any()
        torch.testing.assert_close(wide.vae.cleaned(z)[:, :7], model.vae.cleaned(z[:, :7]))
        before = model.vae.encode(images)
        widen_latents.fit_detail(wide.vae, images)
        torch.testing.assert_close(wide.vae.encode(images)[:, :7], before)
    assert reconstruction(wide.vae, images) > reconstruction(model.vae, images) + 0.5


def test_what_is_told_apart_stays_without_detail():
    model = random_model(config=replace(BASE, vae=replace(BASE.vae, decoder_matting=8)))
    wide = widen_latents.with_channels(model, N)
    z = torch.randn(2, 7 + N, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in wide.vae.model.decoder.detail.parameters():  # which are random before they are fitted
            parameter.zero_()
        mine, other = wide.vae.matte(z), model.vae.matte(z[:, :7])
    for name in mine._fields:
        torch.testing.assert_close(getattr(mine, name), getattr(other, name), msg=name)


@pytest.mark.parametrize("change", ["detail", "pixels"])
def test_models_that_it_cannot_widen_are_refused(change, shards, images, tmp_path, capsys):
    plain = random_model(config=TINY_PIXELS) if change == "pixels" else widen_latents.with_channels(narrow(images), N)
    save_model(plain, tmp_path / "model")
    with pytest.raises(SystemExit):
        widen_latents.main([str(tmp_path / "model"), str(shards), "-o", str(tmp_path / "wide")])
    assert "must have an autoencoder without detail channels, and a UNet that knows cameras" in capsys.readouterr().err
    assert not (tmp_path / "wide").exists()


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_the_factors_are_wiener_s(prediction):
    """Normal latents of two deviations are noised; what is best said of v or noise from them alone is measured."""
    wide = widen_latents.with_channels(random_model(prediction=prediction, config=BASE), 2)
    std = torch.tensor([0.2, 0.7])
    schedule = NoiseSchedule.from_config(wide.config.schedule)
    assert widen_latents.fit_skip(wide.unet, schedule, std) < 0.1
    g = torch.Generator().manual_seed(2)
    x, noise = std[:, None] * torch.randn(2, 20000, generator=g), torch.randn(2, 20000, generator=g)
    for t in (100, 400, 900):
        a, s = schedule.alphas_cumprod[t].sqrt(), (1 - schedule.alphas_cumprod[t]).sqrt()
        noisy, target = a * x + s * noise, (a * noise - s * x if prediction == "v" else noise)
        best = (noisy * target).sum(1) / noisy.square().sum(1)
        z = torch.zeros(1, 9, 4, 4)
        z[:, 7:] = 1.0
        with torch.no_grad():
            answers = [wide.unet(k * z, torch.tensor(t), torch.zeros(1, 5, 32))[0, 7:].mean((1, 2)) for k in (0, 1)]
        torch.testing.assert_close(answers[1] - answers[0], best, atol=0.1, rtol=0)


def test_a_model_of_a_model(shards, images, tmp_path, capsys):
    save_model(narrow(images), tmp_path / "narrow")
    widen_latents.main([str(tmp_path / "narrow"), str(shards), "-o", str(tmp_path / "wide"), "--channels", str(N)])
    wide = load_model(str(tmp_path / "wide"), torch.float32)
    assert (wide.config.vae.latent_channels, wide.config.vae.detail_channels) == (7 + N, N)
    assert wide.config.unet.input_skip
    assert "the best linear autoencoder of 12 channels" in capsys.readouterr().out
