"""The examples in docs/questions.md give what they say."""

import doctest
from pathlib import Path

import torch


def test_the_examples_run():
    options = torch._tensor_str.PRINT_OPTS
    kept = options.precision
    result = doctest.testfile(str(Path(__file__).parents[1] / "docs/questions.md"), module_relative=False)
    torch.set_printoptions(precision=kept)
    assert result.attempted > 15
    assert result.failed == 0
