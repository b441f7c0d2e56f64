"""The serve command in sizes of tests: its workers learn a subject in two steps and grow an asset in as many, both in
a second or two. `python -m reference.quick_serve` is `python -m mvdream_fast.serve` so."""

from dataclasses import replace

from reference import quick_jobs

from mvdream_fast import serve
from mvdream_fast.core import cli
from mvdream_fast.jobs.worker import Runner, Task
from mvdream_fast.web import staff
from mvdream_fast.web.staff import Desk

STEPS = 2
SIZES = {"preset": "mini", "render_size": 8, "mesh_resolution": 24, "steps": STEPS}


def grows(setup: Desk) -> dict[str, Runner]:
    """As staff.grows, quick."""
    from mvdream_fast.distill.request import resolve

    known = quick_jobs.runners(setup)

    def asset(task: Task) -> dict | None:
        same = {name: task.job.request[name] for name in ("prompt", "seed", "model")}
        return known["sds"](_asked(task, resolve(same | SIZES).to_dict()))

    def learned(task: Task) -> dict | None:
        return known["dreambooth"](_asked(task, task.job.request | {"max_train_steps": STEPS}))

    return {"sds": asset, "dreambooth": learned}


def _asked(task: Task, request: dict) -> Task:
    return replace(task, job=replace(task.job, request=request))


if __name__ == "__main__":
    names = {"mvdream_fast.web.staff:grows": "reference.quick_serve:grows"}
    plain = staff.Workers
    staff.Workers = lambda desk, slots, say: plain(
        replace(desk, runners=names.get(desk.runners, desk.runners)), slots, say
    )  # fmt: skip
    cli.run(serve.main, serve.Flags, prog="serve")
