"""Views that are sampled once and fitted beside distillation: which they are, where they stand, and what they weigh."""

import dataclasses

import numpy as np
import pytest
import torch
from reference.random_model import random_model

from mvdream_fast.camera import middle_cameras
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.rng import Stream
from mvdream_fast.distill.config import check_learning, replaced, restepped
from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.recipes import guided_views
from mvdream_fast.distill.sampled import Sampled, Sampler
from mvdream_fast.distill.systems import mini, mvdream_solid
from mvdream_fast.guidance.reconstruction import Anchored, Reconstruction
from mvdream_fast.guidance.sds import SDS
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.mesh.hull import Hull
from mvdream_fast.text_to_3d import TextTo3D

SMALL = replaced(mini(), steps=4, render_size=(8,), samples_per_ray=16)
BESIDE = replaced(SMALL, sampled_views=8, sampled_steps=2, sampled_scale=3.0, lambda_sampled=(0.0, 2.0, 6.0, 4.0))


@pytest.fixture(scope="module")
def pipeline() -> MVDreamPipeline:
    return MVDreamPipeline(random_model(), "cpu", torch.float32)


def draw(pipeline, n_views, uncond_mode="3d"):
    settings = {"n_steps": 2, "guidance_scale": 3.0, "uncond_mode": uncond_mode, "negative_prompt": "", "seed": 5}
    return pipeline("a red car", n_views, **settings, warn=lambda _: None)


@pytest.mark.parametrize("uncond_mode", ["3d", "2d"])
def test_they_are_what_the_pipeline_draws_in_groups_all_around(pipeline, uncond_mode):
    guidance = new_guidance(pipeline, "a red car", replaced(BESIDE, sampled_uncond=uncond_mode), seed=5)
    assert isinstance(guidance, Anchored)
    assert isinstance(guidance.free, SDS)
    drawn = draw(pipeline, 8, uncond_mode)
    around = middle_cameras(dataclasses.replace(BESIDE.cameras, n_views=8))
    assert torch.equal(guidance.images, drawn.tensor.unflatten(0, (4, 2)).transpose(0, 1))
    for first, cameras in enumerate(guidance.cameras):
        assert torch.equal(cameras.c2w, around.c2w[first::2])
        assert torch.equal(cameras.fovy, around.fovy[first::2])


def test_without_them_there_is_distillation_alone(pipeline):
    assert isinstance(new_guidance(pipeline, "a red car", SMALL, seed=5), SDS)


def test_reconstruction_draws_with_the_same_settings(pipeline):
    config = replaced(SMALL, method="reconstruct", sampled_steps=2, sampled_scale=3.0)
    guidance = new_guidance(pipeline, "a red car", config, seed=5)
    assert isinstance(guidance, Reconstruction)
    drawn = draw(pipeline, 4)
    assert torch.equal(guidance.images, drawn.tensor)


@pytest.mark.parametrize(("step", "weight"), [(0, 2.0), (1, 3.0), (4, 6.0), (9, 6.0)])
def test_their_weight_is_a_ramp(pipeline, step, weight):
    guidance = new_guidance(pipeline, "a red car", BESIDE, seed=5)
    guidance.free.score = lambda *_: (torch.tensor(0.25), 7)
    views = guidance.views(step, Stream(0, step, "cameras"))
    rgb = torch.zeros(8, 3, 8, 8)
    loss, t = guidance.score(rgb, views, step, Stream(0, step, "guidance"))
    small = torch.nn.functional.avg_pool2d(guidance.images[guidance._group], guidance.images.shape[-1] // 8)
    assert loss.item() == pytest.approx(0.25 + weight * small.square().sum().item() / 4, rel=1e-5)
    assert t == 7


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """What pipelines are asked for."""
    found, call = [], MVDreamPipeline.__call__

    def counted(self, *args, **kwargs):
        found.append(args)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(MVDreamPipeline, "__call__", counted)
    return found


@pytest.mark.parametrize(("n_views", "n_calls"), [(4, 1), (8, 2)])
def test_a_run_fits_the_first_views_where_it_fits_four(pipeline, calls, tmp_path, n_views, n_calls):
    sampler = Sampler(pipeline)
    config = replaced(BESIDE, sampled_views=n_views, steps=1)
    shown = sampler.first_views("a red car", config, 5)
    asset = TextTo3D(pipeline, sampler=sampler)("a red car", seed=5, config=config)
    assert len(calls) == n_calls
    assert torch.equal(sampler.sampled("a red car", config, 5).images, draw(pipeline, n_views).tensor)
    assert torch.equal(shown.tensor, sampler.sampled("a red car", config, 5).images) == (n_views == 4)
    again = TextTo3D(pipeline)("a red car", seed=5, config=config)
    assert all(torch.equal(x, again.state()[name]) for name, x in asset.state().items())
    for prompt, seed in (("a green car", 5), ("a red car", 6)):
        assert not torch.equal(sampler.sampled(prompt, config, seed).images, shown.tensor)


def test_stages_that_want_the_same_views_have_them_drawn_once(pipeline, calls):
    sampler = Sampler(pipeline)
    first, second = (new_guidance(pipeline, "a red car", BESIDE, 5, sampler) for _ in range(2))
    assert len(calls) == 1
    assert torch.equal(first.images, second.images)
    for n, change in enumerate(({"sampled_scale": 4.0}, {"sampled_uncond": "2d"}), start=2):
        other = new_guidance(pipeline, "a red car", replaced(BESIDE, **change), 5, sampler)
        assert len(calls) == n
        assert not torch.equal(first.images, other.images)


def test_another_number_of_steps_moves_the_ramp():
    assert restepped(BESIDE, 40).sampled.lambda_sampled == (0.0, 2.0, 6.0, 40.0)


def test_they_count_among_the_views_that_the_model_is_asked_about():
    assert guided_views(BESIDE) == guided_views(SMALL) + 8 * 2


def test_a_run_with_them_is_resumed_to_the_byte(pipeline, tmp_path):
    class Stop:
        requested, exit_code = None, 130

    stop = Stop()

    def callback(progress):
        stop.requested = 2 if progress.record.step == 1 else None

    whole = TextTo3D(pipeline)("a red car", config=BESIDE, seed=3).state()
    TextTo3D(pipeline)("a red car", config=BESIDE, seed=3, checkpoints=tmp_path, callback=callback, interrupt=stop)
    resumed = TextTo3D(pipeline)("a red car", config=BESIDE, seed=3, checkpoints=tmp_path).state()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    alone = TextTo3D(pipeline)("a red car", config=SMALL, seed=3).state()
    assert any(not torch.equal(whole[name], alone[name]) for name in whole)


HULL = replaced(
    mvdream_solid("fast"), steps=3, sampled_steps=2, sampled_scale=3.0, render_size=(16,), tets_resolution=32
)


def square(n_views: int) -> torch.Tensor:
    """Views [V, 3, 16, 16] of something red in the middle before grey."""
    views = torch.full((n_views, 3, 16, 16), 0.5)
    views[:, :, 5:11, 5:11] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    return views


@pytest.mark.parametrize("method", ["sds", "reconstruct"])
def test_a_run_begins_as_their_hull(pipeline, monkeypatch, method):
    config = HULL if method == "sds" else replaced(HULL, method="reconstruct", sampled_views=0)
    drawn = []

    def draw_square(*args):
        drawn.append(args)
        return Sampled(square(4), middle_cameras(dataclasses.replace(config.cameras, n_views=4)))

    monkeypatch.setattr(Sampler, "sampled", draw_square)
    before = replaced(config, lr_geometry=1e-9, lr_encoding=1e-9, lr_mlp=1e-9)
    asset = TextTo3D(pipeline)("a red car", seed=1, config=before)
    assert len(drawn) == 1
    hull = Hull(*new_guidance(pipeline, "a red car", config, 1).known(), 1.0).mesh(32)
    mesh = asset.mesh()
    for side in (np.min, np.max):  # a fresh one is a ball
        np.testing.assert_allclose(side(mesh.vertices, 0), side(hull.vertices, 0), atol=0.06)
    assert mesh.colors[:, 0].mean() > 0.8
    assert mesh.colors[:, 1].mean() < 0.2


def test_where_they_show_nothing_a_run_begins_as_ever(pipeline, monkeypatch):
    grey = torch.full((4, 3, 16, 16), 0.5)
    cameras = middle_cameras(dataclasses.replace(HULL.cameras, n_views=4))
    monkeypatch.setattr(Sampler, "sampled", lambda *_: Sampled(grey, cameras))
    still = replaced(HULL, lr_geometry=1e-9)
    mesh = TextTo3D(pipeline)("a red car", seed=1, config=still).mesh()
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), 0.5, atol=0.03)


@pytest.mark.parametrize("change", [{"sampled_views": 0}, {"shape": "volume"}])
def test_a_hull_needs_views_and_tetrahedra(change):
    with pytest.raises(ArgumentError, match="sampled_hull must be false but for the shape tets with sampled views"):
        check_learning(replaced(HULL, **change))


def test_a_hull_is_one_asset():
    with pytest.raises(ArgumentError, match="particles must be 1 with sampled_hull"):
        check_learning(replaced(HULL, kind="vsd", particles=3))
