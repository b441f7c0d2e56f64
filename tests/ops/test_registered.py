"""One declaration of an op: eager calls and graphs get the same function, gradients and refusals out of it."""

import pytest
import torch
from torch import Tensor

from mvdream_fast.ops._registered import differentiable, register

calls = []


def forward(x, weights, factor, bias):
    """(sum of the weighted x) * factor + bias, twice x for the backward, and nothing where there is no bias."""
    y = sum(x * w for w in weights) * factor + (0 if bias is None else bias)
    return y, 2 * x, None if bias is None else bias + 0


def backward(cotangents, kept, wanted, x, weights, factor, bias):
    calls.append((len(kept), [bool(want) for want in wanted]))
    (d_y,) = cotangents
    assert torch.equal(kept[0], 2 * x)
    d_weights = torch.stack([d_y * x * factor for _ in weights])  # views of one tensor
    return sum(d_y * w * factor for w in weights), *d_weights, None, None if bias is None else d_y + 0


def fake(x, weights, factor, bias):
    return torch.empty_like(x), torch.empty_like(x), None if bias is None else torch.empty_like(bias)


def eagerly(x, w, v, factor, bias):
    """The same with the list laid open, as an autograd.Function takes it."""
    return forward(x, [w, v], factor, bias)


def eager_backward(cotangents, kept, wanted, x, w, v, factor, bias):
    return backward(cotangents, kept, wanted, x, [w, v], factor, bias)


Eager = differentiable(eagerly, eager_backward, keeps=(1,))
Twice = differentiable(eagerly, eager_backward, keeps=(1,), twice=lambda *arguments: eagerly(*arguments)[:1])
register(
    "test_of_registered(Tensor x, Tensor[] weights, float factor, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    cpu=differentiable(forward, backward, keeps=(1,)),
    fake=fake,
)
op = torch.ops.mvdream_fast.test_of_registered


def numbers(shape=(2, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)]


@pytest.mark.parametrize("function", [Eager.apply, Twice.apply, lambda x, w, v, f, b: op(x, [w, v], f, b)[0]])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_by_hand(function, has_bias):
    x, w, v, bias = numbers()
    bias = bias if has_bias else None
    y = function(x, w, v, 3.0, bias)
    assert torch.equal(y, (x * w + x * v) * 3 + (bias if has_bias else 0))
    d_y = torch.ones_like(y)
    inputs = [x, w, v, *([bias] if has_bias else [])]
    gradients = torch.autograd.grad(y, inputs, d_y)
    for got, wanted in zip(gradients, [3 * (w + v), 3 * x, 3 * x, d_y]):
        torch.testing.assert_close(got, wanted.detach())


def test_what_is_not_wanted_is_said():
    x, w, v, _ = numbers()
    calls.clear()
    torch.autograd.grad(Eager.apply(x, w.detach(), v, 3.0, None).sum(), [x, v])
    torch.autograd.grad(op(x, [w.detach(), v], 3.0, None)[0].sum(), [x, v])
    assert calls == [(1, [True, False, True, False, False])] * 2


def test_second_derivatives_where_there_is_a_reference():
    x, w, v, _ = numbers()
    (d_x,) = torch.autograd.grad(Twice.apply(x, w, v, 3.0, None).sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(d_x.sum(), w)[0], torch.full_like(w, 3.0))
    (d_x,) = torch.autograd.grad(Eager.apply(x, w, v, 3.0, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_the_registered_form(has_bias, layout):
    def laid(x: Tensor) -> Tensor:
        x = x.detach()
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        return (x.transpose(1, 3) if layout == "transposed" else x).requires_grad_()

    x, w, v, bias = map(laid, numbers((2, 3, 4, 5)))
    results = torch.library.opcheck(op.default, (x, [w, v], 3.0, bias if has_bias else None))
    assert set(results.values()) == {"SUCCESS"}


def test_it_compiles_to_one_graph():
    x, w, v, bias = numbers()

    def loss(x, w, v, bias):
        return op(x, [w, v], 3.0, bias)[0].sin().sum()

    inputs = [x, w, v, bias]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(function(*inputs), inputs) for function in (compiled, loss)]
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted)
