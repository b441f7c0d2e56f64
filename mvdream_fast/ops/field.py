"""The radiance field as one op: hash-grid encoding, density and colour networks, density bias and activations.

No weights live here (`field.volume` owns them) and nothing about rays (`ops.march_rays`, `ops.composite`).
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from dataclasses import field as default
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.ops._edges import (
    BACKENDS,
    address,
    aligned,
    check_same_device,
    check_shaped,
    check_tensors,
    load_native,
    queue_of,
    require,
    runs_natively,
)
from mvdream_fast.ops._registered import differentiable, register
from mvdream_fast.ops.hash_encode import (
    HashGrid,
    check_positions_and_table,
    check_same_dtype,
    hash_encode_at_once,
    hash_encode_ref,
    require_no_nan,
)

WIDTHS = (16, 32, 64, 128)
ACTIVATIONS = ("softplus", "exp", "none")  # by their numbers in csrc/field_types.h


@dataclass(frozen=True)
class FieldSpec:
    """What a field computes besides its weights. Its density bias is bias_scale * (1 - |x| / bias_std)."""

    grid: HashGrid = default(default_factory=HashGrid)
    radius: float = 1.0
    bias_scale: float = 10.0
    bias_std: float = 0.5
    density_activation: Literal["softplus", "exp", "none"] = "softplus"  # none: of a field that is no density
    color_sigmoid: bool = True

    def __post_init__(self) -> None:
        if not self.radius > 0 or not self.bias_std > 0:
            raise ValueError(f"FieldSpec: radius and bias_std must be > 0, got {self.radius} and {self.bias_std}")
        if self.density_activation not in ACTIVATIONS:
            known = "softplus, exp or none"
            raise ValueError(f"FieldSpec: density_activation must be {known}, got {self.density_activation!r}")


def field(
    positions: Tensor,
    table: Tensor,
    density_weights: Sequence[Tensor],
    feature_weights: Sequence[Tensor],
    spec: FieldSpec,
) -> tuple[Tensor, Tensor]:
    """Density and colour of points of a hash-grid field.

    positions: [P, 3] float32 or float64 in scene units; the grid covers [-radius, radius]^3, points
               outside take the features of the nearest point in it (the density bias keeps falling). NaN is refused.
    table:     [n_entries, F], see `hash_encode`; everything is of one dtype.
    *_weights: matrices [out, in] of bias-free ReLU networks: 1 to 3 hidden layers of one width out of 16, 32,
               64, 128, ending in 1 row (density) or 3 rows (colour).
    Gradients flow to positions, table and weights and are recomputed from the inputs: nothing is kept per sample.
    float32 runs natively. On a CPU: bit-identical for any number of threads, with at most 40 MB of scratch memory at
    the default widths. On CUDA: on tensor cores, each GEMM as three of tf32 (20 bits), or as one (10 bits) where
    torch.backends.cuda.matmul.allow_tf32 is set; 2^16 samples and more are encoded level by level, with 4 bytes of
    scratch memory a column for 2^18 of them at most; bit-identical under torch.use_deterministic_algorithms, where the
    backward pass takes them for every sample; a NaN position makes NaN outputs instead of an error, which would cost a
    synchronisation. float64 and second derivatives run through plain torch.

    Returns (sigmas [P], rgb [P, 3]).
    Raises ValueError for wrong shapes and NaN, TypeError for other dtypes, RuntimeError for mixed devices.
    Source: MVDream's implicit volume: softplus(m_d(h(x)) + 10 (1 - |x| / 0.5)), sigmoid(m_f(h(x))), h the hash grid.
    """
    _check_spec("field", spec)
    check_positions_and_table("field", positions, table, spec.grid)
    check_weights("field", "density_weights", positions, density_weights, spec.grid.width, 1)
    check_weights("field", "feature_weights", positions, feature_weights, spec.grid.width, 3)
    if torch.compiler.is_compiling() and positions.dtype == torch.float32:
        return _registered(positions, table, density_weights, feature_weights, spec)
    if not runs_natively(positions, table, *density_weights, *feature_weights, devices=BACKENDS):
        return field_ref(positions, table, density_weights, feature_weights, spec)
    return _Field.apply(positions, table, *density_weights, *feature_weights, spec, len(density_weights))


def field_density(positions: Tensor, table: Tensor, density_weights: Sequence[Tensor], spec: FieldSpec) -> Tensor:
    """The density half of `field`, at about half of its cost. Returns sigmas [P]; raises as `field` does."""
    _check_spec("field_density", spec)
    check_positions_and_table("field_density", positions, table, spec.grid)
    check_weights("field_density", "density_weights", positions, density_weights, spec.grid.width, 1)
    if torch.compiler.is_compiling() and positions.dtype == torch.float32:
        return _registered(positions, table, density_weights, [], spec)[0]
    if not runs_natively(positions, table, *density_weights, devices=BACKENDS):
        return field_density_ref(positions, table, density_weights, spec)
    return _Field.apply(positions, table, *density_weights, spec, len(density_weights))[0]


@dataclass(frozen=True)
class HashGridField:
    """A field that is `ops.field` of these parameters and nothing else: a kernel may evaluate it in its place."""

    table: Tensor
    density_weights: Sequence[Tensor]
    feature_weights: Sequence[Tensor]
    spec: FieldSpec

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [P, 3] -> (sigmas [P], rgb [P, 3])."""
        return field(positions, self.table, self.density_weights, self.feature_weights, self.spec)


def field_ref(
    positions: Tensor,
    table: Tensor,
    density_weights: Sequence[Tensor],
    feature_weights: Sequence[Tensor],
    spec: FieldSpec,
) -> tuple[Tensor, Tensor]:
    """The contract of `field` in plain torch, in any floating dtype and on any device."""
    features = _encode_ref(positions, table, spec)
    rgb = _color_ref(features, feature_weights, spec)
    return _density_ref(features, positions, density_weights, spec), rgb


def field_density_ref(positions: Tensor, table: Tensor, density_weights: Sequence[Tensor], spec: FieldSpec) -> Tensor:
    """The contract of `field_density` in plain torch."""
    return _density_ref(_encode_ref(positions, table, spec), positions, density_weights, spec)


def _encode_ref(positions: Tensor, table: Tensor, spec: FieldSpec, encode: Callable = hash_encode_ref) -> Tensor:
    # Scene units to the unit cube, rounded once, as one fused multiply-add does.
    to_unit = torch.tensor(0.5 / spec.radius, dtype=positions.dtype).double()
    unit = (positions.double() * to_unit + 0.5).to(positions.dtype)
    return encode(unit, table, spec.grid)


def _mlp_ref(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    for weight in weights[:-1]:
        x = F.relu(F.linear(x, weight))
    return F.linear(x, weights[-1])


def _color_ref(features: Tensor, weights: Sequence[Tensor], spec: FieldSpec) -> Tensor:
    rgb = _mlp_ref(features, weights)
    return rgb.sigmoid() if spec.color_sigmoid else rgb


def _density_ref(features: Tensor, positions: Tensor, weights: Sequence[Tensor], spec: FieldSpec) -> Tensor:
    # linalg.vector_norm has a zero (sub)gradient at the origin, where sqrt of a sum of squares would give NaN.
    bias = spec.bias_scale * (1 - torch.linalg.vector_norm(positions, dim=-1) / spec.bias_std)
    raw = _mlp_ref(features, weights)[:, 0] + (bias if spec.bias_scale else 0)
    if spec.density_activation == "none":
        return raw
    return F.softplus(raw) if spec.density_activation == "softplus" else raw.exp()


def _forward(*arguments) -> tuple[Tensor, Tensor | None]:
    """arguments: positions, table, density's matrices, then colour's, if any, the spec, the number of density's."""
    *tensors, spec, n_density = arguments
    positions, *parameters = [aligned(x) for x in tensors]
    sigmas = positions.new_empty(len(positions))
    rgb = positions.new_empty(len(positions), 3) if len(tensors) > 2 + n_density else None
    sizes = (len(positions), address(sigmas), address(rgb), queue_of(positions))
    ok = load_native("field", positions).field_forward(
        native_of(spec, n_density, parameters), address(positions), *sizes
    )
    require_no_nan("field", ok)
    return sigmas, rgb


def _backward(cotangents, kept, wanted, *arguments) -> list[Tensor | None]:
    """Gradients of positions, table and matrices, in that order; None where unwanted."""
    *tensors, spec, n_density = arguments
    positions, *parameters = [aligned(x) for x in tensors]
    d_sigmas, d_rgb = (d if d is None else d.contiguous() for d in cotangents)
    d_positions, d_table = (
        torch.empty_like(x) if want else None for x, want in zip([positions, parameters[0]], wanted)
    )
    density, color = parameters[1 : 1 + n_density], parameters[1 + n_density :]
    d_density = _flat_like(density, any(wanted[2 : 2 + n_density]))
    d_color = _flat_like(color, any(wanted[2 + n_density :]))
    load_native("field", positions).field_backward(
        native_of(spec, n_density, parameters),
        *(address(positions), len(positions)),
        *map(address, (d_sigmas, d_rgb if color else None, d_table, d_density, d_color, d_positions)),
        queue_of(positions),
    )
    return [d_positions, d_table, *_views(density, d_density), *_views(color, d_color)]


def native_of(spec: FieldSpec, n_density: int, parameters: Sequence[Tensor]):
    """The field as an object of the extension, which points into the (contiguous) parameters."""
    table, *weights = parameters
    layers = [(address(w), *w.shape) for w in weights]
    bias = (spec.bias_scale, spec.bias_std, ACTIVATIONS.index(spec.density_activation), spec.color_sigmoid)
    field_type = load_native("field").Field
    return field_type(
        spec.grid.native, 0.5 / spec.radius, *bias, address(table), layers[:n_density], layers[n_density:]
    )


def _flat_like(weights: Sequence[Tensor], needed: bool) -> Tensor | None:
    return weights[0].new_empty(sum(w.numel() for w in weights)) if needed else None


def _views(weights: Sequence[Tensor], flat: Tensor | None) -> list[Tensor | None]:
    """Each matrix's gradient as a view of the flat gradient of its network."""
    if flat is None:
        return [None] * len(weights)
    pieces = flat.split([w.numel() for w in weights])
    return [piece.view(w.shape) for piece, w in zip(pieces, weights, strict=True)]


def _laid_open(positions, table, density_weights, feature_weights, *flags):
    """The registered form's arguments as `_forward` takes them."""
    numbers, *rest = flags
    return (positions, table, *density_weights, *feature_weights, _spec_of(tuple(numbers), *rest), len(density_weights))


def _registered(positions, table, density_weights, feature_weights, spec) -> tuple[Tensor, Tensor]:
    """The op by its registered form, for graphs; colours are empty without feature_weights."""
    *_, radius, bias_scale, bias_std, activation, color_sigmoid = astuple(spec)
    numbers = [float(x) for x in (*astuple(spec.grid), radius, bias_scale, bias_std)]
    flags = (numbers, activation, color_sigmoid)
    return torch.ops.mvdream_fast.field(positions, table, [*density_weights], [*feature_weights], *flags)


@cache
def _spec_of(
    numbers: tuple[float, ...], activation: Literal["softplus", "exp", "none"], color_sigmoid: bool
) -> FieldSpec:
    n_levels, n_features, log2_size, base_resolution, growth, radius, bias_scale, bias_std = numbers
    grid = HashGrid(int(n_levels), int(n_features), int(log2_size), int(base_resolution), growth)
    return FieldSpec(grid, radius, bias_scale, bias_std, activation, color_sigmoid)


def _twice(*arguments) -> tuple[Tensor, Tensor | None]:
    positions, table, *weights, spec, n_density = arguments
    features = _encode_ref(positions, table, spec, hash_encode_at_once)
    rgb = _color_ref(features, weights[n_density:], spec) if len(weights) > n_density else None
    return _density_ref(features, positions, weights[:n_density], spec), rgb


def _fake(positions, table, density_weights, feature_weights, *_):
    n = positions.shape[0]
    return positions.new_empty(n), positions.new_empty((n, 3)) if feature_weights else None


_Field = differentiable(_forward, _backward, n_outputs=2, twice=_twice)
_in_graphs = differentiable(
    lambda *arguments: _forward(*_laid_open(*arguments)),
    lambda cotangents, kept, wanted, *arguments: _backward(cotangents, kept, wanted, *_laid_open(*arguments)),
    n_outputs=2,
)
register(
    "field(Tensor positions, Tensor table, Tensor[] density_weights, Tensor[] feature_weights, float[] numbers,"
    " str activation, bool color_sigmoid) -> (Tensor, Tensor)",
    cpu=_in_graphs,
    cuda=_in_graphs,
    fake=_fake,
)


def _check_spec(op: str, spec: FieldSpec) -> None:
    require(
        isinstance(spec, FieldSpec), op, "spec", "a FieldSpec", type(spec).__name__, "pass ops.FieldSpec", TypeError
    )


def check_weights(op: str, name: str, like: Tensor, weights: Sequence[Tensor], n_in: int, n_out: int) -> None:
    """Checks that the matrices chain n_in -> width -> ... -> n_out; a network is a list of 2 to 4 of them."""
    is_list = isinstance(weights, (list, tuple, torch.nn.ParameterList))
    require(is_list, op, name, "a list of matrices", type(weights).__name__, "pass one for each layer", TypeError)
    n = len(weights)
    require(2 <= n <= 4, op, name, "2 to 4 matrices", n, "use 1 to 3 hidden layers")
    check_tensors(op, **{f"{name}[{i}]": weight for i, weight in enumerate(weights)})
    width = weights[0].shape[0] if weights[0].ndim == 2 else 0
    require(width in WIDTHS, op, f"{name}[0]", f"[width, {n_in}]", list(weights[0].shape), f"width is one of {WIDTHS}")
    sizes = [n_in] + [width] * (n - 1) + [n_out]
    for i, weight in enumerate(weights):
        check_shaped(op, f"{name}[{i}]", weight, (sizes[i + 1], sizes[i]))
        check_same_dtype(op, like, **{f"{name}[{i}]": weight})
        check_same_device(op, positions=like, **{f"{name}[{i}]": weight})
