"""The signed distance as a field: a sphere, and what a hash grid with a small network adds to it; colours beside it.

Rays and opacities along them live in surface.py and opacity.py; the arithmetic in `ops.field`.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from mvdream_fast import ops
from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.nerf.volume import Volume
from mvdream_fast.scene.shading import finite_differences
from mvdream_fast.scene.surface.config import SurfaceConfig
from mvdream_fast.scene.surface.opacity import Opacity, density_of


class SignedDistance(Volume):
    """f(x) = |x| - sphere_radius - m(h(x)), negative inside, with h the hash grid and m the network; and its colours.

    m starts as zero, by its last matrix, so that what there is at the start is the sphere to the last bit, with the
    gradients of a sphere, and without a fit beforehand. (A geometric initialisation of the network, as in the papers,
    would need the position among its inputs and biases, and gives a sphere only about.)

    `n_active` levels, the coarsest, are asked; the others have no influence, no gradient and no cost.
    """

    def __init__(self, config: SurfaceConfig, stream: Stream | None = None):
        super().__init__(config.volume_config(), stream)
        self.opacity: Opacity = config.sdf_opacity
        # ops.field's raw output is the network's plus scale * (1 - |x| / std): minus the distance, for these.
        sphere = {"bias_scale": config.sphere_radius, "bias_std": config.sphere_radius}
        self.spec = replace(self.spec, density_activation="none", **sphere)
        with torch.no_grad():
            self.density_weights[-1].zero_()
        self.deviation = nn.Parameter(torch.full((1,), config.deviation))
        self.n_active = self.config.n_levels

    @property
    def inverse_std(self) -> Tensor:
        """1 / the standard deviation of the opacity around the surface, [1]: exp(10 v) within 1e-6 and 1e6."""
        return torch.exp(10 * self.deviation).clamp(1e-6, 1e6)

    @property
    def eps(self) -> float:
        """The width of a cell of the finest active level, in scene units: how far finite differences reach."""
        config = self.config
        return 2 * config.radius / (config.base_resolution * config.growth ** (self.n_active - 1))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [P, 3] in scene units -> (sigmas [P], rgb [P, 3]); the densities are those of `density`."""
        distances, rgb = self.distances_and_colors(positions)
        return density_of(self.opacity, distances, self.inverse_std), rgb

    def density(self, positions: Tensor) -> Tensor:
        """positions [P, 3] in scene units -> sigmas [P], for every direction (see `density_of`)."""
        return density_of(self.opacity, self.distances(positions), self.inverse_std)

    def distances_and_colors(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [P, 3] in scene units -> (signed distances [P], rgb [P, 3])."""
        table, spec = self._active_table()
        below, rgb = ops.field(
            positions, table, self._active(self.density_weights), self._active(self.feature_weights), spec
        )
        return -below, rgb

    def distances(self, positions: Tensor) -> Tensor:
        """positions [P, 3] in scene units -> signed distances [P]."""
        table, spec = self._active_table()
        return -ops.field_density(positions, table, self._active(self.density_weights), spec)

    def gradients(self, positions: Tensor, mode: str = "finite_difference") -> Tensor:
        """The distances' derivatives at positions [P, 3], [P, 3], with a graph to the parameters.

        "finite_difference": central differences of +-eps, first order, six distances each. "analytic": the derivatives
        of the piecewise trilinear function, whose backward pass is second order and runs through plain torch.
        """
        if mode == "finite_difference":
            return finite_differences(self.distances, positions, self.eps)
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            x = positions.detach().requires_grad_()
            (gradients,) = torch.autograd.grad(self.distances(x).sum(), x, create_graph=training)
        return gradients

    def _active_table(self) -> tuple[Tensor, ops.FieldSpec]:
        if self.n_active == self.config.n_levels:
            return self.table, self.spec
        spec = _coarsest(self.spec, self.n_active)
        return self.table[: spec.grid.n_entries], spec

    def _active(self, weights: nn.ParameterList) -> list[Tensor]:
        width = self.n_active * self.config.n_features
        first, *rest = weights
        return [first if width == first.shape[1] else first[:, :width], *rest]


@lru_cache(maxsize=64)
def _coarsest(spec: ops.FieldSpec, n_levels: int) -> ops.FieldSpec:
    return replace(spec, grid=replace(spec.grid, n_levels=n_levels))
