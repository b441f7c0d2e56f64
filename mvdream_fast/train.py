"""`python -m mvdream_fast.train`: trains a diffusion model, its autoencoder or the evaluator on rendered shards."""

import sys

from mvdream_fast.core import cli, processes
from mvdream_fast.training import request
from mvdream_fast.training.flags import Flags


def main(args: Flags) -> None:
    """Settles and checks the flags, then trains. Exits with 130 or 143 when a signal stopped it."""
    args = request.settled(args)
    cli.set_threads(args.threads or max(1, cli.available_cores() // processes.launched()[1]))
    from mvdream_fast.training import runs

    code = runs.run_stage(args)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    cli.run(main, Flags, prog="train")
