"""A contact sheet: some of the rendered objects, four views each, with their captions."""

from pathlib import Path

import numpy as np

from mvdream_fast.core.files import atomic_write
from mvdream_fast.core.images import png_bytes
from mvdream_fast.data.shards import Sample, find_shards, list_shards, read_shard

COLUMNS, ROWS, CELL = 4, 15, 64
BACKGROUND = (120, 150, 180)


def write_sheet(folder: Path) -> Path | None:
    """Writes `sheet.png` into a folder of shards: up to 60 objects of training, evenly spread, else of those held out.

    Returns its path, or None where the shards hold nothing. Raises: InputFileError where there are no shards.
    """
    from PIL import Image

    split = "train" if find_shards(folder) else "held_out"
    samples = _some(list_shards(folder, split), COLUMNS * ROWS)
    if not samples:
        return None
    cells = [_cell(sample) for sample in samples]
    cells += [np.zeros_like(cells[0])] * (-len(cells) % COLUMNS)
    rows = [np.hstack(cells[k : k + COLUMNS]) for k in range(0, len(cells), COLUMNS)]
    image = Image.fromarray(np.vstack(rows))
    path = folder / "sheet.png"
    atomic_write(path, png_bytes(image))
    return path


def _some(paths: list[Path], n: int) -> list[Sample]:
    each = -(-n // len(paths))
    out: list[Sample] = []
    for path in paths:
        samples = list(read_shard(path))
        n_here = min(each, len(samples))
        out += [samples[k * len(samples) // n_here] for k in range(n_here)]
        if len(out) >= n:
            break
    return out[:n]


def _cell(sample: Sample) -> np.ndarray:
    """Four views a quarter turn apart on blue, the caption below: [CELL + 14, 4 * CELL, 3] uint8."""
    from PIL import Image, ImageDraw

    step = len(sample.views) // 4
    cell = Image.new("RGB", (4 * CELL, CELL + 14))
    for k in range(4):
        view = Image.fromarray(sample.views[k * step]).resize((CELL, CELL), Image.Resampling.BOX)
        cell.paste(BACKGROUND, (k * CELL, 0, (k + 1) * CELL, CELL))
        cell.paste(view, (k * CELL, 0), view)
    ImageDraw.Draw(cell).text((2, CELL + 1), sample.meta["caption"].encode("ascii", "replace").decode()[:42])
    return np.asarray(cell)
