"""Token ids against open_clip's SimpleTokenizer (recorded with 3.3.0 and ftfy 6.3.1), and what a prompt may be."""

import dataclasses
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvdream_fast.core.errors import ArgumentError, ModelError
from mvdream_fast.models.config import SD15, SD21, TextConfig
from mvdream_fast.models.tokenizer import Tokenizer, build_subset_vocabulary, check_prompt

START, END = 49406, 49407
# Prompt -> ids between start and end.
GOLDEN = [
    ("", []),
    ("a brown bulldog", [320, 2866, 15611]),
    ("a brown bulldog, 3d asset", [320, 2866, 15611, 267, 274, 323, 13039]),
    ("A Brown BULLDOG, 3D Asset", [320, 2866, 15611, 267, 274, 323, 13039]),
    ("an astronaut riding a horse", [550, 18376, 6765, 320, 4558]),
    ("Corgi riding a rocket, highly detailed, 8k", [31320, 6765, 320, 8383, 267, 5302, 12609, 267, 279, 330]),
    ("it's a cat's toy", [585, 568, 320, 2368, 568, 5988]),
    ("don't we've I'm they'll he'd you're", [847, 713, 649, 1200, 328, 880, 889, 1342, 797, 1896, 592, 982]),
    ("'tis the queen's 'S", [713, 533, 518, 2997, 568, 568]),
    ("Tom &amp; Jerry &lt;3", [2435, 261, 9164, 283, 274]),
    ("&copy; &rsquo; &amp;rsquo; &eacute;", [5811, 262, 262, 4166]),
    ("&#x1F600; &#65;", [7334, 320]),
    ("<b>bold</b> &amp; brave", [283, 321, 285, 8911, 34308, 321, 285, 261, 7769]),
    ("caf\xe9 cre\u0301me", [15304, 1075, 3459, 614]),
    ("\u201cquoted\u201d \u2018text\u2019 it\u2019s", [257, 27706, 257, 713, 20072, 262, 585, 568]),
    ("\ufb01sh \ufb02ower", [2759, 4055]),
    ("\uff21\uff22\uff23\u3000wide", [5334, 3184]),
    ("\U0001f984 unicorn", [37659, 15660]),
    ("\U0001f468\u200d\U0001f469\u200d\U0001f467 family \U0001f44d\U0001f3fd", [25023, 26304, 964, 356, 1315, 43722]),
    ("\u65e5\u672c\u306e\u57ce", [39121, 44353, 21575, 161, 253, 492]),
    ("\ud55c\uad6d\uc5b4 \uc778\ud615", [15197, 250, 31871, 255, 31625, 368, 8276, 116, 15962, 499]),
    (
        "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
        [26302, 16370, 29503, 110, 22176, 141, 480, 267, 38018, 16701, 141, 478, 256],
    ),
    ("\u0645\u0631\u062d\u0628\u0627", [12986, 10948, 25722, 16378, 22625]),
    ("\u0939\u093f\u0928\u094d\u0926\u0940", [29446, 26721, 26090, 19389, 29552, 25751]),
    ("stra\xdfe \xdcn\xefc\xf6d\xe9", [1894, 127, 253, 324, 6522, 77, 35689, 66, 7255, 67, 4166]),
    ("\u0130stanbul", [328, 16384, 11231]),
    (
        "\u039f\u0394\u03a5\u03a3\u03a3\u0395\u03a5\u03a3",
        [138, 123, 138, 112, 139, 227, 139, 225, 139, 225, 138, 113, 139, 227, 139, 480],
    ),
    ("1234 5th 3.14", [272, 273, 274, 275, 276, 640, 274, 269, 272, 275]),
    ("a-b_c/d\\e", [320, 268, 321, 318, 322, 270, 323, 315, 324]),
    ("wait!!! ...what??", [1885, 995, 678, 768, 2197]),
    ("<start_of_text> x <end_of_text>", [49406, 343, 49407]),
    ("a\tb\n c  d\r\ne", [320, 321, 322, 323, 324]),
    ("#hashtag @user $5 100%", [258, 9238, 287, 7031, 259, 276, 272, 271, 271, 260]),
    ("\u0149 \u0132 \u01c4", [262, 333, 72, 329, 67, 129, 378]),
    ("\xb2\xb3\xbd \u2460", [41175, 126, 367, 33613, 158, 239, 510]),
    ("zero\u200bwidth no\xa0break", [5848, 9844, 23571, 871, 2568]),
    ("\ufeffmarked", [12360]),
    ("\u2026ellipsis\u2014dash\u2013en", [959, 3367, 33041, 2005, 10206, 1224, 576]),
    ("\xa9 \xae \u2122", [5811, 8436, 11675]),
    ("C++ C# .NET e.g.", [322, 19056, 322, 258, 269, 2315, 324, 269, 326, 269]),
    ("supercalifragilisticexpialidocious", [1642, 2857, 13093, 2076, 5868, 26850, 835, 639, 38466]),
    ("DSLR photo of a ghost eating a hamburger", [33740, 1125, 539, 320, 7108, 4371, 320, 33928]),
    ("Zeppelin XIV, 1937", [25408, 16125, 267, 272, 280, 274, 278]),
    ("e=mc^2; f(x)=[1,2]", [324, 284, 4126, 317, 273, 282, 325, 263, 343, 8, 28, 314, 272, 267, 273, 316]),
]
CAPTIONS = ["a red armchair", "a blue bulldog, 3d asset", "tulips in a pot", "the bulldog's tulip"]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer(SD21.text)


def subset(context_length: int = 24) -> Tokenizer:
    vocabulary = build_subset_vocabulary(CAPTIONS)
    config = TextConfig(vocabulary="subset", vocabulary_size=len(vocabulary), context_length=context_length)
    return Tokenizer(config, vocabulary)


@pytest.mark.parametrize(("prompt", "ids"), GOLDEN)
def test_ids_equal_open_clip(clip, prompt, ids):
    encoded = clip.encode(prompt)
    expected = torch.zeros(1, 77, dtype=torch.int64)
    expected[0, : len(ids) + 2] = torch.tensor([START, *ids, END])
    assert torch.equal(encoded.ids, expected)
    assert encoded.cut == [[]]
    assert encoded.unknown == [[]]


def test_overlong_prompt_names_the_words_that_are_cut(clip):
    fits = "one two three " * 25  # 75 tokens
    encoded = clip.encode([fits, fits + "and a bulldog", "x " * 74 + "supercalifragilisticexpialidocious end"])
    assert encoded.cut == [[], ["and", "a", "bulldog"], ["supercalifragilisticexpialidocious", "end"]]
    assert encoded.ids[:, 0].tolist() == [START] * 3
    assert encoded.ids[:, 76].tolist() == [END] * 3
    assert torch.equal(encoded.ids[0], encoded.ids[1])


def test_batch_is_row_by_row(clip):
    prompts = [prompt for prompt, _ in GOLDEN]
    together = clip.encode(prompts).ids
    assert torch.equal(together, torch.cat([clip.encode(prompt).ids for prompt in prompts]))


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "empty"),
        (" \t\n", "empty"),
        ("&nbsp;", "empty"),
        ("a\x07b", r"U\+0007 at place 2"),
        ("a\x00", r"U\+0000"),
        ("\x1b[31mred", r"U\+001B"),
        ("a\x85b", r"U\+0085"),
        ("\ud800", r"U\+D800"),
        ("x" * 8193, "at most 8192 bytes long, got 8193"),
        ("日" * 2731, "got 8193"),
        (7, "must be text, got int"),
    ],
)
def test_refused_prompts(prompt, sentence):
    with pytest.raises(ArgumentError, match=sentence) as info:
        check_prompt(prompt)
    assert info.value.exit_code == 2


def test_encode_refuses_control_characters_but_takes_the_empty_prompt(clip):
    with pytest.raises(ArgumentError, match="control character"):
        clip.encode(["fine", "a\x07"])
    assert clip.encode("").ids[0, :3].tolist() == [START, END, 0]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_encoded_or_refused(prompt):
    tokenizer = Tokenizer(SD21.text)
    try:
        encoded = tokenizer.encode(prompt)
    except ArgumentError:
        return
    row = encoded.ids[0].tolist()
    assert row[0] == START
    end = row.index(END)
    assert set(row[end + 1 :]) <= {0}
    assert bool(encoded.cut[0]) <= (end == 76)
    assert set(encoded.cut[0]) <= set(check_prompt(prompt, allow_empty=True).split())


def test_checking_a_prompt_imports_no_torch():
    import subprocess

    code = "import sys, mvdream_fast.models.tokenizer as t; t.check_prompt('x'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_subset_vocabulary_keeps_only_rows_of_the_captions():
    lines = build_subset_vocabulary(CAPTIONS)
    assert lines[:4] == ["<pad>", "<start_of_text>", "<end_of_text>", "<unknown>"]
    assert set(lines[4:]) == {
        *("a</w>", "red</w>", "armchair</w>", "blue</w>", "bulldog</w>", ",</w>", "3</w>", "d</w>", "asset</w>"),
        *("tulips</w>", "in</w>", "pot</w>", "the</w>", "'s</w>", "tulip</w>"),
    }
    assert lines == build_subset_vocabulary(reversed(CAPTIONS))


def test_subset_rows_and_unknown_words(clip):
    tokenizer = subset()
    encoded = tokenizer.encode(["a red bulldog", "a zeppelin in a flibbertigibbet's pot, zeppelin", ""])
    row = {line: i for i, line in enumerate(tokenizer.vocabulary)}
    known = [1, row["a</w>"], row["red</w>"], row["bulldog</w>"], 2]
    assert encoded.ids[0].tolist() == known + [0] * 19
    # A word of many tokens becomes one unknown row.
    expected = ["a</w>", "<unknown>", "in</w>", "a</w>", "<unknown>", "'s</w>", "pot</w>", ",</w>", "<unknown>"]
    assert encoded.ids[1].tolist() == [1, *(row[line] for line in expected), 2] + [0] * 13
    assert encoded.ids[2].tolist() == [1, 2] + [0] * 22
    assert encoded.unknown == [[], ["zeppelin", "flibbertigibbet"], []]


def test_words_that_were_not_trained_on_are_read_as_their_stand_ins():
    plain = subset()
    tokenizer = Tokenizer(plain.config, plain.vocabulary, {"settee": "red armchair", "dog": "bulldog"})
    encoded = tokenizer.encode(["two Settees and a dog, a settee", "a zeppelin", "a red dog's pot"])
    row = {line: i for i, line in enumerate(tokenizer.vocabulary)}
    chair = ["red</w>", "armchair</w>"]
    expected = ["<unknown>", *chair, "<unknown>", "a</w>", "bulldog</w>", ",</w>", "a</w>", *chair]
    assert encoded.ids[0].tolist() == [1, *(row[line] for line in expected), 2] + [0] * 12
    assert encoded.replaced == [
        [("settees", "red armchair"), ("dog", "bulldog"), ("settee", "red armchair")], [], [("dog", "bulldog")]
    ]  # fmt: skip
    assert encoded.unknown == [["two", "and"], ["zeppelin"], []]
    assert torch.equal(encoded.ids[2], plain.encode("a red bulldog's pot").ids[0])


def test_a_plural_that_is_known_needs_no_stand_in():
    config = dataclasses.replace(subset().config, vocabulary_size=len(build_subset_vocabulary(["old roses"])))
    tokenizer = Tokenizer(config, build_subset_vocabulary(["old roses"]), {"rose": "old"})
    encoded = tokenizer.encode(["old roses", "old rose"])
    assert encoded.replaced == [[], [("rose", "old")]]
    row = {line: i for i, line in enumerate(tokenizer.vocabulary)}
    assert encoded.ids[0, 2] == row["roses</w>"]


def test_words_that_mean_something_else_together_have_one_stand_in():
    plain = subset()
    words = {"grandfather": "bulldog", "grandfather_clock": "red pot", "knife": "pot", "bus": "armchair", "dog": "pot"}
    tokenizer = Tokenizer(plain.config, plain.vocabulary, words)
    encoded = tokenizer.encode(["Grandfather clocks, a grandfather", "grandfather, clock", "a grandfather"])
    row = {line: i for i, line in enumerate(tokenizer.vocabulary)}
    together = ["red</w>", "pot</w>", ",</w>", "a</w>", "bulldog</w>"]
    assert encoded.ids[0].tolist() == [1, *(row[line] for line in together), 2] + [0] * 17
    assert encoded.replaced == [
        [("grandfather clocks", "red pot"), ("grandfather", "bulldog")], [("grandfather", "bulldog")],
        [("grandfather", "bulldog")],
    ]  # fmt: skip
    assert encoded.unknown == [[], ["clock"], []]


@pytest.mark.parametrize(
    ("word", "read"), [("knives", "pot"), ("buses", "armchair"), ("puppies", "pot"), ("men", "red")]
)
def test_plurals_have_the_stand_in_of_one(word, read):
    plain = subset()
    words = {"knife": "pot", "bus": "armchair", "puppy": "pot", "man": "red"}
    assert Tokenizer(plain.config, plain.vocabulary, words).encode(f"a {word}").replaced == [[(word, read)]]


def test_words_that_are_cut_are_cut_whole():
    plain = subset(6)
    tokenizer = Tokenizer(plain.config, plain.vocabulary, {"grandfather_clock": "red armchair"})
    assert tokenizer.encode("a pot in a grandfather clock").cut == [["grandfather", "clock"]]


def test_a_stand_in_counts_as_many_tokens_as_it_has():
    plain = subset(6)
    tokenizer = Tokenizer(plain.config, plain.vocabulary, {"settee": "red armchair"})
    encoded = tokenizer.encode("a settee in a settee")
    assert encoded.lengths == [6]
    assert encoded.cut == [["a", "settee"]]


@pytest.mark.parametrize("stand_in", ["zeppelin", "red zeppelin", ""])
def test_a_stand_in_must_be_known(stand_in):
    plain = subset()
    with pytest.raises(ModelError, match=f"stand-in '{stand_in}' must be a word of the model's"):
        Tokenizer(plain.config, plain.vocabulary, {"settee": stand_in})


def test_a_model_that_knows_all_words_has_no_stand_ins():
    with pytest.raises(ModelError, match="stand-in 'sofa'"):
        Tokenizer(SD21.text, None, {"settee": "sofa"})


def test_an_added_word_needs_no_stand_in():
    plain = subset()
    tokenizer = Tokenizer(plain.config, plain.vocabulary, {"settee": "armchair", "dog": "bulldog"}).with_token("dog")
    assert tokenizer.stand_ins == {"settee": "armchair"}
    assert tokenizer.encode("a dog").replaced == [[]]


def test_subset_cuts_at_its_own_context():
    encoded = subset(6).encode("a red armchair in the blue pot")
    assert encoded.cut == [["the", "blue", "pot"]]
    assert encoded.ids[0, -1] == 2


def test_added_word_is_one_row_in_both_vocabularies(clip):
    for base in (clip, subset()):
        grown = base.with_token("SKS")
        row = base.config.vocabulary_size
        assert grown.config == dataclasses.replace(base.config, vocabulary_size=row + 1)
        ids = grown.encode(["a sks bulldog", "a Sks, bulldog", "a asksa bulldog"]).ids
        assert (ids == row).sum(1).tolist() == [1, 1, 0]
        assert torch.equal(base.encode(["a red armchair"]).ids, grown.encode(["a red armchair"]).ids)
        again = Tokenizer(grown.config, grown.vocabulary)
        assert torch.equal(again.encode("a sks bulldog").ids, ids[:1])
        both = grown.with_token("<v2>")
        assert both.encode("a sks <v2> pot").ids[0, 2:4].tolist() == [row, row + 1]


@pytest.mark.parametrize("word", ["", "two words", "sks", "<unknown>"])
def test_added_word_must_be_new_and_one_word(clip, word):
    with pytest.raises(ArgumentError):
        clip.with_token("sks").with_token(word)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "must begin with"),
        (["<pad>", "<end_of_text>", "<start_of_text>", "<unknown>", "a</w>"], "must begin with"),
        (["<pad>", "<start_of_text>", "<end_of_text>", "<unknown>", "nothing like it"], "line 5"),
        (["<pad>", "<start_of_text>", "<end_of_text>", "<unknown>", "a</w>", "a</w>"], "line 6"),
        (["<pad>", "<start_of_text>", "<end_of_text>", "<unknown>", "a</w>"], "has 5 rows"),
    ],
)
def test_wrong_vocabularies(lines, sentence):
    with pytest.raises(ModelError, match=sentence):
        Tokenizer(TextConfig(vocabulary="subset", vocabulary_size=9), lines)


def test_clip_rows_must_fit_the_configuration():
    with pytest.raises(ModelError, match="has 49408 rows, but the configuration says 49409"):
        Tokenizer(dataclasses.replace(SD21.text, vocabulary_size=49409))


def test_a_prompt_is_filled_up_with_the_models_own_id(clip):
    """open_clip fills up with 0, and says no more than the ids; transformers' CLIPTokenizer with the end token."""
    ended = Tokenizer(dataclasses.replace(SD21.text, pad_id=END))
    for tokenizer, pad in ((clip, 0), (ended, END)):
        encoded = tokenizer.encode(["a brown bulldog", ""])
        assert encoded.ids.tolist() == [[START, 320, 2866, 15611, END, *[pad] * 72], [START, END, *[pad] * 75]]
        assert encoded.lengths == [5, 2]
    assert SD15.text.pad_id == END
