"""What every encoding is to the modules: a pure function of points and parameters, in any floating dtype."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.core.rng import Stream


class Encoder(ABC):
    """An encoding of `n_dims` inputs as `width` columns, and how it is padded to more of them."""

    n_dims: int
    n_params: int = 0
    alignment: int = 1  # in a Composite its first column is a multiple of this
    filler: float = 1.0
    fills_front: bool = False

    @property
    @abstractmethod
    def width(self) -> int:
        """Columns without padding."""

    @abstractmethod
    def values(self, x: Tensor, params: Tensor) -> Tensor:
        """x [P, n_dims] and params [n_params] -> [P, width]."""

    def encode(self, x: Tensor, params: Tensor, width: int) -> Tensor:
        """The same, padded to [P, width]."""
        missing = width - self.width
        out = self.values(x, params)
        sides = (missing, 0) if self.fills_front else (0, missing)
        return F.pad(out, sides, value=self.filler) if missing else out

    def initial(self, stream: Stream) -> Tensor:
        """Parameters to start from, [n_params]."""
        return torch.empty(0)


def next_multiple(n: int, step: int) -> int:
    """The first multiple of `step` that is not below n."""
    return -(-n // step) * step
