"""How one contestant of a contest runs: in this process, or in one of its own; its time, its memory, what it answers.

A process of its own is for whole models, whose weights and pools count; its memory is then all that the process holds.
In this process the memory of a contestant is what one call takes beyond what was held before it.
"""

import contextlib
import gc
import multiprocessing as mp
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch.utils._pytree import tree_map_only

Call = Callable[[], Any]
Role = Literal["reference", "peer", "ours"]


class Unavailable(Exception):
    """A contestant that this machine cannot run, and why."""


def itself(out: Any) -> Any:
    return out


@dataclass(frozen=True)
class Contestant:
    """Somebody who does the work of a contest.

    `make` builds the call that is timed and raises Unavailable (or ImportError) where this machine cannot; `seen`
    turns what the call returns into what is compared with the others of the same `case`. `work` and `threads` where
    they are not the contest's; `apart` for a process of its own, to which `make` is pickled.
    """

    name: str
    make: Callable[[], Call]
    seen: Callable[[Any], Any] = itself
    case: Any = None
    work: Mapping[str, float] | None = None
    threads: int | None = None
    apart: bool = False

    @property
    def role(self) -> Role:
        """Told by the first word of the name; who is neither `ours` nor `reference` is a peer."""
        first = self.name.split(",")[0].split()[0]
        return first if first in ("reference", "ours") else "peer"


class Place(Protocol):
    """Where a contestant runs."""

    def output(self) -> Any: ...
    def one_call(self) -> tuple[float | None, float]: ...
    def seconds(self, n_calls: int) -> float: ...
    def close(self) -> None: ...


class Here:
    """In this process."""

    def __init__(self, contestant: Contestant, threads: int):
        self.threads = contestant.threads or threads
        self.seen, self.call = contestant.seen, contestant.make()

    def output(self) -> Any:
        """What it answers, as tensors that a later call cannot change."""
        with self._on_threads():
            return tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), self.seen(self.call()))

    def one_call(self) -> tuple[float | None, float]:
        """The most megabytes that a call takes beyond what is held before it, a GPU's on a GPU; and its seconds."""
        from reference.memory import peak_memory, settled_memory

        on_linux = sys.platform.startswith("linux")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            took = self.seconds(1)
            return (torch.cuda.max_memory_allocated() - before) / 2**20, took
        before = settled_memory() if on_linux else 0
        took = self.seconds(1)
        return max(0.0, (peak_memory() - before) / 2**20) if on_linux else None, took

    def seconds(self, n_calls: int) -> float:
        """Of one call, the mean of so many in a row."""
        with self._on_threads():
            _wait()
            start = time.perf_counter()
            for _ in range(n_calls):
                self.call()
            _wait()
            return (time.perf_counter() - start) / n_calls

    def close(self) -> None:
        """Lets go of what the call holds; one that has something to end has a `close` of its own."""
        getattr(self.call, "close", lambda: None)()
        del self.call

    @contextlib.contextmanager
    def _on_threads(self):
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        yield
        torch.set_num_threads(before)


class Apart:
    """In a process of its own, which imports what it needs itself; its memory is all that it holds.

    Between two questions it is stopped: threads that wait for work by spinning (OpenMP's, ONNX Runtime's) would take
    the others' cores, twice the time of whoever has its turn. That it cannot run is known at the first question.
    """

    def __init__(self, contestant: Contestant, threads: int):
        context = mp.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, contestant, threads), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process is the end of the pipe
        self.is_made = False

    def output(self) -> Any:
        return self._ask("output")

    def one_call(self) -> tuple[float | None, float]:
        return self._ask("one_call")

    def seconds(self, n_calls: int) -> float:
        return self._ask("seconds", n_calls)

    def close(self) -> None:
        self._signal("SIGCONT")
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _ask(self, *question: Any) -> Any:
        if not self.is_made:  # not waited for before, so that several are made at once
            self._answer()
            self.is_made = True
        self._signal("SIGCONT")
        self.pipe.send(question)
        answer = self._answer()
        self._signal("SIGSTOP")
        return answer

    def _signal(self, name: str) -> None:
        """Where the system has such a signal."""
        if hasattr(signal, name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, getattr(signal, name))

    def _answer(self) -> Any:
        try:
            kind, answer = self.pipe.recv()
        except EOFError:
            self.process.join(10)
            raise RuntimeError(f"a contestant ended with code {self.process.exitcode}, see its output") from None
        if kind == "unavailable":
            raise Unavailable(answer)
        if kind == "error":
            raise RuntimeError(f"in a contestant's own process:\n{answer}")
        return tree_map_only(_Array, lambda a: torch.from_numpy(a.values), answer)


@dataclass
class _Array:
    """A tensor on its way between processes."""

    values: Any


class _Whole(Here):
    """`Here`, of the other process: its memory is the whole of it."""

    def one_call(self) -> tuple[float | None, float]:
        before = _held_mb()
        peak, took = super().one_call()
        return peak if peak is None or torch.cuda.is_available() else before + peak, took


def _held_mb() -> float:
    from reference.memory import settled_memory

    return settled_memory() / 2**20 if sys.platform.startswith("linux") else 0.0


def _serve(pipe: Any, contestant: Contestant, threads: int) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    torch.set_num_threads(threads)
    try:
        place = _Whole(contestant, threads)
        gc.collect()
        pipe.send(("made", None))
        while question := pipe.recv():
            answer = getattr(place, question[0])(*question[1:])
            pipe.send(("answer", tree_map_only(torch.Tensor, lambda t: _Array(t.numpy()), answer)))
    except (Unavailable, ImportError) as error:
        pipe.send(("unavailable", reason_of(error)))
    except EOFError:
        pass  # who asked is gone
    except Exception:
        pipe.send(("error", traceback.format_exc()))


def reason_of(error: Unavailable | ImportError) -> str:
    """Why somebody cannot run here, in a line."""
    if isinstance(error, ImportError):
        return f"{error.name or error} is not installed"
    return str(error)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
