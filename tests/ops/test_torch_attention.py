"""torch's attention as it is used: both of its forms against the score matrix in float64."""

import pytest
import torch

from mvdream_fast.ops import _torch_attention
from mvdream_fast.ops._torch_attention import torch_attention


def inputs(dtype, *sizes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 16, generator=g).to(dtype).requires_grad_() for n in sizes]


def in_float64(q, k, v, scale):
    return ((q.double() @ k.double().transpose(-1, -2)) * scale).softmax(-1) @ v.double()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_values_and_gradients(dtype, error, scale):
    ours, theirs = inputs(dtype, 20, 7, 7), inputs(dtype, 20, 7, 7)
    out, expected = torch_attention(*ours, scale), in_float64(*theirs, 0.25 if scale is None else scale)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=error, atol=error)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(direction.to(dtype))
    expected.backward(direction.to(dtype).double())
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x.grad.double(), y.grad.double(), rtol=2 * error, atol=2 * error)


def large(dtype, width=64):
    """Scores of up to 40, where bfloat16's neighbours are 1/4 apart."""
    g = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(1, 2, 256, width, generator=g) * scale for scale in (3, 3, 1, 1))
    assert 25 < float((q @ k.transpose(-1, -2)).abs().max()) * width**-0.5 < 50
    return [x.bfloat16().to(dtype) for x in (q, k, v, d_out)]


def result_and_gradients(function, *tensors):
    *inputs, d_out = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, inputs, d_out))]


@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize("autocast", [False, True])
def test_large_scores_are_not_rounded_to_bfloat16(width, autocast):
    """As far from float64 as torch's attention is, whose results and gradients are 0.002 and 0.005 off."""
    tensors, wide = large(torch.bfloat16, width), large(torch.float64, width)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = result_and_gradients(torch_attention, *tensors)
        torchs = result_and_gradients(torch.nn.functional.scaled_dot_product_attention, *tensors)
    exact = result_and_gradients(lambda *x: in_float64(*x, width**-0.5), *wide)
    off, theirs = ([float((a - b).norm() / b.norm()) for a, b in zip(x, exact)] for x in (ours, torchs))
    assert max(off) < 0.005
    assert all(a < 1.5 * b for a, b in zip(off, theirs)), (off, theirs)


def test_every_way_of_written_out_scores_is_the_same():
    """A graph, torch.func and second derivatives, which go without our own backward."""
    q, k, v, d_out = large(torch.bfloat16)
    out, *gradients = result_and_gradients(torch_attention, q, k, v, d_out)
    compiled = torch.compile(torch_attention, fullgraph=True, backend="aot_eager")
    _, pull = torch.func.vjp(torch_attention, *(x.requires_grad_() for x in (q, k, v)))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    twice = torch.autograd.grad(torch_attention(*leaves), leaves, d_out, create_graph=True)
    ways = [result_and_gradients(compiled, q, k, v, d_out)[1:], pull(d_out), twice]
    for way in ways:
        for got, wanted in zip(way, gradients, strict=True):
            assert float((got.detach().double() - wanted).norm() / wanted.norm()) < 0.005
    with torch.no_grad():
        assert float((torch_attention(q, k, v).double() - out).norm() / out.norm()) < 0.005
    (d_k,) = torch.autograd.grad(twice[0].float().square().mean(), leaves[1])
    assert bool(d_k.isfinite().all())


def test_gradients_that_are_not_wanted_are_left_out():
    q, k, v, d_out = large(torch.bfloat16)
    wanted = result_and_gradients(torch_attention, q, k, v, d_out)[1:]
    for i in range(3):
        tensors = [q, k, v]
        tensors[i] = tensors[i].clone().requires_grad_()
        (got,) = torch.autograd.grad(torch_attention(*tensors), tensors[i], d_out)
        assert torch.equal(got.double(), wanted[i])


def test_scores_are_written_out_only_where_that_is_faster_and_fits(monkeypatch):
    q, k, v = inputs(torch.bfloat16, 20, 7, 7)
    assert _torch_attention._by_products(q, k, v)
    with torch.no_grad():
        assert not _torch_attention._by_products(q, k, v)
    assert not _torch_attention._by_products(q.detach(), k.detach(), v.detach())
    assert not _torch_attention._by_products(q.float(), k.float(), v.float())
    monkeypatch.setattr(_torch_attention, "MOST_SCORES", 2 * 3 * 20 * 7 - 1)
    assert not _torch_attention._by_products(q, k, v)
