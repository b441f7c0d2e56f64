"""Guidance equals the published formulas on known numbers, keeps no graph through the UNet, and shares one timestep."""

from types import SimpleNamespace

import pytest
import torch

from mvdream_fast.core.ramp import ramp
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import TextCond
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.guidance.config import GuidanceConfig
from mvdream_fast.guidance.sds import ScoreDistillation
from mvdream_fast.models.config import ScheduleConfig, VAEConfig

VAE_CONFIG = VAEConfig(block_out_channels=(1, 1), latent_channels=3, image_size=8)


class StubUNet(torch.nn.Module):
    """Predicts a fixed linear function of its input and of the text, and notes how it was called."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.7))
        self.calls = []

    def prepare_context(self, context):
        return context

    def forward(self, z_t, t, context, camera=None, n_views=1, n_prompts=1):
        self.calls.append((z_t, t, camera, n_views, n_prompts, torch.is_grad_enabled()))
        z_t = torch.cat([z_t] * n_prompts)
        shift = context.mean(dim=(1, 2)).repeat_interleave(n_views)
        return self.gain * z_t + shift[:, None, None, None]


class StubVAE:
    """Averages 2 x 2 pixels; the posterior's deviation is 0.1."""

    config = VAE_CONFIG

    def encode(self, images, noise=None):
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return mean if noise is None else mean + 0.1 * noise


def make(prediction="eps", dtype=torch.float32, sample_posterior=True, **options):
    schedule = NoiseSchedule.from_config(ScheduleConfig(prediction=prediction))
    cond, uncond = torch.full((1, 2, 4), 0.3), torch.full((1, 2, 4), -0.2)
    unet, text = StubUNet().to(dtype), TextCond(cond, uncond).to(dtype)
    return ScoreDistillation(unet, StubVAE(), schedule, text, GuidanceConfig(**options), sample_posterior)


def views(n=8, size=8):
    return Stream(0, 0, "test").uniform(n, 3, size, size).requires_grad_()


POSES = torch.eye(4).expand(8, 4, 4).clone()
POSES[:, 2, 3] = 2.0


def by_hand(guidance, rgb, n_views, step, stream, prediction, loss, rescale, scale):
    """The published formulas in float64, from the same draws."""
    t = guidance.timestep(step, stream)
    side = VAE_CONFIG.image_size // 2
    posterior = stream.normal(len(rgb), 3, side, side).double()
    z = torch.nn.functional.avg_pool2d(rgb.double() * 2 - 1, 2) + 0.1 * posterior
    noise = stream.normal(*z.shape).double()
    abar = guidance.schedule.alphas_cumprod[t].double()
    z_t = abar.sqrt() * z.detach() + (1 - abar).sqrt() * noise
    gain = 0.7
    cond, uncond = gain * z_t + 0.3, gain * z_t - 0.2

    def to_eps(out):
        return out if prediction == "eps" else abar.sqrt() * out + (1 - abar).sqrt() * z_t

    eps_c, eps_u = to_eps(cond), to_eps(uncond)
    eps = eps_u + scale * (eps_c - eps_u)
    if loss == "sds":
        grad = (1 - abar) * (eps - noise)
    else:
        x0, x0_c = ((z_t - (1 - abar).sqrt() * e) / abar.sqrt() for e in (eps, eps_c))
        parts = []
        for a, b in zip(x0.split(n_views), x0_c.split(n_views), strict=True):
            parts.append(rescale * a * (b.std() + 1e-8) / (a.std() + 1e-8) + (1 - rescale) * a)
        grad = z - torch.cat(parts)
    (d_rgb,) = torch.autograd.grad(z, rgb, grad.detach() / len(rgb))
    return d_rgb


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("loss", "rescale"), [("x0", 0.5), ("x0", 0.0), ("sds", 0.5)])
def test_gradient_is_the_published_formula(prediction, loss, rescale):
    guidance = make(prediction, loss=loss, rescale=rescale, guidance_scale=7.0)
    rgb = views()
    out = guidance(rgb, POSES, 4, 3000, Stream(1, 3000, "guidance"))
    (got,) = torch.autograd.grad(out.loss, rgb)
    want = by_hand(guidance, rgb, 4, 3000, Stream(1, 3000, "guidance"), prediction, loss, rescale, 7.0)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-6 * float(want.abs().max()))


def test_without_rescale_x0_is_sds_with_sigma_over_alpha():
    plain, recon = make(loss="sds"), make(loss="x0", rescale=0.0)
    rgb = views()
    grads = []
    for guidance in (plain, recon):
        out = guidance(rgb, POSES, 4, 8000, Stream(5, 0, "g"))
        grads.append(torch.autograd.grad(out.loss, rgb)[0])
        abar = guidance.schedule.alphas_cumprod[out.t]
    ratio = ((1 - abar) / abar).sqrt() / (1 - abar)
    torch.testing.assert_close(grads[1], grads[0] * ratio, rtol=1e-3, atol=1e-6 * float(grads[1].abs().max()))


def test_unet_sees_one_batch_without_a_graph():
    guidance = make()
    out = guidance(views(), POSES, 4, 0, Stream(0, 0, "g"))
    ((z_t, t, camera, n_views, n_prompts, grad_enabled),) = guidance.unet.calls
    assert z_t.shape == (8, 3, 4, 4)
    assert t.unique().tolist() == [980] == [out.t]
    assert (camera.shape, n_views, n_prompts, grad_enabled) == ((8, 16), 4, 2, False)
    assert camera[0, 11] == pytest.approx(1.0)  # normalised to the unit sphere
    out.loss.backward()
    assert guidance.unet.gain.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("poses", [POSES, None], ids=["3d", "2d"])
def test_the_unet_is_asked_in_the_texts_dtype_and_the_rest_stays_in_float32(dtype, poses):
    """Latents and camera go in as the text is; loss, target and the gradient of the images come out as the images."""
    guidance = make(dtype=dtype)
    rgb = views()
    out = guidance(rgb, poses, 1 if poses is None else 4, 0, Stream(0, 0, "g"))
    ((z_t, _, camera, *_),) = guidance.unet.calls
    assert z_t.dtype == dtype
    assert camera is None or camera.dtype == dtype
    (d_rgb,) = torch.autograd.grad(out.loss, rgb)
    assert {x.dtype for x in (out.loss, out.target, d_rgb)} == {torch.float32}


def test_timesteps_anneal_as_published():
    guidance = make()
    seen = {s: [guidance.timestep(s, Stream(i, s, "t")) for i in range(300)] for s in (0, 4000, 8000, 10_000)}
    assert set(seen[0]) == {980}
    assert 500 <= min(seen[4000]) <= 510
    assert 730 <= max(seen[4000]) <= 740
    for step in (8000, 10_000):
        assert 20 <= min(seen[step]) <= 30
        assert 490 <= max(seen[step]) <= 500


def test_2d_mode_passes_no_camera():
    guidance = make()
    guidance(views(4), None, 1, 0, Stream(0, 0, "g"))
    assert guidance.unet.calls[0][2:4] == (None, 1)


def test_images_of_another_size_are_resized_bilinearly():
    guidance = make(sample_posterior=False)
    small = views(4, 4)
    latents = guidance.encode(small, Stream(0, 0, "e"))
    want = torch.nn.functional.interpolate(small, (8, 8), mode="bilinear", align_corners=False) * 2 - 1
    torch.testing.assert_close(latents, torch.nn.functional.avg_pool2d(want, 2))


@pytest.mark.parametrize(("step", "value"), [(-5, 0.98), (0, 0.98), (4000, 0.5), (8000, 0.02), (9999, 0.02)])
def test_ramp(step, value):
    assert ramp((0, 0.98, 0.02, 8000), step) == pytest.approx(value)


def test_ramp_without_length_is_a_switch():
    assert [ramp((10, 0.0, 5.0, 10), s) for s in (9, 10)] == [0.0, 5.0]


def test_same_stream_same_numbers():
    first, second = (make()(views(), POSES, 4, 100, Stream(3, 100, "g")) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert SimpleNamespace(t=first.t) == SimpleNamespace(t=second.t)
