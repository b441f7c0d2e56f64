"""Recipes of several stages: each begins with what the one before has made, and a run goes on across them."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from reference.random_model import TINY as TINY_MODEL
from reference.random_model import TINY_PIXELS, random_model
from reference.studio import Painter, Studio, same

from mvdream_fast import text_to_3d
from mvdream_fast.checkpoints.open import save_model
from mvdream_fast.core.errors import ArgumentError, InputFileError, ModelError
from mvdream_fast.distill import request, run_memory, settings_file
from mvdream_fast.distill.config import joined, replaced, restepped, settings_of, shared_out, written
from mvdream_fast.distill.progress import Watcher
from mvdream_fast.distill.recipes import RECIPES, guided_views, resolve_config
from mvdream_fast.distill.report import asset_report, differences
from mvdream_fast.distill.state import RunState
from mvdream_fast.jobs.asset import Device
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.kinds import handed_over, new_representation
from mvdream_fast.scene.tets.tets import Tets
from mvdream_fast.scene.tets.textured import TexturedMesh
from mvdream_fast.text_to_3d import TextTo3D

CHAIR = {"prompt": "a green chair"}
SMALL = {"render_size": (8,), "samples_per_ray": 24, "tets_resolution": 32}
THREE = joined(map(restepped, resolve_config("mini", recipe="prolificdreamer", **SMALL).stages, (2, 1, 3)))
TWO = resolve_config("mini", recipe="magic3d-if-sd", steps=3, **SMALL)  # 2 and 1


class Stop:
    """An interrupt that comes once so many steps are done."""

    def __init__(self, after):
        self.after, self.requested, self.exit_code = after, None, 130

    def __call__(self, progress):
        if progress.record.step + 1 == self.after:
            self.requested = 2


def test_steps_are_shared_in_proportion():
    def shares(name, steps):
        return shared_out(steps, RECIPES[name].at("paper"))

    assert shares("prolificdreamer", 70_000) == [25_000, 15_000, 30_000]
    assert shares("prolificdreamer", 70) == [25, 15, 30]
    assert shares("prolificdreamer", 3) == [1, 1, 1]
    assert shares("magic3d-if-sd", 4) == [3, 1]
    assert shares("mvdream", 17) == [17]
    with pytest.raises(ArgumentError, match="steps must be at least 3, one for each stage of prolificdreamer, got 2"):
        shares("prolificdreamer", 2)


def test_stages_count_their_steps_and_the_run_all():
    assert [stage.steps for stage in THREE.stages] == [2, 1, 3]
    assert THREE.ends == (2, 3, 6)
    assert [THREE.at_work(done) for done in range(7)] == [0, 0, 0, 1, 2, 2, 2]
    assert joined(THREE.stages) == THREE
    assert guided_views(THREE) == sum(map(guided_views, THREE.stages)) == 6 * 4


def test_a_setting_holds_for_every_stage_that_has_it():
    changed = resolve_config("mini", recipe="prolificdreamer", guidance_scale=3.0, tets_resolution=32, texture_size=64)
    assert {stage.guidance.guidance_scale for stage in changed.stages} == {3.0}
    assert changed.stages[1].representation.tets_resolution == 32
    assert changed.stages[2].representation.texture_size == 64
    shaped = resolve_config("mini", recipe="magic3d-if-sd", shape="surface")
    assert [stage.representation.shape for stage in shaped.stages] == ["surface", "tets"]
    with pytest.raises(ArgumentError, match="sdf_levels must be left out for the shape volume; it is a setting"):
        resolve_config("mini", recipe="prolificdreamer", sdf_levels=(0.0, 1.0, 2.0, 3.0))


def test_a_run_that_was_killed_goes_on_to_the_byte(tmp_path):
    """In the first stage; when it had just ended; in the second before it was saved; in the last."""
    records = []
    whole = Studio()("a chair", config=THREE, callback=lambda progress: records.append(progress.record.step))
    assert records == [0, 1, 2, 3, 4, 5]
    assert isinstance(whole.representation, TexturedMesh)
    for after in (1, 2, 3, 5):
        folder, stop = tmp_path / str(after), Stop(after)
        asset = Studio()("a chair", config=THREE, checkpoints=folder, callback=stop, interrupt=stop)
        assert asset.settings["shape"] == THREE.stages[THREE.at_work(after)].representation.shape
        resumed = Studio()("a chair", config=THREE, checkpoints=folder)
        assert [record["step"] for record in resumed.records] == list(range(after, 6))
        assert same(whole.state(), resumed.state())
        assert resumed.settings == whole.settings


def test_a_run_that_died_after_the_hand_over_hands_over_again(tmp_path):
    """Only the end of the first stage is saved then, and the second one's checkpoints are of it alone."""

    def die(progress):
        if progress.record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Studio()("a chair", config=THREE, checkpoints=tmp_path, callback=die)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["000002.safetensors"]
    resumed = Studio()("a chair", config=THREE, checkpoints=tmp_path)
    assert same(Studio()("a chair", config=THREE).state(), resumed.state())
    with pytest.raises(ModelError, match="of another configuration or seed"):
        Studio()("a chair", config=resolve_config(THREE, lr_geometry=0.02), checkpoints=tmp_path)


def test_a_run_that_is_stopped_while_a_stage_begins_hands_over_again(tmp_path, monkeypatch):
    """What a stage begins with is no step of it, so what is saved stays the end of the one before."""
    stop = Stop(-1)

    def handed(*arguments):
        stop.requested = 2
        return handed_over(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(text_to_3d, "handed_over", handed)
        asset = Studio()("a chair", config=THREE, checkpoints=tmp_path, interrupt=stop)
    assert [record["step"] for record in asset.records] == [0, 1]
    resumed = Studio()("a chair", config=THREE, checkpoints=tmp_path)
    assert [record["step"] for record in resumed.records] == [2, 3, 4, 5]
    assert same(Studio()("a chair", config=THREE).state(), resumed.state())


def handed_state():
    tets = Tets.from_sdf(TWO.stages[1].representation, lambda x: x.norm(dim=1) - 0.4)
    return RunState(TWO.stages[1], "x", 0, Painter(), representation=tets, before=2, handed_over=True)


def test_a_recovery_goes_back_to_what_was_handed_over():
    state, other = handed_state(), handed_state()
    start = {name: x.clone() for name, x in state.representation.state().items()}
    state.step(0)
    assert not same(start, state.representation.state())
    state.step(1)
    other.restore(state.state())
    for one in (state, other):  # the second one knows it from the checkpoint
        one.restart("it happened")
        assert one.event == "it happened: the stage begins again with what it was handed"
        assert same(start, one.representation.state())
    assert state.step(2).step == 4  # of the run


@pytest.mark.parametrize("source", ["volume", "surface", "tets"])
def test_tetrahedra_show_what_they_are_handed(source):
    """A box of another size, too: the surface of a radius of 2 lies where it lay, in its own colours."""
    radius = {} if source == "volume" else {"radius": 2.0}
    config = resolve_config("mini", shape=source, **radius, **({"tets_resolution": 32} if source == "tets" else {}))
    made = new_representation(config.representation)
    with torch.no_grad():
        made.volume.table[:4096] *= 20_000  # the coarsest level's
        tets = handed_over(resolve_config("mini", shape="tets", tets_resolution=32, **radius).representation, made)
        mesh, own = made.mesh(32), tets.mesh()
        points = torch.from_numpy(own.vertices)
        # A surface's fine levels, which have not opened yet, are as good as nothing.
        torch.testing.assert_close(tets.colors(points), made.colors(points), atol=1e-3, rtol=0)
        assert tets.colors(points).std() > 0.01
    assert np.abs(np.abs(own.vertices).max(0) - np.abs(mesh.vertices).max(0)).max() < 0.07 * made.radius
    with pytest.raises(TypeError, match="config must be one of a mesh, got NerfConfig"):
        handed_over(RECIPES["mvdream"].at("mini").representation, made)


def test_colours_of_another_field_are_learned():
    """A field over a larger box is no field of the same colours, whatever its shape; so is a texture."""
    ball = Tets.from_sdf(TWO.stages[1].representation, lambda x: x.norm(dim=1) - 0.5).mesh()
    ball.colors[:] = 0.5 + 0.8 * ball.vertices
    config = RECIPES["prolificdreamer"].at("mini").stages[2].representation
    source = TexturedMesh(replaced_shape(config, mesh_colors="texture", texture_size=128), ball)
    larger, points = handed_over(replaced_shape(config, radius=2.0), source), torch.from_numpy(ball.vertices)
    again = handed_over(config, larger)
    for made in (larger, again):
        assert (made.colors(points) - (0.5 + 0.8 * points)).abs().mean() < 0.03


def replaced_shape(config, **changes):
    return type(config)(**(vars(config) | changes))


def test_the_first_model_is_let_go_of_before_the_second_is_loaded():
    pixels = MVDreamPipeline(random_model(config=TINY_PIXELS), "cpu", "float32")
    unet, loaded = weakref.ref(pixels.unet), []

    def refine():
        gc.collect()
        loaded.append(unet())
        return MVDreamPipeline(random_model(config=TINY_MODEL), "cpu", "float32")

    asset = TextTo3D(pixels, keep=False, refine=refine)("a green chair", config=TWO)
    assert loaded == [None]
    assert isinstance(asset.representation, Tets)
    assert [stage["shape"] for stage in asset.settings["stages"]] == ["volume", "tets"]
    with pytest.raises(ModelError, match="needs a model of latents for its second stage, but the model it is"):
        RECIPES["magic3d-if-sd"].prior_of(1).check("magic3d-if-sd", "2d", "it", TINY_PIXELS)


@pytest.mark.parametrize(
    ("flags", "file", "message"),
    [
        ({}, {"shape": "textured-mesh"}, "shape must be volume, surface or tets where a run begins, got textured-mesh"),
        ({"recipe": "mvdream-mesh"}, {"shape": "textured-mesh"}, "shape must be volume, surface or tets where"),
        ({"recipe": "prolificdreamer", "particles": 2}, {}, "particles must be 1 in a run of several stages"),
        ({"recipe": "prolificdreamer", "steps": 2}, {}, "steps must be at least 3, one for each stage"),
        (
            {"recipe": "prolificdreamer"},
            [{}],
            "sds must be one table, or 3, one for each stage of prolificdreamer",
        ),
        ({}, [{}, {}], "sds must be one table, or 1, one for each stage of mvdream, got 2"),
        ({"recipe": "mvdream-mesh"}, [{}, {"shape": "volume"}], "must be tets or textured-mesh in stage 2"),
        ({"refine_model": "x"}, {}, "--refine-model must be left out with the recipe mvdream-solid"),
    ],
)
def test_what_stages_cannot_be_asked_for(flags, file, message):
    with pytest.raises(ArgumentError, match=message):
        request.resolve(CHAIR | flags, {"sds": file})


def test_flags_of_variational_distillation_are_for_the_stages_that_learn():
    stages = request.resolve({**CHAIR, "recipe": "prolificdreamer", "lora_rank": 2}).config.stages
    assert [(stage.guidance.kind, stage.guidance.lora_rank) for stage in stages] == [("vsd", 2), ("sds", 2), ("vsd", 2)]


def test_a_table_for_each_stage_and_what_a_run_writes_of_itself(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'prompt = "a cup"\nrecipe = "magic3d-if-sd"\nrefine_model = "mine"\n'
        "[[sds]]\nsteps = 40\n[[sds]]\nguidance_scale = 9.0\ntets_resolution = 32\n"
    )
    run = request.resolve({}, settings_file.read_settings(path))
    first, second = run.config.stages
    assert (first.steps, first.shading_from, second.steps) == (40, 8, 200)
    assert (first.guidance.guidance_scale, second.guidance.guidance_scale) == (20, 9)
    assert second.representation.tets_resolution == 32
    assert run.models() == ["pixels", "mine"]
    record = run.to_dict()
    assert record["sds"] == [settings_of(first), settings_of(second)]
    (tmp_path / "config.json").write_text(json.dumps(record))
    again = request.read_run(tmp_path)
    assert (again.config, again.refine_model) == (run.config, "mine")
    assert request.resolve({}, settings_file.read_settings(tmp_path / "config.json")).config == run.config
    assert request.differences(run, {"steps": 240, "refine_model": "mine", "lr": 0.01}) == {}
    assert request.differences(run, {"steps": 40}) == {"steps": (40, 240)}
    (tmp_path / "bad.json").write_text('{"sds": [{}, {"stepz": 3}]}')
    with pytest.raises(InputFileError, match=r"unknown key\(s\) stepz"):
        settings_file.read_settings(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"sds": [{}, {"steps": "3"}]}')
    with pytest.raises(InputFileError, match=r"sds\[1\].steps must be an integer, got '3'"):
        settings_file.read_settings(tmp_path / "bad.json")


def test_each_stage_is_checked_for_its_memory_with_its_own_model(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run_memory, "check", lambda parts, config, device: seen.append((config, parts)))
    for name, config in (("pixels", TINY_PIXELS), ("latents", TINY_MODEL)):
        save_model(random_model(config=config), tmp_path / name)
    named = {"model": str(tmp_path / "pixels"), "refine_model": str(tmp_path / "latents")}
    run = request.resolve({**CHAIR, **named, "recipe": "magic3d-if-sd", "preset": "mini"})
    Device("cpu").refuse_what_does_not_fit([run])
    assert [config for config, _ in seen] == list(run.config.stages)
    (_, coarse), (_, refined) = seen
    assert run_memory.TETS in refined.keys() - coarse.keys()
    assert coarse[run_memory.WEIGHTS] != refined[run_memory.WEIGHTS]
    with pytest.raises(ModelError, match="of latents for its second stage: .* by --refine-model .*there is no model"):
        request.open_model(request.resolve({**CHAIR, "recipe": "magic3d-if-sd", "refine_model": "nowhere"}), 1)


def test_progress_previews_and_report_show_every_stage(tmp_path):
    lines = []
    watcher = Watcher(tmp_path, THREE, None, lines.append)
    asset = Studio()("a chair", config=THREE, callback=watcher)
    assert [watcher.stage(done) for done in (1, 3, 6)] == [
        "stage 1 of 3 (volume)", "stage 2 of 3 (tets)", "stage 3 of 3 (textured-mesh)",
    ]  # fmt: skip
    assert lines[-1].startswith("step 6/6, ")
    assert ", stage 3 of 3 (textured-mesh), loss " in lines[-1]
    assert Watcher(tmp_path, TWO, 50, lines.append).is_preview(2)  # the end of its first stage
    assert {f"{end:06d}.png" for end in THREE.ends} <= {path.name for path in (tmp_path / "preview").iterdir()}
    page = asset_report(asset, asset.records, tmp_path / "report.html").read_text()
    for wanted in (
        "<td>3 to 3</td><td>tets, 2d sds</td>",
        "All settings of stage 3",
        "Settings of stage 2 that",
    ):
        assert wanted in page
    tables = written(resolve_config("mini", recipe="prolificdreamer", tets_resolution=32))
    assert differences(tables[1], 2) == {"tets_resolution": "32 (64)"}
    assert differences(tables[2], 3) == {}
    asset.save(tmp_path / "asset.safetensors")
    loaded = Asset.load(tmp_path / "asset.safetensors")
    assert isinstance(loaded.representation, TexturedMesh)
    assert [stage["steps"] for stage in loaded.settings["stages"]] == [2, 1, 3]


def test_single_stages_are_written_as_before():
    plain = RECIPES["mvdream"].at("mini")
    assert written(plain) == settings_of(plain)
    assert "later" not in settings_of(plain)
    assert replaced(plain, steps=600) == plain
