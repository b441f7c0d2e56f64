"""The modules as tiny-cuda-nn's callers meet them: attributes, precision, autocast, copies, files and bad input."""

import copy
import inspect
import pickle
import sys

import pytest
import torch
from reference.tcnn_formulas import DEVICE, draw, refill
from reference.waits import Waits

import mvdream_fast.tcnn_compat as tcnn

HASH = {"otype": "HashGrid", "n_levels": 4, "base_resolution": 4, "log2_hashmap_size": 8, "per_level_scale": 1.5}
MLP = {"otype": "FullyFusedMLP", "n_neurons": 16, "n_hidden_layers": 1}

MAKERS = {
    "Encoding": lambda **options: tcnn.Encoding(3, HASH, **options),
    "Network": lambda **options: tcnn.Network(3, 5, MLP, **options),
    "NetworkWithInputEncoding": lambda **options: tcnn.NetworkWithInputEncoding(3, 5, HASH, MLP, **options),
}
each_module = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def test_names_and_arguments():
    # As tiny-cuda-nn has them, in its order; `dtype` of the networks is ours.
    wanted = {
        "Encoding": ["n_input_dims", "encoding_config", "seed", "dtype"],
        "Network": ["n_input_dims", "n_output_dims", "network_config", "seed", "dtype"],
        "NetworkWithInputEncoding": [
            "n_input_dims",
            "n_output_dims",
            "encoding_config",
            "network_config",
            "seed",
            "dtype",
        ],
    }
    for name, arguments in wanted.items():
        parameters = inspect.signature(getattr(tcnn, name)).parameters
        assert list(parameters) == arguments
        assert parameters["seed"].default == 1337
        assert parameters["dtype"].default is None
    assert set(tcnn.__all__) == {*wanted, "Module", "free_temporary_memory", "supports_jit_fusion"}
    assert tcnn.supports_jit_fusion() is False
    assert tcnn.free_temporary_memory() is None


@each_module
def test_attributes(make):
    module = make()
    module.jit_fusion = tcnn.supports_jit_fusion()
    assert isinstance(module, tcnn.Module)
    assert (module.n_input_dims, module.n_output_dims) == (3, 8 if isinstance(module, tcnn.Encoding) else 5)
    assert (module.seed, module.dtype, module.loss_scale) == (1337, torch.float16, 128.0)
    assert make(dtype=torch.float32).loss_scale == 1.0
    assert [name for name, _ in module.named_parameters()] == ["params"]
    assert (module.params.ndim, module.params.dtype, module.params.device.type) == (1, torch.float32, DEVICE)
    assert "n_input_dims=3" in repr(module)
    assert torch.equal(make(seed=5).params, make(seed=5).params)
    assert not torch.equal(make(seed=5).params, make(seed=6).params)


@each_module
def test_half_is_the_float_result_rounded(make):
    full, half, x = make(dtype=torch.float32), make(), draw(40, 3)
    refill(full)
    half.load_state_dict(full.state_dict())
    assert half(x).dtype == make(dtype=torch.float16)(x).dtype == torch.float16
    assert torch.equal(half(x), full(x).half())
    for dtype in (torch.float64, torch.bfloat16):
        assert half(x.to(dtype)).dtype == torch.float16


@each_module
def test_half_loses_no_gradient(make):
    # A cotangent that half precision has, times values of which it has not: nothing on the way is made in half.
    grads = []
    for dtype in (torch.float16, torch.float32):
        module, x = make(dtype=dtype), draw(20, 3).requires_grad_()
        with torch.no_grad():
            module.params.mul_(1e-3)
        (module(x).float() * 2.0**-20).sum().backward()
        grads.append(torch.cat([module.params.grad, x.grad.flatten()]))
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)


@each_module
def test_autocast_changes_nothing(make):
    module, x = make(dtype=torch.float32), draw(20, 3)
    refill(module)
    wanted = module(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(module(x), wanted)


@each_module
def test_copies_and_files(make, tmp_path):
    module, x = make(), draw(5, 3)
    refill(module)
    wanted = module(x)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    again = make(seed=3)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    for other in (again, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), wanted)
        assert other.params is not module.params


@each_module
def test_module_dtype_and_frozen_params(make):
    module, x = make(dtype=torch.float32), draw(5, 3)
    refill(module)
    wanted = module(x)
    torch.testing.assert_close(copy.deepcopy(module).half()(x), wanted, rtol=5e-3, atol=5e-3)
    assert torch.equal(copy.deepcopy(module).double()(x), wanted)
    module.requires_grad_(False)
    assert not module(x).requires_grad
    assert module(x.requires_grad_()).requires_grad


@each_module
@pytest.mark.parametrize("n", [0, 1, 257])
def test_any_batch_size(make, n):
    module, x = make(dtype=torch.float32), draw(300, 3)
    refill(module)
    assert module(x[:n]).shape == (n, module.n_output_dims)
    torch.testing.assert_close(module(x[:n]), module(x)[:n], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert module(x[:n]).shape == (n, module.n_output_dims)


@each_module
def test_strided_and_expanded_inputs(make):
    module, x = make(dtype=torch.float32), draw(6, 7)
    refill(module)
    assert torch.equal(module(x[::2, 1:7:2]), module(x[::2, 1:7:2].contiguous()))
    assert torch.equal(module(x[:1, :3].expand(4, 3)), module(x[:1, :3].repeat(4, 1)))


@each_module
def test_second_derivatives_of_the_input(make):
    module, x = make(dtype=torch.float32), draw(10, 3).requires_grad_()
    refill(module)
    (normal,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    normal.square().sum().backward()
    assert x.grad.isfinite().all()
    assert module.params.grad.isfinite().all()
    assert module.params.grad.abs().max() > 0


@pytest.mark.parametrize("interpolation", ["Linear", "Smoothstep"])
def test_waits_for_no_number(interpolation):
    config = {**HASH, "interpolation": interpolation}
    module, x = tcnn.NetworkWithInputEncoding(3, 5, config, MLP), draw(10, 3).requires_grad_()
    with Waits() as waits:
        module(x).sum().backward()
    # On a CPU a grid in plain torch asks whether there are NaN; on a GPU it does not.
    asked = DEVICE == "cpu" and interpolation == "Smoothstep"
    assert dict(waits.at) == ({"grid.py:values": 1} if asked else {})


@each_module
def test_compiles_whole(make):
    module, x = make(dtype=torch.float32), draw(10, 3)
    refill(module)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


def test_stands_for_tinycudann(monkeypatch):
    monkeypatch.setitem(sys.modules, "tinycudann", tcnn)
    from tinycudann import Encoding

    assert Encoding is tcnn.Encoding


@each_module
def test_bad_calls(make):
    module = make()
    for shape in ((5, 2), (5,), (2, 5, 3)):
        with pytest.raises(ValueError, match=r": x must be of shape \[any, 3\], got"):
            module(draw(*shape))
    with pytest.raises(TypeError, match="x must be float32, float16, bfloat16 or float64"):
        module(draw(5, 3).long())
    n = module.params.numel()
    module.params = torch.nn.Parameter(module.params.detach()[:-1])
    with pytest.raises(ValueError, match=rf": params must be of shape \[{n}\], got \[{n - 1}\]"):
        module(draw(5, 3))
    with pytest.raises(RuntimeError, match="x must be on the device of params"):
        make().to("meta")(draw(5, 3))


@pytest.mark.parametrize(
    ("dims", "config", "message"),
    [
        (
            3,
            {"otype": "Hash"},
            r"Encoding: encoding_config\['otype'\] must be one of Composite, .*, got 'Hash'",
        ),
        (5, {"otype": "HashGrid"}, r"\['otype'\] must be an encoding of 5 inputs, .*n_input_dims"),
        (2, {"otype": "SphericalHarmonics"}, r"\['otype'\] must be an encoding of 2 inputs, .*n_input_dims"),
        (3, {"otype": "SphericalHarmonics", "degree": 9}, r"\['degree'\] must be a whole number in \[1, 8\], got 9"),
        (
            3,
            {"otype": "HashGrid", "n_features_per_level": 3},
            r"\['n_features_per_level'\] must be 1, 2, 4 or 8",
        ),
        (3, {"otype": "HashGrid", "n_levels": "16"}, r"\['n_levels'\] must be a whole number in \[1, 128\], got '16'"),
        (3, {"otype": "HashGrid", "n_levels": 4, "n_features": 8}, r"\['n_features'\] must be missing where n_levels"),
        (
            3,
            {"otype": "HashGrid", "n_features": 7},
            r"\['n_features'\] must be a multiple of n_features_per_level",
        ),
        (3, {"otype": "HashGrid", "per_level_scale": float("nan")}, r"\['per_level_scale'\] must be a finite number"),
        (3, {"otype": "HashGrid", "per_level_scale": 0}, r"\['per_level_scale'\] must be above 0, got 0"),
        (3, {"otype": "HashGrid", "per_level_scale": 1e9}, r"\['per_level_scale'\] must be one of resolutions from 1"),
        (
            3,
            {"otype": "DenseGrid", "per_level_scale": 2},
            r"\['per_level_scale'\] must be .* fewer than 2\^32",
        ),
        (3, {"otype": "Grid", "type": "Sparse"}, r"\['type'\] must be one of Hash, Dense, Tiled, Tile, got 'Sparse'"),
        (3, {"otype": "Grid", "interpolation": "Cubic"}, r"\['interpolation'\] must be one of Nearest, Linear"),
        (3, {"otype": "Grid", "hash": "Rng"}, r"\['hash'\] must be one of CoherentPrime, Prime, ReversedPrime, got"),
        (
            3,
            {"otype": "Grid", "stochastic_interpolation": True},
            r"\['stochastic_interpolation'\] must be false",
        ),
        (3, {"otype": "OneBlob", "n_bins": 12}, r"\['n_bins'\] must be a power of 2, got 12"),
        (3, {"otype": "Frequency", "n_frequencies": True}, r"\['n_frequencies'\] must be a whole number"),
        (3, {"otype": "Identity", "scale": "2"}, r"\['scale'\] must be a finite number, got '2'"),
        (3, {"otype": "Composite"}, r"\['nested'\] must be a list of at least one encoding, got nothing; add them"),
        (3, {"otype": "Composite", "nested": "Grid"}, r"\['nested'\] must be a list of .*, got 'Grid'"),
        (0, {"otype": "Identity"}, "n_input_dims must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_encodings(dims, config, message):
    with pytest.raises(ValueError, match=message):
        tcnn.Encoding(dims, config)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="Encoding: dtype must be torch.float16, torch.float32 or None, got torch.bf"):
        tcnn.Encoding(3, HASH, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="Encoding: encoding_config must be a dict, got str; pass the JSON object"):
        tcnn.Encoding(3, "HashGrid")
    with pytest.raises(ValueError, match="Network: n_output_dims must be a whole number of at least 1, got 0"):
        tcnn.Network(3, 0, MLP)
    with pytest.raises(ValueError, match=r"NetworkWithInputEncoding: network_config\['otype'\] must be"):
        tcnn.NetworkWithInputEncoding(3, 1, HASH, {"otype": "Fused"})


def test_keys_of_others_pass():
    config = {**HASH, "start_level": 2, "update_steps": 500, "include_xyz": True}
    assert tcnn.Encoding(3, config).params.shape == tcnn.Encoding(3, HASH).params.shape
