"""The data of the ablations: a few objects that have a front, with some orbits of each held out.

    python examples/ablations_data.py SHARDS -o DATA [--objects 64]

So few that in minutes a model can learn them from all sides. They are the first training objects of SHARDS (written by
`python -m mvdream_fast.render sweethome3d`) that look different from behind, have three orbits in their own colours,
and a caption that none before them has. The second and third of these orbits, with cameras that training never sees,
become DATA's held-out shard, the others and all in other colours its training shard.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from mvdream_fast.data.batches import Shards
from mvdream_fast.data.shards import Sample, write_shard
from mvdream_fast.evaluation.measures import opposite_difference
from mvdream_fast.evaluation.reference import HAS_FRONT, Orbit

HELD_OUT = slice(1, 3)  # of an object's orbits in its own colours


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DATA")
    parser.add_argument("--objects", type=int, default=64)
    return parser.parse_args(argv)


def chosen(shards: Shards, n_objects: int) -> list[tuple[list[int], list[int]]]:
    """Records to train on and to hold out, of each object."""
    objects: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(shards.records):
        objects[record.meta["id"]].append(i)
    found, captions = [], set()
    for records in objects.values():
        own = [i for i in records if not shards.records[i].meta["painted"]]
        held_out = own[HELD_OUT]
        if len(held_out) < 2 or shards.records[own[0]].meta["caption"] in captions or not has_front(shards, own):
            continue
        captions.add(shards.records[own[0]].meta["caption"])
        found.append(([i for i in records if i not in held_out], held_out))
        if len(found) == n_objects:
            return found
    raise SystemExit(f"{len(found)} objects of the shards have a front and a caption of their own; ask for no more")


def has_front(shards: Shards, records: list[int]) -> bool:
    orbits = [Orbit.read(shards, i) for i in records]
    return sum(opposite_difference(o.images, o.masks) for o in orbits) / len(orbits) >= HAS_FRONT


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    shards = Shards(args.shards)
    train, held_out = zip(*chosen(shards, args.objects))
    args.out.mkdir(parents=True, exist_ok=True)
    for split, groups in (("train", train), ("held_out", held_out)):
        records = [i for group in groups for i in group]
        samples = (Sample(shards.records[i].meta | {"split": split}, shards.views(i)) for i in records)
        write_shard(args.out / f"{split}-00000.tar", list(samples))
        print(f"{split}: {len(records)} orbits of {len(groups)} objects")


if __name__ == "__main__":
    main()
