"""Networks: every activation against plain numbers, layout and padding of params, derivatives, the fused way."""

import numpy as np
import pytest
import torch
from reference.tcnn_formulas import ACTIVATIONS, close, draw, grid, harmonics_to_degree_4, network, refill

from mvdream_fast import tcnn_compat as tcnn
from mvdream_fast.tcnn_compat import fused

SMALL = {"otype": "FullyFusedMLP", "n_neurons": 16, "n_hidden_layers": 2}
HASH = {"otype": "HashGrid", "n_levels": 5, "base_resolution": 4, "log2_hashmap_size": 8, "per_level_scale": 1.5}


def padded(x, filler=1.0):
    return [[*row, *[filler] * (-len(row) % 16)] for row in x]


def with_encoding(dims, n_out, encoding, config, dtype=torch.float32):
    return tcnn.NetworkWithInputEncoding(dims, n_out, encoding, config, dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("otype", ["FullyFusedMLP", "CutlassMLP"])
def test_activations(activation, otype):
    config = {**SMALL, "otype": otype, "activation": activation, "output_activation": activation}
    module, x = tcnn.Network(5, 3, config, dtype=torch.float32), draw(7, 5)
    params = refill(module) / 8
    module.load_state_dict({"params": torch.from_numpy(params)})
    close(module(x), [network(row, params, 3, config) for row in padded(x.tolist())])


@pytest.mark.parametrize(("width", "n_hidden", "n_in", "n_out"), [(64, 1, 32, 16), (128, 4, 16, 1), (32, 1, 3, 17)])
def test_layout_of_fully_fused(width, n_hidden, n_in, n_out):
    config = {"otype": "FullyFusedMLP", "n_neurons": width, "n_hidden_layers": n_hidden}
    module, x = tcnn.Network(n_in, n_out, config, dtype=torch.float32), draw(4, n_in)
    params = refill(module)
    for_input, for_output = -(-n_in // 16) * 16, -(-n_out // 16) * 16
    assert len(params) == width * for_input + (n_hidden - 1) * width**2 + for_output * width
    close_to = torch.tensor([network(row, params, n_out, config) for row in padded(x.tolist())])
    torch.testing.assert_close(module(x).cpu(), close_to, rtol=2e-5, atol=2e-6 * close_to.abs().max().item())


def test_cutlass_takes_any_width_and_no_hidden_layer():
    for config in ({"n_neurons": 20, "n_hidden_layers": 1}, {"n_hidden_layers": 0}):
        module, x = tcnn.Network(2, 3, config, dtype=torch.float32), draw(4, 2)
        params = refill(module)
        close(module(x), [network(row, params, 3, config) for row in padded(x.tolist())], 1e-5)
    assert tcnn.Network(2, 3, {}).params.shape == (128 * 16 + 4 * 128**2 + 16 * 128,)


def test_network_params_come_before_the_encodings():
    module, x = with_encoding(3, 4, HASH, SMALL), draw(6, 3)
    params, n_weights = refill(module), 3 * 16 * 16
    rows = [grid(point, params[n_weights:], HASH) for point in x.tolist()]  # 10 features each; a grid's padding is 0
    close(module(x), [network(row, params[:n_weights], 4, SMALL) for row in padded(rows, 0.0)], 1e-5)


def test_padding_of_harmonics_is_in_front():
    module, x = with_encoding(3, 2, {"otype": "SphericalHarmonics", "degree": 3}, SMALL), draw(6, 3)
    params = refill(module)
    rows = [[1] * 7 + harmonics_to_degree_4(*(2 * v - 1 for v in point))[:9] for point in x.tolist()]
    close(module(x), [network(row, params, 2, SMALL) for row in rows], 1e-5)


def test_padding_of_a_composite_is_its_last_parts():
    parts = [{"otype": "Identity"}, {**HASH, "n_dims_to_encode": 3}]
    module, x = with_encoding(5, 2, {"otype": "Composite", "nested": parts}, SMALL), draw(6, 5)
    params = refill(module)
    n_weights = 3 * 16 * 16
    rows = [[*p[:2], *grid(p[2:], params[n_weights:], HASH)] for p in x.tolist()]
    close(module(x), [network(row, params[:n_weights], 2, SMALL) for row in padded(rows, 0.0)], 1e-5)


@pytest.mark.parametrize("activation", ["Squareplus", "Softplus", "Sine", "Tanh"])
def test_both_derivatives(activation):
    config = {"otype": "CutlassMLP", "n_neurons": 3, "n_hidden_layers": 1, "activation": activation}
    module = with_encoding(2, 2, {"otype": "Frequency", "n_frequencies": 1}, config)

    def function(x, params):
        return module._network(module._encoder.encode(x, params[:0], 16), params)

    x = draw(3, 2).cpu().double().requires_grad_()
    params = torch.randn(module.params.numel(), dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(function, (x, params))
    torch.autograd.gradgradcheck(function, (x, params))


def test_gradients_of_a_whole_module():
    module, x = with_encoding(3, 3, HASH, SMALL), draw(50, 3).requires_grad_()
    params = torch.from_numpy(refill(module)).requires_grad_()
    x64, weights = x.detach().double().cpu().requires_grad_(), params[: 3 * 256]
    wanted = module._network(module._encoder.encode(x64, params[3 * 256 :], 16), weights)
    cotangent = torch.randn(50, 3)
    got = torch.autograd.grad(module(x), [x, module.params], cotangent.to(x))
    for a, b in zip(got, torch.autograd.grad(wanted, [x64, params], cotangent.double()), strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("n_hidden", [1, 3])
@pytest.mark.parametrize(("n_out", "output"), [(1, "None"), (3, "Sigmoid")])
def test_fused_where_nothing_is_differentiated(n_hidden, n_out, output, monkeypatch):
    config = {**SMALL, "n_hidden_layers": n_hidden, "output_activation": output}
    module, x = with_encoding(3, n_out, HASH, config), draw(50, 3)
    refill(module)
    calls, evaluate = [], fused.evaluate
    monkeypatch.setattr(fused, "evaluate", lambda *arguments: calls.append(1) or evaluate(*arguments))
    separate = module(x)
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(module(x), separate.detach(), rtol=1e-5, atol=1e-5)
    assert calls == [1]


def test_initial_values():
    module = with_encoding(3, 4, HASH, {**SMALL, "n_neurons": 64})
    layers = [64 * 16, 64 * 64, 16 * 64]
    *matrices, table = module.params.detach().cpu().split([*layers, module.params.numel() - sum(layers)])
    bounds = [(6 / 80) ** 0.5, (6 / 128) ** 0.5, (6 / 80) ** 0.5, 1e-4]
    for values, bound in zip([*matrices, table], bounds, strict=True):
        assert values.abs().max() <= bound
        assert abs(values.mean()) < 0.1 * bound
        assert abs(values.std() / bound - 3**-0.5) < 0.03
    sines = tcnn.Network(16, 16, {**SMALL, "activation": "Sine"}).params.detach().cpu().split(256)
    for values, bound in zip(sines, [30 / 16, (6 / 16) ** 0.5, (6 / 16) ** 0.5], strict=True):
        assert 0.9 * bound < values.abs().max() <= bound


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"otype": "ResNet"}, r"network_config\['otype'\] must be one of FullyFusedMLP, .*, got 'ResNet'"),
        (
            {"otype": "FullyFusedMLP", "n_neurons": 48},
            r"\['n_neurons'\] must be 16, 32, 64 or 128 .*, got 48; use",
        ),
        ({"otype": "FullyFusedMLP", "n_hidden_layers": 0}, r"\['n_hidden_layers'\] must be a whole number in \[1, "),
        ({"n_neurons": 1.5}, r"\['n_neurons'\] must be a whole number"),
        ({"activation": "GELU"}, r"\['activation'\] must be one of None, ReLU, .*, got 'GELU'"),
        ({"output_activation": None}, r"\['output_activation'\] must be one of None, ReLU, .*, got None"),
    ],
)
def test_bad_networks(config, message):
    with pytest.raises(ValueError, match=message):
        tcnn.Network(3, 3, config)


def test_numbers_of_numpy_are_numbers():
    config = {"n_neurons": np.int64(20), "n_hidden_layers": 2.0}
    assert tcnn.Network(3, 3, config).params.shape == (20 * 16 + 400 + 16 * 20,)
    assert tcnn.Network(np.int64(3), np.int32(2), config).n_output_dims == 2
