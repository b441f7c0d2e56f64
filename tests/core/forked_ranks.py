"""Runs of 1, 2 and 4 processes that share a model, for test_sharded_runs.py: `forked_ranks.py DATA OUT [NAME ...]`.

The processes are forked from one that has imported torch, which takes longer than all of their steps.
"""

import dataclasses
import json
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
from rank_of_a_run import OPTIONS, small_model

from mvdream_fast.core import processes
from mvdream_fast.core.processes import Ranks
from mvdream_fast.data.batches import ImageSource, Shards
from mvdream_fast.training.loop import Loop, LoopOptions
from mvdream_fast.training.unet import Parts, Trainer

BEFORE, AFTER = 2, 4  # steps: of the checkpoint, and of the end
RUNS = {  # name: processes, those that share a copy, steps, and the run that it goes on from
    "alone": (1, 0, AFTER, ""),
    "two": (2, 2, BEFORE, ""),
    "two-1-0": (1, 0, AFTER, "two"),
    "two-2-2": (2, 2, AFTER, "two"),
    "two-4-4": (4, 4, AFTER, "two"),
    "two-4-2": (4, 2, AFTER, "two"),
    "file": (1, 0, BEFORE, ""),
    "file-2": (2, 2, AFTER, "file"),
    "half-alone": (1, 0, BEFORE, ""),
    "half-two": (2, 2, BEFORE, ""),
}


def forked(world: int, work: Callable[[Ranks], None]) -> None:
    """`work` in so many processes that have met."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port)}  # fmt: skip
            try:
                ranks = processes.join()
                work(ranks)
                processes.leave(ranks)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0] * world, (world, codes)


def make_trainer(data: Path, ranks: Ranks, group: int, half: bool = False) -> Trainer:
    shards = Shards(data)
    model = small_model(shards)
    model.unet.gradient_checkpointing = half
    parts = Parts(model.config, model.unet, model.text, model.vae, model.tokenizer)
    options = dataclasses.replace(OPTIONS, decay=2, steps=AFTER, autocast="bf16" if half else "none")
    return Trainer(parts, ImageSource(shards), options, ranks, group)


def train(data: Path, folder: Path, ranks: Ranks, group: int, steps: int, half: bool = False) -> None:
    """A run in `folder` up to so many steps, from what lies there on; its figures and, whole, all of its state."""
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(data, ranks, group, half)
    loop = Loop(trainer, folder, LoopOptions(steps=steps, log_every=1), ranks=ranks)
    loop.resume()
    assert loop.run() == 0
    state = {name: processes.whole(x, ranks) for name, x in trainer.state().items()}
    if ranks.first:
        torch.save(state, folder / "state.pt")
        files = sorted(path.name for path in (folder / "checkpoints").iterdir())
        (folder / "files.json").write_text(json.dumps(files))


def main(data: Path, out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    small_model(Shards(data))  # which imports what all need, once
    for name in names:
        world, group, steps, start = RUNS[name]
        if start:
            shutil.copytree(out / start, out / name)
        forked(world, lambda ranks: train(data, out / name, ranks, group, steps, name.startswith("half")))  # noqa: B023


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
