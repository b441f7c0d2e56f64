"""Who takes which job, and what becomes of it: claims, leases that expire, retries, needs, cancelling, many at once."""

import dataclasses
import json
import multiprocessing
import subprocess
import sys
import time
import uuid

import pytest

from mvdream_fast.core.errors import ArgumentError, OutputError
from mvdream_fast.jobs import queue as queues
from mvdream_fast.jobs.job import Job, LeaseLost, Progress, State
from mvdream_fast.jobs.owner import is_gone, this_process
from mvdream_fast.jobs.queue import Queue
from mvdream_fast.jobs.store import open_store

CHAIR, CAR = Job("sds", {"prompt": "a chair"}), Job("sds", {"prompt": "a car"})


@pytest.fixture(params=["folder", "memory://"])
def place(request, tmp_path):
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory://" else str(tmp_path / "out")


def opened(place, expiry=60.0) -> Queue:
    return Queue(open_store(place), expiry)


def states(queue: Queue) -> dict[str, str]:
    return {job.title: str(status.state) for job, status in queue.jobs()}


def test_the_same_request_is_the_same_job_whoever_asks():
    same = Job("sds", {"prompt": "a chair"}, priority=3, retries=2, created=7.0)
    assert same.id == CHAIR.id == "".join(c for c in CHAIR.id if c in "0123456789abcdef")
    assert len(CHAIR.id) == 16
    assert len({CHAIR.id, CAR.id, Job("generate", CHAIR.request).id}) == 3
    assert CHAIR.name == f"a-chair-{CHAIR.id}"


def test_a_job_goes_from_queued_over_running_to_done(place):
    queue = opened(place)
    assert queue.add(CHAIR, CAR, CHAIR) == [CHAIR.id, CAR.id, CHAIR.id]
    assert opened(place).add(CAR) == [CAR.id]
    assert states(queue) == {"a chair": "queued", "a car": "queued"}
    lease = queue.claim("w1")
    assert lease.job == dataclasses.replace(CHAIR, created=lease.job.created)
    assert lease.attempt == 1
    lease.heartbeat(Progress(3, 10, "growing"))
    status = opened(place).status(CHAIR.id)
    assert (status.state, status.progress, status.worker) == (State.RUNNING, Progress(3, 10, "growing"), "w1")
    lease.finish({"folder": "assets/x"})
    assert opened(place).claim("w2").job.id == CAR.id
    assert opened(place).claim("w3") is None
    status = queue.status(CHAIR.id)
    assert (status.state, status.result) == (State.DONE, {"folder": "assets/x"})


def test_higher_priorities_come_first_even_when_they_come_late(place, monkeypatch):
    monkeypatch.setattr(queues, "FRESH_S", 0)
    queue, third = opened(place), Job("sds", {"prompt": "an urn"}, priority=1)
    queue.add(CHAIR, CAR)
    assert queue.claim("w").job.title == "a chair"
    opened(place).add(third)
    assert [queue.claim("w").job.title for _ in range(2)] == ["an urn", "a car"]


def test_a_worker_takes_only_the_kinds_that_it_knows(place):
    queue = opened(place)
    queue.add(CHAIR, Job("render", {"shard": 1}))
    assert queue.claim("w", ["render"]).job.kind == "render"
    assert queue.claim("w", ["render"]) is None


def test_a_silent_worker_loses_its_job_and_can_write_nothing_any_more(place, monkeypatch):
    """A worker of another machine: nobody can tell that it is gone but by its silence."""
    monkeypatch.setattr(queues, "this_process", lambda: "another-machine/1/1")
    monkeypatch.setattr(queues, "FRESH_S", 0)
    first, second = opened(place), opened(place, expiry=0.2)
    first.add(CHAIR)
    lost = first.claim("w1")
    lost.heartbeat(Progress(4, 10))
    assert second.claim("w2") is None
    for i in range(4):  # as long as it is heard of it keeps the job
        time.sleep(0.1)
        lost.heartbeat(Progress(4, 10, f"beat {i}"))
        assert second.claim("w2") is None
    time.sleep(0.25)
    lease = second.claim("w2")
    assert lease.attempt == 2
    assert lease.seconds >= 0.4, "the time of the lost attempt is counted"
    for write in (lambda: lost.heartbeat(Progress()), lost.finish, lambda: lost.fail("x"), lost.free, lost.check):
        with pytest.raises(LeaseLost) as raised:
            write()
        assert raised.value.event == "claim"
    assert first.status(CHAIR.id).worker == "w2"
    lease.finish()
    assert states(first) == {"a chair": "done"}


def test_a_worker_that_was_killed_on_this_machine_is_replaced_at_once(tmp_path):
    queue = opened(tmp_path / "out")
    queue.add(CHAIR)
    code = (
        "import os, sys; from mvdream_fast.jobs.queue import Queue; from mvdream_fast.jobs.store import open_store;"
        "assert Queue(open_store(sys.argv[1])).claim('w1'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")]).returncode == -9
    assert queue.claim("w2").attempt == 2


def test_who_a_process_is():
    assert not is_gone(this_process())
    assert not is_gone("")
    assert not is_gone("another-machine/1/1")
    here, number, started = this_process().split("/")
    assert is_gone(f"{here}/{number}/{int(started) + 1}"), "the number is another process' by now"


def test_a_job_that_kills_every_worker_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(queues, "this_process", lambda: this_process().rpartition("/")[0] + "/1")
    queue = opened(tmp_path / "out")
    queue.add(CHAIR)
    for reached, claims in ((0, 1), (5, 1), (5, queues.MAX_LOST - 1)):  # where it gets further it may go on
        for _ in range(claims):
            lease = queue.claim("w")
            lease.heartbeat(Progress(reached, 10))
    assert queue.status(CHAIR.id).state == State.RUNNING
    lease = queue.claim("w")
    lease.heartbeat(Progress(5, 10))
    assert queue.claim("w") is None
    status = queue.status(CHAIR.id)
    assert status.state == State.FAILED
    assert status.message == f"{queues.MAX_LOST} workers died with it, one after the other; out of memory, perhaps"


def test_failures_are_tried_again_as_often_as_asked(place):
    queue = opened(place)
    queue.add(dataclasses.replace(CHAIR, retries=1))
    queue.claim("w").fail("no such model", 3)
    assert states(queue) == {"a chair": "queued"}
    queue.claim("w").fail("no such model still", 3)
    status = queue.status(CHAIR.id)
    assert (status.state, status.message, status.exit_code, status.attempt) == (
        State.FAILED, "no such model still", 3, 2,
    )  # fmt: skip
    assert queue.claim("w") is None
    assert queue.retry(CHAIR.id, retries=2)
    assert not queue.retry(CHAIR.id)
    for _ in range(3):
        assert states(queue) == {"a chair": "queued"}
        queue.claim("w").fail("again")
    assert states(queue) == {"a chair": "failed"}


def test_a_job_that_is_cancelled_stops_and_can_be_asked_for_again(place):
    queue, other = opened(place), opened(place)
    queue.add(CHAIR, CAR)
    lease = queue.claim("w")
    assert other.cancel(CHAIR.id)
    assert other.cancel(CAR.id)
    assert not other.cancel(CAR.id)
    with pytest.raises(LeaseLost) as raised:
        lease.heartbeat(Progress(1, 2))
    assert raised.value.event == "cancel"
    assert queue.claim("w") is None
    assert states(queue) == {"a chair": "cancelled", "a car": "cancelled"}
    assert queue.retry(CHAIR.id)
    lease = queue.claim("w")
    assert (lease.job.id, lease.attempt) == (CHAIR.id, 2)
    lease.finish()
    assert not queue.cancel(CHAIR.id)
    assert not queue.retry(CHAIR.id)


def test_a_job_waits_for_what_it_needs_and_fails_with_it(place):
    tuning = Job("dreambooth", {"prompt": "a sks chair"})
    asset = Job("sds", {"prompt": "a chair"}, priority=5, needs=(tuning.id,))
    queue = opened(place)
    queue.add(asset, tuning)
    lease = queue.claim("w")
    assert lease.job.kind == "dreambooth"
    assert queue.claim("w") is None
    lease.fail("no photos", 5)
    assert queue.claim("w") is None
    assert queue.status(asset.id).message == "what it needs was not made: a sks chair: no photos"
    assert states(queue) == {"a chair": "failed", "a sks chair": "failed"}
    queue.retry(tuning.id)
    queue.claim("w").finish()
    assert queue.claim("w").job.id == asset.id


def test_a_worker_may_give_its_job_back(place):
    queue = opened(place)
    queue.add(CHAIR)
    lease = queue.claim("w1")
    lease.heartbeat(Progress(2, 4))
    lease.free()
    assert queue.status(CHAIR.id).state == State.QUEUED
    assert queue.claim("w2").attempt == 2


def test_an_event_that_was_cut_short_is_a_claim_that_ends(tmp_path):
    """As where a machine stops between the making of a file and its filling."""
    queue = opened(tmp_path / "out", expiry=0.05)
    queue.add(CHAIR)
    (tmp_path / "out/events").mkdir()
    (tmp_path / f"out/events/{CHAIR.id}.1").write_bytes(b"")
    assert states(queue) == {"a chair": "running"}
    time.sleep(0.1)
    assert queue.claim("w").job.id == CHAIR.id


def test_a_place_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds something else than jobs"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/queue.json").write_text('{"format": 99}')
    with pytest.raises(OutputError, match="jobs of another version .99."):
        opened(tmp_path / "other")
    with pytest.raises(ArgumentError, match="there is no job 'x'"):
        opened(tmp_path / "new").status("x")


def _claims_all(place: str, worker: str, out) -> None:
    queue, mine = opened(place), []
    while (lease := queue.claim(worker)) is not None:
        lease.finish()
        mine.append(lease.job.id)
    out.put(mine)


def test_processes_that_claim_at_once_share_the_jobs(tmp_path):
    """Three processes empty one queue: every job is done once."""
    jobs = [Job("x", {"number": i}) for i in range(60)]
    opened(tmp_path / "out").add(*jobs)
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    workers = [context.Process(target=_claims_all, args=(str(tmp_path / "out"), str(i), out)) for i in range(3)]
    [worker.start() for worker in workers]
    found = [job_id for _ in workers for job_id in out.get(timeout=60)]
    [worker.join() for worker in workers]
    assert sorted(found) == sorted(job.id for job in jobs)
    events = [json.loads(path.read_text())["event"] for path in (tmp_path / "out/events").iterdir()]
    assert sorted(events) == ["claim"] * 60 + ["done"] * 60


def test_a_look_at_many_jobs_reads_only_what_is_new(tmp_path):
    """The work of a claim is a list of names and one file, however many jobs there are."""
    store = open_store(tmp_path / "out")
    queue = Queue(store)
    queue.add(*(Job("x", {"number": i}) for i in range(500)))
    read, plain = [], store.read_many
    store.read_many = lambda names: plain([read.append(name) or name for name in names])
    for _ in range(5):
        queue.claim("w").finish()
        queue.look()
    assert read == []
    opened(tmp_path / "out").claim("another").finish()
    queue.look()
    assert len(read) == 1
