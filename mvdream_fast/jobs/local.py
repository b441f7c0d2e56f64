"""Workers as processes of this machine: one for each GPU, or for a few cores each. One that dies is started again."""

import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.context import SpawnProcess

from mvdream_fast.core.cli import share_cores
from mvdream_fast.core.errors import UserError
from mvdream_fast.core.machine import available_cores
from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.jobs.setup import Setup, run_worker

QUICK_DEATHS = 5  # of one worker, each within QUICK_S of its start, before it is not started again
QUICK_S = 20.0
GRACE_S = 120.0  # for a worker that was asked to save and to leave


@dataclass(frozen=True)
class Slot:
    """Where one worker runs: a device, and its own cores where all of the machine are shared out."""

    device: str
    cores: tuple[int, ...] = ()


def share_out(
    device: str, n_gpus: int, workers: int | None, threads: int | None, most: int | None = None
) -> tuple[list[Slot], int]:
    """The slots of this machine and the threads of each: a worker for each GPU, else for each core, or as asked.

    Args:
        device: as the flag says; a single one ("cuda:1") gets all workers, one unless more are asked for. n_gpus: of
            the machine, 0 where there is none.
        most: workers on a CPU where none are asked for, at most; None for as many as it has cores for.
    """
    cores = available_cores()
    names = [f"cuda:{i}" for i in range(n_gpus)]
    if names and ":" in device:
        names = [device]
    n = workers or len(names) or max(1, min(cores // (threads or 1), most or cores))
    threads = threads or max(1, cores // n)
    if names:
        return [Slot(names[i % len(names)]) for i in range(n)], threads
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if n * threads != len(mine):  # others may be at work on the rest
        return [Slot(device)] * n, threads
    return [Slot(device, tuple(mine[i * threads : (i + 1) * threads])) for i in range(n)], threads


class Workers:
    """One process for each slot, tended by whoever calls `tend` now and then."""

    def __init__(self, setup: Setup, slots: list[Slot], say: Callable[[str], None]):
        self._setup, self._slots, self._say = setup, slots, say
        self._context = multiprocessing.get_context("spawn")
        self.processes: list[SpawnProcess | None] = [None] * len(slots)
        self._started, self._deaths = [0.0] * len(slots), [0] * len(slots)

    def start(self) -> None:
        """Starts all."""
        for i in range(len(self._slots)):
            self._start(i)

    def _start(self, i: int) -> None:
        slot = self._slots[i]
        name = f"{platform.node()}-{i}"
        process = self._context.Process(
            target=_worker, args=(replace(self._setup, device=slot.device), name, slot.cores), name=name
        )
        process.start()
        self.processes[i], self._started[i] = process, time.monotonic()

    def tend(self) -> bool:
        """Starts again who has died. False once all have ended as they should.

        Raises: UserError where they die again and again right after their start.
        """
        for i, process in enumerate(self.processes):
            if process is None or process.exitcode is None:
                continue
            if process.exitcode == 0:
                self.processes[i] = None
                continue
            quick = time.monotonic() - self._started[i] < QUICK_S
            self._deaths[i] = self._deaths[i] + 1 if quick else 0
            if self._deaths[i] >= QUICK_DEATHS:
                raise UserError(
                    f"the worker {process.name} died {QUICK_DEATHS} times right after its start (exit code "
                    f"{process.exitcode}); its last words are above"
                )
            self._say(f"the worker {process.name} died ({_reason(process.exitcode)}); it is started again")
            self._start(i)
        return any(self.processes)

    def stop(self, grace: float = GRACE_S) -> None:
        """Asks all to save and to leave, waits so long, and ends the rest."""
        running = [process for process in self.processes if process is not None]
        for process in running:
            process.terminate()
        end = time.monotonic() + grace
        for process in running:
            process.join(max(0.0, end - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        self.processes = [None] * len(self._slots)


def _reason(code: int) -> str:
    number = -code if code < 0 else code - 128  # that ended it, or that it was told to leave by
    return signal.Signals(number).name if number in [*signal.Signals] else f"exit code {code}"


def _worker(setup: Setup, name: str, cores: tuple[int, ...]) -> None:
    """The process of a worker. Ends with 0 only where no work is left for it: one that was told to leave says so, and
    is started again by whoever has not told it."""
    share_cores()
    if cores:
        os.sched_setaffinity(0, cores)
    with Interrupt() as stop:
        threading.Thread(target=_leave_with_parent, args=(stop,), daemon=True).start()
        run_worker(setup, name, stop)
    sys.exit(stop.exit_code)


def _leave_with_parent(stop: Interrupt) -> None:
    """A worker whose parent was killed saves and leaves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        stop.requested = signal.SIGTERM
