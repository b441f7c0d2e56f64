"""The parts of a rendering as jobs of the kind "render": each is `render --shard i/n` in a process of its own.

What it writes lies in the data set, not in the queue, and is kept as it grows: whichever worker takes a part goes on
where another one stopped. The queue is the folder `queue` of the data set.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from mvdream_fast.core.errors import ArgumentError, InputFileError, OutOfMemoryError, OutputError, UserError
from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.jobs import local, on_ray
from mvdream_fast.jobs.job import Job
from mvdream_fast.jobs.last_words import last_words
from mvdream_fast.jobs.setup import Setup
from mvdream_fast.jobs.watch import Watch, failures
from mvdream_fast.jobs.worker import Runner, Task

KIND, QUEUE = "render", "queue"
POLL_S = 0.2
ERRORS = {e.exit_code: e for e in (ArgumentError, OutOfMemoryError, InputFileError, OutputError)}


def render_parts(flags: dict[str, Any], out: Path, n: int, threads: int, ray: str | None) -> int:
    """Puts `n` parts of a rendering into the queue of `out` and tends workers until all are done: one on this machine,
    or on Ray as many as have `threads` cores. Returns the exit code: that of the first part that failed.

    Args: flags, of `render` by field, those that are the same for every part. Raises: UserError.
    """
    setup = Setup(str(out / QUEUE), f"{__name__}:runners", device="cpu", threads=threads)
    queue, jobs = setup.queue(), part_jobs(flags, out, n)
    queue.add(*jobs)
    for job in jobs:
        queue.retry(job.id)
    say = partial(print, flush=True)
    crew = local.Workers(setup, [local.Slot("cpu")], say) if ray is None else on_ray.Cluster(setup, ray, None, say)
    with Interrupt() as interrupt:
        Watch(queue, say, live=sys.stdout.isatty()).tend(crew, interrupt)
    if interrupt.requested is not None:
        print("render: stopped; the same command goes on", file=sys.stderr)
        return interrupt.exit_code
    return failures(queue, {job.id for job in jobs})


def part_jobs(flags: dict[str, Any], out: Path, n: int) -> list[Job]:
    """A job for each part."""
    return [Job(KIND, {**flags, "out": str(out), "shard": f"{i}/{n}"}) for i in range(1, n + 1)]


def runners(setup: Setup) -> dict[str, Runner]:
    """As a worker asks for them."""
    return {KIND: partial(rendered, threads=setup.threads)}


def rendered(task: Task, threads: int) -> dict[str, Any] | None:
    """One part. Raises what its process ended with, with the last line of its errors."""
    request = task.job.request
    task.report(0, 1, f"part {request['shard']}")
    command = [sys.executable, "-m", "mvdream_fast.render", request["source"], f"--workers={threads}"]
    command += [_word(name, value) for name, value in request.items() if name != "source"]
    with open(task.folder / "errors.txt", "wb") as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while child.poll() is None and task.stop.requested is None:
                task.report(0, 1, f"part {request['shard']}")
                _wait(child)
        finally:
            child.terminate()  # it ends its own, and what it has drawn stays
            code = child.wait()
    if task.stop.requested is not None:
        return None
    if code:
        told = last_words(task.folder / "errors.txt", "render")
        raise ERRORS.get(code, UserError)(told or f"ended with code {code}")
    return {"part": request["shard"]}


def _word(name: str, value: Any) -> str:
    """A field as a flag."""
    flag = name.replace("_", "-")
    return f"--{flag}={value}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}"


def _wait(child: subprocess.Popen) -> None:
    try:
        child.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return
