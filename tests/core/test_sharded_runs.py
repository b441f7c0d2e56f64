"""A model shared by 1, 2 and 4 processes (FSDP2 over gloo): the numbers of one; checkpoints that any number reads."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked_ranks import AFTER, BEFORE
from rank_of_a_run import make_trainer
from test_batches import six_orbits

from mvdream_fast.core import sharded_checkpoint
from mvdream_fast.core.errors import ModelError, OutputError
from mvdream_fast.core.processes import ALONE, Ranks
from mvdream_fast.core.run_folder import latest_step, load_latest, load_latest_meta


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return six_orbits(tmp_path_factory.mktemp("shards"))


def made(data, out, names):
    """The folders that forked_ranks.py leaves."""
    command = [sys.executable, str(Path(__file__).with_name("forked_ranks.py")), str(data), str(out), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    return made(data, tmp_path_factory.mktemp("runs"), ["alone", "two", "two-1-0", "two-4-2", "half-alone", "half-two"])


def losses(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def largest_differences(run, other):
    """By kind of tensor: weights, average, moments, steps."""
    states = [torch.load(folder / "state.pt") for folder in (run, other)]
    assert states[0].keys() == states[1].keys()
    found = {}
    for name, x in states[0].items():
        kind = ".".join(name.split(".")[: 2 if name.startswith("adam") else 1])
        found[kind] = max(found.get(kind, 0.0), (x - states[1][name]).abs().max().item())
    return found


def check_same(run, alone):
    """Whole state for whole state."""
    assert len(losses(run)) == AFTER
    assert losses(run) == pytest.approx(losses(alone), abs=1e-6)
    found = largest_differences(run, alone)
    assert found.keys() == {"model", "ema", "adam.exp_avg", "adam.exp_avg_sq", "adam.step"}
    assert found["adam.step"] == 0
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("name", ["two-1-0", "two-4-2"])
def test_any_number_of_processes_goes_on_from_what_others_left(runs, name):
    """The first steps by two processes, the others by one, or by four in two groups of two: the run of one alone."""
    check_same(runs / name, runs / "alone")


@pytest.mark.slow
def test_more_numbers_of_processes(data, tmp_path):
    made(data, tmp_path, ["alone", "two", "two-2-2", "two-4-4", "file", "file-2"])
    for name in ("two-2-2", "two-4-4", "file-2"):
        check_same(tmp_path / name, tmp_path / "alone")


def test_what_lies_in_the_folder(runs):
    """Shards of those who share a model, one file of a process that has it all; LATEST names the last."""
    files = {run.name: json.loads((run / "files.json").read_text()) for run in runs.iterdir()}
    assert files["alone"] == ["000004.safetensors", "LATEST"]
    assert files["two"] == ["000002.shards", "LATEST"]
    assert files["two-1-0"] == ["000002.shards", "000004.safetensors", "LATEST"]
    assert files["two-4-2"] == ["000002.shards", "000004.shards", "LATEST"]
    shards = sorted(path.suffix for path in (runs / "two" / "checkpoints" / "000002.shards").iterdir())
    assert shards == [".json", ".safetensors", ".safetensors"]
    assert latest_step(runs / "two" / "checkpoints") == BEFORE
    assert load_latest_meta(runs / "two" / "checkpoints")["step"] == BEFORE


def test_bfloat16_under_way(runs):
    """With gradient checkpointing; each process rounds the gradients of its own half of the batch."""
    assert losses(runs / "half-two") == pytest.approx(losses(runs / "half-alone"), rel=5e-4)
    assert losses(runs / "half-two") != losses(runs / "alone")[:BEFORE]


def test_a_damaged_checkpoint_is_named(runs, data, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(runs / "two-4-2" / "checkpoints", folder)
    first, second, *_ = sorted((folder / "000004.shards").glob("*.safetensors"))
    rest = r"is missing, or is not whole; write '000002.shards' into .*LATEST to go on from there"
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ModelError, match=rf"cannot read the checkpoint .*000004.shards: {second.name} {rest}"):
        load_latest(folder)
    first.unlink()
    with pytest.raises(ModelError, match=f"{first.name} {rest}"):
        load_latest(folder)
    (folder / "LATEST").write_text("000002.shards\n")
    assert load_latest(folder)[0] == BEFORE
    (folder / "LATEST").write_text("../../etc/passwd.shards\n")
    with pytest.raises(ModelError, match="must hold a checkpoint's file name"):
        load_latest(folder)


@pytest.mark.parametrize("worlds", [(1, 1, 1), (1, 2, 4), (4, 1, 2)])
def test_every_orbit_comes_once_an_epoch_whoever_draws_it(data, worlds):
    """Six orbits, four scenes a step, multi-view steps only: two epochs in three steps, whatever the number of
    processes, which changes at each step, and begins anew each time."""
    drawn = []
    for step, world in enumerate(worlds):
        for rank in range(world):
            trainer = make_trainer(data)
            trainer.options = replace(trainer.options, data_order="epochs", multi_view_share=1.0)
            trainer.ranks = Ranks(rank, world)
            views = trainer.source.shards.views
            trainer.source.shards.views = lambda i, views=views: (drawn.append(i), views(i))[1]
            trainer.draw(step)
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6))
    assert drawn[:6] != drawn[6:]


def test_modes_take_turns_in_epochs(data):
    trainer = make_trainer(data)
    trainer.options = replace(trainer.options, data_order="epochs", multi_view_share=0.7)
    modes = [trainer._multi_view(step) for step in range(20)]
    assert sum(modes) == 14
    assert all(sum(modes[:step]) == trainer._multi_view_steps(step) for step in range(20))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the checkpoint .*the one before is kept") as caught:
        sharded_checkpoint.save(tmp_path / "file", "LATEST", 7, {"x": torch.zeros(1)}, {}, ALONE)
    assert caught.value.exit_code == 7


def test_a_step_that_is_there_already_is_written_beside_it(tmp_path):
    """As after a resume from an earlier one: LATEST never names what is not whole."""
    for value in (1.0, 2.0, 3.0):
        sharded_checkpoint.save(tmp_path, "LATEST", 7, {"x": torch.tensor([value])}, {"kind": "k"}, ALONE)
    assert (tmp_path / "LATEST").read_text() == "000007-3.shards\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000007-2.shards", "000007-3.shards", "LATEST"]
    step, tensors, meta = load_latest(tmp_path)
    assert (step, tensors["x"].tolist(), meta["kind"]) == (7, [3.0], "k")
