"""The parts of a rendering as jobs of the kind "render": each is `render --shard i/n` in a process of its own.

What it writes lies in the data set, not in the queue, and is kept as it grows: whichever worker takes a part goes on
where another one stopped. The queue is the folder `queue` of the data set.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.jobs import local, on_ray
from mvdream_fast.jobs.child import as_flag, run_child
from mvdream_fast.jobs.job import Job
from mvdream_fast.jobs.setup import Setup
from mvdream_fast.jobs.watch import Watch, failures
from mvdream_fast.jobs.worker import Runner, Task

KIND, QUEUE = "render", "queue"


def render_parts(flags: dict[str, Any], out: Path, n: int, threads: int, ray: str | None) -> int:
    """Puts `n` parts of a rendering into the queue of `out` and tends workers until all are done: one on this machine,
    or on Ray as many as have `threads` cores. Returns the exit code: that of the first part that failed.

    Args: flags, of `render` by field, those that are the same for every part. Raises: UserError.
    """
    setup = Setup(str(out / QUEUE), f"{__name__}:runners", device="cpu", threads=threads)
    queue, jobs = setup.queue(), part_jobs(flags, out, n)
    queue.ask(*jobs)
    say = partial(print, flush=True)
    crew = local.Workers(setup, [local.Slot("cpu")], say) if ray is None else on_ray.Cluster(setup, ray, None, say)
    with Interrupt() as interrupt:
        Watch(queue, say, live=sys.stdout.isatty()).tend(crew, interrupt)
    if interrupt.requested is not None:
        print("render: stopped; the same command goes on", file=sys.stderr)
        return interrupt.exit_code
    return failures(queue, {job.id for job in jobs}, KIND)


def part_jobs(flags: dict[str, Any], out: Path, n: int) -> list[Job]:
    """A job for each part."""
    return [Job(KIND, {**flags, "out": str(out), "shard": f"{i}/{n}"}) for i in range(1, n + 1)]


def runners(setup: Setup) -> dict[str, Runner]:
    """As a worker asks for them."""
    return {KIND: partial(rendered, threads=setup.threads)}


def rendered(task: Task, threads: int) -> dict[str, Any] | None:
    """One part. Raises what its process ended with, with the last line of its errors."""
    request = task.job.request
    flags = [as_flag(name, value) for name, value in request.items() if name != "source"]

    def tell() -> None:
        task.report(0, 1, f"part {request['shard']}")

    ended = run_child("render", [request["source"], f"--workers={threads}", *flags], task, tell)
    return {"part": request["shard"]} if ended else None
