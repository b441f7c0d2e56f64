"""What a model learns things by: `python -m mvdream_fast.rendering.names FOLDER... > names.txt`.

A line for each name of things that are trained on, with how many of them are called so ("25 chair", the commonest
first), and for each other phrase or word of their captions, with 0. Of shards, or of a source that is not drawn yet:
then names and tags alone. examples/stand_ins.py reads the list; no image is decoded.
"""

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.data.captions import MATERIALS, NAMES
from mvdream_fast.data.shards import find_shards, read_metas, reading_shard
from mvdream_fast.data.synonyms import synonyms
from mvdream_fast.rendering.furniture import usable_tags
from mvdream_fast.rendering.inventory import undrawn
from mvdream_fast.rendering.plan import held_out_ids


def names(folders: list[Path]) -> dict[str, int]:
    """Name -> things of it, the commonest first, then other words of captions -> 0.

    Raises: InputFileError where a folder has neither shards nor a source's list.
    """
    things: dict[str, set[str]] = defaultdict(set)
    words: set[str] = set()
    held_out = held_out_ids()
    for folder in folders:
        shards = [path for split in ("train", "pictures") for path in find_shards(folder, split)]
        for path in shards:
            with reading_shard(path):
                for meta in read_metas(path):
                    _add(meta, things, words)
        if not shards:
            words.update(NAMES, (word for _, word in MATERIALS))
            for entry in undrawn(folder):
                if entry.id not in held_out:
                    things[entry.noun].add(entry.id)
                    words.update(usable_tags(entry.tags, entry.category))
    counts = Counter({name: len(ids) for name, ids in things.items()})
    return dict(counts.most_common()) | dict.fromkeys(sorted(words - set(counts)), 0)


def _add(meta: dict, things: dict[str, set[str]], words: set[str]) -> None:
    texts = [meta["caption"], *meta["variants"]]
    words.update(re.findall(r"[a-z']+", " ".join(texts)))
    for name in (meta["noun"], meta.get("kind") or meta["noun"], *synonyms(meta["noun"])):
        if any(f" {name}" in f" {text}" for text in texts):  # older shards have no synonyms
            things[name].add(meta["id"])


def main(places: list[str]) -> None:
    """Prints the list."""
    print("\n".join(f"{count} {name}" for name, count in names([Path(place) for place in places]).items()))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputFileError as error:
        sys.exit(f"names: {error}")
