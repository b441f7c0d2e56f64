"""Grids: numbers by hand, every storage and interpolation against one point at a time, both derivatives."""

from dataclasses import replace

import pytest
import torch
from reference.tcnn_formulas import DEVICE, close, draw, grid, levels, refill

from mvdream_fast import tcnn_compat as tcnn
from mvdream_fast.ops.hash_encode import HashGrid

SMALL = {"n_levels": 4, "base_resolution": 5, "per_level_scale": 1.6, "log2_hashmap_size": 9}


def encoding(dims, dtype=torch.float32, **config):
    return tcnn.Encoding(dims, {"otype": "Grid", **config}, dtype=dtype)


def spec(dims, **config):
    """The pure function behind the module, in whatever precision it is called."""
    return encoding(dims, **config)._encoder


def test_rows_by_hand():
    # Two levels of 2 and 4 vertices a side: 8 and 64 rows; (1/2, 1/2, 1/2) is vertex (1, 1, 1) and (2, 2, 2) of them.
    module = encoding(3, n_levels=2, n_features_per_level=1, base_resolution=2)
    module.load_state_dict({"params": torch.arange(72.0)})
    assert module(torch.full((1, 3), 0.5, device=DEVICE)).tolist() == [[1 + 2 + 4, 8 + 2 + 2 * 4 + 2 * 16]]
    # 16 vertices hashed to 8 rows: of (2, 3), 2 xor 3 * 2654435761 = 2 xor 7963307283 ends in the bits of 1.
    module = encoding(2, n_levels=1, n_features_per_level=1, base_resolution=4, log2_hashmap_size=3)
    module.load_state_dict({"params": torch.arange(8.0)})
    assert module(torch.tensor([[0.5, 2.5 / 3]], device=DEVICE)).round(decimals=4).tolist() == [[1]]


def test_sizes_and_defaults():
    # Three dense levels of 16, 32 and 64 vertices a side, thirteen of 2^19 rows; two features each.
    assert encoding(3).params.shape == (2 * (16**3 + 32**3 + 64**3 + 13 * 2**19),)
    assert encoding(3).n_output_dims == 32
    paper = encoding(3, per_level_scale=1.447269237440378)
    assert paper.params.shape == (12_599_920,)
    assert [level.resolution for level in spec(3, type="Dense", n_levels=3).levels] == [16, 64, 256]
    assert [level.size for level in spec(3, type="Tiled", n_levels=3, base_resolution=3).levels] == [27, 27, 27]
    assert encoding(2, n_features=12, n_features_per_level=4).n_output_dims == 12
    assert len(spec(2, n_features=12, n_features_per_level=4).levels) == 3


@pytest.mark.parametrize("kind", ["Hash", "Dense", "Tiled"])
@pytest.mark.parametrize("interpolation", ["Nearest", "Linear", "Smoothstep"])
@pytest.mark.parametrize(("dims", "n_features"), [(2, 8), (3, 2), (4, 1)])
def test_against_one_point_at_a_time(kind, interpolation, dims, n_features):
    config = {**SMALL, "type": kind, "interpolation": interpolation, "n_features_per_level": n_features}
    module, x = encoding(dims, **config), draw(9, dims)
    x[0], x[1] = 0, 1
    params = refill(module)
    assert sum(rows for *_, rows in levels(dims, config)) * n_features == len(params)
    close(module(x), [grid(point, params, config) for point in x.tolist()])


@pytest.mark.parametrize(
    ("name", "factors"),
    [("Prime", (1958374283, 2654435761, 805459861)), ("ReversedPrime", (2165219737, 1434869437, 2097192037))],
)
def test_other_hashes(name, factors):
    module, x = encoding(3, hash=name, **SMALL), draw(9, 3)
    params = refill(module)
    close(module(x), [grid(point, params, SMALL, factors) for point in x.tolist()])


def test_otype_names_the_storage_in_any_case():
    for otype, kind in {"HashGrid": "Hash", "DenseGrid": "Dense", "TiledGrid": "Tiled", "densegrid": "Dense"}.items():
        module = tcnn.Encoding(3, {"otype": otype, **SMALL}, dtype=torch.float32)
        params, x = refill(module), draw(5, 3)
        close(module(x), [grid(point, params, {**SMALL, "type": kind}) for point in x.tolist()])


def test_what_runs_natively():
    assert spec(3, per_level_scale=1.447269237440378).native == HashGrid()
    dense = spec(3, type="Dense", n_levels=4)
    assert dense.native.levels == dense.levels
    for odd in ({"interpolation": "Smoothstep"}, {"hash": "Prime"}, {"type": "Tiled"}, {"n_levels": 33}):
        assert spec(3, **{**SMALL, "per_level_scale": 1.1, **odd}).native is None
    assert spec(3, **SMALL).native
    assert spec(2, **SMALL).native is None


@pytest.mark.parametrize("interpolation", ["Linear", "Smoothstep"])
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_both_derivatives(interpolation, dims):
    # Two levels: the second one is hashed. 3-D linear ones run through ops.hash_encode.
    config = {"n_levels": 2, "base_resolution": 2, "log2_hashmap_size": 3, "interpolation": interpolation}
    pure = spec(dims, **config)
    x = draw(3, dims).cpu().double().requires_grad_()
    params = torch.randn(pure.n_params, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(pure.values, (x, params))
    torch.autograd.gradgradcheck(pure.values, (x, params), fast_mode=True)


def test_float32_derivatives_equal_float64_ones():
    module = encoding(3, **SMALL)
    params, x = refill(module), draw(200, 3).requires_grad_()
    direction, cotangent = torch.randn(200, 3), torch.randn(200, module.n_output_dims)
    results = []
    for call, leaf, inputs in (
        (module, module.params, x),
        (None, torch.tensor(params, requires_grad=True), x.detach().double().cpu().requires_grad_()),
    ):
        out = call(inputs) if call else module._encoder.values(inputs, leaf)
        d_x, d_params = torch.autograd.grad(out, [inputs, leaf], cotangent.to(out), create_graph=True)
        second = torch.autograd.grad(d_x, [inputs, leaf], direction.to(d_x))
        results.append([d_x, d_params, *second])
    for got, wanted in zip(*results, strict=True):
        largest = wanted.abs().max().item()
        torch.testing.assert_close(got.double().cpu(), wanted, atol=5e-6 * largest, rtol=0)


def test_nearest_has_a_gradient_of_zero():
    module, x = encoding(3, interpolation="Nearest", **SMALL), draw(5, 3).requires_grad_()
    assert torch.autograd.grad(module(x).sum(), x)[0].tolist() == [[0.0] * 3] * 5


@pytest.mark.parametrize("interpolation", ["Linear", "Smoothstep"])
def test_points_outside_take_the_nearest_inside(interpolation):
    module = encoding(3, interpolation=interpolation, **SMALL)
    refill(module)
    x = torch.tensor([[-0.5, 0.25, 1.5], [float("inf"), 0.5, -float("inf")]], device=DEVICE)
    assert torch.equal(module(x), module(x.clamp(0, 1)))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="must be numbers, got NaN"):
            module(x * float("nan"))


def test_a_tiled_level_too_fine_for_32_bits_reads_its_first_row():
    pure = replace(spec(3, type="Tiled", n_levels=2, base_resolution=4), growth=1024.0)  # 4 and 4096 a side
    params = torch.arange(float(pure.n_params))
    torch.testing.assert_close(pure.values(torch.rand(7, 3), params)[:, 2:], torch.tensor([[128.0, 129.0]] * 7))
