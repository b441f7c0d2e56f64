"""DeepFloyd IF's UNet against diffusers' own, as its pipeline calls it."""

import pytest
import torch
from reference import deepfloyd

from mvdream_fast.checkpoints.manifest import manifest
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import Denoiser, TextCond
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.guidance.config import GuidanceConfig
from mvdream_fast.guidance.vsd import Learner
from mvdream_fast.models.config import ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from mvdream_fast.models.deepfloyd import DeepFloydUNet

NARROW = UNetConfig(
    kind="deepfloyd", in_channels=3, out_channels=3, model_channels=32, channel_mult=(1, 2, 3, 4), num_res_blocks=1,
    attention_resolutions=(2, 4, 8), num_head_channels=16, context_dim=deepfloyd.WIDTH, camera_in="none",
    view_mixing="2d",
)  # fmt: skip


def both() -> tuple[DeepFloydUNet, torch.nn.Module]:
    theirs, ours = deepfloyd.unet(), DeepFloydUNet(NARROW).eval()
    ours.model.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("guided", [True, False])
@torch.no_grad()
def test_the_noise_is_the_first_half_of_what_diffusers_predicts(guided):
    ours, theirs = both()
    pixels, text = torch.randn(2, 3, 16, 16), torch.randn(4, 77, deepfloyd.WIDTH)
    cond, uncond = text.chunk(2)
    noise = Denoiser(ours, TextCond(cond, uncond), 1, guided)(pixels, torch.tensor([7, 900]))
    asked = torch.cat([uncond, cond]) if guided else cond
    n = 2 if guided else 1
    wanted = theirs(pixels.repeat(n, 1, 1, 1), torch.tensor([7, 900]).repeat(n), asked).sample
    assert wanted.shape == (2 * n, 6, 16, 16)
    torch.testing.assert_close(noise, wanted[:, :3], rtol=0, atol=1e-5)
    assert (wanted[:, 3:] - noise).abs().max() > 0.1


def test_views_that_see_each_other_and_cameras_are_refused():
    ours, _ = both()
    pixels, text = torch.zeros(2, 3, 16, 16), torch.zeros(1, 77, deepfloyd.WIDTH)
    for wrong in ({"n_views": 2}, {"camera": torch.zeros(2, 16)}):
        with pytest.raises(ValueError, match="ask it in the mode 2d"):
            ours(pixels, torch.tensor(1), text, **wrong)


@pytest.mark.parametrize(("width", "millions"), [(704, 4305), (320, 935), (192, 372)])
def test_the_three_sizes_have_the_parameters_that_were_published(width, millions):
    """4.3 B, 900 M and 400 M."""
    unet = UNetConfig(
        kind="deepfloyd", in_channels=3, out_channels=3, model_channels=width, channel_mult=(1, 2, 3, 4),
        num_res_blocks=3, attention_resolutions=(2, 4, 8), context_dim=4096, camera_in="none", view_mixing="2d",
    )  # fmt: skip
    vae = VAEConfig(kind="pixels", block_out_channels=(), latent_channels=3, image_size=64)
    text = TextConfig(kind="t5", width=4096, n_layers=24, n_heads=64, mlp_width=10240, vocabulary_size=32128)
    config = ModelConfig(unet=unet, vae=vae, text=text)
    assert round(sum(torch.Size(s).numel() for s in manifest("unet", config).values()) / 1e6) == millions
    assert round(sum(torch.Size(s).numel() for s in manifest("text", config).values()) / 1e9, 1) == 4.8


def test_a_learner_is_told_cameras_and_begins_as_the_model():
    """VSD's twin: diffusers' class embedding takes the poses."""
    ours, _ = both()
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    z, camera, words = torch.randn(2, 3, 16, 16), torch.randn(2, 16), torch.randn(1, 77, deepfloyd.WIDTH)
    settings = GuidanceConfig(kind="vsd", lora_lr=1e-2, camera_dropout=0.0)
    learner = Learner(ours.requires_grad_(False), schedule, words, settings, knows_cameras=False)
    t, told = torch.tensor(5), learner.spread_words(2)
    with torch.no_grad():
        before = ours(z, t, told)
        torch.testing.assert_close(learner.unet(z, t, told, camera), before, rtol=1e-4, atol=1e-5)
    losses = [float(learner.learn(z, camera, 1, Stream(0, 0, "g"))) for _ in range(6)]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert torch.equal(ours(z, t, told), before)
        assert not torch.allclose(learner.unet(z, t, told, camera), learner.unet(z, t, told, camera.flip(0)), atol=1e-3)
