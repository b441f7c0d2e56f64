"""Batches of the coming steps, drawn in other processes while a GPU works on the present one.

What a step draws is a function of its number alone, so these are the batches that one process would draw.
"""

import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, Sampler

from mvdream_fast.core.errors import UserError

Item = TypeVar("Item")
EACH = 2  # steps that a worker is ahead


class Ahead(Generic[Item]):
    """Answers draw(step), or its error; where there are workers (forked) they have begun with the following steps.

    `draw` must not touch a GPU, which a forked process cannot, and returns tensors, or dataclasses, lists and tuples of
    such; `pin` copies the tensors of lists and tuples to memory that a GPU reads without waiting. Steps from `until`
    on, if that is given, are not drawn ahead.
    """

    def __init__(self, draw: Callable[[int], Item], workers: int = 0, pin: bool = False, until: int | None = None):
        self.draw, self.workers, self.pin, self.until = draw, workers, pin, until
        self._next, self._rest = -1, None

    def __call__(self, step: int) -> Item:
        if not self.workers:
            return self.draw(step)
        if step != self._next or self._rest is None:
            self._rest = self._begin(step)
        try:
            drawn = next(self._rest)
        except (RuntimeError, ConnectionError, EOFError):  # a worker is gone: a signal to the group ends them first
            self._rest = None
            return self.draw(step)
        self._next = step + 1
        if isinstance(drawn, UserError):
            raise drawn
        return drawn

    def close(self) -> None:
        """Lets the workers end. Those that live at the interpreter's exit are killed there, and DataLoader says so."""
        self._rest = None

    def _begin(self, step: int) -> Iterator[Item]:
        return iter(
            DataLoader(
                _Steps(self.draw), sampler=_Range(step, self.until), batch_size=None, num_workers=self.workers,
                prefetch_factor=EACH, pin_memory=self.pin, worker_init_fn=_begin_worker, multiprocessing_context="fork",
            )
        )  # fmt: skip


class _Steps(Dataset, Generic[Item]):
    def __init__(self, draw: Callable[[int], Item]):
        self.draw = draw

    def __getitem__(self, step: int) -> "Item | UserError":
        try:
            return self.draw(step)
        except UserError as error:  # a DataLoader would raise it with the worker's traceback for a message
            return error


class _Range(Sampler):
    def __init__(self, begin: int, end: int | None):
        self.begin, self.end = begin, end

    def __iter__(self) -> Iterator[int]:
        return iter(itertools.count(self.begin) if self.end is None else range(self.begin, self.end))


def _begin_worker(_: int) -> None:
    """Ctrl-C reaches the workers, too, whose last batches are still wanted; other signals end them as they would."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
