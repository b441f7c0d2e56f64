"""What the type checker is told: that the files which it checks strictly are there, and what ships with the types.

The check itself is `make lint`.
"""

import inspect
import re
import tomllib
from pathlib import Path

from mvdream_fast.pipeline import MVDreamPipeline

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["basedpyright"]
EXCEPTION = re.compile(r"# (?:type: ignore|pyright: )")
RULE_AND_REASON = re.compile(r"# pyright: ignore\[report\w+(, report\w+)*\]( # \w.+)?$")


def test_every_path_of_the_configuration_exists():
    """A file that was renamed would be checked strictly no more, without a word."""
    for path in (*SETTINGS["strict"], *SETTINGS["include"]):
        assert (ROOT / path).exists(), path


def test_every_exception_names_its_rule():
    lines = [(p, line) for p in ROOT.glob("mvdream_fast/**/*.py") for line in p.read_text().splitlines()]
    found = [(str(p), line) for p, line in lines if EXCEPTION.search(line)]
    assert found
    assert not [line for line in found if not RULE_AND_REASON.search(line[1])]


def test_the_forms_of_a_call_have_its_arguments():
    """MVDreamPipeline says in one form for each that a text gives Views and texts a list of them."""
    source = inspect.getsource(MVDreamPipeline)
    forms = re.findall(r"@overload\n    def __call__\(\n(.*?)\) -> ", source, re.DOTALL)
    names = list(inspect.signature(MVDreamPipeline.__call__).parameters)
    assert len(forms) == 2
    for form in forms:
        assert re.findall(r"(\w+)(?=: )|\b(self)\b", form) == [("", "self"), *((name, "") for name in names[1:])]
