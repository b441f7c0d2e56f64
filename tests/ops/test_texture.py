"""texture: torch's grid_sample as an independent reference, mip levels by hand, gradients, threads, refusals."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from threads import by_threads
from tolerances import PARITY

from mvdream_fast.ops.texture import BOUNDARIES, FILTERS, texture, texture_ref

MODES = list(itertools.product(FILTERS, BOUNDARIES))


def scene(shape=(16, 32), n_textures=2, n_images=2, n_channels=3, seed=0):
    """tex, uv (some beyond [0, 1]) and uv_da of several levels."""
    generator = torch.Generator().manual_seed(seed)
    tex = torch.rand(n_textures, *shape, n_channels, generator=generator)
    uv = torch.rand(n_images, 9, 13, 2, generator=generator) * 3 - 1
    scales = 10 ** (torch.rand(n_images, 9, 13, 1, generator=generator) * 3 - 2.5)
    return tex, uv, torch.randn(n_images, 9, 13, 4, generator=generator) * scales


def outputs_and_gradients(tex, uv, uv_da, *modes):
    inputs = [x.detach().clone().requires_grad_() for x in (tex, uv, uv_da)]
    out = texture(*inputs, *modes)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    gradients = torch.autograd.grad(out, inputs, cotangent, allow_unused=True)
    return out.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs))


@pytest.mark.parametrize("shape", [(16, 32), (5, 7), (1, 1), (6, 1)])
@pytest.mark.parametrize("filter_mode", ["nearest", "linear"])
@pytest.mark.parametrize("boundary_mode", BOUNDARIES)
def test_against_grid_sample(filter_mode, boundary_mode, shape):
    tex, uv, _ = scene(shape)
    if boundary_mode == "wrap":  # which grid_sample has not: nine textures side by side
        given, places, padding = tex.repeat(1, 3, 3, 1), (uv + 1) / 3, "border"
    else:
        given, places, padding = tex, uv, {"clamp": "border", "zero": "zeros"}[boundary_mode]
    grid, mode = places.double() * 2 - 1, {"nearest": "nearest", "linear": "bilinear"}[filter_mode]
    given = given.permute(0, 3, 1, 2).double()
    wanted = F.grid_sample(given, grid, mode, padding, align_corners=False).permute(0, 2, 3, 1)
    got = texture(tex, uv, None, filter_mode, boundary_mode)
    if boundary_mode == "wrap" and filter_mode == "linear":
        inner = ((uv > -0.9) & (uv < 1.9)).all(-1)  # the nine end half a texel before their border
        inner &= torch.tensor(min(shape) > 4)
        got, wanted = got[inner], wanted[inner]
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-5)


def test_by_hand():
    tex = torch.tensor([[0.0, 1], [2, 3]])[None, ..., None]
    uv = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.5, 0.5], [0.25, 0.5], [0.0, 0.25], [1.25, 0.75]])[None, None]
    assert texture(tex, uv)[0, 0, :, 0].tolist() == [0, 1, 1.5, 1, 0.5, 2]
    assert texture(tex, uv, None, "linear", "clamp")[0, 0, :, 0].tolist() == [0, 1, 1.5, 1, 0, 3]
    assert texture(tex, uv, None, "linear", "zero")[0, 0, :, 0].tolist() == [0, 1, 1.5, 1, 0, 0]
    assert texture(tex, uv, None, "nearest", "wrap")[0, 0, :, 0].tolist() == [0, 1, 3, 2, 0, 2]


def test_levels_by_hand():
    """A footprint of 2^k texels shows level k, whichever way it lies; between them the mixture."""
    tex = torch.rand(1, 16, 16, 2, generator=torch.Generator().manual_seed(0))
    middle = torch.full((1, 1, 1, 2), 0.5)
    levels = [tex]
    while levels[-1].shape[1] > 1:
        levels.append(F.avg_pool2d(levels[-1].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))
    shown = [texture(level, middle, None, "linear", "clamp") for level in levels]
    for k in range(5):
        side = 2.0**k / 16
        for da in ([side, 0, 0, side], [side, 0, 0, 0], [0, 0, 0, -side], [side / 2, side / 2, side / 2, side / 2]):
            out = texture(tex, middle, torch.tensor(da).reshape(1, 1, 1, 4), "linear-mipmap-linear", "clamp")
            torch.testing.assert_close(out, shown[k], rtol=0, atol=1e-6)
    between = torch.tensor([2**1.25 / 16, 0, 0, 0]).reshape(1, 1, 1, 4)
    out = texture(tex, middle, between, "linear-mipmap-linear", "clamp")
    torch.testing.assert_close(out, 0.75 * shown[1] + 0.25 * shown[2], rtol=0, atol=1e-6)
    for scale, level in ((1e-6, 0), (0.0, 0), (1e6, 4)):
        out = texture(tex, middle, between * scale, "linear-mipmap-linear", "clamp")
        torch.testing.assert_close(out, shown[level], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("filter_mode", "boundary_mode"), MODES)
@pytest.mark.parametrize(("shape", "n_textures"), [((16, 32), 1), ((5, 7), 2), ((12, 1), 2), ((8, 20), 2)])
def test_parity(filter_mode, boundary_mode, shape, n_textures):
    arguments = scene(shape, n_textures)
    got = outputs_and_gradients(*arguments, filter_mode, boundary_mode)
    wanted = outputs_and_gradients(*(x.double() for x in arguments), filter_mode, boundary_mode)
    for name, a, b in zip(("texture", *["texture.gradients"] * 3), got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=PARITY[name], atol=PARITY[name] * max(1, float(b.abs().max())))


@pytest.mark.parametrize(("filter_mode", "boundary_mode"), [m for m in MODES if m[0] != "nearest"])
def test_gradients_of_the_reference_by_finite_differences(filter_mode, boundary_mode):
    tex, uv, uv_da = (x.double() for x in scene((8, 16), 1, 1))
    uv, uv_da = uv[:, :3, :4].clone().requires_grad_(), uv_da[:, :3, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *x: texture(*x, filter_mode, boundary_mode), (tex.requires_grad_(), uv, uv_da)
    )


def test_second_derivatives():
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in scene()]
        out = texture(*inputs, "linear-mipmap-linear")
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first[:2]), inputs))
    for got, wanted in zip(*results):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("n_textures", [1, 2])
def test_same_bits_for_any_number_of_threads(n_textures):
    results = by_threads(lambda: outputs_and_gradients(*scene(n_textures=n_textures), "linear-mipmap-linear"))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("filter_mode", FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coordinates_that_are_no_numbers_show_zeros(dtype, filter_mode):
    tex, uv, uv_da = (x.to(dtype) for x in scene())
    uv[0, 2, 3, 0], uv[1, 4, 5, 1] = math.nan, math.inf
    out, d_tex, d_uv, d_da = outputs_and_gradients(tex, uv, uv_da, filter_mode)
    assert not out[0, 2, 3].any()
    assert not out[1, 4, 5].any()
    assert all(x.isfinite().all() for x in (out, d_tex, d_uv, d_da))


def test_coordinates_far_away():
    tex, _, _ = scene()
    uv = torch.tensor([1e9, -1e9, 3e38, -3e38, 0.0]).reshape(1, 1, 5, 1).expand(2, 1, 5, 2)
    for boundary in BOUNDARIES:
        out = texture(tex, uv, None, "linear", boundary)
        torch.testing.assert_close(out.double(), texture(tex.double(), uv.double(), None, "linear", boundary))


@pytest.mark.parametrize(("n_images", "n_channels"), [(0, 3), (1, 0)])
@pytest.mark.parametrize("filter_mode", FILTERS)
def test_nothing(n_images, n_channels, filter_mode):
    tex, uv, uv_da = scene(n_textures=1, n_images=n_images, n_channels=n_channels)
    out, d_tex, d_uv, _ = outputs_and_gradients(tex, uv, uv_da, filter_mode)
    assert out.shape == (n_images, 9, 13, n_channels)
    assert not d_tex.any()
    assert not d_uv.any()


def test_strided_inputs():
    wanted = outputs_and_gradients(*scene(), "linear-mipmap-linear")
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in scene()]
    got = outputs_and_gradients(*strided, "linear-mipmap-linear")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_wrong_arguments_are_named():
    tex, uv, uv_da = scene()
    wrong = [
        ((tex[0], uv), ValueError, "texture: tex must be of shape"),
        ((tex.repeat(2, 1, 1, 1), uv), ValueError, "texture: tex must be of 1 or 2 images, got 4"),
        ((tex[:, :0], uv), ValueError, "texture: tex must be of at least one texel"),
        ((tex.double(), uv), TypeError, "texture: tex must be torch.float32 like uv"),
        ((tex, uv[..., :1]), ValueError, "texture: uv must be of shape"),
        ((tex, uv, None, "cubic"), ValueError, "texture: filter_mode must be one of nearest, linear"),
        ((tex, uv, None, "linear", "mirror"), ValueError, "texture: boundary_mode must be one of wrap, clamp, zero"),
        ((tex, uv, None, "linear-mipmap-linear"), ValueError, "texture: uv_da must be given"),
        ((tex, uv, uv_da[:, 1:], "linear-mipmap-linear"), ValueError, "texture: uv_da must be of shape"),
    ]
    for arguments, error, sentence in wrong:
        with pytest.raises(error, match=sentence):
            texture(*arguments)


def test_the_registered_form():
    tex, uv, uv_da = (x.requires_grad_() for x in scene((4, 4)))
    chain = torch.rand(2, 16 + 4 + 1, 3, requires_grad=True)
    op = torch.ops.mvdream_fast.texture.default
    torch.library.opcheck(op, (chain, uv, uv_da, 4, 4, 3, 2, 0))
    torch.library.opcheck(op, (tex.detach().reshape(2, 16, 3).requires_grad_(), uv, None, 4, 4, 1, 1, 1))
    assert texture_ref(chain, uv, uv_da, 4, 4, 3, 2, 0).shape == uv.shape[:3] + (3,)
