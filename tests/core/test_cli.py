"""What every verb's command line owes its user: help and refusals before torch is imported, and exit codes."""

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mvdream_fast.core import cli, errors

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "diffusers", "transformers", "matplotlib", "triton", "skimage", "trimesh"}
VERBS = sorted(
    path.stem for path in (ROOT / "mvdream_fast").glob("*.py") if "cli.run(main" in path.read_text(encoding="utf-8")
)


def verb(name: str, *arguments: str) -> tuple[int, str, str, set[str]]:
    """Runs `python -m mvdream_fast.<name>`: exit code, stdout, stderr, and which heavy packages it imported."""
    code = (
        "import runpy, sys\n"
        "sys.argv[0] = ''\n"
        f"try:\n    runpy.run_module('mvdream_fast.{name}', run_name='__main__')\n"
        "finally:\n"
        f"    print('\\nimported', *sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    message, _, imported = done.stderr.rpartition("\nimported")
    return done.returncode, done.stdout, message, set(imported.split())


def test_the_verbs_are_found():
    assert {"generate", "doctor"} <= set(VERBS)


@pytest.mark.parametrize("name", VERBS)
def test_help_comes_before_torch(name):
    code, out, _, imported = verb(name, "--help")
    assert (code, imported) == (0, set())
    assert f"python -m mvdream_fast.{name}" in out
    assert "exit codes: 0 done; 2 wrong arguments" in out


@pytest.mark.parametrize("name", VERBS)
def test_a_wrong_flag_is_refused_before_torch(name):
    code, out, message, imported = verb(name, "--no-such-flag", "1")
    assert (code, imported) == (2, set())
    assert "--help" in out + message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["x", "--n-views", "0"],
        ["x", "--n-views", "four"],
        ["x", "--steps", "37"],
        [""],
        ["   "],
        [],
        ["x", "--prompt", "x"],
        ["a\x07bell"],
        ["y" * 9000],
        ["x", "--guidance-scale", "nan"],
        ["x", "--elevation-deg", "inf"],
        ["x", "--threads", "0"],
        ["x", "--seed", "-1"],
        ["x", "--seed", "dice"],
        ["x", "--dtype", "int8"],
        ["x", "--mode", "4d"],
        ["x", "--negative-prompt", "a\x1b"],
    ],
    ids=lambda arguments: " ".join(arguments)[:30] or "nothing",
)
def test_generate_refuses_wrong_arguments_before_torch(arguments):
    code, out, message, imported = verb("generate", *arguments)
    assert (code, imported) == (2, set())
    assert "Traceback" not in message
    assert message.strip() or out.strip()


def run_with(error: BaseException) -> None:
    """A verb whose main raises."""

    @dataclass(frozen=True)
    class Flags:
        """A verb."""

    def main(_):
        raise error

    cli.run(main, Flags, prog="verb", argv=[])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ArgumentError("a"), 2),
        (errors.ModelError("m"), 3),
        (errors.OutOfMemoryError("o"), 4),
        (MemoryError("o"), 4),
        (errors.InputFileError("i"), 5),
        (errors.DivergedError("d"), 6),
        (errors.OutputError("f"), 7),
        (KeyboardInterrupt(), 128 + signal.SIGINT),
    ],
)
def test_exit_codes(error, code, capsys):
    with pytest.raises(SystemExit) as stop:
        run_with(error)
    assert stop.value.code == code
    assert capsys.readouterr().err.startswith("verb: ")


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_with(KeyError("bug"))


@pytest.mark.parametrize(
    ("given", "imported", "expected"),
    [
        ({}, False, cli.SPIN_COUNT),
        ({}, True, None),  # too late
        ({"GOMP_SPINCOUNT": "7"}, False, "7"),
        ({"OMP_WAIT_POLICY": "active"}, False, None),
    ],
)
def test_waiting_threads_give_their_core_away(given, imported, expected, monkeypatch):
    monkeypatch.setattr(cli.os, "environ", dict(given))
    modules = {name: module for name, module in sys.modules.items() if imported or name != "torch"}
    monkeypatch.setattr(cli.sys, "modules", modules | ({"torch": cli} if imported else {}))
    cli.share_cores()
    assert cli.os.environ.get("GOMP_SPINCOUNT") == expected
