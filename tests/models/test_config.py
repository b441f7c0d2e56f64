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


def test_a_file_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "config.json"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes(config.SD21.to_json().encode(encoding))
        assert config.ModelConfig.load(path) == config.SD21
    path.write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(ModelError, match=r"config\.json: line 1 is not UTF-8"):
        config.ModelConfig.load(path)


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
        (edited(color="red"), "unknown key.* color in ModelConfig"),
        (edited(unet__depth=3), "unknown key.* depth in UNetConfig"),
        (edited(unet__model_channels="320"), r"^config.json: unet.model_channels must be an integer, got '320'$"),
        (edited(unet__model_channels=True), "unet.model_channels must be an integer, got True"),
        (edited(unet__channel_mult=[1, 2.5]), r"unet.channel_mult\[1\] must be an integer, got 2.5"),
        (edited(schedule__prediction="x"), "schedule.prediction must be 'eps' or 'v', got 'x'"),
        (edited(unet=3), "unet must be an object, got 3"),
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
        ("text.kind=t5", "must leave unet.kind and text.kind as they are: DeepFloyd IF is not trained here"),
        ("optimizer.lr=1", "got 'optimizer.lr=1'"),
        ("unet.view_mixing=4d", "--set: unet.view_mixing must be '3d', '2d' or 'temporal', got '4d'"),
        ("unet.model_channels=wide", "--set: unet.model_channels must be an integer, got 'wide'"),
    ],
)
def test_settings_that_are_none(setting, message):
    with pytest.raises(ArgumentError, match=message):
        config.with_settings(config.MINI, [setting])


def test_a_schedule_of_its_own_goes_through_a_file():
    schedule = config.ScheduleConfig(3, prediction="v", trained_betas=(0.1, 0.2, 1.0), timestep_spacing="trailing")
    model = dataclasses.replace(config.SD21, schedule=schedule)
    assert config.ModelConfig.from_json(model.to_json()) == model
    assert schedule.betas() == [0.1, 0.2, 1.0]


def test_modes_and_room():
    assert [config.NAMED[name].modes for name in ("sd21-4view", "mini", "pixels")] == [("3d", "2d")] * 2 + [("2d",)]
    assert (config.SD21.text.room, config.TextConfig(kind="t5").room) == (75, 76)
    assert [c.foreign for c in config.NAMED.values()] == [""] * len(config.NAMED)


def test_betas_worked_by_hand():
    squares = config.ScheduleConfig(3, 0.01, 0.25).betas()  # roots 0.1, 0.3, 0.5
    assert squares == pytest.approx([0.01, 0.09, 0.25])
    assert config.ScheduleConfig(3, 0.1, 0.2, beta_schedule="linear").betas() == pytest.approx([0.1, 0.15, 0.2])
    # cos((t + 0.008) / 1.008 * pi / 2)^2 is 0.9998446, 0.4937668 and 0 at 0, 1/2 and 1; a beta is at most 0.999.
    cosine = config.ScheduleConfig(2, beta_schedule="squaredcos_cap_v2").betas()
    assert cosine == pytest.approx([1 - 0.4937668 / 0.9998446, 0.999], abs=1e-6)
    assert config.ScheduleConfig(1).betas() == pytest.approx([0.00085])
