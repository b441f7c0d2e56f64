"""The batch command with work that costs next to nothing: a chain of digests, a link a step, with checkpoints. What
comes out shows whether every step was made once and in order, wherever it was made."""

import hashlib
import sys
import time

from mvdream_fast import batch
from mvdream_fast.core import cli
from mvdream_fast.core.files import atomic_write
from mvdream_fast.jobs.setup import Setup
from mvdream_fast.jobs.worker import Runner, Task

STEPS, EVERY, STEP_S = 40, 8, 0.2


def link(chain: str, step: int) -> str:
    return hashlib.sha256(f"{chain} {step}".encode()).hexdigest()


def whole(job_id: str) -> str:
    """The chain of a job that nothing disturbed."""
    chain = job_id
    for step in range(STEPS):
        chain = link(chain, step)
    return chain


def count(task: Task) -> dict | None:
    saved = task.folder / "ckpt"
    step, chain = saved.read_text().split() if saved.exists() else ("0", task.job.id)
    for done in range(int(step) + 1, STEPS + 1):
        chain = link(chain, done - 1)
        time.sleep(STEP_S)
        task.report(done, STEPS, "")
        if done % EVERY == 0 or task.stop.requested is not None:
            atomic_write(saved, f"{done} {chain}")
            task.save()
        if task.stop.requested is not None and done < STEPS:
            return None
    atomic_write(task.folder / "asset", chain)
    return {}


def runners(_: Setup) -> dict[str, Runner]:
    return {"sds": count}


if __name__ == "__main__":
    batch.RUNNERS = "reference.counting_jobs:runners"
    cli.run(batch.main, batch.Flags, prog="batch", argv=sys.argv[1:])
