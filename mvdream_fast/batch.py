"""`python -m mvdream_fast.batch prompts.jsonl -o OUT`: many prompts become assets, on all the devices there are."""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mvdream_fast.core import cli
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.distill.config import RecipeName

if TYPE_CHECKING:
    from mvdream_fast.jobs.job import Job
    from mvdream_fast.jobs.setup import Setup
    from mvdream_fast.jobs.watch import Crew

Say = Callable[[str], None]


@dataclass(frozen=True)
class Flags:
    """Makes an asset of every line of a file of prompts: OUT/assets/<prompt>-<id>/, as sds leaves its folder.

    The same command again makes what is missing: finished assets stay, others go on from their checkpoint, also those
    that failed or were cancelled.
    Several such commands on the same OUT share the work. OUT/index.html shows all assets, OUT/progress.html what is at
    work. The exit code is that of the first prompt that failed in the end (1 where the reason has no code), else 0.
    """

    prompts: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPTS")]
    """A JSONL file: a line is {"prompt": "a red chair", "seed": 1}, with whatever sds --prompts-file knows; or
    {"prompt": "a photo of a sks chair", "photos": "chair/"}, to teach the model the subject of a folder of photos."""
    output: Annotated[cli.Place | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where all is kept: a folder, new or one to go on with, which machines may share, or a URL of an object store that
    fsspec knows, such as s3://bucket/name. Needed."""
    config: Path | None = None
    """A settings file of sds (TOML) for every prompt; flags win over it, lines over both."""
    model: cli.Model | None = None
    """As for sds; so are the flags down to --up."""
    refine_model: cli.Model | None = None
    recipe: RecipeName | None = None
    preset: Literal["auto", "mini", "fast", "paper"] = "auto"
    steps: int | None = None
    render_size: int | None = None
    faces: int | None = None
    mesh_resolution: int | None = None
    texture: int | None = None
    formats: tuple[Literal["glb", "obj", "ply"], ...] | None = None
    up: Literal["y", "z"] | None = None
    retries: int = 0
    """How often a prompt that failed is tried again, from its checkpoint."""
    workers: int | None = None
    """Processes. Default: one for each GPU that --device names; without GPUs as many as cores and memory allow."""
    threads: int | None = None
    """CPU threads of each. Default: the cores shared out. An asset's bytes may depend on it."""
    ray: str | None = None
    """Workers on a Ray cluster (extra "cluster") instead: the head's address, "auto" for what `ray start` has set up on
    this machine, or "local" for one of its own. All nodes must reach OUT and the photos under the same name."""
    checkpoint_every: int = 100
    """Steps between checkpoints; a worker that dies loses the steps since."""
    expiry: float = 60.0
    """Seconds without a word after which a worker of another machine counts as dead, and its work goes to others."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the UNet's weights."""
    graphs: bool = True
    """CUDA graphs on a GPU."""
    quiet: bool = False
    """Prints failures only."""
    given: cli.Given = frozenset()


# Flags that say how and where, not what.
HOW = ("prompts", "output", "config", "retries", "workers", "threads", "ray", "checkpoint_every", "expiry", "device",
       "dtype", "graphs", "quiet")  # fmt: skip
RUNNERS = "mvdream_fast.jobs.making:runners"  # of a worker's functions by kind: see Setup
WHAT = ("model", "refine_model", "sds")  # of a request, what memory depends on


def main(flags: Flags) -> None:
    """Checks everything, puts the prompts into the queue and tends the workers. Exits with the code of `Flags`."""
    check_flags(flags)
    from mvdream_fast.core.run_folder import Interrupt
    from mvdream_fast.distill import settings_file
    from mvdream_fast.jobs.plan import read_jobs
    from mvdream_fast.jobs.setup import sayer
    from mvdream_fast.jobs.watch import Watch, failures

    say = sayer(flags.quiet)
    file = settings_file.read_settings(flags.config) if flags.config else None
    asked = {name: value for name, value in cli.given(flags).items() if name not in HOW}
    jobs = read_jobs(flags.prompts, asked, file, flags.retries)
    setup, crew = _crew(flags, jobs, say)
    queue = setup.queue()
    queue.ask(*jobs)
    with Interrupt() as interrupt:
        Watch(queue, say, live=sys.stdout.isatty() and not flags.quiet).tend(crew, interrupt)
    if interrupt.requested is not None:
        print("batch: stopped; the same command goes on", file=sys.stderr)
        sys.exit(interrupt.exit_code)
    if code := failures(queue, {job.id for job in jobs}, "batch"):
        sys.exit(code)


def check_flags(flags: Flags) -> None:
    """What is wrong with the flags by themselves. Raises ArgumentError."""
    if flags.output is None:
        raise ArgumentError("-o must name the folder of the assets, new or one to go on with, or a URL")
    from mvdream_fast.jobs.store import is_shared

    if not is_shared(flags.output):
        raise ArgumentError(
            f"-o must be a place that all workers reach, got {flags.output}, which each process has for itself; name a "
            "folder, or a URL such as s3://bucket/name"
        )
    cli.check_at_least(flags, 1, "steps", "workers", "threads", "checkpoint_every", "expiry")
    cli.check_at_least(flags, 0, "retries")
    if flags.ray is not None:
        from mvdream_fast.jobs.on_ray import check_installed

        check_installed()


def _crew(flags: Flags, jobs: "list[Job]", say: Say) -> "tuple[Setup, Crew]":
    """What workers are told, and the workers, not started."""
    from mvdream_fast.jobs import local, on_ray
    from mvdream_fast.jobs.setup import Setup
    from mvdream_fast.jobs.store import absolute

    setup = Setup(
        absolute(flags.output or ""), RUNNERS, flags.device, flags.dtype, flags.graphs, flags.threads or 1,
        flags.checkpoint_every, flags.expiry, quiet=flags.quiet,
    )  # fmt: skip
    if flags.ray is not None:
        return setup, on_ray.Cluster(setup, flags.ray, flags.workers, say)
    n_gpus, most = _room(flags, jobs)
    slots, threads = local.share_out(flags.device, n_gpus, flags.workers, flags.threads, most)
    setup = dataclasses.replace(setup, threads=threads)
    return setup, local.Workers(setup, slots[: len(jobs)], say)


def _room(flags: Flags, jobs: "list[Job]") -> tuple[int, int | None]:
    """The GPUs of this machine, and how many workers its memory holds where there are none. Refuses a model that is not
    there, and a run that will not fit even alone."""
    import torch

    from mvdream_fast.core import machine, memory
    from mvdream_fast.distill.request import run_of
    from mvdream_fast.jobs.asset import Device
    from mvdream_fast.jobs.plan import OF_JOB

    place, needs = Device(flags.device, flags.dtype, flags.graphs), [1]
    kinds = {json.dumps([job.request.get(name) for name in WHAT]): job for job in jobs if job.kind == "sds"}
    for job in kinds.values():
        if not str(job.request["model"]).startswith(OF_JOB):
            needs.append(place.refuse_what_does_not_fit([run_of(job.request, job.title)]))
    if machine.choose_device(flags.device).type == "cuda":
        return torch.cuda.device_count(), None
    size, _ = memory.available()
    return 0, None if size is None else max(1, size // max(needs))


if __name__ == "__main__":
    cli.run(main, Flags, prog="batch")
