"""T5's encoder, the text tower of DeepFloyd IF: transformers' T5Stack, block by block in float32; and its tokenizer.

The 4.7 thousand million weights of the real one are read from the memory-mapped file as they are used, and stay in the
type they are stored in.
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mvdream_fast.core.arguments import texts
from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import TextConfig
from mvdream_fast.models.text import TextEncoder
from mvdream_fast.models.tokenizer import Encoded, Tokenizer, check_prompt, words_of

if TYPE_CHECKING:
    import tokenizers

PAD, END, UNKNOWN = 0, 1, 2  # rows of every T5
_MAX_BYTES = 64 << 20  # of a vocabulary's file; T5's has 0.8 MB


def t5_settings(config: TextConfig) -> dict[str, Any]:
    """The settings of transformers' T5Config that matter to an encoder."""
    return {
        "vocab_size": config.vocabulary_size,
        "d_model": config.width,
        "d_kv": config.width // config.n_heads,
        "d_ff": config.mlp_width,
        "num_layers": config.n_layers,
        "num_heads": config.n_heads,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    }


class T5Encoder(nn.Module):
    """Token ids to the per-token states that the UNet attends to; padding is not attended to.

    Whatever the weights' type, all is computed in float32: T5 leaves float16's range, and float16 is slow on a CPU. A
    block's weights are float32 only while it runs, so the tower as a whole takes what it takes on disk.
    Source: Raffel et al. 2020, "Exploring the limits of transfer learning with a unified text-to-text transformer".
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        from transformers.models.t5.configuration_t5 import T5Config
        from transformers.models.t5.modeling_t5 import T5Stack

        self.config = config
        self.model = T5Stack(T5Config(**t5_settings(config), is_encoder_decoder=False, use_cache=False))
        for module in (*self.model.block, self.model.final_layer_norm):
            _in_float32(module)

    def forward(self, ids: Tensor) -> Tensor:
        """States after the final norm.

        Args:
            ids: token ids, int64 [B, L], padded with the model's pad_id.

        Returns:
            [B, L, width], float32.
        """
        words = self.model.embed_tokens(ids).float()
        return self.model(inputs_embeds=words, attention_mask=(ids != self.config.pad_id).long()).last_hidden_state


def _in_float32(module: nn.Module) -> None:
    """From now on the module's parameters are float32 while it runs, and what they were at all other times."""
    stored: list[Tensor] = []

    def widen(module: nn.Module, _: object) -> None:
        for parameter in module.parameters():
            stored.append(parameter.data)
            parameter.data = parameter.data.float()

    def narrow(module: nn.Module, *_: object) -> None:
        for parameter, data in zip(module.parameters(), stored):
            parameter.data = data
        stored.clear()

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow, always_call=True)


class T5Tokenizer:
    """Prompts to T5's token ids, from the files of a `tokenizer` folder; has what `Tokenizer` has for a pipeline.

    Args:
        folder: holds spiece.model, or else tokenizer.json.

    Raises:
        ModelError: if neither is there, or it is no vocabulary of the tower's.
    """

    def __init__(self, config: TextConfig, folder: Path):
        self.config, self.vocabulary, self.stand_ins = config, list[str](), dict[str, str]()
        self._pieces = _read(folder)
        rows, special = self._pieces.get_vocab_size(), [self._pieces.token_to_id(s) for s in ("<pad>", "</s>", "<unk>")]
        if rows > config.vocabulary_size or special != [PAD, END, UNKNOWN]:
            raise ModelError(
                f"{folder} must hold T5's vocabulary (<pad>, </s> and <unk> first, at most {config.vocabulary_size} "
                f"rows), got {rows} rows; fetch it from the repository of the text encoder"
            )

    def encode(self, prompts: str | Sequence[str], endings: Sequence[str] | None = None) -> Encoded:
        """Token ids [B, L] of the prompts, in lower case, each followed by the end token; see `Tokenizer.encode`."""
        prompts = texts("encode", "prompts", prompts, "a prompt is a sentence")
        ids = torch.full((len(prompts), self.config.context_length), self.config.pad_id, dtype=torch.int64)
        found = Encoded(ids, [], [], [], [])
        for row, (prompt, ending) in enumerate(zip(prompts, endings or [""] * len(prompts), strict=True)):
            tokens, cut, unknown = self._encode_one(prompt, ending)
            ids[row, : len(tokens)] = torch.tensor(tokens)
            found.lengths.append(len(tokens))
            found.cut.append(cut)
            found.unknown.append(unknown)
            found.replaced.append([])
        return found

    def _encode_one(self, prompt: str, ending: str) -> tuple[list[int], list[str], list[str]]:
        """Ids, the words that are cut, the words that are not known."""
        text, room = check_prompt(prompt + ending, allow_empty=True), self.config.room
        whole = self._split(text)
        spans = [span for i, span in zip(whole.ids, whole.offsets) if i == UNKNOWN]
        unknown = [w for w, stop in words_of(text) if any(a < stop and stop - len(w) < b for a, b in spans)]
        if len(whole.ids) <= room:
            return [*whole.ids, END], [], unknown
        tail = self._split(check_prompt(ending, allow_empty=True)).ids[:room]
        head, kept = check_prompt(prompt, allow_empty=True), room - len(tail)
        pieces = self._split(head)
        cut = [w for w, stop in words_of(head) if stop > pieces.offsets[kept][0]] if len(pieces.ids) > kept else []
        return [*pieces.ids[:kept], *tail, END], cut, unknown

    def _split(self, text: str) -> "tokenizers.Encoding":
        return self._pieces.encode(text, add_special_tokens=False)


Text = TextEncoder | T5Encoder
Words = Tokenizer | T5Tokenizer


def _read(folder: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    path = next((folder / n for n in ("spiece.model", "tokenizer.json") if (folder / n).is_file()), None)
    if path is None:
        raise ModelError(f"{folder} must hold T5's spiece.model, or its tokenizer.json; fetch it into this folder")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has over {_MAX_BYTES >> 20} MB")
        data = path.read_bytes()
        return _sentencepiece(data) if path.suffix == ".model" else tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ModelError(f"{path} is damaged or no vocabulary of T5's ({error}); fetch it again") from error


def _sentencepiece(data: bytes) -> "tokenizers.Tokenizer":
    """A unigram model of SentencePiece's, a protocol buffer: its pieces (field 1: text and score, fields 1 and 2) and
    its map of characters (field 3, there field 2).

    Source: sentencepiece_model.proto of google/sentencepiece.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pieces, charsmap = [], b""
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), *struct.unpack("<f", piece[2])))
        elif field == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    tokenizer = Tokenizer(models.Unigram(pieces, UNKNOWN, False))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    spaces = pre_tokenizers.Metaspace("▁", "always", True)  # a word's pieces begin with its space
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    return tokenizer


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a protocol buffer's message with their bytes; of whole numbers, none. Raises ValueError."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind, size = key & 7, 0
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of the kind {kind}")
        if at + size > len(data):
            raise ValueError("it is cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the last of which is under 128; and where it ends."""
    value, shift = 0, 0
    while shift < 64 and at < len(data):
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
    raise ValueError("it is cut short")
