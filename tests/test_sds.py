"""The sds command end to end with a tiny model: what it leaves behind, exit codes, resume to the byte, kills."""

import hashlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import trimesh
from PIL import Image
from reference.random_model import random_model

from mvdream_fast import sds
from mvdream_fast.checkpoints.open import save_model
from mvdream_fast.core import cli, memory, run_folder
from mvdream_fast.core.errors import DivergedError, OutputError
from mvdream_fast.distill import request
from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.recipes import mini
from mvdream_fast.distill.request import resolve
from mvdream_fast.guidance.sds import ScoreDistillation
from mvdream_fast.scene.asset import Asset

QUICK = ["--render-size", "8", "--mesh-resolution", "24", "--device", "cpu", "--threads", "1", "--dtype", "float32"]
SETTLED = ["--preset", "mini", *QUICK]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(random_model(), folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(*arguments: str) -> int:
    """The exit code of the command, run in this process."""
    try:
        cli.run(sds.main, sds.Flags, prog="sds", argv=list(arguments))
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.parametrize("graphs", [True, False])
def test_graphs_are_made_unless_they_are_switched_off(graphs, model):
    pipeline = sds.load_pipeline(
        resolve({"prompt": "a red car", "model": model}), sds.Flags(device="cpu", dtype="float32", graphs=graphs)
    )
    score = new_guidance(pipeline, "a red car", mini(), 0).distillation
    assert (pipeline._guided_call.enabled, score._whole.enabled, score._guided_call.enabled) == (graphs,) * 3


def latest() -> Path:
    return Path("outputs/latest").resolve()


def digest(folder: Path) -> str:
    """Of everything that the optimisation made."""
    state = Asset.load(folder / "asset.safetensors").state()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def test_everything_is_left_behind(model, capsys):
    assert command("a green chair", "--model", model, "--steps", "6", "--seed", "4", *SETTLED) == 0
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
    assert len(trimesh.load(folder / "mesh.glb", force="mesh").faces) > 20
    with Image.open(folder / "turntable.webp") as picture:
        assert picture.size == (128, 128)
    with Image.open(sorted((folder / "preview").iterdir())[0]) as picture:
        assert picture.size == (256, 192)
    config = json.loads((folder / "config.json").read_text())
    assert (config["prompt"], config["seed"], config["sds"]["steps"]) == ("a green chair", 4, 6)
    out = capsys.readouterr().out
    assert out.startswith("preset mini: as asked; 6 steps; seed 4; model tiny (")
    assert "\r" not in out


def test_the_single_view_prior_makes_another_asset(model):
    arguments = ["a green chair", "--model", model, "--steps", "3", *SETTLED]
    digests = []
    for mode in ("3d", "2d"):
        assert command(*arguments, "--mode", mode) == 0
        assert json.loads((latest() / "config.json").read_text())["sds"]["mode"] == mode
        digests.append((digest(latest()), (latest() / "views.png").read_bytes()))
    assert digests[0][0] != digests[1][0]
    assert digests[0][1] != digests[1][1]  # what is shown first is drawn in that mode, too


@pytest.mark.parametrize("mode", ["3d", "2d"])
def test_a_learner_beside_the_model(mode, model):
    """At ProlificDreamer's scale unless another is asked for, and as the run was begun where it goes on."""
    arguments = ["a green chair", "--model", model, "--steps", "3", *SETTLED, "--guidance", "vsd", "--mode", mode]
    assert command(*arguments, "--particles", "2", "--lora-rank", "3", "--guidance-scale", "5") == 0
    settings = json.loads((latest() / "config.json").read_text())["sds"]
    assert (settings["kind"], settings["particles"], settings["lora_rank"]) == ("vsd", 2, 3)
    assert settings["guidance_scale"] == 5.0
    assert (latest() / "mesh.glb").exists()
    assert Asset.load(latest() / "asset.safetensors").prompt == "a green chair"  # one asset, not two
    assert command("--resume", str(latest()), "--guidance", "vsd") == 0
    assert command("--resume", str(latest()), "--guidance", "sds") == 2


def test_reconstruction_shares_the_loop(model):
    arguments = ["--method", "reconstruct", "--n-views", "3", "--steps", "4", *SETTLED]
    assert command("--prompt", "a red car", "--model", model, *arguments) == 0
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
        (["a chair", "--render-size", "4000"], 2, "--render-size must be at most 1024, got 4000"),
        (["a chair", "--rescale", "2"], 2, "--rescale must be at most 1, got 2.0"),
        (["a chair", "--fovy-range-deg", "50", "20"], 2, "--fovy-range-deg must be low, then high, got 50.0 and 20.0"),
        (["a chair", "--guidance-scale", "nan"], 2, "--guidance-scale must be a finite number, got nan"),
        (["a chair", "--lr", "-1"], 2, "--lr must be greater than 0, got -1.0"),
        (["a chair", "--preset", "huge"], 2, ""),
        (["a chair", "--texture", "3"], 2, "--texture must be at least 16, got 3"),
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
def test_the_model_may_compute_in_half_precision(dtype, model, capsys):
    """What auto means depends on the machine; both halves run on all of them, and the volume stays in float32."""
    assert command("a green chair", "--model", model, "--steps", "2", "--seed", "4", *SETTLED, "--dtype", dtype) == 0
    assert f" on cpu in {dtype}\n" in capsys.readouterr().out
    records = [json.loads(line) for line in (latest() / "log.jsonl").read_text().splitlines()]
    assert all(0 < record["loss"] < 1e6 for record in records)
    asset = Asset.load(latest() / "asset.safetensors")
    assert {tensor.dtype for tensor in asset.state().values() if tensor.is_floating_point()} == {torch.float32}


def test_a_run_can_be_made_again_from_its_own_configuration(model, capsys):
    extra = ["--texture", "32", "--faces", "200", "--formats", "obj", "ply", "--up", "z"]
    assert command("a red car", "--model", model, "--steps", "3", "--seed", "2", *SETTLED, *extra) == 0
    first = latest()
    made = {path.name for path in first.iterdir()}
    assert made >= {"mesh.glb", "mesh.obj", "mesh.mtl", "mesh_texture.png", "mesh.ply"}
    assert trimesh.load(first / "mesh.obj").visual.material.image.size == (32, 32)
    body = trimesh.load(first / "mesh.glb", force="mesh")
    assert body.visual.material.baseColorTexture.size == (32, 32)
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


def test_a_file_of_prompts_ends_with_a_summary(model, capsys):
    lines = ['{"prompt": "a red car", "seed": 1}', '{"prompt": "a zyxw chair", "steps": 2}']
    Path("prompts.jsonl").write_text("\n".join(lines))
    assert command("--prompts-file", "prompts.jsonl", "--model", model, "--steps", "3", *SETTLED) == 0
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


def test_one_bad_line_stops_all_runs_before_the_first(model, capsys):
    Path("prompts.jsonl").write_text('"a red car"\n{"prompt": ""}\n')
    assert command("--prompts-file", "prompts.jsonl", "--model", model) == 2
    assert "line 2: the prompt is empty" in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_a_run_that_fails_does_not_stop_the_next_ones(model, capsys, monkeypatch):
    plain = sds.optimise

    def optimise(pipeline, request, *rest):
        if request.seed == 1:
            raise DivergedError("it left the finite numbers")
        return plain(pipeline, request, *rest)

    monkeypatch.setattr(sds, "optimise", optimise)
    Path("prompts.jsonl").write_text('{"prompt": "a red car", "seed": 1}\n"a green chair"\n')
    assert command("--prompts-file", "prompts.jsonl", "--model", model, "--steps", "2", *SETTLED) == 6
    captured = capsys.readouterr()
    assert "sds: 'a red car': it left the finite numbers" in captured.err
    assert "failed (DivergedError, 6)" in captured.out
    assert (latest() / "mesh.glb").exists()


def test_words_that_do_not_fit_are_named(model, capsys):
    prompt = "a green chair " * 5 + "and a red car"
    assert command(prompt, "--model", model, "--steps", "1", *SETTLED) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "the prompt has more than 10 tokens and is cut: not seen" in first
    assert "'car'" in first


def test_not_enough_memory_is_4_and_leaves_nothing(model, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: (1 << 20, "free on this machine"))
    assert command("a red car", "--model", model, *SETTLED) == 4
    assert "this run needs about" in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_a_run_that_diverges_is_6_and_leaves_a_report(model, capsys, monkeypatch):
    plain = ScoreDistillation._encode
    monkeypatch.setattr(ScoreDistillation, "_encode", lambda *arguments: plain(*arguments) * float("nan"))
    assert command("a red car", "--model", model, "--steps", "30", *SETTLED) == 6
    captured = capsys.readouterr()
    assert "not finite, again after a recovery" in captured.err
    assert "step 11: 10 steps gave numbers that are not finite" in captured.out
    assert "The run did not finish" in (latest() / "report.html").read_text()
    records = [json.loads(line) for line in (latest() / "log.jsonl").read_text().splitlines()]
    assert all(r["loss"] is None and r["skipped"] for r in records)


def test_a_full_disk_is_7_and_keeps_the_last_checkpoint(model, capsys, monkeypatch):
    plain, saved = run_folder.save_checkpoint, []

    def save(folder, step, *rest, **options):
        if saved:
            raise OutputError(f"cannot write {folder}: No space left on device")
        saved.append(step)
        return plain(folder, step, *rest, **options)

    arguments = ["a red car", "--model", model, "--steps", "6", *SETTLED, "--checkpoint-every", "2"]
    with monkeypatch.context() as full:
        full.setattr(run_folder, "save_checkpoint", save)
        assert command(*arguments) == 7
    assert "No space left on device" in capsys.readouterr().err
    assert run_folder.load_latest(latest() / "ckpt")[0] == 2
    whole = uninterrupted(arguments)
    assert command("--resume", "latest", *QUICK) == 0
    assert digest(latest()) == whole


@pytest.fixture
def begun(model) -> Path:
    """A run that is done to the last of its two steps."""
    assert command("a red car", "--model", model, "--steps", "2", "--seed", "5", *SETTLED) == 0
    return latest()


def test_a_resume_obeys_what_it_can_and_says_so(begun):
    """The mesh is made as asked, config.json has it, and where and from what it was changed."""
    before = json.loads((begun / "config.json").read_text())
    assert before["export"]["texture"] is None
    assert (before["machine"]["device"], before["machine"]["dtype"]) == ("cpu", "float32")
    again = ["--steps", "2", "--seed", "5", "--preset", "mini", "--lr", "0.01"]  # as it is: no contradiction
    assert command("--resume", "latest", "--texture", "32", "--formats", "obj", *again, *QUICK) == 0
    after = json.loads((begun / "config.json").read_text())
    assert (after["export"]["texture"], after["export"]["formats"]) == (32, ["obj"])
    assert (begun / "mesh.obj").exists()
    assert trimesh.load(begun / "mesh.glb", force="mesh").visual.material.baseColorTexture.size == (32, 32)
    assert after["sds"] == before["sds"]
    (session,) = after["resumed"]
    assert (session["step"], session["machine"]["dtype"]) == (2, "float32")
    assert session["before"] == {"export": {"texture": None, "formats": ["glb"]}}


def test_a_resume_refuses_what_would_be_another_run(begun, capsys):
    """The issue's example, and every other flag that says what a run is; nothing is touched."""
    config = (begun / "config.json").read_bytes()
    for flags, told in (
        (["--steps", "20", "--guidance-scale", "3"],
         "--steps 2 --guidance-scale 7.5, as the run was begun, got --steps 20 --guidance-scale 3.0"),
        (["--seed", "0"], "--seed 5, as the run was begun, got --seed 0"),  # the default, but asked for
        (["--seed", "random"], "got --seed random"),
        (["--preset", "fast"], "--preset mini, as the run was begun, got --preset fast"),
        (["--model", "embedded"], "got --model embedded"),
        (["--method", "reconstruct"], "--method sds, as the run was begun, got --method reconstruct"),
        (["--mode", "2d"], "got --mode 2d"),
        (["--n-views", "8"], "--n-views 4, as the run was begun, got --n-views 8"),
        (["--render-size", "16"], "--render-size 8, as the run was begun, got --render-size 16"),
        (["--negative-prompt", "ugly"], "--negative-prompt '', as the run was begun, got --negative-prompt ugly"),
        (["--rescale", "0.1"], "got --rescale 0.1"),
        (["--lr", "0.5"], "--lr 0.01, as the run was begun, got --lr 0.5"),
        (["--elevation-range-deg", "0", "10"], "got --elevation-range-deg 0.0 10.0"),
        (["--fovy-range-deg", "20", "30"], "got --fovy-range-deg 20.0 30.0"),
        (["--shading"], "--shading False, as the run was begun, got --shading True"),
        (["--recipe", "prolificdreamer"], "got --recipe prolificdreamer"),
        (["--guidance", "vsd"], "--guidance sds, as the run was begun, got --guidance vsd"),
        (["--loss", "sds"], "--loss x0, as the run was begun, got --loss sds"),
        (["--guided-from", "cond"], "--guided-from uncond, as the run was begun, got --guided-from cond"),
        (["--timesteps", "each"], "--timesteps shared, as the run was begun, got --timesteps each"),
        (["--view-words"], "got --view-words True"),
        (["--lora-rank", "8"], "--lora-rank 4, as the run was begun, got --lora-rank 8"),
        (["--lora-lr", "0.1"], "got --lora-lr 0.1"),
        (["--particles", "2"], "--particles 1, as the run was begun, got --particles 2"),
        (["--weighting", "uniform"], "--weighting sds, as the run was begun, got --weighting uniform"),
        (["--perp-neg"], "--perp-neg False, as the run was begun, got --perp-neg True"),
        (["-o", "elsewhere"], "-o must be left out, or be the folder of --resume"),
    ):  # fmt: skip
        assert command("--resume", str(begun), *flags) == 2
        assert told in capsys.readouterr().err
    known = {name for flags, _ in [(sds.Flags(), "")] for name in vars(flags)}
    assert known - set(sds.HOW) - {"given", "prompt", "faces", "mesh_resolution", "texture", "formats", "up"} == {
        "steps",
        "guidance_scale",
        "seed",
        "preset",
        "model",
        "method",
        "mode",
        "n_views",
        "render_size",
        "negative_prompt",
        "rescale",
        "lr",
        "elevation_range_deg",
        "fovy_range_deg",
        "shading",
        "recipe",
        "guidance",
        "loss",
        "guided_from",
        "timesteps",
        "view_words",
        "lora_rank",
        "lora_lr",
        "particles",
        "weighting",
        "perp_neg",
    }  # fmt: skip (a new flag needs a line above)
    assert (begun / "config.json").read_bytes() == config


def test_a_run_that_is_in_use_is_not_resumed(begun, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path; from mvdream_fast.core import run_folder\n"
         "with run_folder.locked(Path(sys.argv[1])): print(1, flush=True); time.sleep(600)", begun],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout.readline() == b"1\n"
    config = (begun / "config.json").read_bytes()
    assert command("--resume", "latest", *QUICK) == 7
    assert f"is in use by process {holder.pid}; wait until it is done, or stop it first" in capsys.readouterr().err
    assert (begun / "config.json").read_bytes() == config
    holder.kill()
    holder.communicate()
    assert command("--resume", "latest", *QUICK) == 0


def test_o_is_the_folder_of_the_run(model, capsys):
    assert command("a red car", "--model", model, "--steps", "1", "-o", "mine", *SETTLED) == 0
    assert {"mesh.glb", "config.json"} <= {path.name for path in Path("mine").iterdir()}
    assert not Path("outputs").exists()
    assert command("a red car", "--model", model, "--steps", "1", "-o", "mine", *SETTLED) == 7
    assert "exists and is not empty; name another with -o" in capsys.readouterr().err
    assert command("--resume", "latest", "-o", "mine", *QUICK) == 0
    assert command("a red car", "--model", model, "--steps", "1", "--root", "all", *SETTLED) == 0
    assert (Path("all/latest") / "mesh.glb").exists()


def test_random_seed_and_live_page_are_told(model, capsys):
    arguments = ["--steps", "2", "--seed", "random", "--viewer", *SETTLED]
    assert command("a red car", "--model", model, *arguments) == 0
    seed = json.loads((latest() / "config.json").read_text())["seed"]
    out = capsys.readouterr().out
    assert f"seed {seed};" in out
    port = re.search(r"^live view: http://127\.0\.0\.1:(\d+) \(.*ssh -L ", out, re.MULTILINE).group(1)
    with pytest.raises(ConnectionRefusedError):  # it has closed with the run
        socket.create_connection(("127.0.0.1", int(port)), timeout=5)


def start(*arguments: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "mvdream_fast.sds", *arguments]
    # A test run in the background of a shell hands an ignored SIGINT down to its children.
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore)


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    log = Path("outputs/latest/log.jsonl")
    while process.poll() is None and not (log.exists() and f'{{"step": {step},' in log.read_text()):
        time.sleep(0.02)


def uninterrupted(arguments: list[str]) -> str:
    """The digest of the same run without trouble, made where `outputs/latest` does not point to."""
    assert command(*arguments, "-o", "whole") == 0
    return digest(Path("whole"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_reports_and_the_rest_is_the_same(model, number, code):
    asked = ["a green chair", "--model", model, "--steps", "40", *SETTLED]
    whole = uninterrupted(asked)
    process = start(*asked)
    wait_for_step(process, 3)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code
    assert "go on with --resume" in errors
    folder = latest()
    assert "was stopped before its end" in (folder / "report.html").read_text()
    assert not (folder / "mesh.glb").exists()
    assert command("--resume", "latest", *QUICK) == 0
    assert latest() == folder
    assert digest(folder) == whole


def kill_campaign(model: str, kills: int) -> None:
    """Kills a run at random moments, resuming each time; it must end with the bytes of an uninterrupted run."""
    every = ["--checkpoint-every", "5"]
    asked = ["a red car", "--model", model, "--steps", "60", *SETTLED, *every]
    whole = uninterrupted(asked)
    draw = random.Random(0)
    process = start(*asked)
    wait_for_step(process, 6)
    for _ in range(kills):
        process.kill()
        process.communicate()
        process = start("--resume", "latest", *QUICK, *every)
        time.sleep(draw.uniform(2.0, 6.0))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert digest(latest()) == whole
    steps = [json.loads(line)["step"] for line in (latest() / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(60))


def test_killed_twice_it_ends_with_the_same_bytes(model):
    kill_campaign(model, 2)


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_bytes(model):
    kill_campaign(model, 10)
