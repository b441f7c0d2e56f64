"""Which recipe a run has where none is named, and what it and a few-shot fit are made of."""

import pytest
import torch
from reference.random_model import random_model

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.images import png_bytes
from mvdream_fast.core.ramp import is_ever_on, ramp
from mvdream_fast.distill.config import check_learning, joined, replaced, restepped, settings_of
from mvdream_fast.distill.recipes import (
    OF_MVDREAM,
    RECIPES,
    guided_views,
    resolve_config,
    sampled_as,
    shaded,
    usual_recipe,
)
from mvdream_fast.distill.request import resolve
from mvdream_fast.distill.sampled import Sampler
from mvdream_fast.distill.systems import SDS_PRESETS, mvdream_solid
from mvdream_fast.jobs.asset import sample_views
from mvdream_fast.models.config import SamplingGuidance
from mvdream_fast.pipeline import MVDreamPipeline

SOLID = "mvdream-solid"


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        ({}, SOLID),
        ({"preset": "fast"}, SOLID),
        ({"preset": "mini", "steps": 40, "guidance_scale": 5.0, "seed": 3}, SOLID),
        ({"preset": "paper"}, "mvdream"),
        ({"model": "pixels"}, "mvdream"),
        ({"recipe": "mvdream"}, "mvdream"),
        ({"method": "sds"}, "mvdream"),
        ({"method": "reconstruct"}, "mvdream"),
        ({"mode": "2d"}, "mvdream"),
        ({"guidance": "vsd"}, "mvdream"),
        ({"shape": "surface"}, "mvdream"),
        ({"shading": True}, "mvdream"),
        ({"n_views": 2}, "mvdream"),
        ({"recipe": SOLID, "n_views": 2}, SOLID),
    ],
)
def test_the_small_models_are_told_to_be_solid_unless_another_kind_of_run_is_named(flags, recipe):
    assert resolve({"prompt": "a red chair", **flags}).config.recipe == recipe


def test_settings_of_a_file_that_names_no_recipe_are_mvdreams():
    assert resolve({"prompt": "a red chair"}, {"sds": {"steps": 40}}).config.recipe == "mvdream"
    assert resolve({"prompt": "a red chair"}, {"seed": 4}).config.recipe == SOLID
    assert resolve({"prompt": "a red chair"}, {"sds": {"recipe": SOLID}}).config.recipe == SOLID


def test_a_run_of_the_usual_recipe_is_written_and_read_as_it_is():
    run = resolve({"prompt": "a red chair", "preset": "fast"})
    assert resolve({}, run.to_dict()).config == run.config


def test_models_of_single_images_have_no_views_to_be_solid_by():
    assert usual_recipe("mini", multi_view=False) == "mvdream"
    assert all(usual_recipe("mini", [name]) == "mvdream" for name in OF_MVDREAM)


@pytest.mark.parametrize("size", ["mini", "fast"])
def test_it_asks_about_fewer_views_than_mvdream(size):
    """Each step about four, and the sampled ones once for every step of the sampler: four, then these and four more."""
    config = mvdream_solid(size)
    assert guided_views(config) == 4 * config.steps + (4 + 8) * 25 < guided_views(SDS_PRESETS[size])


@pytest.mark.parametrize(
    ("size", "steps", "last"), [("paper", 5000, 5e4), ("mini", 300, 5e4), ("fast", 100, 1e4), ("fast", 40, 1e4)]
)
def test_its_surface_is_smoothed_first_and_corners_come_back(size, steps, last):
    config = restepped(mvdream_solid(size), steps)
    assert config.steps == steps
    weight = settings_of(config)["lambda_normal_consistency"]
    weights = [ramp(weight, round(share * steps)) for share in (0, 0.3, 0.6, 1)]
    assert weights == pytest.approx([1e5, (1e5 + last) / 2, last, last])
    assert not is_ever_on(settings_of(config)["lambda_laplacian"])


@pytest.mark.parametrize(
    ("flags", "guidance"), [({}, SamplingGuidance(3.5, "2d")), ({"method": "sds"}, SamplingGuidance(7.5, "3d"))]
)
def test_the_first_views_are_guided_as_those_that_are_fitted(flags, guidance, tmp_path):
    pipeline = MVDreamPipeline(random_model(), "cpu", torch.float32)
    run = resolve({"prompt": "a red chair", "preset": "fast", "seed": 2, **flags})
    sample_views(Sampler(pipeline), run, tmp_path)
    settings = {"guidance_scale": guidance.scale, "uncond_mode": guidance.uncond_mode, "negative_prompt": ""}
    drawn = pipeline("a red chair", seed=2, n_steps=25, warn=lambda _: None, **settings)
    assert (tmp_path / "views.png").read_bytes() == png_bytes(drawn.sheet())


def test_stages_have_their_sampled_views_together():
    stage = replaced(mvdream_solid("fast"), sampled_hull=False, sampled_between=False)
    two = joined([replaced(stage, shape="volume"), stage])
    assert guided_views(two) == 2 * guided_views(stage) - 4 * 25


@pytest.mark.parametrize("size", ["mini", "fast"])
def test_a_few_shot_fit_of_a_small_model_begins_as_their_hull(size):
    config = resolve_config(size, method="reconstruct", steps=50)
    assert config.recipe == "mvdream"
    assert config.method == "reconstruct"
    assert config.steps == 50
    assert config.cameras.n_views == 4
    assert config.representation.shape == "tets"
    assert config.sampled.sampled_hull
    assert config.sampled.lambda_silhouette[2] > 0
    assert config.sampled.sampled_views == 0  # beside distillation
    assert resolve_config(size, method="reconstruct", n_views=6).cameras.n_views == 6


@pytest.mark.parametrize("given", [{"recipe": SOLID}, {"method": "reconstruct"}])
def test_another_shape_begins_as_it_always_does(given):
    config = resolve_config("fast", shape="volume", **given)
    assert config.representation.shape == "volume"
    assert not config.sampled.sampled_hull
    check_learning(config)


def test_a_few_shot_fit_at_paper_is_as_it_was():
    assert resolve_config("paper", method="reconstruct").representation == RECIPES["mvdream"].at("paper").representation


def test_stages_with_as_many_calls_for_other_views_have_them_each():
    """Twelve views, and four with four between them, are asked about as often, but are not the same."""
    twelve = replaced(mvdream_solid("fast"), sampled_views=12, sampled_between=False)
    four = mvdream_solid("fast")
    assert guided_views(joined([twelve, four])) == guided_views(twelve) + guided_views(four)


def test_a_few_shot_fit_is_sampled_as_its_model_is_guided():
    guidance = SamplingGuidance(5.0, "3d")
    for config in (resolve_config("mini", method="reconstruct"), mvdream_solid("mini")):
        how = sampled_as(config, guidance).sampled
        assert (how.sampled_scale, how.sampled_uncond) == (5.0, "3d")
        assert sampled_as(config, guidance, {"sampled_scale"}).sampled.sampled_scale == config.sampled.sampled_scale


def test_a_few_shot_fit_asks_about_its_views_alone():
    config = resolve_config("mini", method="reconstruct", sampled_steps=10, sampled_between=False)
    assert guided_views(config) == 4 * 10
    assert guided_views(replaced(config, sampled_between=True)) == (4 + 8) * 10


@pytest.mark.parametrize("recipe", [SOLID, "mvdream-sharp"])
def test_reconstruct_is_a_method_of_mvdream(recipe):
    with pytest.raises(ArgumentError, match=f"method must be sds with the recipe {recipe}, got 'reconstruct'"):
        resolve_config("mini", recipe=recipe, method="reconstruct")


@pytest.mark.parametrize("recipe", ["dreamfusion-if", "magic3d-if-sd"])
def test_what_is_lit_already_is_not_lit_later(recipe):
    lit = resolve_config("paper", recipe=recipe)
    assert [stage.shading_from for stage in shaded(lit).stages] == [stage.shading_from for stage in lit.stages]
    dark = resolve_config("paper")
    assert (shaded(dark).shading, shaded(dark).shading_from) == (True, dark.steps // 2)
    normals = resolve_config("paper", recipe="prolificdreamer")  # of its second stage
    assert [stage.shading for stage in shaded(normals).stages] == [True, False, True]
