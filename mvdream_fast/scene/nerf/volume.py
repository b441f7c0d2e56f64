"""The hash-grid volume: the parameters of a radiance field and what can be asked of it at points.

Rays, occupancy and compositing live in renderer.py; the arithmetic in `ops.field`.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from mvdream_fast import ops
from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.nerf.config import VolumeConfig
from mvdream_fast.scene.shading import analytic_normals, finite_difference_normals


class Volume(nn.Module):
    """A differentiable field of density and colour.

    The table starts uniform in +-1e-4 and the networks Xavier-uniform, as tiny-cuda-nn does, from `stream` (a fixed
    one by default), so that two volumes of one configuration start equal.
    """

    def __init__(self, config: VolumeConfig, stream: Stream | None = None):
        super().__init__()
        self.config, self.spec = config, config.spec
        stream = stream or Stream(0, 0, "volume")
        grid = self.spec.grid
        self.table = nn.Parameter(stream.uniform(grid.n_entries, grid.n_features, low=-1e-4, high=1e-4))
        self.density_weights = _xavier_mlp(stream, grid.width, config, 1)
        self.feature_weights = _xavier_mlp(stream, grid.width, config, 3)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [P, 3] in scene units -> (sigmas [P], rgb [P, 3]); see `ops.field`."""
        return ops.field(positions, self.table, [*self.density_weights], [*self.feature_weights], self.spec)

    def density(self, positions: Tensor) -> Tensor:
        """positions [P, 3] in scene units -> sigmas [P]."""
        return ops.field_density(positions, self.table, [*self.density_weights], self.spec)

    def normals(
        self, positions: Tensor, mode: Literal["analytic", "finite_difference"] = "analytic", eps: float = 1e-2
    ) -> Tensor:
        """Unit vectors that point out of the dense side: -gradient of the density, normalised.

        "analytic" differentiates the field (with a graph for training where gradients are enabled, which makes the
        backward pass second order); "finite_difference" takes central differences of +-eps scene units: six density
        calls, first order. Where the density is flat the normal is the zero vector.

        Returns [P, 3]. Raises ValueError for another mode.
        """
        if mode == "finite_difference":
            return finite_difference_normals(self.density, positions, eps)
        if mode != "analytic":
            raise ValueError(f"normals: mode must be 'analytic' or 'finite_difference', got {mode!r}")
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            x = positions if training and positions.requires_grad else positions.detach().requires_grad_()
            return analytic_normals(self.density(x), x, create_graph=training)

    def hash_grid_field(self) -> ops.HashGridField | None:
        """This field as parameters that `ops.render` can evaluate inside a kernel.

        None where calling this volume does something else: a subclass, a hook or an instance with a forward of its own.
        """
        plain = (type(self).forward, type(self).__call__) == (Volume.forward, nn.Module.__call__)
        if not plain or "forward" in vars(self) or self._forward_hooks or self._forward_pre_hooks:
            return None
        return ops.HashGridField(self.table, [*self.density_weights], [*self.feature_weights], self.spec)


def _xavier_mlp(stream: Stream, n_in: int, config: VolumeConfig, n_out: int) -> nn.ParameterList:
    sizes = [n_in] + [config.width] * config.n_hidden + [n_out]
    weights = nn.ParameterList()
    for fan_in, fan_out in pairwise(sizes):
        bound = math.sqrt(6 / (fan_in + fan_out))
        weights.append(nn.Parameter(stream.uniform(fan_out, fan_in, low=-bound, high=bound)))
    return weights
