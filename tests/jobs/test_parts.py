"""Parts of a rendering through a queue: made once, by whoever takes them, into one data set; what a failure says."""

import signal

import pytest
import trimesh

from mvdream_fast import render
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.data.shards import list_shards, read_shard
from mvdream_fast.jobs import parts
from mvdream_fast.jobs.job import State
from mvdream_fast.jobs.setup import Setup
from mvdream_fast.jobs.watch import Watch, failures
from mvdream_fast.jobs.worker import Task, work


@pytest.fixture
def meshes(tmp_path):
    folder = tmp_path / "meshes"
    folder.mkdir()
    for name, mesh in (("ball", trimesh.creation.icosphere(1)), ("cone", trimesh.creation.cone(1, 2)),
                       ("ring", trimesh.creation.torus(1, 0.4))):  # fmt: skip
        mesh.export(folder / f"{name}.ply")
    return folder


def queued(out, flags, n):
    setup = Setup(str(out / parts.QUEUE), device="cpu")
    queue = setup.queue()
    queue.add(*parts.part_jobs(flags, out, n))
    return setup, queue


def test_all_parts_are_made_once(meshes, tmp_path):
    out = tmp_path / "out"
    flags = {"source": str(meshes), "orbits": 1, "recolours": 0, "sheet": False, "held_out": 0.0}
    setup, queue = queued(out, flags, 2)
    said = []
    work(queue, parts.runners(setup), "w", Interrupt(), say=said.append)
    assert [status.state for _, status in queue.jobs()] == [State.DONE] * 2
    assert sorted(s.meta["id"] for path in list_shards(out) for s in read_shard(path)) == [
        "ball-ply", "cone-ply", "ring-ply"
    ]  # fmt: skip
    n = len(said)
    queued(out, flags, 2)
    work(queue, parts.runners(setup), "w", Interrupt(), say=said.append)
    assert len(said) == n


def test_a_part_says_why_it_failed(tmp_path):
    setup, queue = queued(tmp_path / "out", {"source": str(tmp_path / "nothing")}, 1)
    work(queue, parts.runners(setup), "w", Interrupt(), say=lambda _: None)
    ((_, status),) = queue.jobs()
    assert (status.state, status.exit_code) == (State.FAILED, 5)
    assert "is not a folder of meshes" in status.message


def test_failures_are_told_as_the_command_s_own_with_their_part(tmp_path, capsys):
    _, queue = queued(tmp_path / "out", {"source": "meshes"}, 3)
    queue.claim("w").finish()
    queue.claim("w").fail("no space", 7)
    queue.claim("w").fail("no memory", 4)
    ids = {job.id for job, _ in queue.jobs()}
    assert failures(queue, ids, "render") == 7
    assert capsys.readouterr().err == "render: 'part 2/3': no space\nrender: 'part 3/3': no memory\n"


def test_what_waits_or_runs_in_the_end_is_a_failure_too(tmp_path, capsys):
    _, queue = queued(tmp_path / "out", {"source": "meshes"}, 3)
    queue.claim("w").finish()
    queue.claim("w")
    ids = {job.id for job, _ in queue.jobs()}
    assert failures(queue, ids, "render") == 1
    running, waiting = capsys.readouterr().err.splitlines()
    assert running == "render: 'part 2/3': a worker that is gone has begun it; the same command goes on"
    assert waiting == "render: 'part 3/3': no worker is left to make it; the same command goes on"
    queue.claim("w").fail("no memory", 4)
    assert failures(queue, ids, "render") == 4, "the code is that of the first that failed"
    assert failures(queue, [*ids][:0], "render") == 0


def test_the_same_command_makes_what_failed_or_was_cancelled(meshes, tmp_path, monkeypatch):
    flags = {"source": str(meshes)}
    _, queue = queued(tmp_path / "out", flags, 2)
    queue.claim("w").fail("no space", 7)
    for job, _ in queue.jobs():
        queue.cancel(job.id)
    seen = []
    monkeypatch.setattr(Watch, "tend", lambda *_: seen.extend(status.state for _, status in queue.jobs()))
    parts.render_parts(flags, tmp_path / "out", 2, 1, None)
    assert seen == [State.QUEUED] * 2


def test_a_worker_that_is_stopped_gives_its_part_back(meshes, tmp_path):
    stop = Interrupt()
    stop.requested = signal.SIGTERM
    (job,) = parts.part_jobs({"source": str(meshes)}, tmp_path / "out", 1)
    silent = lambda *_: None  # noqa: E731
    task = Task(job, tmp_path, stop, silent, silent, silent, lambda _: tmp_path)
    assert parts.rendered(task, 1) is None


@pytest.mark.parametrize("more", [{"parts": 2, "shard": "1/2"}, {"ray": "auto"}, {"parts": 0}])
def test_flags_that_do_not_go_together(tmp_path, more):
    with pytest.raises(ArgumentError, match="--parts must"):
        render.main(render.Flags(str(tmp_path), tmp_path / "out", **more))
