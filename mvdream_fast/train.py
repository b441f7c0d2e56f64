"""`python -m mvdream_fast.train`: trains a diffusion model, its autoencoder or the evaluator on rendered shards."""

import sys

from mvdream_fast.core import cli, processes
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.models.config import NAMED, with_settings
from mvdream_fast.training.flags import Flags


def _check(args: Flags) -> None:
    """Refuses values that no run can use, before torch is imported."""
    if args.config not in NAMED:
        raise ArgumentError(f"--config must be one of {', '.join(NAMED)}, got {args.config}")
    if args.init is None:
        with_settings(NAMED[args.config], args.settings)
    cli.check_at_least(args, 1, "steps", "n_views", "accumulate", "batch_size", "threads")
    cli.check_at_least(args, 1, "shard_group")
    cli.check_from_to(args, 0, 256, "workers")
    cli.check_at_least(args, 0, "warmup", "sheet_minutes", "checkpoint_minutes")
    if args.decoder_only and (args.stage != "vae" or args.init is None):
        raise ArgumentError("--decoder-only must come with --stage vae and --init: there is no trained encoder to keep")
    if args.stage in ("cleaner", "matting") and not args.resume and args.init is None:
        raise ArgumentError(f"--stage {args.stage} must come with --init: it is a part of a whole model's decoder")
    if not 0 <= args.decay <= args.steps:
        raise ArgumentError(f"--decay must be from 0 to --steps, got {args.decay}")
    cli.check_from_to(args, 0, 1, "multi_view_share", "wide_share", "caption_dropout", "balance")
    if args.balance and (args.stage != "unet" or args.data_order == "epochs"):
        raise ArgumentError(
            "--balance must come with --stage unet and --data-order random: epochs hold each orbit once"
        )
    if not 0 < args.timestep_shift <= 100:
        raise ArgumentError(f"--timestep-shift must be over 0 and at most 100, got {args.timestep_shift}")
    if args.lr is not None and not args.lr > 0:
        raise ArgumentError(f"--lr must be over 0, got {args.lr}")
    if args.ema is not None and not 0 <= args.ema < 1:
        raise ArgumentError(f"--ema must be from 0 to under 1, got {args.ema}")


def main(args: Flags) -> None:
    """Checks the flags, then trains. Exits with 130 or 143 when a signal stopped it."""
    _check(args)
    cli.set_threads(args.threads or max(1, cli.available_cores() // processes.launched()[1]))
    from mvdream_fast.training import runs

    code = runs.run_stage(args)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    cli.run(main, Flags, prog="train")
