"""What every verb's command line owes its user: help and refusals before torch is imported, and exit codes."""

import dataclasses
import errno
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
from tyro import conf

from mvdream_fast.core import cli, errors

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "numpy", "diffusers", "transformers", "matplotlib", "triton", "skimage", "trimesh"]
VERBS = sorted(
    path.stem for path in (ROOT / "mvdream_fast").glob("*.py") if "cli.run(main" in path.read_text(encoding="utf-8")
)
WRONG = [
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
    ["x", "--elevation-deg", "120"],
    ["-a red chair"],
    ["--prompt", "-a red chair"],
    ["x", "--threads", "0"],
    ["x", "--threads", "3000000000"],
    ["x", "--n-views", "100000000"],
    ["x", "--seed", "-1"],
    ["x", "--seed", "dice"],
    ["x", "--dtype", "int8"],
    ["x", "--mode", "4d"],
    ["x", "--negative-prompt", "a\x1b"],
]  # of generate
PROGRAM = """
import contextlib, io, json, runpy, sys
heavy, asked, answers = *map(json.loads, sys.argv[1:]), []
for name, *arguments in asked:
    before, out, err, code = set(sys.modules), io.StringIO(), io.StringIO(), 0
    sys.argv = ["", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(f"mvdream_fast.{name}", run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    answers.append((code, out.getvalue(), err.getvalue(), [x for x in heavy if x in sys.modules and x not in before]))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def verb():
    """What `python -m mvdream_fast.<name>` answers: exit code, stdout, stderr, and which heavy packages it imported.

    One process answers all that the tests ask, one verb after another, for none of them may import any.
    """
    asked = [(name, *line) for name in VERBS for line in (["--help"], ["--no-such-flag", "1"])]
    asked += [("generate", *line) for line in WRONG]
    line = [sys.executable, "-W", "ignore::RuntimeWarning:runpy", "-c", PROGRAM, json.dumps(HEAVY), json.dumps(asked)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = dict(zip(asked, json.loads(done.stdout), strict=True))
    return lambda *line: answers[line]


def test_the_verbs_are_found():
    assert {"generate", "doctor"} <= set(VERBS)


@pytest.mark.parametrize("name", VERBS)
def test_help_comes_before_torch(name, verb):
    code, out, _, imported = verb(name, "--help")
    assert (code, imported) == (0, [])
    assert f"python -m mvdream_fast.{name}" in out
    assert "exit codes: 0 done; " in out
    assert "; 2 wrong arguments or prompt; " in out


@pytest.mark.parametrize("name", VERBS)
def test_help_says_what_a_person_would_type(name, verb):
    assert "None" not in verb(name, "--help")[1]


@pytest.mark.parametrize("name", VERBS)
def test_a_wrong_flag_is_refused_before_torch(name, verb):
    code, out, message, imported = verb(name, "--no-such-flag", "1")
    assert (code, imported) == (2, [])
    assert "--help" in out + message
    assert "Traceback" not in message


@pytest.mark.parametrize("arguments", WRONG, ids=lambda arguments: " ".join(arguments)[:30] or "nothing")
def test_generate_refuses_wrong_arguments_before_torch(arguments, verb):
    code, out, message, imported = verb("generate", *arguments)
    assert (code, imported) == (2, [])
    assert "Traceback" not in message
    assert message.strip() or out.strip()


@dataclass(frozen=True)
class Kinds:
    """One flag of each kind."""

    words: Annotated[str | None, conf.Positional] = None
    prompt: str = ""
    model: cli.Model | None = None
    many: tuple[cli.Place, ...] = ()
    output: Annotated[Path | None, conf.arg(aliases=["-o", "--output-dir"])] = None
    files: tuple[Path, ...] = ()
    size: tuple[float, float] | None = None
    kind: Literal["a", "b"] | None = None
    max_steps: int | None = None
    quiet: bool = False
    settings: Annotated[tuple[str, ...], conf.arg(name="set")] = ()
    given: cli.Given = frozenset()


def parsed(*argv: str) -> Kinds:
    found = []
    cli.run(found.append, Kinds, prog="verb", argv=list(argv))
    return found[0]


def test_paths_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    flags = parsed("~ a prompt", "-o", "~/x", "--model=~/m", "--many", "~/a", "embedded", "--files", "~/b", "c")
    assert (flags.output, flags.model, flags.many) == (Path("/home/me/x"), "/home/me/m", ("/home/me/a", "embedded"))
    assert flags.files == (Path("/home/me/b"), Path("c"))
    assert flags.words == "~ a prompt"  # no path


@pytest.mark.parametrize(
    ("name", "argv", "fields"),
    [
        ("generate", ["x", "--model", "~/a", "-o", "~/b", "--root", "~/c"], "model output root"),
        ("sds", ["--model", "~/a", "-o", "~/b", "--root", "~/c", "--resume", "~/d", "--config", "~/e", "--prompts-file",
                 "~/f"], "model output root resume config prompts_file"),
        ("train", ["--data", "~/a", "-o", "~/b", "--init", "~/c", "--vae", "~/d", "--text", "~/e", "--vocabulary",
                   "~/f", "--stand-ins", "~/g", "--latents", "~/h"],
         "data output init vae text vocabulary stand_ins latents"),
        ("dreambooth", ["--instance-data-dir", "~/a", "--model", "~/b", "-o", "~/c", "--resume", "~/d"],
         "instance_data_dir model output resume_from_checkpoint"),
        ("render", ["~/a", "-o", "~/b", "--sweethome3d-dir", "~/c"], "source out sweethome3d_dir"),
        ("evaluate", ["~/a", "--json", "~/b", "--data", "~/c", "--prompts", "~/d", "--evaluator", "~/e"],
         "targets json data prompts evaluator"),
        ("compare", ["x", "-o", "~/a", "--prompts-file", "~/b", "--config", "~/c"], "output prompts_file config"),
        ("convert", ["~/a", "~/b"], "src dst"),
    ],
)  # fmt: skip
def test_every_path_of_every_verb_begins_at_home(name, argv, fields, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    verb, found = importlib.import_module(f"mvdream_fast.{name}"), []
    cli.run(found.append, verb.Flags, prog=name, argv=argv)
    values = [getattr(found[0], field) for field in fields.split()]
    values = [str(value[0] if isinstance(value, tuple) else value) for value in values]
    assert values == [f"/home/me/{letter}" for letter in "abcdefgh"[: len(values)]]
    paths = {f.name for f in dataclasses.fields(verb.Flags) if "Path" in str(f.type)}
    assert paths <= set(fields.split()), "a new path flag needs a word above"


def test_dreambooth_takes_dashes_and_underscores_and_shows_dashes(verb):
    from mvdream_fast import dreambooth

    found = []
    dashes = ["--instance-data-dir", "x", "--max-train-steps", "3", "--pretrained-model-name-or-path", "m"]
    for argv in (dashes, [word.replace("-", "_").replace("__", "--", 1) for word in dashes]):
        cli.run(found.append, dreambooth.Flags, prog="dreambooth", argv=argv)
    assert found[0] == found[1]
    assert (found[0].max_train_steps, found[0].model) == (3, "m")
    assert not re.search(r"--[a-z]+_", verb("dreambooth", "--help")[1])


def test_values_that_may_be_left_out():
    assert parsed() == Kinds()
    flags = parsed("--size", "1", "2", "--kind", "b", "--max-steps", "3", "None")
    assert (flags.size, flags.kind, flags.max_steps, flags.words) == ((1.0, 2.0), "b", 3, "None")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ((), set()),
        (("a prompt",), {"words"}),  # not the default
        (("--max_steps", "3", "-o", "x"), {"max_steps", "output"}),
        (("--max-steps=3", "--output-dir=x"), {"max_steps", "output"}),
        (("--prompt", ""), {"prompt"}),  # the default, but named
        (("--no-quiet",), {"quiet"}),
        (("--set", "a=1"), {"settings"}),
        (("--", "--quiet"), {"words"}),
    ],
)
def test_flags_that_were_given(argv, named):
    assert cli.given(parsed(*argv)).keys() == named


def test_a_flag_cannot_say_that_it_was_given(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--given", "prompt")
    assert stop.value.code == 2


def test_words_that_begin_with_a_dash(capsys):
    assert parsed("--max-steps", "3", "--", "-a red chair").words == "-a red chair"
    assert parsed("--prompt=-a red chair").prompt == "-a red chair"
    for argv in (["-a red chair"], ["--prompt", "-a red chair"]):
        with pytest.raises(SystemExit) as stop:
            parsed(*argv)
        assert stop.value.code == 2
        assert capsys.readouterr().err == (
            "verb: '-a red chair' begins with a dash and is no flag; write --flag='-a red chair', or put a bare prompt "
            "last: -- '-a red chair'\n"
        )


def test_numbers_are_checked_under_the_flags_names():
    for value in (0, -1, math.nan, math.inf):
        with pytest.raises(errors.ArgumentError, match=f"^--max-steps must be at least 1, got {value}$"):
            cli.check_at_least(Kinds(max_steps=value), 1, "max_steps")
        with pytest.raises(errors.ArgumentError, match=f"^--max-steps must be from 1 to 5, got {value}$"):
            cli.check_from_to(Kinds(max_steps=value), 1, 5, "max_steps")
    with pytest.raises(errors.ArgumentError, match="^--threads must be at most 4096, got 4097; leave it out for one a"):
        cli.check_at_least(SimpleNamespace(threads=4097), 1, "threads")
    with pytest.raises(errors.ArgumentError, match="^--workers must be at most 4096, got 1000000; take fewer$"):
        cli.check_at_least(SimpleNamespace(workers=10**6), 1, "workers")
    for value in (None, 1, 5):
        cli.check_at_least(Kinds(max_steps=value), 1, "max_steps")
        cli.check_from_to(Kinds(max_steps=value), 1, 5, "max_steps")


def test_a_run_that_goes_on_keeps_what_is_not_given():
    """The record is what JSON makes of the flags: lists for tuples, text for paths."""
    record = {"prompt": "a chair", "files": ["x", "y"], "output": "out", "size": [1.0, 2.0], "max_steps": 9, "gone": 1}
    flags = cli.settled(parsed("--max-steps", "12"), record, fixed=("prompt",))
    assert (flags.max_steps, flags.prompt, flags.output) == (12, "a chair", Path("out"))
    assert (flags.size, flags.files) == ((1.0, 2.0), (Path("x"), Path("y")))
    assert cli.settled(parsed("--prompt", "a chair"), record, fixed=("prompt",)).prompt == "a chair"
    assert cli.settled(parsed("--size", "1", "2"), record, fixed=("size",)).size == (1.0, 2.0)
    with pytest.raises(errors.ArgumentError) as refused:
        cli.settled(parsed("--prompt", "", "--size", "3", "4"), record, fixed=("prompt", "size"))
    assert str(refused.value) == (
        "--resume goes on with --prompt 'a chair' --size 1.0 2.0, as the run was begun, got --prompt '' "
        "--size 3.0 4.0; leave it out, or begin a new run"
    )


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
        (OSError(errno.EROFS, "Read-only file system", "out"), 7),
        (PermissionError("no"), 7),
        (KeyboardInterrupt(), 128 + signal.SIGINT),
    ],
)
def test_exit_codes(error, code, capsys):
    with pytest.raises(SystemExit) as stop:
        run_with(error)
    assert stop.value.code == code
    assert capsys.readouterr().err.startswith("verb: ")


def test_what_the_system_refuses_is_one_sentence(capsys):
    with pytest.raises(SystemExit):
        run_with(OSError(errno.ENOSPC, "No space left on device", "out/x"))
    assert capsys.readouterr().err == "verb: cannot read or write out/x: No space left on device\n"


def test_a_reader_that_has_gone_is_no_error_of_a_file(tmp_path):
    """`evaluate | head`: no sentence, and the code of an output."""
    code = "import test_cli; test_cli.run_with(BrokenPipeError())"
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=place)
    assert (done.returncode, done.stderr) == (7, "")


def test_a_name_that_is_no_utf8_is_printed_as_it_is():
    code = "import os, test_cli; test_cli.prints(os.fsdecode(b'caf\\xe9s'))"
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=place | {"PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout) == (0, b"caf\xe9s\n")


def prints(text: str) -> None:
    """A verb that prints."""
    cli.run(lambda _: print(text), Empty, prog="verb", argv=[])


@dataclass(frozen=True)
class Empty:
    """A verb."""


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
