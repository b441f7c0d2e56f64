"""What folders hold: `python -m mvdream_fast.rendering.inventory FOLDER...` prints a line for each, and one for all.

Counts alone, of shards (no image is decoded) or of a source that is not drawn yet (no mesh is read).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.data.captions import head_noun
from mvdream_fast.data.shards import find_shards, n_views, read_metas, reading_shard
from mvdream_fast.rendering.catalogue import Entry, read_folder, read_sweethome3d
from mvdream_fast.rendering.metadata import NAME

SPLITS = ("train", "held_out", "pictures")
COLUMNS = ("folder", "objects", "kinds", "captions", "orbits", "images", "held out", "pictures")


@dataclass
class Count:
    """Ids of objects, held-out objects and pictures; kinds of thing (head nouns); captions; orbits and their images."""

    objects: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)
    captions: set[str] = field(default_factory=set)
    orbits: int = 0
    images: int = 0
    held_out: set[str] = field(default_factory=set)
    pictures: set[str] = field(default_factory=set)

    def add(self, meta: dict) -> None:
        """Counts one record."""
        self.kinds.add(meta.get("kind") or head_noun(meta["noun"]))  # older shards name no kind
        self.captions.add(meta["caption"])
        if "fovy" not in meta:
            self.pictures.add(meta["id"])
            return
        self.objects.add(meta["id"])
        self.orbits += 1
        self.images += n_views(meta)
        if meta["split"] == "held_out":
            self.held_out.add(meta["id"])

    def line(self, name: str) -> str:
        """A row of a Markdown table."""
        numbers = (
            len(self.objects), len(self.kinds), len(self.captions), self.orbits, self.images, len(self.held_out),
            len(self.pictures),
        )  # fmt: skip
        return "| " + " | ".join([name, *(f"{number:,}" for number in numbers)]) + " |"


def undrawn(folder: Path) -> list[Entry]:
    """What a source holds that has no shards yet. Raises InputFileError where it has no list either."""
    if (folder / NAME).exists():
        return read_folder(folder)
    if any(folder.rglob("*.sh3f")):
        return read_sweethome3d(folder)
    raise InputFileError(f"no shards and no {NAME} in {folder}; `python -m mvdream_fast.render` makes shards")


def counted(folder: Path, *sums: Count) -> Count:
    """What there is in a folder; `sums` are added to. Raises InputFileError where there is nothing."""
    own, files = Count(), [path for split in SPLITS for path in find_shards(folder, split)]
    counts = (own, *sums)
    for path in files:
        with reading_shard(path):
            for meta in read_metas(path):
                for count in counts:
                    count.add(meta)
    if files:
        return own
    for entry in undrawn(folder):
        for count in counts:
            count.objects.add(entry.id)
            count.kinds.add(entry.kind or head_noun(entry.noun))
    return own


def main(places: list[str]) -> None:
    """Prints a Markdown table."""
    total = Count()
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for place in places:
        print(counted(Path(place), total).line(Path(place).name))
    if len(places) > 1:
        print(total.line("all"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputFileError as error:
        sys.exit(f"inventory: {error}")
