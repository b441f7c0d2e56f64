"""What a queue is made of: a job, where it stands, and the events that happen to it. As they lie in files, too."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from typing import Any

from mvdream_fast.core.files import lines
from mvdream_fast.core.run_folder import slugify


class State(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Job:
    """What is asked for. The same kind and request are the same job, whoever asks and when.

    request: plain JSON that the kind's runner knows. priority: higher ones first, then as they were added. retries: how
    often a failure is tried again. needs: the ids of jobs that must be done before.
    """

    kind: str
    request: dict[str, Any]
    priority: int = 0
    retries: int = 0
    created: float = 0.0
    needs: tuple[str, ...] = ()

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits."""
        return sha256(json.dumps([self.kind, self.request], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """The prompt, the part of a rendering ("part 2/8"), or else the kind."""
        shard = self.request.get("shard")
        return str(self.request.get("prompt") or (f"part {shard}" if shard else self.kind))

    @property
    def name(self) -> str:
        """A folder's name, for people first and unique by the id."""
        return f"{slugify(self.title)[:-9]}-{self.id}"


@dataclass(frozen=True)
class Progress:
    """How far a job is: so many steps of so many, and what it is at."""

    done: int = 0
    total: int = 0
    message: str = ""


@dataclass(frozen=True)
class Status:
    """Where a job stands: how far, with which worker, after how many seconds of work, and why where it failed.

    attempt: how often it was begun or gone on with. result: what its worker said of what it made.
    """

    state: State = State.QUEUED
    progress: Progress = field(default_factory=Progress)
    worker: str = ""
    seconds: float = 0.0
    message: str = ""
    exit_code: int = 0
    attempt: int = 0
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """One thing that happened to a job. What the next one has to know is carried on, so that the last one says all.

    failures: how many there were, less what a retry has granted. lost: workers that died with it one after the other
    without getting further than `reached` steps. seconds: of work before this event.
    """

    event: str = ""  # claim, done, fail, free (given back), cancel, retry; "" before the first
    worker: str = ""
    owner: str = ""
    attempt: int = 0
    failures: int = 0
    lost: int = 0
    reached: int = 0
    seconds: float = 0.0
    message: str = ""
    exit_code: int = 0
    result: dict[str, Any] = field(default_factory=dict)
    time: float = 0.0


class LeaseLost(Exception):
    """The job is not this worker's any more; `event` is what happened to it: "cancel", or "claim" by another."""

    def __init__(self, event: str):
        super().__init__(f"the job is no longer this worker's: {event}")
        self.event = event


_FIELDS = [field.name for field in fields(Job)]


def write_jobs(jobs: Iterable[Job]) -> bytes:
    """Jobs as lines of JSON."""
    return "".join(json.dumps({name: getattr(job, name) for name in _FIELDS}) + "\n" for job in jobs).encode()


def read_jobs(data: bytes) -> Iterable[Job]:
    """The jobs of a file that `write_jobs` made."""
    for line in lines(data.decode()):
        row = json.loads(line)
        yield Job(**{**row, "needs": tuple(row["needs"])})


def read_event(data: bytes) -> Event:
    """An event; one that is not whole yet is a claim of nobody, which ends as any claim whose worker is silent."""
    try:
        return Event(**json.loads(data))
    except (ValueError, TypeError):
        return Event("claim")


def is_whole(data: bytes) -> bool:
    """Whether an event can be read: without hard links there is a moment in which its file is empty."""
    return data.endswith(b"}")


def read_beat(data: bytes | None) -> tuple[float, Progress]:
    """Seconds since the claim, and how far it is."""
    if not data:
        return 0.0, Progress()
    beat = json.loads(data)
    return beat["seconds"], Progress(beat["done"], beat["total"], beat["message"])
