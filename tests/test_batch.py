"""The batch command with a tiny model: what it leaves, what it makes again and what not, failures, signals, kills."""

import json
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from reference.batches import Killer, in_background, jobs_of, prompts, rows, workers_of
from reference.painter import png, strip
from reference.quick_jobs import QUICK_RUN, RUNNERS, command, digests, undisturbed, undone

from mvdream_fast import batch
from mvdream_fast.core.errors import ArgumentError, UserError
from mvdream_fast.core.images import png_bytes
from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.distill.request import run_of
from mvdream_fast.jobs import local
from mvdream_fast.jobs.job import Job
from mvdream_fast.jobs.local import Slot, Workers, share_out
from mvdream_fast.jobs.plan import read_jobs
from mvdream_fast.jobs.queue import Queue
from mvdream_fast.jobs.setup import Setup, run_worker
from mvdream_fast.jobs.store import open_store
from mvdream_fast.jobs.watch import Watch
from mvdream_fast.pipeline import MVDreamPipeline

ASKED = {"preset": "mini", "render_size": 8, "mesh_resolution": 24}  # what QUICK_RUN says of a run


@pytest.fixture
def asked(tmp_path, tiny_model):
    """asked(prompts, more flags): the arguments of a command on tmp_path/out."""

    def arguments(prompts: list, *more: str) -> list[str]:
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        return [str(file), "-o", str(tmp_path / "out"), "--model", tiny_model, *QUICK_RUN, *more]

    return arguments


def test_a_failing_prompt_is_told_tried_again_and_stops_no_other(asked, tmp_path, capfd):
    """Once the cause is mended the same command makes that prompt alone."""
    broken = Path(f"{tmp_path / 'out'}.broken")
    broken.touch()
    arguments = asked(["a red car", "a broken chair"], "--steps", "2", "--retries", "1", "--workers", "1")
    assert command(*arguments) == 6
    said = capfd.readouterr()
    assert "batch: 'a broken chair': it left the finite numbers" in said.err
    assert "1 of 2 done, 1 failed" in said.out
    assert rows(tmp_path / "out") == {"a red car": ("done", 1), "a broken chair": ("failed", 2)}
    page = (tmp_path / "out/index.html").read_text()
    (folder,) = (tmp_path / "out/assets").iterdir()
    assert f'src="assets/{folder.name}/turntable.webp"' in page
    assert "failed: it left the finite numbers" in page
    words = (folder / "cmd.txt").read_text()
    assert words == "python -m mvdream_fast.sds --config config.json\n"
    made = (folder / "asset.safetensors").stat().st_mtime_ns
    broken.unlink()
    assert command(*arguments) == 0
    assert rows(tmp_path / "out") == {"a red car": ("done", 1), "a broken chair": ("done", 3)}
    assert (folder / "asset.safetensors").stat().st_mtime_ns == made
    assert list((tmp_path / "out/work").iterdir()) == []
    assert "http-equiv" not in (tmp_path / "out/progress.html").read_text()


def test_an_interrupt_saves_and_the_same_command_goes_on(asked, tmp_path, capfd):
    arguments = asked(["a red car"], "--steps", "60", "--checkpoint-every", "50", "--workers", "1")
    timer = threading.Thread(target=_interrupt_at_step, args=(tmp_path / "out", 3))
    timer.start()
    assert command(*arguments) == 130
    timer.join()
    assert "batch: stopped; the same command goes on" in capfd.readouterr().err
    assert rows(tmp_path / "out") == {"a red car": ("queued", 1)}
    (work,) = (tmp_path / "out/work").iterdir()
    saved = int((work / "ckpt/LATEST").read_text().partition(".")[0])
    assert 3 <= saved < 60
    assert command(*arguments) == 0
    assert rows(tmp_path / "out") == {"a red car": ("done", 2)}
    (folder,) = (tmp_path / "out/assets").iterdir()
    assert json.loads((folder / "config.json").read_text())["resumed"][0]["step"] == saved
    assert digests(tmp_path / "out") == undisturbed(tmp_path / "alone", jobs_of(tmp_path / "out"))


def _interrupt_at_step(place: Path, step: int) -> None:
    end = time.monotonic() + 200
    while time.monotonic() < end and not any(
        f'{{"step": {step},' in log.read_text() for log in place.glob("work/*/log.jsonl")
    ):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


class StopsAfter(Interrupt):
    """Requested once it has been asked so many times."""

    def __init__(self, n: int):
        self.n = n
        super().__init__()

    @property
    def requested(self) -> int | None:
        self.n -= 1
        return signal.SIGTERM if self.n < 0 else None

    @requested.setter
    def requested(self, _: int | None) -> None:
        """It is by itself."""


def test_behind_a_url_a_run_goes_on_from_what_was_copied_there(asked, tmp_path, tiny_model):
    """Each worker has a folder of its own machine, of which nothing is left but what it has sent."""
    place = f"memory://{uuid.uuid4().hex}"
    jobs = read_jobs(Path(asked(["a red car"])[0]), ASKED | {"model": tiny_model, "steps": 12}, None)
    plan = Setup(place, RUNNERS, "cpu", "float32", checkpoint_every=4, quiet=True)
    plan.queue().add(*jobs)
    with undone():
        run_worker(plan, "first", StopsAfter(9))
        (status,) = (status for _, status in plan.queue().jobs())
        assert (status.state, status.attempt) == ("queued", 1)
        assert 1 <= int(plan.queue().store.read(f"work/{jobs[0].name}.1/ckpt/LATEST").partition(b".")[0]) < 12
        run_worker(plan, "second", Interrupt())
    assert plan.queue().status(jobs[0].id).attempt == 2
    assert digests(place) == undisturbed(tmp_path / "alone", jobs)
    assert plan.queue().store.names("work") == []


@pytest.mark.timeout(900)
def test_workers_are_killed_and_two_commands_share_the_work(asked, tmp_path):
    """Six prompts, one worker of each of two commands; every asset is made once, with the bytes of one that nothing
    disturbed."""
    place = tmp_path / "out"
    arguments = asked(prompts(6), "--steps", "24", "--checkpoint-every", "4", "--workers", "1")
    other = in_background(*arguments)
    try:
        with Killer(place, (1.0, 3.0), most=3) as killer:
            assert command(*arguments) == 0
            assert other.wait(600) == 0
    finally:
        other.kill()
    assert killer.n >= 2
    assert [state for state, _ in rows(place).values()] == ["done"] * 6
    assert sum(attempt for _, attempt in rows(place).values()) > 6
    jobs = jobs_of(place)
    assert len(digests(place)) == 6
    assert digests(place) == undisturbed(tmp_path / "alone", jobs)
    assert list((place / "work").iterdir()) == []


def test_what_cannot_be_used_is_refused_before_anything_is_made(asked, tmp_path, capsys):
    assert command(*asked(["a red car", {"prompt": ""}])) == 2
    assert "line 2: the prompt is empty" in capsys.readouterr().err
    assert command(*asked(["a red car", {"prompt": "a chair", "photos": "nowhere"}])) == 5
    assert command(*asked(["a chair"]), "--workers", "0") == 2
    assert command(asked(["a chair"])[0]) == 2
    assert "-o must name the folder" in capsys.readouterr().err
    for place in ("memory://x", "simplecache::memory://x"):
        assert command(asked(["a chair"])[0], "-o", place) == 2
        assert f"-o must be a place that all workers reach, got {place}" in capsys.readouterr().err
    assert command(*asked(["a chair"]), "--model", str(tmp_path)) == 3
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    assert command(*asked(["a chair"])) == 7
    assert "holds something else than jobs" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_seed_is_a_number(tmp_path):
    """One that is drawn at every call would make another job of the same line."""
    (tmp_path / "p.jsonl").write_text('"a car"\n{"prompt": "a chair", "seed": "random"}\n')
    with pytest.raises(ArgumentError, match=r'p.jsonl, line 2: seed must be a number, got "random"'):
        read_jobs(tmp_path / "p.jsonl", {}, None)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a chair", "seed": 3}\n"a car"\n')
    with pytest.raises(ArgumentError, match=r'p.jsonl, line 2: seed must be a number, got "random"'):
        read_jobs(tmp_path / "p.jsonl", {}, {"seed": "random"})
    (tmp_path / "p.jsonl").write_text('{"prompt": "a chair", "seed": 3}\n')
    (job,) = read_jobs(tmp_path / "p.jsonl", {}, {"seed": "random"})
    assert job.request["seed"] == 3


def test_a_model_is_named_by_its_whole_path_and_the_package_s_by_its_name(tmp_path, tiny_model, monkeypatch):
    """Whether it comes as a flag or in the file of --config; a folder of a name of the package's is another thing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()
    (tmp_path / "m").symlink_to(tiny_model)
    (tmp_path / "p.jsonl").write_text('"a chair"\n')
    for flags, file, model in (
        ({"model": "m"}, {}, str(tmp_path / "m")),
        ({}, {"model": "m"}, str(tmp_path / "m")),
        ({"model": "embedded"}, {}, "embedded"),
    ):
        (job,) = read_jobs(tmp_path / "p.jsonl", flags, file)
        assert job.request["model"] == model


def test_the_same_command_asks_again_for_what_was_cancelled(tmp_path, tiny_model, monkeypatch):
    """And grants the retries that it asks for to what waits from an earlier one."""
    (tmp_path / "p.jsonl").write_text('"a chair"\n"a car"\n')
    line = [str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out"), "--model", tiny_model, *QUICK_RUN]
    monkeypatch.setattr(batch, "_crew", lambda flags, *_: (Setup(str(tmp_path / "out")), None))
    monkeypatch.setattr(Watch, "tend", lambda *_: None)
    assert command(*line) == 1, "nobody has made them"
    queue = Queue(open_store(tmp_path / "out"))
    chair, car = (job for job, _ in queue.jobs())
    queue.cancel(chair.id)
    assert command(*line, "--retries", "2") == 1
    assert {str(status.state) for _, status in queue.jobs()} == {"queued"}
    assert (queue.job(car.id).retries, len(queue.jobs())) == (2, 2)


def test_subjects_are_tuned_before_what_needs_them(tmp_path):
    (tmp_path / "chair").mkdir()
    (tmp_path / "chair/1.png").touch()
    lines = [
        {"prompt": "a photo of a sks chair", "photos": "chair", "tuning_steps": 3, "seed": 4},
        {"prompt": "a sks chair in snow", "photos": "chair", "tuning_steps": 3, "seed": 4,
         "instance_prompt": "a photo of a sks chair"},
        "a red car",
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tuning, first, second, car = read_jobs(tmp_path / "p.jsonl", {"preset": "mini"}, None, retries=2)
    assert tuning.kind == "dreambooth"
    assert tuning.request == {
        "prompt": "a photo of a sks chair", "instance_data_dir": str(tmp_path / "chair"), "instance_token": "sks",
        "model": "embedded", "seed": 4, "max_train_steps": 3,
    }  # fmt: skip
    assert [job.request["model"] for job in (first, second, car)] == [f"job:{tuning.id}"] * 2 + ["embedded"]
    assert [job.needs for job in (first, second, car)] == [(tuning.id,), (tuning.id,), ()]
    assert {job.retries for job in (tuning, first, second, car)} == {2}
    (tmp_path / "p.jsonl").write_text('{"prompt": "a chair", "photos": "chair"}\n')
    with pytest.raises(ValueError, match="line 1: instance_prompt must hold the instance_token 'sks', got 'a chair'"):
        read_jobs(tmp_path / "p.jsonl", {}, None)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a sks chair", "tuning_steps": 3}\n')
    with pytest.raises(ValueError, match="photos must name the folder"):
        read_jobs(tmp_path / "p.jsonl", {}, None)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # each subject is tuned in a process that imports torch
def test_a_subject_is_learned_from_photos_and_its_assets_are_made(asked, tmp_path, tiny_model):
    """Two assets of one subject and one of the model before: the subject is tuned once, by `dreambooth`, and its assets
    are those of the model that that left. The same command makes nothing again."""
    (tmp_path / "chair").mkdir()
    for i, filled in enumerate((0.5, 0.7, 0.9)):
        (tmp_path / f"chair/{i}.png").write_bytes(png(strip(1, filled)))
    subject = {"photos": "chair", "tuning_steps": 2, "instance_prompt": "a photo of a sks chair"}
    lines = [{"prompt": prompt, **subject} for prompt in ("a sks chair", "a sks chair in snow")]
    arguments = asked([*lines, "a sks chair"], "--steps", "2", "--workers", "1")
    place = tmp_path / "out"
    for _ in range(2):
        assert command(*arguments) == 0
        made = {(job.kind, job.title, job.request.get("model", "")[:4]): (job, status)
                for job, status in Queue(open_store(place)).jobs()}  # fmt: skip
        assert {status.attempt for _, status in made.values()} == {1}
        assert {status.state for _, status in made.values()} == {"done"}
    tuning, _ = made["dreambooth", "a photo of a sks chair", tiny_model[:4]]
    folder = place / "assets" / tuning.name
    assert json.loads((folder / "config.json").read_text())["settings"]["max_train_steps"] == 2
    tuned, before = (made["sds", "a sks chair", model][0] for model in ("job:", tiny_model[:4]))
    other, _ = made["sds", "a sks chair in snow", "job:"]
    assert len(made) == 4
    for job in (tuned, other):
        about = json.loads((place / "assets" / job.name / "config.json").read_text())
        assert about["model"] == str(folder / "model")
    for file in ("views.png", "asset.safetensors", "mesh.glb"):
        with_subject, without = ((place / "assets" / job.name / file).read_bytes() for job in (tuned, before))
        assert with_subject != without, file
    alone = MVDreamPipeline.from_pretrained(str(folder / "model"), "cpu", "float32")
    views = alone("a sks chair", seed=0, n_steps=2, suffix=alone.suffix, mode=run_of(about, "it").config.mode,
                  negative_prompt=run_of(about, "it").config.negative_prompt)  # fmt: skip
    assert (place / "assets" / tuned.name / "views.png").read_bytes() == png_bytes(views.sheet())


def test_a_worker_that_cannot_live_is_not_started_for_ever(tmp_path):
    setup = Setup(str(tmp_path / "out"), runners="reference.quick_jobs:dying")
    said: list[str] = []
    workers = Workers(setup, [Slot("cpu")], said.append)
    workers.start()
    with pytest.raises(UserError, match=r"died 5 times right after its start \(exit code 3\)"):
        _tend(workers)
    assert len(said) == 4
    workers.stop()


def test_a_worker_that_others_tell_to_leave_is_started_again(tmp_path):
    """It saves and gives its job back, and the work is not done by that."""
    setup = Setup(str(tmp_path / "out"), runners="reference.quick_jobs:leaving", quiet=True)
    setup.queue().add(Job("leave", {"prompt": "twice"}))
    said: list[str] = []
    workers = Workers(setup, [Slot("cpu")], said.append)
    workers.start()
    _tend(workers)
    workers.stop()
    assert said == [f"the worker {platform.node()}-0 died (SIGTERM); it is started again"]
    assert rows(tmp_path / "out") == {"twice": ("done", 2)}


def _tend(workers: Workers) -> None:
    while workers.tend():
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("asked", "n", "threads", "devices"),
    [
        (("auto", 4, None, None, None), 4, 2, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        (("auto", 2, 3, 1, None), 3, 1, ["cuda:0", "cuda:1", "cuda:0"]),
        (("cuda:1", 2, 2, None, None), 2, 4, ["cuda:1", "cuda:1"]),
        (("cuda:1", 8, None, None, None), 1, 8, ["cuda:1"]),
        (("cuda", 8, None, None, 1), 8, 1, [f"cuda:{i}" for i in range(8)]),
        (("cpu", 0, None, None, None), 8, 1, ["cpu"]),
        (("cpu", 0, None, 3, None), 2, 3, ["cpu"]),
        (("cpu", 0, None, None, 3), 3, 2, ["cpu"]),
        (("cpu", 0, 2, None, 1), 2, 4, ["cpu"]),
    ],
)
def test_how_a_machine_is_shared_out(monkeypatch, asked, n, threads, devices):
    """Eight cores, that is."""
    monkeypatch.setattr(local, "available_cores", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)})
    slots, found = share_out(*asked)
    assert (len(slots), found) == (n, threads)
    assert [slot.device for slot in slots] == (devices * n)[:n]
    cores = [core for slot in slots for core in slot.cores]
    assert cores == ([*range(8)] if n * threads == 8 and asked[0] == "cpu" else [])


@pytest.mark.timeout(900)
def test_a_worker_leaves_when_its_parent_is_killed(asked, tmp_path):
    """Nothing goes on behind the back of who has killed a command."""
    place = tmp_path / "out"
    process = in_background(*asked(["a red car"], "--steps", "5000", "--workers", "1"))
    _wait_until(lambda: any(place.glob("work/*/log.jsonl")))
    process.kill()
    process.wait()
    _wait_until(lambda: not workers_of(place))
    assert rows(place) == {"a red car": ("queued", 1)}, "it has given its job back"
    assert any(place.glob("work/*/ckpt/LATEST"))


def _wait_until(happened: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.2)
