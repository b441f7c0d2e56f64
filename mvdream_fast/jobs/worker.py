"""A worker: takes job after job from a queue and hands each to the function that knows its kind.

It beats while that works, stops it where the job was cancelled or lost, publishes what was made and says how it ended.
One job's error never ends the worker, but for a device that is broken afterwards. What the kinds are is making.py's.
"""

import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from mvdream_fast.core.errors import OutOfMemoryError, OutputError, UserError
from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.jobs.job import Job, LeaseLost, Progress, State
from mvdream_fast.jobs.queue import Lease, Queue
from mvdream_fast.jobs.store import lacks_space
from mvdream_fast.jobs.workspace import Workspace, asset_folder, fetch

BEATS = 6  # heartbeats within the time after which a silent worker counts as dead
IDLE_S = 1.0  # between two looks for work
PATIENCE_S = 1800.0  # how long a worker waits for space on a full disk before its job fails
PAUSES_S = (0.5, 10.0)  # the first and the longest of its pauses


class DeviceBroken(Exception):
    """After an error that no later call on the device survives: the process has to end, for another to take over."""


@dataclass(frozen=True)
class Task:
    """A job as the function sees that makes it.

    folder: where to work; holds what an earlier attempt had saved. stop: when requested, to save and to return None.
    report: how far it is, often. save: after a checkpoint. made: the folder, on this machine, of another job's result.
    """

    job: Job
    folder: Path
    stop: Interrupt
    say: Callable[[str], None]
    report: Callable[[int, int, str], None]
    save: Callable[[], None]
    made: Callable[[str], Path]


Runner = Callable[[Task], dict[str, Any] | None]


def work(
    queue: Queue,
    runners: Mapping[str, Runner],
    name: str,
    stop: Interrupt,
    *,
    say: Callable[[str], None] = print,
    forever: bool = False,
    patience: float = PATIENCE_S,
) -> None:
    """Takes jobs of the kinds that `runners` has until none waits or runs anywhere, or `stop` is requested.

    Args:
        name: of the worker, for people. forever: waits for new jobs, too. patience: seconds to wait for disk space.
    Raises: DeviceBroken.
    """
    worker = Worker(queue, runners, name, stop, say, patience)
    try:
        worker.run(forever)
    finally:
        if queue.store.folder is None:
            shutil.rmtree(worker.scratch, ignore_errors=True)


class Worker:
    """See `work`."""

    def __init__(
        self, queue: Queue, runners: Mapping[str, Runner], name: str, stop: Interrupt, say: Callable[[str], None],
        patience: float,
    ):  # fmt: skip
        self.queue, self.runners, self.name, self.stop, self.say = queue, runners, name, stop, say
        self.patience = patience
        self._scratch: Path | None = None

    def run(self, forever: bool) -> None:
        """Job after job."""
        pause = IDLE_S
        while self.stop.requested is None:
            lease = self._patiently(lambda: self.queue.claim(self.name, self.runners.keys()), self.stop)
            if lease is not None:
                self._do(lease)
                pause = IDLE_S
            elif not forever and not self._is_work_left():
                return
            else:
                _wait(pause, self.stop)
                pause = min(2 * pause, max(IDLE_S, self.queue.expiry / BEATS))

    def _is_work_left(self) -> bool:
        return bool(self.queue.unfinished(self.runners.keys()))

    def _do(self, lease: Lease) -> None:
        """One job, whatever becomes of it."""
        halt, every = Interrupt(), self.queue.expiry / BEATS
        least = every if self.queue.store.folder is None else min(IDLE_S, every)  # each beat to a far store costs
        with Heart(lease, halt, every, least) as heart:
            try:
                self._patiently(lambda: self._make(lease, heart, halt), halt)
            except LeaseLost as lost:
                self.say(
                    f"{lease.job.title}: {'cancelled' if lost.event == 'cancel' else 'taken over by another worker'}"
                )
            except Exception as error:
                self._failed(lease, error, halt)

    def _make(self, lease: Lease, heart: "Heart", halt: Interrupt) -> None:
        job, store = lease.job, self.queue.store
        workspace = Workspace(store, job, lease.attempt, self.scratch)
        folder = _begun(workspace)
        if folder is None:
            workspace.drop()
            lease.finish({"folder": asset_folder(job)})
            return

        def report(done: int, total: int, message: str = "") -> None:
            heart.progress = Progress(done, total, message)
            if self.stop.requested is not None:
                halt.requested = self.stop.requested

        result = self.runners[job.kind](
            Task(job, folder, halt, self.say, report, workspace.save, self._made)
        )  # fmt: skip
        if heart.lost is not None:
            raise heart.lost
        lease.check()
        if result is None:
            workspace.save()
            lease.free()
            return
        name = workspace.publish()
        lease.finish({**result, "folder": name})
        self.say(f"{job.title}: done in {lease.seconds:.0f} s: {name}")

    def _failed(self, lease: Lease, error: Exception, halt: Interrupt) -> None:
        message, code = str(error) or type(error).__name__, 1
        if isinstance(error, UserError):
            code = error.exit_code
        elif isinstance(error, MemoryError):
            message, code = f"out of memory: {error}", OutOfMemoryError.exit_code
        else:
            traceback.print_exception(error, file=sys.stderr)
            message = f"{type(error).__name__}: {message}"
        self.say(f"{lease.job.title}: failed ({code}): {message}")
        try:
            self._patiently(lambda: lease.fail(message, code), halt)
        except (LeaseLost, UserError) as reason:  # whoever looks next finds a silent worker
            self.say(f"{lease.job.title}: {reason}")
        if "CUDA error" in str(error) and not isinstance(error, MemoryError):
            raise DeviceBroken(message) from error

    def _patiently(self, action: Callable[[], Any], halt: Interrupt) -> Any:
        """`action()`, again and again as long as the disk is full."""
        end, (pause, longest) = time.monotonic() + self.patience, PAUSES_S
        while True:
            try:
                return action()
            except Exception as error:
                if not lacks_space(error) or time.monotonic() > end or halt.requested is not None:
                    raise
                self.say(f"{self.name}: the disk is full; waiting for space ({error})")
            _wait(pause, self.stop)
            if self.stop.requested is not None:
                halt.requested = self.stop.requested
            pause = min(2 * pause, longest)

    @property
    def scratch(self) -> Path:
        """A folder of this machine for what lies behind a URL."""
        if self._scratch is None:
            self._scratch = Path(mkdtemp(prefix="mvdream-")) if self.queue.store.folder is None else Path()
        return self._scratch

    def _made(self, job_id: str) -> Path:
        """The folder of a job that is done, on this machine."""
        job, status = self.queue.job(job_id), self.queue.status(job_id)
        if status.state != State.DONE:
            raise UserError(f"{job.title!r} must be made before what needs it, and is {status.state}")
        store, name = self.queue.store, asset_folder(job)
        if store.folder is not None:
            return store.folder / name
        folder = self.scratch / name
        if not folder.is_dir():
            fetch(store, name, folder)
        return folder


class Heart(threading.Thread):
    """Beats for a lease while the work goes on, `every` so many seconds, and where there is progress after the `least`,
    when it also looks whether the job is still its own. `lost` is why it is not; then `halt` is requested."""

    def __init__(self, lease: Lease, halt: Interrupt, every: float, least: float):
        super().__init__(daemon=True, name="heart")
        self.lease, self.halt, self.every, self.least = lease, halt, every, least
        self.progress, self.lost = Progress(), None
        self._end = threading.Event()

    def __enter__(self) -> "Heart":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        """Until the end of the work, or of the lease."""
        told, since = None, 0.0
        while not self._end.wait(self.least):
            now = time.monotonic()
            try:
                if self.progress == told and now - since < self.every:
                    self.lease.check()
                    continue
                self.lease.heartbeat(self.progress)
                told, since = self.progress, now
            except LeaseLost as lost:
                self.lost, self.halt.requested = lost, signal.SIGTERM
                return
            except UserError:  # a disk that is full or away for a while: the next beat may reach it
                since = now


def _begun(workspace: Workspace) -> Path | None:
    """The folder to work in; None where the job was published meanwhile, by a worker that died or lost it then."""
    if workspace.is_published:
        return None
    try:
        return workspace.begin()
    except OutputError:
        if workspace.is_published:  # while what it had saved was copied
            return None
        raise


def _wait(seconds: float, stop: Interrupt) -> None:
    """So long, or until `stop` is requested."""
    end = time.monotonic() + seconds
    while stop.requested is None and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))
