"""One rank of a run of several, for test_processes.py: `rank_of_a_run.py DATA OUT`, under a launcher."""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from mvdream_fast import train
from mvdream_fast.core import processes
from mvdream_fast.data.batches import ImageSource, Shards
from mvdream_fast.models.config import NAMED, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from mvdream_fast.models.tokenizer import build_subset_vocabulary
from mvdream_fast.training.initial_model import new_model
from mvdream_fast.training.loop import Loop, LoopOptions
from mvdream_fast.training.unet import Parts, Trainer, TrainOptions

STEPS = 20
SMALL = ModelConfig(
    name="small",
    unet=UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,),
                    num_head_channels=16, context_dim=16, norm_groups=4),
    vae=VAEConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
                  scale_factor=1.0, image_size=16, patch_size=4),
    text=TextConfig(width=16, n_layers=1, n_heads=1, mlp_width=32, skip_last=0, context_length=12,
                    vocabulary="subset", vocabulary_size=64),
    schedule=ScheduleConfig(prediction="v"),
)  # fmt: skip
NAMED["small"] = SMALL
OPTIONS = TrainOptions(batch_size=4, n_views=2, warmup=2, lr=1e-3)


def small_model(shards: Shards):
    return new_model("small", build_subset_vocabulary(shards.captions()), seed=0)


def make_trainer(data: Path, ranks=processes.ALONE, shard: bool = False, saving: bool = False) -> Trainer:
    """`saving` memory: with gradient checkpointing, and each update from two batches."""
    shards = Shards(data)
    model = small_model(shards)
    model.unet.gradient_checkpointing = saving
    parts = Parts(model.config, model.unet, model.text, model.vae, model.tokenizer)
    options = dataclasses.replace(OPTIONS, accumulate=1 + saving)
    return Trainer(parts, ImageSource(shards), options, ranks, ranks.world if shard else 0)


def twenty_steps(trainer: Trainer) -> dict:
    """The figures of 20 steps and the validation losses after them."""
    steps = [trainer.train_step() for _ in range(STEPS)]
    with trainer.averaged():
        figures = trainer.validate(trainer.source) if trainer.ranks.first else {}
    return {"losses": [s["loss"] for s in steps], "norms": [s["grad_norm"] for s in steps], **figures}


def run_and_resume(data: Path, folder: Path, ranks, shard: bool) -> dict:
    """Three steps, a checkpoint, and two more steps by another trainer that starts from it."""
    folder.mkdir(exist_ok=True)
    first = make_trainer(data, ranks, shard)
    Loop(first, folder, LoopOptions(steps=3, log_every=1), ranks=ranks).run()
    ranks.wait()
    second = make_trainer(data, ranks, shard)
    assert Loop(second, folder, LoopOptions(steps=5), ranks=ranks).resume()
    return {"resumed": [second.train_step()["loss"] for _ in range(2)]}


def main(data: Path, out: Path) -> None:
    """Both ways of sharing a model, then the command itself; `out` tells what came of it."""
    torch.set_num_threads(1)
    ranks = processes.join()
    for case in ("none", "fsdp2"):
        figures = twenty_steps(make_trainer(data, ranks, case == "fsdp2"))
        figures |= run_and_resume(data, out / f"{case}-run", ranks, case == "fsdp2")
        saving = make_trainer(data, ranks, case == "fsdp2", saving=True)
        figures["saving"] = [saving.train_step()["loss"] for _ in range(3)]
        (out / f"{case}-{ranks.rank}.json").write_text(json.dumps(figures))
    train.main(
        train.Flags(data, out / "command", init=str(out / "start"), steps=3, batch_size=4, n_views=2, threads=1,
                    device="cpu", shard="fsdp2", cache_latents=True)
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
