"""What every `python -m mvdream_fast.<verb>` shares: parsing a dataclass before torch is imported, and exit codes.

A verb is thin: a dataclass of its flags and a function that takes it. The work lives in the library modules.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from mvdream_fast.core.errors import OutOfMemoryError, OutputError, UserError
from mvdream_fast.core.machine import available_cores

Args = TypeVar("Args")
SPIN_COUNT = "5000"  # about 0.1 ms; 1,000 already costs a fifth of a small model's speed, libgomp's default is 300,000

EXIT_CODES = """exit codes: 0 done; 2 wrong arguments or prompt; 3 model missing, unreadable or of another
configuration; 4 out of memory; 5 another input file missing or unreadable; 6 diverged; 7 output cannot be written or
exists; 130 / 143 interrupted"""


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


def run(main: Callable[[Args], None], flags: type[Args], *, prog: str, argv: list[str] | None = None) -> None:
    """Parses `argv` into `flags`, calls `main`, leaves with the documented exit code; a user's mistake is one line."""
    import tyro

    description = f"{flags.__doc__ or ''}\n\n{EXIT_CODES}"
    share_cores()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that clean-up runs
    args = tyro.cli(flags, args=argv, prog=f"python -m mvdream_fast.{prog}", description=description)
    try:
        main(args)
    except UserError as error:
        fail(prog, str(error), error.exit_code)
    except MemoryError as error:
        fail(prog, f"out of memory: {error}", OutOfMemoryError.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OutputError.exit_code)
    except KeyboardInterrupt:
        fail(prog, "interrupted", 128 + signal.SIGINT)


def fail(prog: str, message: str, code: int) -> None:
    """Prints one sentence to stderr and exits with `code`."""
    print(f"{prog}: {message}", file=sys.stderr)
    sys.exit(code)
