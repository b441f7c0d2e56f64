"""Triton kernels where an argument is at the edge of what is allowed: scales of zero, counts beyond 2^31, odd strides.

The ops' own test files compare the kernels with the references on everything else.
"""

import pytest
import torch
import triton
import triton.language as tl
from mvdream_fast.kernels import cross_view_attention as kernels
from mvdream_fast.kernels import group_norm_silu
from mvdream_fast.kernels.group_norm_silu import group_size
from tolerances import close
from triton_on_cpu import DEVICE, SMALL, SMALL_AHEAD

from mvdream_fast.ops import cross_view_attention_ref

VIEWS = 2


def by_reference(rows, cameras, d_out, scale):
    """out, and the gradients of q, k, v and the camera rows."""
    leaves = [x.detach().requires_grad_() for x in (*rows, *cameras)]
    named = dict(zip(("camera_q", "camera_k", "camera_v"), leaves[3:]))
    out = cross_view_attention_ref(*leaves[:3], VIEWS, **named, scale=scale)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


def by_kernels(rows, cameras, d_out, scale, tile=SMALL):
    cameras = cameras or (None, None, None)
    out, lse = kernels.forward(*rows, VIEWS, *cameras, scale, tile=tile)
    grads = kernels.backward(d_out, *rows, out, lse, VIEWS, *cameras, scale, tile=tile)
    return out, *(g for g in grads if g is not None)


def draw(tokens, width, heads=2, seed=0):
    """Slices of one packed projection, camera rows and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * VIEWS, tokens, 3, heads, width, generator=generator).to(DEVICE).unbind(2)
    cameras = [torch.randn(2 * VIEWS, heads, width, generator=generator).to(DEVICE) for _ in range(3)]
    return rows, cameras, torch.randn(2 * VIEWS, tokens, heads, width, generator=generator).to(DEVICE)


@pytest.mark.parametrize("tile", [SMALL, SMALL_AHEAD], ids=["small", "ahead"])
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-30])
@pytest.mark.parametrize("tokens", [16, 24, 21])  # even tiles; a view across tiles; a tile that is not full
def test_a_scale_of_zero_is_a_mean_over_all_keys(tokens, scale, tile):
    rows, cameras, d_out = draw(tokens, 16)
    results = by_kernels(rows, cameras, d_out, scale, tile)
    for out, ref in zip(results, by_reference(rows, cameras, d_out, scale), strict=True):
        assert torch.isfinite(out).all()
        close("cross_view_attention", out, ref)
    means = (rows[2] + cameras[2][:, None]).unflatten(0, (2, VIEWS)).mean((1, 2))
    close("cross_view_attention", results[0], means.repeat_interleave(VIEWS, 0)[:, None].expand_as(results[0]))
    assert not any(g.any() for g in (*results[1:3], *results[4:6])) or scale > 0


@pytest.mark.parametrize("with_cameras", [True, False])
@pytest.mark.parametrize("tokens", [16, 21])
@pytest.mark.parametrize("width", [40, 24, 20])  # rows that start at 16 bytes and are padded; rows that do not
def test_padded_heads(width, tokens, with_cameras):
    rows, cameras, d_out = draw(tokens, width)
    cameras = cameras if with_cameras else []
    results = by_kernels(rows, cameras, d_out, width**-0.5)
    for out, ref in zip(results, by_reference(rows, cameras, d_out, width**-0.5), strict=True):
        close("cross_view_attention", out, ref)


def test_rows_are_aligned_only_where_every_stride_is():
    packed = torch.empty(2, 8, 3, 5, 40, dtype=torch.float16)
    rows = packed[:, :, 0].stride()
    assert kernels._align(2, rows, rows, None) == 8
    assert kernels._align(4, rows, rows) == 4
    assert kernels._align(2, packed[:, :, 0, :, :20].stride()) == 8  # its strides are still those of 40
    assert kernels._align(2, packed[:, :, 0, :, ::2].stride()) == 1  # numbers that do not follow each other
    odd = torch.empty(2, 8, 5, 20).stride()
    assert kernels._align(2, odd) == 1
    assert kernels._align(2, rows, odd) == 1  # one tensor is enough


def test_what_is_not_kept_changes_nothing_else():
    rows, cameras, _ = draw(21, 16)
    for tile in (SMALL, SMALL_AHEAD):
        out, lse = kernels.forward(*rows, VIEWS, *cameras, 0.25, tile=tile)
        lean, nothing = kernels.forward(*rows, VIEWS, *cameras, 0.25, tile=tile, keep=False)
        assert torch.equal(out, lean)
        assert lse is not None
        assert nothing is None
    x, weight = torch.randn(2, 6, 3, 5).to(DEVICE), torch.randn(6).to(DEVICE)
    y, mean, rstd = group_norm_silu.forward(x, weight, weight, 3, 1e-5, None, True)
    lean, *nothing = group_norm_silu.forward(x, weight, weight, 3, 1e-5, None, True, False)
    assert torch.equal(y, lean)
    assert torch.allclose(mean, x.reshape(2, 3, -1).mean(-1), atol=1e-6)
    assert nothing == [None, None]
    assert rstd is not None


@triton.jit
def write_group_size(out, size, pixels):
    tl.store(out, group_size(size, pixels))


@pytest.mark.parametrize(("size", "pixels"), [(2, 3), (1, 1), (1, 2**31 - 1), (64, 2**26), (40, 2**26), (320, 2**25)])
def test_the_size_of_a_group_passes_two_to_the_31(size, pixels):
    out = torch.zeros(1, device=DEVICE)
    write_group_size[(1,)](out, size, pixels)
    assert out.item() == torch.tensor(float(size * pixels)).item()
