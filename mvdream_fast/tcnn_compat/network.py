"""The networks: multi-layer perceptrons without biases.

FullyFusedMLP and CutlassMLP are one here; they differ in the widths that they take.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.core.rng import Stream
from mvdream_fast.ops.field import WIDTHS
from mvdream_fast.tcnn_compat.config import Options
from mvdream_fast.tcnn_compat.encoder import next_multiple

ALIGNMENT = 16  # inputs and outputs of a network are multiples of this
FULLY_FUSED = {"FullyFusedMLP": True, "MegakernelMLP": True, "CutlassMLP": False, "MLP": False}
SHARPNESS = 10  # tiny-cuda-nn's K_ACT: brings squareplus and softplus closer to ReLU


def _squareplus(x: Tensor) -> Tensor:
    x = SHARPNESS * x
    return (x + (x * x + 4).sqrt()) / 2 / SHARPNESS


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "None": lambda x: x,
    "ReLU": F.relu,
    "LeakyReLU": F.leaky_relu,  # 0.01 x below 0
    "Exponential": torch.exp,
    "Sine": torch.sin,
    "Sigmoid": torch.sigmoid,
    "Squareplus": _squareplus,
    "Softplus": lambda x: F.softplus(x, beta=SHARPNESS),
    "Tanh": torch.tanh,
    "SiLU": F.silu,
}


@dataclass(frozen=True)
class MLP:
    """A network's shape. Its params are the layers' matrices [out, in], row by row; the last has rows of padding."""

    n_in: int
    n_out: int
    n_neurons: int
    n_hidden: int
    activation: str
    output_activation: str

    @classmethod
    def read(cls, options: Options, n_in: int, n_out: int) -> "MLP":
        """The network of a configuration; raises ValueError for one that there cannot be."""
        fully_fused = options.choice("otype", "MLP", FULLY_FUSED)
        n_neurons = options.integer("n_neurons", 128, 1, 1 << 16)
        ok, widths = not fully_fused or n_neurons in WIDTHS, "16, 32, 64 or 128 for a FullyFusedMLP"
        options.require(ok, "n_neurons", widths, "use a CutlassMLP for others")
        n_hidden = options.integer("n_hidden_layers", 5, 1 if fully_fused else 0, 1 << 10)
        names = {name: name for name in ACTIVATIONS}
        activations = options.choice("activation", "ReLU", names), options.choice("output_activation", "None", names)
        return cls(n_in, n_out, n_neurons, n_hidden, *activations)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """[out, in] of each matrix."""
        sizes = [self.n_in, *[self.n_neurons] * self.n_hidden, next_multiple(self.n_out, ALIGNMENT)]
        return [(rows, columns) for columns, rows in pairwise(sizes)]

    @property
    def n_params(self) -> int:
        """Numbers in all matrices."""
        return sum(math.prod(shape) for shape in self.shapes)

    def initial(self, stream: Stream) -> Tensor:
        """Xavier-uniform; for sines as Sitzmann et al. 2020 start them ("SIREN", section 3.2)."""
        matrices = []
        for i, (rows, columns) in enumerate(self.shapes):
            bound = math.sqrt(6 / (rows + columns))
            if self.activation == "Sine":
                bound = math.sqrt(6 / columns) if i else 30 / columns
            matrices.append(stream.uniform(rows * columns, low=-bound, high=bound))
        return torch.cat(matrices)

    def matrices(self, params: Tensor) -> list[Tensor]:
        """params [n_params] as the layers' matrices [out, in]."""
        pieces = params.split([math.prod(shape) for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def __call__(self, x: Tensor, params: Tensor) -> Tensor:
        """x [P, n_in] and params [n_params] -> [P, n_out]."""
        *hidden, last = self.matrices(params)
        for matrix in hidden:
            x = ACTIVATIONS[self.activation](F.linear(x, matrix))
        return ACTIVATIONS[self.output_activation](F.linear(x, last[: self.n_out]))
