"""Repainting: what is redrawn when, how far, what is kept of it, and that a volume goes where the model wants it."""

from types import SimpleNamespace

import pytest
import torch
from reference.random_model import random_model
from reference.studio import TINY, Studio, same

from mvdream_fast.camera import normalize_camera, orbit_cameras, sample_cameras
from mvdream_fast.core import memory, run_folder
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import TextCond
from mvdream_fast.diffusion.sampler import translate
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.distill import request, run_memory
from mvdream_fast.distill.config import SDSConfig, replaced
from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.state import RunState
from mvdream_fast.distill.systems import mini
from mvdream_fast.guidance.base import Stateless, no_timing
from mvdream_fast.guidance.config import RepaintConfig
from mvdream_fast.guidance.repaint import Painter, Repaint
from mvdream_fast.models.config import MINI, ScheduleConfig, VAEConfig
from mvdream_fast.models.pixels import Pixels
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.shading import ALBEDO
from mvdream_fast.text_to_3d import TextTo3D

ENDING = replaced(TINY, steps=10, repaint_from=0.4, repaint_every=3, repaint_groups=2, repaint_steps=4)


class Before(Stateless):
    """The guidance that repainting follows: it notes its steps, and remembers their number."""

    def __init__(self):
        self.steps = []

    def views(self, step, stream):
        return orbit_cameras(8)

    def score(self, rgb, views, step, stream, timing=no_timing):
        return 0.0 * rgb.sum(), 5

    def after_step(self, step, stream):
        self.steps.append(step)

    def state(self):
        return {"n": torch.tensor(len(self.steps))}

    def restore(self, tensors):
        assert tensors.keys() == {"n"}
        self.steps = [0] * int(tensors["n"])


class Numbered:
    """Paints every group in a shade of its own, and notes how strongly it was asked to."""

    def __init__(self):
        self.asked = []

    def __call__(self, rgb, cameras, strength, stream):
        assert not rgb.requires_grad
        self.asked.append(strength)
        return torch.full((len(rgb), 3, 8, 8), len(self.asked) / 100), 700


def repaint(painter, config=None, first=2, n_steps=20):
    plain = RepaintConfig(repaint_from=0.1, repaint_every=4, repaint_groups=3, repaint_strength=(0.9, 0.4))
    config = config or plain
    return Repaint(Before(), painter, TINY.cameras, config, first, n_steps)


def one_step(guidance, step):
    """What a run does in a step, on grey views; what it reports as the timestep."""
    cameras = guidance.views(step, Stream(0, step, "cameras"))
    rgb = torch.full((len(cameras), 3, 8, 8), 0.5, requires_grad=True)
    loss, t = guidance.score(rgb, cameras, step, Stream(0, step, "guidance"))
    loss.backward()
    guidance.after_step(step, Stream(0, step, "guidance's own"))
    return cameras, loss.item(), t


def shades(guidance):
    return [round(100 * group.images.mean().item()) for group in guidance.groups]


def test_views_are_fitted_as_they_were_redrawn():
    """Without light and before their own background, whatever the steps of distillation show."""
    losses = {"lambda_orient": (0, 0.0, 0.0, 0)}
    wild = {"background": "learned", "background_aug_prob": 1.0, "shading": True, "shading_from": 0, **losses}
    config = replaced(ENDING, steps=6, repaint_from=0.5, weight_decay=0.0, **wild)
    guidance = Repaint(Before(), lambda rgb, *_: (rgb.clone(), 5), config.cameras, config.repaint, 3, config.steps)
    state, seen = RunState(config, "x", 0, guidance), []
    for group in state.optimizer.param_groups:
        group["initial_lr"] = 0.0  # what was redrawn is what there is
    plain = state.representation.render

    def render(rays, stream, training, lighting):
        seen.append(lighting)
        return plain(rays, stream, training, lighting)

    state.representation.render = render
    losses = [state.step(step).loss for step in range(config.steps)]
    assert max(losses[3:]) < 1  # of 4 x 64 pixels, whose colours differ by their samples alone; else some hundreds
    assert all(lighting.plain is None and lighting.lights is not None for lighting in seen[:3])
    assert all(lighting.plain.all() and lighting.shading is ALBEDO for lighting in seen[3:])


def test_the_strength_falls_over_what_is_left_of_the_run():
    config = RepaintConfig(repaint_from=0.5, repaint_strength=(0.9, 0.4))
    guidance = repaint(Numbered(), config, first=50, n_steps=100)
    assert [guidance.strength(step) for step in (50, 60, 75, 99)] == pytest.approx([0.9, 0.8, 0.65, 0.41])
    assert replaced(TINY, steps=100, repaint_from=0.5).repaint_step == 50


def test_groups_are_redrawn_until_the_buffer_is_full_and_then_every_few_steps():
    painter = Numbered()
    guidance, kept = repaint(painter), []
    for step in range(12):
        one_step(guidance, step)
        kept.append(shades(guidance))
    # from step 2 on: three at once, then at 2 + 4 and 2 + 8; the oldest goes
    first, second, third = [1], [1, 2], [1, 2, 3]
    assert kept == [[], [], first, second, third, third, *[[2, 3, 4]] * 4, *[[3, 4, 5]] * 2]
    assert painter.asked == pytest.approx([0.9 - 0.5 * (step - 2) / 18 for step in (2, 3, 4, 6, 10)])
    assert guidance.before.steps == [0, 1]


def test_between_them_the_last_groups_are_fitted_from_their_own_cameras():
    guidance = repaint(Numbered(), RepaintConfig(repaint_from=0, repaint_every=100, repaint_groups=3), first=0)
    for step in range(3):
        assert one_step(guidance, step)[2] == 700
    drawn = set()
    for step in range(3, 20):
        cameras, loss, t = one_step(guidance, step)
        (i,) = (i for i, group in enumerate(guidance.groups) if torch.equal(group.cameras.c2w, cameras.c2w))
        assert torch.equal(guidance.groups[i].cameras.fovy, cameras.fovy)
        assert loss == pytest.approx(3 * 8 * 8 * (0.5 - (i + 1) / 100) ** 2, rel=1e-4)  # a view's pixels, summed
        assert t == 0
        drawn.add(i)
    assert drawn == {0, 1, 2}


def test_what_no_step_followed_is_not_kept():
    """A rehearsal, or a step that is tried again with half of the samples, asks without an update."""
    guidance = repaint(Numbered())
    for step in (19, 19, 0, 2):
        cameras = guidance.views(step, Stream(0, step, "cameras"))
        guidance.score(torch.zeros(len(cameras), 3, 8, 8), cameras, step, Stream(0, step, "guidance"))
    guidance.after_step(2, Stream(0, 2, "guidance's own"))
    assert shades(guidance) == [3]


def test_views_that_are_not_finite_are_not_kept():
    guidance = repaint(lambda rgb, cameras, strength, stream: (rgb * float("nan"), 700))
    one_step(guidance, 2)
    assert guidance.groups == []


def test_its_state_is_the_groups_in_their_order_beside_the_others_state():
    guidance, other = repaint(Numbered()), repaint(Numbered())
    assert guidance.state().keys() == {"n"}
    for step in range(12):
        one_step(guidance, step)
    other.restore(guidance.state())
    assert same(other.state(), guidance.state())
    assert shades(other) == [3, 4, 5]
    assert torch.equal(other.groups[0].cameras.c2w, guidance.groups[0].cameras.c2w)
    other.restore({"n": torch.tensor(1)})  # back to before it began
    assert other.groups == []


def painter(config=None, n_texts=1, single=False):
    pipeline = MVDreamPipeline(random_model(), "cpu", "float32")
    text = pipeline.encode_prompt(["a red car"] * n_texts)
    return Painter(pipeline.unet, pipeline.vae, pipeline.schedule, text, config or RepaintConfig(), single), pipeline


@pytest.mark.parametrize("single", [False, True])
def test_with_strength_0_the_views_come_back_as_the_autoencoder_has_them(single):
    paint, pipeline = painter(single=single)
    images = Stream(0, 0, "images").uniform(4, 3, 16, 16)
    out, t = paint(images, orbit_cameras(4), 0.0, Stream(0, 0, "noise"))
    assert torch.equal(out, pipeline.decode(pipeline.vae.encode(images * 2 - 1)))
    assert t == 0


def test_more_strength_is_more_of_the_models_steps():
    """8 timesteps, highest first 876 to 1: half of the noise begins at the fifth, 376."""
    paint, pipeline = painter(RepaintConfig(repaint_steps=8))
    images, seen, whole = Stream(0, 0, "images").uniform(4, 3, 32, 32), [], paint.unet.forward

    def noting(z, t, context, camera, n_views, n_prompts):
        seen.append((int(t), camera, n_views, n_prompts))
        return whole(z, t, context, camera, n_views, n_prompts)

    paint.unet.forward = noting
    cameras = orbit_cameras(4, azimuth_start_deg=20.0)
    out, t = paint(images, cameras, 0.5, Stream(0, 0, "noise"))
    assert (out.shape, t) == ((4, 3, 16, 16), 376)
    assert [timestep for timestep, *_ in seen] == [376, 251, 126, 1]
    assert all(torch.equal(camera, normalize_camera(cameras.c2w)) for _, camera, _, _ in seen)
    assert {(n_views, n_prompts) for _, _, n_views, n_prompts in seen} == {(4, 2)}
    seen.clear()
    assert paint(images, cameras, 0.01, Stream(0, 0, "noise"))[1] == 1  # one step at least
    assert len(seen) == 1


def test_translation_is_noise_and_the_rest_of_the_samplers_way():
    """A model that knows the answer gives it, whatever the strength; worked at a schedule's own numbers."""
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    answer, latents = torch.full((1, 1, 2, 2), 0.3), torch.zeros(1, 1, 2, 2)
    seen = []

    def model(z, t):
        seen.append(z.clone())
        alpha, sigma = schedule.alphas[t], schedule.sigmas[t]
        return (z - alpha * answer) / sigma if schedule.prediction == "eps" else (alpha * z - answer) / sigma

    noise = torch.ones(1, 1, 2, 2)
    out, t = translate(model, latents, noise, schedule, 10, 1.0, 0.3)
    assert t == 201
    torch.testing.assert_close(seen[0], schedule.sigmas[201] * noise)
    torch.testing.assert_close(out, answer, atol=0.02, rtol=0)


class RedSphere:
    """A UNet that predicts the noise which leads to a red disk before grey, whatever it sees."""

    def __init__(self, schedule, size=16):
        self.schedule = schedule
        y, x = torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 2, indexing="ij")
        inside = (x**2 + y**2 < (0.3 * size) ** 2)[None]
        self.image = torch.where(inside, torch.tensor([1.0, 0.0, 0.0])[:, None, None], torch.tensor(0.5))

    def prepare_context(self, context):
        return context

    def __call__(self, z_t, t, context, camera, n_views, n_prompts):
        alpha, sigma = self.schedule.alphas[t], self.schedule.sigmas[t]
        return ((z_t - alpha * (2 * self.image - 1)) / sigma).repeat(n_prompts, 1, 1, 1)


@pytest.mark.parametrize("mode", ["3d", "2d"])
def test_a_volume_goes_where_the_model_wants_it(mode):
    """A sphere looks alike from everywhere, so one image is right for all cameras of one distance and view."""
    schedule = NoiseSchedule.from_config(ScheduleConfig(prediction="eps"))
    unet, texts = RedSphere(schedule), 1 if mode == "3d" else 4
    codec = Pixels(VAEConfig("pixels", (), latent_channels=3, scale_factor=1.0, image_size=16))

    def encode_prompt(prompts, negative_prompt, endings, warn):
        return TextCond(torch.zeros(texts, 2, 4), torch.zeros(texts, 2, 4))

    pipeline = SimpleNamespace(
        model=SimpleNamespace(unet=unet, vae=codec), schedule=schedule, dtype=torch.float32, graphs=True,
        encode_prompt=encode_prompt,
    )  # fmt: skip
    config = replaced(
        mini(), steps=120, mode=mode, render_size=(16,), samples_per_ray=48, repaint_from=0.0, repaint_groups=8,
        fovy_range_deg=(40.0, 40.0), distance_range=(0.9, 0.9),
    )  # fmt: skip
    asset = Studio(new_guidance(pipeline, "a red sphere", config, 0))("x", config=config)
    shown = asset.render(sample_cameras(config.cameras, Stream(9, 9, "unseen")), 16)
    error = (shown.rgb - unet.image).square().mean()
    assert error < 0.1 * (0.5 - unet.image).square().mean()  # grey is all that an empty volume shows
    assert shown.opacity[:, 7:9, 7:9].min() > 0.9
    assert shown.opacity[:, 0].max() < 0.1


def test_single_views_are_told_their_sides_and_do_not_know_of_each_other():
    paint, _ = painter(RepaintConfig(repaint_steps=4), n_texts=4, single=True)
    rows = torch.arange(4.0)[:, None, None]
    paint.text, asked = TextCond(paint.text.cond + rows, paint.text.uncond), []
    whole, cameras = paint.unet.forward, orbit_cameras(4, elevation_deg=20.0)

    def noting(z, t, context, camera, n_views, n_prompts):
        asked.append((camera, n_views, n_prompts, context.context - paint.text.cond[0]))
        return whole(z, t, context, camera, n_views, n_prompts)

    paint.unet.forward = noting
    images = Stream(0, 0, "images").uniform(4, 3, 16, 16)
    out, _ = paint(images, cameras, 0.5, Stream(0, 0, "noise"))
    camera, n_views, n_prompts, above = asked[0]
    assert (camera, n_views, n_prompts) == (None, 1, 2)
    assert [round(x, 3) for x in above[4:].mean((1, 2)).tolist()] == [0, 1, 2, 1]  # front, side, back, side
    images[1:] = 1 - images[1:]
    again, _ = paint(images, cameras, 0.5, Stream(0, 0, "noise"))
    torch.testing.assert_close(out[0], again[0])
    assert not torch.allclose(out[1], again[1])
    plain, _ = painter(RepaintConfig(repaint_steps=4), single=True)  # without words for the sides
    assert plain(images, cameras, 0.5, Stream(0, 0, "noise"))[0].shape == images.shape


@pytest.mark.parametrize("mode", ["3d", "2d"])
@pytest.mark.parametrize("stop_at", [3, 5, 8])
def test_a_run_resumed_before_within_or_after_the_buffer_fills_has_the_same_bytes(tmp_path, stop_at, mode):
    config = replaced(ENDING, mode=mode)

    def run(**rest):
        pipeline = MVDreamPipeline(random_model(), "cpu", "float32")
        return TextTo3D(pipeline)("a chair", config=config, **rest)

    stop = SimpleNamespace(requested=None)

    def callback(progress):
        stop.requested = 1 if progress.record.step + 1 == stop_at else None

    run(checkpoints=tmp_path, callback=callback, interrupt=stop)
    _, tensors, _ = run_folder.load_latest(tmp_path)
    n_groups = {3: 0, 5: 1, 8: 2}[stop_at]  # begins at step 4
    assert len(tensors.get("guidance.repainted.images", [])) == n_groups
    assert same(run().state(), run(checkpoints=tmp_path).state())


def test_a_run_that_ends_with_it_keeps_the_decoder_and_one_that_does_not_drops_it():
    def asset(config):
        pipeline = MVDreamPipeline(random_model(), "cpu", "float32")
        records = TextTo3D(pipeline, keep=False)("a chair", config=config).records
        return pipeline.vae, [record["t"] > 0 for record in records]

    vae, asked = asset(ENDING)
    vae.decode(torch.zeros(1, 4, 8, 8))
    # distillation, two groups at once, then at 4 + 3 alone
    assert asked == [True] * 4 + [True, True, False, True, False, False]
    vae, _ = asset(replaced(ENDING, repaint_from=1.0))
    with pytest.raises(RuntimeError):
        vae.decode(torch.zeros(1, 4, 8, 8))


def test_answers_that_are_used_again_end_where_it_begins():
    config = replaced(TINY, steps=20, updates_per_guidance=3, repaint_from=0.5)
    assert config.repaint_step == 9  # not in the middle of the steps that share an answer
    assert [config.asked(step) for step in range(7, 12)] == [6, 6, 9, 10, 11]
    assert [replaced(config, repaint_from=1.0).asked(step) for step in (11, 19)] == [9, 18]


def test_without_it_a_run_is_as_it_was():
    pipeline = MVDreamPipeline(random_model(), "cpu", "float32")
    assert not isinstance(new_guidance(pipeline, "a chair", TINY, 0), Repaint)
    state = RunState(TINY, "a chair", 0, new_guidance(pipeline, "a chair", TINY, 0))
    assert not any("repainted" in name for name in state.state())


def test_what_can_not_be_is_refused_with_a_sentence():
    config = replaced(SDSConfig(), method="reconstruct", repaint_from=0.4)
    sentence = r"repaint_from must be 1 \(never\) with method reconstruct, .*, got 0.4; leave it out, or take"
    with pytest.raises(ArgumentError, match=sentence):
        request.check_config(config)
    with pytest.raises(ArgumentError, match=sentence):
        new_guidance(None, "x", config, 0)
    several = replaced(SDSConfig(), kind="vsd", particles=4, repaint_from=0.4)
    with pytest.raises(ArgumentError, match=r"with 4 particles, which it would make alike, got 0.4; .* 1 particle"):
        request.check_config(several)
    with pytest.raises(ArgumentError, match=r"repaint_steps: .*600 steps ask for a timestep outside .* is 500"):
        painter(RepaintConfig(repaint_from=0.4, repaint_steps=600))
    with pytest.raises(ArgumentError, match=r"repaint_strength\[1\] must be at most 1, got 1.5"):
        request.check_config(replaced(SDSConfig(), repaint_strength=(0.5, 1.5)))


def test_the_buffer_is_part_of_the_memory():
    """8 groups of 4 views of 64 x 64 pixels in float32."""

    def estimate(share, graphs=False):
        return run_memory.estimate(MINI, replaced(mini(), repaint_from=share, repaint_groups=8), graphs=graphs)

    assert estimate(0.4) == {**estimate(1.0), run_memory.REPAINTED: 8 * 4 * 3 * 64 * 64 * 4}
    more = estimate(0.4, True)[memory.GRAPHS] - estimate(1.0, True)[memory.GRAPHS]
    assert more == run_memory.UNET_KERNELS * memory.KERNEL_BYTES  # the sampler's call is a graph of its own
    assert run_memory.advice({run_memory.REPAINTED: 2 << 30, run_memory.WEIGHTS: 1}, mini()).endswith("in --config")
