"""Where numbers of tensors reach Python, counted without a GPU: there each is a wait for all that was asked before.

A read inside the C++ extension is not seen, nor a copy to a device: reference/gpu.py sees both.
"""

import contextlib
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = str(Path(__file__).parents[2] / "mvdream_fast")
READS = (
    "aten._local_scalar_dense",  # item, int(), float(), bool()
    "aten.equal",
    "aten.is_nonzero",
    # results whose size is a number of the input
    "aten.nonzero",
    "aten.masked_select",
    "aten.unique",
    "aten._unique",
    "aten.bincount",
    "aten.repeat_interleave.Tensor",
)
BY_INDEX = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default")  # a mask's size is such a number
METHODS = ("tolist", "cpu", "__array__")  # on a CPU these read without the dispatcher


class Waits(TorchDispatchMode):
    """Counts reads while it is entered: `at` says how many there were at each place, `file:function`.

    Args: host: places that look at tensors made on the CPU, wherever the rest is.
    """

    def __init__(self, host: tuple[str, ...] = ()):
        super().__init__()
        self.host, self.at, self._undo = host, Counter(), contextlib.ExitStack()

    def total(self) -> int:
        return sum(self.at.values())

    def take(self) -> Counter:
        """The counts since the last call."""
        at, self.at = self.at, Counter()
        return at

    def __enter__(self):
        for name in METHODS:
            self._undo.enter_context(self._counting(name))
        return super().__enter__()

    def __exit__(self, *error):
        self._undo.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if str(func) in BY_INDEX else ()
        sized = (kwargs or {}).get("output_size") is not None  # repeat_interleave, told
        if (str(func).startswith(READS) and not sized) or any(i is not None and i.dtype == torch.bool for i in indices):
            self._count()
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def _counting(self, name: str):
        plain = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            self._count()
            return plain(tensor, *args, **kwargs)

        setattr(torch.Tensor, name, counted)
        try:
            yield
        finally:
            setattr(torch.Tensor, name, plain)

    def _count(self) -> None:
        own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        place = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "elsewhere"
        if place not in self.host:
            self.at[place] += 1
