"""CLIP's byte-pair tokenizer from the table shipped with this package, and the check of what a user typed as a prompt.

Runs without torch until `encode` returns ids, so that a wrong prompt is refused at once. The text tower is in text.py.
"""

import gzip
import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mvdream_fast.core.arguments import texts
from mvdream_fast.core.errors import ArgumentError, ModelError
from mvdream_fast.models.config import TextConfig

if TYPE_CHECKING:
    import tokenizers
    import torch

MAX_PROMPT_BYTES = 8192
CLIP_ROWS = 49408
PAD, START, END, UNKNOWN = "<pad>", "<start_of_text>", "<end_of_text>", "<unknown>"
SPECIAL_ROWS = (PAD, START, END, UNKNOWN)  # the first rows of a subset vocabulary, in this order

_TABLE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
_N_MERGES = 48894  # CLIP uses only the head of the table
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_ROW = "<word:{}>"  # an added word's line; no merge of CLIP crosses from punctuation to letters, so none looks so

_PLURALS = (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("men", "man"))


@dataclass(frozen=True)
class Encoded:
    """Token ids of some prompts, and what of each prompt the model will not see."""

    ids: "torch.Tensor"  # [B, L] int64: start, tokens, end, then padding with the model's pad_id
    lengths: list[int]  # ids of each prompt before the padding
    cut: list[list[str]]  # words that do not fit, wholly or in part
    unknown: list[list[str]]  # words outside a subset vocabulary; each became one "unknown" row
    replaced: list[list[tuple[str, str]]]  # words that were not trained on, and what the model reads instead


class _Split(NamedTuple):
    """A text as rows, with the place of each in the text; and its words as in `Encoded`."""

    rows: list[int]
    spans: list[tuple[int, int]]
    unknown: list[str]
    replaced: list[tuple[str, str]]


class Tokenizer:
    """Prompts to token ids, the same as open_clip's for the `clip` vocabulary.

    Args:
        config: of the text tower; its `vocabulary_size` must be the number of rows that the vocabulary makes.
        vocabulary: the lines of `vocabulary.txt`. A subset lists every row (see `build_subset_vocabulary`); `clip`
            needs none, or the added words alone.
        stand_ins: for words that a subset's model was not trained on, those that it reads in their place: "couch":
            "sofa". Some words together may have one, "_" between them: "grandfather_clock": "clock". The plural of
            such a word has the same one, unless the model knows it.

    Raises:
        ModelError: if the vocabulary is missing, has rows that CLIP's table has not, or another number of rows; if a
            stand-in is unknown itself.
    """

    def __init__(
        self, config: TextConfig, vocabulary: Sequence[str] | None = None, stand_ins: Mapping[str, str] | None = None
    ):
        self.config = config
        self.vocabulary = list(vocabulary or ())
        self.stand_ins = dict(stand_ins or {})
        self._most_words = max((word.count("_") + 1 for word in self.stand_ins), default=1)
        self._subset = config.vocabulary == "subset"
        words = [line[6:-1] for line in self.vocabulary if _is_word_row(line)]
        self._bpe = _bpe(tuple(words))
        self._rows = self._subset_rows() if self._subset else {}
        n_rows = len(self.vocabulary) if self._subset else CLIP_ROWS + len(self.vocabulary)
        if n_rows != config.vocabulary_size:
            raise ModelError(
                f"the vocabulary has {n_rows} rows, but the configuration says {config.vocabulary_size}; "
                "vocabulary.txt and config.json must come from the same model"
            )
        for stand_in in dict.fromkeys(self.stand_ins.values()):
            if not self._subset or self._rows_of(stand_in) is None:
                raise ModelError(f"the stand-in {stand_in!r} must be a word of the model's; leave its lines out")

    def _subset_rows(self) -> dict[int, int]:
        """CLIP's id of every row, for the rows that stand for CLIP tokens or added words."""
        if tuple(self.vocabulary[: len(SPECIAL_ROWS)]) != SPECIAL_ROWS:
            raise ModelError(f"a subset vocabulary must begin with the lines {', '.join(SPECIAL_ROWS)}")
        rows: dict[int, int] = {}
        for row, line in enumerate(self.vocabulary[3:], start=3):
            token = line[6:-1] if _is_word_row(line) else line
            clip_id = None if line == UNKNOWN else self._bpe.token_to_id(token)
            if clip_id in rows or (clip_id is None and line != UNKNOWN):
                raise ModelError(f"vocabulary line {row + 1}, {line!r}, must be a token of CLIP's table, listed once")
            if clip_id is not None:
                rows[clip_id] = row
        return rows

    def encode(self, prompts: str | Sequence[str], endings: Sequence[str] | None = None) -> Encoded:
        """Token ids [B, L] of the prompts, with the words that do not fit and those that are unknown.

        An empty string is allowed here, as the unconditional prompt; `check_prompt` refuses it from a user.

        Args:
            endings: what follows each prompt and is never cut: of a text that is too long, the prompt's own last words
                are.

        Raises:
            ArgumentError: if a prompt has control characters or more than 8 KB.
        """
        import torch

        prompts = texts("encode", "prompts", prompts, "a prompt is a sentence")
        ids = torch.full((len(prompts), self.config.context_length), self.config.pad_id, dtype=torch.int64)
        found = Encoded(ids, [], [], [], [])
        for row, (prompt, ending) in enumerate(zip(prompts, endings or [""] * len(prompts), strict=True)):
            tokens, cut, words = self._encode_one(prompt, ending)
            ids[row, : len(tokens)] = torch.tensor(tokens)
            found.lengths.append(len(tokens))
            found.cut.append(cut)
            found.unknown.append(words.unknown)
            found.replaced.append(words.replaced)
        return found

    def _encode_one(self, prompt: str, ending: str) -> tuple[list[int], list[str], _Split]:
        room = self.config.room
        start, end = (1, 2) if self._subset else (CLIP_ROWS - 2, CLIP_ROWS - 1)
        whole = self._split(check_prompt(prompt + ending, allow_empty=True))
        if len(whole.rows) <= room:
            return [start, *whole.rows, end], [], whole
        tail = self._split(check_prompt(ending, allow_empty=True)).rows[:room]
        text = check_prompt(prompt, allow_empty=True)
        head, kept = self._split(text), room - len(tail)
        cut = [word for word, stop in words_of(text) if stop > head.spans[kept][0]] if len(head.rows) > kept else []
        return [start, *head.rows[:kept], *tail, end], cut, whole

    def _split(self, text: str) -> _Split:
        """A clean text as rows."""
        encoding = self._bpe.encode(text, add_special_tokens=False)
        return self._to_subset(text, encoding) if self._subset else _Split(encoding.ids, encoding.offsets, [], [])

    def _to_subset(self, text: str, encoding: "tokenizers.Encoding") -> _Split:
        """Rows of the subset: of the stand-in of a word, or of some words together, where there is one; else, with any
        token outside of it, a piece of text becomes one unknown row."""
        split, offsets, pieces = _Split([], [], [], []), encoding.offsets, _pieces(encoding)
        at = 0
        while at < len(pieces):
            texts = [text[offsets[i][0] : offsets[j - 1][1]] for i, j in pieces[at : at + self._most_words]]
            rows = self._known_rows(encoding.ids[slice(*pieces[at])])
            n, stand_in = self._stand_in(texts, rows is not None)
            begin, end = pieces[at][0], pieces[at + n - 1][1]
            span = (offsets[begin][0], offsets[end - 1][1])
            if stand_in is not None:
                rows = self._rows_of(stand_in)
                split.replaced.append((text[slice(*span)], stand_in))
            elif rows is None:
                split.unknown.append(texts[0])
            rows = rows or [SPECIAL_ROWS.index(UNKNOWN)]
            split.rows.extend(rows)
            split.spans.extend([span] * len(rows))
            at += n
        unknown, replaced = dict.fromkeys(split.unknown), dict.fromkeys(split.replaced)
        return split._replace(unknown=list(unknown), replaced=list(replaced))

    def _stand_in(self, texts: list[str], is_known: bool) -> tuple[int, str | None]:
        """How many of the coming pieces of text are read as one thing, and what stands in for it, if anything does.

        Args: is_known: whether the first one can be read by itself; its singular is not looked for then.
        """
        for n in range(len(texts), 0, -1):
            before = "_".join([*texts[: n - 1], ""])
            forms = texts[n - 1 : n] if n == 1 and is_known else singulars(texts[n - 1])
            for form in forms:
                if (stand_in := self.stand_ins.get(before + form)) is not None:
                    return n, stand_in
        return 1, None

    def _rows_of(self, words: str) -> list[int] | None:
        """The rows of known words; None where one is unknown."""
        return self._known_rows(self._bpe.encode(words, add_special_tokens=False).ids) or None

    def _known_rows(self, ids: list[int]) -> list[int] | None:
        """The subset's rows of CLIP's tokens; None where one of them has none."""
        rows = [self._rows[i] for i in ids if i in self._rows]
        return rows if len(rows) == len(ids) else None

    def with_token(self, word: str) -> "Tokenizer":
        """A tokenizer with one more row at the end, for a word that is a token by itself (DreamBooth's instance).

        The text tower needs the same row: `TextEncoder.with_token`.

        Raises:
            ArgumentError: if the word is empty, has white space, or is a row already.
        """
        clean = check_prompt(word)
        if len(clean.split()) != 1 or _WORD_ROW.format(clean) in self.vocabulary or clean in SPECIAL_ROWS:
            raise ArgumentError(f"the new token must be one word that was not added before, got {word!r}")
        config = replace(self.config, vocabulary_size=self.config.vocabulary_size + 1)
        stand_ins = {word: other for word, other in self.stand_ins.items() if word != clean}
        return Tokenizer(config, [*self.vocabulary, _WORD_ROW.format(clean)], stand_ins)


def check_prompt(prompt: str, allow_empty: bool = False) -> str:
    """The prompt as the tokenizer reads it: entities and typographic variants resolved, lower case, single spaces.

    Raises:
        ArgumentError: if there is nothing in it (unless allowed), it holds control characters, or is over 8 KB.
    """
    if not isinstance(prompt, str):
        raise ArgumentError(f"a prompt must be text, got {type(prompt).__name__}")
    size = len(prompt.encode("utf-8", "surrogatepass"))
    if size > MAX_PROMPT_BYTES:
        raise ArgumentError(f"the prompt must be at most {MAX_PROMPT_BYTES} bytes long, got {size}; shorten it")
    text = _clean(prompt)
    for stage in (prompt, text):
        at = next((i for i, c in enumerate(stage) if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r"), -1)
        if at >= 0:
            raise ArgumentError(f"the prompt holds the control character U+{ord(stage[at]):04X} at place {at + 1}")
    if not text and not allow_empty:
        raise ArgumentError('the prompt is empty; describe an object, for example "a brown bulldog"')
    return text


def build_subset_vocabulary(captions: Iterable[str]) -> list[str]:
    """The lines of a subset `vocabulary.txt`: the special rows, then the captions' tokens in CLIP's order."""
    bpe = _bpe(())
    ids = {i for caption in captions for i in bpe.encode(check_prompt(caption, allow_empty=True)).ids}
    tokens = (bpe.id_to_token(i) for i in sorted(ids) if i < CLIP_ROWS - 2)
    return [*SPECIAL_ROWS, *(token for token in tokens if token is not None)]


def n_tokens(word: str) -> int:
    """Of CLIP's table that a word is split into: the fewer, the more common it is."""
    return len(_bpe(()).encode(word, add_special_tokens=False).ids)


def _is_word_row(line: str) -> bool:
    return line.startswith("<word:") and line.endswith(">") and len(line) > 7


def _pieces(encoding: "tokenizers.Encoding") -> list[tuple[int, int]]:
    """Token ranges of the pieces that CLIP's pattern splits a text into (words, digits, runs of punctuation)."""
    words = encoding.word_ids
    starts = [i for i, word in enumerate(words) if i == 0 or word is None or word != words[i - 1]]
    return list(zip(starts, [*starts[1:], len(words)]))


def singulars(word: str) -> list[str]:
    """A word, and what it is the plural of if it is one: "knives", "knive", "kniv", "knif", "knife"."""
    forms = [word[: -len(end)] + one for end, one in _PLURALS if word.endswith(end)]
    return [word, *(form for form in forms if len(form) > 1)]


def words_of(text: str) -> list[tuple[str, int]]:
    """The words of a single-spaced text, each with the place where it ends."""
    words, end = text.split(), -1
    return [(word, end := end + 1 + len(word)) for word in words]


def _clean(text: str) -> str:
    """What open_clip does to a text before splitting it.

    It calls ftfy first; of that, everything is done here except the repair of wrongly decoded text ("sÃ³").
    """
    for _ in range(8):  # ftfy repeats its fixes until nothing changes
        # A text with tags is taken for HTML source, and its entities are left to the last step.
        fixed = text if "<" in text else html.unescape(text)
        fixed = unicodedata.normalize("NFC", fixed.translate(_typography()).translate(_CURLY))
        if fixed == text:
            break
        text = fixed
    text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


_CURLY = {**dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'"), **dict.fromkeys(range(0x201C, 0x2020), '"')}


@lru_cache
def _typography() -> dict[int, str]:
    """Ligatures and full- or half-width forms as plain letters; marks that show nothing are dropped."""
    ligatures = [*range(0xFB00, 0xFB07), 0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4)]
    widths = [0x3000, *range(0xFF01, 0xFFF0)]
    table = {c: unicodedata.normalize("NFKC", chr(c)) for c in ligatures + widths}
    table[0xFB05] = "\u017ft"
    return table | dict.fromkeys([0xFEFF, *range(0x206A, 0x2070), *range(0xFFF9, 0xFFFD)], "")


@lru_cache
def _merges() -> list[tuple[str, str]]:
    lines = gzip.decompress(_TABLE.read_bytes()).decode("utf-8").split("\n")
    pairs = (line.split() for line in lines[1 : _N_MERGES + 1])
    return [(first, second) for first, second in pairs]


@lru_cache(maxsize=4)
def _bpe(words: tuple[str, ...]) -> "tokenizers.Tokenizer":
    """CLIP's byte-pair encoder with added words; ids 49408 and up are the words, in order."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    # Bytes in the order of CLIP's table: those that print as themselves, then the rest as U+0100 and up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = _merges()
    rows = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), START, END]
    vocab = {token: i for i, token in enumerate(rows)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, single_word=False, normalized=False) for t in (START, END)])
    tokenizer.add_tokens([AddedToken(w, single_word=True, normalized=False) for w in words])
    return tokenizer
