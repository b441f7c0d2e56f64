"""Weights and configurations that are wrong: what is said of names, shapes, types and numbers, and with which code."""

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference.tiny_model import TINY, VOCABULARY
from safetensors.torch import load_file, save_file

from mvdream_fast.checkpoints.manifest import check_config
from mvdream_fast.checkpoints.open import load_model, open_source
from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import MINI, ModelConfig


def read(path: Path, part: str = "unet") -> dict:
    """One part through all checks."""
    source = open_source(path)
    source.check(part)
    return source.tensors(part)


def spoiled(path: Path, tmp_path: Path, **changes) -> Path:
    """A copy of a .pt with tensors replaced, or removed where None."""
    tensors = torch.load(path, weights_only=True)
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    torch.save(tensors, tmp_path / "spoiled.pt")
    return tmp_path / "spoiled.pt"


CONV = "model.diffusion_model.input_blocks.1.0.out_layers.3.weight"


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({CONV: None}, [f"1 missing ({CONV})"]),
        ({CONV + "x": torch.zeros(3)}, [f"1 unexpected ({CONV}x)"]),
        ({CONV: torch.zeros(64, 64, 3, 2)}, [f"1 misshapen ({CONV} is [64, 64, 3, 2] and must be [64, 64, 3, 3])"]),
        ({CONV: torch.zeros(64, 64, 3, 3, dtype=torch.int64)}, [f"1 of a wrong type ({CONV} is int64)"]),
        ({CONV: torch.zeros(64, 64, 3, 3, dtype=torch.float64)}, ["wrong type"]),
        ({CONV: torch.full((64, 64, 3, 3), math.nan)}, [f"{CONV} holds NaN or infinity"]),
        ({CONV: torch.full((64, 64, 3, 3), -math.inf)}, [f"{CONV} holds NaN or infinity"]),
        ({CONV: torch.zeros(1).expand(64, 64, 3, 3)}, ["plain, contiguous tensor"]),
        ({CONV: torch.zeros(64, 64, 3, 3).to_sparse()}, ["plain, contiguous tensor"]),
        ({CONV: [1.0, 2.0]}, [f"but {CONV} is a list"]),
        ({"../../etc/x": torch.zeros(3)}, ["1 unexpected (../../etc/x)"]),
        ({"\x1b[31m\n": torch.zeros(3)}, ["1 unexpected (?[31m?)"]),
        ({"x" * 5000: torch.zeros(3)}, ["unexpected"]),
        ({"betas": torch.full((1000,), math.nan)}, ["betas must be the noise schedule, one finite number for each"]),
        ({"betas": torch.zeros(1000)}, ["betas is no noise schedule: betas must be over 0 and at most 1"]),
        ({"betas": torch.rand(1000).half()}, ["betas is no evenly spaced schedule, and torch.float16 is too coarse"]),
        ({"model.diffusion_model.out.2.weight": None}, ["not a multi-view model", "out.2.weight is missing"]),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64)}, ["has the shape [64]"]),
        ({"model.diffusion_model.input_blocks.999.0.x": torch.zeros(1)}, ["is missing"]),
        ({"model.diffusion_model.camera_embed.0.weight": None, "model.diffusion_model.camera_embed.0.bias": None,
          "model.diffusion_model.camera_embed.2.weight": None, "model.diffusion_model.camera_embed.2.bias": None},
         ["is a model of single images, without camera layers; name a multi-view model"]),
        ({f"extra{k}": torch.zeros(1) for k in range(4)}, ["4 unexpected (extra0, extra1, extra2, ...)", "Download"]),
    ],
)  # fmt: skip
def test_spoiled_unet_of_a_released_file(flat21, tmp_path, changes, sentences):
    path = spoiled(flat21, tmp_path, **changes)
    with pytest.raises(ModelError) as info:
        read(path)
    assert info.value.exit_code == 3
    message = str(info.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 1000
    for sentence in sentences:
        assert sentence in message


def test_half_of_the_camera_layers_are_not_made_up(flat21, tmp_path):
    path = spoiled(flat21, tmp_path, **{"model.diffusion_model.camera_embed.2.bias": None})
    with pytest.raises(ModelError, match=r"1 missing \(.*camera_embed.2.bias\)"):
        load_model(path, add_cameras=True)


@pytest.mark.parametrize("part", ["vae", "text"])
def test_spoiled_other_parts_of_a_released_file(flat21, tmp_path, part):
    name = {"vae": "first_stage_model.quant_conv.bias", "text": "cond_stage_model.model.ln_final.bias"}[part]
    with pytest.raises(ModelError, match=f"1 missing \\({name}\\)"):
        read(spoiled(flat21, tmp_path, **{name: None}), part)


def test_spoiled_own_folder(tiny):
    config, unet = tiny / "config.json", tiny / "unet.safetensors"
    text, tensors = config.read_text(), load_file(unet)

    def fails(sentence: str) -> None:
        with pytest.raises(ModelError, match=sentence):
            load_model(tiny)
        config.write_text(text)
        save_file(tensors, unet)

    for content, sentence in (
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"kind": "model", "format": ' + "9" * 5000 + "}", "is not JSON"),
        ("{}", "does not describe a model"),
        (text.replace('"format": 1', '"format": 2'), "convert the model again"),
        (text.replace('"width"', '"wdth"'), "unknown key"),
        (text.replace('"n_layers": 1', '"n_layers": 2'), "missing"),
        (text.replace('"model_channels": 32', '"model_channels": 64'), "misshapen"),
        (text.replace('"model_channels": 32', '"model_channels": 33'), "must be a divisor of 33 channels"),
        (text.replace('"model_channels": 32', '"model_channels": 99999999999'), "must be from 1 to"),
        (text.replace('"n_layers": 1', '"n_layers": 1000000'), "n_layers must be at most 256"),
        (text.replace('"n_layers": 1', '"n_layers": -1'), "n_layers must be from 1"),
        (text.replace('"skip_last": 0', '"skip_last": 1'), "skip_last"),
        (text.replace('"channel_mult": [', '"channel_mult": [1,1,1,1,1,1,1,1,'), "channel_mult must be 1 to 8 levels"),
        (text.replace('"num_heads": null', '"num_heads": 2'), "num_heads"),
        (text.replace('"scale_factor": 0.18215', '"scale_factor": NaN'), "scale_factor"),
        (text.replace(f'"vocabulary_size": {len(VOCABULARY)}', '"vocabulary_size": 50'), "misshapen"),
    ):
        assert content != text
        config.write_text(content)
        fails(sentence)
    save_file({**tensors, "out.0.bias": torch.full((32,), math.nan)}, unet)
    fails("out.0.bias holds NaN")
    save_file({**tensors, "extra": torch.zeros(1)}, unet)
    fails(r"1 unexpected \(extra\)")
    unet.unlink()
    fails("cannot read .*unet.safetensors: No such file")
    (tiny / "vocabulary.txt").unlink()
    fails("a subset vocabulary must begin with")


def test_no_config_of_json_values_crashes_the_check():
    rng = random.Random(0)
    values = [0, -1, 1, 7, 64, 10**9, 1.5, -0.0, None, True, "x", [], [1], [0, 2], [1] * 50, {}, {"a": 1}]
    base = json.loads(TINY.to_json())
    outcomes = set()
    for _ in range(2000):
        data = json.loads(json.dumps(base))
        section = data[rng.choice(["unet", "vae", "text", "schedule"])]
        section[rng.choice(list(section))] = rng.choice(values)
        try:
            check_config(ModelConfig.from_json(json.dumps(data)))
            outcomes.add("taken")
        except ModelError:
            outcomes.add("refused")
    assert outcomes == {"taken", "refused"}


@pytest.mark.parametrize(("width", "told"), [(0, "decoder_cleaner must be from 1"), (36, "must be a divisor of 36 ch")])
def test_widths_of_a_cleaner_that_cannot_be(width, told):
    check_config(replace(MINI, vae=replace(MINI.vae, decoder_cleaner=128)))
    with pytest.raises(ModelError, match=told):
        check_config(replace(MINI, vae=replace(MINI.vae, decoder_cleaner=width)))


def test_mixed_dtypes_are_widened(tiny):
    path = tiny / "vae.safetensors"
    tensors = load_file(path)
    first, second = list(tensors)[:2]
    save_file(tensors | {first: tensors[first].half(), second: tensors[second].bfloat16()}, path)
    assert {x.dtype for x in read(tiny, "vae").values()} == {torch.float32}


def test_published_json_of_another_model(published21, tmp_path):
    path = shutil.copytree(published21[0], tmp_path / "json")
    for file, content, sentence in (
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule must be one of scaled_linear"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "num_train_timesteps must be a whole num"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act must be one of gelu, quick_gelu, got 'relu'"),
        ("text_encoder/config.json", {"num_attention_heads": 7}, "n_heads must be a divisor of the width 64"),
        ("unet/config.json", {"num_head_channels": 48}, "must be a divisor of 64 channels"),
        ("vae/config.json", {"norm_num_groups": 5}, "norm_num_groups must be a divisor"),
        ("vae/config.json", [], "must hold a JSON object"),
    ):
        before = (path / file).read_text()
        (path / file).write_text(json.dumps(content))
        with pytest.raises(ModelError, match=sentence):
            read(path)
        (path / file).write_text(before)
    (path / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    assert open_source(path).config.schedule.prediction == "v"
