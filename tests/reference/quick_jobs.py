"""The batch command in sizes of tests: a turn of few frames, few steps for the first views, no report; it is told whom
to kill, and which prompts fail. `python -m reference.quick_jobs` is `python -m mvdream_fast.batch` so."""

import contextlib
import dataclasses
import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path

from mvdream_fast import batch
from mvdream_fast.core import cli
from mvdream_fast.core.errors import DivergedError
from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.jobs.owner import this_process
from mvdream_fast.jobs.setup import Setup, run_worker
from mvdream_fast.jobs.store import open_store
from mvdream_fast.jobs.worker import Runner, Task

QUICK_RUN = ["--preset", "mini", "--render-size", "8", "--mesh-resolution", "24", "--device", "cpu", "--threads", "1",
             "--dtype", "float32"]  # fmt: skip
MADE = ("asset.safetensors", "mesh.glb", "turntable.webp", "views.png")
RUNNERS = "reference.quick_jobs:runners"


def runners(plan: Setup) -> dict[str, Runner]:
    """As making.runners, quick. A worker leaves its process number in PLACE.pids/; while there is a file PLACE.broken,
    prompts that hold the word fail."""
    from mvdream_fast.jobs import asset, making
    from mvdream_fast.pipeline import MVDreamPipeline
    from mvdream_fast.scene.asset import Asset

    Asset.turntable = partialmethod(Asset.turntable, n_frames=2)
    call = MVDreamPipeline.__call__
    MVDreamPipeline.__call__ = lambda *given, **named: call(*given, **named | {"n_steps": 2})
    asset.has_video = lambda: False
    asset.write_report = lambda *_: None
    if "://" not in plan.place:
        pids = Path(f"{plan.place}.pids")
        pids.mkdir(exist_ok=True)
        (pids / str(os.getpid())).write_text(this_process())
    plain = making.runners(plan)

    def made(task: Task) -> dict | None:
        if "broken" in task.job.title and Path(f"{plan.place}.broken").exists():
            raise DivergedError("it left the finite numbers")
        return plain["sds"](task)

    return {**plain, "sds": made}


def dying(plan: Setup) -> dict[str, Runner]:
    """A worker that dies right after its start."""
    os._exit(3)


def leaving(plan: Setup) -> dict[str, Runner]:
    """A worker that is told to leave while it makes its first job, as by who looks after a machine's memory."""

    def made(task: Task) -> dict | None:
        begun = task.folder / "begun"
        if begun.exists():
            return {}
        begun.touch()
        os.kill(os.getpid(), signal.SIGTERM)
        return None

    return {"leave": made}


def digests(place: Path | str) -> dict[str, str]:
    """Of each asset of a batch, what of it must not depend on how it was made."""
    store = open_store(place)
    made = {name: [store.read(f"assets/{name}/{file}") for file in MADE] for name in store.names("assets")}
    return {name: hashlib.sha256(b"".join(files)).hexdigest() for name, files in made.items()}


def command(*argv: str) -> int:
    """The exit code of the command, run in this process; its workers are others."""
    batch.RUNNERS, plain = RUNNERS, batch.RUNNERS
    try:
        cli.run(batch.main, batch.Flags, prog="batch", argv=[*argv])
    except SystemExit as stop:
        return stop.code or 0
    finally:
        batch.RUNNERS = plain
    return 0


def undisturbed(place: Path, jobs: list) -> dict[str, str]:
    """The digests of these jobs, made one after the other in this process, which nothing disturbs."""
    plan = Setup(str(place), RUNNERS, device="cpu", dtype="float32", quiet=True)
    plan.queue().add(*(dataclasses.replace(job, created=0.0) for job in jobs))
    with undone():
        run_worker(plan, "alone", Interrupt())
    return digests(place)


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """What `runners` replaces in this process is as before at the end."""
    from mvdream_fast.jobs import asset
    from mvdream_fast.pipeline import MVDreamPipeline
    from mvdream_fast.scene.asset import Asset

    changed = [(Asset, "turntable"), (MVDreamPipeline, "__call__"), (asset, "has_video"), (asset, "write_report")]
    before = [(owner, name, getattr(owner, name)) for owner, name in changed]
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


if __name__ == "__main__":
    sys.exit(command(*sys.argv[1:]))
