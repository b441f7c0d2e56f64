"""What a training is asked for, as the flags of `python -m mvdream_fast.train`; no torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mvdream_fast.core import cli


@dataclass(frozen=True)
class Flags:
    """Trains a multi-view diffusion model on shards written by `python -m mvdream_fast.render`.

    A new model begins with its autoencoder (--stage vae); OUTPUT/model of that is the --vae of the next stage.
    In several processes: torchrun --nproc-per-node 2 -m mvdream_fast.train ... (or accelerate launch; without GPUs too,
    with --device cpu); --batch-size stays that of them all.
    """

    data: Path
    """folder of webdataset shards (*.tar)"""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """folder for checkpoints, log, sample sheets and the exported model"""
    stage: Literal["vae", "unet", "cleaner", "matting", "evaluator"] = "unet"
    """unet trains UNet and text tower on the autoencoder's latents; cleaner, with --init, what cleans the latents that
    they sample before these are decoded; matting, with --init, what tells a thing from its background in what is
    decoded; evaluator what `mvdream_fast.evaluate` judges by"""
    config: str = "mini"
    """configuration of a new model: mini, sd21-4view, sd15-4view, pixels (single images, without an autoencoder)"""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")] = ()
    """changes to the configuration, as unet.view_mixing=2d or unet.camera_in=text; with --init, those that leave its
    widths and depths as they are: new layers add nothing at first (a camera token takes some of the attention)"""
    init: cli.Model | None = None
    """model to go on from, instead of a new one of --config: a folder, a finished run, a name, the released MVDream
    .pt, or Stable Diffusion's own file or folder (its new camera layers begin at zero)"""
    vae: cli.Model | None = None
    """model folder whose autoencoder a new model takes: the output of --stage vae"""
    text: cli.Model | None = None
    """model folder whose text tower and words a new model takes"""
    vocabulary: Path | None = None
    """captions, one a line, whose words a new text tower has rows for beside those of the data"""
    stand_ins: Path | None = None
    """lines of a word and of what the model is to read instead, "couch sofa", for words that no caption has"""
    resume: bool = False
    """go on from the latest checkpoint in the output folder: flags that are not given are as they were, and those that
    made the model stay"""
    steps: int = 20000
    """updates in all, those before a resume included"""
    batch_size: int | None = None
    """scenes a step (unet, default 8; cleaner and matting 4; evaluator 96) or images (vae, default 16)"""
    n_views: int = 4
    """orthogonal views of a scene"""
    lr: float | None = None
    """learning rate (default 3e-4; vae, cleaner and matting 1e-3, evaluator 2e-3)"""
    warmup: int | None = None
    """steps of linear warm-up (default 200; other stages 50)"""
    decay: int = 0
    """last updates of --steps over which the learning rate falls to zero (0: it stays; other stages always fall)"""
    ema: float | None = None
    """decay of the weights' moving average (default 0.9995; vae, cleaner and matting 0.995, evaluator 0.99)"""
    decoder_only: bool = False
    """--stage vae --init MODEL: train its decoder and leave the latents as they are"""
    multi_view_share: float = 0.7
    """share of multi-view steps; the others are 2D mode"""
    wide_share: float = 0.0
    """share of the multi-view steps that see twice as many views (--n-views) of half as many scenes, so that the model
    can be asked for either number"""
    view_words: bool = False
    """tell half of the single views of things with a front their side ("front view"), for priors without cameras"""
    caption_dropout: float = 0.1
    """share of scenes trained without their caption"""
    data_order: Literal["random", "epochs"] = "random"
    """epochs: in multi-view steps every orbit comes once before one comes again, however many processes there are and
    however often the run was stopped; multi-view and 2D steps then take turns instead of being drawn"""
    balance: float = 0.0
    """over 0: rare things are drawn more often; an orbit's chance is its noun's count to minus that (1: all nouns come
    equally often, however many assets and orbits each has)"""
    timestep_shift: float = 1.0
    """over 1: more of the noisy timesteps, where text and camera decide; the median is at s / (s + 1)"""
    accumulate: int = 1
    """batches whose gradients make one update"""
    gradient_checkpointing: bool = False
    """less memory for more time"""
    weighting: Literal["none", "min-snr"] = "none"
    """weights of the loss over noise levels"""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """arithmetic of the UNet; weights and EMA are fp32"""
    freeze_text: bool = False
    """train the UNet alone"""
    cache_latents: bool = False
    """encode every view once, on three backgrounds, and train on those"""
    latents: Path | None = None
    """where --cache-latents keeps them (default: in the output folder)"""
    sheet_prompts: tuple[str, ...] = ()
    """prompts of the sample sheets (default: captions of the data)"""
    sheet_guidance: float = 5.0
    """guidance scale of the sample sheets"""
    sheet_minutes: float = 15.0
    """minutes between validation and sample sheets (0: only at the end)"""
    checkpoint_minutes: float = 5.0
    """minutes between checkpoints"""
    shard: Literal["none", "fsdp2"] = "none"
    """several processes hold a whole model each, or share its memory by FSDP2"""
    shard_group: int | None = None
    """--shard fsdp2: so many processes share one copy of the model (default: all); those of one machine, best"""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    graphs: bool = True
    """on a GPU, forward and backward are one CUDA graph instead of thousands of launches"""
    threads: int | None = None
    """CPU threads (default: all, shared among the processes of a machine)"""
    workers: int | None = None
    """more processes that draw the coming batches (default: 0; on a GPU the free cores, at most 8)"""
    given: cli.Given = frozenset()
