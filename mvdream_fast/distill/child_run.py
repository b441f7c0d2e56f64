"""A text-to-3D run in a process of its own: begun or gone on with in its folder, its time and memory written down.

The folder is one that `sds` makes, with RESULT beside its record. No torch here: on Linux a child's peak memory is at
least what its parent had when it was started.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import ArgumentError, InputFileError
from mvdream_fast.core.files import atomic_write, make_folder, read_json
from mvdream_fast.core.schema import Checked, checked
from mvdream_fast.distill.request import MODELS, Request, is_same_model, read_run

RESULT = "result.json"


@dataclass(frozen=True)
class Result(Checked):
    """How a run went. seconds: of all its sessions together; peak_bytes: the largest resident memory of one.

    message: the last line of its errors, where the exit code is not 0.
    """

    exit_code: int
    seconds: float = 0.0
    peak_bytes: int = 0
    message: str = ""


def result_of(folder: Path) -> Result | None:
    """What a run left, None where none has ended there. Raises InputFileError."""
    path = folder / RESULT
    return checked(Result, read_json(path), str(path), InputFileError) if path.exists() else None


def check_same(folder: Path, request: Request) -> None:
    """Raises ArgumentError where a folder holds another run than is asked for, naming a setting that differs."""
    if not (folder / run_folder.RECORD).exists():
        return
    run = read_run(folder)
    has, wants = (r.settings() for r in (run, request))
    other = next((name for name, value in wants.items() if not _is_same(name, has.get(name), value)), None)
    if other is not None:
        raise ArgumentError(
            f"{folder} holds a run with {other} {has.get(other)}, but asked for is {wants[other]}; name another by -o"
        )


def _is_same(name: str, has: Any, wanted: Any) -> bool:
    if name in MODELS and isinstance(has, str):
        return is_same_model(has, wanted)
    return has == wanted


def run(folder: Path, begin: list[str], how: list[str], quiet: bool, interrupt: run_folder.Interrupt) -> Result:
    """A run that has not been finished, in `folder`: `sds` with the flags `begin`, or with --resume; with `how` always.

    A signal is handed on to the child, which saves and leaves. Its errors go to stderr as they come.
    """
    before = result_of(folder) or Result(0)
    if (folder / run_folder.RECORD).exists():
        what = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # what was killed before it was a run
        what = [*begin, "-o", str(folder)]
    command = [sys.executable, "-m", "mvdream_fast.sds", *what, *how]
    start = _now()
    output = subprocess.DEVNULL if quiet else None
    with subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True, start_new_session=True) as child:
        if child.stderr is None:
            raise AssertionError  # it was asked for
        with _handed_on(child, interrupt):
            last = _shown(child.stderr)
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    result = replace(
        before, exit_code=code, seconds=before.seconds + _now() - start,
        peak_bytes=max(before.peak_bytes, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)),
        message=last if code else "",
    )  # fmt: skip
    make_folder(folder)  # which a refused run leaves out
    atomic_write(folder / RESULT, json.dumps(asdict(result), indent=2) + "\n")
    return result


def _now() -> float:
    return os.times().elapsed


def _shown(lines: Iterable[str] | IO[str]) -> str:
    """Shows lines on stderr as they come, and returns the last that says anything."""
    last = ""
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
        last = line.strip() or last
    return last


@contextmanager
def _handed_on(child: subprocess.Popen, interrupt: run_folder.Interrupt) -> Generator[None]:
    """Signals that reach this process reach the child, too, which has a session of its own: once, not twice."""

    def hand_on(number: int, _: object) -> None:
        interrupt.requested = number
        if child.returncode is None:
            child.send_signal(number)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if interrupt.requested is not None:
            child.send_signal(interrupt.requested)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
