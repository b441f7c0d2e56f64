"""For tests that disturb a batch: a command in the background, who kills its workers, a Ray head that can be lost."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mvdream_fast.jobs.job import Job
from mvdream_fast.jobs.owner import is_gone
from mvdream_fast.jobs.queue import Queue
from mvdream_fast.jobs.store import open_store

LOOPBACK = "127.0.0.1"
TESTS = Path(__file__).parents[1]
COLOURS = ("red", "green", "blue", "grey", "black", "white", "brown", "golden")
THINGS = ("car", "chair", "table", "apple", "house")


def environment() -> dict[str, str]:
    """In which a process finds what this one has imported."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}


def in_background(*arguments: str, module: str = "quick_jobs") -> subprocess.Popen:
    """The batch command in sizes of tests."""
    line = [sys.executable, "-m", f"reference.{module}", *arguments]
    return subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True)


def prompts(n: int) -> list[dict]:
    """Lines of a file of prompts, at most 40."""
    named = [f"a {colour} {thing}" for thing in THINGS for colour in COLOURS]
    return [{"prompt": prompt, "seed": i} for i, prompt in enumerate(named[:n])]


def jobs_of(place: Path) -> list[Job]:
    return [job for job, _ in Queue(open_store(place)).jobs()]


def rows(place: Path) -> dict[str, tuple[str, int]]:
    """State and attempt by prompt."""
    return {job.title: (str(status.state), status.attempt) for job, status in Queue(open_store(place)).jobs()}


def workers_of(place: Path) -> list[int]:
    """The process numbers of the workers that are alive."""
    folder = Path(f"{place}.pids")
    owners = [path.read_text() for path in sorted(folder.iterdir())] if folder.exists() else []
    return [int(owner.split("/")[1]) for owner in owners if owner and not is_gone(owner)]


def at_work(place: Path) -> dict[int, bool]:
    """The process numbers of those workers that have a job in hand, and whether each has made a step of it."""
    last: dict[str, tuple[int, Path]] = {}
    for path in place.glob("events/*"):
        job, _, number = path.name.partition(".")
        if number.isdigit():
            last[job] = max(last.get(job, (0, path)), (int(number), path))
    found = {}
    for _, path in last.values():
        event, beat = json.loads(path.read_text()), place / "beats" / path.name
        if event["event"] == "claim" and not is_gone(event["owner"]):
            done = json.loads(beat.read_text())["done"] if beat.exists() else 0
            found[int(event["owner"].split("/")[1])] = done > event["reached"]
    return found


class Killer(threading.Thread):
    """Kills a worker that has a job in hand, at random, now and then, until `done` is set; `n` were killed.

    Four times of five it is one that has got further with its job than those before: on a slow machine nobody would
    ever come to that otherwise, and the job would count as one that kills its workers.
    """

    def __init__(self, place: Path, pause: tuple[float, float], most: int = 10**9, seed: int = 0):
        super().__init__(daemon=True)
        self.place, self.pause, self.most, self.draw = place, pause, most, random.Random(seed)
        self.done, self.n = threading.Event(), 0

    def run(self) -> None:
        while self.n < self.most and not self.done.wait(self.draw.uniform(*self.pause)):
            workers = at_work(self.place)
            if self.draw.random() < 0.8:
                workers = {pid: stepped for pid, stepped in workers.items() if stepped}
            if workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.draw.choice([*workers]), signal.SIGKILL)
                    self.n += 1

    def __enter__(self) -> "Killer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()


def free_port() -> int:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return free.getsockname()[1]


class Head:
    """A Ray head of this machine's own port, with all its processes in one group that can be killed."""

    def __init__(self, folder: Path, n_cpus: int):
        self.port, self.agent_port = free_port(), free_port()
        self.address, self.folder, self.n_cpus = f"{LOOPBACK}:{self.port}", folder, n_cpus
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Until it listens. Raises RuntimeError, with what it said, where it ends instead."""
        words = f"""start --head --block --port={self.port} --include-dashboard=false
            --num-cpus={self.n_cpus} --num-gpus=0 --disable-usage-stats --temp-dir={self.folder}
            --object-store-memory=100000000 --dashboard-agent-listen-port={self.agent_port}""".split()
        command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *words]
        said = Path(f"{self.folder}.txt")
        with open(said, "w") as log:
            self.process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + 120
        while not listens(self.port):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the Ray head does not listen:\n{said.read_text()[-2000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


@contextlib.contextmanager
def ray_head(folder: Path, n_cpus: int) -> Iterator[Head]:
    """A head that is gone at the end."""
    head = Head(folder, n_cpus)
    try:
        head.start()
        yield head
    finally:
        head.kill()


@contextlib.contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[Path]:
    """A filesystem of so many bytes; needs root. Raises CalledProcessError where that may not be mounted."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        end = time.monotonic() + 30
        while subprocess.run(["umount", folder], capture_output=True).returncode and time.monotonic() < end:
            time.sleep(0.5)
