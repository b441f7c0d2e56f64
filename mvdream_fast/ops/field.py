"""The radiance field as one op: hash-grid encoding, density and colour networks, density bias and activations.

No weights live here (`field.volume` owns them) and nothing about rays (`ops.march_rays`, `ops.composite`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as default
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.ops.hash_encode import HashGrid, check_positions, check_table, hash_encode_ref

WIDTHS = (16, 32, 64, 128)


@dataclass(frozen=True)
class FieldSpec:
    """What a field computes besides its weights. Its density bias is bias_scale * (1 - |x| / bias_std)."""

    grid: HashGrid = default(default_factory=HashGrid)
    radius: float = 1.0
    bias_scale: float = 10.0
    bias_std: float = 0.5
    density_activation: Literal["softplus", "exp"] = "softplus"
    color_sigmoid: bool = True

    def __post_init__(self) -> None:
        if not self.radius > 0 or not self.bias_std > 0:
            raise ValueError(f"FieldSpec: radius and bias_std must be > 0, got {self.radius} and {self.bias_std}")
        if self.density_activation not in ("softplus", "exp"):
            raise ValueError(f"FieldSpec: density_activation must be softplus or exp, got {self.density_activation!r}")


def field(
    positions: Tensor,
    table: Tensor,
    density_weights: Sequence[Tensor],
    feature_weights: Sequence[Tensor],
    spec: FieldSpec,
) -> tuple[Tensor, Tensor]:
    """Density and colour of points of a hash-grid field; features never travel through memory.

    positions: [P, 3] float32 in scene units; the grid covers [-radius, radius]^3 and points outside take the features
               of the nearest point of the box (the density bias keeps falling). NaN is refused.
    table:     [n_entries, F] float32, see `hash_encode`.
    *_weights: matrices [out, in] float32 of bias-free ReLU networks: 1 to 3 hidden layers of one width out of 16, 32,
               64, 128, ending in 1 row (density) or 3 rows (colour).
    Gradients flow to positions, table and weights and are recomputed from the inputs: nothing is kept per sample.
    A second derivative (`create_graph=True`) runs through the plain-torch reference.

    Returns (sigmas [P], rgb [P, 3]).
    Raises ValueError for wrong shapes and NaN, TypeError for other dtypes, RuntimeError for mixed devices.
    Source: MVDream's implicit volume: softplus(m_d(h(x)) + 10 (1 - |x| / 0.5)), sigmoid(m_f(h(x))), h the hash grid.
    """
    check_positions("field", positions)
    check_table("field", positions, table, spec.grid)
    check_weights("field", "density_weights", positions, density_weights, spec.grid.width, 1)
    check_weights("field", "feature_weights", positions, feature_weights, spec.grid.width, 3)
    return field_ref(positions, table, density_weights, feature_weights, spec)


def field_density(positions: Tensor, table: Tensor, density_weights: Sequence[Tensor], spec: FieldSpec) -> Tensor:
    """The density half of `field`, at about half of its cost. Returns sigmas [P]; raises as `field` does."""
    check_positions("field_density", positions)
    check_table("field_density", positions, table, spec.grid)
    check_weights("field_density", "density_weights", positions, density_weights, spec.grid.width, 1)
    return field_density_ref(positions, table, density_weights, spec)


def field_ref(
    positions: Tensor,
    table: Tensor,
    density_weights: Sequence[Tensor],
    feature_weights: Sequence[Tensor],
    spec: FieldSpec,
) -> tuple[Tensor, Tensor]:
    """The contract of `field` in plain torch, in any floating dtype and on any device."""
    features = _encode_ref(positions, table, spec)
    rgb = _mlp_ref(features, feature_weights)
    return _density_ref(features, positions, density_weights, spec), rgb.sigmoid() if spec.color_sigmoid else rgb


def field_density_ref(positions: Tensor, table: Tensor, density_weights: Sequence[Tensor], spec: FieldSpec) -> Tensor:
    """The contract of `field_density` in plain torch."""
    return _density_ref(_encode_ref(positions, table, spec), positions, density_weights, spec)


def _encode_ref(positions: Tensor, table: Tensor, spec: FieldSpec) -> Tensor:
    # Scene units to the unit cube, rounded once, as one fused multiply-add does.
    unit = (positions.double() * (0.5 / spec.radius) + 0.5).to(positions.dtype)
    return hash_encode_ref(unit, table, spec.grid)


def _mlp_ref(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    for weight in weights[:-1]:
        x = F.relu(F.linear(x, weight))
    return F.linear(x, weights[-1])


def _density_ref(features: Tensor, positions: Tensor, weights: Sequence[Tensor], spec: FieldSpec) -> Tensor:
    # linalg.vector_norm has a zero (sub)gradient at the origin, where sqrt of a sum of squares would give NaN.
    bias = spec.bias_scale * (1 - torch.linalg.vector_norm(positions, dim=-1) / spec.bias_std)
    raw = _mlp_ref(features, weights)[:, 0] + (bias if spec.bias_scale else 0)
    return F.softplus(raw) if spec.density_activation == "softplus" else raw.exp()


def check_weights(op: str, name: str, like: Tensor, weights: Sequence[Tensor], n_in: int, n_out: int) -> None:
    """Checks that the matrices chain n_in -> width -> ... -> n_out; a network is a list of 2 to 4 of them."""
    if not 2 <= len(weights) <= 4:
        raise ValueError(f"{op}: {name} must be 2 to 4 matrices (1 to 3 hidden layers), got {len(weights)}")
    width = weights[0].shape[0] if weights[0].ndim == 2 else 0
    if width not in WIDTHS:
        raise ValueError(f"{op}: {name} must have a hidden width of 16, 32, 64 or 128, got {list(weights[0].shape)}")
    sizes = [n_in] + [width] * (len(weights) - 1) + [n_out]
    for i, weight in enumerate(weights):
        if list(weight.shape) != [sizes[i + 1], sizes[i]]:
            raise ValueError(f"{op}: {name}[{i}] must be {[sizes[i + 1], sizes[i]]}, got {list(weight.shape)}")
        if weight.dtype != torch.float32:
            raise TypeError(f"{op}: {name}[{i}] must be float32, got {weight.dtype}; {op}_ref takes any floating dtype")
        if weight.device != like.device:
            raise RuntimeError(
                f"{op}: {name}[{i}] must be on {like.device} with positions, got {weight.device}; move it"
            )
