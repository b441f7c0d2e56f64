"""T5's encoder against transformers', and its tokenizer against SentencePiece's own."""

import pytest
import sentencepiece
import torch
from reference import deepfloyd

from mvdream_fast.core.errors import ArgumentError, ModelError
from mvdream_fast.models.config import TextConfig
from mvdream_fast.models.t5 import T5Encoder, T5Tokenizer

CONFIG = TextConfig(
    kind="t5", width=deepfloyd.WIDTH, n_layers=2, n_heads=4, mlp_width=96, skip_last=0, vocabulary_size=320
)
TEXTS = [
    "A DSLR photograph of a peacock on a surfboard", "", "\ufb01ne “wide” \uff43\uff48air", "a  green\tarmchair",
    "x" * 40, "zürich 東京 a chair 🙂", "front view, side view.",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> T5Tokenizer:
    folder = tmp_path_factory.mktemp("if") / "tokenizer"
    deepfloyd.write_tokenizer(folder)
    return T5Tokenizer(CONFIG, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_states_are_transformers_in_float32_whatever_is_stored(dtype):
    theirs, ours = deepfloyd.text_encoder().to(dtype), T5Encoder(CONFIG).eval().to(dtype)
    stored = dict(theirs.encoder.state_dict())
    ours.model.load_state_dict(stored)
    ids = torch.randint(3, 300, (2, 77))
    ids[0, 9:], ids[1, 40:] = 0, 0
    states = ours(ids)
    wanted = theirs.float()(ids, attention_mask=(ids > 0).long()).last_hidden_state
    assert states.dtype == torch.float32
    torch.testing.assert_close(states, wanted, rtol=0, atol=1e-5)
    assert {p.dtype for p in ours.parameters()} == {dtype}  # also after the call
    assert all(torch.equal(x, stored[name]) for name, x in ours.model.state_dict().items())


def test_weights_are_as_stored_again_after_a_call_that_fails():
    tower = T5Encoder(CONFIG).to(torch.float16)
    with pytest.raises(IndexError):
        tower(torch.full((1, 77), 320))
    broken = tower.model.block[1].layer[0]
    broken.forward = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        tower(torch.full((1, 77), 5))
    assert {p.dtype for p in tower.parameters()} == {torch.float16}


def test_tokens_are_sentencepieces(tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_proto=deepfloyd.spiece())
    found = tokenizer.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        wanted = [*reference.encode(text.lower()), 1]
        assert found.ids[row].tolist() == wanted + [0] * (77 - len(wanted)), text
        assert found.lengths[row] == len(wanted)


def test_unknown_words_are_named(tokenizer):
    assert tokenizer.encode(TEXTS).unknown[5] == ["zürich", "東京", "🙂"]
    assert tokenizer.encode(TEXTS).unknown[0] == []


def test_of_a_long_prompt_its_own_last_words_are_cut(tokenizer):
    words = [f"chair{'s' * (i % 3)}" for i in range(60)]
    whole = tokenizer.encode(" ".join(words), [", side view"])
    end = tokenizer.encode(", side view")
    assert whole.lengths == [77]
    assert whole.ids[0, -end.lengths[0] :].tolist() == end.ids[0, : end.lengths[0]].tolist()
    n_cut = len(whole.cut[0])
    assert whole.cut[0] == words[-n_cut:]
    short = tokenizer.encode(" ".join(words[:-n_cut]) + ", side view")
    assert short.cut == [[]]
    assert short.lengths[0] <= 77


def test_what_a_person_cannot_have_meant_is_refused(tokenizer):
    with pytest.raises(ArgumentError, match="control character"):
        tokenizer.encode("a\x07chair")


def test_a_tokenizer_json_is_read_where_there_is_no_spiece(tokenizer, tmp_path):
    slow = deepfloyd.write_tokenizer(tmp_path / "other")
    slow.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert torch.equal(T5Tokenizer(CONFIG, tmp_path).encode(TEXTS).ids, tokenizer.encode(TEXTS).ids)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (None, "must hold T5's spiece.model"),
        (b"", "damaged or no vocabulary"),
        (b"version https://git-lfs", "damaged or no vocabulary"),
        (deepfloyd.spiece()[:700], "damaged or no vocabulary.*cut short"),
        (deepfloyd.spiece()[:5000] + b"\xff" * 99, "damaged or no vocabulary"),
    ],
)
def test_a_bad_vocabulary_is_named(tmp_path, data, sentence):
    if data is not None:
        (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(ModelError, match=sentence):
        T5Tokenizer(CONFIG, tmp_path)


def test_a_vocabulary_of_more_rows_than_the_tower_has(tmp_path):
    (tmp_path / "spiece.model").write_bytes(deepfloyd.spiece())
    with pytest.raises(ModelError, match="at most 10 rows"):
        T5Tokenizer(TextConfig(kind="t5", vocabulary_size=10), tmp_path)
