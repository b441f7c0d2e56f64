"""WordNet's nouns and adjectives: the senses of a word, how often each is meant, how alike two things are.

Reads its database files (index.sense, data.noun, data.adj); what is made of that is stand_ins.py's.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

NOUN, ADJECTIVE = "n", "a"
_POS = {"1": NOUN, "2": "v", "3": ADJECTIVE, "4": "r", "5": ADJECTIVE}
UNSEEN = 0.5  # times that a sense without a count is taken for
RARER = 0.8  # than the sense before it, where counts say nothing
EVEN = 0.7  # power of the counts: they are of news and novels, where many a thing is seldom named
VERBS = 0.2  # the share of verbs that are taken for them: after "a" there is none
INSTANCE_OF, IS_A, SIMILAR_TO, GROUPED = "@i", "@", "&", "taxonomic_group"


@dataclass(frozen=True)
class Synset:
    """One meaning: its words as they are written (with "_" for spaces), file number, gloss and what it points to."""

    id: str  # "n03018908"
    words: tuple[str, ...]
    file: str
    gloss: str
    above: tuple[str, ...]  # kinds that it is of
    like: tuple[str, ...]  # of adjectives: those that mean about the same
    is_instance: bool  # a city, a person by name


@dataclass(frozen=True)
class WordNet:
    """`senses`: of each word in lower case, (synset, share of its uses), all parts of speech, the likeliest first."""

    synsets: dict[str, Synset]
    senses: dict[str, list[tuple[str, float]]] = field(repr=False)

    @staticmethod
    def read(folder: Path) -> "WordNet":
        """From the folder of the database files, of version 3.0 or 3.1."""
        synsets = {s.id: s for name, p in (("noun", NOUN), ("adj", ADJECTIVE)) for s in _synsets(folder, name, p)}
        uses: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for line in (folder / "index.sense").read_text(encoding="utf-8").splitlines():
            key, offset, number, count = line.split()
            word, _, rest = key.partition("%")
            part = _POS[rest[0]]
            often = (int(count) + UNSEEN) ** EVEN * RARER ** (int(number) - 1)
            uses[word].append((part + offset, often * (1 if part in (NOUN, ADJECTIVE) else VERBS)))
        senses = {}
        for word, found in uses.items():
            total = sum(n for _, n in found)
            senses[word] = sorted(((id, n / total) for id, n in found), key=lambda pair: -pair[1])
        return WordNet(synsets, senses)

    def of(self, word: str) -> list[tuple[str, float]]:
        """The senses of a word or words, in the plural, too."""
        name = word.replace(" ", "_").replace("-", "_")
        for form in (name, name.replace("_", ""), name.removesuffix("s"), name.removesuffix("es")):
            if form in self.senses:
                return self.senses[form]
        return []

    def ancestors(self, id: str) -> frozenset[str]:
        """A meaning and all kinds that it is of, by any way."""
        if id not in self._ancestors:
            above = [self.ancestors(x) for x in self.synsets[id].above]
            self._ancestors[id] = frozenset({id}).union(*above)
        return self._ancestors[id]

    @cached_property
    def _ancestors(self) -> dict[str, frozenset[str]]:
        return {}

    @cached_property
    def content(self) -> dict[str, float]:
        """How much each noun's meaning says, 0 of "entity" to 1 of what has no kinds (Seco et al. 2004)."""
        below: dict[str, int] = defaultdict(int)
        nouns = [id for id in self.synsets if id.startswith(NOUN)]
        for id in nouns:
            for above in self.ancestors(id):
                below[above] += 1
        return {id: 1 - math.log(below[id]) / math.log(len(nouns)) for id in nouns}

    def alike(self, ids: list[str], others: list[str]) -> np.ndarray:
        """[n, m] in [0, 1]: 2 I(common kind) / (I(a) + I(b)) with the content I of the closest common kind (Lin 1998);
        1 of the same meaning."""
        content = self.content
        place = defaultdict(list)
        for k, other in enumerate(others):
            for above in self.ancestors(other):
                place[above].append(k)
        common = np.zeros((len(ids), len(others)), np.float32)
        for row, id in zip(common, ids):
            for above in self.ancestors(id):
                if at := place.get(above):
                    row[at] = np.maximum(row[at], content[above])
        a, b = (np.array([content[id] for id in some], np.float32) for some in (ids, others))
        return 2 * common / np.maximum(a[:, None] + b[None], 1e-6)


def _synsets(folder: Path, name: str, part: str) -> list[Synset]:
    """The lines of data.NAME; those that begin with a space are the licence."""
    found = []
    for line in (folder / f"data.{name}").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        head, _, gloss = line.partition(" | ")
        offset, file, _, n_words, *rest = head.split()
        n = int(n_words, 16)
        words = tuple(word.partition("(")[0] for word in rest[: 2 * n : 2])
        pointers = rest[2 * n + 1 :]  # of four fields each: its sign, where it leads, two more
        to = list(zip(pointers[::4], pointers[1::4]))
        above, like = (tuple(part + at for sign, at in to if sign == wanted) for wanted in (IS_A, SIMILAR_TO))
        is_instance = any(sign == INSTANCE_OF for sign, _ in to)
        found.append(Synset(part + offset, words, file, _first_part(gloss), above, like, is_instance))
    return found


def _first_part(gloss: str) -> str:
    """Without its examples."""
    return gloss.partition('; "')[0].strip()
