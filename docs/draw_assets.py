"""Draws finished runs side by side, each from the front and in quarter turns: what README.md shows.

    python docs/draw_assets.py RUN... -o docs/assets.webp --columns 4 --size 56 --name

`mvdream_fast.sds --prompts-file` leaves the runs; they are drawn in the order in which they are given, row by row.
"""

import argparse
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from mvdream_fast.core.files import read_json
from mvdream_fast.core.images import sheet
from mvdream_fast.evaluation.runs import orbit
from mvdream_fast.scene.asset import Asset

LABEL, GAP = 16, 8  # pixels: a line of text above a row, and between columns
FINER = 3  # renders have so many pixels a side for one of the picture's: a colour may change within one


def turn(folder: Path, size: int) -> Image.Image:
    """Four renders side by side."""
    rgb = Asset.load(folder / "asset.safetensors").render(orbit(4), FINER * size).rgb
    return sheet(F.avg_pool2d(rgb, FINER)[None])


def main() -> None:
    """Reads the runs and writes the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=96, help="pixels a side of each render")
    parser.add_argument("--columns", type=int, default=2)
    parser.add_argument("--name", action="store_true", help="writes the prompts above the rows")
    flags = parser.parse_args()
    label = LABEL if flags.name else 0
    width, height = 4 * flags.size, flags.size + label
    n_rows = -(-len(flags.runs) // flags.columns)
    image = Image.new("RGB", (flags.columns * (width + GAP) - GAP, n_rows * height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for number, folder in enumerate(flags.runs):
        row, column = divmod(number, flags.columns)
        left, top = column * (width + GAP), row * height
        if flags.name:
            draw.text((left + 2, top), read_json(folder / "config.json")["prompt"], "black", font)
        image.paste(turn(folder, flags.size), (left, top + label))
    image.save(flags.output, quality=90)


if __name__ == "__main__":
    main()
