"""The recipes: the papers' numbers, what their small sizes keep of them, which models they take."""

import typing
from dataclasses import replace

import pytest
import torch
from reference.random_model import TINY as TINY_MODEL
from reference.random_model import TINY_PIXELS, random_model
from reference.studio import TINY, Painter

from mvdream_fast.core.errors import ArgumentError, ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.sampler import translate
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.distill.config import RecipeName, replaced, restepped, settings_of
from mvdream_fast.distill.recipes import RECIPES, guided_views, resolve_config, shaded
from mvdream_fast.distill.request import check_config
from mvdream_fast.distill.state import RunState
from mvdream_fast.distill.systems import SDS_PRESETS, repaint
from mvdream_fast.guidance.repaint import Repaint
from mvdream_fast.models.config import MINI, PIXELS, ScheduleConfig
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.text_to_3d import TextTo3D


def test_paper_recipe_is_the_published_table():
    expected = {
        "steps": 10_000,
        "n_groups": (2, 1),
        "n_views": 4,
        "render_size": (64, 256),
        "milestones": (5000,),
        "fovy_range_deg": (15, 60),
        "distance_range": (0.8, 1.0),
        "relative_distance": "tan",
        "elevation_range_deg": (0, 30),
        "samples_per_ray": 512,
        "guidance_scale": 50,
        "loss": "x0",
        "rescale": 0.5,
        "min_step": (0, 0.98, 0.02, 8000),
        "max_step": (0, 0.98, 0.50, 8000),
        "background": "learned",
        "background_aug_prob": 0.5,
        "suffix": "",
        "lambda_orient": (0, 0, 0, 0),
        "lambda_sparsity": (0, 0, 0, 0),
        "lambda_opaque": (0, 0, 0, 0),
        "lambda_z_variance": (0, 0, 0, 0),
        "lr_encoding": 0.01,
        "lr_mlp": 0.001,
        "lr_background": 0.001,
        "weight_decay": 0.01,
        "betas": (0.9, 0.99),
        "adam_eps": 1e-15,
    }
    paper = settings_of(SDS_PRESETS["paper"])
    assert {key: paper[key] for key in expected} == expected
    assert paper["negative_prompt"].startswith("ugly, bad anatomy, blurry, pixelated obscure")
    assert paper["negative_prompt"].endswith("deformed, dehydrated, bad proportions")


def test_shading_variant_adds_light_and_orientation_only():
    paper, lit = SDS_PRESETS["paper"], shaded(SDS_PRESETS["paper"])
    changed = {name for name, value in settings_of(lit).items() if value != settings_of(paper)[name]}
    assert changed == {"shading", "lambda_orient"}
    assert lit.representation.lambda_orient == (0, 10, 1000, 5000)


def test_phases_switch_at_the_milestone():
    paper = SDS_PRESETS["paper"]
    assert [paper.phase(step) for step in (0, 4999, 5000, 9999)] == [0, 0, 1, 1]


def test_learning_rates_fall_geometrically_and_only_if_asked():
    falling = replaced(TINY, steps=100, lr_decay=0.25, lr_decay_from=0.5)
    assert [falling.lr_share(step) for step in (0, 50, 75, 100)] == [1, 1, 0.5, 0.25]
    assert {config.lr_share(config.steps - 1) for config in SDS_PRESETS.values()} == {1}
    assert replaced(TINY, lr_decay=0.25, lr_decay_from=1.0).lr_share(TINY.steps - 1) == 1


def test_the_optimiser_has_the_rates_of_its_step():
    """Each of its groups; a state that is restored has them again, though no checkpoint holds them."""
    config = replaced(TINY, steps=4, lr_decay=0.25)

    def rates(state):
        return [group["lr"] for group in state.optimizer.param_groups]

    state, other = (RunState(config, "x", 0, Painter()) for _ in range(2))
    first = rates(state)
    assert set(first) == {0.01, 0.001}
    for step in range(3):
        state.step(step)
    assert rates(state) == pytest.approx([0.5 * rate for rate in first])
    other.restore(state.state())
    other.step(3)
    assert rates(other) == pytest.approx([0.25**0.75 * rate for rate in first])


# What threestudio's configurations of these systems say, by hand; the losses are ramps (start, from, to, end).
DREAMFUSION_IF = {
    "recipe": "dreamfusion-if",
    "mode": "2d",
    "kind": "sds",
    "loss": "sds",
    "guidance_scale": 20,
    "guided_from": "cond",
    "rescale": 0,
    "weighting": "sds",
    "timesteps": "each",
    "min_step": (0, 0.02, 0.02, 0),
    "max_step": (0, 0.98, 0.98, 0),
    "view_words": True,
    "view_words_deg": 45,
    "negative_prompt": "",
    "steps": 10_000,
    "n_views": 1,
    "n_groups": (1,),
    "render_size": (64,),
    "milestones": (),
    "distance_range": (1.5, 2.0),
    "relative_distance": "none",
    "perturb": (0.1, 0.2, 0.02),
    "fovy_range_deg": (40, 70),
    "elevation_range_deg": (-10, 90),
    "radius": 2,
    "samples_per_ray": 512,
    "background": "learned",
    "background_aug_prob": 0,
    "lambda_orient": (0, 10, 1000, 5000),
    "lambda_sparsity": (0, 1, 1, 0),
    "lambda_opaque": (0, 0, 0, 0),
    "lambda_z_variance": (0, 0, 0, 0),
    "shading": True,
    "shading_from": 2001,
    "soft_shading": False,
    "lr_encoding": 0.01,
    "lr_mlp": 0.01,
    "lr_background": 0.001,
    "weight_decay": 0,  # Adam
    "betas": (0.9, 0.99),
    "adam_eps": 1e-15,
}
PROLIFICDREAMER = {
    "recipe": "prolificdreamer",
    "mode": "2d",
    "kind": "vsd",
    "guidance_scale": 7.5,
    "guided_from": "uncond",
    "rescale": 0,
    "weighting": "sds",
    "timesteps": "each",
    "min_step": (0, 0.02, 0.02, 0),
    "max_step": (5000, 0.98, 0.5, 5001),
    "lora_lr": 1e-4,
    "camera_dropout": 0.1,
    "particles": 1,
    "view_words": True,
    "view_words_deg": 30,
    "negative_prompt": "",
    "steps": 25_000,
    "n_views": 1,
    "n_groups": (1, 1),
    "render_size": (64, 512),
    "milestones": (5000,),
    "distance_range": (1.0, 1.5),
    "relative_distance": "none",
    "perturb": (0, 0, 0),
    "fovy_range_deg": (40, 70),
    "elevation_range_deg": (-10, 45),
    "radius": 1,
    "samples_per_ray": 512,
    "background": "learned",
    "background_aug_prob": 0.5,
    "lambda_orient": (0, 0, 0, 0),
    "lambda_sparsity": (0, 10, 10, 0),
    "lambda_opaque": (10_000, 0, 1000, 10_001),
    "shading": False,
    "lr_encoding": 0.01,
    "lr_mlp": 0.001,
    "lr_background": 0.001,
    "weight_decay": 0.01,
    "betas": (0.9, 0.99),
    "adam_eps": 1e-15,
}
NO_LOSSES = dict.fromkeys(("lambda_orient", "lambda_sparsity", "lambda_opaque", "lambda_z_variance"), (0, 0, 0, 0))
TEXTMESH_IF = DREAMFUSION_IF | {
    "recipe": "textmesh-if",
    "shape": "surface",
    "sdf_opacity": "neus",
    "sphere_radius": 0.5,
    "sdf_levels": (2000, 8, 16, 6000),
    "sdf_normals": "finite_difference",
    "cos_anneal": (0, 0, 1, 10_000),
    "lambda_eikonal": (0, 1000, 1000, 0),
    "lr_mlp": 0.001,
    "deviation_least": (0, -1, -1, 0),
    "lr_deviation": 0.001,
    **NO_LOSSES,
}
MAGIC3D_COARSE = DREAMFUSION_IF | {"recipe": "magic3d-if-sd", "weighting": "uniform", "soft_shading": True}
OF_VOLUMES = ("samples_per_ray", *NO_LOSSES)


def without(table, *names):
    return {name: value for name, value in table.items() if name not in names}


MAGIC3D_REFINE = without(MAGIC3D_COARSE, *OF_VOLUMES) | {
    "weighting": "sds",
    "guidance_scale": 100,
    "max_step": (0, 0.5, 0.5, 0),
    "steps": 5000,
    "render_size": (512,),
    "elevation_range_deg": (-10, 45),
    "fovy_range_deg": (30, 45),
    "shape": "tets",
    "tets_resolution": 128,
    "lambda_normal_consistency": (0, 1e4, 1e4, 0),
    "lambda_laplacian": (0, 0, 0, 0),
    "shading_from": 0,
    **dict.fromkeys(("lr_geometry", "lr_encoding", "lr_mlp", "lr_background"), 0.01),
}
PROLIFIC_TEXTURE = without(PROLIFICDREAMER, *OF_VOLUMES) | {
    "steps": 30_000,
    "n_groups": (1,),
    "render_size": (512,),
    "milestones": (),
    "shape": "textured-mesh",
    "mesh_colors": "field",
    "background_aug_prob": 0,
}
PROLIFIC_GEOMETRY = PROLIFIC_TEXTURE | {
    "kind": "sds",
    "loss": "sds",
    "guidance_scale": 100,
    "guided_from": "cond",
    "steps": 15_000,
    "shape": "tets",
    "shows": "normals",
    "view_words_deg": 45,
    "tets_resolution": 128,
    "lambda_normal_consistency": (0, 1e4, 1e4, 0),
    "lambda_laplacian": (0, 1e4, 1e4, 0),
    "weight_decay": 0,
    **dict.fromkeys(("lr_geometry", "lr_encoding", "lr_mlp", "lr_background"), 0.005),
}
del PROLIFIC_GEOMETRY["mesh_colors"], PROLIFIC_GEOMETRY["background_aug_prob"]  # its background is black
MVDREAM_MESH = {
    "mode": "3d",
    "steps": 5000,
    "n_views": 4,
    "n_groups": (1,),
    "render_size": (512,),
    "guidance_scale": 50,
    "loss": "x0",
    "min_step": (0, 0.02, 0.02, 0),
    "max_step": (0, 0.5, 0.5, 0),
    "shape": "tets",
    "radius": 1,
    "tets_resolution": 128,
    "weight_decay": 0,
}
PUBLISHED = [
    ("dreamfusion-if", 0, DREAMFUSION_IF),
    ("textmesh-if", 0, TEXTMESH_IF),
    ("magic3d-if-sd", 0, MAGIC3D_COARSE),
    ("magic3d-if-sd", 1, MAGIC3D_REFINE),
    ("prolificdreamer", 0, PROLIFICDREAMER),
    ("prolificdreamer", 1, PROLIFIC_GEOMETRY),
    ("prolificdreamer", 2, PROLIFIC_TEXTURE),
    ("mvdream-mesh", 1, MVDREAM_MESH),
]
SMALL = ("mini", "fast")
SINGLE = ("dreamfusion-if", "textmesh-if", "magic3d-if-sd", "prolificdreamer")


@pytest.mark.parametrize(("recipe", "stage", "expected"), PUBLISHED)
def test_baselines_are_the_published_table(recipe, stage, expected):
    paper = settings_of(RECIPES[recipe].at("paper").stages[stage])
    assert {key: paper[key] for key in expected} == expected


def test_the_table_of_stages_is_whole():
    stages = {name: recipe.at("paper").stages for name, recipe in RECIPES.items()}
    assert {name: [stage.representation.shape for stage in found] for name, found in stages.items()} == {
        "mvdream": ["volume"],
        "mvdream-solid": ["tets"],
        "mvdream-sharp": ["volume"],
        "mvdream-mesh": ["volume", "tets"],
        "dreamfusion-if": ["volume"],
        "magic3d-if-sd": ["volume", "tets"],
        "textmesh-if": ["surface"],
        "prolificdreamer": ["volume", "tets", "textured-mesh"],
    }
    first, second = stages["mvdream-mesh"]
    assert replaced(first, recipe="mvdream") == RECIPES["mvdream"].at("paper")
    assert second.steps == first.steps // 2


def test_the_table_names_every_recipe_once():
    assert tuple(RECIPES) == typing.get_args(RecipeName)
    for name, recipe in RECIPES.items():
        for size, preset in SDS_PRESETS.items():
            config = recipe.at(size)
            assert (config.recipe, config.preset) == (name, preset.preset)
            check_config(config)


@pytest.mark.parametrize(("size", "views"), [("mini", 2400), ("fast", 1200)])
def test_recipes_ask_the_model_about_as_many_views(size, views):
    asked = {name: guided_views(recipe.at(size)) for name, recipe in RECIPES.items()}
    assert asked.pop("mvdream-solid") < views  # it begins with more than a ball
    assert asked == dict.fromkeys(asked, views)


@pytest.mark.parametrize(
    ("changes", "views"),
    [
        ({}, 5000 * 8 + 5000 * 4),
        ({"updates_per_guidance": 4}, 1250 * 8 + 1250 * 4),
        ({"steps": 7, "milestones": (3,), "updates_per_guidance": 2}, 2 * 8 + 2 * 4),  # asked at 0 and 2, at 4 and 6
        ({"n_views": 1, "steps": 6000}, 5000 * 2 + 1000),
        # Of ten steps five redraw; two groups at once, one at the fifth: 20 x 0.9, 0.8 and 0.5 sampler's steps.
        (
            {
                "steps": 10,
                "milestones": (5,),
                "repaint_from": 0.5,
                "repaint_groups": 2,
                "repaint_every": 4,
                "repaint_strength": (0.9, 0.4),
                "repaint_steps": 20,
            },
            5 * 8 + (18 + 16 + 10) * 4,
        ),
    ],
)
def test_guided_views_count_the_steps_that_ask(changes, views):
    config = replaced(SDS_PRESETS["paper"], **changes)
    assert guided_views(config) == views
    if config.repaint.repaints:
        return
    asked = [step for step in range(config.steps) if config.asked(step) == step]
    assert views == sum(config.n_groups[config.phase(step)] * config.cameras.n_views for step in asked)


@pytest.mark.parametrize("size", SMALL)
@pytest.mark.parametrize("name", SINGLE)
def test_small_sizes_keep_the_papers_guidance_and_mvdreams_budget(name, size):
    whole, like = RECIPES[name].at(size), SDS_PRESETS[size]
    assert whole.ends[-1] == like.steps
    plain = {"min_step": (0, 0, 0, 0), "max_step": (0, 0, 0, 0)}
    for number, (small, paper) in enumerate(zip(whole.stages, RECIPES[name].at("paper").stages, strict=True)):
        assert replaced(small, **plain).guidance == replaced(paper, **plain).guidance
        for key in ("fovy_range_deg", "elevation_range_deg", "distance_range", "relative_distance", "perturb"):
            assert getattr(small.cameras, key) == getattr(like.cameras, key)
        n_groups = tuple(4 * n for n in like.n_groups)
        assert (small.cameras.n_views, small.n_groups) == (1, n_groups[-1:] if number else n_groups)
        assert small.render_size == (({"mini": 128, "fast": 64}[size],) if number else like.render_size)
        has, wanted = settings_of(small), settings_of(like)
        for key in has.keys() & {"volume", "radius", "background", "background_aug_prob", "samples_per_ray"}:
            assert has[key] == wanted[key]
        for key in ("lr_encoding", "lr_mlp", "lr_background"):
            assert has[key] == getattr(paper.representation, key)
        assert has.get("tets_resolution", 64) == 64


def test_schedules_and_losses_at_a_small_size():
    """600 of 10,000 steps, 400 of 25,000; 24 x 8 x 8 numbers in the embedded latents, 4 x 64 x 64 in the paper's."""
    single, vsd = (settings_of(RECIPES[name].at("mini")) for name in ("dreamfusion-if", "prolificdreamer"))
    assert single["shading_from"] == 120
    assert single["lambda_orient"] == pytest.approx((0, 10, 1000, 300))
    assert single["lambda_sparsity"] == (0, 1, 1, 0)  # of pixels there are as many as in the paper
    assert vsd["max_step"] == pytest.approx((80, 0.98, 0.5, 80.016))
    assert vsd["lambda_sparsity"] == pytest.approx((0, 0.9375, 0.9375, 0))
    assert vsd["lambda_opaque"] == pytest.approx((160, 0, 93.75, 160.016))
    _, geometry, texture = RECIPES["prolificdreamer"].at("mini").stages
    assert [vsd["steps"], geometry.steps, texture.steps] == [400, 100, 100]
    for mesh in (geometry, RECIPES["magic3d-if-sd"].at("mini").stages[1]):
        assert settings_of(mesh)["lambda_normal_consistency"] == (0, 1e4, 1e4, 0)
    assert settings_of(geometry)["lambda_laplacian"] == (0, 1e4, 1e4, 0)
    refined = RECIPES["mvdream-mesh"].at("mini").stages[1]
    assert settings_of(refined)["lambda_normal_consistency"] == (0, 937.5, 937.5, 0)
    surface = settings_of(RECIPES["textmesh-if"].at("mini"))
    assert surface["sdf_levels"] == pytest.approx((120, 8, 16, 360))
    assert surface["cos_anneal"] == pytest.approx((0, 0, 1, 600))
    assert surface["lambda_eikonal"] == (0, 1000, 1000, 0)
    assert surface["lr_deviation"] == 0.001
    assert surface["deviation_least"] == pytest.approx((0, 0.3, 0.46, 480))
    fewer = settings_of(restepped(RECIPES["textmesh-if"].at("mini"), 60))
    assert fewer["deviation_least"] == pytest.approx((0, 0.3, 0.46, 48))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_an_asset(name):
    """Ten steps pass through all of its schedules, light and losses."""
    model = random_model(config=TINY_PIXELS if RECIPES[name].prior.pixels else TINY_MODEL)
    refine = MVDreamPipeline(random_model(config=TINY_MODEL), "cpu", "float32")
    make = TextTo3D(MVDreamPipeline(model, "cpu", "float32"), refine=lambda: refine)
    shapes = [stage.representation.shape for stage in RECIPES[name].at("mini").stages]
    cheaper = {"tets_resolution": 32} if "tets" in shapes else {}
    cheaper |= {"samples_per_ray": 24} if shapes[0] != "tets" else {}
    asset = make("a green chair", "mini", recipe=name, steps=10, render_size=(8,), **cheaper)
    assert asset.settings["recipe"] == name
    assert asset.settings["shape"] == RECIPES[name].at("mini").stages[-1].representation.shape
    assert [record["step"] for record in asset.records] == list(range(10))
    assert all(record["loss"] > 0 for record in asset.records)
    assert not any(record["event"] for record in asset.records)


def test_any_recipe_can_end_with_repainting():
    """From three quarters on; the loss on opacities grows there, unless the recipe has its own."""
    for recipe in RECIPES.values():
        *before, plain = recipe.at("mini").stages
        *same_before, config = repaint(recipe.at("mini"), 0.25).stages
        assert same_before == before
        same = {"repaint_from": plain.repaint.repaint_from}
        if "lambda_opaque" in settings_of(plain):
            opaque = plain.representation.lambda_opaque
            same["lambda_opaque"] = opaque
            if not any(opaque):
                opaque = (0.75 * plain.steps, 0, 300, 0.875 * plain.steps)
            assert config.representation.lambda_opaque == opaque
        assert config.repaint.repaint_from == 0.75
        assert replaced(config, **same) == plain
    sharp, plain = (RECIPES[name].at("mini") for name in ("mvdream-sharp", "mvdream"))
    assert (sharp.repaint.repaint_from, plain.repaint.repaint_from) == (0.7, 1)
    assert sharp.representation.lambda_opaque == pytest.approx((0.7 * sharp.steps, 0, 300, 0.85 * sharp.steps))
    as_long = settings_of(resolve_config(plain, steps=sharp.steps))
    changed = {name for name, value in settings_of(sharp).items() if value != as_long[name]}
    assert changed == {"recipe", "repaint_from", "lambda_opaque"}


def test_a_recipe_is_named_beside_a_preset():
    assert resolve_config("fast", recipe="prolificdreamer") == RECIPES["prolificdreamer"].at("fast")
    with pytest.raises(ArgumentError, match="recipe must be one of mvdream, .*, got 'magic'"):
        resolve_config("fast", recipe="magic")
    with pytest.raises(ArgumentError, match="recipe must be 'mvdream', as the configuration's, got 'prolificdreamer'"):
        resolve_config(SDS_PRESETS["fast"], recipe="prolificdreamer")


@pytest.mark.parametrize(
    ("recipe", "mode", "model", "kind"),
    [
        ("mvdream", "3d", PIXELS, "single images, as pixels"),
        ("mvdream-sharp", "3d", replace(MINI, unet=replace(PIXELS.unet, in_channels=24)), "single images, as latents"),
        ("dreamfusion-if", "2d", MINI, "several views, as latents"),
        ("prolificdreamer", "2d", PIXELS, "single images, as pixels"),
        ("prolificdreamer", "3d", PIXELS, "single images, as pixels"),
        ("mvdream", "3d", MINI, None),
        ("mvdream", "2d", PIXELS, None),
        ("dreamfusion-if", "2d", PIXELS, None),
        ("prolificdreamer", "3d", MINI, None),
    ],
)
def test_a_recipe_refuses_models_of_another_kind(recipe, mode, model, kind):
    if kind is None:
        RECIPES[recipe].prior.check(recipe, mode, "it", model)
        return
    wanted = f"the recipe {recipe} needs {RECIPES[recipe].prior.needs}, but the model it is one of {kind}; leave out"
    with pytest.raises(ModelError, match=wanted):
        RECIPES[recipe].prior.check(recipe, mode, "it", model)


def test_redrawn_views_are_counted_as_they_are_drawn():
    """The guidance itself, with a painter that counts the sampler's steps."""
    config = replaced(RECIPES["mvdream-sharp"].at("fast"), min_step=(0, 0.5, 0.5, 0))
    schedule, asked = NoiseSchedule.from_config(ScheduleConfig()), []

    def denoise(x, _):
        asked.append(1)
        return torch.zeros_like(x)

    def paint(rgb, cameras, strength, stream):
        translate(denoise, rgb, rgb, schedule, config.repaint.repaint_steps, config.repaint.repaint_scale, strength)
        return rgb, 0

    guidance = Repaint(None, paint, config.cameras, config.repaint, config.repaint_step, config.steps)
    for step in range(config.repaint_step, config.steps):
        views = guidance.views(step, Stream(0, step, "cameras"))
        guidance.score(torch.zeros(4, 3, 8, 8), views, step, Stream(0, step, "guidance"))
        guidance.after_step(step, Stream(0, step, "after"))
    assert guided_views(config) == 4 * (config.repaint_step + len(asked))
