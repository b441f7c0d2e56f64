"""Who takes which job, and what becomes of it: claims, leases that expire, retries, needs, cancelling, many at once."""

import dataclasses
import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
import uuid

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mvdream_fast.core.errors import ArgumentError, OutputError
from mvdream_fast.jobs import queue as queues
from mvdream_fast.jobs.job import Job, LeaseLost, Progress, State
from mvdream_fast.jobs.owner import is_gone, this_process
from mvdream_fast.jobs.queue import Queue
from mvdream_fast.jobs.store import open_store

SPAWN = multiprocessing.get_context("spawn")
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


@pytest.mark.parametrize("ended", ["waits", "failed", "cancelled", "runs"])
def test_asking_again_grants_the_retries_that_are_asked_for(place, ended):
    """Whatever became of the job since it was asked for with fewer, and without taking it from who is at it."""
    queue = opened(place)
    queue.ask(CHAIR, CAR)
    lease = queue.claim("w")
    if ended == "failed":
        lease.fail("no space", 7)
    elif ended == "cancelled":
        queue.cancel(CHAIR.id)
    elif ended == "waits":
        lease.free()
    again = opened(place)
    again.ask(dataclasses.replace(CHAIR, retries=2), CAR)
    again.ask(dataclasses.replace(CHAIR, retries=1), CAR)
    assert states(again) == {"a chair": "running" if ended == "runs" else "queued", "a car": "queued"}
    for left in (2, 1, 0):
        lease = lease if ended == "runs" and left == 2 else opened(place).claim("w")
        lease.fail("again")
        assert states(opened(place))["a chair"] == ("queued" if left else "failed")


def test_asking_again_leaves_what_is_done(place):
    queue = opened(place)
    queue.ask(CHAIR, CAR)
    queue.claim("w").finish()
    queue.cancel(CAR.id)
    queue.ask(dataclasses.replace(CHAIR, retries=3), CAR)
    assert states(queue) == {"a chair": "done", "a car": "queued"}
    assert queue.job(CHAIR.id).retries == 0


def test_asking_again_for_a_need_asks_for_what_needs_it(place):
    queue, asset = opened(place), dataclasses.replace(CAR, needs=(CHAIR.id,))
    queue.ask(CHAIR, asset)
    queue.cancel(CHAIR.id)
    assert queue.status(CAR.id).message == "what it needs was not made: a chair: cancelled"
    queue.ask(CHAIR, asset)
    assert states(queue) == {"a chair": "queued", "a car": "queued"}


@pytest.mark.parametrize(
    "stray", ["events/.DS_Store", "events/.nfs0000000000a1", "events/x.1", "events/{}.1.orig", "jobs/._x.jsonl",
              "jobs/.DS_Store", "jobs/notes.txt", "kinds/.DS_Store", "beats/.DS_Store"],
)  # fmt: skip
def test_files_of_others_in_its_folders_are_none_of_its_own(place, stray):
    """As a file browser, an editor or a network filesystem leaves them."""
    queue = opened(place)
    queue.add(CHAIR, CAR)
    queue.claim("w").finish()
    queue.store.write(stray.format(CHAIR.id), b"\0\5\x16\7\0\2")
    other = opened(place)
    assert states(other) == states(queue) == {"a chair": "done", "a car": "queued"}
    other.claim("w").finish()
    assert states(queue)["a car"] == "done"


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


def test_a_job_of_a_dead_worker_comes_before_what_matters_less(place, monkeypatch):
    """And after all that waits with the same priority, whose claim costs no look at heartbeats."""
    monkeypatch.setattr(queues, "this_process", lambda: "another-machine/1/1")
    queue, expiry = opened(place), 0.05
    queue.add(CHAIR, CAR, Job("sds", {"prompt": "an urn"}, priority=-1))
    queue.claim("dead")
    other, read = opened(place, expiry), []
    monkeypatch.setattr(queues, "FRESH_S", 1e9)
    plain, other.store.read_many = other.store.read_many, lambda names: plain([read.append(n) or n for n in names])
    assert other.claim("w").job.title == "a car"
    assert [name for name in read if name.startswith("beats")] == []
    other.jobs()
    time.sleep(2 * expiry)
    assert [third.claim("w").job.title for third in (other, opened(place))] == ["a chair", "an urn"]


def test_who_has_lost_a_race_takes_any_job(place, monkeypatch):
    """The second of the list would be taken by another who has lost the same race; what matters less still waits."""
    drawn = []
    monkeypatch.setattr(queues.secrets, "randbelow", lambda n: drawn.append(n) or 0)
    jobs = [Job("x", {"prompt": str(i)}) for i in range(5)]
    late, other = opened(place), opened(place)
    late.add(*jobs, Job("x", {"prompt": "less"}, priority=-1))
    other.look()
    assert [late.claim("fast").job.title for _ in range(2)] == ["0", "1"]
    assert other.claim("slow").job.title == "4"
    assert drawn == [4], "of the four that the first of the list was not, the last"
    assert [other.claim("slow").job.title for _ in range(3)] == ["3", "2", "less"]


def _claims_all(place: str, worker: str, out) -> None:
    queue, mine = opened(place), []
    while (lease := queue.claim(worker)) is not None:
        lease.finish()
        mine.append(lease.job.id)
    out.put(mine)


def test_processes_that_claim_at_once_share_the_jobs(tmp_path):
    """Three processes empty one queue: every job is done once, and the names of kinds say what the events do."""
    jobs = [Job("x", {"number": i}) for i in range(60)]
    opened(tmp_path / "out").add(*jobs)
    out = SPAWN.Queue()
    workers = [SPAWN.Process(target=_claims_all, args=(str(tmp_path / "out"), str(i), out)) for i in range(3)]
    [worker.start() for worker in workers]
    found = [job_id for _ in workers for job_id in out.get(timeout=60)]
    [worker.join() for worker in workers]
    assert sorted(found) == sorted(job.id for job in jobs)
    _check_events(opened(tmp_path / "out"), ["claim"] * 60 + ["done"] * 60)


def _check_events(queue: Queue, kinds: list[str]) -> None:
    """There are events of these kinds, their numbers have no gaps, and each has the name of its kind and no other."""
    store = queue.store
    events = {name: json.loads(store.read(f"events/{name}"))["event"] for name in store.names("events")}
    assert sorted(events.values()) == sorted(kinds)
    assert sorted(store.names("kinds")) == sorted(f"{name}.{kind}" for name, kind in events.items())
    numbers: dict[str, list[int]] = {}
    for name in events:
        numbers.setdefault(name.partition(".")[0], []).append(int(name.partition(".")[2]))
    assert all(sorted(found) == [*range(1, len(found) + 1)] for found in numbers.values())


def test_threads_that_do_all_kinds_of_things_at_once(place, monkeypatch):
    """Eight threads with a queue each: workers that finish, fail and give back, and people who cancel and ask again. No
    job has two ends, no number two events, and whoever looks afterwards, by names or by reading, sees the same."""
    if place.startswith("memory://"):  # which creates within a thread only; S3 and the like do so for all
        lock, plain = threading.Lock(), MemoryFileSystem.pipe_file

        def pipe_file(self, path, data, mode="overwrite", **more):
            with lock:
                return plain(self, path, data, mode=mode, **more)

        monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    monkeypatch.setattr(queues, "FRESH_S", 0.01)
    monkeypatch.setattr(queues, "FEW", 0)
    jobs = [Job("x", {"number": i}, retries=1) for i in range(40)]
    opened(place).add(*jobs)
    start, errors, done = threading.Barrier(8), [], []
    threads = [threading.Thread(target=_tries, args=(place, i, start, errors, done)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert errors == []
    assert len(done) == len(set(done))
    by_names = opened(place)
    monkeypatch.setattr(queues, "FEW", 10**9)
    by_reading = opened(place)
    assert by_names.jobs() == by_reading.jobs()
    assert {job.id for job, status in by_names.jobs() if status.state == State.DONE} == set(done)
    assert {status.state for _, status in by_names.jobs()} <= {State.DONE, State.FAILED, State.CANCELLED}
    store = by_names.store
    _check_events(by_names, [json.loads(store.read(f"events/{name}"))["event"] for name in store.names("events")])


def _tries(place: str, number: int, start: threading.Barrier, errors: list, done: list) -> None:
    queue, turn = opened(place), number
    try:
        start.wait()
        while (lease := queue.claim(str(number))) is not None:
            turn += 1
            try:
                (lease.finish, lambda lease=lease: lease.fail("ill"), lease.free, lease.finish)[turn % 4]()
                if turn % 4 in (0, 3):
                    done.append(lease.job.id)
            except LeaseLost as lost:
                if lost.event != "cancel":
                    raise
            if turn % 5 == 0:
                (queue.cancel if turn % 2 else queue.retry)(queue.jobs()[turn % 40][0].id)
    except Exception as error:
        errors.append(error)


def test_a_queue_without_kinds_is_read_as_it_is(place, monkeypatch):
    """As the version before left it, and as one whose workers died between an event and the name of its kind."""
    monkeypatch.setattr(queues, "FEW", 0)
    queue = opened(place)
    queue.add(*(Job("x", {"number": i}) for i in range(4)))
    done, failed, freed, _ = (queue.claim("old") for _ in range(4))
    done.finish({"size": 3})
    failed.fail("ill", 5)
    freed.free()
    known = queue.jobs()
    queue.store.delete("kinds")
    new = opened(place)
    assert new.jobs() == known
    assert [str(status.state) for _, status in known] == ["done", "failed", "queued", "running"]
    lease = new.claim("new")
    assert (lease.job.id, lease.attempt) == (freed.job.id, 2)
    lease.finish()
    assert new.cancel(known[3][0].id)
    assert {name.rpartition(".")[2] for name in new.store.names("kinds")} == {"claim", "done", "cancel"}
    assert opened(place).jobs() == new.jobs()


def test_a_kind_whose_event_was_lost_decides_nothing(place, monkeypatch):
    """As after a crash of a file server: a name of a kind without its event, and two of one number."""
    monkeypatch.setattr(queues, "FEW", 0)
    queue = opened(place)
    queue.add(CHAIR)
    queue.store.mark(f"kinds/{CHAIR.id}.1.cancel")
    assert states(opened(place)) == {"a chair": "queued"}
    lease = opened(place).claim("w")
    assert states(opened(place)) == {"a chair": "running"}
    lease.finish()
    assert states(opened(place)) == {"a chair": "done"}


def test_a_disk_that_is_full_after_an_event_changes_nothing(place, monkeypatch):
    monkeypatch.setattr(queues, "FEW", 0)
    queue = opened(place)
    queue.add(CHAIR)
    monkeypatch.setattr(queue.store, "mark", _full)
    queue.claim("w").finish()
    assert states(opened(place)) == {"a chair": "done"}


def _full(_):
    raise OutputError("No space left on device")


def test_an_event_that_is_read_while_it_is_made_is_read_again(tmp_path):
    """Where there are no hard links its file is empty for a moment: no claim, if that is not what it becomes."""
    queue = opened(tmp_path / "out", expiry=0.0)
    queue.add(CHAIR)
    queue.claim("w").finish()
    event = tmp_path / f"out/events/{CHAIR.id}.2"
    whole = event.read_bytes()
    event.write_bytes(b"")
    shutil.rmtree(tmp_path / "out/kinds")
    other = opened(tmp_path / "out")
    assert states(other) == {"a chair": "running"}
    event.write_bytes(whole)
    assert states(other) == {"a chair": "done"}


def test_a_look_at_many_jobs_reads_only_what_is_new(tmp_path):
    """The work of a claim is a list of names and one file, however many jobs there are and whatever happened."""
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
    other = opened(tmp_path / "out")
    for i in range(queues.FEW + 5):
        lease = other.claim("another")
        if i % 2:
            lease.finish({"number": i})
    queue.look()
    assert len(read) == 1, "their names say what they are"
    assert queue.claim("w").attempt == 1
    assert len(read) == 1
    assert queue.status(lease.job.id).result == {}
    assert queue.jobs() == other.jobs()
