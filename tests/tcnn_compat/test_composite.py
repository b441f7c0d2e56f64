"""Composites: which inputs a part sees, where its columns and params lie, how they are reduced and padded."""

import math

import pytest
import torch
from reference.tcnn_formulas import close, draw, frequency, grid, one_blob, refill, triangle_wave

from mvdream_fast import tcnn_compat as tcnn

GRID = {"n_levels": 2, "base_resolution": 3, "log2_hashmap_size": 6}


def composite(dims, *nested, dtype=torch.float32, **options):
    return tcnn.Encoding(dims, {"otype": "Composite", "nested": list(nested), **options}, dtype=dtype)


def test_neural_radiance_caching():
    # The example of tiny-cuda-nn's documentation: positions, appearance, and the rest as it is.
    module = composite(
        11,
        {"n_dims_to_encode": 3, "otype": "TriangleWave", "n_frequencies": 4},
        {"n_dims_to_encode": 5, "otype": "OneBlob", "n_bins": 4},
        {"otype": "Identity"},
    )
    x = draw(6, 11)
    rows = []
    for point in x.tolist():
        waves = [value for v in point[:3] for value in triangle_wave(v, 4)]
        blobs = [value for v in point[3:8] for value in one_blob(v, 4)]
        rows.append([*waves, *blobs, *point[8:]])
    assert module.n_output_dims == 12 + 20 + 3
    close(module(x), rows)


def test_parts_may_overlap_and_leave_inputs_out():
    module = composite(
        4,
        {"n_dims_to_encode": 2, "dims_to_encode_begin": 1, "otype": "Identity"},
        {"n_dims_to_encode": 0, "otype": "Frequency"},
        {"n_dims_to_encode": 1, "otype": "Identity", "scale": -1},
        {"n_dims_to_encode": 1, "dims_to_encode_begin": 1, "otype": "Frequency", "n_frequencies": 1},
    )
    x = draw(5, 4)
    rows = [[p[1], p[2], -p[3], math.sin(math.pi * p[1]), math.cos(math.pi * p[1])] for p in x.tolist()]
    close(module(x), rows)


def test_grids_start_at_a_multiple_of_their_features_and_params_follow_each_other():
    grids = [{**GRID, "otype": "HashGrid", "n_features_per_level": n} for n in (4, 8)]
    module = composite(
        6,
        {"n_dims_to_encode": 1, "otype": "Identity"},
        {**grids[0], "n_dims_to_encode": 2},
        {**grids[1], "n_dims_to_encode": 3},
    )
    x, params = draw(5, 6), refill(module)
    first = tcnn.Encoding(2, grids[0]).params.numel()
    rows = []
    for p in x.tolist():
        # One number and three ones, then 2 x 4 columns, which end at 12; a grid's padding is 0.
        parts = [p[0], 1, 1, 1, *grid(p[1:3], params[:first], grids[0])]
        rows.append([*parts, 0, 0, 0, 0, *grid(p[3:], params[first:], grids[1])])
    assert module.n_output_dims == 32
    close(module(x), rows)


@pytest.mark.parametrize(("reduction", "reduce"), [("Sum", sum), ("product", math.prod)])
def test_reductions(reduction, reduce):
    planes = [{**GRID, "otype": "Grid", "n_dims_to_encode": 2, "dims_to_encode_begin": i} for i in (0, 1)]
    module = composite(3, *planes, reduction=reduction)
    x, params = draw(5, 3), refill(module)
    half = len(params) // 2
    rows = []
    for p in x.tolist():
        pairs = zip(grid(p[:2], params[:half], GRID), grid(p[1:], params[half:], GRID))
        rows.append([reduce(pair) for pair in pairs])
    close(module(x), rows)


def test_composites_nest():
    inner = {"otype": "Composite", "n_dims_to_encode": 2, "nested": [{"otype": "Frequency", "n_frequencies": 2}]}
    module, x = composite(3, inner, {"otype": "Identity"}), draw(4, 3)
    close(module(x), [[*frequency(a, 2), *frequency(b, 2), c] for a, b, c in x.tolist()])


def test_both_derivatives():
    plane = {**GRID, "otype": "Grid", "n_dims_to_encode": 2, "interpolation": "Smoothstep"}
    other = {"otype": "OneBlob", "n_dims_to_encode": 1, "n_bins": 4}
    pure = composite(3, plane, other, reduction="Product")._encoder
    x = draw(3, 3).cpu().double().requires_grad_()
    params = torch.randn(pure.n_params, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(pure.values, (x, params))
    torch.autograd.gradgradcheck(pure.values, (x, params), fast_mode=True)


@pytest.mark.parametrize(
    ("nested", "options", "message"),
    [
        ([], {}, r"encoding_config\['nested'\] must be a list of at least one encoding"),
        ([{"n_dims_to_encode": 3}] * 2, {}, r"\['nested'\] must be of 4 inputs in all"),
        ([{}, {}], {}, r"\['nested'\]\[1\]\['n_dims_to_encode'\] must be missing once at most"),
        ([{"dims_to_encode_begin": 1}], {}, r"\['n_dims_to_encode'\] must be given for every part"),
        (
            [{"n_dims_to_encode": 2, "dims_to_encode_begin": 3}],
            {},
            r"\['dims_to_encode_begin'\] must be at most 2",
        ),
        ([{"n_dims_to_encode": 0}], {}, r"\['nested'\] must be of one input at least"),
        ([{"n_dims_to_encode": 1}, {"n_dims_to_encode": 2}], {"reduction": "Sum"}, r"\['reduction'\] must be Concat"),
        (
            [{"n_dims_to_encode": 4}],
            {"reduction": "Mean"},
            r"\['reduction'\] must be one of Concatenation, Sum",
        ),
        ([{"otype": "Blob"}], {}, r"\['nested'\]\[0\]\['otype'\] must be one of Composite, .*, got 'Blob'"),
    ],
)
def test_bad_composites(nested, options, message):
    with pytest.raises(ValueError, match=message):
        composite(4, *nested, **options)
