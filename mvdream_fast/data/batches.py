"""From shards to training batches: an index into the tar files, backgrounds, view groups, and a cache of latents.

Batches are drawn by index, not streamed, so that batch k is a function of (seed, k) alone and a resumed run sees the
same images. Several processes draw the indices of the whole batch alike, and each reads and decodes its own share.
Writing shards is shards.py's.
"""

import copy
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mvdream_fast.camera import normalize_camera
from mvdream_fast.core.errors import ArgumentError, InputFileError
from mvdream_fast.core.processes import ALONE, Ranks
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.ahead import Ahead
from mvdream_fast.data.backgrounds import BACKGROUND_SHARES, background, draw_background, on_background
from mvdream_fast.data.captions import clean, head_noun, without_colors
from mvdream_fast.data.latent_cache import LatentCache
from mvdream_fast.data.shards import decode_views, find_shards, list_shards, n_views, pairs, reading_shard, shrunk

DECODED_BYTES = 1 << 30  # of decoded strips that are kept in memory
SUFFIX = ", 3d asset"
HELD_OUT, PICTURES = "held_out", "pictures"  # splits beside "train"
FILLED_AT_ONCE = 8  # orbits that `LatentSource.fill` encodes together
SIDE_SHARE = 0.5
Side = Callable[[Tensor], list[str]]


@dataclass(frozen=True)
class Record:
    """One rendered orbit: its JSON, and where its WebP strip lies."""

    meta: dict
    path: Path
    offset: int
    size: int

    @property
    def n_views(self) -> int:
        """V, the views of the orbit."""
        return n_views(self.meta)


@dataclass(frozen=True)
class Batch:
    """B scenes of V views, views fastest.

    images: [B*V, 3, Hp, Wp] in [-1, 1], or scaled latents [B*V, C, h, w] where `encoded`.
    cameras: [B*V, 16] normalised, or None in 2D mode (then V = 1 and the batch has as many images).
    """

    images: Tensor
    cameras: Tensor | None
    captions: list[str]
    n_views: int
    encoded: bool


class Source(Protocol):
    """Where a trainer's batches come from."""

    def batch(self, stream: Stream, n_scenes: int, n_views: int, multi_view: bool, ranks: Ranks = ALONE) -> Batch:
        """The batch that the stream's key stands for, or this process' share of it: nothing else is read or decoded.

        Scenes come in random order, whatever they are, as a trainer deals rising noise levels to them in turn."""
        ...


class Shards:
    """The orbits (or pictures) of one split in memory as an index; strips are read and decoded when asked for.

    What is trained on has none of the held-out captions beside it, whichever source each is from.

    Raises: InputFileError where there are no shards, or one is truncated or foreign.
    """

    def __init__(self, folder: Path, split: str = "train"):
        self.records = [record for path in list_shards(folder, split) for record in _index(path)]
        if split != HELD_OUT:
            others = [record for path in find_shards(folder, HELD_OUT) for record in _index(path)]
            self.records = _without({record.meta["caption"] for record in others}, self.records)
        if not self.records:
            raise InputFileError(f"the {split} shards in {folder} hold no renders; render them again")
        first = self.records[0]
        for record in self.records:
            if (record.n_views, record.meta["size"]) != (first.n_views, first.meta["size"]):
                raise InputFileError(
                    f"{record.path}: {record.meta['key']} has {record.n_views} views of {record.meta['size']} px, the "
                    f"first one has {first.n_views} of {first.meta['size']}; train on shards of one kind"
                )
        strip = first.n_views * first.meta["size"] ** 2 * 4
        self.views = lru_cache(maxsize=max(8, DECODED_BYTES // strip))(self._views)
        self.size = int(first.meta["size"])
        self.chances: np.ndarray | None = None  # running sums [n] of what `balanced` gives each record

    def at(self, size: int) -> "Shards":
        """The same with images of `size` pixels, made from these where they are a multiple of it.

        Raises: ArgumentError where they are not.
        """
        if self.size == size:
            return self
        if self.size % size:
            raise ArgumentError(f"the model must be given images of {size} px, got shards of {self.size} px")
        small = copy.copy(self)
        small.size = size
        strip = small.records[0].n_views * size**2 * 4
        small.views = lru_cache(maxsize=max(8, DECODED_BYTES // strip))(small._views)
        return small

    def balanced(self, power: float) -> "Shards":
        """The same, drawn so that rare things are seen more often: an orbit's chance is its noun's count to -power.

        0: all orbits alike; 1: all nouns alike.
        """
        if power == 0:
            return self
        nouns = [_noun(record.meta) for record in self.records]
        counts = Counter(nouns)
        out = copy.copy(self)
        out.chances = np.cumsum([counts[noun] ** -power for noun in nouns])
        return out

    def __len__(self) -> int:
        return len(self.records)

    def pick(self, n: int, stream: Stream) -> list[int]:
        """n records in random order, without repeats where they are at most half of all.

        Of balanced ones, one from each n-th of all chances: none but what is likelier than that comes twice.
        """
        if isinstance(stream, Turns):
            return stream.turn(len(self), n)
        if self.chances is not None:
            places = (np.arange(n) + stream.uniform(1).item()) / n * self.chances[-1]
            picks = np.searchsorted(self.chances, places, side="right").clip(max=len(self) - 1)
            return picks[stream.permutation(n).numpy()].tolist()
        if n <= len(self) // 2:
            return stream.permutation(len(self))[:n].tolist()
        return stream.integers(0, len(self), n).tolist()

    def _views(self, i: int) -> np.ndarray:
        """All views of record i, [V, s, s, 4] uint8 straight-alpha RGBA."""
        record = self.records[i]
        try:
            with open(record.path, "rb") as file:
                file.seek(record.offset)
                content = file.read(record.size)
            views = decode_views(content, record.n_views, record.meta["columns"], record.meta["size"])
        except (OSError, ValueError) as error:
            raise InputFileError(
                f"{record.path}: {record.meta['key']} cannot be read ({error}); render it again"
            ) from None
        return views if self.size == record.meta["size"] else shrunk(views, record.meta["size"] // self.size)

    def captions(self) -> list[str]:
        """Every text that `caption` may return, without repeats, in order."""
        texts = (text for r in self.records for text in (r.meta["caption"], *r.meta["variants"]))
        return list(dict.fromkeys([*texts, SUFFIX]))

    def caption(self, i: int, stream: Stream) -> str:
        """A caption of record i: half the time the full one, else a variant; every fourth with MVDream's suffix, if it
        doesn't say 3D already."""
        meta = self.records[i].meta
        full, variant, suffix = stream.uniform(3).tolist()
        texts = meta["variants"]
        text = meta["caption"] if full < 0.5 or not texts else texts[int(variant * len(texts))]
        return text + SUFFIX if suffix < 0.25 and "3d" not in text.lower() else text


def _noun(meta: dict) -> str:
    """What a record's thing is called: as its source says, or the last word of its name before what it is or has."""
    return meta.get("kind") or head_noun(without_colors(meta.get("name") or meta["caption"]))


def _index(path: Path) -> list[Record]:
    """The records of one tar file; the end-of-archive blocks must be there, or the file was cut."""
    with reading_shard(path):
        with tarfile.open(path, "r:") as tar:
            records = [Record(_checked(meta), path, image.offset_data, image.size) for meta, image in pairs(tar)]
            end = max((info.offset_data + (info.size + 511) // 512 * 512 for info in tar.getmembers()), default=0)
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(512) != bytes(512):
                raise ValueError("its end is missing")
    return records


def _without(captions: set[str], records: list[Record]) -> list[Record]:
    """Records that say none of the captions: in the place of one comes the first variant, or the record goes."""
    out = []
    for record in records:
        texts = [text for text in (record.meta["caption"], *record.meta["variants"]) if text not in captions]
        if texts:
            out.append(replace(record, meta={**record.meta, "caption": texts[0], "variants": texts[1:]}))
    return out


def _checked(meta: dict) -> dict:
    """A record's JSON with all that is read later; its words as the tokenizer takes them. Raises ValueError."""
    if not all(type(meta[k]) is int and meta[k] > 0 for k in ("size", "columns")):
        raise ValueError("its sizes are no positive whole numbers")
    if not isinstance(meta["variants"], list):
        raise ValueError("its variants are no list")
    words = [meta["caption"], *meta["variants"]]
    if not all(isinstance(text, str) for text in words):
        raise ValueError("its captions are no text")
    for name in ("name", "kind"):  # what `_noun` asks, if they are there
        if not isinstance(meta.get(name), str | None):
            raise ValueError(f"its {name} is no text")
    caption, *variants = map(clean, words)
    return {**meta, **_poses_of(meta), "key": str(meta["key"]), "caption": caption, "variants": variants}


def _poses_of(meta: dict) -> dict[str, np.ndarray]:
    """A record's c2w as float32 [V, 16], which takes an eighth of a list's memory. Raises ValueError."""
    if "fovy" not in meta:
        return {}
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        c2w, fovy = (np.asarray(meta[name], np.float32) for name in ("c2w", "fovy"))
    if c2w.shape != (len(fovy), 16) or fovy.ndim != 1 or not (np.isfinite(c2w).all() and np.isfinite(fovy).all()):
        raise ValueError("its cameras are not 16 finite numbers and a field of view for each view")
    return {"c2w": c2w}


def view_group(n_total: int, n_views: int, stream: Stream) -> list[int]:
    """Evenly spaced views of an orbit from a random first one. Raises ArgumentError where they can't be even."""
    if n_total % n_views:
        raise ArgumentError(f"--n-views must divide the {n_total} views of a rendered orbit, got {n_views}")
    start = int(stream.integers(0, n_total, 1))
    return [(start + k * (n_total // n_views)) % n_total for k in range(n_views)]


class ImageSource:
    """Batches of images, straight from the shards.

    Args: side: words for where cameras c2w [n, 4, 4] stand; half of the single views whose thing has a front are told
        theirs.
    """

    def __init__(self, shards: Shards, side: Side | None = None):
        self.shards, self.side = shards, side

    def batch(self, stream: Stream, n_scenes: int, n_views: int, multi_view: bool, ranks: Ranks = ALONE) -> Batch:
        """Multi-view: scenes of orthogonal views of an orbit. 2D: as many single views of as many orbits, no camera."""
        return self._drawn(stream, n_scenes, n_views, multi_view, ranks)[0]

    def scenes(self, stream: Stream, n_scenes: int, n_views: int) -> tuple[Batch, Tensor]:
        """A multi-view batch, and what it shows as straight RGBA, uint8 [n, 4, s, s]."""
        batch, views = self._drawn(stream, n_scenes, n_views, True, ALONE)
        return batch, torch.from_numpy(np.concatenate(views)).movedim(-1, 1)

    def _drawn(
        self, stream: Stream, n_scenes: int, n_views: int, multi_view: bool, ranks: Ranks
    ) -> tuple[Batch, list[np.ndarray]]:
        """A batch, and the views of each of its groups as they are rendered."""
        groups, v = _groups(self.shards, stream, n_scenes, n_views, multi_view)
        colors = [background(draw_background(stream), stream) for _ in groups]
        captions = _captions(self.shards, groups, None if multi_view else self.side, stream)
        groups = ranks.part(groups)
        views = [self.shards.views(i)[which] for i, which in groups]
        images = torch.cat([on_background(rgba, color) for rgba, color in zip(views, ranks.part(colors))])
        cameras = _cameras(self.shards, groups) if multi_view else None
        return Batch(images, cameras, ranks.part(captions), v, encoded=False), views

    def images(self, stream: Stream, n: int) -> Tensor:
        """Single images for the autoencoder, [n, 3, s, s]: backgrounds of any colour, a third each grey and white."""
        picks = self.shards.pick(n, stream)
        kinds, views = stream.integers(0, 3, n).tolist(), stream.uniform(n).tolist()
        rows = []
        for i, kind, u in zip(picks, kinds, views):
            which = int(u * self.shards.records[i].n_views)
            rows.append(on_background(self.shards.views(i)[which : which + 1], background(kind, stream)))
        return torch.cat(rows)


class LatentSource:
    """Batches of latents, each orbit encoded once on three backgrounds when it is first drawn, and kept on disk.

    All views of an orbit are encoded together whatever is asked for, so that the cache's numbers don't depend on the
    order of requests. Latents are stored as fp16 posterior means.

    Args:
        shards: the split.
        encode: images [V, 3, s, s] -> scaled latents [V, C, h, w].
        file: the cache's name; its files are made or continued, as LatentCache's.
        shape: (C, h, w).
        key: names shards and autoencoder; a cache made under another key is made again.
        side: as ImageSource's.
    Raises: OutputError, as LatentCache.
    """

    def __init__(
        self,
        shards: Shards,
        encode: Callable[[Tensor], Tensor],
        file: Path,
        shape: tuple,
        key: str,
        side: Side | None = None,
    ):
        self.shards, self.encode, self.side = shards, encode, side
        shape = (len(shards), len(BACKGROUND_SHARES), shards.records[0].n_views, *shape)
        self._cache = LatentCache(file, key, shape)  # held: its lock goes with it
        self.latents, self.filled = self._cache.latents, self._cache.filled

    def batch(self, stream: Stream, n_scenes: int, n_views: int, multi_view: bool, ranks: Ranks = ALONE) -> Batch:
        """As ImageSource.batch, but encoded."""
        groups, v = _groups(self.shards, stream, n_scenes, n_views, multi_view)
        kinds = [draw_background(stream) for _ in groups]
        captions = _captions(self.shards, groups, None if multi_view else self.side, stream)
        groups = ranks.part(groups)
        images = torch.cat([self._get(i, kind, which) for (i, which), kind in zip(groups, ranks.part(kinds))])
        cameras = _cameras(self.shards, groups) if multi_view else None
        return Batch(images, cameras, ranks.part(captions), v, encoded=True)

    def fill(self, workers: int = 0) -> None:
        """Encodes all orbits that are not yet there, from images that `workers` processes decode.

        After it `batch` encodes nothing, so that a process may call it that cannot reach the autoencoder's device.
        """
        missing = np.flatnonzero(~self.filled.all(1)).tolist()
        groups = [missing[k : k + FILLED_AT_ONCE] for k in range(0, len(missing), FILLED_AT_ONCE)]
        images = Ahead(lambda k: torch.cat([self._images(i) for i in groups[k]]), workers, until=len(groups))
        for k, group in enumerate(groups):
            with torch.no_grad():
                latents = self.encode(images(k)).cpu().numpy()
            self.latents[group] = latents.reshape(len(group), *self.latents.shape[1:])
            self.filled[group] = 1

    def _images(self, i: int) -> Tensor:
        """Record i on each background, its views fastest."""
        kinds = range(len(BACKGROUND_SHARES))
        return torch.cat([on_background(self.shards.views(i), self._background(i, kind)) for kind in kinds])

    @staticmethod
    def _background(i: int, kind: int) -> Tensor:
        return background(kind, Stream(0, i, "background"))

    def _get(self, i: int, kind: int, which: list[int]) -> Tensor:
        """Latents of views of record i on a background, [V, C, h, w] float32."""
        if not self.filled[i, kind]:
            with torch.no_grad():
                latents = self.encode(on_background(self.shards.views(i), self._background(i, kind)))
            self.latents[i, kind] = latents.cpu().numpy()
            self.filled[i, kind] = 1
        return torch.from_numpy(self.latents[i, kind, which].astype(np.float32))


def _groups(
    shards: Shards, stream: Stream, n_scenes: int, n_views: int, multi_view: bool
) -> tuple[list[tuple[int, list[int]]], int]:
    """(record, views) of each scene, and V."""
    n, v = (n_scenes, n_views) if multi_view else (n_scenes * n_views, 1)
    picks = shards.pick(n, stream)
    return [(i, view_group(shards.records[i].n_views, v, stream)) for i in picks], v


def _captions(shards: Shards, groups: list[tuple[int, list[int]]], side: Side | None, stream: Stream) -> list[str]:
    """One for each group; with `side`, some of single views end with words for where they are seen from."""
    captions = [shards.caption(i, stream) for i, _ in groups]
    if side is None:
        return captions
    told = (stream.uniform(len(groups)) < SIDE_SHARE).tolist()
    fronts = [shards.records[i].meta.get("has_front", False) for i, _ in groups]
    sides = side(_poses(shards, groups))
    return [
        f"{c}, {s}" if tell and front else c for c, tell, front, s in zip(captions, told, fronts, sides, strict=True)
    ]


class Turns(Stream):
    """A stream whose batches take every record once before one comes again: those from the `start`-th on of an endless
    row of epochs, each in an order of its own. What a batch holds is still a function of its key and `start` alone."""

    def __init__(self, seed: int, step: int, purpose: str, start: int):
        super().__init__(seed, step, purpose)
        self.seed, self.start = seed, start

    def turn(self, total: int, n: int) -> list[int]:
        """The next n indices below total."""
        places = (divmod(place, total) for place in range(self.start, self.start + n))
        return [int(_epoch(self.seed, epoch, total)[k]) for epoch, k in places]


@lru_cache(maxsize=2)
def _epoch(seed: int, number: int, total: int) -> Tensor:
    return Stream(seed, number, "epoch").permutation(total)


def _cameras(shards: Shards, groups: list[tuple[int, list[int]]]) -> Tensor:
    return normalize_camera(_poses(shards, groups))


def _poses(shards: Shards, groups: list[tuple[int, list[int]]]) -> Tensor:
    """c2w of the groups' views, [n, 4, 4]."""
    rows = [np.asarray(shards.records[i].meta["c2w"], np.float32)[which] for i, which in groups]
    return torch.from_numpy(np.concatenate(rows)).reshape(-1, 4, 4)
