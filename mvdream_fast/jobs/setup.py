"""What a worker is told, wherever it runs: as a process of this machine (local.py), as an actor of Ray (on_ray.py)."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.jobs.queue import EXPIRY_S, Queue
from mvdream_fast.jobs.store import open_store

CLEAR = "\r\033[K"  # a terminal's line


@dataclass(frozen=True)
class Setup:
    """Plain values, which travel to other processes and machines.

    place: of the queue. runners: "module:function", of this set-up, gives a function for each kind of job. forever:
    workers wait for new jobs when all are done. quiet: they say nothing of what they have done.
    """

    place: str
    runners: str = "mvdream_fast.jobs.making:runners"
    device: str = "auto"
    dtype: str = "auto"
    graphs: bool = True
    threads: int = 1
    checkpoint_every: int = 100
    expiry: float = EXPIRY_S
    forever: bool = False
    quiet: bool = False

    def queue(self) -> Queue:
        """The queue, opened in this process."""
        return Queue(open_store(self.place), self.expiry)


def sayer(quiet: bool) -> Callable[[str], None]:
    """Prints a line, over one of progress that may stand there; nothing where `quiet`."""
    before = CLEAR if sys.stdout.isatty() else ""
    return (lambda _: None) if quiet else (lambda line: print(f"{before}{line}", flush=True))


def run_worker(setup: Setup, name: str, stop: Interrupt) -> None:
    """One worker, until all is done or `stop` is requested."""
    os.environ["OMP_NUM_THREADS"] = str(setup.threads)  # before torch is imported
    from mvdream_fast.core import cli
    from mvdream_fast.jobs.worker import work

    cli.set_threads(setup.threads)
    module, _, function = setup.runners.partition(":")
    runners = getattr(importlib.import_module(module), function)(setup)
    work(setup.queue(), runners, name, stop, say=sayer(setup.quiet), forever=setup.forever)
