"""Several processes of one run, over gloo: the numbers of one, files from the first alone, and what is refused."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from rank_of_a_run import STEPS, make_trainer, run_and_resume, small_model, twenty_steps
from test_batches import six_orbits

from mvdream_fast import train
from mvdream_fast.checkpoints.open import load_model, save_model
from mvdream_fast.core import processes
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.processes import ALONE, Ranks
from mvdream_fast.core.rng import Stream
from mvdream_fast.core.run_folder import load_latest
from mvdream_fast.data.batches import ImageSource, LatentSource, Shards
from mvdream_fast.training import runs

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
          "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return six_orbits(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """An untrained model as a folder."""
    folder = tmp_path_factory.mktemp("start") / "model"
    save_model(small_model(Shards(data)), folder)
    return folder


@pytest.fixture(scope="module")
def two_ranks(data, start, tmp_path_factory):
    """What two processes under `torchrun` left behind."""
    out = tmp_path_factory.mktemp("out")
    (out / "start").symlink_to(start)
    script = Path(__file__).with_name("rank_of_a_run.py")
    done = subprocess.run([*TORCHRUN, str(script), str(data), str(out)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    torch.manual_seed(1)
    figures = twenty_steps(make_trainer(data)) | run_and_resume(data, tmp_path_factory.mktemp("one"), ALONE, False)
    saving = make_trainer(data, saving=True)
    return figures | {"saving": [saving.train_step()["loss"] for _ in range(3)]}


@pytest.mark.parametrize("shard", ["none", "fsdp2"])
def test_two_ranks_have_the_losses_of_one(two_ranks, one_rank, shard):
    """The same global batch: 1e-5 over 20 steps, with replicated and with sharded weights."""
    first, second = (json.loads((two_ranks / f"{shard}-{rank}.json").read_text()) for rank in range(2))
    assert len(first["losses"]) == STEPS
    assert first["losses"] == second["losses"]
    for key in ("losses", "norms", "resumed", "saving"):
        assert first[key] == pytest.approx(one_rank[key], abs=1e-5), key
    for key in ("val_multi_view", "val_2d"):
        assert first[key] == pytest.approx(one_rank[key], abs=1e-5), key
        assert key not in second
    assert first["resumed"] == pytest.approx(first["losses"][3:5], abs=1e-6)


@pytest.mark.parametrize("shard", ["none", "fsdp2"])
def test_a_checkpoint_of_two_ranks_holds_whole_tensors_once(two_ranks, data, shard):
    folder = two_ranks / f"{shard}-run"
    step, tensors, meta = load_latest(folder / "checkpoints")
    alone = make_trainer(data)
    alone.restore(step, tensors, meta)
    assert {name: x.shape for name, x in alone.state().items()} == {name: x.shape for name, x in tensors.items()}
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_the_command_under_a_launcher(two_ranks):
    """Shards its model, shares one cache of latents, and leaves what one process leaves."""
    out = two_ranks / "command"
    assert load_model(out / "model").config.name == "small"
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["000003.png", "prompts.txt"]
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [3]
    assert load_latest(out / "checkpoints")[0] == 3


class Encoder:
    def __call__(self, images):
        return torch.nn.functional.avg_pool2d(images, 8)


@pytest.mark.parametrize("multi_view", [True, False])
@pytest.mark.parametrize("kind", ["pictures", "latents"])
def test_ranks_split_a_batch_and_read_nothing_of_each_other(data, tmp_path, kind, multi_view):
    def source(folder, read):
        shards = Shards(data)
        views = shards.views
        shards.views = lambda i: (read.add(i), views(i))[1]
        return ImageSource(shards) if kind == "pictures" else LatentSource(shards, Encoder(), folder, (3, 2, 2), "k")

    def draw(ranks, read):
        folder = tmp_path / f"{ranks.rank}of{ranks.world}"
        return source(folder, read).batch(Stream(0, 1, "x"), 4, 2, multi_view, ranks)

    everything, parts = set(), [set(), set()]
    whole, halves = draw(ALONE, everything), [draw(Ranks(rank, 2), parts[rank]) for rank in range(2)]
    assert torch.equal(torch.cat([h.images for h in halves]), whole.images)
    assert halves[0].captions + halves[1].captions == whole.captions
    if multi_view:
        assert torch.equal(torch.cat([h.cameras for h in halves]), whole.cameras)
    assert parts[0] | parts[1] == everything
    n_scenes = 2 if multi_view else 4
    assert all(0 < len(part) <= n_scenes for part in parts)


@pytest.mark.parametrize(
    ("world", "more", "message"),
    [
        (4, {}, "the data must be at least as many train shards as there are processes, got 3 for 4; start fewer"),
        (3, {"batch_size": 4}, "--batch-size must be divisible by the 3 processes, got 4"),
        (2, {"stage": "vae"}, "--stage vae must run in one process, got 2"),
        (2, {"shard": "fsdp2", "shard_group": 3}, "--shard-group must be a divisor of the 2 processes, .* got 3"),
        (2, {"shard_group": 2}, "--shard-group must .* come with --shard fsdp2, got 2 with --shard none"),
    ],
)
def test_what_ranks_cannot_share_is_refused_before_they_meet(data, tmp_path, monkeypatch, world, more, message):
    monkeypatch.setattr(processes, "launched", lambda: (world, world, 0))
    monkeypatch.setattr(runs, "launched", lambda: (world, world, 0))
    with pytest.raises(ArgumentError, match=message) as caught:
        train.main(train.Flags(data, tmp_path / "out", init="embedded", threads=1, **more))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_one_process_is_left_alone():
    assert ALONE.part([1, 2, 3]) == [1, 2, 3]
    assert ALONE.largest(3, 0) == [3, 0]
    assert ALONE.mean(0.25) == 0.25
    assert processes.launched() == (1, 1, 0)


def arguments(data, out, *more):
    return ["-m", "mvdream_fast.train", "--data", str(data), "-o", str(out), "--batch-size", "4", "--n-views", "2",
            "--device", "cpu", "--threads", "1", *map(str, more)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_killed_rank_ends_the_run_and_costs_what_came_after_the_checkpoint(data, start, tmp_path, victim):
    """Of two that share a model; one process alone then goes on from the last checkpoint, which is whole."""
    log, out = tmp_path / "log.txt", tmp_path / "out"
    more = ("--init", start, "--steps", 10**6, "--sheet-minutes", 0, "--checkpoint-minutes", 0.001, "--shard", "fsdp2")
    with log.open("w") as file:
        launcher = subprocess.Popen([*TORCHRUN, *arguments(data, out, *more)], stdout=file, stderr=file)
    while "step 10:" not in log.read_text():
        assert launcher.poll() is None, log.read_text()
        time.sleep(0.5)
    ranks = [p for p in psutil.Process(launcher.pid).children(recursive=True) if "RANK" in p.environ()]
    next(p for p in ranks if p.environ()["RANK"] == victim).kill()
    assert launcher.wait(timeout=120) != 0
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    text = log.read_text()
    assert text.count(f"train: process {victim} of 2 is gone; the others stop, and --resume goes on from") == 1
    assert "RuntimeError" not in text
    kept = load_latest(out / "checkpoints")[0]
    assert kept >= 9
    alone = [sys.executable, *arguments(data, out, "--resume", "--steps", kept + 1)]
    done = subprocess.run(alone, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_latest(out / "checkpoints")[0] == kept + 1
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]  # the others are the reports' at the end
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_the_whole_command_line_and_its_resume(data, start, tmp_path):
    out = tmp_path / "out"
    for steps, more in ((2, ()), (4, ("--resume",))):
        command = [*LAUNCH, *arguments(data, out, "--init", start, "--steps", steps, *more)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert load_latest(out / "checkpoints")[0] == steps
