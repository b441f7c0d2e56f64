"""One sentence is looked up in one form, however a person writes it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.evaluation.classifier import classes_of
from mvdream_fast.evaluation.evaluator import load_evaluator
from mvdream_fast.evaluation.judging import Judge, read_meanings, turntable
from mvdream_fast.evaluation.reference import Reference, matching
from mvdream_fast.evaluation.words import plain_words

PLAIN = "a gray bulldog"
WRITTEN = ("A Gray Bulldog", "a  gray bulldog ", "a gray bulldog.", "“a gray bulldog”", "'a gray bulldog'!",
           "a\tgray, bulldog", "a \uff47ray bulldog")  # fmt: skip
LISTS = [None, *sorted((Path(__file__).parents[2] / "benchmarks").glob("prompts*.txt"))]


@pytest.fixture(scope="module")
def judge() -> Judge:
    """The one that ships, without the classifier."""
    meanings = read_meanings()
    return Judge(load_evaluator(), Reference.load(), list(meanings), None, meanings)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_what_is_a_word():
    assert all(plain_words(text) == PLAIN for text in (PLAIN, *WRITTEN))
    assert plain_words("a two-legged jack-o'-lantern - (toy)") == "a two-legged jack-o'-lantern toy"
    assert plain_words(" ?! ") == ""
    with pytest.raises(ArgumentError, match="control character"):
        plain_words("a \x01chair")


def listed() -> Iterator[str]:
    for path in LISTS:
        if path is None or path.name != "prompts_near.txt":
            for pair in read_meanings(path).items():
                yield from pair


def test_listed_prompts_are_in_that_form_already():
    """So that their figures are what they were."""
    assert [text for text in listed() if plain_words(text) != text] == []


@pytest.mark.parametrize("written", WRITTEN)
def test_a_prompt_is_judged_as_itself_however_it_is_written(judge, images, written):
    azimuths = torch.arange(4) * 90.0
    expected, found = (turntable(images, images[:, 0], azimuths, text, judge) for text in (PLAIN, written))
    assert found == expected
    assert found["candidates"] == len(judge.prompts)
    assert found["janus"] is not None
    assert judge.reference.has_front(written)
    assert classes_of(written) == classes_of(PLAIN) != ()


def test_a_list_may_be_written_otherwise_than_the_run_s_prompt(judge):
    asked = Judge(judge.evaluator, judge.reference, ["A Divan."], None, {"A Divan.": "a Sofa"})
    assert {asked.meaning(text) for text in ("a divan", "A Divan.", "a divan ")} == {"a sofa"}
    assert asked.meaning("a Sofa, red") == "a sofa red"


def test_sentences_of_the_same_words_are_no_rivals(judge, images):
    """The evaluator reads words without their order, so a tie among them says nothing of the views."""
    texts = ["a chair with a table", "a table with a chair", "a red car", "a cat"]
    evaluator = judge.evaluator
    bags = evaluator.bags(texts)
    assert bags[0] == bags[1] != bags[2]
    text = evaluator.embed_text(texts).detach()
    scores = matching(text[None, :3], text, bags)
    assert (scores["top1"], scores["top5"]) == (1.0, 1.0)
    rivals = matching(text[None, :3], text, range(4))  # as if they could be told apart
    assert rivals["top1"] < 1
    asked = Judge(evaluator, judge.reference, texts[1:], None)
    assert turntable(images, images[:, 0], torch.arange(4) * 90.0, texts[0], asked)["candidates"] == 3


def test_bags_are_words_alone(judge):
    """No padding, start or end; as often as they come; and what is not read is told apart, so that it earns nothing."""
    bags = judge.evaluator.bags(["a cat", "cat a", "a cat a", "a xyzzy", "a plugh", "a " * 30 + "cat", "a " * 30])
    assert bags[0] == bags[1]
    assert len(bags[0][0]) == 2
    assert len(bags[2][0]) == 3
    assert bags[3][0] == bags[4][0]
    assert bags[5][0] == bags[6][0]
    assert len(set(bags)) == 6
