"""The sds command end to end with a tiny model: what it leaves behind, exit codes, resume to the byte, kills."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trimesh
from PIL import Image
from reference.random_model import random_model

from mvdream_fast import cli, sds
from mvdream_fast.field.asset import Asset
from mvdream_fast.models.checkpoint import save_model

QUICK = ["--render-size", "8", "--mesh-resolution", "24", "--device", "cpu", "--threads", "1"]
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
        "config.json", "cmd.txt", "env.json", "log.jsonl", "ckpt", "preview", "views.png", "asset.safetensors",
        "mesh.glb", "turntable.webp", "report.html",
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
    assert out.startswith("preset mini: as asked; 6 steps; seed 4\n")
    assert "\r" not in out


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
        (["a chair", "--steps", "0"], 2, "--steps must be at least 1"),
        (["a chair", "--render-size", "4000"], 2, "--render-size must be 8 to 1024"),
        (["a chair", "--rescale", "2"], 2, "--rescale must be within 0 and 1"),
        (["a chair", "--fovy-range-deg", "50", "20"], 2, "--fovy-range-deg must be two angles"),
        (["a chair", "--guidance-scale", "nan"], 2, "--guidance-scale must be"),
        (["a chair", "--lr", "-1"], 2, "--lr must be"),
        (["a chair", "--preset", "huge"], 2, ""),
        (["a chair", "--model", "nowhere"], 3, "nowhere"),
        (["--resume", "nowhere"], 2, "--resume must name a run folder"),
        (["--resume", "."], 5, "not the configuration of an sds run"),
        (["a chair", "-o", "file/below"], 7, "cannot create the run folder"),
    ],
)
def test_wrong_use_is_one_sentence_and_a_code(arguments, code, message, capsys):
    Path("file").touch()
    assert command(*arguments) == code
    captured = capsys.readouterr().err
    assert message in captured
    assert "Traceback" not in captured


def test_random_seed_is_told(model, capsys):
    assert command("a red car", "--model", model, "--steps", "2", "--seed", "random", *SETTLED) == 0
    seed = json.loads((latest() / "config.json").read_text())["seed"]
    assert f"seed {seed}\n" in capsys.readouterr().out


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
    return digest(Path("whole/latest").resolve())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_reports_and_the_rest_is_the_same(model, number, code):
    run = ["a green chair", "--model", model, "--steps", "40", *SETTLED]
    whole = uninterrupted(run)
    process = start(*run)
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
    run = ["a red car", "--model", model, "--steps", "60", *SETTLED, *every]
    whole = uninterrupted(run)
    draw = random.Random(0)
    process = start(*run)
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
