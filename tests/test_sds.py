"""The sds command end to end with a tiny model: what it leaves behind, settings, several prompts, exit codes."""

import json
import re
import socket
from pathlib import Path

import av
import pytest
import torch
import trimesh
from PIL import Image
from reference.sds_command import QUICK, SETTLED, command, digest, latest

from mvdream_fast import sds
from mvdream_fast.core import memory
from mvdream_fast.core.errors import DivergedError
from mvdream_fast.distill import request
from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.request import resolve
from mvdream_fast.distill.systems import mini
from mvdream_fast.guidance.sds import ScoreDistillation
from mvdream_fast.scene.asset import Asset

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.mark.parametrize("graphs", [True, False])
def test_graphs_are_made_unless_they_are_switched_off(graphs, tiny_model):
    where = sds.place(sds.Flags(device="cpu", dtype="float32", graphs=graphs))
    pipeline = where.load(resolve({"prompt": "a red car", "model": tiny_model}))
    score = new_guidance(pipeline, "a red car", mini(), 0).distillation
    assert (pipeline._guided_call.enabled, score._whole.enabled, score._guided_call.enabled) == (graphs,) * 3


@pytest.mark.parametrize(("asked", "size"), [((), 1024), (("--texture", "0"), None)])
def test_a_mesh_that_was_optimised_has_a_texture_unless_none_is_wanted(tiny_model, tmp_path, asked, size):
    (tmp_path / "tets.toml").write_text('[sds]\nshape = "tets"\ntets_resolution = 32\n')
    flags = ["--model", tiny_model, "--config", str(tmp_path / "tets.toml"), "--steps", "2", *SETTLED, *asked]
    assert command("a red ball", *flags) == 0
    body = trimesh.load(latest() / "mesh.glb", force="mesh")
    image = body.visual.material.baseColorTexture
    assert (image and image.size) == (size and (size, size))
    assert "; watertight" in (latest() / "report.html").read_text()


def test_everything_is_left_behind(tiny_model, capsys):
    asked = ["a green chair", "--model", tiny_model, "--steps", "6", "--seed", "4"]
    assert command(*asked, "--preset", "mini", *QUICK, whole=True) == 0
    folder = latest()
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".lock", "config.json", "cmd.txt", "env.json", "log.jsonl", "ckpt", "preview", "views.png", "asset.safetensors",
        "mesh.glb", "turntable.webp", "turntable.mp4", "report.html",
    }  # fmt: skip
    assert folder.parent.name.startswith("a-green-chair-")
    assert folder.name.endswith("-s4")
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(6))
    body = trimesh.load(folder / "mesh.glb", force="mesh")
    assert len(body.faces) > 20
    assert b"baseColorTexture" in (folder / "mesh.glb").read_bytes()
    assert "watertight" in (folder / "report.html").read_text()
    with Image.open(folder / "turntable.webp") as picture:
        assert picture.size == (128, 128)
    with av.open(folder / "turntable.mp4") as film:
        assert film.streams.video[0].frames == 120
    with Image.open(sorted((folder / "preview").iterdir())[0]) as picture:
        assert picture.size == (256, 192)
    config = json.loads((folder / "config.json").read_text())
    assert (config["prompt"], config["seed"]) == ("a green chair", 4)
    assert (config["sds"]["recipe"], config["sds"]["steps"]) == ("mvdream-solid", 6)
    out = capsys.readouterr().out
    assert out.startswith("recipe mvdream-solid, preset mini: as asked; 6 steps; seed 4; model tiny (")
    assert "\r" not in out


def test_the_single_view_prior_makes_another_asset(tiny_model):
    arguments = ["a green chair", "--model", tiny_model, "--steps", "3", *SETTLED]
    digests = []
    for mode in ("3d", "2d"):
        assert command(*arguments, "--mode", mode) == 0
        assert json.loads((latest() / "config.json").read_text())["sds"]["mode"] == mode
        digests.append((digest(latest()), (latest() / "views.png").read_bytes()))
    assert digests[0][0] != digests[1][0]
    assert digests[0][1] != digests[1][1]  # what is shown first is drawn in that mode, too


@pytest.mark.parametrize("mode", ["3d", "2d"])
def test_a_learner_beside_the_model(mode, tiny_model):
    """At ProlificDreamer's scale unless another is asked for, and as the run was begun where it goes on."""
    arguments = ["a green chair", "--model", tiny_model, "--steps", "3", *SETTLED, "--guidance", "vsd", "--mode", mode]
    assert command(*arguments, "--particles", "2", "--lora-rank", "3", "--guidance-scale", "5") == 0
    settings = json.loads((latest() / "config.json").read_text())["sds"]
    assert (settings["kind"], settings["particles"], settings["lora_rank"]) == ("vsd", 2, 3)
    assert settings["guidance_scale"] == 5.0
    assert (latest() / "mesh.glb").exists()
    assert Asset.load(latest() / "asset.safetensors").prompt == "a green chair"  # one asset, not two
    assert command("--resume", str(latest()), "--guidance", "vsd") == 0
    assert command("--resume", str(latest()), "--guidance", "sds") == 2


def test_reconstruction_shares_the_loop(tiny_model):
    arguments = ["--method", "reconstruct", "--n-views", "3", "--steps", "4", *SETTLED]
    assert command("--prompt", "a red car", "--model", tiny_model, *arguments) == 0
    assert (latest() / "mesh.glb").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "prompt is empty"),
        (["  "], 2, "prompt is empty"),
        (["a", "--prompt", "b"], 2, "give the prompt once"),
        (["a\x07b"], 2, "control character"),
        (["a chair", "--seed", "-1"], 2, "--seed must be a number"),
        (["a chair", "--steps", "0"], 2, "--steps must be at least 1, got 0"),
        (["a chair", "--method", "sds", "--steps", "0"], 2, "--steps must be at least 1, got 0"),
        (["a chair", "--render-size", "4000"], 2, "--render-size must be at most 1024, got 4000"),
        (["a chair", "--rescale", "2"], 2, "--rescale must be at most 1, got 2.0"),
        (["a chair", "--fovy-range-deg", "50", "20"], 2, "--fovy-range-deg must be low, then high, got 50.0 and 20.0"),
        (["a chair", "--guidance-scale", "nan"], 2, "--guidance-scale must be a finite number, got nan"),
        (["a chair", "--lr", "-1"], 2, "--lr must be greater than 0, got -1.0"),
        (["a chair", "--preset", "huge"], 2, ""),
        (["a chair", "--texture", "3"], 2, "--texture must be 0 or at least 16, got 3"),
        (["a chair", "--checkpoint-every", "0"], 2, "--checkpoint-every must be at least 1"),
        (["a chair", "--prompts-file", "x.jsonl"], 2, "give the prompt once"),
        (["--prompts-file", "x.jsonl"], 5, "cannot read x.jsonl: No such file"),
        (["--config", "x.toml"], 5, "cannot read x.toml: No such file"),
        (["a chair", "--resume", "latest"], 2, "leave out the prompt"),
        (["a chair", "--device", "tpu"], 2, "--device must be"),
        (["a chair", "--lora-rank", "8"], 2, "--lora-rank is a setting of VSD"),
        (["a chair", "--guidance", "vsd", "--lora-rank", "0"], 2, "--lora-rank must be at least 1, got 0"),
        (["a chair", "--guidance", "vsd", "--method", "reconstruct"], 2, "--guidance vsd asks the model at every step"),
        (["a chair", "--model", "nowhere"], 3, "nowhere"),
        (["a chair", "--recipe", "magic"], 2, ""),
        (
            ["a chair", "--recipe", "prolificdreamer", "--model", "nowhere"],
            3,
            "recipe prolificdreamer needs a model of",
        ),
        (["a chair", "--recipe", "dreamfusion-if", "--model", "embedded"], 3, "is one of several views, as latents"),
        (["--resume", "nowhere"], 2, "--resume must name a run folder"),
        (["--resume", "."], 5, "cannot read"),
        (["a chair", "--root", "file/below"], 7, "cannot create the run folder"),
        (["a chair", "-o", "file/below"], 7, "a file is in the way"),
        (["--prompts-file", "x.jsonl", "-o", "x"], 2, "-o names the folder of one run"),
    ],
)
def test_wrong_use_is_one_sentence_and_a_code(arguments, code, message, capsys):
    Path("file").touch()
    assert command(*arguments) == code
    captured = capsys.readouterr().err
    assert message in captured
    assert "Traceback" not in captured


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_model_may_compute_in_half_precision(dtype, tiny_model, capsys):
    """What auto means depends on the machine; both halves run on all of them, and the volume stays in float32."""
    asked = ["a green chair", "--model", tiny_model, "--steps", "2", "--seed", "4"]
    assert command(*asked, *SETTLED, "--dtype", dtype) == 0
    assert f" on cpu in {dtype}\n" in capsys.readouterr().out
    records = [json.loads(line) for line in (latest() / "log.jsonl").read_text().splitlines()]
    assert all(0 < record["loss"] < 1e6 for record in records)
    asset = Asset.load(latest() / "asset.safetensors")
    assert {tensor.dtype for tensor in asset.state().values() if tensor.is_floating_point()} == {torch.float32}


def test_a_run_can_be_made_again_from_its_own_configuration(tiny_model, capsys):
    extra = ["--texture", "32", "--faces", "200", "--formats", "obj", "ply", "--up", "z"]
    assert command("a red car", "--model", tiny_model, "--steps", "3", "--seed", "2", *SETTLED, *extra) == 0
    first = latest()
    made = {path.name for path in first.iterdir()}
    assert made >= {"mesh.glb", "mesh.obj", "mesh.mtl", "mesh_texture.png", "mesh.ply"}
    assert trimesh.load(first / "mesh.obj").visual.material.image.size == (32, 32)
    body = trimesh.load(first / "mesh.glb", force="mesh")
    assert body.visual.material.baseColorTexture.size == (32, 32)
    assert len(body.faces) <= 200
    assert "mesh.ply: PLY holds no texture" in capsys.readouterr().out
    assert "mesh.ply: PLY holds no texture" in (first / "report.html").read_text()
    rest = ["--device", "cpu", "--threads", "1", "--dtype", "float32", "--quiet"]
    assert command("--config", str(first / "config.json"), *rest) == 0
    again = latest()
    assert again != first
    assert digest(again) == digest(first)
    assert (again / "mesh.glb").read_bytes() == (first / "mesh.glb").read_bytes()
    settings = [json.loads((folder / "config.json").read_text()) for folder in (first, again)]
    assert settings[0] == settings[1]
    assert Path(capsys.readouterr().out.strip()).resolve() == again  # nothing but the folder


def test_a_file_of_prompts_ends_with_a_summary(tiny_model, capsys):
    lines = ['{"prompt": "a red car", "seed": 1}', '{"prompt": "a zyxw chair", "steps": 2}']
    Path("prompts.jsonl").write_text("\n".join(lines))
    assert command("--prompts-file", "prompts.jsonl", "--model", tiny_model, "--steps", "3", *SETTLED) == 0
    out = capsys.readouterr().out
    summary = out[out.index("2 runs:") :].splitlines()
    assert len(summary) == 3
    assert summary[1].startswith("done")
    assert "'a red car', seed 1" in summary[1]
    assert "the model does not know 'zyxw'" in out
    assert len(list(Path("outputs").glob("*/*/mesh.glb"))) == 2


def test_the_first_line_names_view_words_that_the_model_does_not_know():
    """Four times the prompt in the 2D mode, with a side each; once in the 3D mode."""

    class Unseen:
        def unseen_words(self, prompts, negative_prompt, endings):
            return [f"{len(prompts)}{endings}"]

        def describe(self):
            return "m"

    def last(**flags) -> str:
        return sds.first_line(Unseen(), request.resolve({"prompt": "a car", **flags})).rpartition("; ")[2]

    sides = "4[', front view', ', side view', ', back view', ', overhead view']"
    assert (last(), last(mode="2d"), last(mode="2d", view_words=False)) == ("1['']", sides, "1['']")
    assert last(view_words=True) == sides


def test_one_bad_line_stops_all_runs_before_the_first(tiny_model, capsys):
    Path("prompts.jsonl").write_text('"a red car"\n{"prompt": ""}\n')
    assert command("--prompts-file", "prompts.jsonl", "--model", tiny_model) == 2
    assert "line 2: the prompt is empty" in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_a_run_that_fails_does_not_stop_the_next_ones(tiny_model, capsys, monkeypatch):
    plain = sds.optimise

    def optimise(sampler, request, *rest):
        if request.seed == 1:
            raise DivergedError("it left the finite numbers")
        return plain(sampler, request, *rest)

    monkeypatch.setattr(sds, "optimise", optimise)
    Path("prompts.jsonl").write_text('{"prompt": "a red car", "seed": 1}\n"a green chair"\n')
    assert command("--prompts-file", "prompts.jsonl", "--model", tiny_model, "--steps", "2", *SETTLED) == 6
    captured = capsys.readouterr()
    assert "sds: 'a red car': it left the finite numbers" in captured.err
    assert "failed (DivergedError, 6)" in captured.out
    assert (latest() / "mesh.glb").exists()


def test_words_that_do_not_fit_are_named(tiny_model, capsys):
    prompt = "a green chair " * 5 + "and a red car"
    assert command(prompt, "--model", tiny_model, "--steps", "1", *SETTLED) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "the prompt has more than 10 tokens and is cut: not seen" in first
    assert "'car'" in first


def test_not_enough_memory_is_4_and_leaves_nothing(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: (1 << 20, "free on this machine"))
    assert command("a red car", "--model", tiny_model, *SETTLED) == 4
    assert "this run needs about" in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_a_run_that_diverges_is_6_and_leaves_a_report(tiny_model, capsys, monkeypatch):
    plain = ScoreDistillation._encode
    monkeypatch.setattr(ScoreDistillation, "_encode", lambda *arguments: plain(*arguments) * float("nan"))
    assert command("a red car", "--model", tiny_model, "--steps", "30", *SETTLED) == 6
    captured = capsys.readouterr()
    assert "not finite, again after a recovery" in captured.err
    assert "step 11: 10 steps gave numbers that are not finite" in captured.out
    assert "The run did not finish" in (latest() / "report.html").read_text()
    records = [json.loads(line) for line in (latest() / "log.jsonl").read_text().splitlines()]
    assert all(r["loss"] is None and r["skipped"] for r in records)


def test_o_is_the_folder_of_the_run(tiny_model, capsys):
    assert command("a red car", "--model", tiny_model, "--steps", "1", "-o", "mine", *SETTLED) == 0
    assert {"mesh.glb", "config.json"} <= {path.name for path in Path("mine").iterdir()}
    assert not Path("outputs").exists()
    assert command("a red car", "--model", tiny_model, "--steps", "1", "-o", "mine", *SETTLED) == 7
    assert "exists and is not empty; name another with -o" in capsys.readouterr().err
    assert command("--resume", "latest", "-o", "mine", *QUICK) == 0
    assert command("a red car", "--model", tiny_model, "--steps", "1", "--root", "all", *SETTLED) == 0
    assert (Path("all/latest") / "mesh.glb").exists()


def test_random_seed_and_live_page_are_told(tiny_model, capsys):
    arguments = ["--steps", "2", "--seed", "random", "--viewer", "--viewer-port", "7300", *SETTLED]
    assert command("a red car", "--model", tiny_model, *arguments) == 0
    seed = json.loads((latest() / "config.json").read_text())["seed"]
    out = capsys.readouterr().out
    assert f"seed {seed};" in out
    port = re.search(r"^live view: http://127\.0\.0\.1:(\d+) \(.*ssh -L ", out, re.MULTILINE).group(1)
    with pytest.raises(ConnectionRefusedError):  # it has closed with the run
        socket.create_connection(("127.0.0.1", int(port)), timeout=5)
