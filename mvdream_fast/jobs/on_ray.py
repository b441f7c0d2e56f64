"""Workers as actors of a Ray cluster: as many as it has GPUs, or cores for. The same function as on one machine.

What is done lies in the queue, so nothing of Ray has to be durable: an actor, a node or the head may be lost. A process
of its own talks to Ray, since Ray ends the process whose head is gone; it is started again until the cluster is back.
"""

import importlib.util
import logging
import multiprocessing
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from mvdream_fast.core.errors import ArgumentError, UserError
from mvdream_fast.core.progress import Every
from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.jobs.setup import Setup, run_worker

LOCAL = "local"  # an address: a cluster of this machine alone, for as long as the command runs
SILENT_S = 60.0  # after so long without a word from it the process that talks to Ray counts as stuck
FIRST_TRIES = 3  # before an address that has never answered counts as wrong
AGAIN_S = 5.0  # between two tries to reach the cluster
GRACE_S = 120.0  # for actors that were asked to save and to leave
ROUND_S = 1.0
LOOK_S = 5.0  # between two looks at the queue and at the cluster's size
ROOM_S = 300.0  # for a machine to join that can hold a worker, where none ever could
UNKNOWN, ROOM = -2, -1  # in place of the most cores that a machine has: not looked at yet; one can hold a worker


def check_installed() -> None:
    """Raises ArgumentError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ArgumentError("--ray needs Ray: pip install 'mvdream_fast[cluster]'")


class Cluster:
    """Workers on Ray, tended by whoever calls `tend` now and then; as local.Workers.

    address: of the head, "auto" for what `ray start` has set up, or LOCAL. workers: None for as many as there is room.
    """

    def __init__(self, setup: Setup, address: str, workers: int | None, say: Callable[[str], None]):
        self._setup, self._address, self._n, self._say = setup, address, workers, say
        self._context = multiprocessing.get_context("spawn")
        self._heard: Synchronized[float] = self._context.Value("d", 0.0)
        self._reached: Synchronized[int] = self._context.Value("i", 0)
        self._most: Synchronized[int] = self._context.Value("i", UNKNOWN)
        self._waits: float | None = None  # since when for a machine that can hold a worker
        self._had_room = False
        self._process: SpawnProcess | None = None
        self._next, self._tries = 0.0, 0

    def start(self) -> None:
        """Begins to talk to Ray."""
        self._heard.value = time.monotonic()
        self._tries += 1
        args = self._setup, self._address, self._n, self._heard, self._reached, self._most
        self._process = self._context.Process(target=_drive, args=args, name="ray driver")
        self._process.start()

    def tend(self) -> bool:
        """Reaches for the cluster again where it was lost. False once all workers have ended as they should.

        Raises: UserError where none was ever reached, or none of its machines could ever hold a worker.
        """
        process = self._process
        if process is None:
            if time.monotonic() > self._next:
                self.start()
            return True
        if process.exitcode is None and time.monotonic() - self._heard.value < SILENT_S:
            self._look_for_room()
            return True
        if process.exitcode == 0:
            return False
        process.kill()
        process.join()
        if not self._reached.value and self._tries >= FIRST_TRIES:
            raise UserError(
                f'no Ray cluster answers at {self._address}; --ray must name a head\'s address, "auto" or "local"'
            )
        self._say(f"the Ray cluster {self._address} was lost; trying to reach it again")
        self._process, self._next = None, time.monotonic() + AGAIN_S
        return True

    def _look_for_room(self) -> None:
        """Says once that no machine can hold a worker. Raises UserError where that stays so from the start."""
        most = self._most.value
        if most in (UNKNOWN, ROOM):
            self._had_room, self._waits = self._had_room or most == ROOM, None
            return
        lacks = (
            f"the Ray cluster {self._address} must have a machine with {self._setup.threads} cores for a worker, "
            f"got at most {most}"
        )
        if self._waits is None:
            self._waits = time.monotonic()
            self._say(f"{lacks}; waiting for one")
        elif not self._had_room and time.monotonic() - self._waits > ROOM_S:
            raise UserError(f"{lacks}; give workers fewer (batch --threads, render --workers), or add a machine")

    def stop(self, grace: float = GRACE_S) -> None:
        """Asks all workers to save and to leave."""
        if self._process is not None:
            self._process.terminate()
            self._process.join(grace + AGAIN_S if self._reached.value else AGAIN_S)
            self._process.kill()
            self._process.join()
        self._process = None


class Actor:
    """A worker in an actor of two threads: one works, the other can be told to stop that."""

    def __init__(self) -> None:
        self.interrupt = Interrupt()

    def work(self, setup: Setup, name: str) -> None:
        """Until all is done."""
        run_worker(setup, f"{platform.node()}-{name}", self.interrupt)

    def stop(self) -> None:
        """Saves and leaves."""
        self.interrupt.requested = signal.SIGTERM


class Crew:
    """The actors of one connection. ray: the module."""

    def __init__(self, ray: Any, setup: Setup):
        self.ray, self.setup, self.n_made = ray, setup, 0
        self.at_work: dict[Any, Any] = {}  # what `work` will return -> its actor

    def hire(self, workers: int | None) -> int:
        """Makes actors until there are as many as asked, or as the machines have room for. Returns ROOM, or the most
        cores that a machine has where none has enough for a worker."""
        machines: list[dict[str, float]] = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        cores = [int(room.get("CPU", 0)) for room in machines]
        n_gpus = int(sum(room.get("GPU", 0) for room in machines)) if self.setup.device != "cpu" else 0
        n = workers or n_gpus or sum(found // self.setup.threads for found in cores)
        needs = {"num_gpus": min(1.0, n_gpus / n)} if n_gpus and n else {"num_cpus": self.setup.threads}
        while len(self.at_work) < n:
            actor = self.ray.remote(Actor).options(max_concurrency=2, **needs).remote()
            self.at_work[actor.work.remote(self.setup, str(self.n_made))] = actor
            self.n_made += 1
        most = max(cores, default=0)
        return ROOM if n_gpus or most >= self.setup.threads else most

    def release(self, seconds: float) -> None:
        """Forgets who has ended within so many seconds, in whatever way."""
        if not self.at_work:
            time.sleep(seconds)
            return
        ended, _ = self.ray.wait([*self.at_work], num_returns=len(self.at_work), timeout=seconds)
        for future in ended:
            self.at_work.pop(future)
            try:
                self.ray.get(future)
            except self.ray.exceptions.RayError as error:
                logging.getLogger(__name__).warning("a worker was lost: %s", str(error).splitlines()[0])

    def stop(self) -> None:
        """Asks all to save and to leave, and waits for them."""
        for actor in self.at_work.values():
            actor.stop.remote()
        end = time.monotonic() + GRACE_S
        while self.at_work and time.monotonic() < end:
            self.release(ROUND_S)


def _drive(
    setup: Setup, address: str, workers: int | None, heard: "Synchronized[float]", reached: "Synchronized[int]",
    most: "Synchronized[int]",
) -> None:  # fmt: skip
    """The process that talks to Ray: hires until nothing is left to do, or until a signal. Ends with 0 only where no
    work is left, as local.py's workers do. most: becomes what `Crew.hire` returns."""
    import ray

    threading.Thread(target=_leave_with_parent, daemon=True).start()
    ray.init(
        address=address, logging_level=logging.WARNING, log_to_driver=False, namespace="mvdream_fast",
        include_dashboard=False if address == LOCAL else None,
    )  # fmt: skip
    reached.value = 1
    queue, crew, looking = setup.queue(), Crew(ray, setup), Every(LOOK_S)
    with Interrupt() as stop:
        while stop.requested is None:
            heard.value = time.monotonic()
            if looking.due() or not crew.at_work:
                queue.look()
                looking.begin()
                if setup.forever or queue.unfinished():
                    most.value = crew.hire(workers)
                elif not crew.at_work:
                    return
            crew.release(ROUND_S)
        crew.stop()
    sys.exit(stop.exit_code)


def _leave_with_parent() -> None:
    """A driver whose parent was killed ends; Ray ends its actors with it."""
    import os

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
