"""What a training is asked for: settled, and refused where no run could use it; before torch is imported.

What several processes cannot share is refused in sharing.py, what needs the model in runs.py.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvdream_fast.core import cli, run_folder
from mvdream_fast.core.errors import ArgumentError, OutputError
from mvdream_fast.core.files import make_folder
from mvdream_fast.core.processes import is_first
from mvdream_fast.models.config import NAMED, with_settings
from mvdream_fast.models.tokenizer import check_prompt
from mvdream_fast.training.flags import Flags

if TYPE_CHECKING:
    from mvdream_fast.data.batches import Shards

FIXED = (
    "stage", "config", "settings", "init", "vae", "text", "vocabulary", "stand_ins", "decoder_only", "freeze_text",
    "seed",
)  # fmt: skip
WITH_VIEWS = ("unet", "cleaner", "matting")
READ_BY = {  # the stages that read a flag, where it is not all of them
    **dict.fromkeys(
        ("vae", "text", "stand_ins", "freeze_text", "decay", "multi_view_share", "wide_share", "view_words",
         "caption_dropout", "data_order", "timestep_shift", "accumulate", "gradient_checkpointing", "weighting",
         "dtype", "cache_latents", "latents", "sheet_prompts", "sheet_guidance", "shard", "shard_group"), ("unet",)),
    "config": ("unet", "vae"),
    "settings": ("unet", "vae"),
    "vocabulary": ("unet", "vae", "evaluator"),
    "init": ("unet", "vae", "cleaner", "matting"),
    "n_views": WITH_VIEWS,
}  # fmt: skip
WRITTEN = ("model", "checkpoints", "samples", "log.jsonl")  # by a run, beside its record


def settled(asked: Flags) -> Flags:
    """The flags that a run goes by: of one that goes on, what is not given is as it was.

    Raises: ArgumentError for what no run can use, what its stage does not read, and what a run cannot take up on its
        way; OutputError for a folder that is another's.
    """
    folder = Path(asked.output)
    record = _training_record(folder) if asked.resume else None  # None, too: a run from before there was a record
    args = asked if record is None else cli.settled(asked, record["settings"], FIXED)
    _check_read(asked, args.stage)
    _check_model(args)
    _check_numbers(args)
    done = run_folder.latest_step(folder / "checkpoints") if asked.resume else 0
    if args.steps < done:
        raise ArgumentError(f"--steps must be at least the {done} that are done, got {args.steps}")
    return args


def _check_read(asked: Flags, stage: str) -> None:
    """Refuses flags that were given and would have no effect."""
    given = [name for name in cli.given(asked) if not (asked.resume and name in FIXED)]
    for name in given:
        option = "--set" if name == "settings" else cli.option(name)
        if stage not in READ_BY.get(name, (stage,)):
            raise ArgumentError(f"{option} must be left out with --stage {stage}, which does not read it")
        if asked.init is not None and name in ("config", "text"):
            raise ArgumentError(f"{option} must be left out with --init, whose own goes on")


def _check_model(args: Flags) -> None:
    if args.config not in NAMED:
        raise ArgumentError(f"--config must be one of {', '.join(NAMED)}, got {args.config}")
    if args.init is None:
        with_settings(NAMED[args.config], args.settings)
    if args.decoder_only and (args.stage != "vae" or args.init is None):
        raise ArgumentError("--decoder-only must come with --stage vae and --init: there is no trained encoder to keep")
    if args.stage in ("cleaner", "matting") and not args.resume and args.init is None:
        raise ArgumentError(f"--stage {args.stage} must come with --init: it is a part of a whole model's decoder")


def _check_numbers(args: Flags) -> None:
    cli.check_at_least(args, 1, "steps", "n_views", "accumulate", "batch_size", "threads")
    cli.check_at_least(args, 1, "shard_group")
    cli.check_from_to(args, 0, 256, "workers")
    cli.check_at_least(args, 0, "warmup", "sheet_minutes", "checkpoint_minutes")
    if not 0 <= args.decay <= args.steps:
        raise ArgumentError(f"--decay must be from 0 to --steps, got {args.decay}")
    cli.check_from_to(args, 0, 1, "multi_view_share", "wide_share", "caption_dropout", "balance")
    if args.balance and (args.stage != "unet" or args.data_order == "epochs"):
        raise ArgumentError(
            "--balance must come with --stage unet and --data-order random: epochs hold each orbit once"
        )
    if not 0 < args.timestep_shift <= 100:
        raise ArgumentError(f"--timestep-shift must be over 0 and at most 100, got {args.timestep_shift}")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ArgumentError(f"--lr must be over 0 and finite, got {args.lr}")
    if args.ema is not None and not 0 <= args.ema < 1:
        raise ArgumentError(f"--ema must be from 0 to under 1, got {args.ema}")
    for prompt in args.sheet_prompts:
        try:
            check_prompt(prompt, allow_empty=True)
        except ArgumentError as error:
            raise ArgumentError(f"--sheet-prompts must be prompts: {error}") from error


def check_views(args: Flags, shards: "Shards", held_out: "Shards | None") -> None:
    """Refuses numbers of views that an orbit cannot be cut into: of those trained on, and of those that a UNet is
    validated on. Raises ArgumentError."""
    splits = () if args.stage not in WITH_VIEWS else (shards, held_out) if args.stage == "unet" else (shards,)
    for n_total in (split.records[0].n_views for split in splits if split):
        if n_total % args.n_views:
            raise ArgumentError(f"--n-views must divide the {n_total} views of a rendered orbit, got {args.n_views}")
    n_total = shards.records[0].n_views
    if args.wide_share and n_total % (2 * args.n_views):
        raise ArgumentError(
            f"--wide-share must come with an --n-views whose double divides the {n_total} views of a rendered orbit, "
            f"got {args.n_views}"
        )


def _training_record(folder: Path) -> dict[str, Any] | None:
    """The record of the training run in a folder; None where there is none.

    Raises: OutputError where the folder is a model's, or a run's of another command.
    """
    record = run_folder.read_record(folder)
    if record is not None and record.get("kind") != "training":
        raise OutputError(
            f"the output folder {folder} must be new or a training run's, its {run_folder.RECORD} is of "
            f"{record.get('kind', 'something else')}; name another with -o"
        )
    return record


def output_folder(args: Flags) -> Path:
    """The output folder. A run that is there already is only continued on request, and only a run is continued.

    Raises: OutputError, ArgumentError where there is nothing to go on from.
    """
    folder, there = Path(args.output), (Path(args.output) / "checkpoints" / run_folder.LATEST).exists()
    record = _training_record(folder)
    if there and not args.resume:
        raise OutputError(f"{folder} holds a training run already; continue it with --resume, or name another with -o")
    if args.resume and not there:
        raise ArgumentError(f"--resume must find a checkpoint in {folder}, got none; leave it out to begin a run")
    if not there and is_first():  # to the others it may be one that the first has made its own
        # A run that died before its first checkpoint is begun anew; what else lies there is nobody's to replace.
        for name in WRITTEN if record is None else ("model",):
            if (folder / name).exists():
                raise OutputError(
                    f"the output folder {folder} holds {name} already, which a new run would replace; name another "
                    "with -o"
                )
    return make_folder(folder)
