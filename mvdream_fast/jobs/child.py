"""A process that a worker starts for a job: one of this package's commands, which is told to stop when the job is, and
dies with the worker. What a kind of job asks of it is that kind's own."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from tempfile import TemporaryFile
from typing import Any

from mvdream_fast.core.errors import OutOfMemoryError, UserError
from mvdream_fast.core.files import lines
from mvdream_fast.jobs.worker import Task

POLL_S = 0.2  # between two looks at it
_ERRORS = {e.exit_code: e for e in UserError.__subclasses__() if "exit_code" in vars(e)}
_SET_DEATH_SIGNAL = 1  # of prctl


def as_flag(name: str, value: Any) -> str:
    """A field as a flag."""
    flag = name.replace("_", "-")
    return f"--{flag}={value}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}"


def run_child(verb: str, arguments: Sequence[str], task: Task, tell: Callable[[], None]) -> bool:
    """Runs `python -m mvdream_fast.<verb>` until it ends. False where the job was stopped, and the process with it.

    Args: tell, called now and then, reports how far it is. Raises: the error that its exit code stands for, with the
    last line of its errors. What kills a process without a word is most likely the system, for want of memory.
    """
    with TemporaryFile() as errors:  # not in the task's folder: that is the command's own, which asks for an empty one
        child = subprocess.Popen(
            [sys.executable, "-m", f"mvdream_fast.{verb}", *arguments], stdout=subprocess.DEVNULL, stderr=errors,
            preexec_fn=_dies_with_this_process(),
        )  # fmt: skip
        try:
            while child.poll() is None and task.stop.requested is None:
                tell()
                _wait(child)
        finally:
            child.terminate()  # it saves, and ends its own
            code = child.wait()
        errors.seek(0)
        told = _last_line(errors.read().decode(errors="replace")).removeprefix(f"{verb}: ")
    if task.stop.requested is not None:
        return False
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise OutOfMemoryError(f"{verb} was killed; out of memory, perhaps: take fewer workers, or a smaller model")
    if code:
        raise _ERRORS.get(code, UserError)(told or f"{verb} ended with the code {code}")
    return True


def _wait(child: subprocess.Popen) -> None:
    try:
        child.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return


def _dies_with_this_process() -> Callable[[], None] | None:
    """Linux: what a new process does first, so that a worker that is killed takes it along.

    All that it needs is loaded before the fork: after it, another thread's lock may be held for ever.
    """
    if sys.platform != "linux":
        return None
    return partial(_die_with, os.getpid(), ctypes.CDLL(None).prctl)


def _die_with(parent: int, prctl: Callable[[int, int], int]) -> None:
    prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before that was asked
        os._exit(1)


def _last_line(text: str) -> str:
    """The last line that says anything, "" where there is none."""
    return next((line.strip() for line in reversed([*lines(text)]) if line.strip()), "")
