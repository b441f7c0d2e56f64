"""A hash grid and a small network behind it as one op, where nothing is differentiated.

`ops.field` makes two networks of one grid: the second is this one, the first is as small as can be and thrown away. In
training, separate ops are the faster way on a CPU.
"""

from torch import Tensor

from mvdream_fast.ops.field import WIDTHS, FieldSpec, field
from mvdream_fast.ops.hash_encode import HashGrid
from mvdream_fast.tcnn_compat.encoder import Encoder
from mvdream_fast.tcnn_compat.grid import Grid
from mvdream_fast.tcnn_compat.network import MLP


def grid_of(encoder: Encoder, network: MLP) -> HashGrid | None:
    """The grid, where `ops.field` can be asked for both; None where it cannot."""
    activations = network.activation == "ReLU" and network.output_activation in ("None", "Sigmoid")
    sizes = network.n_neurons in WIDTHS and 1 <= network.n_hidden <= 3 and network.n_out <= 3
    return encoder.native if activations and sizes and isinstance(encoder, Grid) else None


def evaluate(x: Tensor, grid: HashGrid, network: MLP, weights: Tensor, features: Tensor) -> Tensor:
    """x [P, 3], the network's params and the grid's -> [P, n_out]."""
    *hidden, last = network.matrices(weights)
    hidden[0] = hidden[0][:, : grid.width]  # the rest meets the grid's padding, zeros
    thrown_away = [x.new_zeros(WIDTHS[0], grid.width), x.new_zeros(1, WIDTHS[0])]
    # Its cube is centred on 0.
    spec = FieldSpec(grid, radius=0.5, bias_scale=0.0, color_sigmoid=network.output_activation == "Sigmoid")
    table = features.view(-1, grid.n_features)
    return field(x - 0.5, table, thrown_away, [*hidden, last[:3]], spec)[1][:, : network.n_out]
