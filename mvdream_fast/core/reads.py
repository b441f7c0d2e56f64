"""When numbers on a device reach Python: each read waits until the device has done all that it was asked before."""

from typing import Any

import torch
from torch import Tensor


def reads_wait(device: torch.device) -> bool:
    """Whether to read a tensor of this device is to wait for it."""
    return device.type != "cpu"


class Later:
    """Numbers of a device on their way to Python: `get` waits for them, but not for what was asked after them.

    Args: numbers: [n], not changed afterwards.
    """

    def __init__(self, numbers: Tensor):
        self._numbers: Tensor | list[float] = numbers
        self._arrived = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def get(self) -> list[float]:
        """The number; waits for the device where it is not there yet."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        if isinstance(self._numbers, Tensor):
            self._numbers = self._numbers.tolist()  # pyright: ignore[reportUnknownMemberType] # as in read
        return self._numbers


def read(x: Tensor) -> list[Any]:
    """The numbers of a tensor [n], all at once."""
    return x.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] # torch says list alone
