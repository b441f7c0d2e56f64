"""Which assets are kept and held out, which orbits each is rendered from, in which colours, under which words.

Everything is a function of the surveys and a seed; nothing is drawn or written here.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from mvdream_fast.core.files import read_lines
from mvdream_fast.data import captions
from mvdream_fast.rendering.catalogue import Entry
from mvdream_fast.rendering.furniture import usable_tags
from mvdream_fast.rendering.survey import MIN_COVERAGE, Survey, near_duplicates

if TYPE_CHECKING:
    from mvdream_fast.core.rng import Stream

SHARD_ASSETS = 16
KIND_STAYS = 2  # of a kind of which one is held out
PEERS, UNLIKE = 4, 1.35  # a thing is tall that is so much taller than the median of so many of its kind
UNPAINTED = "person"  # a category: their clothes have all colours, their skin should not
SHAPELESS = {UNPAINTED, "characters", "character", "animal", "robot"}  # a sitting man is not low


@dataclass(frozen=True)
class OrbitPlan:
    """One rendered orbit: four uniform numbers for its cameras, what is painted, and its words."""

    camera: tuple[float, float, float, float]
    caption: str
    variants: tuple[str, ...]
    colors: tuple[str, ...]
    paint: tuple[int, ...] = ()  # parts
    target: tuple[float, float, float] | None = None  # sRGB


@dataclass(frozen=True)
class AssetPlan:
    """All orbits of one asset, which share a split: no view of a held-out asset is ever trained on."""

    entry: Entry
    split: str
    orbits: tuple[OrbitPlan, ...]


@dataclass
class Selection:
    """The assets that are rendered, and why the others are not."""

    kept: list[Entry] = field(default_factory=list)
    empty: list[Entry] = field(default_factory=list)
    duplicates: list[Entry] = field(default_factory=list)


def select(entries: list[Entry], surveys: dict[str, Survey], compared: bool = True) -> Selection:
    """Drops slivers (under MIN_COVERAGE of the picture) and, where they are to be `compared`, near-duplicates; entries
    without a survey are bad."""
    out = Selection()
    seen = [e for e in entries if e.id in surveys]
    out.empty = [e for e in seen if surveys[e.id].coverage < MIN_COVERAGE]
    rest = [e for e in seen if surveys[e.id].coverage >= MIN_COVERAGE]
    thumbnails = np.array([surveys[e.id].thumbnail for e in rest], np.uint8)
    drop = near_duplicates(thumbnails) if rest and compared else [False] * len(rest)
    out.kept = [e for e, bad in zip(rest, drop) if not bad]
    out.duplicates = [e for e, bad in zip(rest, drop) if bad]
    return out


def held_out_ids() -> set[str]:
    """The ids in held_out.txt: one asset a line, `id<TAB>name`, # for comments."""
    rows = read_lines(files("mvdream_fast.rendering") / "held_out.txt")
    return {line.split("\t")[0] for line in rows if line and not line.startswith("#")}


def own_captions(entries: list[Entry]) -> set[str]:
    """The ids of the assets whose words from the user no other asset has; those without such words, too."""
    repeats = Counter(e.caption for e in entries)
    return {e.id for e in entries if e.caption is None or repeats[e.caption] == 1}


def random_held_out(entries: list[Entry], share: float) -> set[str]:
    """The ids of a random share of a user's assets; none where that is less than one. The same for every --seed.

    Of a kind that metadata.csv names two assets stay in training. An asset whose caption another has, too, is never
    among them: training leaves out all that say a held-out caption.
    """
    from mvdream_fast.core.rng import Stream

    left, alone = Counter(e.kind for e in entries), own_captions(entries)
    chosen: set[str] = set()
    for i in Stream(0, 0, "held_out").permutation(len(entries)).tolist():
        entry = entries[i]
        stays = not entry.kind or left[entry.kind] > KIND_STAYS
        if len(chosen) < int(share * len(entries)) and stays and entry.id in alone:
            chosen.add(entry.id)
            left[entry.kind] -= 1
    return chosen


def plan(
    entries: list[Entry], surveys: dict[str, Survey], held_out: set[str], seed: int, n_plain: int, n_painted: int,
    alone: bool = False,
) -> list[AssetPlan]:  # fmt: skip
    """The orbits of every kept asset: `n_plain` in its own colours, `n_painted` in others.

    Training captions and variants that a held-out orbit carries as its caption are left out. With `alone` nothing is
    known of other assets: no word compares one with its kind, and a reader of shards leaves those captions out.
    """
    shapes = {} if alone else shape_words(entries, surveys)

    def asset(entry: Entry, split: str, taken: set[str]) -> AssetPlan:
        words = _Words(entry, surveys[entry.id], taken, shapes.get(entry.id))
        return _asset(words, split, seed, n_plain, n_painted)

    held = [asset(e, "held_out", set()) for e in entries if e.id in held_out]
    taken = set() if alone else {orbit.caption for asset in held for orbit in asset.orbits}
    train = [asset(e, "train", taken) for e in entries if e.id not in held_out]
    return [asset for asset in train if asset.orbits] + held


def shape_words(entries: list[Entry], surveys: dict[str, Survey]) -> dict[str, str]:
    """Id -> "tall", "low" or "long", for what differs much from the median of its kind."""
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.category.lower() not in SHAPELESS:
            kinds.setdefault(entry.kind or captions.head_noun(entry.noun), []).append(entry)
    out = {}
    for group in kinds.values():
        extents = np.array([surveys[e.id].extent for e in group])
        width, depth, height = np.maximum(extents, 1e-3).T
        upright = height / np.maximum(width, depth)
        long = np.maximum(width, depth) / np.minimum(width, depth)
        for entry, u, v in zip(group, upright / np.median(upright), long / np.median(long)):
            word = "tall" if u > UNLIKE else "low" if u < 1 / UNLIKE else "long" if v > UNLIKE else None
            if word and len(group) >= PEERS:
                out[entry.id] = word
    return out


def _asset(words: "_Words", split: str, seed: int, n_plain: int, n_painted: int) -> AssetPlan:
    from mvdream_fast.core.rng import Stream  # torch comes with it, and the processes that only draw need none

    entry, look = words.entry, words.look
    stream = Stream(seed, 0, f"orbits/{entry.id}")
    cameras = stream.uniform(n_plain + n_painted, 4).tolist()
    orbits = [words.orbit(tuple(c), captions.mentioned(look.colors), words.phrase) for c in cameras[:n_plain]]
    if entry.caption is None and entry.category != UNPAINTED:
        repaints = _repaints(look, stream, n_painted)
        for camera, (paint, target, colors) in zip(cameras[n_plain:], repaints):
            orbit = words.orbit(tuple(camera), colors)
            if orbit:
                orbits.append(replace(orbit, paint=paint, target=target))
    return AssetPlan(entry, split, tuple(o for o in orbits if o))


class _Words:
    """Captions of one asset; none of them is in `taken`."""

    def __init__(self, entry: Entry, look: Survey, taken: set[str], shape: str | None):
        self.entry, self.look, self.taken, self.shape = entry, look, taken, shape
        self.tags = usable_tags(entry.tags, entry.category)
        self.noun = entry.noun
        self.phrase = entry.name if entry.kind and entry.name != self.noun else None  # the source's own, with colours

    def orbit(self, camera, colors: tuple[str, ...], phrase: str | None = None) -> OrbitPlan | None:
        """An orbit in these colours; `phrase` says it better than they do where the source has one."""
        if self.entry.caption is not None:
            return OrbitPlan(camera, captions.clean(self.entry.caption) or self.noun, (), colors)
        named = captions.caption(colors, self.noun)
        full = captions.caption((), phrase) if phrase else named
        others = [named, *captions.variants(colors, self.noun, self.look.material, self.tags, self.shape)]
        if self.entry.kind and self.entry.kind not in (self.noun, ""):
            others += [captions.caption(colors, self.entry.kind), captions.caption((), self.entry.kind)]
        if full in self.taken:
            return None
        return OrbitPlan(camera, full, tuple(v for v in dict.fromkeys(others) if v not in {full, *self.taken}), colors)


Repaint = tuple[tuple[int, ...], tuple[float, ...], tuple[str, ...]]


def _repaints(look: Survey, stream: "Stream", n: int) -> list[Repaint]:
    """(parts, target, colours for the caption): every other one paints only the parts of the main colour.

    Panes of glass keep their colour, unless the asset is mostly glass.
    """
    names = list(captions.TARGETS)
    shares = captions.salient(look.colors)
    main = next(iter(shares), "")
    second = next((c for c, s in list(shares.items())[1:] if s > captions.SHARE), None)
    glassy = sum(look.part_shares[i] for i in look.glass) > 0.6
    whole = tuple(i for i in range(len(look.part_colors)) if glassy or i not in look.glass)
    main_parts = tuple(i for i in whole if look.part_colors[i] == main)
    main_share = sum(look.part_shares[i] for i in main_parts)
    order = [names[i] for i in stream.permutation(len(names)).tolist() if names[i] != main]
    jitter = stream.uniform(n, 4).numpy()
    out = []
    for k, target in enumerate(order[:n]):
        part_only = k % 2 == 1 and 0.35 < main_share < 0.9
        colors = (target, second) if part_only and second and second != target else (target,)
        out.append((main_parts if part_only else whole, _jittered(target, jitter[k]), colors))
    return out


def _jittered(name: str, u: np.ndarray) -> tuple[float, ...]:
    """The named colour a little lighter or darker; only chromatic ones also shift in hue."""
    hue = 1.0 if name in captions.DULL else 0.95 + 0.1 * u[1:]
    rgb = np.clip(np.array(captions.TARGETS[name]) * (0.9 + 0.2 * u[0]) * hue, 0, 1)
    return tuple(float(x) for x in rgb)


def choose_held_out(entries: list[Entry], surveys: dict[str, Survey], seed: int = 0, n: int = 40) -> list[Entry]:
    """About `n` assets, spread over the categories by their size, whose captions no other asset has.

    At least two assets of the same head noun and two thirds of them stay, and two with each word of the name.
    """
    from mvdream_fast.core.rng import Stream

    words = {e.id: e.noun for e in entries}
    heads = {e.id: captions.head_noun(words[e.id]) for e in entries}
    full = {e.id: captions.caption(captions.mentioned(surveys[e.id].colors), words[e.id]) for e in entries}
    left, repeats, kinds = (Counter(x) for x in (_all_words(words.values()), full.values(), heads.values()))
    quota = {c: max(1, round(n * k / len(entries))) for c, k in Counter(e.category for e in entries).items()}
    taken: Counter[str] = Counter()
    chosen: list[Entry] = []
    for i in Stream(seed, 0, "held_out").permutation(len(entries)).tolist():
        e = entries[i]
        own, head = Counter(words[e.id].split()), heads[e.id]
        stays = kinds[head] - taken[head] - 1 >= max(2, 2 * kinds[head] / 3)
        if (
            quota[e.category] > 0
            and repeats[full[e.id]] == 1
            and stays
            and all(left[w] - k >= 2 for w, k in own.items())
        ):
            chosen.append(e)
            quota[e.category] -= 1
            left -= own
            taken[head] += 1
    return sorted(chosen, key=lambda e: e.id)


def _all_words(names: Iterable[str]) -> list[str]:
    return [word for name in names for word in name.split()]
