"""A worker with functions of the test's own: what it does with results, errors, a full disk, stops and lost jobs."""

import errno
import json
import os
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest

from mvdream_fast.core.errors import InputFileError, OutputError
from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.jobs import queue as queues
from mvdream_fast.jobs import worker
from mvdream_fast.jobs.job import Job, Progress, State
from mvdream_fast.jobs.queue import Queue
from mvdream_fast.jobs.store import open_store
from mvdream_fast.jobs.worker import DeviceBroken, Task, work
from mvdream_fast.jobs.workspace import Workspace, prune

ONE, TWO = Job("x", {"prompt": "one"}), Job("x", {"prompt": "two"})


@pytest.fixture(params=["folder", "memory://"])
def queue(request, tmp_path) -> Queue:
    place = f"memory://{uuid.uuid4().hex}" if request.param == "memory://" else str(tmp_path / "out")
    return Queue(open_store(place))


@pytest.fixture
def local(tmp_path) -> Queue:
    return Queue(open_store(tmp_path / "out"))


def run(queue: Queue, runner, stop: Interrupt | None = None, **more) -> list[str]:
    said: list[str] = []
    work(queue, {"x": runner}, "w", stop or Interrupt(), say=said.append, **more)
    return said


def writes(task: Task) -> dict:
    task.report(1, 1, "")
    (task.folder / "deep").mkdir()
    (task.folder / "deep/asset").write_text(task.job.request["prompt"])
    return {"size": 3}


def test_what_was_made_is_published_once(queue):
    queue.add(ONE, TWO)
    run(queue, writes)
    for job in (ONE, TWO):
        status = queue.status(job.id)
        assert (status.state, status.result) == (State.DONE, {"size": 3, "folder": f"assets/{job.name}"})
        assert queue.store.read(f"assets/{job.name}/deep/asset") == job.request["prompt"].encode()
    assert queue.store.names("work") == []
    assert sorted(queue.store.names("assets")) == sorted([ONE.name, TWO.name])
    run(queue, lambda task: pytest.fail("it is done"))


def test_one_error_stops_no_other_job_and_is_told(queue, capsys):
    def runner(task: Task) -> dict:
        if task.job.request["prompt"] == "one":
            raise InputFileError("no such photos")
        raise ZeroDivisionError("a bug")

    queue.add(ONE, TWO)
    said = run(queue, runner)
    one, two = queue.status(ONE.id), queue.status(TWO.id)
    assert (one.state, one.message, one.exit_code) == (State.FAILED, "no such photos", 5)
    assert (two.state, two.message, two.exit_code) == (State.FAILED, "ZeroDivisionError: a bug", 1)
    assert "one: failed (5): no such photos" in said
    assert "in runner" in capsys.readouterr().err, "a bug comes with its traceback"


def test_a_retry_goes_on_from_what_was_saved(queue):
    def runner(task: Task) -> dict:
        file = task.folder / "steps"
        steps = int(file.read_text()) if file.exists() else 0
        file.write_text(str(steps + 10))
        (task.folder / ".lock").write_text("of this attempt")
        task.save()
        if steps < 20:
            raise OutputError("the network share is away")
        assert not (task.folder / "old").exists()
        return {"steps": steps + 10}

    queue.add(Job(ONE.kind, ONE.request, retries=2))
    run(queue, runner)
    status = queue.status(ONE.id)
    assert (status.state, status.attempt, status.result["steps"]) == (State.DONE, 3, 30)
    assert queue.store.names("work") == []
    prune(queue.store, [ONE])


def test_a_full_disk_is_waited_for(local, monkeypatch):
    """At every place where a worker writes: the claim, the folder, the work, the end."""
    monkeypatch.setattr(worker, "PAUSES_S", (0.01, 0.01))
    plain, refused = open, []

    def refuses(file, mode="r", *more, **named):
        if "w" in mode and len(refused) < limit:
            refused.append(str(file))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return plain(file, mode, *more, **named)

    local.add(ONE, TWO)
    for limit in (3, 20):
        refused.clear()
        monkeypatch.setattr("mvdream_fast.jobs.store.open", refuses, raising=False)
        if limit == 3:
            lease = local.claim
            with pytest.raises(OutputError, match="No space left"):
                lease("w")
            continue
        said = run(local, writes)
    assert len(refused) == 20
    assert any("w: the disk is full; waiting for space" in line for line in said)
    assert [local.status(job.id).state for job in (ONE, TWO)] == [State.DONE] * 2
    assert [local.status(job.id).attempt for job in (ONE, TWO)] == [1, 1]


def test_a_disk_that_stays_full_is_a_failure_in_the_end(local, monkeypatch):
    monkeypatch.setattr(worker, "PAUSES_S", (0.01, 0.01))

    def runner(task: Task):
        raise OutputError("cannot write x") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    local.add(ONE)
    run(local, runner, patience=0.1)
    status = local.status(ONE.id)
    assert (status.state, status.exit_code, status.message) == (State.FAILED, 7, "cannot write x")


def test_a_stop_saves_gives_the_job_back_and_leaves(queue):
    stop = Interrupt()

    def runner(task: Task) -> dict | None:
        (task.folder / "ckpt").write_text("7")
        stop.requested = signal.SIGINT
        task.report(7, 10, "")
        assert task.stop.requested == signal.SIGINT
        return None

    queue.add(ONE, TWO)
    run(queue, runner, stop)
    assert [status.state for _, status in queue.jobs()] == [State.QUEUED] * 2

    def second(task: Task) -> dict:
        if task.job.id == ONE.id:
            assert (task.folder / "ckpt").read_text() == "7"
        return {}

    run(queue, second)
    assert queue.status(ONE.id).attempt == 2


def test_a_cancelled_job_is_stopped_and_the_next_one_taken(local, monkeypatch):
    monkeypatch.setattr(worker, "IDLE_S", 0.02)
    other = Queue(local.store)

    def runner(task: Task) -> dict | None:
        task.report(1, 2, "")
        if task.job.id == TWO.id:
            return {}
        assert other.cancel(ONE.id)
        end = time.monotonic() + 20
        while task.stop.requested is None and time.monotonic() < end:
            time.sleep(0.01)
        return None

    local.add(ONE, TWO)
    said = run(local, runner)
    assert "one: cancelled" in said
    assert [str(status.state) for _, status in local.jobs()] == ["cancelled", "done"]


def test_who_lost_a_job_leaves_nothing_where_it_counts(local, monkeypatch):
    """A worker that was silent for too long finishes after another one: its folder is nobody's, its word is void."""
    monkeypatch.setattr(queues, "this_process", lambda: "another-machine/1/1")
    second = Queue(local.store, expiry=0.0)

    def slow(task: Task) -> dict:
        if not second.status(ONE.id).result:
            second.look()
            run(second, writes_and_more)
        (task.folder / "asset").write_text("from a ghost")
        return {}

    def writes_and_more(task: Task) -> dict:
        assert task.folder.name == f"{ONE.name}.2"
        return writes(task)

    local.add(ONE)
    said = run(local, slow)
    assert any("one: " in line for line in said)
    status = local.status(ONE.id)
    assert (status.state, status.attempt, status.result["size"]) == (State.DONE, 2, 3)
    assert [p.name for p in Path(local.store.place, "assets", ONE.name).iterdir()] == ["deep"]
    events = sorted(Path(local.store.place, "events").iterdir())
    assert [json.loads(path.read_text())["event"] for path in events] == ["claim", "claim", "done"]


def test_an_asset_that_was_published_by_a_worker_that_died_then_is_not_made_again(local):
    local.add(ONE)
    workspace = Workspace(local.store, ONE, 1, Path())
    (workspace.begin() / "asset").write_text("whole")
    workspace.publish()
    run(local, lambda task: pytest.fail("it is there"))
    assert local.status(ONE.id).state == State.DONE
    assert (Path(local.store.place) / "assets" / ONE.name / "asset").read_text() == "whole"


def test_checkpoints_are_mirrored_to_where_another_machine_finds_them():
    """Only what is new is copied, and what has gone is deleted."""
    queue = Queue(open_store(f"memory://{uuid.uuid4().hex}"))
    store, written = queue.store, []
    plain = store.write
    store.write = lambda name, data: (written.append(name), plain(name, data))

    def first(task: Task) -> None:
        (task.folder / "ckpt").mkdir()
        for step in (1, 2, 3):
            (task.folder / f"ckpt/{step}.safetensors").write_bytes(bytes([step]))
            (task.folder / "ckpt/LATEST").write_text(f"{step}.safetensors" + "\n" * step)
            (task.folder / f"ckpt/{step - 1}.safetensors").unlink(missing_ok=True)
            task.save()
        stop.requested = task.stop.requested = signal.SIGTERM

    stop = Interrupt()
    queue.add(ONE)
    run(queue, first, stop)
    names = [name.removeprefix(f"work/{ONE.name}.1/") for name in written if name.startswith("work/")]
    sent = [name for step in (1, 2, 3) for name in (f"ckpt/{step}.safetensors", "ckpt/LATEST")]
    assert names == [*sent[:2], ".whole", *sent[2:]]

    def second(task: Task) -> dict:
        assert sorted(path.name for path in (task.folder / "ckpt").iterdir()) == ["3.safetensors", "LATEST"]
        return {}

    run(queue, second)
    assert store.read(f"assets/{ONE.name}/ckpt/3.safetensors") == b"\x03"


def test_what_has_arrived_in_part_is_not_gone_on_from():
    """A worker behind a URL that died while it sent its first checkpoint, and one while it published."""
    queue = Queue(open_store(f"memory://{uuid.uuid4().hex}"))
    store = queue.store
    store.write(f"work/{ONE.name}.1/ckpt/LATEST", b"4")
    store.write(f"work/{ONE.name}.1/.whole", b"")
    store.write(f"work/{ONE.name}.2/ckpt/8", b"half of it")
    store.write(f"assets/{ONE.name}/mesh", b"half of it")

    def runner(task: Task) -> dict:
        assert [path.name for path in (task.folder / "ckpt").iterdir()] == ["LATEST"]
        (task.folder / "mesh").write_text("whole")
        return {}

    queue.add(ONE)
    for _ in range(2):
        queue.claim("w").free()
    run(queue, runner)
    assert queue.status(ONE.id).attempt == 3
    assert store.read(f"assets/{ONE.name}/mesh") == b"whole"
    assert store.names("work") == []


def test_a_broken_device_ends_the_worker_and_not_the_queue(local):
    def runner(task: Task):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    local.add(ONE, TWO)
    with pytest.raises(DeviceBroken):
        run(local, runner)
    assert [str(status.state) for _, status in local.jobs()] == ["failed", "queued"]


def test_an_idle_worker_waits_for_what_others_have_in_hand(local, monkeypatch):
    """It may have to take it over."""
    monkeypatch.setattr(worker, "IDLE_S", 0.02)
    local.add(ONE)
    lease = Queue(local.store).claim("another")
    thread = threading.Thread(target=run, args=(local, writes))
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    lease.heartbeat(Progress(1, 2))
    lease.free()
    thread.join(20)
    assert not thread.is_alive()
    assert Queue(local.store).status(ONE.id).worker == "w"
