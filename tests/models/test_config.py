"""Configurations: the numbers of the released models and of the paper's recipe, and strict reading of files."""

import dataclasses
import json

import pytest

from mvdream_fast.core.errors import ArgumentError, ModelError
from mvdream_fast.models import config


@pytest.mark.parametrize("name", sorted(config.NAMED))
def test_round_trip(name):
    model = config.NAMED[name]
    assert config.ModelConfig.from_json(model.to_json()) == model


def edited(**changes):
    data = json.loads(config.SD21.to_json())
    for path, value in changes.items():
        *parents, key = path.split("__")
        target = data
        for parent in parents:
            target = target[parent]
        target[key] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", 'must be an object with "kind": "model"'),
        (edited(kind="run"), 'must be an object with "kind": "model"'),
        (edited(format=99), 'must have "format": 1'),
        (edited(colour="red"), "unknown key.* colour in ModelConfig"),
        (edited(unet__depth=3), "unknown key.* depth in UNetConfig"),
        (edited(unet__model_channels="320"), "model_channels must be int, got '320'"),
        (edited(unet__model_channels=True), "model_channels must be int"),
        (edited(unet__channel_mult=[1, 2.5]), "channel_mult must be"),
        (edited(schedule__prediction="x"), "prediction must be"),
        (edited(unet=3), "UNetConfig must be an object"),
    ],
)
def test_a_wrong_file_names_the_key(text, message):
    with pytest.raises(ModelError, match=message):
        config.ModelConfig.from_json(text)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ModelError, match="cannot read"):
        config.ModelConfig.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="cannot read"):
        config.ModelConfig.load(tmp_path / "config.json")


def test_settings_replace_single_values():
    changed = config.with_settings(
        config.MINI, ["unet.view_mixing=2d", "unet.channel_mult=[1, 2]", "vae.image_size=32"]
    )
    assert changed.unet == dataclasses.replace(config.MINI.unet, view_mixing="2d", channel_mult=(1, 2))
    assert changed.vae.image_size == 32
    assert config.with_settings(config.MINI, []) == config.MINI


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("unet.view_mixing", "--set must be NAME=VALUE, got 'unet.view_mixing'; the names are unet.in_channels, "),
        ("unet.mixing=2d", "got 'unet.mixing=2d'; the names are .*unet.view_mixing"),
        ("name=x", "got 'name=x'"),
        ("optimizer.lr=1", "got 'optimizer.lr=1'"),
        ("unet.view_mixing=4d", "--set: unet: view_mixing must be one of 3d, 2d, temporal, got '4d'"),
        ("unet.model_channels=wide", "model_channels must be int, got 'wide'"),
    ],
)
def test_settings_that_are_none(setting, message):
    with pytest.raises(ArgumentError, match=message):
        config.with_settings(config.MINI, [setting])


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
    paper = dataclasses.asdict(config.SDS_PRESETS["paper"])
    assert {key: paper[key] for key in expected} == expected
    assert paper["negative_prompt"].startswith("ugly, bad anatomy, blurry, pixelated obscure")
    assert paper["negative_prompt"].endswith("deformed, dehydrated, bad proportions")


def test_shading_variant_adds_light_and_orientation_only():
    paper, lit = config.SDS_PRESETS["paper"], config.shaded(config.SDS_PRESETS["paper"])
    changed = {f.name for f in dataclasses.fields(paper) if getattr(paper, f.name) != getattr(lit, f.name)}
    assert changed == {"shading", "lambda_orient"}
    assert lit.lambda_orient == (0, 10, 1000, 5000)


def test_stages_switch_at_the_milestone():
    paper = config.SDS_PRESETS["paper"]
    assert [paper.stage(step) for step in (0, 4999, 5000, 9999)] == [0, 0, 1, 1]
