"""A queue of jobs on shared files: who takes which, what became of it, and what must happen again. No job is run here.

What happens to a job is a list of events, files with the numbers 1, 2, 3, ...; each is created only if it is absent, so
of two that would happen at once one does. A claim is an event, and so is its end: a worker whose claim has been
followed by anything else (its job was cancelled, or given to another because its heartbeat had stopped) cannot end it
any more. Files: jobs/*.jsonl, a job a line; events/<id>.<number>; beats/<id>.<number of the claim>, which is replaced;
kinds/<id>.<number>.<kind>, empty, which tells in a list of names what an event is.

A kind decides nothing. Two events of one number would not collide if their kinds were in their names, so that name is
never the one that is created exclusively: whoever has created an event makes its kind's file after it, and nobody else
does. A file of a kind is right, then, or missing (its maker died between the two, or is of a version without them), and
an event without one is read.
"""

import contextlib
import json
import re
import secrets
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, replace
from hashlib import sha256
from math import inf
from typing import Any

from mvdream_fast.core.errors import ArgumentError, OutputError
from mvdream_fast.jobs.job import (
    Event,
    Job,
    LeaseLost,
    Progress,
    State,
    Status,
    is_whole,
    read_beat,
    read_event,
    read_jobs,
    write_jobs,
)
from mvdream_fast.jobs.owner import is_gone, this_process
from mvdream_fast.jobs.store import Store

FORMAT = 1
MARK = "queue.json"
EXPIRY_S = 60.0  # without a heartbeat for so long, a job is given to another worker
FRESH_S = 1.0  # what is known of the queue is looked at again after so long, where a job is claimed
MAX_LOST = (
    10  # workers that die with a job, one after the other and without getting further, before it counts as failed
)
FEW = 20  # events that are read one by one; of more, the kinds are listed first
KINDS = ("claim", "done", "fail", "free", "cancel", "retry")
# What a queue's folders hold; a system, an editor or a network filesystem may put other files beside them.
NAMES = {"jobs": re.compile(r"[0-9a-f]{16}\.jsonl"), "events": re.compile(r"[0-9a-f]{16}\.[0-9]{1,9}")}


class Lease:
    """One job in the hands of one worker, as long as nothing else happens to it.

    attempt: 1 at first, higher where it goes on. All methods raise LeaseLost where the job is another's or cancelled.
    """

    def __init__(self, queue: "Queue", job: Job, number: int, claim: Event):
        self.job, self.attempt = job, claim.attempt
        self._queue, self._number, self._claim, self._start, self._beats = queue, number, claim, time.monotonic(), 0

    @property
    def seconds(self) -> float:
        """Of work on the job so far, other attempts' too."""
        return self._claim.seconds + time.monotonic() - self._start

    def check(self) -> None:
        """Raises LeaseLost where the job is not this worker's any more."""
        self._queue.check_last(self.job.id, self._number)

    def heartbeat(self, progress: Progress) -> None:
        """Says that the worker lives, and how far it is; to be called several times within the queue's `expiry`."""
        self.check()
        self._beats += 1
        beat = {**asdict(progress), "beat": self._beats, "seconds": time.monotonic() - self._start}
        self._queue.store.write(f"beats/{self.job.id}.{self._number}", json.dumps(beat).encode())

    def finish(self, result: dict[str, Any] | None = None) -> None:
        """The job is done."""
        self._end("done", result=result or {})

    def fail(self, message: str, exit_code: int = 1) -> None:
        """The job has failed; it is queued again if its retries allow it."""
        self._end("fail", message=message, exit_code=exit_code, failures=self._claim.failures + 1)

    def free(self) -> None:
        """Gives the job back as it is, for any worker to go on with it."""
        self._end("free")

    def _end(self, event: str, **more: Any) -> None:
        ended = replace(self._claim, event=event, owner="", lost=0, seconds=self.seconds, **more)
        self._queue.append(self.job.id, self._number, ended)


class Queue:
    """Jobs in a store. Any number of processes, threads and machines may use the same place, each with its own.

    expiry: seconds without a change of its heartbeat after which a worker counts as dead, by the clock of whoever waits
    for it; clocks of machines are not compared. One that died on this machine is dead at once.
    An empty place becomes a queue's. Raises: OutputError for one that holds something else.
    """

    def __init__(self, store: Store, expiry: float = EXPIRY_S):
        self.store, self.expiry = store, expiry
        _check_place(store)
        self._files: set[str] = set()
        self._jobs: dict[str, Job] = {}
        self._last: dict[str, tuple[int, str]] = {}  # of each job the number and the kind of its last event
        self._read: dict[str, tuple[int, Event]] = {}  # and what is in it, or in one before it
        self._torn: set[str] = set()  # jobs whose last event was not whole when it was read
        self._beats: dict[str, tuple[str, bytes, float]] = {}  # of each job: whose, what it was, and since when
        self._ready: dict[int, list[str]] = {}  # the jobs that may be taken by priority, the next one last
        self._at_work = -inf  # the highest priority of what runs
        self._looked = -FRESH_S

    def add(self, *jobs: Job) -> list[str]:
        """Puts jobs into the queue, in this order; those that it knows stay as they are, but for more retries. Returns
        the ids of all."""
        self.look()
        known = self._jobs
        new = {job.id: job for job in jobs if job.id not in known or job.retries > known[job.id].retries}
        if new:
            now = time.time()
            words = "".join(f"{i}+{job.retries}" if i in known else i for i, job in new.items())
            name = f"jobs/{sha256(words.encode()).hexdigest()[:16]}.jsonl"
            self.store.create(name, write_jobs(replace(job, created=job.created or now) for job in new.values()))
            self.look()
        return [job.id for job in jobs]

    def ask(self, *jobs: Job) -> None:
        """Puts jobs into the queue, in this order, and makes again those that have failed or were cancelled. What waits
        or runs may fail as often from now on as it was asked for, if that is more often than it still might."""
        self.look()
        new = []
        for job in jobs:
            known = self._jobs.get(job.id, job)
            if job.id not in self._jobs:
                new.append(job)
            elif self._state(known) in (State.FAILED, State.CANCELLED):
                self.retry(job.id, job.retries)
            elif job.retries and self._state(known) != State.DONE:
                # As a line of jobs/: an event would end the claim of whoever is at it.
                new.append(replace(known, retries=job.retries + self._event(job.id).failures))
        self.add(*new)

    def claim(self, worker: str, kinds: Collection[str] | None = None) -> Lease | None:
        """The next job that waits, or one whose worker has died where no other of its priority waits; None where there
        is none now.

        Args: worker, a name for people. kinds: takes no others.
        """
        if time.monotonic() - self._looked < FRESH_S:
            for priority, ready in self._ready.items():
                if priority < self._at_work:
                    break  # what runs may have to be taken over first
                if (lease := self._one_of(ready, worker, kinds)) is not None:
                    return lease
        self.look()
        for priority in sorted({job.priority for job in self._jobs.values()}, reverse=True):
            lease = self._one_of(self._ready.get(priority, []), worker, kinds)
            if lease is None:  # only now are heartbeats read, one for each running job
                lease = self._one_of(self._dead(priority), worker, kinds)
            if lease is not None:
                return lease
        return None

    def cancel(self, job_id: str) -> bool:
        """Stops a job that waits or runs; its worker learns of it with its heartbeat. False for one that has ended."""
        return self._asked(job_id, (State.QUEUED, State.RUNNING), "cancel", 0)

    def retry(self, job_id: str, retries: int | None = None) -> bool:
        """Queues a job again that has failed or was cancelled, to go on where it stopped; False for any other.

        retries: as if the job had been added with so many.
        """
        job = self.job(job_id)
        granted = 0 if retries is None else retries - job.retries
        return self._asked(job_id, (State.FAILED, State.CANCELLED), "retry", -granted)

    def jobs(self) -> list[tuple[Job, Status]]:
        """All jobs and where they stand, in the order in which they are taken."""
        self.look()
        self._read_last(self._last)
        beats = self._heard(self._jobs)
        return [(job, self._status(job, beats)) for job in self._in_order()]

    def unfinished(self, kinds: Collection[str] | None = None) -> list[Job]:
        """The jobs that wait or run, as of the last look."""
        known = (job for job in self._jobs.values() if kinds is None or job.kind in kinds)
        return [job for job in known if self._state(job) in (State.QUEUED, State.RUNNING)]

    def status(self, job_id: str) -> Status:
        """Where one job stands. Raises ArgumentError for one that is not known."""
        job = self.job(job_id)
        self.look()
        self._read_last((job_id, *job.needs))
        name = self._beat_name(job_id)
        return self._status(job, self.store.read_many([name] if name else []))

    def job(self, job_id: str) -> Job:
        """What was asked for. Raises ArgumentError for an id that is not known."""
        if job_id not in self._jobs:
            self.look()
        if job_id not in self._jobs:
            raise ArgumentError(f"there is no job {job_id!r} in {self.store.place}")
        return self._jobs[job_id]

    def look(self) -> None:
        """Learns what has happened since the last look: new jobs, the last event of each, and who may be taken."""
        files = [name for name in self._names("jobs") if name not in self._files]
        for name, data in self.store.read_many([f"jobs/{name}" for name in files]).items():
            self._files.add(name.removeprefix("jobs/"))
            for job in read_jobs(data):
                known = self._jobs.get(job.id, job)
                first = known if known.created <= job.created else job
                more = max(known.retries, job.retries)
                self._jobs[job.id] = first if first.retries == more else replace(first, retries=more)
        newest: dict[str, int] = {}
        for name in self._names("events"):
            job_id, _, number = name.partition(".")
            newest[job_id] = max(newest.get(job_id, 0), int(number))
        self._learn({job_id: n for job_id, n in newest.items() if n > self._number(job_id) or job_id in self._torn})
        self._looked = time.monotonic()
        self._ready = {}
        for job in self._in_order():
            if self._may_be_taken(job):
                self._ready.setdefault(job.priority, []).append(job.id)
        for ready in self._ready.values():
            ready.reverse()
        self._at_work = max((j.priority for j in self._jobs.values() if self._kind(j.id) == "claim"), default=-inf)

    def _names(self, folder: str) -> list[str]:
        return [name for name in self.store.names(folder) if NAMES[folder].fullmatch(name)]

    def _learn(self, new: dict[str, int]) -> None:
        """What the last events are, of these numbers by job: from their kinds' names, or read where those are missing,
        where they do not say enough (a failure may be followed by another try), and where they are few."""
        unread = dict(new)
        if len(new) > FEW:
            listed = set(self.store.names("kinds"))
            for job_id, number in new.items():
                kinds = [kind for kind in KINDS if f"{job_id}.{number}.{kind}" in listed]
                if len(kinds) == 1 and kinds != ["fail"]:
                    self._last[job_id] = number, kinds[0]
                    self._torn.discard(job_id)
                    del unread[job_id]
        for job_id, event in self._events(unread):
            self._last[job_id], self._read[job_id] = (unread[job_id], event.event), (unread[job_id], event)

    def _read_last(self, job_ids: Iterable[str]) -> None:
        """Reads the last events of these jobs, but those that were read."""
        unread = {i: self._number(i) for i in job_ids if self._number(i) > self._read.get(i, (0, None))[0]}
        for job_id, event in self._events(unread):
            self._read[job_id] = unread[job_id], event

    def _events(self, numbers: dict[str, int]) -> Iterator[tuple[str, Event]]:
        """Events, read, of these numbers by job."""
        names = {f"events/{job_id}.{number}": job_id for job_id, number in numbers.items()}
        for name, data in self.store.read_many(names).items():
            (self._torn.discard if is_whole(data) else self._torn.add)(names[name])
            yield names[name], read_event(data)

    def _in_order(self) -> list[Job]:
        return sorted(self._jobs.values(), key=lambda job: (-job.priority, job.created))

    def _number(self, job_id: str) -> int:
        return self._last[job_id][0] if job_id in self._last else 0

    def _kind(self, job_id: str) -> str:
        return self._last[job_id][1] if job_id in self._last else ""

    def _event(self, job_id: str) -> Event:
        """The last event of a job."""
        if self._number(job_id) > self._read.get(job_id, (0, None))[0]:
            self._read_last([job_id])
        return self._read[job_id][1] if job_id in self._read else Event()

    def _state(self, job: Job) -> State:
        kind = self._kind(job.id)
        if kind == "fail":
            return State.FAILED if self._event(job.id).failures > job.retries else State.QUEUED
        if kind in ("", "free", "retry"):
            lost = any(self._is_hopeless(need) for need in job.needs)
            return State.FAILED if lost else State.QUEUED
        return {"claim": State.RUNNING, "done": State.DONE, "cancel": State.CANCELLED}[kind]

    def _is_hopeless(self, need: str) -> bool:
        return need in self._jobs and self._state(self._jobs[need]) in (State.FAILED, State.CANCELLED)

    def _may_be_taken(self, job: Job) -> bool:
        needed = all(self._kind(need) == "done" for need in job.needs)
        return needed and self._state(job) == State.QUEUED

    def _dead(self, priority: int) -> list[str]:
        """The running jobs of a priority whose worker is dead (gone from this machine, or silent for too long), in the
        order of `_ready`."""
        running = [j.id for j in self._in_order() if j.priority == priority and self._kind(j.id) == "claim"]
        self._read_last(running)
        self._heard(running)
        silent = time.monotonic() - self.expiry
        return [i for i in running[::-1] if is_gone(self._event(i).owner) or self._beats[i][2] < silent]

    def _heard(self, job_ids: Iterable[str]) -> dict[str, bytes]:
        """The heartbeats of those of these jobs that run, by name; remembers when each was seen to change."""
        names = {name: job_id for job_id in job_ids if (name := self._beat_name(job_id))}
        beats, now = self.store.read_many(names), time.monotonic()
        for name, job_id in names.items():
            beat = name, beats.get(name, b"")
            if self._beats.get(job_id, ())[:2] != beat:
                self._beats[job_id] = *beat, now
        return beats

    def _one_of(self, ids: list[str], worker: str, kinds: Collection[str] | None) -> Lease | None:
        """A lease on the last of these jobs, which are used up. Where another worker was faster, on any of them: all
        who have lost against the same one would race for the same next, and all but one lose again."""
        lost = False
        while ids:
            job = self._jobs[ids.pop(secrets.randbelow(len(ids)) if lost else -1)]
            if kinds is not None and job.kind not in kinds:
                continue
            try:
                lease = self._taken(job, worker)
            except LeaseLost:
                lost = True
                continue
            if lease is not None:
                return lease
        return None

    def _taken(self, job: Job, worker: str) -> Lease | None:
        """A lease on a job that could be taken at the last look, None where it is given up. Raises LeaseLost where
        another worker was faster."""
        number, last = self._number(job.id), self._event(job.id)
        if last.event == "claim":
            last = self._after_loss(job.id, number, last)
        claim = replace(
            last, event="claim", worker=worker, owner=this_process(), attempt=last.attempt + 1, message="",
            exit_code=0, time=time.time(),
        )  # fmt: skip
        self.append(job.id, number, claim)
        lease = Lease(self, job, number + 1, claim)
        if claim.lost >= MAX_LOST:
            lease.fail(f"{claim.lost} workers died with it, one after the other; out of memory, perhaps", 1)
            return None
        return lease

    def _after_loss(self, job_id: str, number: int, claim: Event) -> Event:
        """What there is to know of a claim whose worker died."""
        seconds, progress = read_beat(self.store.read(f"beats/{job_id}.{number}"))
        further = progress.done > claim.reached
        return replace(
            claim, seconds=claim.seconds + seconds, reached=max(claim.reached, progress.done),
            lost=0 if further else claim.lost + 1,
        )  # fmt: skip

    def _asked(self, job_id: str, states: Collection[State], event: str, failures: int) -> bool:
        """Appends what a person asks for, where the job stands as that needs it."""
        job = self.job(job_id)
        while True:
            self.look()
            number, last = self._number(job_id), self._event(job_id)
            if self._state(job) not in states:
                return False
            try:
                self.append(job_id, number, replace(last, event=event, owner="", failures=failures, lost=0))
            except LeaseLost:
                continue  # something else happened at the same time: whether it still can be is asked again
            return True

    def append(self, job_id: str, number: int, event: Event) -> None:
        """The event that follows the one of this number. Raises LeaseLost where another has."""
        event = replace(event, time=time.time())
        if not self.store.create(f"events/{job_id}.{number + 1}", json.dumps(asdict(event)).encode()):
            raise LeaseLost(read_event(self.store.read(f"events/{job_id}.{number + 1}") or b"").event)
        with contextlib.suppress(OutputError):  # a disk that is full by now: the event stands, and will be read
            self.store.mark(f"kinds/{job_id}.{number + 1}.{event.event}")
        self._last[job_id], self._read[job_id] = (number + 1, event.event), (number + 1, event)

    def check_last(self, job_id: str, number: int) -> None:
        """Raises LeaseLost where something has happened to a job after the event of this number."""
        data = self.store.read(f"events/{job_id}.{number + 1}")
        if data is not None:
            raise LeaseLost(read_event(data).event)

    def _beat_name(self, job_id: str) -> str:
        return f"beats/{job_id}.{self._number(job_id)}" if self._kind(job_id) == "claim" else ""

    def _status(self, job: Job, beats: dict[str, bytes]) -> Status:
        event, state = self._event(job.id), self._state(job)
        seconds, progress = read_beat(beats.get(self._beat_name(job.id)))
        message = event.message
        if state == State.FAILED and event.event != "fail":
            need = next(self._jobs[need] for need in job.needs if self._is_hopeless(need))
            reason = "cancelled" if self._state(need) == State.CANCELLED else self._event(need.id).message
            message = f"what it needs was not made: {need.title}: {reason or 'nor was what that needs'}"
        return Status(
            state, progress, event.worker, event.seconds + seconds, message, event.exit_code, event.attempt,
            event.result,
        )  # fmt: skip


def _check_place(store: Store) -> None:
    """Marks an empty place as a queue's. Raises OutputError for one that holds something else."""
    others = set(store.names("")) - {MARK}
    if store.read(MARK) is None:  # looked for after the list was made: another process may begin here, too
        if others:
            raise OutputError(f"{store.place} holds something else than jobs; name another folder, or a new one")
        store.create(MARK, json.dumps({"format": FORMAT}).encode())
    mark = store.read(MARK)
    try:
        known = json.loads(mark or b"")["format"]
    except (ValueError, KeyError, TypeError):
        known = None
    if known != FORMAT:
        raise OutputError(f"{store.place} holds jobs of another version ({known}); name another folder with -o")
