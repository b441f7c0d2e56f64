"""composite: parity with the reference, gradients, exact transmittance of slab and sphere, and the edges."""

import math

import pytest
import torch
from tolerances import PARITY

from mvdream_fast.ops.composite import Rendered, composite, composite_ref
from mvdream_fast.ops.march_rays import march_rays, pack_bits, pack_info

FIELDS = Rendered._fields


def scene(n_rays=200, seed=0, dtype=torch.float32, density=40.0, longest=40):
    """Random packed samples, some rays empty: sigmas, rgb, t_starts, t_ends, packed_info."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, longest, (n_rays,), generator=generator)
    counts[::5] = 0
    rays = torch.repeat_interleave(torch.arange(n_rays), counts)
    draw = torch.rand(rays.shape[0], 5, generator=generator, dtype=torch.float64).to(dtype)
    order = torch.arange(rays.shape[0]) - pack_info(rays, n_rays)[rays, 0]
    t_starts = (1 + 0.05 * order + 0.01 * draw[:, 0]).to(dtype)
    return density * draw[:, 1] ** 3, draw[:, 2:], t_starts, t_starts + 0.03, pack_info(rays, n_rays)


def backgrounds(n_rays, dtype=torch.float32):
    generator = torch.Generator().manual_seed(9)
    return {
        "none": None,
        "one": torch.rand(3, generator=generator, dtype=torch.float64).to(dtype),
        "each": torch.rand(n_rays, 3, generator=generator, dtype=torch.float64).to(dtype),
    }


def outputs_and_gradients(function, sigmas, rgb, t_starts, t_ends, packed_info, background, used=FIELDS):
    inputs = [x.detach().clone().requires_grad_() for x in (sigmas, rgb, background) if x is not None]
    out = function(*inputs[:2], t_starts, t_ends, packed_info=packed_info, background=(inputs + [None])[2])
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (getattr(out, name) * torch.randn(getattr(out, name).shape, generator=generator, dtype=torch.float64)).sum()
        for name in FIELDS
        if name in used
    )
    return out, torch.autograd.grad(loss, inputs, allow_unused=True)


def close_to_own(got, want):
    """Gradients relative to the largest, however small that is."""
    tolerance = PARITY["composite.gradients"]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()) + 1e-12)


@pytest.mark.parametrize("background", ["none", "one", "each"])
@pytest.mark.parametrize("density", [0.0, 40.0, 4000.0])
def test_parity(background, density):
    # The reference in float64 on the same float32 numbers: the native op keeps float64 sums.
    args = scene(density=density)
    behind = backgrounds(200)[background]
    out, gradients = outputs_and_gradients(composite, *args, behind)
    wide = [x.double() if torch.is_floating_point(x) else x for x in args]
    wanted, wanted_gradients = outputs_and_gradients(composite_ref, *wide, None if behind is None else behind.double())
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(out, name).double(), getattr(wanted, name), rtol=PARITY["composite"], atol=1e-6, msg=name
        )
    for got, want in zip(gradients, wanted_gradients, strict=True):
        close_to_own(got, want)


@pytest.mark.parametrize("name", FIELDS)
def test_gradient_of_each_output_alone(name):
    args, behind = scene(), backgrounds(200)["each"]
    _, gradients = outputs_and_gradients(composite, *args, behind, used=(name,))
    wide = [x.double() if torch.is_floating_point(x) else x for x in args]
    _, wanted = outputs_and_gradients(composite_ref, *wide, behind.double(), used=(name,))
    for got, want in zip(gradients, wanted, strict=True):
        want = torch.zeros(1, dtype=torch.float64) if want is None else want
        got = torch.zeros(1) if got is None else got
        close_to_own(got, want.expand(got.shape))


@pytest.mark.parametrize("background", ["none", "one", "each"])
def test_gradcheck_of_the_reference(background):
    sigmas, rgb, t_starts, t_ends, packed_info = scene(6, dtype=torch.float64, longest=6)
    behind = backgrounds(6, torch.float64)[background]
    inputs = [x.requires_grad_() for x in (sigmas + 0.5, rgb, behind) if x is not None]

    def function(sigmas, rgb, behind=None):
        return tuple(composite_ref(sigmas, rgb, t_starts, t_ends, packed_info, behind))

    assert torch.autograd.gradcheck(function, inputs)


def test_float64_goes_through_the_reference():
    sigmas, rgb, t_starts, t_ends, packed_info = scene(20, dtype=torch.float64)
    out = composite(sigmas, rgb, t_starts, t_ends, packed_info=packed_info)
    wanted = composite_ref(sigmas, rgb, t_starts, t_ends, packed_info)
    assert out.rgb.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))


def test_by_hand():
    # alpha 1/2 each: weights 1/2 and 1/4, a quarter of the background.
    sigmas = torch.full((2,), math.log(2.0))
    rgb = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    t_starts = torch.tensor([1.0, 2.0])
    background = torch.tensor([0.0, 0.0, 1.0])
    packed_info = torch.tensor([[0, 2], [2, 0]])
    out = composite(sigmas, rgb, t_starts, t_starts + 1, packed_info=packed_info, background=background)
    torch.testing.assert_close(out.weights, torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(out.rgb, torch.tensor([[0.5, 0.25, 0.25], [0, 0, 1]]))
    torch.testing.assert_close(out.opacity, torch.tensor([0.75, 0]))
    depth = 0.5 * 1.5 + 0.25 * 2.5
    torch.testing.assert_close(out.depth, torch.tensor([depth, 0]))
    variance = 0.5 * (1.5 - depth) ** 2 + 0.25 * (2.5 - depth) ** 2
    torch.testing.assert_close(out.z_variance, torch.tensor([variance, 0]))


def test_constant_slab_has_the_exact_transmittance():
    # Box [0, 1] x [0, 2]^2 full of density 3, crossed at 45 degrees: the chord is sqrt(2).
    rays_o = torch.tensor([[-1.0, 0.5, 1.0], [-1.0, -0.5, 1.0]])
    rays_d = torch.tensor([[1.0, 0, 0], [2**-0.5, 2**-0.5, 0]])
    bits = torch.full((64,), 255, dtype=torch.uint8)
    samples = march_rays(rays_o, rays_d, (0, 0, 0, 1, 2, 2), bits, 8, 2**-10)
    sigmas, rgb = torch.full((samples.n_samples,), 3.0), torch.ones(samples.n_samples, 3)
    out = composite(sigmas, rgb, samples.t_starts, samples.t_ends, packed_info=samples.packed_info)
    wanted = torch.tensor([1 - math.exp(-3.0), 1 - math.exp(-3 * math.sqrt(2))])
    # A lattice point more or less at either face moves the optical depth by a step.
    torch.testing.assert_close(out.opacity, wanted, atol=3 * 2**-10, rtol=0)
    assert abs(float(out.opacity[0]) - float(wanted[0])) < 1e-5  # here the faces fall on the lattice


def test_constant_sphere_has_the_transmittance_of_its_chord():
    radius, sigma, step = 0.5, 2.0, 1e-3
    offsets = torch.linspace(0, 0.45, 10)
    rays_o = torch.stack([torch.full_like(offsets, -2), offsets, torch.zeros_like(offsets)], -1)
    rays_d = torch.tensor([1.0, 0, 0]).expand(10, 3)
    bits = torch.full((64,), 255, dtype=torch.uint8)
    samples = march_rays(rays_o, rays_d, (-1, -1, -1, 1, 1, 1), bits, 8, step)
    inside = samples.positions(rays_o, rays_d).norm(dim=-1) < radius
    rgb = torch.ones(samples.n_samples, 3)
    out = composite(sigma * inside.float(), rgb, samples.t_starts, samples.t_ends, packed_info=samples.packed_info)
    chord = 2 * torch.sqrt(radius**2 - offsets**2)
    torch.testing.assert_close(out.opacity, 1 - torch.exp(-sigma * chord), atol=sigma * step, rtol=0)
    centre = 2 * out.opacity  # the chord's middle is at t = 2, nearer halves weigh more
    assert bool((out.depth < centre).all())


def test_weights_and_final_transmittance_sum_to_one():
    sigmas, rgb, t_starts, t_ends, packed_info = scene()
    out = composite(sigmas, rgb, t_starts, t_ends, packed_info=packed_info)
    depth = torch.zeros(200, dtype=torch.float64)
    rays = torch.repeat_interleave(torch.arange(200), packed_info[:, 1])
    depth.index_add_(0, rays, (sigmas * (t_ends - t_starts)).double())
    torch.testing.assert_close(out.opacity.double() + torch.exp(-depth), torch.ones(200, dtype=torch.float64))
    assert bool((out.weights >= 0).all())


def test_tiny_optical_depths_keep_their_digits():
    sigmas = torch.logspace(-12, 1, 50)
    packed_info = torch.stack([torch.arange(50), torch.ones(50, dtype=torch.int64)], -1)
    zero = torch.zeros(50)
    out = composite(sigmas, torch.ones(50, 3), zero, zero + 1, packed_info=packed_info)
    torch.testing.assert_close(out.opacity.double(), -torch.expm1(-sigmas.double()), rtol=3e-7, atol=0)


def test_infinite_and_nan_densities():
    rgb, zero = torch.full((2, 3), 0.5), torch.zeros(2)
    packed_info = torch.tensor([[0, 1], [1, 1]])
    out = composite(torch.tensor([math.inf, math.nan]), rgb, zero, zero + 1, packed_info=packed_info)
    assert float(out.opacity[0]) == 1.0
    assert math.isnan(float(out.opacity[1]))


def test_ray_indices_and_packed_info_agree():
    sigmas, rgb, t_starts, t_ends, packed_info = scene()
    rays = torch.repeat_interleave(torch.arange(200), packed_info[:, 1])
    a = composite(sigmas, rgb, t_starts, t_ends, ray_indices=rays, n_rays=200)
    b = composite(sigmas, rgb, t_starts, t_ends, packed_info=packed_info)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("n_rays", [0, 5])
def test_no_samples(n_rays):
    empty = torch.zeros(0, requires_grad=True)
    rgb = torch.zeros(0, 3, requires_grad=True)
    background = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    packed_info = torch.zeros(n_rays, 2, dtype=torch.int64)
    out = composite(empty, rgb, empty.detach(), empty.detach(), packed_info=packed_info, background=background)
    assert out.rgb.shape == (n_rays, 3)
    assert out.opacity.tolist() == [0.0] * n_rays
    torch.testing.assert_close(out.rgb, background.expand(n_rays, 3))
    (out.rgb.sum() + out.depth.sum() + out.z_variance.sum() + out.weights.sum()).backward()
    assert empty.grad.shape == (0,)
    assert rgb.grad.shape == (0, 3)
    assert background.grad.tolist() == [float(n_rays)] * 3


def test_strided_inputs():
    sigmas, rgb, t_starts, t_ends, packed_info = scene()
    wanted = outputs_and_gradients(composite, sigmas, rgb, t_starts, t_ends, packed_info, backgrounds(200)["each"])
    wide = torch.stack([sigmas, t_starts, t_ends], -1)
    columns, pairs = rgb.T.contiguous().T, packed_info.T.contiguous().T
    background = backgrounds(200)["each"].T.contiguous().T
    got = outputs_and_gradients(composite, wide[:, 0], columns, wide[:, 1], wide[:, 2], pairs, background)
    assert all(torch.equal(a, b) for a, b in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True))
    one = torch.tensor([0.3]).expand(sigmas.shape)
    out = composite(one, rgb, t_starts, t_ends, packed_info=packed_info)
    same = composite(one.contiguous(), rgb, t_starts, t_ends, packed_info=packed_info)
    assert torch.equal(out.rgb, same.rgb)


def test_inputs_are_left_alone():
    args = scene()
    before = [x.clone() for x in args]
    outputs_and_gradients(composite, *args, None)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@pytest.mark.parametrize("background", ["one", "each"])
def test_same_bits_for_any_number_of_threads(background):
    args, behind = scene(1000), backgrounds(1000)[background]
    before, results = torch.get_num_threads(), []
    for n_threads in (1, 2, 4, 8):
        torch.set_num_threads(n_threads)
        out, gradients = outputs_and_gradients(composite, *args, behind)
        results.append([x.detach() for x in (*out, *gradients)])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("background", ["none", "one", "each"])
def test_second_derivatives(background):
    args, behind = scene(8, longest=6), backgrounds(8)[background]
    results = []
    for function in (composite, composite_ref):
        inputs = [x.detach().clone().requires_grad_() for x in (*args[:2], behind) if x is not None]
        out = function(*inputs[:2], *args[2:4], packed_info=args[4], background=(inputs + [None])[2])
        first = torch.autograd.grad(out.rgb.square().sum() + out.z_variance.sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), inputs))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_gradient_of_what_an_output_does_not_depend_on():
    args, behind = scene(8, longest=6), backgrounds(8)["each"]
    for wanted in (1, 2):  # the colours, the background: opacity depends on neither
        inputs = [args[0], args[1].clone(), behind]
        inputs[wanted].requires_grad_()
        out = composite(*inputs[:2], *args[2:4], packed_info=args[4], background=inputs[2])
        (gradient,) = torch.autograd.grad(out.opacity.sum(), inputs[wanted], create_graph=True)
        assert gradient.shape == inputs[wanted].shape
        assert not gradient.any()
    inputs = [args[0].clone().requires_grad_(), args[1].clone().requires_grad_()]
    out = composite(*inputs, *args[2:4], packed_info=args[4])
    d_sigmas, d_rgb = torch.autograd.grad(out.opacity.sum(), inputs, create_graph=True)
    assert d_sigmas.any()
    assert not d_rgb.any()


def test_forward_mode_goes_through_the_reference():
    sigmas, rgb, t_starts, t_ends, packed_info = scene(8, longest=6)

    def opacity(sigmas):
        return composite(sigmas, rgb, t_starts, t_ends, packed_info=packed_info).opacity

    _, tangent = torch.func.jvp(opacity, (sigmas,), (torch.ones_like(sigmas),))
    step = 1e-3
    wide = [x.double() for x in (sigmas, rgb, t_starts, t_ends)]
    ends = [composite_ref(wide[0] + s, *wide[1:], packed_info).opacity for s in (step, -step)]
    torch.testing.assert_close(tangent.double(), (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=1e-5)


def test_vmapped_arguments_are_refused():
    sigmas, rgb, t_starts, t_ends, packed_info = scene(8, longest=6)
    with pytest.raises(RuntimeError, match="composite: arguments must be plain tensors, got a vmapped one"):
        torch.func.vmap(lambda x: composite(x, rgb, t_starts, t_ends, packed_info=packed_info).rgb)(sigmas[None])


@pytest.mark.parametrize(("dtype", "background"), [(torch.float32, "each"), (torch.float64, "none")])
def test_the_registered_form(dtype, background):
    sigmas, rgb, t_starts, t_ends, packed_info = scene(8, longest=6, dtype=dtype)
    behind = backgrounds(8, dtype)[background]
    behind = None if behind is None else behind.requires_grad_()
    inputs = (sigmas.requires_grad_(), rgb.requires_grad_(), t_starts, t_ends, packed_info, behind)
    torch.library.opcheck(torch.ops.mvdream_fast.composite.default, inputs)


@pytest.mark.parametrize("background", ["none", "one", "each"])
def test_gradients_of_the_registered_form(background):
    args, behind = scene(30, dtype=torch.float64), backgrounds(30, torch.float64)[background]
    _, wanted = outputs_and_gradients(composite, *args, behind)

    def registered(sigmas, rgb, t_starts, t_ends, packed_info, background):
        return Rendered(*torch.ops.mvdream_fast.composite(sigmas, rgb, t_starts, t_ends, packed_info, background))

    _, got = outputs_and_gradients(registered, *args, behind)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_compiles_in_one_graph():
    sigmas, rgb, t_starts, t_ends, packed_info = scene(20)
    behind = backgrounds(20)["each"]

    def loss(sigmas, rgb, background):
        out = composite(sigmas, rgb, t_starts, t_ends, packed_info=packed_info, background=background)
        return (out.rgb.sin() + out.depth[:, None]).sum()

    compiled, results = torch.compile(loss, fullgraph=True, backend="aot_eager"), []
    for function in (loss, compiled):
        inputs = [x.detach().clone().requires_grad_() for x in (sigmas, rgb, behind)]
        results.append(torch.autograd.grad(function(*inputs), inputs))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rgb": torch.zeros(3, 4)}, ValueError, r"rgb must be of shape \[3, 3\]"),
        ({"t_ends": torch.zeros(2)}, ValueError, "t_ends must be of shape"),
        ({"sigmas": torch.zeros(3, dtype=torch.int32)}, TypeError, "sigmas must be float32 or float64"),
        ({"packed_info": None}, ValueError, "one of ray_indices and packed_info must be given"),
        ({"packed_info": torch.tensor([[0, 2], [2, 2]])}, ValueError, "packed_info must be ray after ray"),
        ({"packed_info": torch.tensor([[0, 4], [4, -1]])}, ValueError, "packed_info must be ray after ray"),
        ({"packed_info": torch.tensor([[0, 2], [2, 1]], dtype=torch.int32)}, TypeError, "packed_info must be int64"),
        ({"background": torch.zeros(4)}, ValueError, r"background must be of shape \[3\]"),
        ({"background": torch.zeros(3, 3)}, ValueError, r"background must be of shape \[2, 3\]"),
        ({"packed_info": None, "ray_indices": torch.tensor([1, 0, 1]), "n_rays": 2}, ValueError, "must be sorted"),
        (
            {"packed_info": None, "ray_indices": torch.tensor([0, 1, 2]), "n_rays": 2},
            ValueError,
            r"must be in \[0, 2\)",
        ),
        ({"packed_info": None, "ray_indices": torch.tensor([0, 1, 1])}, ValueError, "n_rays must be given"),
    ],
)
def test_refusals(change, error, text):
    arguments = {"sigmas": torch.ones(3), "rgb": torch.ones(3, 3), "t_starts": torch.zeros(3), "t_ends": torch.ones(3)}
    arguments |= {"packed_info": torch.tensor([[0, 2], [2, 1]])} | change
    with pytest.raises(error, match=f"composite: .*{text}"):
        composite(**arguments)


def test_occupied_corner_of_the_pack_is_not_needed():
    # A grid bit pattern only decides the samples; compositing them is independent of how they were found.
    bits = pack_bits(torch.rand(512, generator=torch.Generator().manual_seed(0)) < 0.5)
    rays_o, rays_d = torch.tensor([[-2.0, 0.1, 0.2]]), torch.tensor([[1.0, 0.02, 0.01]])
    samples = march_rays(rays_o, rays_d, (-1, -1, -1, 1, 1, 1), bits, 8, 0.01)
    sigmas, rgb = samples.t_mids, torch.rand(samples.n_samples, 3)
    whole = composite(sigmas, rgb, samples.t_starts, samples.t_ends, packed_info=samples.packed_info)
    half = samples.n_samples // 2
    split = torch.tensor([[0, half], [half, samples.n_samples - half]])
    parts = composite(sigmas, rgb, samples.t_starts, samples.t_ends, packed_info=split)
    front, back = parts.rgb
    torch.testing.assert_close(whole.rgb[0], front + (1 - parts.opacity[0]) * back)
