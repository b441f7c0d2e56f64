"""What one would write instead of our queue: a JSON file behind a lock file, and a table of SQLite.

Both are for the processes of one machine, and neither gives the job of a dead worker to another: less than ours does.
All of them flush what they wrote to the disk.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvdream_fast.jobs.job import Job, Progress, State, Status


@dataclass(frozen=True)
class Lease:
    """A job that was claimed."""

    queue: Any
    job: Job

    def heartbeat(self, progress: Progress) -> None:
        self.queue.beat(self.job, progress)

    def free(self) -> None:
        self.queue.free(self.job)


class Listed:
    """Job id -> [state, worker, steps done], in one JSON file that is read and replaced under a lock."""

    def __init__(self, folder: Path, jobs: Sequence[Job], n_done: int):
        from filelock import FileLock

        folder.mkdir(parents=True)
        self.path, self.lock = folder / "states.json", FileLock(folder / "lock")
        self.known = {job.id: job for job in jobs}
        states = {job.id: [State.DONE if i < n_done else State.QUEUED, "", 0] for i, job in enumerate(jobs)}
        self.path.write_text(json.dumps(states))

    def claim(self, worker: str) -> Lease:
        with self._changed() as states:
            name = next(name for name, (state, *_) in states.items() if state == State.QUEUED)
            states[name] = [State.RUNNING, worker, 0]
        return Lease(self, self.known[name])

    def beat(self, job: Job, progress: Progress) -> None:
        with self._changed() as states:
            states[job.id][2] = progress.done

    def free(self, job: Job) -> None:
        with self._changed() as states:
            states[job.id] = [State.QUEUED, "", 0]

    def jobs(self) -> list[tuple[Job, Status]]:
        rows = json.loads(self.path.read_text()).items()
        return [(self.known[name], Status(State(state), Progress(done), by)) for name, (state, by, done) in rows]

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict[str, list[Any]]]:
        with self.lock:
            states = json.loads(self.path.read_text())
            yield states
            temporary = self.path.with_suffix(".new")
            with temporary.open("w") as file:
                file.write(json.dumps(states))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)


class Table:
    """A row a job, with an index of those that wait; a claim is a transaction. SQLite as it comes."""

    def __init__(self, folder: Path, jobs: Sequence[Job], n_done: int):
        folder.mkdir(parents=True)
        self.known = {job.id: job for job in jobs}
        self.base = sqlite3.connect(folder / "jobs.sqlite", isolation_level=None)
        self.base.execute(
            "CREATE TABLE jobs (n INTEGER PRIMARY KEY, id TEXT UNIQUE, state TEXT, worker TEXT, done INT)"
        )
        self.base.execute("CREATE INDEX waiting ON jobs (state, n)")
        self.base.execute("BEGIN")
        self.base.executemany(
            "INSERT INTO jobs VALUES (?, ?, ?, '', 0)",
            [(i, job.id, State.DONE if i < n_done else State.QUEUED) for i, job in enumerate(jobs)],
        )
        self.base.execute("COMMIT")

    def claim(self, worker: str) -> Lease:
        self.base.execute("BEGIN IMMEDIATE")
        (name,) = self.base.execute("SELECT id FROM jobs WHERE state = ? ORDER BY n LIMIT 1", [State.QUEUED]).fetchone()
        self.base.execute("UPDATE jobs SET state = ?, worker = ? WHERE id = ?", [State.RUNNING, worker, name])
        self.base.execute("COMMIT")
        return Lease(self, self.known[name])

    def beat(self, job: Job, progress: Progress) -> None:
        self.base.execute("UPDATE jobs SET done = ? WHERE id = ?", [progress.done, job.id])

    def free(self, job: Job) -> None:
        self.base.execute("UPDATE jobs SET state = ?, worker = '', done = 0 WHERE id = ?", [State.QUEUED, job.id])

    def jobs(self) -> list[tuple[Job, Status]]:
        rows = self.base.execute("SELECT id, state, worker, done FROM jobs ORDER BY n").fetchall()
        return [(self.known[name], Status(State(state), Progress(done), worker)) for name, state, worker, done in rows]
