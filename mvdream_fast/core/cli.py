"""What every `python -m mvdream_fast.<verb>` shares: parsing a dataclass before torch is imported, the checks that most
flags need, what `--resume` may not change, and exit codes.

A verb is thin: a dataclass of its flags and a function that takes it. The work lives in the library modules.
"""

import dataclasses
import io
import json
import math
import os
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from tyro import conf
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mvdream_fast.core.arguments import user_path
from mvdream_fast.core.errors import ArgumentError, OutOfMemoryError, OutputError, UserError
from mvdream_fast.core.machine import available_cores

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

Args = TypeVar("Args", bound="DataclassInstance")
Given = Annotated[frozenset[str], conf.Fixed, conf.Suppress]  # the field `given` of a verb's flags: see `given`
SPIN_COUNT = "5000"  # about 0.1 ms; 1,000 already costs a fifth of a small model's speed, libgomp's default is 300,000
HINTS = {"threads": "; leave it out for one a core", "n_views": "; the models were trained with 4"}
# More than these no machine has, or no list of what is to be done holds; libraries fail on it in ways of their own.
MOST = {"threads": 4096, "workers": 4096, "n_views": 1024, "seeds": 1000, "parts": 100_000}

EXIT_CODES = """exit codes: 0 done; 1 (benchmark) failed, or slower than the bound; 2 wrong arguments or prompt; 3 model
missing, unreadable or of another configuration; 4 out of memory; 5 another input file missing or unreadable; 6
diverged; 7 output cannot be written or exists; 130 / 143 interrupted"""


def set_threads(threads: int | None) -> int:
    """Limits torch and the native ops to `threads` (default: the cores this process may use, cgroup quota included)."""
    import torch

    n = threads or available_cores()
    torch.set_num_threads(n)
    os.environ["OMP_NUM_THREADS"] = str(n)
    return n


def share_cores() -> None:
    """Lets threads that wait give their core away sooner; before torch is imported, or it has no effect.

    OpenMP's threads spin for milliseconds at every barrier. Two such programs on one machine may mostly wait for each
    other, as the scheduler places them: a step beside a training run took 0.15 to 1.9 s, with this 0.11 to 0.13 s.
    Alone it takes as long as before (benchmarks/bench_busy.py). What the user has set stays.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def run(
    main: Callable[[Args], None], flags: type[Args], *, prog: str, argv: list[str] | None = None, command: str = ""
) -> None:
    """Parses `argv` into `flags`, calls `main`, leaves with the documented exit code; a user's mistake is one line.

    command: what a person types, where that is not `python -m mvdream_fast.PROG`.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    share_cores()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # for names of folders that are no UTF-8
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that clean-up runs
    try:
        _check_words(argv)
        description = f"{flags.__doc__ or ''}\n\n{EXIT_CODES}"
        command = command or f"python -m mvdream_fast.{prog}"
        args = tyro.cli(flags, args=argv, prog=command, description=description, registry=_TYPES)
        main(dataclasses.replace(args, given=_named(flags, argv)) if hasattr(args, "given") else args)
    except UserError as error:
        fail(prog, str(error), error.exit_code)
    except MemoryError as error:
        fail(prog, f"out of memory: {error}", OutOfMemoryError.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OutputError.exit_code)
    except OSError as error:  # of a file or a folder that nobody has asked for by this way of saying it
        where = "" if error.filename is None else f" {error.filename}"
        fail(prog, f"cannot read or write{where}: {error.strerror or error}", OutputError.exit_code)
    except KeyboardInterrupt:
        fail(prog, "interrupted", 128 + signal.SIGINT)


_TYPES = ConstructorRegistry()


@_TYPES.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """`T | None` reads and looks in the help as T does: None is no word that a person types."""
    kinds = typing.get_args(info.type)
    if len(kinds) != 2 or type(None) not in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        spec,
        is_instance=lambda x: x is None or spec.is_instance(x),
        str_from_instance=lambda x: ["unset"] if x is None else spec.str_from_instance(x),
    )


@_TYPES.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Paths begin at home with `~`, also where no shell has seen to it (quotes, --flag=~/x)."""
    return _spec("PATH", user_path) if info.type is Path else None


def _spec(metavar: str, read: Callable[[str], Any]) -> PrimitiveConstructorSpec:
    return PrimitiveConstructorSpec(1, metavar, lambda words: read(words[0]), lambda x: True, lambda x: [str(x)])


# A path or another word that stands for something ("embedded", "latest"); the path begins at home with `~`.
Model = Annotated[str, _spec("MODEL", os.path.expanduser)]
Run = Annotated[str, _spec("RUN", os.path.expanduser)]
Place = Annotated[str, _spec("PATH", os.path.expanduser)]


def _check_words(argv: list[str]) -> None:
    """Refuses words that begin with a dash where only a flag can: a prompt, most likely."""
    for word in argv[: argv.index("--") if "--" in argv else None]:
        if word.startswith("-") and len(word.partition("=")[0].split()) > 1:
            raise ArgumentError(
                f"{word!r} begins with a dash and is no flag; write --flag={shlex.quote(word)}, or put a bare prompt "
                f"last: -- {shlex.quote(word)}"
            )


def _named(flags: type, argv: list[str]) -> frozenset[str]:
    """The fields whose options are in `argv`, under any of their names."""
    options = {}
    for field, hint in typing.get_type_hints(flags, include_extras=True).items():
        settings = getattr(hint, "__metadata__", ())
        name = next((s.name for s in settings if getattr(s, "name", None)), field)
        aliases = [alias for s in settings for alias in getattr(s, "aliases", None) or ()]
        options |= {option.replace("_", "-"): field for option in (f"--{name}", f"--no-{name}", *aliases)}
    words = argv[: argv.index("--") if "--" in argv else None]
    found = (options.get(word.partition("=")[0].replace("_", "-")) for word in words)
    return frozenset(field for field in found if field)


def given(flags: Any) -> dict[str, Any]:
    """The flags that were given, by field: named on the command line (even with their default), or not the default."""
    defaults = {f.name: f.default for f in dataclasses.fields(flags) if f.name != "given"}
    values = {name: getattr(flags, name) for name in defaults}
    return {name: x for name, x in values.items() if name in flags.given or x != defaults[name]}


def option(name: str) -> str:
    """A field as its flag."""
    return f"--{name.replace('_', '-')}"


def check_at_least(flags: Any, least: float, *names: str) -> None:
    """Refuses flags below `least`, above what MOST has for them, or not finite; None is one that was left out.

    Raises: ArgumentError.
    """
    for name in names:
        value, most = getattr(flags, name), MOST.get(name, math.inf)
        if value is not None and not least <= value < math.inf:
            raise ArgumentError(f"{option(name)} must be at least {least}, got {value}{HINTS.get(name, '')}")
        if value is not None and value > most:
            raise ArgumentError(f"{option(name)} must be at most {most}, got {value}{HINTS.get(name, '; take fewer')}")


def check_from_to(flags: Any, low: float, high: float, *names: str) -> None:
    """Refuses flags outside of `low` to `high`; None is one that was left out. Raises ArgumentError."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and not low <= value <= high:
            raise ArgumentError(f"{option(name)} must be from {low:g} to {high:g}, got {value}")


def check_resumed(changed: dict[str, tuple[Any, Any]]) -> None:
    """Refuses flags that a run cannot take up on its way: field -> (what was given, what the run has).

    Raises: ArgumentError, naming them all.
    """
    if changed:
        asked = " ".join(f"{option(name)} {_word(value)}" for name, (value, _) in changed.items())
        has = " ".join(f"{option(name)} {_word(value)}" for name, (_, value) in changed.items())
        raise ArgumentError(
            f"--resume goes on with {has}, as the run was begun, got {asked}; leave it out, or begin a new run"
        )


def settled(flags: Args, settings: dict[str, Any], fixed: Collection[str]) -> Args:
    """The flags of a run that goes on: those that were not given as in its `settings` (from JSON), and the `fixed` ones
    may not be given otherwise. Raises ArgumentError."""
    asked, fields = given(flags), {f.name: f for f in dataclasses.fields(flags)}
    kept = {name: x for name, x in settings.items() if name in fields}
    plain = json.loads(json.dumps(asked, default=str))
    check_resumed(
        {name: (asked[name], kept[name]) for name in fixed if plain.get(name, kept.get(name)) != kept.get(name)}
    )
    kept = {name: _typed(x, str(fields[name].type)) for name, x in kept.items() if name not in asked}
    return dataclasses.replace(flags, **kept)


def _typed(value: Any, kind: str) -> Any:
    """A value from JSON as a flag of this type has it."""
    if isinstance(value, list):
        return tuple(_typed(x, kind) for x in value)
    return Path(value) if isinstance(value, str) and "Path" in kind else value


def _word(value: Any) -> str:
    return " ".join(shlex.quote(str(x)) for x in (value if isinstance(value, (tuple, list)) else (value,)))


def fail(prog: str, message: str, code: int) -> NoReturn:
    """Prints one sentence to stderr and exits with `code`."""
    print(f"{prog}: {message}", file=sys.stderr)
    sys.exit(code)
