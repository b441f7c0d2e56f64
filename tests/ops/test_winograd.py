"""ops.winograd: the convolution against torch's in float64, and where the models use it."""

import pytest
import torch
import torch.nn.functional as F
from threads import by_threads
from torch import nn

from mvdream_fast.models import functional as fn
from mvdream_fast.ops import winograd_conv3x3, winograd_conv3x3_ref, winograd_pays

LARGEST_ERROR = 3e-5  # of outputs of order 1: the transforms multiply rounding errors, by up to 20 times


def draw(batch, n_in, n_out, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_in, height, width, generator=generator)
    weight = torch.randn(n_out, n_in, 3, 3, generator=generator) / (9 * n_in) ** 0.5
    bias = torch.randn(n_out, generator=generator)
    return *(a.to(memory_format=torch.channels_last) for a in (x, weight)), bias


def exact(x, weight, bias):
    return F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)


SHAPES = [
    (2, 5, 7, 9, 6),
    (1, 64, 32, 8, 8),
    (3, 16, 24, 4, 12),
    (1, 3, 9, 1, 2),
    (2, 40, 33, 7, 11),
    (1, 320, 64, 4, 4),
    (2, 100, 21, 4, 17),  # weights in two pieces, the last of them odd; 10 tiles
    (5, 33, 50, 20, 15),  # 100 tiles, a chunk of 64 and one of 36
]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch_on_any_number_of_threads(shape):
    x, weight, bias = draw(*shape)
    y, *others = by_threads(lambda: winograd_conv3x3(x, weight, bias))
    assert (y - exact(x, weight, bias)).abs().max() < LARGEST_ERROR
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, winograd_conv3x3_ref(x, weight, bias), atol=LARGEST_ERROR, rtol=0)
    assert all(torch.equal(y, other) for other in others)


def test_worked_by_hand():
    # All ones: each output counts the pixels of its 3x3 window that lie in the image, for each of two channels.
    y = winograd_conv3x3(torch.ones(1, 2, 4, 5), torch.ones(1, 2, 3, 3), torch.tensor([0.5]))
    rows, columns = torch.tensor([2.0, 3, 3, 2]), torch.tensor([2.0, 3, 3, 3, 2])
    torch.testing.assert_close(y[0, 0], 2 * rows[:, None] * columns + 0.5, atol=1e-5, rtol=0)


def test_any_layout_and_no_bias():
    x, weight, _ = draw(2, 6, 8, 5, 7)
    for a, w in (
        (x.contiguous(), weight.contiguous()),
        (x.transpose(2, 3), weight),
        (x[:1].expand(3, -1, -1, -1), weight),
    ):
        assert (winograd_conv3x3(a, w) - exact(a, w, None)).abs().max() < LARGEST_ERROR


@pytest.mark.parametrize("shape", [(0, 4, 8, 8, 8), (2, 4, 8, 0, 8), (2, 4, 0, 8, 8), (2, 0, 4, 8, 8)])
def test_empty(shape):
    x, weight, bias = draw(*shape)
    expected = bias[:, None, None].expand(shape[0], shape[2], *shape[3:])
    assert torch.equal(winograd_conv3x3(x, weight, bias), expected)


def test_inputs_are_not_written_to():
    inputs = draw(1, 8, 8, 8, 8)
    copies = [a.clone() for a in inputs]
    winograd_conv3x3(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(1, 4, 8, 8).double()}, TypeError, "x must be float32, got torch.float64"),
        ({"x": torch.zeros(1, 4, 8, 8, device="meta")}, RuntimeError, "x must be a plain CPU tensor, got one on meta"),
        ({"x": torch.zeros(1, 5, 8, 8)}, ValueError, r"x and weight must be \[B\*V, C, h, w\]"),
        ({"weight": torch.zeros(6, 4, 1, 1)}, ValueError, "x and weight must be"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[6\], got \(5,\)"),
    ],
)
def test_bad_arguments(change, error, text):
    arguments = {"x": torch.zeros(1, 4, 8, 8), "weight": torch.zeros(6, 4, 3, 3), "bias": torch.zeros(6)} | change
    with pytest.raises(error, match=f"winograd_conv3x3: {text}"):
        winograd_conv3x3(**arguments)


def test_vmap_is_refused():
    x, weight, bias = draw(3, 4, 4, 8, 8)
    with pytest.raises(RuntimeError, match="winograd_conv3x3: arguments must be plain tensors, got a vmapped one"):
        torch.func.vmap(lambda x: winograd_conv3x3(x, weight, bias))(x[:, None])


def test_torchs_defaults_change_nothing():
    inputs = draw(2, 32, 40, 8, 8)
    expected = winograd_conv3x3(*inputs)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(winograd_conv3x3(*inputs), expected)
            x, weight = (a.requires_grad_() for a in inputs[:2])
            d_x, d_weight = torch.autograd.grad(winograd_conv3x3(x, weight), (x, weight), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert d_x.dtype == d_weight.dtype == torch.float32
    assert d_x.device.type == "cpu"


def test_several_cotangents_at_once():
    x, weight, bias = (a.requires_grad_() for a in draw(2, 32, 40, 8, 8))
    d_y = torch.randn(3, 2, 40, 8, 8)
    y = winograd_conv3x3(x, weight, bias)
    together = torch.autograd.grad(y, (x, weight, bias), d_y, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        one = torch.autograd.grad(y, (x, weight, bias), d_y[i], retain_graph=True)
        assert all((a[i] - b).abs().max() < 1e-4 * b.abs().max() for a, b in zip(together, one, strict=True))


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Conv2d(32, 40, 3, padding=1).to(memory_format=torch.channels_last)


@pytest.fixture
def x():
    return torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last)


def check_model_path(module, x):
    with torch.no_grad():
        y = fn.conv3x3(module, x)
    assert (y - exact(x, module.weight.detach(), module.bias.detach())).abs().max() < LARGEST_ERROR


@torch.no_grad()
def test_upsampling_of_the_model(module, x, monkeypatch):
    called = []
    monkeypatch.setattr(fn, "winograd_conv3x3", lambda *a: called.append(1) or winograd_conv3x3(*a))
    y = fn.upsample_conv(module, x)
    wide = F.interpolate(x, scale_factor=2.0, mode="nearest")
    assert (y - exact(wide, module.weight, module.bias)).abs().max() < LARGEST_ERROR
    assert called


def test_only_where_it_pays(module, x):
    weight, bias = module.weight.detach(), module.bias.detach()
    assert winograd_pays(x, weight, bias)
    assert not winograd_pays(x.contiguous(), weight, bias)
    assert not winograd_pays(x[:1], weight, bias)  # 4 tiles
    assert not winograd_pays(torch.randn(8, 32, 5, 5).to(memory_format=torch.channels_last), weight, bias)
    assert not winograd_pays(x.double(), weight.double(), bias.double())
    assert winograd_pays(x, module.weight, module.bias)  # recorded or not


def gradients(function, x, weight, bias, d_y):
    inputs = [a.detach().clone().requires_grad_() for a in (x, weight, bias) if a is not None]
    return torch.autograd.grad(function(*inputs), inputs, d_y)


@pytest.mark.parametrize("shape", [*SHAPES, (24, 96, 128, 8, 8), (2, 160, 144, 40, 40)])  # the last in two chunks
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_equal_torchs_on_any_number_of_threads(shape, with_bias):
    x, weight, bias = draw(*shape)
    bias = bias if with_bias else None
    d_y = torch.randn(shape[0], shape[2], *shape[3:], generator=torch.Generator().manual_seed(1))
    ours, *others = by_threads(lambda: gradients(winograd_conv3x3, x, weight, bias, d_y))
    in_float64 = [None if a is None else a.double() for a in (x, weight, bias, d_y)]
    exact = gradients(winograd_conv3x3_ref, *in_float64)
    # What the sums' terms add up to without their signs is what rounding errors are relative to.
    terms = gradients(winograd_conv3x3_ref, *(None if a is None else a.abs() for a in in_float64))
    for a, b, size in zip(ours, exact, terms, strict=True):
        assert ((a - b).abs() / size.max()).max() < LARGEST_ERROR / 10
    assert all(torch.equal(a, b) for other in others for a, b in zip(ours[:2], other[:2], strict=True))


def test_only_the_gradients_that_are_asked_for():
    x, weight, bias = draw(2, 32, 40, 8, 8)
    d_y = torch.randn(2, 40, 8, 8)
    expected = gradients(winograd_conv3x3, x, weight, bias, d_y)
    for i in range(3):
        inputs = [a.clone().requires_grad_(i == k) for k, a in enumerate((x, weight, bias))]
        (gradient,) = torch.autograd.grad(winograd_conv3x3(*inputs), inputs[i], d_y)
        assert torch.equal(gradient, expected[i])


@pytest.mark.parametrize("shape", [(0, 4, 8, 8, 8), (2, 4, 0, 8, 8), (2, 0, 4, 8, 8)])
def test_gradients_of_nothing(shape):
    x, weight, bias = draw(*shape)
    found = gradients(winograd_conv3x3, x, weight, bias, torch.ones(shape[0], shape[2], *shape[3:]))
    assert [g.shape for g in found] == [x.shape, weight.shape, bias.shape]
    assert not any(g.any() for g in found[:2])


def test_second_derivatives():
    x, weight, bias = (a.requires_grad_() for a in draw(2, 32, 40, 8, 8))

    def penalty(function):
        (d_x,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(d_x.square().sum(), (x, weight))

    for ours, torchs in zip(penalty(winograd_conv3x3), penalty(winograd_conv3x3_ref)):
        assert (ours - torchs).abs().max() < 1e-4 * torchs.abs().max()


def test_the_model_trains_by_it(module, x, monkeypatch):
    called = []
    monkeypatch.setattr(fn, "winograd_conv3x3", lambda *a: called.append(1) or winograd_conv3x3(*a))
    fn.conv3x3(module, x).square().sum().backward()
    ours, module.weight.grad = module.weight.grad, None
    module(x).square().sum().backward()
    assert called
    assert (ours - module.weight.grad).abs().max() < 1e-4 * module.weight.grad.abs().max()
    called.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert fn.conv3x3(module, x).dtype == torch.bfloat16
    assert not called


@torch.inference_mode()
def test_weights_of_inference_mode(x):
    module = nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)
    check_model_path(module, x.clone())
