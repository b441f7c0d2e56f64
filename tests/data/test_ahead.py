"""Batches drawn by other processes: the same ones, in order, with errors and signals as without them."""

import os
import signal
import subprocess
import sys

import pytest
import test_evaluator
import test_train
import torch
from test_batches import Encoder, folder, latents
from test_evaluator import shards
from test_train import assert_same, data, tiny

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.ahead import Ahead
from mvdream_fast.data.batches import ImageSource, Shards
from mvdream_fast.train import main

__all__ = ["data", "folder", "shards", "tiny"]  # fixtures


def numbered(step: int) -> tuple[torch.Tensor, list[int]]:
    return torch.full((3,), step), [step, os.getpid()]


def test_steps_come_in_order_and_from_other_processes():
    ahead = Ahead(numbered, workers=2)
    for step in (0, 1, 2, 7, 8, 3):  # a jump begins again
        tensor, (same, process) = ahead(step)
        assert (tensor.tolist(), same) == ([step] * 3, step)
        assert process != os.getpid()
    assert Ahead(numbered)(5)[1] == [5, os.getpid()]


def test_the_last_step_can_be_named():
    drawn = []

    def draw(step: int) -> int:
        if step > 2:
            raise AssertionError("not asked for")
        return step

    ahead = Ahead(draw, workers=1, until=3)
    drawn += [ahead(step) for step in range(3)]
    assert drawn == [0, 1, 2]


def test_workers_end_in_silence():
    """One of them is in the middle of a batch, as at the end of every run."""
    program = (
        "import time, torch\nfrom mvdream_fast.data.ahead import Ahead\n"
        "ahead = Ahead(lambda step: (time.sleep(0.3 * step), torch.zeros(3))[1], workers=2)\nahead(0)\nahead.close()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def failing(step: int) -> int:
    if step == 1:
        raise InputFileError("the shard is cut")
    return step


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_user_stays_one_sentence(workers):
    ahead = Ahead(failing, workers)
    assert ahead(0) == 0
    with pytest.raises(InputFileError, match="^the shard is cut$"):
        ahead(1)


def test_a_killed_worker_is_done_without():
    ahead = Ahead(numbered, workers=1)
    process = ahead(0)[1][1]
    os.kill(process, signal.SIGKILL)
    for step in range(1, 6):
        assert ahead(step)[0].tolist() == [step] * 3


def assert_same_run(make):
    """Three updates with and without workers end with the same bytes."""
    alone, helped = make(), make()
    helped.ahead.workers = 2
    assert [alone.train_step() for _ in range(3)] == [helped.train_step() for _ in range(3)]
    assert_same(alone.state(), helped.state())


def test_the_diffusion_model_learns_the_same(data):
    assert_same_run(lambda: test_train.make_trainer(data, accumulate=2))


def test_the_autoencoder_learns_the_same(data):
    assert_same_run(lambda: test_train.vae_trainer(data))


def test_the_evaluator_learns_the_same(shards):
    assert_same_run(lambda: test_evaluator.trainer(shards))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_filled_cache_has_what_is_encoded_on_demand(folder, workers):
    asked = latents(folder, Encoder(), "asked")
    wanted = [asked.batch(Stream(0, i, "x"), 2, 4, i % 2 == 0).images for i in range(12)]
    del asked  # a cache in use is kept from another key
    encoder = Encoder()
    filled = latents(folder, encoder, "filled")
    filled.batch(Stream(0, 0, "x"), 2, 4, True)  # one is there already
    filled.fill(workers)
    calls = encoder.calls
    for i, pictures in enumerate(wanted):
        torch.testing.assert_close(filled.batch(Stream(0, i, "x"), 2, 4, i % 2 == 0).images, pictures)
    assert encoder.calls == calls
    assert len(ImageSource(Shards(folder)).shards) == len(filled.filled)
    assert filled.filled.all()


def test_a_whole_run_with_workers(data, tmp_path):
    """The command caches first what its workers read, and a run with workers has the bytes of one without."""
    main(test_train.flags(data, tmp_path / "vae", stage="vae", workers=1))
    for name, workers in (("alone", 0), ("helped", 2)):
        flags = {"vae": str(tmp_path / "vae" / "model"), "cache_latents": True, "steps": 3, "workers": workers}
        main(test_train.flags(data, tmp_path / name, **flags))
    alone, helped = ((tmp_path / name / "model" / "unet.safetensors").read_bytes() for name in ("alone", "helped"))
    assert alone == helped
