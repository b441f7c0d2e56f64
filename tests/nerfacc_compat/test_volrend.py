"""Rendering, accumulation and distortion: numbers by hand, packed against batched, precision, no samples."""

import pytest
import torch
from reference.nerfacc_data import ALPHAS, LENGTHS, PACKED, RAYS, close, draw, packing, strided

from mvdream_fast import nerfacc_compat as nerfacc


def test_rendering_family_by_hand():
    trans = [1, 0.6, 0.12, 1, 0.2, 1, 1]
    for layout in ({"ray_indices": RAYS}, {"ray_indices": RAYS, "n_rays": 3}, {"packed_info": PACKED}):
        close(nerfacc.render_transmittance_from_alpha(ALPHAS, **layout), torch.tensor(trans))
        weights, _ = nerfacc.render_weight_from_alpha(ALPHAS, **layout)
        close(weights, torch.tensor([0.4, 0.48, 0.012, 0.8, 0.02, 0, 0.9]))
        visible = nerfacc.render_visibility_from_alpha(ALPHAS, **layout, early_stop_eps=0.3, alpha_thre=0.2)
        assert visible.tolist() == [True, True, False, True, False, False, True]
        sigmas, t = -torch.log1p(-ALPHAS), torch.arange(7.0)
        weights, got, alphas = nerfacc.render_weight_from_density(t, t + 1, sigmas, **layout)
        close(alphas, ALPHAS)
        close(got, torch.tensor(trans))
        close(weights, torch.tensor([0.4, 0.48, 0.012, 0.8, 0.02, 0, 0.9]))
        visible = nerfacc.render_visibility_from_density(t, t + 1, sigmas, **layout, early_stop_eps=0.3, alpha_thre=0.2)
        assert visible.tolist() == [True, True, False, True, False, False, True]


def test_prefix_transmittance():
    prefix = torch.full((7,), 0.5)
    before = nerfacc.render_transmittance_from_alpha(ALPHAS, ray_indices=RAYS)
    close(nerfacc.render_transmittance_from_alpha(ALPHAS, ray_indices=RAYS, prefix_trans=prefix), before / 2)
    assert prefix.tolist() == [0.5] * 7


@pytest.mark.parametrize("kind", ["sigma", "alpha"])
def test_rendering_packed_equals_batched(kind):
    t_starts = torch.linspace(0, 1, 6, dtype=torch.float64).expand(4, 6)
    t_ends, values, rgbs = t_starts + 0.1, draw(4, 6) * 0.9, draw(4, 6, 3, seed=1)
    background = draw(3, seed=2)
    results = []
    for packed in (False, True):
        inputs = [x.clone().requires_grad_() for x in (values, rgbs, background)]
        shaped = [x.flatten(0, 1) if packed else x for x in inputs[:2]]
        t = [x.flatten() if packed else x for x in (t_starts, t_ends)]
        layout = {"ray_indices": torch.arange(4).repeat_interleave(6), "n_rays": 4} if packed else {}

        def function(*_, shaped=shaped):
            return shaped[1], shaped[0]

        named = {f"rgb_{kind}_fn": function}
        colors, opacities, depths, extras = nerfacc.rendering(*t, **layout, **named, render_bkgd=inputs[2])
        (colors.sin().sum() + opacities.cos().sum() + depths.sin().sum()).backward()
        results.append([colors, opacities, depths, *[x.grad for x in inputs]])
        wanted = {"weights", "alphas", "trans", "rgbs"} | ({"sigmas"} if kind == "sigma" else set())
        assert set(extras) == wanted
        assert (colors.shape, opacities.shape, depths.shape) == ((4, 3), (4, 1), (4, 1))
    for a, b in zip(*results, strict=True):
        close(a, b, rtol=1e-10, atol=1e-10)


def test_rendering_agrees_with_composite():
    from mvdream_fast.ops import composite

    lengths = LENGTHS
    rays = torch.repeat_interleave(torch.arange(6), lengths)
    t_starts = draw(42, dtype=torch.float32)
    sigmas, rgbs, background = draw(42, seed=1).float() * 20, draw(42, 3, seed=2).float(), draw(3, seed=3).float()
    colors, opacities, depths, extras = nerfacc.rendering(
        t_starts, t_starts + 0.1, rays, 6, rgb_sigma_fn=lambda *_: (rgbs, sigmas), render_bkgd=background
    )
    out = composite(sigmas, rgbs, t_starts, t_starts + 0.1, packed_info=packing(), background=background)
    close(colors, out.rgb, atol=1e-6)
    close(opacities[:, 0], out.opacity, atol=1e-6)
    close(depths[:, 0] * out.opacity, out.depth, atol=1e-6)
    close(extras["weights"], out.weights, atol=1e-6)


def test_accumulate():
    weights, values = draw(7), draw(7, 2, seed=1)
    wanted = torch.stack([(weights[i == RAYS, None] * values[i == RAYS]).sum(0) for i in range(4)])
    close(nerfacc.accumulate_along_rays(weights, values, RAYS, n_rays=4), wanted)
    outputs = torch.ones(4, 2, dtype=torch.float64)
    nerfacc.accumulate_along_rays_(weights, values, RAYS, outputs)
    close(outputs, wanted + 1)
    batched, outputs = draw(3, 5), torch.zeros(3, 1, dtype=torch.float64)
    nerfacc.accumulate_along_rays_(batched, None, None, outputs)
    close(outputs, batched.sum(-1, keepdim=True))
    close(nerfacc.accumulate_along_rays(batched), batched.sum(-1, keepdim=True))
    with pytest.raises(ValueError, match="accumulate_along_rays: n_rays must be given"):
        nerfacc.accumulate_along_rays(weights, None, RAYS)


def render_function(name):
    function, edges = getattr(nerfacc, name), (ALPHAS, ALPHAS + 1) if name.endswith("density") else ()
    return lambda rays, n: function(*edges, ALPHAS, ray_indices=rays, n_rays=n)


PACKED_FUNCTIONS = {name: render_function(name) for name in nerfacc.__all__ if name.startswith("render_")} | {
    "pack_info": lambda rays, n: nerfacc.pack_info(rays, n),
    "accumulate_along_rays": lambda rays, n: nerfacc.accumulate_along_rays(ALPHAS, None, rays, n),
    "accumulate_along_rays_": lambda rays, n: nerfacc.accumulate_along_rays_(ALPHAS, None, rays, torch.zeros(n, 1)),
    "distortion": lambda rays, n: nerfacc.distortion(ALPHAS, ALPHAS, ALPHAS + 1, rays, n),
    "rendering": lambda rays, n: nerfacc.rendering(
        ALPHAS, ALPHAS + 1, rays, n, rgb_alpha_fn=lambda *_: (torch.ones(7, 3), ALPHAS)
    ),
}


@pytest.mark.parametrize("name", PACKED_FUNCTIONS)
def test_ray_indices_are_checked(name):
    call, unsorted = PACKED_FUNCTIONS[name], RAYS.flip(0)
    call(RAYS, 3)
    for rays in (RAYS, RAYS - 1):
        with pytest.raises(ValueError, match=rf"^{name}: ray_indices must be in \[0, 2\)"):
            call(rays, 2)
    if name.startswith("accumulate"):  # a sum has no order
        call(unsorted, 3)
    else:
        with pytest.raises(ValueError, match=f"^{name}: ray_indices must be sorted, got a decreasing index"):
            call(unsorted, 3)


def test_samples_without_their_rays_are_refused():
    with pytest.raises(ValueError, match=r"accumulate_along_rays: ray_indices must be of shape \[7\], got \[6\]"):
        nerfacc.accumulate_along_rays(ALPHAS, None, RAYS[:6], 3)


@pytest.mark.parametrize("kind", ["alpha", "density"])
@pytest.mark.parametrize("name", ["transmittance", "weight", "visibility"])
def test_rendering_of_strided_values(name, kind):
    function, rays = getattr(nerfacc, f"render_{name}_from_{kind}"), torch.repeat_interleave(torch.arange(6), LENGTHS)
    for values, plain in strided(draw(42) * 0.9):
        results = []
        for x in (values, plain):
            edges = (x * 0, x * 0 + 1) if kind == "density" else ()
            out = function(*edges, x, ray_indices=rays.repeat(2, 1).T[:, 0], n_rays=6, prefix_trans=x[:1].expand(42))
            results.append(out if isinstance(out, tuple) else (out,))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_distortion():
    weights, t = draw(2, 4).requires_grad_(), draw(2, 5, seed=1).sort(-1).values
    t_starts, t_ends = t[:, :-1], t[:, 1:]
    mids, deltas = (t_starts + t_ends) / 2, t_ends - t_starts
    pairs = weights[:, :, None] * weights[:, None] * (mids[:, :, None] - mids[:, None]).abs()
    wanted = pairs.sum((1, 2)) + (weights**2 * deltas).sum(-1) / 3
    batched = nerfacc.distortion(weights, t_starts, t_ends)
    close(batched[:, 0], wanted, rtol=1e-10, atol=1e-10)
    flat = [x.flatten() for x in (weights, t_starts, t_ends)]
    packed = nerfacc.distortion(*flat, ray_indices=torch.tensor([0] * 4 + [1] * 4), n_rays=2)
    close(packed, batched, rtol=1e-10, atol=1e-10)
    (d_weights,) = torch.autograd.grad(packed.sum(), weights)
    close(d_weights, torch.autograd.grad(wanted.sum(), weights)[0], rtol=1e-10, atol=1e-10)


def test_no_samples_at_all():
    none, rays = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    empty = none.detach()
    for n_rays in (0, 3):
        layout = {"ray_indices": rays, "n_rays": n_rays}
        assert nerfacc.render_transmittance_from_alpha(none, **layout).shape == (0,)
        assert nerfacc.render_weight_from_density(empty, empty, none, **layout)[0].shape == (0,)
        assert nerfacc.render_visibility_from_density(empty, empty, none, **layout).shape == (0,)
        for kind in ("rgb_sigma_fn", "rgb_alpha_fn"):
            background = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
            colors, opacities, depths, _ = nerfacc.rendering(
                empty, empty, **layout, **{kind: lambda *_: pytest.fail("called")}, render_bkgd=background
            )
            close(colors, background.expand(n_rays, 3))
            assert opacities.shape == depths.shape == (n_rays, 1)
            colors.sum().backward()
            close(background.grad, torch.full((3,), float(n_rays)))
        assert nerfacc.distortion(none, empty, empty, **layout).tolist() == [[0.0]] * n_rays
    assert nerfacc.pack_info(rays).shape == (0, 2)
    for name in ("inclusive_sum", "exclusive_sum", "inclusive_prod", "exclusive_prod"):
        out = getattr(nerfacc, name)(none, torch.zeros(3, 2, dtype=torch.int64))
        out.sum().backward()
    assert none.grad.shape == (0,)


def test_refusals():
    wrong = torch.ones(2, 3, 3), torch.ones(2)
    with pytest.raises(ValueError, match="rendering: rgb_sigma_fn or rgb_alpha_fn must be given"):
        nerfacc.rendering(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"rendering: sigmas must be of shape \[2, 3\], got \[2\]"):
        nerfacc.rendering(torch.zeros(2, 3), torch.ones(2, 3), rgb_sigma_fn=lambda *_: wrong)


def looped(alphas, lengths, prefix):
    """Transmittances and weights ray after ray in Python numbers."""
    trans, values = [], iter(alphas.tolist())
    for length in lengths.tolist():
        left = 1.0
        for _ in range(length):
            trans.append(left)
            left *= 1 - next(values)
    trans = torch.tensor(trans, dtype=torch.float64) * prefix.double()
    return trans, trans * alphas.double()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["alpha", "density"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_family_in_half_precision(dtype, kind, packed):
    lengths, eps = torch.tensor([7, 7]), 2 * torch.finfo(dtype).eps
    t_starts, values = (draw(14, seed=1) * 2).to(dtype), (draw(14) * 0.9).to(dtype)
    t_ends, prefix = t_starts + 0.5, (draw(14, seed=2) + 0.1).to(dtype)
    exact = [x.double() for x in (t_starts, t_ends, values)]
    alphas = 1 - torch.exp(-exact[2] * (exact[1] - exact[0])) if kind == "density" else exact[2]
    trans, weights = looped(alphas, lengths, prefix)
    inputs = [*([t_starts, t_ends] if kind == "density" else []), values]
    inputs = [x.clone().requires_grad_() if packed else x.view(2, 7).clone().requires_grad_() for x in inputs]
    options = {"prefix_trans": prefix if packed else prefix.view(2, 7)}
    options |= {"packed_info": packing(lengths)} if packed else {}
    got = getattr(nerfacc, f"render_weight_from_{kind}")(*inputs, **options)
    assert {x.dtype for x in got} == {dtype}
    for x, wanted in zip(got, (weights, trans, alphas), strict=False):
        close(x.flatten().double(), wanted, rtol=eps, atol=0)
    again = getattr(nerfacc, f"render_transmittance_from_{kind}")(*inputs, **options)
    assert torch.equal(again if kind == "alpha" else again[0], got[1])
    visible = getattr(nerfacc, f"render_visibility_from_{kind}")(*inputs, **options, early_stop_eps=0.2, alpha_thre=0.3)
    near = ((trans - 0.2).abs() < 1e-6) | ((alphas - 0.3).abs() < 1e-6)  # none: else the rounding decides
    assert torch.equal(visible.flatten(), (trans >= 0.2) & (alphas >= 0.3))
    assert not near.any()
    got[0].sum().backward()
    wide = [x.detach().double().requires_grad_() for x in inputs]
    options["prefix_trans"] = options["prefix_trans"].double()
    getattr(nerfacc, f"render_weight_from_{kind}")(*wide, **options)[0].sum().backward()
    for x, reference in zip(inputs, wide, strict=True):
        assert x.grad.dtype == dtype
        close(x.grad.double(), reference.grad, rtol=eps, atol=eps * float(reference.grad.abs().max()))


@pytest.mark.parametrize("packed", [True, False])
def test_long_rays_in_half_precision_end_dark(packed):
    t = torch.arange(3000, dtype=torch.float32)  # optical depth 0.001 a sample; sums of halves stop to grow at about 2
    sigmas, shape = torch.full((3000,), 1e-3, dtype=torch.float16), (3000,) if packed else (1, 3000)
    layout = {"packed_info": torch.tensor([[0, 3000]])} if packed else {}
    halves = torch.ones(3000, dtype=torch.float16)
    for t_starts, t_ends in ((t, t + 1), (halves * 0, halves)):
        trans, _ = nerfacc.render_transmittance_from_density(
            *(x.view(shape) for x in (t_starts, t_ends, sigmas)), **layout
        )
        close(trans.flatten()[-1].float(), torch.exp(-2999 * sigmas[0].float()), rtol=1e-3)
    assert trans.dtype == torch.float16


def test_results_have_the_dtype_of_a_product():
    half, single, double = ALPHAS.half(), ALPHAS, ALPHAS.double()
    cases = [(half, single, single), (half, half, half), (half, None, half), (single, double, double)]
    for alphas, prefix, wanted in cases:
        trans = nerfacc.render_transmittance_from_alpha(alphas, PACKED, prefix_trans=prefix)
        assert trans.dtype == wanted.dtype
    weights, *_ = nerfacc.render_weight_from_density(single, single + 1, half, PACKED)
    assert weights.dtype == torch.float32
    assert nerfacc.distortion(half, half, half + 1, RAYS, 3).dtype == torch.float16
    for whole in (torch.tensor([0, 1, 0, 0, 1, 0, 0]), torch.tensor([0, 1, 0, 0, 1, 0, 0]).bool()):
        weights, trans = nerfacc.render_weight_from_alpha(whole, PACKED)
        assert weights.tolist() == [0, 1, 0, 0, 1, 0, 0]
        assert trans.tolist() == [1, 1, 0, 1, 1, 1, 1]


def test_rendering_in_half_precision():
    sigmas, rgbs, t = (draw(7) * 2).half(), draw(7, 3, seed=1).half(), torch.arange(7.0)
    background = torch.tensor([1, 0, 1])
    results = []
    for cast in (torch.Tensor.half, torch.Tensor.double):
        colors, opacities, depths, extras = nerfacc.rendering(
            *(cast(t), cast(t + 1), RAYS, 3), lambda *_, cast=cast: (cast(rgbs), cast(sigmas)), render_bkgd=background
        )
        results.append([colors, opacities, depths, extras["weights"], extras["trans"], extras["alphas"]])
        assert {x.dtype for x in results[-1]} == {cast(t).dtype}
    for a, b in zip(*results, strict=True):
        close(a.double(), b, rtol=2**-10, atol=2**-12)


@pytest.mark.parametrize("packed", [True, False])
def test_sums_of_many_halves_go_on(packed):
    weights = torch.ones(3000, dtype=torch.float16)
    rays = {"ray_indices": torch.zeros(3000, dtype=torch.int64)} if packed else {}
    weights = weights if packed else weights[None]
    total = nerfacc.accumulate_along_rays(weights, **rays, n_rays=1 if packed else None)
    assert total.tolist() == [[3000]]
    for dtype in (torch.float16, torch.float32):
        outputs = torch.ones(1, 1, dtype=dtype)
        nerfacc.accumulate_along_rays_(weights, **rays, outputs=outputs)
        assert outputs.item() == torch.tensor(3001, dtype=dtype).item()
        assert (outputs.dtype, total.dtype) == (dtype, torch.float16)


@pytest.mark.parametrize("packed", [True, False])
def test_products_of_halves_do_not_vanish(packed):
    """1e-4 times 1e-4 is nothing in half precision; 4000 of them are a number of it."""
    weights, values = torch.full((4000,), 1e-4).half(), torch.full((4000, 1), 1e-4).half()
    arguments = (weights, values, torch.zeros(4000).long()) if packed else (weights[None], values[None], None)
    wanted, outputs = 4000 * float(weights[0]) ** 2, torch.zeros(1, 1)
    nerfacc.accumulate_along_rays_(*arguments, outputs)
    for total in (nerfacc.accumulate_along_rays(*arguments, 1), outputs):
        assert total.item() == pytest.approx(wanted, rel=2e-3)


def test_whole_numbers_are_counted_exactly():
    many = torch.full((7,), 2**24 + 1)
    assert nerfacc.accumulate_along_rays(many, None, RAYS, 3).tolist() == [[3 * 2**24 + 3], [2**25 + 2], [2**25 + 2]]
    assert nerfacc.accumulate_along_rays(ALPHAS, torch.full((7, 1), 2), RAYS, 3).dtype == torch.float32
    with pytest.raises(TypeError, match=r"accumulate_along_rays: weights must be numbers, got torch.bool"):
        nerfacc.accumulate_along_rays(ALPHAS > 0.5, None, RAYS, 3)


COLUMN = torch.zeros(1).expand(10**6, 1)  # against a row, 10^12 numbers
ROW = torch.zeros(1).expand(10**6)
MANY = torch.zeros(1, dtype=torch.int64).expand(10**6)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda f: f.render_transmittance_from_density(COLUMN, ROW, ROW, None, MANY, 1), "t_ends must be of shape"),
        (lambda f: f.render_transmittance_from_density(ROW, COLUMN, ROW), "t_ends must be of shape"),
        (lambda f: f.render_weight_from_density(ROW, ROW, COLUMN), "sigmas must be of shape"),
        (lambda f: f.render_visibility_from_density(ROW, ROW, COLUMN, None, MANY, 1), "sigmas must be of shape"),
        (lambda f: f.render_transmittance_from_alpha(COLUMN, None, MANY, 1), r"alphas must be of shape \[S\]"),
        (lambda f: f.render_transmittance_from_alpha(ROW, prefix_trans=COLUMN), "prefix_trans must be of shape"),
        (lambda f: f.render_weight_from_alpha(COLUMN, prefix_trans=ROW), "prefix_trans must be of shape"),
        (lambda f: f.render_visibility_from_alpha(ROW, None, MANY[:, None], 1), "ray_indices must be of shape"),
        (lambda f: f.accumulate_along_rays(ROW, COLUMN[:-1], MANY, 1), "values must be of shape"),
        (lambda f: f.accumulate_along_rays(ROW, ROW, MANY, 1), "values must be of shape"),
        (lambda f: f.accumulate_along_rays(COLUMN, None, MANY, 1), r"weights must be of shape \[S\]"),
        (lambda f: f.accumulate_along_rays_(ROW[None], None, None, COLUMN), "outputs must be of shape"),
        (lambda f: f.accumulate_along_rays_(ROW, None, MANY, torch.zeros(1)), "outputs must be of shape"),
        (lambda f: f.accumulate_along_rays_(ROW, None, MANY, torch.zeros(1, 2)), "outputs must be of shape"),
        (lambda f: f.distortion(ROW, COLUMN, ROW), "t_starts must be of shape"),
        (lambda f: f.distortion(COLUMN, COLUMN, COLUMN, MANY, 1), r"weights must be of shape \[S\]"),
        (lambda f: f.rendering(ROW, COLUMN, MANY, 1, fails), "t_ends must be of shape"),
        (lambda f: f.rendering(ROW, ROW, MANY[1:], 1, fails), "ray_indices must be of shape"),
        (lambda f: f.rendering(COLUMN, COLUMN, MANY, 1, fails), r"t_starts must be of shape \[S\]"),
        (lambda f: f.rendering(ROW, ROW, MANY, 1, fails, render_bkgd=COLUMN), "render_bkgd must be of shape"),
        (lambda f: f.rendering(ROW, ROW, MANY, 1, lambda *_: (ROW, ROW)), "rgbs must be of shape"),
        (lambda f: f.rendering(ROW, ROW, MANY, 1, None, lambda *_: (ROW, COLUMN)), "alphas must be of shape"),
        (lambda f: f.rendering(ROW, ROW, MANY, None, fails), "n_rays must be given"),
        (lambda f: f.rendering(ROW, ROW, MANY, -1, fails), "n_rays must be given with ray_indices, and at least 0"),
        (lambda f: f.distortion(ROW, ROW, ROW, MANY), "n_rays must be given"),
        (lambda f: f.pack_info(MANY[:, None]), r"ray_indices must be of shape \[S\]"),
        (lambda f: f.pack_info(MANY, -1), "n_rays must be given with ray_indices, and at least 0"),
    ],
)
def test_shapes_are_looked_at_before_anything_is_made(call, text):
    name = call.__code__.co_names[0]
    with pytest.raises(ValueError, match=f"^{name}: {text}"):
        call(nerfacc)


def fails(*_):
    pytest.fail("called")


def test_dtypes_that_are_no_numbers_or_no_indices():
    for name, call in PACKED_FUNCTIONS.items():
        with pytest.raises(TypeError, match=f"^{name}: ray_indices must be of whole numbers, got torch.float32"):
            call(RAYS.float(), 3)
        if name != "pack_info":
            call(RAYS.to(torch.int32), 3)
    with pytest.raises(
        TypeError, match="render_weight_from_alpha: alphas must be of real numbers, got torch.complex64"
    ):
        nerfacc.render_weight_from_alpha(ALPHAS.to(torch.complex64))
    with pytest.raises(TypeError, match="render_weight_from_alpha: alphas must be a tensor, got list"):
        nerfacc.render_weight_from_alpha([0.5])
    with pytest.raises(ValueError, match="render_weight_from_alpha: n_rays must be 3 as in packed_info, got 4"):
        nerfacc.render_weight_from_alpha(ALPHAS, PACKED, n_rays=4)


def test_rendering_in_one_graph():
    def render(alphas):
        weights, _ = nerfacc.render_weight_from_alpha(alphas, PACKED)
        return nerfacc.accumulate_along_rays(weights, None, RAYS, 3)

    compiled = torch.compile(render, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ALPHAS), render(ALPHAS))


def test_backgrounds():
    none = torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 4
    for background in (torch.rand(3), torch.rand(1, 3), torch.rand(4, 3), torch.rand(4, 1), torch.rand(())):
        colors, *_ = nerfacc.rendering(*none, fails, render_bkgd=background)
        close(colors, background.expand(4, 3))
    for background in (torch.rand(4), torch.rand(3, 3), torch.rand(2, 4, 3)):
        with pytest.raises(ValueError, match=r"rendering: render_bkgd must be of shape \[4, 3\], or 1 along an axis"):
            nerfacc.rendering(*none, fails, render_bkgd=background)


def test_batched_rays_without_samples_and_samples_without_rays():
    for shape in ((3, 0), (0, 5), (0, 0), (2, 0, 4)):
        x = torch.zeros(shape, requires_grad=True)
        weights, trans, alphas = nerfacc.render_weight_from_density(x, x + 1, x)
        assert weights.shape == trans.shape == alphas.shape == shape
        assert nerfacc.render_visibility_from_alpha(x).shape == shape
        total = nerfacc.accumulate_along_rays(x, x[..., None].expand(*shape, 2))
        assert torch.equal(total, torch.zeros(*shape[:-1], 2))
        assert nerfacc.distortion(x, x, x + 1).shape == (*shape[:-1], 1)
        colors, opacities, depths, _ = nerfacc.rendering(x, x + 1, rgb_alpha_fn=fails, render_bkgd=torch.ones(3))
        close(colors, torch.ones(*shape[:-1], 3))
        assert opacities.shape == depths.shape == (*shape[:-1], 1)
        (weights.sum() + colors.sum()).backward()
        assert x.grad.shape == shape
