"""Flags over a file over a preset: who wins, what is refused, and that a run's config.json can be passed back."""

import dataclasses
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reference.random_model import TINY, random_model

from mvdream_fast.checkpoints.open import save_model
from mvdream_fast.core.errors import ArgumentError, InputFileError, ModelError, UserError
from mvdream_fast.distill import child_run, request, settings_file
from mvdream_fast.distill import config as distill_config
from mvdream_fast.distill.config import NEWER, ExportConfig, SDSConfig, replaced
from mvdream_fast.distill.recipes import RECIPES, resolve_config, sampled_as, shaded
from mvdream_fast.distill.systems import SDS_PRESETS
from mvdream_fast.models.config import MINI, SamplingGuidance
from mvdream_fast.scene.surface.config import SurfaceConfig

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
    file = settings_file.read_settings(path)
    wanted = request.resolve({"guidance_scale": 3.0, "texture": 128}, file)
    assert (wanted.prompt, wanted.seed, wanted.model) == ("a red car", 5, "embedded")
    assert (wanted.config.guidance.guidance_scale, wanted.config.guidance.rescale) == (3.0, 0.2)
    assert wanted.config.steps == SDS_PRESETS["mini"].steps
    assert (wanted.export.faces, wanted.export.texture, wanted.export.mesh_resolution) == (900, 128, 128)
    assert request.resolve({"prompt": "a cup", "seed": "7"}, file).prompt == "a cup"
    assert request.resolve({"prompt": "a cup", "seed": "7"}, file).seed == 7


def test_a_volume_has_a_usual_number_of_triangles_and_a_mesh_its_own(tmp_path):
    volume = {**CHAIR, "recipe": "mvdream"}
    assert request.resolve(volume).export.faces == 30_000
    assert request.resolve({**volume, "faces": 0}).export.faces == 0
    assert request.resolve(volume, {"export": {"faces": 900}}).export.faces == 900
    meshes = {**CHAIR, "recipe": "mvdream-mesh"}  # a volume first, tetrahedra at the end
    assert request.resolve(meshes).export.faces == 0
    assert request.resolve({**meshes, "faces": 30_000}).export.faces == 30_000


def test_views_are_sampled_as_the_model_says_unless_something_else_is_given(tmp_path):
    guidance = SamplingGuidance(scale=4.0, uncond_mode="3d")
    save_model(random_model(config=replace(TINY, guidance=guidance)), tmp_path / "model")
    asked = {**CHAIR, "model": str(tmp_path / "model"), "recipe": "mvdream-solid"}

    def sampled(flags, file=None):
        how = request.resolve(flags, file).config.sampled
        return how.sampled_scale, how.sampled_uncond

    assert (
        sampled({**CHAIR, "recipe": "mvdream-solid"}) == (MINI.guidance.scale, MINI.guidance.uncond_mode) == (3.5, "2d")
    )
    assert sampled(asked) == (4.0, "3d")
    assert sampled({**asked, "sampled_scale": 5.0}) == (5.0, "3d")
    assert sampled(asked, {"sds": {"recipe": "mvdream-solid", "sampled_uncond": "2d"}}) == (4.0, "2d")
    before = request.resolve({**CHAIR, "recipe": "mvdream-solid"}).to_dict()  # a run goes on as it was begun
    assert sampled({}, before | {"model": asked["model"]}) == (3.5, "2d")
    config = sampled_as(resolve_config("mini", recipe="mvdream-solid"), guidance)
    assert (config.sampled.sampled_scale, config.sampled.sampled_uncond) == (4.0, "3d")
    plain = resolve_config("mini", recipe="mvdream")  # which samples none
    assert sampled_as(plain, guidance) == plain


def test_null_in_an_older_record_is_no_limit(tmp_path):
    wanted = request.resolve({**CHAIR, "seed": "3"}).to_dict()
    wanted["export"]["faces"] = None
    path = written(tmp_path, wanted, "config.json")
    assert request.read_run(tmp_path).export.faces == 0
    assert request.resolve({}, settings_file.read_settings(path)).export.faces == 0


@pytest.mark.parametrize("preset", sorted(SDS_PRESETS))
@pytest.mark.parametrize("extra", [{}, {"steps": 77, "lr": 0.003, "render_size": 24, "shading": True, "faces": 99}])
def test_what_a_run_leaves_can_be_passed_back(tmp_path, preset, extra):
    first = request.resolve({**CHAIR, "seed": "3", "preset": preset, **extra})
    path = written(tmp_path, {**first.to_dict(), "version": "0", "machine": {"cores": 2}}, "config.json")
    again = request.resolve({}, settings_file.read_settings(path))
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
        ("a.json", {"kind": "model"}, "a.json: kind must be 'sds', got 'model'"),
        ("a.json", {"promt": "x"}, r"unknown key\(s\) promt"),
        ("a.json", {"sds": {"stepz": 3}}, r"unknown key\(s\) stepz"),
        ("a.json", {"sds": {"steps": "3"}}, "a.json: sds.steps must be an integer, got '3'"),
        ("a.json", {"sds": {"steps": 0}}, "a.json: sds.steps must be at least 1, got 0"),
        ("a.json", {"sds": {"lr_mlp": math.inf}}, "a.json: sds.lr_mlp must be a finite number, got inf"),
        ("a.json", {"export": {"texture": 9}}, "a.json: export.texture must be 0 or at least 16, got 9"),
        ("a.json", {"sds": {"steps": True}}, "sds.steps must be an integer, got True"),
        ("a.json", {"sds": {"min_step": [0, 1, 1]}}, r"sds.min_step\[3\] is missing"),
        ("a.json", {"sds": 3}, "a.json: sds must be an object or an array, got 3"),
        ("a.json", {"export": {"up": "x"}}, "export.up must be 'y' or 'z', got 'x'"),
        ("a.json", {"seed": 1.5}, "seed must be an integer or a string, got 1.5"),
        ("a.json", {"prompt": ["x"]}, "prompt must be a string, got \\['x'\\]"),
        ("a.json", {"preset": "huge"}, "preset must be 'auto', 'paper', 'mini' or 'fast', got 'huge'"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(tmp_path, name, content, message):
    with pytest.raises(InputFileError, match=message):
        settings_file.read_settings(written(tmp_path, content, name))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputFileError, match="No such file"):
        settings_file.read_settings(tmp_path / "nowhere.toml")
    (tmp_path / "b.toml").write_bytes(b"\xe9")
    with pytest.raises(InputFileError, match="cannot read"):
        settings_file.read_settings(tmp_path / "b.toml")
    written(tmp_path, {"kind": "sds", "prompt": "x", "sds": {"steps": 3}}, "config.json")
    with pytest.raises(InputFileError, match="incomplete"):
        request.read_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": 2.0}, "weight_decay must be less than 1, got 2.0"),
        ({"milestones": (3,)}, "one entry more than milestones"),
        ({"mode": "2d", "method": "reconstruct"}, "--mode must be 3d with --method reconstruct"),
        ({"milestones": (9, 3), "render_size": (8, 8, 8), "n_groups": (1, 1, 1)}, "milestones must grow"),
        ({"lambda_sparsity": (0.0, -1.0, 1.0, 9.0)}, r"lambda_sparsity\[1\] must be at least 0, got -1.0"),
        ({"max_step": (0.0, 2.0, 0.5, 9.0)}, r"max_step\[1\] must be at most 1, got 2.0"),
        ({"min_step": (math.nan, 0.9, 0.5, 9.0)}, r"min_step\[0\] must be a finite number, got nan"),
        ({"updates_per_guidance": 0}, "updates_per_guidance must be at least 1, got 0"),
        ({"negative_prompt": "a\x07"}, "control character"),
        (
            {"weighting": "uniform"},
            "--weighting uniform is of the loss sds, got --loss x0, which has no weight; add --loss",
        ),
        ({"perp_neg": True}, "--perp-neg leads .* needs --mode 2d and --view-words, got --mode 3d$"),
        (
            {"perp_neg": True, "mode": "2d", "view_words": False},
            "needs --mode 2d and --view-words, got --no-view-words$",
        ),
        ({"sampled_views": 8, "method": "reconstruct"}, "sampled_views must be 0 with method reconstruct, .* got 8"),
        ({"sampled_views": 8, "mode": "2d"}, "sampled_views must be 0 with mode 2d, .* got 8"),
        ({"sampled_views": 6}, "sampled_views must be a multiple of n_views, 4, got 6"),
        ({"view_words": True, "method": "reconstruct"}, "--view-words can't be told to the views of --method reconstr"),
        ({"grad_clip": (0.0, 0.0, 1.0, 9.0)}, r"grad_clip\[1\] must be greater than 0, got 0.0"),
    ],
)
def test_settings_that_no_run_can_use(changes, message):
    with pytest.raises(ArgumentError, match=message):
        request.check_config(replaced(SDS_PRESETS["mini"], **changes))


def test_an_error_names_what_the_user_wrote():
    with pytest.raises(ArgumentError, match="^--lr must be less than 10, got 20.0$"):
        request.resolve({**CHAIR, "lr": 20.0})
    with pytest.raises(ArgumentError, match="^--render-size must be at most 1024, got 4000$"):
        request.resolve({**CHAIR, "render_size": 4000})
    with pytest.raises(ArgumentError, match="^--texture must be 0 or at most 8192, got 9000$"):
        request.resolve({**CHAIR, "texture": 9000})
    with pytest.raises(ArgumentError, match="^distance_range must be low, then high, got 2.0 and 1.0$"):
        request.resolve(CHAIR, {"sds": {"distance_range": (2.0, 1.0)}})


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ({"mesh_resolution": 4}, "mesh_resolution must be at least 8, got 4"),
        ({"faces": 3}, "faces must be 0 or at least 4, got 3"),
        ({"texture": 9}, "texture must be 0 or at least 16, got 9"),
    ],
)
def test_meshes_that_cannot_be_made(export, message):
    with pytest.raises(ArgumentError, match=message):
        request.check_export(ExportConfig(**export))


def test_vsd_has_its_own_scale_unless_one_is_given():
    assert request.resolve({**CHAIR, "preset": "paper"}).config.guidance.guidance_scale == 50.0
    vsd = request.resolve({**CHAIR, "preset": "paper", "guidance": "vsd"})
    assert (vsd.config.guidance.kind, vsd.config.guidance.guidance_scale) == ("vsd", 7.5)
    asked = request.resolve({**CHAIR, "preset": "paper", "guidance": "vsd", "guidance_scale": 9.0})
    assert asked.config.guidance.guidance_scale == 9.0
    assert not request.differences(asked, {"guidance": "vsd"})
    assert request.differences(asked, {"guidance": "sds"}) == {"guidance": ("sds", "vsd")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "vsd", "method": "reconstruct"}, "guidance vsd asks the model at every step, and --method"),
        ({"kind": "vsd", "updates_per_guidance": 2}, "updates_per_guidance must be 1 with guidance vsd, .* got 2"),
        ({"kind": "vsd", "match": "pixels"}, "match must be latents with guidance vsd, .* got pixels"),
        ({"particles": 2}, "particles is a setting of VSD, and the guidance is sds; add --guidance vsd"),
    ],
)
def test_what_vsd_cannot_be_asked_for(settings, message):
    with pytest.raises(ArgumentError, match=message):
        request.check_config(replaced(SDS_PRESETS["mini"], **settings))


def test_without_peft_vsd_says_what_to_install(monkeypatch):
    monkeypatch.setattr(distill_config, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"--guidance vsd learns with peft; install mvdream_fast\[train\], or take"):
        request.resolve({**CHAIR, "guidance": "vsd"})


def test_a_file_of_prompts(tmp_path):
    path = written(tmp_path, '"a cup"\n\n{"prompt": "a red car", "seed": 4, "steps": 30, "negative_prompt": "blue"}\n')
    first, second = request.read_prompts(path, {"seed": "9", "guidance_scale": 3.0, "recipe": "mvdream"}, None)
    assert (first.prompt, first.seed, first.config.steps) == ("a cup", 9, 600)
    assert (second.prompt, second.seed, second.config.steps) == ("a red car", 4, 30)
    assert second.config.negative_prompt == "blue"
    assert second.config.guidance.max_step[3] == 24  # the schedules stretch
    assert {first.config.guidance.guidance_scale, second.config.guidance.guidance_scale} == {3.0}


FORMS = {
    "guided_from": "cond",
    "loss": "sds",
    "weighting": "fantasia3d",
    "timesteps": "each",
    "mode": "2d",
    "perp_neg": True,
}


def test_forms_of_guidance_and_what_a_run_was_begun_with():
    run = request.resolve({**CHAIR, **FORMS})
    guidance = run.config.guidance
    assert (guidance.guided_from, guidance.loss, guidance.weighting, guidance.timesteps) == (*FORMS.values(),)[:4]
    assert request.differences(run, FORMS | {"view_words": True}) == {}  # which the mode brings
    others = {
        "guided_from": "uncond",
        "weighting": "sds",
        "timesteps": "shared",
        "view_words": False,
        "perp_neg": False,
    }
    assert request.differences(run, others).keys() == others.keys()
    assert request.differences(run, others)["view_words"] == (False, True)
    assert request.differences(request.resolve(CHAIR), {"view_words": False, "perp_neg": False}) == {}
    # the other mode of the same settings brings its own
    assert not dataclasses.replace(run.config, mode="3d").guidance.tells_sides("3d")


def test_a_limit_of_the_gradient_stretches_with_the_steps():
    clipped = replaced(SDS_PRESETS["mini"], grad_clip=(0.0, 2.0, 8.0, 300.0))
    assert resolve_config(clipped, steps=1200).guidance.grad_clip == (0.0, 2.0, 8.0, 600.0)
    assert resolve_config("mini", steps=1200).guidance.grad_clip is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_files_of_other_encodings_and_line_rules(tmp_path, encoding):
    path = tmp_path / "prompts.jsonl"
    text = '"a cup"\r\n\r\n{"prompt": "a blue cup", "negative_prompt": "a\u2028b"}\r"ein grüner Stuhl"'
    path.write_bytes(text.encode(encoding))
    found = request.read_prompts(path, {}, None)
    assert [r.prompt for r in found] == ["a cup", "a blue cup", "ein grüner Stuhl"]
    assert found[1].config.negative_prompt == "a\u2028b"
    for name, content in (("RUN.TOML", 'prompt = "ein grüner Stuhl"\r\nseed = 3\r\n'),
                          ("run.json", '{"prompt": "ein grüner Stuhl",\r\n "seed": 3}')):  # fmt: skip
        (tmp_path / name).write_bytes(content.encode(encoding))
        assert settings_file.read_settings(tmp_path / name) == {"prompt": "ein grüner Stuhl", "seed": 3}
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(InputFileError, match=f"{name}: line 1 is not UTF-8"):
            settings_file.read_settings(tmp_path / name)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029"])
def test_a_separator_within_a_line_is_no_line_end(tmp_path, separator):
    line = json.dumps(f"a{separator}cup", ensure_ascii=False)
    first, second = request.read_prompts(written(tmp_path, f'{line}\n"a chair"\n', "p.jsonl"), {}, None)
    assert (first.prompt, second.prompt) == (f"a{separator}cup", "a chair")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: it is not JSON"),
        ("3", "line 2: it must be a string or an object"),
        ('{"seed": 3}', "line 2: it must be a string or an object"),
        ('{"prompt": "x", "model": "y"}', r"line 2: unknown key\(s\) model in Line; known: prompt, seed, "),
        ('{"prompt": " "}', "line 2: the prompt is empty"),
        ('{"prompt": "x", "seed": -1}', "line 2: --seed must be a number"),
        ('{"prompt": "x", "seed": null}', "line 2: seed must be an integer or a string, got None"),
        ('{"prompt": "x", "steps": 0}', "line 2: --steps must be at least 1, got 0"),
        ('{"prompt": "x", "steps": "9"}', "line 2: steps must be an integer, got '9'"),
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
        **{f.name: VALUES for f in dataclasses.fields(settings_file.SettingsFile) if f.name != "sds"},
        "sds": st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), VALUES, max_size=3),
    },
)


def fuzz(path, content):
    """Any file is either refused with one of our errors or becomes a run that can be used."""
    path.write_text(json.dumps(content))
    try:
        wanted = request.resolve(CHAIR, settings_file.read_settings(path))
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


def test_a_recipe_brings_its_settings_and_its_model(tmp_path):
    run = request.resolve({**CHAIR, "recipe": "dreamfusion-if"})
    assert (run.model, run.config) == ("pixels", RECIPES["dreamfusion-if"].at("mini"))
    assert request.resolve({**CHAIR, "recipe": "prolificdreamer", "model": "x.pt"}).config.preset == "paper"
    assert request.resolve({**CHAIR, "method": "sds"}).config.recipe == "mvdream"
    changed = request.resolve({**CHAIR, "recipe": "prolificdreamer", "mode": "3d", "steps": 60}).config
    assert (changed.recipe, {stage.mode for stage in changed.stages}) == ("prolificdreamer", {"3d"})
    assert [stage.steps for stage in changed.stages] == [40, 10, 10]
    assert changed.guidance.max_step == pytest.approx((8, 0.98, 0.5, 8.0016))
    file = settings_file.read_settings(written(tmp_path, 'recipe = "dreamfusion-if"\n[sds]\nsteps = 60\n'))
    assert request.resolve(CHAIR, file).config == resolve_config("mini", recipe="dreamfusion-if", steps=60)
    again = settings_file.read_settings(written(tmp_path, run.to_dict(), "config.json"))
    assert dataclasses.replace(request.resolve({}, again), why="") == dataclasses.replace(run, why="")
    with pytest.raises(ArgumentError, match="--recipe mvdream contradicts the file of --config, which is for dream"):
        request.resolve({**CHAIR, "recipe": "mvdream"}, file)
    with pytest.raises(InputFileError, match="recipe must be 'mvdream', .* got 'magic'"):
        settings_file.read_settings(written(tmp_path, 'recipe = "magic"'))


def test_a_run_that_goes_on_keeps_its_recipe():
    run = request.resolve({**CHAIR, "recipe": "prolificdreamer"})
    assert request.differences(run, {"recipe": "prolificdreamer", "mode": "2d"}) == {}
    assert request.differences(run, {"recipe": "mvdream"}) == {"recipe": ("mvdream", "prolificdreamer")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "nowhere"}, "the recipe {} needs .*: .* name it by --model .*there is no model at .*nowhere"),
        ({"model": "embedded"}, "the recipe dreamfusion-if needs a model of pixels, but the model embedded is one of"),
    ],
)
def test_a_model_that_is_missing_or_of_another_kind(flags, message):
    with pytest.raises(ModelError, match=message.format("dreamfusion-if")):
        request.open_model(request.resolve({**CHAIR, "recipe": "dreamfusion-if", **flags}))


def test_mvdreams_own_model_is_missed_in_the_old_words():
    with pytest.raises(ModelError, match="^there is no model at .*nowhere"):
        request.open_model(request.resolve({**CHAIR, "model": "nowhere"}))
    assert request.open_model(request.resolve(CHAIR)).config.name == "mini"


@pytest.fixture
def two_folders(tmp_path, monkeypatch):
    """here/m, a model; there/ with other things of the names m and embedded. The current folder is here/."""
    for name in ("there/m", "there/embedded", "here/pixels"):
        (tmp_path / name).mkdir(parents=True)
    save_model(random_model(), tmp_path / "here" / "m")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize("way", ["flag", "file", "prompts"])
def test_a_model_is_kept_by_its_whole_path(two_folders, monkeypatch, way):
    """So that a run can be gone on with from any folder."""
    (two_folders / "prompts.jsonl").write_text('"a chair"\n')
    whole = str(two_folders / "here" / "m")
    run = {
        "flag": lambda: request.resolve({**CHAIR, "model": "m"}),
        "file": lambda: request.resolve(CHAIR, settings_file.read_settings(written(two_folders, 'model = "m"'))),
        "prompts": lambda: request.read_prompts(two_folders / "prompts.jsonl", {"model": "./m"}, None)[0],
    }[way]()
    assert run.to_dict()["model"] == whole
    monkeypatch.chdir(two_folders / "there")
    assert str(request.open_model(run).path) == whole
    assert request.differences(run, {"model": "../here/m"}) == {}
    assert request.differences(run, {"model": "m"}) == {"model": ("m", whole)}


def test_names_of_the_package_s_models_and_what_is_not_there_stay(two_folders, monkeypatch):
    for name in ("embedded", "pixels", "nowhere/model.pt", "job:0123"):
        assert request.absolute_model(name) == name
    refined = request.resolve({**CHAIR, "recipe": "magic3d-if-sd", "model": "pixels", "refine_model": "m"})
    assert (refined.model, refined.refine_model) == ("pixels", str(two_folders / "here" / "m"))
    monkeypatch.chdir(two_folders / "there")
    run = request.resolve({**CHAIR, "model": "embedded"})
    assert run.model == "embedded"
    other = replace(run, model=str(two_folders / "there" / "embedded"))
    assert request.differences(other, {"model": "embedded"}) == {"model": ("embedded", other.model)}


def test_a_record_with_a_model_as_it_was_typed_goes_on(two_folders):
    """As older versions wrote it."""
    run = request.resolve({**CHAIR, "model": "m"})
    old = request.run_of(run.to_dict() | {"model": "m"}, "config.json")
    assert old.model == "m"
    assert request.open_model(old).path.resolve() == two_folders / "here" / "m"
    assert request.differences(old, {"model": "m"}) == {}
    (two_folders / "run").mkdir()
    (two_folders / "run" / "config.json").write_text(json.dumps(old.to_dict()))
    child_run.check_same(two_folders / "run", run)
    with pytest.raises(ArgumentError, match="holds a run with model m, but asked for is embedded"):
        child_run.check_same(two_folders / "run", replace(run, model="embedded"))


@pytest.mark.parametrize("seed", ["9" * 5000, "9" * 20, str(2**63), "", "-1", "1.0", "²", "٣"])
def test_seeds_that_no_stream_takes(seed):
    with pytest.raises(ArgumentError, match="--seed must be a number from 0 to 2.*63 - 1 or .random., got ") as refused:
        request.resolve({**CHAIR, "seed": seed})
    assert len(str(refused.value)) < 150


def test_seeds_at_the_bounds():
    for seed in (0, "0", "000", "0" * 5000 + "7", str(2**63 - 1)):
        assert request.resolve({**CHAIR, "seed": seed}).seed == int(str(seed).lstrip("0") or 0)


@pytest.mark.parametrize("recipe", ["mvdream", "mvdream-sharp", "magic3d-if-sd"])
def test_a_weight_of_normals_needs_shading(tmp_path, recipe):
    """Without light there are no normals, and the loss would be left out without a word."""
    weight = "lambda_orient = [0, 1.0, 1.0, 1]"
    stages = len(request.resolve({**CHAIR, "recipe": recipe}).config.stages)
    unlit = "shading = false\n"
    first = f'recipe = "{recipe}"\n' + "".join(
        f"[[sds]]\nrecipe = '{recipe}'\n{unlit + weight if k == 0 else ''}\n" for k in range(stages)
    )
    file = settings_file.read_settings(written(tmp_path, first))
    with pytest.raises(ArgumentError, match="lambda_orient must be 0 throughout without shading.*; add --shading .*"):
        request.resolve(CHAIR, file)
    request.resolve({**CHAIR, "shading": True}, file)
    lit = settings_file.read_settings(written(tmp_path, first.replace("shading = false", "shading = true")))
    assert request.resolve(CHAIR, lit).config.representation.lambda_orient == (0, 1, 1, 1)
    off = settings_file.read_settings(written(tmp_path, first.replace("1.0, 1.0", "0, 0")))
    request.resolve(CHAIR, off)


@pytest.mark.parametrize("recipe", ["mvdream", "textmesh-if", "magic3d-if-sd"])
def test_a_run_of_an_older_version_is_read(recipe):
    """Its record lacks the settings that came later; they are as they were then, without effect."""
    now = request.resolve({"prompt": "x", "recipe": recipe}).to_dict()
    old = json.loads(json.dumps(now))
    for table in old["sds"] if isinstance(old["sds"], list) else [old["sds"]]:
        for name in NEWER:
            table.pop(name, None)
    found = request.run_of(old, "config.json").to_dict()
    assert settings_but_newer(found) == settings_but_newer(now)
    first = found["sds"][0] if isinstance(found["sds"], list) else found["sds"]
    assert first["sampled_views"] == 0
    assert first.get("deviation_least") in (None, SurfaceConfig().deviation_least)


def settings_but_newer(run):
    tables = run["sds"] if isinstance(run["sds"], list) else [run["sds"]]
    return [{name: value for name, value in table.items() if name not in NEWER} for table in tables]
