"""`python -m mvdream_fast.dreambooth`: teaches a multi-view model the subject of a few photos.

Flags are named as in diffusers' DreamBooth script, with dashes or underscores. The work is tuning/runs.py's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mvdream_fast.core import cli
from mvdream_fast.core.errors import ArgumentError


@dataclass(frozen=True)
class Flags:
    """Tunes a multi-view diffusion model on 1 to 50 photos of one subject (MVDreamBooth), in 2D mode, with a term that
    holds the weights close to the model's. OUTPUT/model is an ordinary model folder then: sds --model OUTPUT/model
    --prompt "a photo of a sks chair" makes the 3D asset. There are no class images, as in the paper.
    """

    instance_data_dir: Path | None = None
    """folder of the photos: PNG, JPEG, WebP or HEIC (extra "heic"), any size, with or without transparency"""
    instance_prompt: str = ""
    """what the photos show, with the instance token: "a photo of a sks chair" """
    instance_token: str = "sks"
    """the word that stands for the subject; small models get a row of their own for it"""
    model: Annotated[cli.Model, tyro.conf.arg(aliases=["--pretrained-model-name-or-path"])] = "embedded"
    """a model folder, a released checkpoint, or "embedded": the small model that ships with the package"""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o", "--output-dir"])] = None
    """folder of the run, new or empty (default: one under outputs/ named after the prompt, the time and the seed)"""
    stages: Literal["mvdreambooth", "dreambooth3d"] = "mvdreambooth"
    """dreambooth3d: partial tuning, a first volume, pseudo views from the fully tuned model, final tuning and volume"""
    max_train_steps: int | None = None
    """updates in all (default: 600; for a small model measured, see docs)"""
    learning_rate: float | None = None
    """default: 2e-6, for a small model more"""
    train_batch_size: int = 4
    """photos a step"""
    gradient_accumulation_steps: int = 1
    lambda_preserve: float | None = None
    """weight of ||theta - theta_0||_1 / N over the UNet's N weights (default: the paper's 1, for a small model 1000)"""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: Annotated[float, tyro.conf.arg(aliases=["--weight-decay"])] = 0.0
    """not published for MVDreamBooth; 0.01 is torch's default"""
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    train_text_encoder: bool = False
    """tune the text tower along (it is not held back by lambda_preserve)"""
    lora_rank: Annotated[int, tyro.conf.arg(aliases=["--rank"])] = 0
    """train low-rank adapters of the attention instead of all weights; they are merged in the exported model"""
    gradient_checkpointing: bool = False
    """less memory for more time"""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    resolution: int | None = None
    """pixels of the photos' sides (default: the model's)"""
    fit: Literal["auto", "crop", "pad"] = "auto"
    """how a photo becomes square: its middle, or borders; auto pads cut-outs and crops the others"""
    validation_prompt: str = ""
    """prompt of the sample sheets (default: the instance prompt)"""
    validation_steps: int = 0
    """steps between sample sheets (0: only at the end)"""
    guidance_scale: float = 5.0
    """of the sample sheets and of dreambooth3d's pseudo views"""
    checkpointing_steps: int = 200
    resume_from_checkpoint: Annotated[cli.Run | None, tyro.conf.arg(aliases=["--resume"])] = None
    """go on with a run: its folder, or "latest" (of -o, or of outputs/). What the run is stays as it was begun;
    --max-train-steps may raise the number of steps (with dreambooth3d, until 3-full/model is there), and the flags of
    checkpoints and sample sheets count"""
    partial_steps: int | None = None
    """dreambooth3d: updates of the partial tuning (default: a quarter of --max-train-steps)"""
    sds_steps: int | None = None
    """dreambooth3d: steps of each volume (default: the preset's)"""
    sds_preset: str = "auto"
    """dreambooth3d: preset of the volumes; auto is mini for small models, else paper"""
    pseudo_groups: int = 8
    """dreambooth3d: groups of four pseudo views"""
    pseudo_strength: float = 0.5
    """dreambooth3d: how much of the noise schedule the first volume's renders go through"""
    pseudo_share: float = 0.5
    """dreambooth3d: share of the final tuning's steps that see pseudo views (with cameras) instead of photos"""
    lambda_recon: float = 1.0
    """dreambooth3d: weight of the reconstruction of pseudo views beside score distillation"""
    dry_run: bool = False
    """print time and memory of a step, and stop"""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    graphs: bool = True
    """on a GPU, forward and backward are one CUDA graph instead of thousands of launches"""
    threads: int | None = None
    """CPU threads; by default one a core"""
    quiet: bool = False
    """print nothing but errors"""
    given: cli.Given = frozenset()


AT_LEAST_ONE = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "threads",
                "partial_steps", "sds_steps", "pseudo_groups", "resolution")  # fmt: skip
NOT_NEGATIVE = ("lr_warmup_steps", "adam_weight_decay", "lora_rank", "validation_steps", "lambda_recon")
MOST_PRESERVED = 1e9  # far above any use; float32 gradients and the square of their norm stay finite


def check_flags(flags: Flags) -> None:
    """Refuses what no run can use, before torch is imported. Raises ArgumentError."""
    from mvdream_fast.models.tokenizer import check_prompt

    if not flags.resume_from_checkpoint:
        if flags.instance_data_dir is None:
            raise ArgumentError("--instance-data-dir is missing; name the folder of the photos")
        _check_token(check_prompt(flags.instance_prompt), flags.instance_token)
    if flags.validation_prompt:
        check_prompt(flags.validation_prompt)
    cli.check_at_least(flags, 1, *AT_LEAST_ONE)
    cli.check_at_least(flags, 0, *NOT_NEGATIVE)
    cli.check_from_to(flags, 0, MOST_PRESERVED, "lambda_preserve")
    for name, low, high in (("learning_rate", 0, 1), ("adam_epsilon", 0, 1), ("max_grad_norm", 0, float("inf")),
                            ("pseudo_strength", 0, 1), ("pseudo_share", 0, 1)):  # fmt: skip
        value = getattr(flags, name)
        if value is not None and not low < value <= high:
            raise ArgumentError(f"{cli.option(name)} must be over {low} and at most {high}, got {value}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(flags, name) < 1:
            raise ArgumentError(f"{cli.option(name)} must be from 0 to under 1, got {getattr(flags, name)}")
    if not abs(flags.guidance_scale) < 1e6:
        raise ArgumentError(f"--guidance-scale must be a finite number, got {flags.guidance_scale}")
    if not 0 <= flags.seed < 2**63:
        raise ArgumentError(f"--seed must be from 0 to 2**63 - 1, got {flags.seed}")
    if flags.lora_rank and flags.train_text_encoder:
        raise ArgumentError("--lora-rank tunes the UNet alone; leave out --train-text-encoder, or --lora-rank")


def _check_token(prompt: str, token: str) -> None:
    """The instance token must be one word, and a word of the prompt."""
    from mvdream_fast.models.tokenizer import check_prompt

    word = check_prompt(token)
    if not word.isalnum():
        raise ArgumentError(f"--instance-token must be one word of letters and digits, got {token!r}")
    if word not in "".join(c if c.isalnum() else " " for c in prompt).split():
        raise ArgumentError(
            f'--instance-prompt must hold the token {word!r}, got {prompt!r}; write "a photo of a {word} chair"'
        )


def main(flags: Flags) -> None:
    """Checks the flags, then begins or goes on with a run. Exits with 130 or 143 when a signal stopped it."""
    check_flags(flags)
    from mvdream_fast.tuning.photos import list_photos

    if not flags.resume_from_checkpoint and flags.instance_data_dir is not None:
        list_photos(flags.instance_data_dir)  # a wrong folder is told before torch is imported
    cli.set_threads(flags.threads)
    from mvdream_fast.tuning import runs

    code = runs.run_flags(flags)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    cli.run(main, Flags, prog="dreambooth")
