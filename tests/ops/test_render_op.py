"""render: the pixels of march, prune and composite in a row, whatever the chunks, with rays ended early."""

import math
import sys

import pytest
import torch
from tolerances import PARITY

from mvdream_fast.ops.composite import composite
from mvdream_fast.ops.march_rays import march_rays, pack_bits, prune_samples
from mvdream_fast.ops.render import render, render_ref

BOX = (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0)
MODULE = sys.modules[render.__module__]  # `mvdream_fast.ops.render` as an attribute is the function
STEP = 1.732 * 2 / 512


def shell(positions):
    """A soft sphere with a colour that varies, computed point by point."""
    distance = positions.norm(dim=-1)
    return 60 * torch.sigmoid(40 * (0.5 - distance)), 0.5 + 0.5 * torch.sin(5 * positions)


def rays_around(n_rays, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rays_o = torch.nn.functional.normalize(torch.randn(n_rays, 3, generator=generator), dim=-1) * 2.5
    target = 0.4 * torch.randn(n_rays, 3, generator=generator)
    return rays_o, torch.nn.functional.normalize(target - rays_o, dim=-1)


def grid(share=0.5, resolution=32):
    return pack_bits(torch.rand(resolution**3, generator=torch.Generator().manual_seed(1)) < share)


def in_a_row(rays_o, rays_d, field, bits, background, alpha_thre, early_stop_eps):
    samples = march_rays(rays_o, rays_d, BOX, bits, 32, STEP)
    kept = prune_samples(samples, field(samples.positions(rays_o, rays_d))[0], alpha_thre, early_stop_eps)
    sigmas, rgb = field(kept.positions(rays_o, rays_d))
    return composite(
        sigmas, rgb, kept.t_starts, kept.t_ends, packed_info=kept.packed_info, background=background
    ), samples.n_samples


@pytest.mark.parametrize(("alpha_thre", "early_stop_eps"), [(0.0, 0.0), (0.01, 1e-4), (0.2, 0.3)])
@pytest.mark.parametrize("background", [None, torch.tensor([0.2, 0.5, 0.9]), torch.rand(700, 3)])
def test_equals_the_three_ops_in_a_row(alpha_thre, early_stop_eps, background):
    rays, bits = rays_around(700), grid()
    out = render(*rays, shell, BOX, bits, 32, STEP, background, 0, math.inf, alpha_thre, early_stop_eps)
    wanted, n_samples = in_a_row(*rays, shell, bits, background, alpha_thre, early_stop_eps)
    # Elementwise functions may differ in the last place with a sample's place in the vector registers.
    for name in ("rgb", "opacity", "depth"):
        torch.testing.assert_close(getattr(out, name), getattr(wanted, name), rtol=PARITY["render"], atol=2e-6)
    assert out.n_samples <= n_samples
    if early_stop_eps == 0:
        assert out.n_samples == n_samples


def exact(positions):
    """Additions and products only: the same value whatever the batch."""
    return 30 * positions[:, 0] ** 2, positions.abs()


def test_equals_the_three_ops_to_the_bit(monkeypatch):
    monkeypatch.setattr(MODULE, "_SAMPLES_PER_ROUND", 3000)
    rays, bits, background = rays_around(500), grid(), torch.rand(500, 3)
    out = render(*rays, exact, BOX, bits, 32, STEP, background, 0, math.inf, 0.01, 1e-2)
    wanted, _ = in_a_row(*rays, exact, bits, background, 0.01, 1e-2)
    assert torch.equal(out.opacity, wanted.opacity)
    assert torch.equal(out.rgb, wanted.rgb)
    assert torch.equal(out.depth, wanted.depth)


def test_parity_with_the_reference():
    rays, bits, background = rays_around(600), grid(0.3), torch.tensor([1.0, 0.5, 0.0])
    args = (*rays, shell, BOX, bits, 32, STEP, background, 0.5, 2.9, 0.01, 1e-3)
    fast, reference = render(*args), render_ref(*args)
    for name in ("rgb", "opacity", "depth"):
        torch.testing.assert_close(getattr(fast, name), getattr(reference, name), rtol=PARITY["render"], atol=2e-6)


def test_chunks_change_nothing(monkeypatch):
    rays, bits = rays_around(600), grid()
    wanted = render(*rays, exact, BOX, bits, 32, STEP)
    monkeypatch.setattr(MODULE, "_RAYS_PER_CHUNK", 77)
    got = render(*rays, exact, BOX, bits, 32, STEP)
    assert all(torch.equal(getattr(got, f), getattr(wanted, f)) for f in ("rgb", "opacity", "depth"))


@pytest.mark.parametrize("run", [render, render_ref])
def test_bounds_of_each_ray_follow_it_into_its_chunk(run, monkeypatch):
    rays, bits = rays_around(200), grid()
    near, far = torch.linspace(1.5, 2.5, 200), torch.linspace(2.0, 3.5, 400)[::2]
    monkeypatch.setattr(MODULE, "_RAYS_PER_CHUNK", 77)
    got = run(*rays, exact, BOX, bits, 32, STEP, None, near, far)
    one_by_one = [
        render(o[None], d[None], exact, BOX, bits, 32, STEP, None, *bounds).rgb
        for o, d, *bounds in zip(*rays, near.tolist(), far.tolist(), strict=True)
    ]
    torch.testing.assert_close(got.rgb, torch.cat(one_by_one), rtol=PARITY["render"], atol=2e-6)
    assert not torch.equal(got.rgb, run(*rays, exact, BOX, bits, 32, STEP).rgb)


def test_opaque_rays_stop_early(monkeypatch):
    monkeypatch.setattr(MODULE, "_SAMPLES_PER_ROUND", 16 * 100)
    sizes = []

    def wall(positions):
        sizes.append(positions.shape[0])
        return torch.full(positions.shape[:1], 1e4), torch.ones_like(positions)

    rays_o, rays_d = torch.tensor([[-2.0, 0.1, 0.1]]).expand(100, 3), torch.tensor([[1.0, 0, 0]]).expand(100, 3)
    out = render(rays_o, rays_d, wall, BOX, grid(1.0), 32, STEP)
    assert sizes == [1600]
    assert out.n_samples == 1600
    assert out.opacity.tolist() == [1.0] * 100


def test_constant_slab():
    rays_o, rays_d = torch.tensor([[-2.0, 0.1, 0.1]]), torch.tensor([[1.0, 0, 0]])

    def slab(positions):
        return torch.full(positions.shape[:1], 0.7), torch.ones_like(positions)

    out = render(rays_o, rays_d, slab, BOX, grid(1.0), 32, 2**-8, early_stop_eps=0.0)
    torch.testing.assert_close(out.opacity, torch.tensor([1 - math.exp(-1.4)]))
    # The mean of t under the weights, times the opacity: 1 at the near face, mean free path 1 / 0.7.
    depth = (1 + 1 / 0.7) - (3 + 1 / 0.7) * math.exp(-1.4)
    torch.testing.assert_close(out.depth, torch.tensor([depth]), rtol=1e-4, atol=0)


def test_nothing_to_render():
    none = torch.zeros(0, 3)
    assert render(none, none, shell, BOX, grid(), 32, STEP).rgb.shape == (0, 3)
    empty = torch.zeros(4096, dtype=torch.uint8)
    background = torch.tensor([0.1, 0.2, 0.3])
    for run in (render, render_ref):
        out = run(*rays_around(5), shell, BOX, empty, 32, STEP, background)
        assert out.n_samples == 0
        assert out.opacity.tolist() == [0.0] * 5
        torch.testing.assert_close(out.rgb, background.expand(5, 3))


def test_same_bits_for_any_number_of_threads():
    rays, bits = rays_around(500), grid()
    before, results = torch.get_num_threads(), []
    for n_threads in (1, 2, 4, 8):
        torch.set_num_threads(n_threads)
        results.append(render(*rays, exact, BOX, bits, 32, STEP))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(getattr(result, f), getattr(results[0], f)) for f in ("rgb", "opacity", "depth"))


def test_strided_inputs_and_another_default_dtype():
    (rays_o, rays_d), bits, color = rays_around(60), grid(), torch.tensor([0.2])
    wanted = render(rays_o, rays_d, exact, BOX, bits, 32, STEP, color.repeat(60, 3))
    wide = torch.stack([rays_o, rays_d], dim=-1)
    torch.set_default_dtype(torch.float64)
    try:
        got = render(wide[..., 0], wide[..., 1], exact, BOX, bits, 32, STEP, color.expand(60, 3))
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("rgb", "opacity", "depth"):
        assert getattr(got, name).dtype == torch.float32
        assert torch.equal(getattr(got, name), getattr(wanted, name))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rays_o": torch.full((4, 3), math.nan)}, ValueError, "rays_o, rays_d and near must be finite"),
        ({"rays_d": torch.zeros(4, 3)}, ValueError, "rays_d must be non-zero"),
        ({"background": torch.zeros(5, 3)}, ValueError, "background must be of shape"),
        ({"early_stop_eps": 2.0}, ValueError, "early_stop_eps must be in"),
        ({"near": torch.zeros(3)}, ValueError, r"near must be of shape \[4\]"),
        ({"far": torch.tensor([1, 2, math.nan, 3])}, ValueError, "far must be a number, got NaN"),
    ],
)
def test_refusals(change, error, text):
    rays_o, rays_d = rays_around(4)
    arguments = {"rays_o": rays_o, "rays_d": rays_d, "field": shell, "aabb": BOX, "occupancy_bits": grid()}
    arguments |= {"resolution": 32, "step_size": STEP} | change
    with pytest.raises(error, match=f"render: .*{text}"):
        render(**arguments)


@pytest.mark.parametrize("run", [render, render_ref])
@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        (lambda n: (torch.ones(n - 1), torch.ones(n, 3)), ValueError, "sigmas of the field must be of shape"),
        (lambda n: (torch.ones(n, 1), torch.ones(n, 3)), ValueError, "sigmas of the field must be of shape"),
        (lambda n: (torch.ones(n), torch.ones(n, 1)), ValueError, "rgb of the field must be of shape"),
        (lambda n: (torch.ones(n), torch.ones(n // 2, 3)), ValueError, "rgb of the field must be of shape"),
        (lambda n: (torch.ones(n).long(), torch.ones(n, 3)), TypeError, "sigmas of the field must be float32"),
        (lambda n: (torch.ones(n), torch.ones(n, 3).half()), TypeError, "rgb of the field must be float32"),
        (lambda n: (None, torch.ones(n, 3)), TypeError, "sigmas of the field must be a tensor, got NoneType"),
        (lambda n: (torch.ones(n, device="meta"), torch.ones(n, 3)), RuntimeError, "sigmas of the field must be on"),
    ],
)
def test_what_a_field_returns_is_checked(run, values, error, text):
    with pytest.raises(error, match=f"render: {text}"):
        run(*rays_around(4), lambda positions: values(len(positions)), BOX, grid(1.0), 32, STEP)


def test_a_field_in_float64_is_rounded():
    rays, bits = rays_around(60), grid()
    out, wanted = (
        render(*rays, field, BOX, bits, 32, STEP) for field in (lambda p: tuple(x.double() for x in exact(p)), exact)
    )
    assert torch.equal(out.rgb, wanted.rgb)
