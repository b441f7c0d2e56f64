"""The recipes: the paper's numbers, what stretching and shading change, and how learning rates fall."""

import pytest
from reference.studio import TINY, Painter

from mvdream_fast.distill.recipes import SDS_PRESETS, replaced, settings_of, shaded
from mvdream_fast.distill.state import RunState


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


def test_stages_switch_at_the_milestone():
    paper = SDS_PRESETS["paper"]
    assert [paper.stage(step) for step in (0, 4999, 5000, 9999)] == [0, 0, 1, 1]


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
