"""The sds command stopped by signals and killed: it ends with the bytes of a run that nothing disturbed."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reference.sds_command import QUICK, SETTLED, command, digest, latest, uninterrupted

pytestmark = pytest.mark.usefixtures("in_tmp")


def start(*arguments: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "mvdream_fast.sds", *arguments]
    # A test run in the background of a shell hands an ignored SIGINT down to its children.
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore)


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    log = Path("outputs/latest/log.jsonl")
    while process.poll() is None and not (log.exists() and f'{{"step": {step},' in log.read_text()):
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_reports_and_the_rest_is_the_same(tiny_model, number, code):
    asked = ["a green chair", "--model", tiny_model, "--steps", "40", *SETTLED]
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


def kill_campaign(tiny_model: str, kills: int, settled: list[str]) -> None:
    """Kills a run at random moments, resuming each time; it must end with the bytes of an uninterrupted run."""
    every = ["--checkpoint-every", "5"]
    asked = ["a red car", "--model", tiny_model, "--steps", "60", *settled, *every]
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


def test_killed_twice_it_ends_with_the_same_bytes(tiny_model):
    kill_campaign(tiny_model, 2, SETTLED)


def test_killed_twice_the_usual_recipe_ends_with_the_same_bytes(tiny_model):
    kill_campaign(tiny_model, 2, ["--preset", "mini", *QUICK])


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_bytes(tiny_model):
    kill_campaign(tiny_model, 10, SETTLED)
