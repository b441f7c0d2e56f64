"""Webdataset shards of multi-view renders: plain tar files with `KEY.json` and `KEY.webp` beside it for each object.

The WebP is lossless RGBA, the views side by side (row-major in `columns`); the JSON holds cameras, words and credits.
A picture that is no render has a JSON without c2w and fovy: it is one view without a camera, in `pictures-*.tar`.
Writing is atomic; reading accepts nothing but these two members, and never uses a member's name as a path.
"""

import contextlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.core.files import replace_file

MAX_SIDE = 16383  # of a WebP
ENDINGS = ("json", "webp")  # of a record's members


@dataclass(frozen=True)
class Sample:
    """One object: views [V, size, size, 4] uint8 straight-alpha RGBA, and its JSON as a dict.

    `meta` holds id, key, caption, variants, colours, painted, split, c2w (V lists of 16, row-major, OpenGL axes),
    fovy (V, radians), azimuth_deg (V), elevation_deg, distance, size, columns, name, category, tags, creator, library,
    licence, and kind and has_front where the source says so. A picture has no c2w, fovy, azimuth_deg, elevation_deg and
    distance.
    """

    meta: dict
    views: np.ndarray

    @property
    def c2w(self) -> np.ndarray:
        """Poses [V, 4, 4] of the views."""
        return np.asarray(self.meta["c2w"], np.float32).reshape(-1, 4, 4)  # [V, 4, 4]

    @property
    def fovy(self) -> np.ndarray:
        """Vertical fields of view [V], in radians."""
        return np.asarray(self.meta["fovy"], np.float32)  # [V]


def n_views(meta: dict) -> int:
    """V, the views of a record by its JSON: one a camera; a picture without cameras is one view."""
    return len(meta["fovy"]) if "fovy" in meta else 1


def find_shards(folder: Path, split: str = "train") -> list[Path]:
    """The finished shards of a split, in order, if there are any; those in folders of parts (`render --shard`), too."""
    return [path for place in ("", "shard-*-of-*/") for path in sorted(Path(folder).glob(f"{place}{split}-*.tar"))]


def list_shards(folder: Path, split: str = "train") -> list[Path]:
    """As `find_shards`. Raises InputFileError where there are none."""
    shards = find_shards(folder, split)
    if not shards:
        raise InputFileError(f"no {split} shards in {folder}; make some with `python -m mvdream_fast.render`")
    return shards


def write_shard(path: Path, samples: list[Sample]) -> None:
    """Writes all samples or nothing. Raises OutputError where the disk is full or the folder cannot be written."""

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                _add(tar, f"{sample.meta['key']}.json", json.dumps(sample.meta, default=_rounded).encode())
                _add(tar, f"{sample.meta['key']}.webp", encode_views(sample.views, sample.meta["columns"]))

    replace_file(path, write, sum(sample.views.nbytes for sample in samples))


def _rounded(array: np.ndarray) -> list:
    """Poses that were read (batches.py keeps them as float32) as they were written."""
    return np.round(array.astype(np.float64), 7).tolist()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def columns_for(n_views: int, size: int) -> int:
    """Views a row of the strip: all of them while the image stays within WebP's limit."""
    return max(1, min(n_views, MAX_SIDE // size))


def encode_views(views: np.ndarray, columns: int) -> bytes:
    """[V, s, s, 4] uint8 -> lossless WebP."""
    from PIL import Image

    n, size = views.shape[:2]
    rows = -(-n // columns)
    grid = np.zeros((rows * columns, size, size, 4), np.uint8)
    grid[:n] = views
    grid = grid.reshape(rows, columns, size, size, 4).transpose(0, 2, 1, 3, 4).reshape(rows * size, columns * size, 4)
    out = io.BytesIO()
    Image.fromarray(grid).save(out, "WEBP", lossless=True, quality=60, method=2)
    return out.getvalue()


def decode_views(content: bytes, n: int, columns: int, size: int) -> np.ndarray:
    """The views of a strip, [V, s, s, 4] uint8. Raises ValueError where the image is not the promised one."""
    from PIL import Image

    rows = -(-n // columns)
    with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
        if image.size != (columns * size, rows * size):
            raise ValueError(f"the strip has {image.size} pixels, {columns * size} x {rows * size} were promised")
        grid = np.array(image.convert("RGBA"))
    grid = grid.reshape(rows, size, columns, size, 4).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * columns, size, size, 4)[:n]


def shrunk(views: np.ndarray, factor: int) -> np.ndarray:
    """Views of 1 / factor of the size, [V, s, s, 4] -> [V, s / factor, s / factor, 4]: means of factor^2 pixels.

    Of sRGB values weighted by alpha, as backgrounds are put behind: it makes no difference which comes first.
    """
    v, s = views.shape[0], views.shape[1] // factor
    rgb, alpha = np.zeros((v, s, s, 3), np.float32), np.zeros((v, s, s, 1), np.float32)
    for corner in np.ndindex(factor, factor):  # whole numbers all, which float32 adds exactly
        part = views[:, corner[0] :: factor, corner[1] :: factor].astype(np.float32)
        rgb += part[..., :3] * part[..., 3:]
        alpha += part[..., 3:]
    return np.concatenate([rgb / np.maximum(alpha, 1), alpha / factor**2], -1).round().astype(np.uint8)


@contextlib.contextmanager
def reading_shard(path: Path) -> Iterator[None]:
    """Within it, what a truncated or foreign shard does to its reader becomes an InputFileError naming the file."""
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"a record has no {error}" if isinstance(error, KeyError) else error
        raise InputFileError(f"{path}: not a whole shard of renders ({reason}); render it again") from None


def pairs(tar: tarfile.TarFile) -> Iterator[tuple[dict, tarfile.TarInfo]]:
    """The JSON of each record of a shard and its image, in order; members of other endings are left out.

    The two stand side by side, whichever is first. Raises: ValueError for one without the other, or what is no JSON.
    """
    stem, halves = "", dict[str, tarfile.TarInfo]()
    for info in tar:
        name, _, ending = info.name.rpartition(".")
        if ending not in ENDINGS:
            continue
        if not info.isfile():
            raise ValueError(f"{info.name} is no file")
        if halves and (name != stem or ending in halves):
            break
        stem, halves = name, halves | {ending: info}
        if len(halves) == len(ENDINGS):
            file = tar.extractfile(halves["json"])
            yield json.loads(b"" if file is None else file.read()), halves["webp"]
            halves = {}
    for there in halves:
        missing = next(ending for ending in ENDINGS if ending != there)
        raise ValueError(f"{stem}.{there} has no {stem}.{missing} beside it")


def read_metas(path: Path) -> Iterator[dict]:
    """The JSON of a shard's records, without their images. Raises InputFileError naming the file."""
    with reading_shard(path), tarfile.open(path, "r:") as tar:
        for info in tar:
            file = tar.extractfile(info) if info.isfile() and info.name.endswith(".json") else None
            if file is not None:
                yield json.loads(file.read())


def read_shard(path: Path) -> Iterator[Sample]:
    """The samples of a shard in order. Raises InputFileError naming the file where it is truncated or foreign."""
    with reading_shard(path), tarfile.open(path, "r:") as tar:
        for meta, image in pairs(tar):
            file = tar.extractfile(image)
            content = b"" if file is None else file.read()
            yield Sample(meta, decode_views(content, n_views(meta), meta["columns"], meta["size"]))
