"""The forms of score distillation that papers other than MVDream's use: numbers worked by hand, threestudio's
convention written out plainly, and the same bits from a graph.
"""

import dataclasses

import pytest
import torch
from reference.graph_stand_in import GraphStandIn
from reference.random_model import ONE_LEVEL, random_model
from reference.studio import TINY, Studio, same

from mvdream_fast.camera import orbit_cameras
from mvdream_fast.core import run_folder
from mvdream_fast.core.ramp import ramp
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import TextCond
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.distill.config import replaced
from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.state import RunState
from mvdream_fast.guidance.config import GuidanceConfig
from mvdream_fast.guidance.prompts import VIEW_WORDS
from mvdream_fast.guidance.sds import SDS, ScoreDistillation, SingleViewSDS, Wishes
from mvdream_fast.models.config import ScheduleConfig, VAEConfig
from mvdream_fast.pipeline import MVDreamPipeline


class ColorField(torch.nn.Module):
    """A UNet of four channels whose answer is a colour, the mean of the text's tokens, on top of half of its input."""

    def prepare_context(self, context):
        return context

    def forward(self, z_t, t, context, camera=None, n_views=1, n_prompts=1):
        rows = torch.cat([z_t] * n_prompts)
        color = context.mean(1).repeat_interleave(len(rows) // len(context), dim=0)
        self.asked = len(context), t, camera is not None, n_views, n_prompts
        return 0.5 * rows + color[:, :, None, None]


class Pooling:
    """Latents of four channels: the colours' means over 2 x 2 pixels, and grey. The posterior is certain."""

    config = VAEConfig(block_out_channels=(1, 1), latent_channels=4, image_size=8)

    def encode(self, images, noise=None):
        small = torch.nn.functional.avg_pool2d(images, 2)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)


def color(*numbers: float) -> torch.Tensor:
    """A text of two tokens that mean this colour, [1, 2, 4]."""
    return torch.tensor(numbers, dtype=torch.float32).expand(1, 2, 4)


TEXT = TextCond(color(0.3, -0.1, 0.2, 0.5), color(-0.2, 0.0, 0.1, 0.1))


def distillation(text=TEXT, prediction="eps", **options) -> ScoreDistillation:
    schedule = NoiseSchedule.from_config(ScheduleConfig(prediction=prediction))
    return ScoreDistillation(ColorField(), Pooling(), schedule, text, GuidanceConfig(**options))


def images(n: int) -> torch.Tensor:
    return Stream(0, 0, "images").uniform(n, 3, 8, 8).requires_grad_()


def threestudio(z, z_t, cond, uncond, noise, abar, scale, weighting, clip, prediction):
    """The loss of threestudio's guidances on latents z with a graph: 0.5 ||z - sg(z - g)||^2 / n. abar: [n]."""
    abar = abar[:, None, None, None]
    if prediction == "v":
        cond, uncond = (abar.sqrt() * v + (1 - abar).sqrt() * z_t for v in (cond, uncond))
    w = {"sds": 1 - abar, "uniform": 1.0, "fantasia3d": abar**0.5 * (1 - abar)}[weighting]
    grad = w * (cond + scale * (cond - uncond) - noise)
    if clip is not None:
        grad = grad.clamp(-clip, clip)
    target = (z - grad).detach()
    return 0.5 * torch.nn.functional.mse_loss(z, target, reduction="sum") / len(z)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("clip", [None, (0.0, 2.0, 0.4, 4000.0)])
@pytest.mark.parametrize("timesteps", ["shared", "each"])
@pytest.mark.parametrize("weighting", ["sds", "uniform", "fantasia3d"])
@pytest.mark.parametrize("n_views", [1, 4])
def test_threestudios_convention(prediction, clip, timesteps, weighting, n_views):
    """Guided from eps_c, loss and gradient on the images in float64, from the same draws."""
    options = {"guidance_scale": 7.0, "guided_from": "cond", "loss": "sds", "grad_clip": clip}
    score = distillation(prediction=prediction, weighting=weighting, timesteps=timesteps, **options)
    rgb, step, stream = images(8), 3000, Stream(1, 3000, "guidance")
    c2w = None if n_views == 1 else torch.eye(4).expand(8, 4, 4) + 0.5
    out = score(rgb, c2w, n_views, step, Stream(1, 3000, "guidance"))
    (got,) = torch.autograd.grad(out.loss, rgb)

    low, high = (int(1000 * (0.98 + (end - 0.98) * 3000 / 8000)) for end in (0.02, 0.5))
    drawn = stream.integers(low, high + 1, *(() if timesteps == "shared" else (8 // n_views,)))
    t = drawn.repeat(8) if timesteps == "shared" else drawn.repeat_interleave(n_views)
    stream.normal(8, 4, 4, 4)
    noise = stream.normal(8, 4, 4, 4).double()
    exact = rgb.detach().double().requires_grad_()
    z = Pooling().encode(exact * 2 - 1)
    abar = score.schedule.alphas_cumprod[t].double()
    alpha, sigma = (x[:, None, None, None] for x in (abar.sqrt(), (1 - abar).sqrt()))
    z_t = (alpha * z + sigma * noise).detach()
    cond, uncond = (0.5 * z_t + x.double().mean(1)[:, :, None, None] for x in (TEXT.cond, TEXT.uncond))
    limit = None if clip is None else 2.0 + (0.4 - 2.0) * 3000 / 4000
    loss = threestudio(z, z_t, cond, uncond, noise, abar, 7.0, weighting, limit, prediction)
    (want,) = torch.autograd.grad(loss, exact)
    torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))
    assert out.t == round(drawn.double().mean().item())
    assert len({*t.tolist()}) == (1 if timesteps == "shared" else 8 // n_views)


def test_gradients_on_latents_by_hand():
    """abar of the schedule's first timestep replaced by 1/4: sigma^2 = 3/4, alpha = 1/2."""
    schedule = NoiseSchedule.from_config(ScheduleConfig(prediction="eps"))
    schedule = dataclasses.replace(schedule, alphas_cumprod=torch.tensor([0.25]))
    z, noise = torch.tensor([2.0, -1.0]).reshape(1, 2, 1, 1), torch.tensor([1.0, 1.0]).reshape(1, 2, 1, 1)
    out = torch.tensor([1.0, 0.5, 2.0, 0.0]).reshape(2, 2, 1, 1)  # eps_u = (1, 0.5), eps_c = (2, 0)
    worked = {
        # eps_u + 3 (1, -0.5) = (4, -1), less the noise (3, -2); eps_c + 3 (1, -0.5) = (5, -1.5), less it (4, -2.5)
        ("uncond", "sds"): (2.25, -1.5),
        ("uncond", "uniform"): (3.0, -2.0),
        ("uncond", "fantasia3d"): (1.125, -0.75),
        ("cond", "sds"): (3.0, -1.875),
        ("cond", "uniform"): (4.0, -2.5),
        ("cond", "fantasia3d"): (1.5, -0.9375),
    }
    for (guided_from, weighting), gradient in worked.items():
        config = GuidanceConfig(guidance_scale=3.0, guided_from=guided_from, loss="sds", weighting=weighting)
        arguments = (z, z, out, noise, torch.tensor([0]))
        target = Wishes(schedule, config, 1).target(*arguments)
        assert (z - target).flatten().tolist() == pytest.approx(gradient)
        clipped = Wishes(schedule, config, 1).target(*arguments, torch.tensor([1.2]))
        assert (z - clipped).flatten().tolist() == pytest.approx([max(min(g, 1.2), -1.2) for g in gradient])


@pytest.mark.parametrize("loss", ["x0", "sds"])
def test_a_scale_from_cond_is_one_more_from_uncond(loss):
    gradients = []
    for guided_from, scale in (("cond", 20.0), ("uncond", 21.0), ("uncond", 20.0)):
        rgb = images(4)
        score = distillation(guided_from=guided_from, guidance_scale=scale, loss=loss)
        gradients.append(torch.autograd.grad(score(rgb, None, 1, 100, Stream(3, 0, "g")).loss, rgb)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


def test_timesteps_of_their_own():
    score = distillation(timesteps="each")
    drawn = score.timesteps(4000, Stream(0, 0, "t"), 50, 4)
    assert len(drawn) == 200
    assert all(len({*drawn[4 * i : 4 * i + 4]}) == 1 for i in range(50))
    assert len({*drawn}) > 25
    assert 500 <= min(drawn) <= max(drawn) <= 740
    out = score(images(8), torch.eye(4).expand(8, 4, 4) + 0.5, 4, 4000, Stream(0, 0, "t"))
    assert score.unet.asked[1].tolist() == score.timesteps(4000, Stream(0, 0, "t"), 2, 4)
    assert out.t == round(score.unet.asked[1].double().mean().item())


def test_the_limit_of_a_step_holds_the_gradient_of_either_loss():
    schedule = (0.0, 0.5, 0.1, 1000.0)
    for loss in ("x0", "sds"):
        score = distillation(loss=loss, grad_clip=schedule, rescale=0.0)
        for step in (0, 500, 2000):
            out = score(images(4), None, 1, step, Stream(0, step, "g"))
            z = Pooling().encode(images(4) * 2 - 1)
            away, limit = (z - out.target).abs().max().item(), ramp(schedule, step)
            assert away == pytest.approx(limit, rel=1e-4)  # the largest is held: with a scale of 50 all are larger


SIDES = TextCond(
    # The front is red, the side green, the back blue, from above grey.
    torch.cat([color(1, 0, 0, 0), color(0, 1, 0, 0), color(0, 0, 1, 0), color(0, 0, 0, 1)]),
    torch.zeros(4, 2, 4),
)


def test_a_colour_field_is_led_away_from_the_other_sides():
    """At 30 degrees a view is told of 2/3 front and 1/3 side: e = (2/3, 1/3, 0, 0), |e|^2 = 5/9.

    Beside e the front is (1, 0, 0, 0) - (2/3)/(5/9) e = (1/5, -2/5, 0, 0), the side (0, 1, 0, 0) - (1/3)/(5/9) e =
    (-2/5, 4/5, 0, 0). Their weights: -(4 exp(-1/3) - 2.426) = -0.440125 and -(4 exp(-1/6) - 2.426) = -0.959927.
    So the prompt's colour becomes (2/3 - 0.088025 + 0.383971, 1/3 + 0.176050 - 0.767942, 0, 0): redder, less green.
    """
    score = distillation(text=None, loss="sds", weighting="uniform", guidance_scale=2.0, perp_neg=True)
    cameras = orbit_cameras(1, 15.0, 30.0)
    sides = SingleViewSDS(score, None, sides=SIDES)
    rgb = images(1)
    loss, _ = sides.score(rgb, cameras, 0, Stream(0, 0, "guidance"))
    assert score.unet.asked[0] == 4  # without, with, and two others: one call
    assert score.unet.asked[2:] == (False, 1, 4)
    (d_rgb,) = torch.autograd.grad(loss, rgb)

    expected = 2.0 * torch.tensor([0.962612, -0.258559, 0.0, 0.0])
    stream = Stream(0, 0, "guidance")
    t = score.timestep(0, stream)
    stream.normal(1, 4, 4, 4)
    noise = stream.normal(1, 4, 4, 4)
    z = Pooling().encode(rgb * 2 - 1)
    z_t = score.schedule.add_noise(z.detach(), noise, t)
    gradient = 0.5 * z_t + expected[None, :, None, None] - noise
    torch.testing.assert_close(d_rgb, torch.autograd.grad(z, rgb, gradient)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["3d", "2d"])
def test_each_view_is_told_its_side_in_either_mode(mode):
    """In 3D mode the views still see each other, with their cameras; in words each hears its own side."""
    score, asked = distillation(text=None), []
    kind = SDS if mode == "3d" else SingleViewSDS
    guidance = kind(score, replaced(TINY, n_views=4).cameras, sides=SIDES)
    forward = score.unet.forward

    def noting(z_t, t, context, *rest):
        asked.append(context.mean(1))
        return forward(z_t, t, context, *rest)

    score.unet.forward = noting
    guidance.score(images(4), orbit_cameras(4, 15.0), 0, Stream(0, 0, "guidance"))
    assert score.unet.asked[2:] == ((True, 4, 2) if mode == "3d" else (False, 1, 2))
    assert asked[0][:4].abs().max() == 0
    assert asked[0][4:].argmax(1).tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("settings", "endings", "kind"),
    [
        ({"mode": "2d"}, 4, SingleViewSDS),
        ({"mode": "2d", "view_words": False}, 1, SingleViewSDS),
        ({"mode": "3d"}, 1, SDS),
        ({"mode": "3d", "view_words": True}, 4, SDS),
    ],
)
def test_who_is_told_of_sides(settings, endings, kind):
    pipeline = MVDreamPipeline(random_model(config=ONE_LEVEL), "cpu", "float32")
    encode, asked = pipeline.encode_prompt, []

    def noting(prompts, negative_prompt, suffix, warn):
        asked.append(suffix)
        return encode(prompts, negative_prompt, suffix, warn)

    pipeline.encode_prompt = noting
    guidance = new_guidance(pipeline, "a red car", replaced(TINY, **settings), 0)
    assert type(guidance) is kind
    assert asked == [[f", {words}" for words in VIEW_WORDS] if endings == 4 else [""]]
    size = pipeline.vae.config.image_size
    rgb = Stream(0, 0, "images").uniform(4, 3, size, size).requires_grad_()
    loss, _ = guidance.score(rgb, orbit_cameras(4, 15.0), 0, Stream(0, 0, "guidance"))
    assert torch.autograd.grad(loss, rgb)[0].abs().max() > 0


FORMS = {
    "a weight, a limit, words in 3D": {
        "loss": "sds", "weighting": "fantasia3d", "grad_clip": (0.0, 2.0, 0.1, 4.0), "guided_from": "cond",
        "timesteps": "each", "n_groups": (2,), "view_words": True,
    },
    "a limit of x0": {"grad_clip": (0.0, 2.0, 0.1, 4.0)},
    "perp-neg": {"mode": "2d", "perp_neg": True, "timesteps": "each", "rescale": 0.0},
}  # fmt: skip


@pytest.mark.usefixtures("capturable_without_a_word")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_bits_of_its_graph(form):
    config = replaced(TINY, steps=4, **FORMS[form])
    states, losses = [], []
    for graphs in (True, False):
        pipe = MVDreamPipeline(random_model(config=ONE_LEVEL), "cpu", "float32", graphs=graphs)
        state = RunState(config, "a red car", 0, new_guidance(pipe, "a red car", config, 0))
        losses.append([state.step(step).loss for step in range(config.steps)])
        states.append(state.state())
    assert losses[0] == losses[1]
    assert same(*states)
    assert (len(GraphStandIn.made), GraphStandIn.replays) == (1, 3)


@pytest.mark.parametrize("form", ["a weight, a limit, words in 3D", "perp-neg"])
def test_a_resumed_run_has_the_same_bytes(tmp_path, form):
    config = replaced(TINY, steps=4, **FORMS[form])

    def studio():
        pipe = MVDreamPipeline(random_model(config=ONE_LEVEL), "cpu", "float32")
        return Studio(new_guidance(pipe, "a red car", config, 0))

    class Stop:
        requested = None

    def callback(progress):
        Stop.requested = 1 if progress.record.step == 1 else None

    whole = studio()("a red car", config=config)
    studio()("a red car", config=config, checkpoints=tmp_path, callback=callback, interrupt=Stop)
    assert run_folder.load_latest(tmp_path)[0] == 2
    assert same(whole.state(), studio()("a red car", config=config, checkpoints=tmp_path).state())
