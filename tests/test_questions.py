"""The examples in docs/questions.md give what they say."""

import doctest
import re
from pathlib import Path

import torch

from mvdream_fast.core.run_folder import make_run_folder

PAGE = Path(__file__).parents[1] / "docs/questions.md"


def test_the_examples_run():
    options = torch._tensor_str.PRINT_OPTS
    kept = options.precision
    result = doctest.testfile(str(PAGE), module_relative=False)
    torch.set_printoptions(precision=kept)
    assert result.attempted > 15
    assert result.failed == 0


def test_the_runs_that_are_evaluated_are_all_runs_and_nothing_else(tmp_path):
    """`outputs/latest` leads into a run, whose files are no runs."""
    runs = {make_run_folder(tmp_path / "outputs", prompt, seed) for prompt, seed in (("a cat", 0), ("a-s1 b", 12))}
    for run in runs:
        (run / "mesh.glb").touch()
        (run / "preview").mkdir()
    patterns = re.findall(r"mvdream_fast\.evaluate (outputs/\S+)", PAGE.read_text())
    assert len(patterns) == 2
    assert [{*tmp_path.glob(pattern)} for pattern in patterns] == [runs] * 2
