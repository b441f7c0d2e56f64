"""Guidance by a model: it is asked as often as the recipe says, and its answers are used again as they were."""

from types import SimpleNamespace

import pytest
import torch
from reference.random_model import random_model
from reference.studio import TINY, Studio, same

from mvdream_fast.camera import orbit_cameras
from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import TextCond
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.distill.config import replaced
from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.state import RunState
from mvdream_fast.guidance.prompts import VIEW_WORDS, view_words
from mvdream_fast.guidance.reconstruction import Anchored
from mvdream_fast.guidance.sds import SDS, SingleViewSDS
from mvdream_fast.models.config import ScheduleConfig, VAEConfig
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.background import seen_behind

REUSING = replaced(TINY, steps=7, updates_per_guidance=3)


class CountingUNet:
    """Predicts a shrunken input, and counts how often it is asked."""

    def __init__(self):
        self.n_calls = 0

    def prepare_context(self, context):
        return context

    def __call__(self, z_t, t, context, camera, n_views, n_prompts):
        self.n_calls += 1
        return torch.cat([0.4 * z_t, 0.5 * z_t])


class PoolingVAE:
    config = VAEConfig(block_out_channels=(1, 1), latent_channels=3, image_size=8)

    def encode(self, images, noise=None):
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return mean if noise is None else mean + 0.1 * noise

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents, scale_factor=2)


class Stub:
    """What new_guidance wants of a pipeline."""

    def __init__(self):
        self.model = SimpleNamespace(unet=CountingUNet(), vae=PoolingVAE())
        self.schedule, self.dtype = NoiseSchedule.from_config(ScheduleConfig()), torch.float32
        self.graphs = True

    def encode_prompt(self, prompt, negative_prompt, suffix, warn):
        return TextCond(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))


def taught(config, pipeline=None):
    return new_guidance(pipeline or Stub(), "x", config, 0)


@pytest.mark.parametrize("match", ["latents", "pixels"])
def test_the_model_is_asked_every_third_step(match):
    pipeline = Stub()
    config = replaced(REUSING, match=match)
    records = []
    asset = Studio(taught(config, pipeline))("x", config=config, callback=lambda p: records.append(p.record))
    assert pipeline.model.unet.n_calls == 3
    assert [r.t > 0 for r in records] == [True, False, False, True, False, False, True]
    assert all(p.isfinite().all() for p in asset.representation.parameters())


def test_one_update_an_answer_is_plain_distillation():
    once = replaced(TINY, steps=3)
    pipeline = Stub()
    Studio(taught(once, pipeline))("x", config=once)
    assert pipeline.model.unet.n_calls == 3
    assert taught(once).state() == {}


def test_steps_that_share_an_answer_share_cameras_and_size():
    config = replaced(REUSING, milestones=(1,), render_size=(8, 16), n_groups=(1, 1))
    assert [config.asked(step) for step in range(7)] == [0, 0, 0, 3, 3, 3, 6]
    assert [config.phase(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 1]
    seen = []

    guidance = taught(config)
    plain = guidance.score

    def score(rgb, views, step, stream, *rest):
        seen.append((rgb.shape[-1], views.c2w.sum().item()))
        return plain(rgb, views, step, stream, *rest)

    guidance.score = score
    state = RunState(config, "x", 0, guidance)
    for step in range(7):
        state.step(step)
    assert [size for size, _ in seen] == [8, 8, 8, 16, 16, 16, 16]
    assert [camera == seen[config.asked(step)][1] for step, (_, camera) in enumerate(seen)] == [True] * 7
    assert len({camera for _, camera in seen}) == 3


def test_pixels_are_pulled_to_the_decoded_answer():
    config = replaced(REUSING, match="pixels")
    guidance = taught(config)
    cameras = guidance.views(0, Stream(0, 0, "cameras"))
    rgb = torch.rand(4, 3, 8, 8)
    first, _ = guidance.score(rgb, cameras, 0, Stream(0, 0, "guidance"))
    target = guidance.state()["target"]
    assert target.shape == (4, 3, 8, 8)
    assert target.amin() >= 0
    assert target.amax() <= 1
    torch.testing.assert_close(first, (rgb - target).square().sum() / 8)
    again, t = guidance.score(target.clone(), cameras, 1, Stream(0, 1, "guidance"))
    assert (again.item(), t) == (0.0, 0)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_a_run_resumed_between_answers_has_the_same_bytes(tmp_path, stop_at):
    whole = Studio(taught(REUSING))("x", config=REUSING)

    class Stop:
        requested = None

    stop = Stop()

    def callback(progress):
        stop.requested = 1 if progress.record.step + 1 == stop_at else None

    Studio(taught(REUSING))("x", config=REUSING, checkpoints=tmp_path, callback=callback, interrupt=stop)
    assert run_folder.load_latest(tmp_path)[0] == stop_at
    assert same(whole.state(), Studio(taught(REUSING))("x", config=REUSING, checkpoints=tmp_path).state())


@pytest.mark.parametrize("match", ["latents", "pixels"])
def test_an_answer_that_is_not_finite_spoils_one_step(match):
    """The next step asks again, rather than going on from it."""

    class Overflowing(CountingUNet):
        def __call__(self, *arguments):
            return super().__call__(*arguments) * (float("inf") if self.n_calls == 2 else 1.0)

    pipeline = Stub()
    pipeline.model.unet, config = Overflowing(), replaced(REUSING, match=match)
    records = []
    Studio(taught(config, pipeline))("x", config=config, callback=lambda p: records.append(p.record))
    assert [r.skipped for r in records] == [False, False, False, True, False, False, False]
    assert [r.t > 0 for r in records] == [True, False, False, True, True, False, True]


def test_light_and_background_are_those_of_the_answer():
    """What it said holds for images of that light, before that background."""
    wild = {"background": "learned", "shading": True, "shading_from": 0, "lambda_orient": (0, 0.0, 0.0, 0)}
    state, seen = RunState(replaced(REUSING, steps=30, **wild), "x", 0, taught(REUSING)), []
    cameras, rays_d = orbit_cameras(4), torch.nn.functional.normalize(torch.ones(1, 3), dim=1)
    for step in range(30):
        light = state._lighting(cameras, 8, step)
        behind = seen_behind(state.representation.background, rays_d, Stream(0, step, "render"), light)
        seen.append((light.shading, light.lights[0].tolist(), behind[0].tolist()))
    assert all(seen[step] == seen[step - step % 3] for step in range(30))
    assert len({repr(one) for one in seen}) == 10
    once = RunState(replaced(TINY, **wild), "x", 0, taught(TINY))._lighting(cameras, 8, 1)
    assert once.behind is None  # then a step's own streams, as ever
    assert RunState(TINY, "x", 0, taught(TINY))._lighting(cameras, 8, 1) is None


def test_known_views_beside_others_are_unlit():
    config = replaced(TINY, shading=True, shading_from=0, lambda_orient=(0, 0.0, 0.0, 0))
    known = Anchored(taught(config), torch.zeros(1, 4, 3, 8, 8), [orbit_cameras(4)], (0.0, 1.0, 1.0, 0.0))
    light = RunState(config, "x", 0, known)._lighting(orbit_cameras(8), 8, 0)
    assert light.lights.shape == (8 * 8 * 8, 3)
    assert light.plain.view(8, -1).tolist() == [[False] * 64] * 4 + [[True] * 64] * 4


def test_an_answer_that_is_missing_is_told():
    guidance = taught(REUSING)
    with pytest.raises(ModelError, match="does not hold the model's answer that step 1 goes on from"):
        guidance.score(torch.rand(4, 3, 8, 8), None, 1, Stream(0, 1, "guidance"))


def test_each_side_has_its_words():
    around = orbit_cameras(8, elevation_deg=20.0, distance=2.0, fovy_deg=40.0).c2w
    words = [VIEW_WORDS[row].split()[0] for row in view_words(around).tolist()]
    # half-way between two sides counts as the side; four of eight views are told what DreamFusion tells them
    assert words == ["front", "side", "side", "side", "back", "side", "side", "side"]
    assert {VIEW_WORDS[row] for row in view_words(orbit_cameras(4, elevation_deg=70.0).c2w).tolist()} == {VIEW_WORDS[3]}


class Sides(Stub):
    """Its text states say which prompt they are of."""

    def encode_prompt(self, prompt, negative_prompt, suffix, warn):
        self.asked, prompts = list(zip(prompt, suffix, strict=True)), prompt
        states = torch.arange(1.0, 1 + len(prompts))[:, None, None].expand(-1, 2, 4)
        return TextCond(states, -states.new_ones(len(prompts), 2, 4))


def test_the_single_view_prior_is_asked_without_cameras_and_told_each_side():
    pipeline, asked = Sides(), []

    class Noting(CountingUNet):
        def __call__(self, z_t, t, context, camera, n_views, n_prompts):
            asked.append((context[:, 0, 0].tolist(), camera, n_views, n_prompts, len(z_t)))
            return super().__call__(z_t, t, context, camera, n_views, n_prompts)

    pipeline.model.unet = Noting()
    guidance = new_guidance(pipeline, "a car", replaced(TINY, mode="2d"), 0)
    assert pipeline.asked == [("a car", f", {words}") for words in VIEW_WORDS]  # as endings: they are never cut
    cameras = orbit_cameras(4, elevation_deg=20.0)
    rgb = torch.rand(4, 3, 8, 8, requires_grad=True)
    loss, _ = guidance.score(rgb, cameras, 0, Stream(0, 0, "guidance"))
    loss.backward()
    assert asked == [([-1, -1, -1, -1, 1.0, 2.0, 3.0, 2.0], None, 1, 2, 4)]
    assert rgb.grad.abs().sum() > 0


def test_views_of_the_single_view_prior_do_not_know_of_each_other(tmp_path):
    """The gradient of one view is the same whatever the others show; a real UNet and its 2D mode."""
    model = random_model()
    pipeline = MVDreamPipeline(model, "cpu", "float32")
    config = replaced(TINY, mode="2d", rescale=0.5)
    guidance, cameras = new_guidance(pipeline, "a chair", config, 0), orbit_cameras(4, elevation_deg=20.0)
    size = model.vae.config.image_size
    rgb = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))

    def gradient(images):
        images = images.clone().requires_grad_()
        guidance.score(images, cameras, 0, Stream(0, 0, "guidance"))[0].backward()
        return images.grad

    changed = rgb.clone()
    changed[1:] = 1 - changed[1:]
    torch.testing.assert_close(gradient(rgb)[0], gradient(changed)[0])
    assert not torch.allclose(gradient(rgb)[1], gradient(changed)[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("mode", "kind"), [("3d", SDS), ("2d", SingleViewSDS)])
def test_a_model_in_half_precision_asks_for_nearly_the_same(mode, kind, dtype):
    """Its text tower answers in float32: the guidance hands that on in the UNet's dtype, and pulls in float32."""
    cameras, rgb = orbit_cameras(4, elevation_deg=20.0), Stream(0, 0, "images").uniform(4, 3, 16, 16)
    # 2: with TINY's scale of 50 the difference of the two answers, and its rounding, would be all there is
    config = replaced(TINY, mode=mode, guidance_scale=2.0, rescale=0.0)

    def gradient(dtype):
        images = rgb.clone().requires_grad_()
        guidance = new_guidance(MVDreamPipeline(random_model(), "cpu", dtype), "a chair", config, 0)
        assert type(guidance) is kind
        guidance.score(images, cameras, 0, Stream(0, 0, "guidance"))[0].backward()
        return images.grad

    exact, rough = gradient("float32"), gradient(dtype)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.05 * exact.norm()
