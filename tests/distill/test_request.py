"""Flags over a file over a preset: who wins, what is refused, and that a run's config.json can be passed back."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mvdream_fast.core.errors import ArgumentError, InputFileError, UserError
from mvdream_fast.distill import request
from mvdream_fast.distill.recipes import SDS_PRESETS, ExportConfig, SDSConfig, replaced, resolve_config, shaded

CHAIR = {"prompt": "a green chair"}


def written(tmp_path, content, name="run.toml"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = written(
        tmp_path,
        'prompt = "a red car"\nseed = 5\npreset = "mini"\n'
        "[sds]\nguidance_scale = 9.0\nrescale = 0.2\n[export]\nfaces = 900\ntexture = 64\n",
    )
    file = request.read_settings(path)
    wanted = request.resolve({"guidance_scale": 3.0, "texture": 128}, file)
    assert (wanted.prompt, wanted.seed, wanted.model) == ("a red car", 5, "embedded")
    assert (wanted.config.guidance.guidance_scale, wanted.config.guidance.rescale) == (3.0, 0.2)
    assert wanted.config.steps == SDS_PRESETS["mini"].steps
    assert (wanted.export.faces, wanted.export.texture, wanted.export.mesh_resolution) == (900, 128, 128)
    assert request.resolve({"prompt": "a cup", "seed": "7"}, file).prompt == "a cup"
    assert request.resolve({"prompt": "a cup", "seed": "7"}, file).seed == 7


@pytest.mark.parametrize("preset", sorted(SDS_PRESETS))
@pytest.mark.parametrize("extra", [{}, {"steps": 77, "lr": 0.003, "render_size": 24, "shading": True, "faces": 99}])
def test_what_a_run_leaves_can_be_passed_back(tmp_path, preset, extra):
    first = request.resolve({**CHAIR, "seed": "3", "preset": preset, **extra})
    path = written(tmp_path, {**first.to_dict(), "version": "0", "machine": {"cores": 2}}, "config.json")
    again = request.resolve({}, request.read_settings(path))
    assert dataclasses.replace(again, why="") == dataclasses.replace(first, why="")
    assert dataclasses.replace(request.read_run(tmp_path), why="") == dataclasses.replace(first, why="")


def test_presets_explain_themselves(tmp_path):
    assert request.resolve(CHAIR).config.preset == "mini"
    assert "no --model given" in request.resolve(CHAIR).why
    assert request.resolve({**CHAIR, "model": "embedded"}).why == "the model is the embedded one"
    assert request.resolve({**CHAIR, "model": "some.pt"}).config.preset == "paper"
    assert request.resolve({**CHAIR, "preset": "fast"}).why == "as asked"
    (tmp_path / "config.json").write_text(json.dumps({"kind": "model", "vae": {"image_size": 64}}))
    small = request.resolve({**CHAIR, "model": str(tmp_path)})
    assert (small.config.preset, small.why) == ("mini", f"the model {tmp_path} draws 64 pixels a side")
    with pytest.raises(ArgumentError, match="--preset paper contradicts the file of --config, which is for mini"):
        request.resolve({**CHAIR, "preset": "paper"}, {"preset": "mini"})


def test_shading_begins_in_the_middle_of_any_run():
    assert shaded(SDSConfig()).representation.lambda_orient == (0, 10.0, 1000.0, 5000.0)
    assert request.resolve({**CHAIR, "preset": "paper", "shading": True, "steps": 1000}).config.shading_from == 500
    assert resolve_config(shaded(SDSConfig()), steps=1000).representation.lambda_orient == (0, 10.0, 1000.0, 500.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "steps = ", "is not TOML"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", "[1]", "must hold an object"),
        ("a.json", {"kind": "model"}, "it describes a 'model'"),
        ("a.json", {"promt": "x"}, r"unknown key\(s\) promt"),
        ("a.json", {"sds": {"stepz": 3}}, r"unknown key\(s\) stepz"),
        ("a.json", {"sds": {"steps": "3"}}, "steps must be int, got '3'"),
        ("a.json", {"sds": {"steps": True}}, "steps must be int"),
        ("a.json", {"sds": {"min_step": [0, 1, 1]}}, "min_step must be"),
        ("a.json", {"sds": 3}, "must be an object"),
        ("a.json", {"export": {"up": "x"}}, "up must be"),
        ("a.json", {"seed": 1.5}, "seed must be a number"),
        ("a.json", {"prompt": ["x"]}, "prompt must be str"),
        ("a.json", {"preset": "huge"}, "preset must be one of auto"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(tmp_path, name, content, message):
    with pytest.raises(InputFileError, match=message):
        request.read_settings(written(tmp_path, content, name))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputFileError, match="No such file"):
        request.read_settings(tmp_path / "nowhere.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputFileError, match="cannot read"):
        request.read_settings(tmp_path / "b.toml")
    written(tmp_path, {"kind": "sds", "prompt": "x", "sds": {"steps": 3}}, "config.json")
    with pytest.raises(InputFileError, match="incomplete"):
        request.read_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": 2.0}, "weight_decay must be"),
        ({"milestones": (3,)}, "one entry more than milestones"),
        ({"mode": "2d", "method": "reconstruct"}, "--mode must be 3d with --method reconstruct"),
        ({"milestones": (9, 3), "render_size": (8, 8, 8), "n_groups": (1, 1, 1)}, "milestones must grow"),
        ({"lambda_sparsity": (0.0, -1.0, 1.0, 9.0)}, "loss weights must be"),
        ({"max_step": (0.0, 2.0, 0.5, 9.0)}, "must be fractions"),
        ({"min_step": (math.nan, 0.9, 0.5, 9.0)}, "finite number"),
        ({"updates_per_guidance": 0}, "updates_per_guidance must be"),
        ({"negative_prompt": "a\x07"}, "control character"),
    ],
)
def test_settings_that_no_run_can_use(changes, message):
    with pytest.raises(ArgumentError, match=message):
        request.check_config(replaced(SDS_PRESETS["mini"], **changes))


@pytest.mark.parametrize(
    ("export", "message"),
    [({"mesh_resolution": 4}, "mesh-resolution"), ({"faces": 3}, "faces"), ({"texture": 9}, "texture must be 16")],
)
def test_meshes_that_cannot_be_made(export, message):
    with pytest.raises(ArgumentError, match=message):
        request.check_export(ExportConfig(**export))


def test_a_file_of_prompts(tmp_path):
    path = written(tmp_path, '"a cup"\n\n{"prompt": "a red car", "seed": 4, "steps": 30, "negative_prompt": "blue"}\n')
    first, second = request.read_prompts(path, {"seed": "9", "guidance_scale": 3.0}, None)
    assert (first.prompt, first.seed, first.config.steps) == ("a cup", 9, 600)
    assert (second.prompt, second.seed, second.config.steps) == ("a red car", 4, 30)
    assert second.config.negative_prompt == "blue"
    assert second.config.guidance.max_step[3] == 24  # the schedules stretch
    assert {first.config.guidance.guidance_scale, second.config.guidance.guidance_scale} == {3.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("3", "line 2: it must be a string or an object"),
        ('{"seed": 3}', "line 2: it must be a string or an object"),
        ('{"prompt": "x", "model": "y"}', "line 2: it must be a string or an object"),
        ('{"prompt": " "}', "line 2: the prompt is empty"),
        ('{"prompt": "x", "seed": -1}', "line 2: --seed must be a number"),
        ('{"prompt": "x", "seed": null}', "line 2: seed must be a number"),
        ('{"prompt": "x", "steps": 0}', "line 2: --steps must be at least 1"),
        ('{"prompt": "x", "steps": "9"}', "line 2: .*steps must be int"),
    ],
)
def test_one_bad_line_is_named(tmp_path, line, message):
    path = written(tmp_path, f'"a cup"\n{line}\n"a red car"\n')
    with pytest.raises(ArgumentError, match=message + ".*nothing was run"):
        request.read_prompts(path, {}, None)


def test_a_file_without_prompts(tmp_path):
    with pytest.raises(InputFileError, match="holds no prompt"):
        request.read_prompts(written(tmp_path, "\n\n"), {}, None)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(["mini", "paper"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = [f.name for f in dataclasses.fields(SDSConfig)]
FILES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(sorted(request.TOP_KEYS - {"sds"}), VALUES),
        "sds": st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), VALUES, max_size=3),
    },
)


def fuzz(path, content):
    """Any file is either refused with one of our errors or becomes a run that can be used."""
    path.write_text(json.dumps(content))
    try:
        wanted = request.resolve(CHAIR, request.read_settings(path))
    except UserError:
        return
    request.check_config(wanted.config)
    assert json.loads(json.dumps(wanted.to_dict(), allow_nan=False))


@given(FILES)
@hypothesis_settings(max_examples=60, deadline=None)
def test_any_file_is_used_or_refused(tmp_path_factory, content):
    fuzz(tmp_path_factory.getbasetemp() / "fuzz.json", content)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(FILES)
@hypothesis_settings(max_examples=100_000, deadline=None)
def test_a_hundred_thousand_files_are_used_or_refused(tmp_path_factory, content):
    fuzz(tmp_path_factory.getbasetemp() / "fuzz.json", content)
