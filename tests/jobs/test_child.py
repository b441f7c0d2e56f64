"""Processes that workers start: they die with their worker and stop with their job, and their last words are told."""

import functools
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from reference import until as waiting

from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import (
    ArgumentError,
    DivergedError,
    InputFileError,
    ModelError,
    OutOfMemoryError,
    OutputError,
    UserError,
)
from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.jobs import parts
from mvdream_fast.jobs.asset import Device
from mvdream_fast.jobs.child import as_flag, run_child
from mvdream_fast.jobs.job import Job
from mvdream_fast.jobs.making import Maker
from mvdream_fast.jobs.worker import Task

RUNNERS = {"render": lambda task: parts.rendered(task, 1), "dreambooth": lambda task: Maker(Device("cpu")).tuned(task)}
REQUESTS = {"render": {"source": "meshes", "shard": "1/2"}, "dreambooth": {"prompt": "a sks chair", "seed": 3}}
until = functools.partial(waiting.until, seconds=120.0)
KILLED = "{} was killed; out of memory, perhaps: take fewer workers, or a smaller model"
kinds = pytest.mark.parametrize("kind", RUNNERS)


@pytest.fixture
def python(tmp_path, monkeypatch):
    """python(script): what stands for Python in this test; the folder of `task` is the script's own."""

    def write(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


def task(folder: Path, kind: str, stop: Interrupt | None = None) -> Task:
    silent = lambda *_: None  # noqa: E731
    (folder / "work").mkdir(exist_ok=True)
    return Task(Job(kind, REQUESTS[kind]), folder / "work", stop or Interrupt(), silent, silent, silent, Path)


def works_until_it_is_killed(folder: str, kind: str) -> None:
    """The worker of the test below: its Python is that of the folder."""
    sys.executable = f"{folder}/python"
    RUNNERS[kind](task(Path(folder), kind))


@kinds
def test_a_worker_that_is_killed_takes_its_process_along(python, tmp_path, kind):
    worker_python = sys.executable
    python("echo $$ > number.new; mv number.new number; exec sleep 600")
    code = "import sys; sys.path[:0] = sys.argv[3:]; import test_child as t; t.works_until_it_is_killed(*sys.argv[1:3])"
    places = [str(Path(__file__).parent), *sys.path]
    worker = subprocess.Popen([worker_python, "-c", code, str(tmp_path), kind, *places])
    until((tmp_path / "number").exists)
    child = Path(f"/proc/{(tmp_path / 'number').read_text().strip()}")
    until(lambda: "sleep" in (child / "cmdline").read_text())  # the shell has become what it leads to
    assert worker.poll() is None
    worker.kill()
    worker.wait()
    until(lambda: not child.exists() or (child / "stat").read_text().rpartition(") ")[2].startswith("Z"))


@kinds
def test_a_process_whose_job_is_stopped_may_save(python, tmp_path, kind):
    python("trap 'touch saved; exit 130' TERM; touch begun; while true; do sleep 0.05; done")
    stop = Interrupt()
    thread = threading.Thread(target=lambda: (until((tmp_path / "begun").exists), request(stop)))
    thread.start()
    assert RUNNERS[kind](task(tmp_path, kind, stop)) is None
    thread.join()
    assert (tmp_path / "saved").exists()


def request(stop: Interrupt) -> None:
    stop.requested = signal.SIGTERM


@kinds
def test_a_process_is_asked_to_end_where_its_worker_has_an_error(python, tmp_path, kind):
    python("trap 'touch saved; exit 0' TERM; touch begun; while true; do sleep 0.05; done")

    def tell() -> None:
        if (tmp_path / "begun").exists():
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        run_child(kind, [], task(tmp_path, kind), tell)
    assert (tmp_path / "saved").exists()


@kinds
@pytest.mark.parametrize(
    ("script", "error", "told"),
    [
        ("echo first >&2; echo '{}: no photos' >&2; echo >&2; exit 5", InputFileError, "no photos"),
        ("echo '{}: 3 GB are missing' >&2; exit 4", OutOfMemoryError, "3 GB are missing"),
        ("exit 77", UserError, "{} ended with the code 77"),
        ("echo '{}: step 5' >&2; kill -9 $$", OutOfMemoryError, KILLED),
        ("exit 137", OutOfMemoryError, KILLED),
        ("kill -6 $$", UserError, "{} ended with the code -6"),
    ],
)
def test_what_a_process_says_last_is_why_its_job_failed(python, tmp_path, kind, script, error, told):
    python(script.format(kind))
    with pytest.raises(UserError) as raised:
        RUNNERS[kind](task(tmp_path, kind))
    assert (type(raised.value), str(raised.value)) == (error, told.format(kind))


@pytest.mark.parametrize(
    "error", [ArgumentError, ModelError, OutOfMemoryError, InputFileError, DivergedError, OutputError]
)
def test_every_documented_code_comes_back_as_its_error(python, tmp_path, error):
    python(f"echo 'dreambooth: so it is' >&2; exit {error.exit_code}")
    with pytest.raises(error, match="^so it is$"):
        RUNNERS["dreambooth"](task(tmp_path, "dreambooth"))


@kinds
def test_a_process_that_ends_well_was_given_the_job(python, tmp_path, kind):
    python('printf "%s\\n" "$@" > words')
    assert RUNNERS[kind](task(tmp_path, kind)) == {"render": {"part": "1/2"}, "dreambooth": {"model": "model"}}[kind]
    words = {
        "render": ["-m", "mvdream_fast.render", "meshes", "--workers=1", "--shard=1/2"],
        "dreambooth": ["-m", "mvdream_fast.dreambooth", "--seed=3", "--instance-prompt=a sks chair",
                       f"--output={tmp_path}/work", "--device=cpu"],
    }  # fmt: skip
    assert (tmp_path / "words").read_text().splitlines() == words[kind]


def test_a_tuning_that_was_begun_goes_on(python, tmp_path):
    python('printf "%s\\n" "$@" > words')
    begun = task(tmp_path, "dreambooth")
    (begun.folder / run_folder.RECORD).write_text("{}")
    assert Maker(Device("cpu"), threads=2).tuned(begun)
    assert (tmp_path / "words").read_text().splitlines()[2:] == [
        f"--resume={tmp_path}/work", "--device=cpu", "--threads=2"
    ]  # fmt: skip


def test_fields_as_flags():
    assert as_flag("max_train_steps", 3) == "--max-train-steps=3"
    assert as_flag("sheet", True) == "--sheet"
    assert as_flag("use_sheet", False) == "--no-use-sheet"
