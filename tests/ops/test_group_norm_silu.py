"""ops.group_norm_silu: CPU path, registered form and Triton kernels against the reference."""

import random

import pytest
import torch
from threads import by_threads
from tolerances import close, within_flash_rule
from torch.utils.checkpoint import checkpoint
from triton_on_cpu import CAMPAIGN, DEVICE, DRAWN

from mvdream_fast.ops import group_norm_silu, group_norm_silu_ref
from mvdream_fast.ops.group_norm_silu import _GroupNormSiLU

OP = "group_norm_silu"
NAMES = ("x", "weight", "bias", "emb")


def draw(shape, *, emb=True, dtype=torch.float32, layout="plain", offset=0.0, seed=0, device="cpu", wide=True):
    """x, weight, bias and perhaps emb, leaves that want gradients, and a cotangent; float32 parameters if `wide`."""
    generator = torch.Generator().manual_seed(seed)
    images, channels, height, width = shape
    x = torch.randn(shape, generator=generator) + offset
    d_y = torch.randn(shape, generator=generator)
    if layout == "channels_last":
        x, d_y = x.to(memory_format=torch.channels_last), d_y.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x, d_y = x.transpose(2, 3).contiguous().transpose(2, 3), d_y.to(memory_format=torch.channels_last)
    elif layout == "stride 0":
        x = x[:1].expand(shape)
    parameters = dtype if not wide else torch.promote_types(dtype, torch.float32)
    named = {
        "x": x.to(dtype),
        "weight": torch.randn(channels, generator=generator).to(parameters),
        "bias": torch.randn(channels, generator=generator).to(parameters),
    }
    if emb:
        named["emb"] = torch.randn(images, channels, generator=generator).to(dtype)
    return {n: a.to(device).detach().requires_grad_() for n, a in named.items()}, d_y.to(dtype).to(device)


def run(function, inputs, d_y, n_groups, silu=True):
    """The output and every gradient, by name."""
    y = function(inputs["x"], inputs["weight"], inputs["bias"], n_groups, 1e-5, inputs.get("emb"), silu)
    grads = torch.autograd.grad(y, list(inputs.values()), d_y)
    return {"y": y.detach()} | {f"d_{name}": g for name, g in zip(inputs, grads)}


def double(inputs):
    return {name: a.detach().double().requires_grad_() for name, a in inputs.items()}


LAYOUTS = ["plain", "channels_last", "transposed", "stride 0"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("emb", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_cpu_path_matches_reference(layout, emb, silu):
    inputs, d_y = draw((3, 12, 5, 7), layout=layout, emb=emb)
    results = run(group_norm_silu, inputs, d_y, 4, silu)
    for name, expected in run(group_norm_silu_ref, inputs, d_y, 4, silu).items():
        close(OP, results[name], expected)
    if layout == "channels_last":
        assert results["y"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("emb", [True, False])
@pytest.mark.parametrize("shape", [(1, 9, 1, 1), (2, 33, 7, 9), (3, 40, 5, 13), (2, 64, 32, 16)])
def test_native_sizes_and_threads(shape, emb, silu):
    groups = {9: 3, 33: 3}.get(shape[1], 8)
    inputs, d_y = draw(shape, layout="channels_last", emb=emb, seed=1)
    first, *others = by_threads(lambda: run(group_norm_silu, inputs, d_y, groups, silu))
    exact = run(group_norm_silu_ref, double(inputs), d_y.double(), groups, silu)
    size = {"d_weight": d_y[:, 0].numel() ** 0.5, "d_bias": d_y[:, 0].numel() ** 0.5, "d_emb": d_y[0, 0].numel() ** 0.5}
    for name, result in first.items():
        close(OP, result / size.get(name, 1), exact[name] / size.get(name, 1))
        assert all(torch.equal(result, other[name]) for other in others)


def test_native_takes_the_rows_of_a_wider_embedding():
    inputs, _ = draw((3, 8, 4, 4), layout="channels_last")
    x, weight, bias, emb = (a.detach() for a in inputs.values())
    expected = group_norm_silu(x, weight, bias, 2, emb=emb)
    wide = torch.randn(3, 20)
    wide[:, 5:13] = emb
    assert torch.equal(group_norm_silu(x, weight, bias, 2, emb=wide[:, 5:13]), expected)
    columns = emb.t().contiguous().t()
    assert torch.equal(group_norm_silu(x, weight, bias, 2, emb=columns), expected)
    shared = emb[:1].expand(3, -1)
    close(OP, group_norm_silu(x, weight, bias, 2, emb=shared), group_norm_silu_ref(x, weight, bias, 2, emb=shared))


def test_second_derivatives_of_the_native_path():
    inputs, d_y = draw((2, 6, 3, 5), layout="channels_last")
    results = []
    for function in (group_norm_silu, group_norm_silu_ref):
        y = function(inputs["x"], inputs["weight"], inputs["bias"], 2, 1e-5, inputs["emb"])
        (d_x,) = torch.autograd.grad(y, inputs["x"], d_y, create_graph=True)
        results.append(torch.cat([g.flatten() for g in torch.autograd.grad(d_x.square().sum(), list(inputs.values()))]))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_worked_by_hand():
    # One group of 0 and 2, after emb adds 1 and 3: values 1 and 5, mean 3, deviation 2, so -1 and 1.
    x, emb = torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1), torch.tensor([[1.0, 3.0]])
    weight, bias = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    y = group_norm_silu(x, weight, bias, 1, 1e-12, emb, silu=False)
    assert y.flatten().tolist() == pytest.approx([-0.5, 1.0])
    y = group_norm_silu(x, weight, bias, 1, 1e-12, emb)
    assert y.flatten().tolist() == pytest.approx([-0.5 / (1 + 2.718281828**0.5), 1 / (1 + 2.718281828**-1)])


@pytest.mark.parametrize("function", [group_norm_silu, _GroupNormSiLU.apply])
def test_a_large_mean_does_not_cancel(function):
    inputs, d_y = draw((2, 4, 8, 8), offset=3000.0, emb=False, device=DEVICE)
    result = run(function, inputs, d_y, 2)["y"]
    exact = run(group_norm_silu_ref, double(inputs), d_y.double(), 2)["y"]
    # An ulp of 3000 is 2.4e-4; a variance from the mean of squares would be wrong by 3000^2 * 6e-8 = 0.5.
    torch.testing.assert_close(result.double(), exact, atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)])
@pytest.mark.parametrize("function", [group_norm_silu, _GroupNormSiLU.apply])
def test_empty(shape, function):
    inputs, d_y = draw(shape)
    results = run(function, inputs, d_y, 2)
    assert results["y"].shape == shape
    assert all(results[f"d_{name}"].shape == a.shape and not results[f"d_{name}"].any() for name, a in inputs.items())


def registered(x, weight, bias, n_groups, eps, emb, silu):
    return torch.ops.mvdream_fast.group_norm_silu(x, weight, bias, n_groups, eps, emb, silu)[0]


@pytest.mark.parametrize("function", [group_norm_silu, registered])
def test_gradients_in_float64(function):
    inputs, _ = draw((2, 4, 2, 3), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w, b, e: function(x, w, b, 2, 1e-5, e, True), tuple(inputs.values()))


def error_terms(inputs, d_y, n_groups, silu):
    """The largest sums of absolute terms behind each result, in float64.

    The normalised value is itself a difference, of value and mean; in a group of one pixel nothing is left of it, and
    the deviation is that of eps.
    """
    x = double(inputs)
    one, zero = torch.ones_like(x["weight"]), torch.zeros_like(x["bias"])
    xhat = group_norm_silu_ref(x["x"], one, zero, n_groups, 1e-5, x.get("emb"), False)
    z = xhat * x["weight"][:, None, None] + x["bias"][:, None, None]
    h = x["x"] + (x["emb"][:, :, None, None] if "emb" in x else 0)
    groups = h.unflatten(1, (n_groups, -1)).flatten(2)
    rstd = (groups.var(-1, correction=0) + 1e-5).rsqrt().repeat_interleave(h.shape[1] // n_groups, 1)[:, :, None, None]
    rounding = torch.finfo(torch.float32).eps / torch.finfo(inputs["weight"].dtype).eps  # the difference is in float32
    differences = xhat.abs() + 2 * h.abs() * rstd * rounding
    gate = torch.sigmoid(z)
    d_z = (d_y.double() * (gate * (1 + z * (1 - gate)) if silu else 1)).abs()
    sums = {"d_weight": (d_z * differences).sum((0, 2, 3)), "d_bias": d_z.sum((0, 2, 3))}
    affine = 3 * x["weight"].abs().max() + x["bias"].abs().max()
    d_x = rstd.max() * affine
    sums |= {"y": affine, "d_x": d_x, "d_emb": d_x * h[0, 0].numel() ** 0.5}
    return {name: s.max().item() for name, s in sums.items()}


def check_case(case):
    rng = random.Random(case)
    n_groups = rng.choice([1, 1, 2, 3])
    channels = n_groups * rng.choice([1, 2, 3, 5, 8, 10] + [70] * (case % 10 == 0))
    shape = (rng.choice([1, 1, 2]), channels, rng.randint(1, 9), rng.randint(1, 9))
    if case % 10 == 5:
        shape = (1, n_groups, 50, 43)  # more pixels than a block
    flags = {"emb": rng.random() < 0.6, "layout": rng.choice(LAYOUTS), "wide": rng.random() < 0.5}
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    inputs, d_y = draw(shape, dtype=dtype, seed=case, device=DEVICE, **flags)
    arguments = (n_groups, rng.random() < 0.7)
    results, plain = (
        run(_GroupNormSiLU.apply, inputs, d_y, *arguments),
        run(group_norm_silu_ref, inputs, d_y, *arguments),
    )
    exact = run(group_norm_silu_ref, double(inputs), d_y.double(), *arguments)
    terms = error_terms(inputs, d_y, *arguments)
    for name, result in results.items():
        within_flash_rule(result, plain[name], exact[name], terms[name])


@pytest.mark.parametrize("case", DRAWN)
def test_kernels_follow_the_flash_rule(case):
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CAMPAIGN)
def test_kernels_follow_the_flash_rule_campaign(case):
    check_case(case)


def test_kernels_keep_the_memory_format():
    inputs, d_y = draw((2, 8, 3, 5), layout="channels_last", device=DEVICE)
    results = run(_GroupNormSiLU.apply, inputs, d_y, 4)
    assert results["y"].stride() == results["d_x"].stride() == inputs["x"].stride()


def test_kernels_hold_large_float16_values():
    inputs, d_y = draw((1, 4, 4, 4), dtype=torch.float16, emb=False, device=DEVICE)
    inputs["x"] = (inputs["x"].detach() * 15000).requires_grad_()  # squares and sums pass 65504
    y = run(_GroupNormSiLU.apply, inputs, d_y, 2)["y"]
    exact = run(group_norm_silu_ref, double(inputs), d_y.double(), 2)["y"]
    torch.testing.assert_close(y.double(), exact, atol=2e-3, rtol=1e-3)


def test_kernels_repeat_bit_for_bit():
    inputs, d_y = draw((2, 3, 3, 5), dtype=torch.float16, device=DEVICE)
    first = run(_GroupNormSiLU.apply, inputs, d_y, 1)
    for _ in range(19):
        again = run(_GroupNormSiLU.apply, inputs, d_y, 1)
        assert all(torch.equal(a, again[name]) for name, a in first.items())


@pytest.mark.parametrize("function", [group_norm_silu, _GroupNormSiLU.apply])
def test_gradient_checkpointing(function):
    inputs, d_y = draw((2, 6, 3, 5), device=DEVICE)
    again = run(lambda *a: checkpoint(function, *a, use_reentrant=False), inputs, d_y, 2)
    assert all(torch.equal(a, again[name]) for name, a in run(function, inputs, d_y, 2).items())


def test_autocast_keeps_the_dtype():
    inputs, _ = draw((2, 6, 3, 5), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert group_norm_silu(inputs["x"], inputs["weight"], inputs["bias"], 3).dtype == torch.bfloat16
        assert group_norm_silu(inputs["x"].float(), inputs["weight"], inputs["bias"], 3).dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("emb", "silu"), [(True, True), (False, True), (True, False)])
def test_opcheck(layout, emb, silu):
    inputs, _ = draw((2, 6, 3, 5), layout=layout, emb=emb)
    arguments = (*(inputs[n] for n in NAMES[:3]), 3, 1e-5, inputs.get("emb"), silu)
    results = torch.library.opcheck(torch.ops.mvdream_fast.group_norm_silu.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("emb", [True, False])
def test_compiles_to_one_graph(emb):
    inputs, d_y = draw((2, 6, 3, 5), layout="channels_last", emb=emb)
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager")
    results = run(compiled, inputs, d_y, 3)
    for name, expected in run(group_norm_silu, inputs, d_y, 3).items():
        close(OP, results[name], expected)


def test_vmap_is_refused():
    with pytest.raises(RuntimeError, match="group_norm_silu: arguments must be plain tensors, got a vmapped one"):
        torch.func.vmap(lambda x: group_norm_silu(x, torch.ones(4), torch.ones(4), 2))(torch.randn(3, 2, 4, 5, 5))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(4, 8)}, ValueError, r"x must be \[B\*V, C, h, w\], got \(4, 8\)"),
        ({"n_groups": 3}, ValueError, "n_groups must divide the 8 channels, got 3"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must be \[C\] = \[8\], got \(7,\)"),
        ({"weight": torch.zeros(8).half()}, TypeError, "weight must be torch.float32 .* or float32, got torch.float16"),
        ({"emb": torch.zeros(8)}, ValueError, r"emb must be \[B\*V, C\] = \[2, 8\], got \(8,\)"),
        ({"emb": torch.zeros(2, 8, device="meta")}, RuntimeError, "emb must be on the device of x, got meta and cpu"),
    ],
)
def test_bad_arguments(change, error, text):
    arguments = {"x": torch.zeros(2, 8, 3, 3), "weight": torch.ones(8), "bias": torch.zeros(8), "n_groups": 4} | change
    with pytest.raises(error, match=f"group_norm_silu: {text}"):
        group_norm_silu(**arguments)
