"""ops.geglu: CPU path, registered form and Triton kernels against the reference."""

import random

import pytest
import torch
from threads import by_threads
from tolerances import close, within_flash_rule
from torch.utils.checkpoint import checkpoint
from triton_on_cpu import CAMPAIGN, DEVICE, DRAWN

from mvdream_fast.ops import geglu, geglu_ref
from mvdream_fast.ops.geglu import _GEGLU


def draw(shape, *, dtype=torch.float32, layout="plain", seed=0, device="cpu"):
    """x, a leaf that wants its gradient, and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    *rows, width = shape
    if layout == "transposed":
        x = torch.randn(width, *rows, generator=generator).movedim(0, -1)
    elif layout == "every other":
        x = torch.randn(*rows, 2 * width, generator=generator)[..., ::2]
    elif layout == "stride 0":
        x = torch.randn(*([1] * len(rows)), width, generator=generator).expand(shape)
    else:
        x = torch.randn(shape, generator=generator)
    d_y = torch.randn(*rows, width // 2, generator=generator)
    return x.to(device=device).to(dtype).detach().requires_grad_(), d_y.to(device=device).to(dtype)


def run(function, x, d_y):
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, d_y)[0]


LAYOUTS = ["plain", "transposed", "every other", "stride 0"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 10), (0, 8), (3, 0)])
def test_cpu_path_matches_reference(shape, layout):
    x, d_y = draw(shape, layout=layout)
    for result, expected in zip(run(geglu, x, d_y), run(geglu_ref, x, d_y)):
        close("geglu", result, expected)
    assert geglu(x).is_contiguous()


@pytest.mark.parametrize("shape", [(1, 2), (7, 2 * 63), (3, 5, 2 * 100), (130, 2 * 264)])
def test_native_sizes_and_threads(shape):
    x, d_y = draw(shape, seed=1)
    first, *others = by_threads(lambda: run(geglu, x, d_y))
    for result, expected in zip(first, run(geglu_ref, x, d_y)):
        close("geglu", result, expected)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_native_gelu_over_the_range_of_gates():
    gate = torch.linspace(-15, 15, 30001)
    x = torch.cat([torch.ones_like(gate), gate])[None].requires_grad_()
    y, d_x = run(geglu, x, torch.ones(1, len(gate)))
    exact, d_exact = run(geglu_ref, x.detach().double().requires_grad_(), torch.ones(1, len(gate)).double())
    assert (y - exact).abs().max() < 5e-7  # half an ulp at 15 is 4.8e-7
    assert (d_x - d_exact).abs().max() < 5e-7
    assert geglu(torch.tensor([[1.0, 1.0, float("nan"), 65504.0]])).isnan().tolist() == [[True, False]]


def test_second_derivatives_of_the_native_path():
    x = draw((2, 6))[0]
    results = []
    for function in (geglu, geglu_ref):
        (d_x,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(d_x.square().sum(), x)[0])
    torch.testing.assert_close(*results)


def test_worked_by_hand():
    # gelu(0) = 0, gelu(1) = Phi(1) = 0.841345, gelu(-1) = -0.158655
    x = torch.tensor([[2.0, 3.0, 10.0, 0.0, 1.0, -1.0]])
    assert geglu(x).flatten().tolist() == pytest.approx([0.0, 3 * 0.8413447, -1.5865526], abs=1e-6)


def test_gradients_in_float64():
    x = draw((3, 8), dtype=torch.float64)[0]
    assert torch.autograd.gradcheck(geglu, x)
    assert torch.autograd.gradcheck(torch.ops.mvdream_fast.geglu, x)


def check_case(case):
    rng = random.Random(case)
    rows = [rng.randint(0 if rng.random() < 0.05 else 1, 7) for _ in range(rng.randint(1, 3))]
    x, d_y = draw(
        (*rows, 2 * rng.choice([1, 2, 3, 5, 8, 31, 64, 100])),
        dtype=rng.choice([torch.float32, torch.float16, torch.bfloat16]),
        layout=rng.choice(LAYOUTS),
        seed=case,
        device=DEVICE,
    )
    results, plain = run(_GEGLU.apply, x, d_y), run(geglu_ref, x, d_y)
    exact = run(geglu_ref, x.detach().double().requires_grad_(), d_y.double())
    for result, p, e in zip(results, plain, exact):
        within_flash_rule(result, p, e)


@pytest.mark.parametrize("case", DRAWN)
def test_kernels_follow_the_flash_rule(case):
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CAMPAIGN)
def test_kernels_follow_the_flash_rule_campaign(case):
    check_case(case)


def test_kernels_with_rows_longer_than_a_block():
    x, d_y = draw((2, 2 * 1030), device=DEVICE)
    for result, expected in zip(run(_GEGLU.apply, x, d_y), run(geglu_ref, x, d_y)):
        close("geglu", result, expected)


def test_kernels_hold_the_largest_float16():
    x = torch.tensor([[1.0, 2.0, 65504.0, -65504.0]], dtype=torch.float16, device=DEVICE, requires_grad=True)
    y, d_x = run(_GEGLU.apply, x, torch.ones(1, 2, dtype=torch.float16, device=DEVICE))
    assert y.flatten().tolist() == [65504.0, 0.0]
    assert d_x.flatten().tolist() == [65504.0, 0.0, 1.0, 0.0]


def test_kernels_repeat_bit_for_bit():
    x, d_y = draw((5, 14), dtype=torch.float16, device=DEVICE)
    first = run(_GEGLU.apply, x, d_y)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(_GEGLU.apply, x, d_y)))


@pytest.mark.parametrize("function", [geglu, _GEGLU.apply])
def test_gradient_checkpointing(function):
    x, d_y = draw((5, 14), device=DEVICE)
    again = run(lambda x: checkpoint(function, x, use_reentrant=False), x, d_y)
    assert all(torch.equal(a, b) for a, b in zip(run(function, x, d_y), again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype(dtype):
    with torch.autocast("cpu", torch.bfloat16):
        assert geglu(torch.randn(3, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 10), (0, 8)])
def test_opcheck(shape, layout):
    results = torch.library.opcheck(torch.ops.mvdream_fast.geglu.default, (draw(shape, layout=layout)[0],))
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_to_one_graph():
    x, d_y = draw((4, 6, 16))
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    for result, expected in zip(run(compiled, x, d_y), run(geglu, x, d_y)):
        close("geglu", result, expected)


def test_vmap_is_refused():
    with pytest.raises(RuntimeError, match="geglu: arguments must be plain tensors, got a vmapped one"):
        torch.func.vmap(geglu)(torch.randn(3, 4, 8))
    with pytest.raises(RuntimeError, match="geglu: arguments must be plain tensors, got a vmapped one"):
        torch.func.vmap(torch.func.grad(lambda x: geglu(x).sum()))(torch.randn(3, 4, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_rounds_low_precision_once(dtype):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact, limits = geglu_ref(x.double()), torch.finfo(dtype)
    one_rounding = 0.51 * limits.eps * exact.abs() + limits.tiny * limits.eps
    assert ((geglu(x) - exact).abs() <= one_rounding).all()
    x = torch.tensor([60000.0, 17 * 2.0**-24], dtype=torch.float16)  # half the gate lies between two float16 numbers
    assert geglu(x).item() == pytest.approx(geglu_ref(x.float()).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.zeros(3, 7), ValueError, r"x must be \[..., 2C\], got \(3, 7\)"),
        (torch.zeros(()), ValueError, r"x must be \[..., 2C\], got \(\)"),
        (torch.zeros(3, 8).long(), TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int64"),
    ],
)
def test_bad_arguments(x, error, text):
    with pytest.raises(error, match=f"geglu: {text}"):
        geglu(x)
