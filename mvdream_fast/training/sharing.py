"""How several processes share a run, as the flags say: what is refused before they meet, and who shares a model.

How they meet and compute together is core/processes.py's.
"""

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.data.batches import Shards
from mvdream_fast.training.flags import Flags
from mvdream_fast.training.unet import TrainOptions


def check_ranks(args: Flags, world: int, shards: Shards) -> None:
    """Refuses what several processes cannot share, before they meet."""
    n_shards = len({record.path for record in shards.records})
    if world > n_shards:
        raise ArgumentError(
            f"the data must be at least as many train shards as there are processes, got {n_shards} for {world}; start "
            "fewer processes or render more"
        )
    batch = args.batch_size or TrainOptions.batch_size
    if batch % world:
        raise ArgumentError(f"--batch-size must be divisible by the {world} processes, got {batch}")
    if args.wide_share and (batch % (2 * world) or args.data_order == "epochs"):
        raise ArgumentError(
            f"--wide-share must come with an even --batch-size (for each process) and --data-order random, got {batch} "
            f"for {world} and {args.data_order}"
        )
    if world > 1 and args.stage != "unet":
        raise ArgumentError(f"--stage {args.stage} must run in one process, got {world}; its model is small")
    if args.shard_group is not None and (args.shard == "none" or world % args.shard_group):
        raise ArgumentError(
            f"--shard-group must be a divisor of the {world} processes, and come with --shard fsdp2, got "
            f"{args.shard_group} with --shard {args.shard}"
        )


def share_group(args: Flags, world: int) -> int:
    """How many processes share a copy of the model; 0 where each has its own, as a single one always has."""
    return 0 if args.shard == "none" or world == 1 else args.shard_group or world
