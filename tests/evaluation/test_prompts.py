"""The fixed prompts: 40 of them, most of pairs that training never saw, the same in the package as in benchmarks/.

`benchmarks/check_prompts.py` checks them against all captions of the shards; here, against those that come near.
"""

from pathlib import Path

import pytest

from mvdream_fast.core.errors import ArgumentError, InputFileError
from mvdream_fast.evaluation.judging import is_new, read_meanings, read_prompts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_most_pairs_are_new():
    prompts = read_prompts()
    near = (BENCHMARKS / "prompts_near.txt").read_text().splitlines()
    assert len(prompts) == 40
    assert sum(is_new(prompt, near) for prompt in prompts) == 35


def test_the_package_has_the_same_list():
    assert read_prompts() == read_prompts(BENCHMARKS / "prompts.txt")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_of_another_encoding(tmp_path, encoding):
    path = tmp_path / "prompts.txt"
    path.write_bytes("# Möbel\r\na chair\r\nein grüner Stuhl\r\n".encode(encoding))
    assert read_prompts(path) == ["a chair", "ein grüner Stuhl"]


def test_what_counts_as_new():
    captions = ["a red and white chair", "a green horse, animals"]
    assert is_new("a green chair", captions)
    assert is_new("a red horse", captions)
    assert not is_new("a white chair", captions)  # a caption has both words
    assert not is_new("an animals horse", captions)
    assert not is_new("a blue chair", captions)  # blue is no word of theirs


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"a chair\na chair\n", InputFileError), (b"# none\n", InputFileError), (b"\xff\xfe", InputFileError),
     (b"a chair\na \x01chair\n", ArgumentError)],
)  # fmt: skip
def test_lists_that_cannot_be_used(tmp_path, content, error):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(error):
        read_prompts(path)
    with pytest.raises(InputFileError, match="cannot read .*none.txt: No such file"):
        read_prompts(tmp_path / "none.txt")


def test_what_words_mean_that_no_caption_has():
    """The list of synonyms, and that of any prompt without one is itself."""
    meanings = read_meanings(BENCHMARKS / "prompts_synonyms.txt")
    assert len(meanings) == len(set(meanings.values())) == 60
    assert meanings["a blue davenport"] == "a blue sofa"
    assert read_meanings()["a gray bulldog"] == "a gray bulldog"


def test_two_prompts_cannot_mean_the_same(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a divan = a sofa\na settee = a sofa\n")
    with pytest.raises(InputFileError, match="no two of one meaning"):
        read_prompts(path)


def test_two_prompts_cannot_be_the_same_but_for_how_they_are_written(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\nA cat.\n")
    with pytest.raises(InputFileError, match="each once"):
        read_prompts(path)
