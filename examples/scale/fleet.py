"""Independent jobs on many GPUs, simulated: text to 3D of many prompts, rendering of many meshes.

Workers take jobs from a queue on a shared store, read, compute, write checkpoints and results over one link, and die
with their node. What a job or a GPU costs is given; nothing is decided here.
"""

import gc
from collections import Counter, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import ceil, inf

import numpy as np

from mvdream_fast.jobs.queue import FEW
from scale.events import Call, Clock, Link, Process, Server, Steps, Wait, both


@dataclass(frozen=True)
class Jobs:
    """seconds: computation of each, on one worker. start, operations: seconds and operations of the store before each,
    where every job is a new process. read, write: bytes while it computes and after it. state: bytes of a checkpoint,
    which is written every `interval` seconds of computation, and read by who goes on. queued: workers take them from a
    queue on the store; else each is handed to them, by SLURM's array or the like."""

    seconds: Sequence[float]
    start: float = 0.0
    operations: float = 0.0
    read: float = 0.0
    write: float = 0.0
    state: float = 0.0
    interval: float = inf
    queued: bool = True


@dataclass(frozen=True)
class Machines:
    """Workers (`gpus`, or whole nodes), of which `per_node` live and die together. mtbf: seconds between two failures
    of one node; repair: until it is back. start: seconds until a worker's program runs; load: bytes of the model that
    each node, or with `load_each` each GPU, reads then. link, node_link: bytes a second of the store, and of a node.
    operations, latency: of the store, each second and in seconds. expiry: seconds until a dead worker's job is given to
    another.
    Of the queue: same_order, who was too late for a job tries the next, as all others do, instead of any; read_beats, a
    claim reads the heartbeats of all who work; read_events, and every event since the last claim, where a second list
    of names tells. slowness: a GPU's pace is 1 + |normal| of this deviation."""

    gpus: int
    per_node: int = 8
    mtbf: float = inf
    repair: float = 0.0
    start: float = 0.0
    load: float = 0.0
    load_each: bool = False
    link: float = inf
    node_link: float = inf
    operations: float = inf
    latency: float = 0.0
    expiry: float = 0.0
    same_order: bool = False
    read_beats: bool = False
    read_events: bool = False
    slowness: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """seconds: until the last job was done. spent: seconds of GPUs by what they did; "again" is computation that was
    done before and lost, "idle" what is left."""

    seconds: float
    useful: float
    failures: int
    moved: float
    spent: dict[str, float]

    @property
    def efficiency(self) -> float:
        """Useful computation of all GPU time, at the pace of a GPU that is not slow."""
        return self.useful / sum(self.spent.values())


def simulate(jobs: Jobs, machines: Machines, seed: int = 0) -> Outcome:
    """All jobs, from the start of the machines to the end of the last."""
    collects = gc.isenabled()
    gc.disable()  # it would take half the time: there are few cycles here, and perhaps all of torch to look at
    try:
        return _Run(jobs, machines, seed).outcome()
    finally:
        if collects:
            gc.enable()


class _Run:
    def __init__(self, jobs: Jobs, machines: Machines, seed: int):
        self.jobs, self.machines = jobs, machines
        self.clock = Clock()
        self.random = np.random.default_rng(seed)
        self.nodes = ceil(machines.gpus / machines.per_node)
        self.workers_per_node = machines.gpus / self.nodes
        each = machines.node_link / min(machines.per_node, machines.gpus)
        self.link = Link(self.clock, machines.link, each)
        self.store = Server(self.clock, machines.operations, machines.latency)
        self.waiting = deque(range(len(jobs.seconds)))
        self.done = [0.0] * len(jobs.seconds)  # seconds of each job that no failure takes away
        self.left, self.taken, self.failures, self.moved = len(jobs.seconds), 0, 0, 0.0
        self.idle: deque = deque()  # how workers that found nothing are woken
        self.spent: Counter[str] = Counter()
        self.computed = 0.0  # seconds of computation that were not lost

    def outcome(self) -> Outcome:
        gpus, n = self.machines.gpus, self.nodes
        for node in range(n):
            Process(self._node(gpus // n + (node < gpus % n)))
        self.clock.run()
        useful, seconds = float(sum(self.jobs.seconds)), self.clock.now
        self.spent["again"] = self.spent["computing"] - self.computed
        self.spent["computing"] = self.computed
        self.spent["idle"] = gpus * seconds - self.spent.total()
        return Outcome(seconds, useful, self.failures, self.moved, dict(self.spent))

    def _node(self, gpus: int) -> Steps:
        m = self.machines
        while True:
            paces = 1 + np.abs(self.random.normal(0, m.slowness, gpus))
            workers = [Process(self._worker(float(pace), gpus)) for pace in paces]
            if m.mtbf == inf:
                return
            yield self.clock.sleep(float(self.random.exponential(m.mtbf)))
            self.failures += 1
            for worker in workers:
                worker.stop()
            for _ in workers:  # each loses the time of the repair
                Process(self._timed("down", self.clock.sleep(m.repair)))
            yield self.clock.sleep(m.repair)

    def _worker(self, pace: float, neighbours: int) -> Steps:
        m = self.machines
        yield from self._timed("starting", self.clock.sleep(m.start))
        yield from self._moved("loading", m.load if m.load_each else m.load / neighbours)
        seen = 0
        while True:
            seen = 1 + (yield from self._claim(seen))  # its own is known, too
            job = self.waiting.popleft()
            self.taken += 1
            try:
                yield from self._make(job, pace)
            except GeneratorExit:
                self.clock.at(self.clock.now + m.expiry, lambda job=job: self._free(job))
                raise

    def _claim(self, seen: int) -> Generator[Wait, None, int]:
        """Until there is a job to be taken, which the caller has to do at once. Returns how many claims it knows of.

        A look lists the events, a claim and an end for each job, 1,000 names at a time, and learns of those that are
        new; then comes the claim, and the name of its kind. One that finds its job taken costs a read and another: the
        job is the first of the list, which was certainly taken if anything was since the look, then any of it.
        """
        m = self.machines
        while True:
            while not self.waiting:
                yield self._work_to_do
            before = self.taken
            if not self.jobs.queued:
                return before
            yield from self._timed("claims", self._tries(before, self._look(before, seen) + 2 - m.read_events))
            seen = before
            if self.waiting:
                return before

    def _tries(self, before: int, operations: int) -> Wait:
        """A wait for so many operations, the last of which is a try to claim a job, and for as many tries more as are
        lost by who looked when `before` were taken. They are millions where all try the same job, so that the process
        is not resumed in between."""
        same_order, over, put = self.machines.same_order, self.store.over, self.clock.put

        def wait(resume: Call) -> Call:
            in_vain = 0

            def tried() -> None:
                nonlocal in_vain, event
                gone = self.taken - before - in_vain
                if not gone or not self.waiting or not (same_order or self._is_lost(gone, in_vain)):
                    resume()
                    return
                tries = gone if same_order else 1
                in_vain += tries
                event = put(over(2 * tries), tried)

            event = put(over(operations), tried)
            return lambda: event.__setitem__(2, None)

        return wait

    def _look(self, taken: int, seen: int) -> int:
        """Operations of a look when so many jobs are taken, and so many were when the worker last looked."""
        m = self.machines
        lists, new = ceil(2 * (taken + 1) / 1000), 2 * (taken - seen)
        return lists + (new if m.read_events or new <= FEW else lists) + m.read_beats * m.gpus

    def _is_lost(self, gone: int, in_vain: int) -> bool:
        """Whether the next try is: the first one, or one of those that are `gone` of all that a worker knows of."""
        return not in_vain or bool(self.random.random() * (gone + len(self.waiting)) < gone)

    def _make(self, job: int, pace: float) -> Steps:
        jobs = self.jobs
        if jobs.start:
            yield from self._timed("starting", self.clock.sleep(jobs.start))
        if jobs.operations:
            yield from self._timed("listing", self.store.serve(jobs.operations))
        yield from self._moved("reading", jobs.state if self.done[job] else 0.0)
        while self.done[job] < jobs.seconds[job]:
            part = min(jobs.seconds[job] - self.done[job], jobs.interval)
            yield from self._compute(part * pace, jobs.read * part / jobs.seconds[job])
            if self.done[job] + part < jobs.seconds[job]:
                yield from self._moved("checkpoints", jobs.state)
            else:
                yield from self._moved("writing", jobs.write)
            self.done[job] += part
            self.computed += part * pace
        self.left -= 1
        if not self.left:
            self.clock.stop()

    def _compute(self, seconds: float, n_bytes: float) -> Steps:
        """While the bytes that it needs come in; where they are late, it waits."""
        start, wait = self.clock.now, self.clock.sleep(seconds)
        self.moved += n_bytes
        yield from self._timed("computing", both(wait, self.link.move(n_bytes)) if n_bytes else wait)
        late = self.clock.now - start - seconds
        self.spent["computing"] -= late
        self.spent["reading"] += late

    def _free(self, job: int) -> None:
        self.waiting.append(job)
        if self.idle:
            self.idle.popleft()()

    def _work_to_do(self, resume: Call) -> Call:
        """A wait for a job that is given back."""
        self.idle.append(resume)
        return lambda: self.idle.remove(resume)

    def _moved(self, what: str, n_bytes: float) -> Steps:
        if n_bytes:
            self.moved += n_bytes
            yield from self._timed(what, self.link.move(n_bytes))

    def _timed(self, what: str, wait: Wait) -> Steps:
        start = self.clock.now
        try:
            yield wait
        finally:  # also where the node dies meanwhile
            self.spent[what] += self.clock.now - start
