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


def test_scores_are_written_out_only_where_that_is_faster_and_fits(monkeypatch):
    q, k, v = inputs(torch.bfloat16, 20, 7, 7)
    assert _torch_attention._by_products(q, k, v)
    with torch.no_grad():
        assert not _torch_attention._by_products(q, k, v)
    assert not _torch_attention._by_products(q.detach(), k.detach(), v.detach())
    assert not _torch_attention._by_products(q.float(), k.float(), v.float())
    monkeypatch.setattr(_torch_attention, "MOST_SCORES", 2 * 3 * 20 * 7 - 1)
    assert not _torch_attention._by_products(q, k, v)
