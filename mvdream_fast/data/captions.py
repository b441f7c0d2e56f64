"""Words for assets: colours named from base colours, tidy nouns, articles and plurals, and the variants of a caption.

Pure functions on strings and small arrays; which caption belongs to which render is decided in rendering/plan.py, and
what else a thing may be called in synonyms.py.
"""

import re
import unicodedata

import numpy as np

from mvdream_fast.data.synonyms import NUMBERS, PLAIN, synonyms

# What recolouring paints with (sRGB); the same words that color_names finds.
TARGETS = {
    "red": (0.80, 0.09, 0.10),
    "green": (0.14, 0.58, 0.20),
    "blue": (0.12, 0.27, 0.80),
    "yellow": (0.95, 0.83, 0.12),
    "orange": (0.96, 0.50, 0.07),
    "purple": (0.50, 0.18, 0.65),
    "pink": (0.96, 0.55, 0.72),
    "brown": (0.40, 0.235, 0.125),
    "black": (0.10, 0.10, 0.11),
    "white": (0.96, 0.96, 0.95),
    "gray": (0.52, 0.52, 0.53),
}
NAMES = (*TARGETS, "beige")
DULL, DULL_WEIGHT = ("black", "white", "gray"), 0.6
MAX_LENGTH = 300  # of a caption; CLIP's text tower reads 75 tokens
SHARE = 0.22  # a colour with less of the visible surface is not mentioned


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MASS = _words(
    "bread butter milk sugar bamboo tape soap sand grass asparagus broccoli lettuce corn rice cheese meat bacon "
    "celery garlic wheat water snow ice lava gravel hay straw rubble paper ivy moss seaweed seagrass kelp furniture "
    "clothing armor jewelry luggage popcorn sushi toast ham tofu spaghetti stew soup honey chocolate gold coal dirt "
    "coffee tea juice barracks debris"
)
_SINGULAR = {"lens", "canvas", "atlas", "gas", "chess", "series", "tennis"}
_COLOR = (
    "(?:(?:light|dark|bright|pale|deep|olive) )?(?:red|green|blue|yellow|orange|purple|pink|brown|black|white|gray|grey"
    "|beige|golden|gold|silver|cyan|teal|turquoise|violet|(?:light|dark)(?= (?:wood|stone|metal|card|leather)))"
)
# Colours before what they are said of; "an orange with leaves" is none.
_COLORS = re.compile(rf"\b{_COLOR}(?:(?:,| and|, and)? {_COLOR})*(?: and)? (?!(?:and|with|on|in|of|for)\b)(?=\w)")
_WEARS = re.compile(rf"(?: in| of)? {_COLOR}$")  # "a rogue in green", "a chest of gold"
_NO_COLORS = re.compile(
    r"\b(orange (?:juice|slice|tree)|red (?:panda|snapper|cabbage|onion|wine)|white (?:wine|board)|black hole"
    r"|green (?:onion|bean|pepper)|blue whale|brown bear|gold (?:bars?|coins?|ingots?))\b"
)
_AN = re.compile(r"^(?:[aeio]|mp3|u(?!ni|ri|te|su|ro)|suv|led)", re.IGNORECASE)
_A = re.compile(r"^(?:one|eu)", re.IGNORECASE)
MATERIALS = (
    ("glass", "glass"), ("leather", "leather"), ("wood", "wooden"), ("oak", "wooden"), ("teak", "wooden"),
    ("metal", "metal"), ("steel", "metal"), ("chrome", "metal"), ("alumin", "metal"), ("plastic", "plastic"),
    ("stone", "stone"), ("concrete", "concrete"), ("fabric", "fabric"), ("rattan", "rattan"),
)  # fmt: skip


def clean(text: str, limit: int = MAX_LENGTH) -> str:
    """A caption fit to print and to store: no control or invisible characters, single spaces, at most `limit` long."""
    text = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in str(text))
    return re.sub(r" +", " ", text).strip()[:limit].strip()


def noun(name: str) -> str:
    """A file's name as a caption says it: its own words in lower case, without the numbers that copies end with."""
    return re.sub(r"(?:^|\s+)[\d\s]+$", "", clean(name).lower()) or "object"


def head_noun(phrase: str) -> str:
    """The word that says what it is: "chair with cushion" -> "chair", "wooden bench" -> "bench"."""
    head = re.split(r" (?:with|on|of|and|under|for|holding|lying|in|at) ", phrase)[0]
    return head.split()[-1] if head.split() else phrase


def without_colors(phrase: str) -> str:
    """ "a white house with a red roof" is "house with a roof" no more when it is painted blue: "house".

    Colours before a word go, and whole additions ("with a red roof", "in a black suit") that name one.
    """
    held = _NO_COLORS.sub(lambda m: m[0].replace(" ", "_"), phrase)
    first, *more = re.split(r"(?= (?:with|in|on) )", held)
    kept = [_COLORS.sub("", first), *(part for part in more if not (_COLORS.search(part) or _WEARS.search(part)))]
    return "".join(kept).replace("_", " ") or phrase


def is_countable(phrase: str) -> bool:
    """Whether a name takes an article: not "tulips", not "bread"; but "bus", "glass" and "cactus" do."""
    word = head_noun(phrase)
    plural = word.endswith("s") and not word.endswith(("ss", "us", "is")) and word not in _SINGULAR
    return not plural and word not in _MASS and phrase.split()[0] not in NUMBERS


def with_article(phrase: str, countable: bool = True) -> str:
    """ "a chair", "an armchair"; the phrase itself where it is not countable."""
    if not countable:
        return phrase
    return f"{'an' if _AN.match(phrase) and not _A.match(phrase) else 'a'} {phrase}"


def caption(colors: tuple[str, ...], name: str, material: str | None = None) -> str:
    """ "a blue and white wooden chair", "a small blue chair"; what the name says already is not said twice."""
    words = name.split()
    n_first = next((k for k, word in enumerate(words[:-1]) if word not in PLAIN | NUMBERS), len(words) - 1)
    said = " and ".join(c for c in colors[:2] if c not in words)
    stuff = material if material and material not in words and material.rstrip("en") not in words else None
    parts = (*words[: max(n_first, 0)], said, stuff, *words[max(n_first, 0) :])
    return with_article(" ".join(part for part in parts if part), is_countable(name))


def variants(
    colors: tuple[str, ...], name: str, material: str | None, tags: tuple[str, ...], shape: str | None = None
) -> list[str]:
    """Other true captions of the same render, without repeats.

    The name alone, one colour, material, `shape` ("tall"), category or tag, and other names with and without colours.
    """
    full = caption(colors, name)
    options = [
        caption((), name),
        caption(colors[:1], name),
        caption(colors, name, material),
        caption((), name, material),
    ]
    if shape and not PLAIN & set(name.split()):
        options += [caption(colors, f"{shape} {name}"), caption((), f"{shape} {name}")]
    options += [f"{full}, {tag}" for tag in tags if tag not in name]
    for other in synonyms(name):
        options += [caption(colors, other), caption((), other)]
    return [text for text in dict.fromkeys(options) if text != full]


def material_word(names_and_shares: list[tuple[str, float]]) -> str | None:
    """The material that the parts' names agree on for more than half of the visible surface, or None."""
    totals: dict[str, float] = {}
    for name, share in names_and_shares:
        word = next((word for key, word in MATERIALS if key in name.lower()), None)
        if word:
            totals[word] = totals.get(word, 0) + share
    best = max(totals, key=lambda word: totals[word], default=None)
    return best if best and totals[best] > 0.5 else None


def color_names(rgb: np.ndarray) -> np.ndarray:
    """Index into NAMES for each sRGB colour in [0, 1]: [K, 3] -> [K] int64, by regions of HSV."""
    rgb = np.asarray(rgb, np.float32).reshape(-1, 3)
    value, low = rgb.max(1), rgb.min(1)
    chroma = value - low
    saturation = chroma / np.maximum(value, 1e-6)
    hue = _hue(rgb, value, chroma)
    names = np.select(
        [
            value < 0.19,
            (saturation < 0.13) | (chroma < 0.055),
            (hue < 14) | (hue >= 345),
            hue < 47,
            hue < 68,
            hue < 170,
            hue < 258,
            hue < 300,
        ],
        [
            "black",
            np.where(value > 0.74, "white", np.where(value < 0.25, "black", "gray")),
            np.where((value > 0.75) & (saturation < 0.55), "pink", np.where(saturation < 0.5, "brown", "red")),
            _warm(value, saturation),
            np.where(
                saturation < 0.35, np.where(value > 0.6, "beige", "gray"), np.where(value < 0.5, "green", "yellow")
            ),
            "green",
            "blue",
            "purple",
        ],
        np.where(value > 0.6, "pink", "purple"),
    )
    lookup = {name: i for i, name in enumerate(NAMES)}
    return np.array([lookup[str(n)] for n in names], np.int64)


def _hue(rgb: np.ndarray, value: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    r, g, b = rgb.T
    d = np.maximum(chroma, 1e-6)
    sector = np.where(value == r, (g - b) / d % 6, np.where(value == g, (b - r) / d + 2, (r - g) / d + 4))
    return sector * 60


def _warm(value: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """Hues 14 to 47 degrees: wood, skin, cream and orange differ by lightness and saturation only."""
    light = np.where(saturation > 0.72, "orange", np.where(saturation < 0.42, "beige", "brown"))
    return np.where(value > 0.72, light, np.where((saturation < 0.2) & (value > 0.5), "gray", "brown"))


def shares(rgb: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """Colour name -> share of the given colours [K, 3] (weights [K]), largest first."""
    counts = np.bincount(color_names(rgb), weights, len(NAMES))
    total = max(float(counts.sum()), 1e-9)
    order = np.argsort(-counts, kind="stable")
    return {NAMES[i]: float(counts[i] / total) for i in order if counts[i] > 0}


def salient(table: dict[str, float]) -> dict[str, float]:
    """Shares as people weigh them: a yellow scooter with gray and black parts is yellow; sums to 1, largest first."""
    weighted = {name: share * (DULL_WEIGHT if name in DULL else 1.0) for name, share in table.items()}
    total = max(sum(weighted.values()), 1e-9)
    return {name: weighted[name] / total for name in sorted(weighted, key=lambda n: -weighted[n])}


def mentioned(table: dict[str, float]) -> tuple[str, ...]:
    """The at most two colours that a caption says: those above SHARE, or the first where none is."""
    weighted = salient(table)
    above = tuple(name for name, share in weighted.items() if share > SHARE)[:2]
    return above or tuple(weighted)[:1]
