"""The fused field: parity with its reference flag by flag, determinism, extremes, and every instruction set."""

import os
import subprocess
import sys
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tolerances import close_to_largest

from mvdream_fast import ops
from mvdream_fast.ops.field import FieldSpec
from mvdream_fast.ops.hash_encode import HashGrid

GRID = HashGrid(n_levels=6, log2_size=10, base_resolution=6, growth=1.6)


def network(generator, n_in, width, n_hidden, n_out):
    sizes = [n_in] + [width] * n_hidden + [n_out]
    return [(torch.randn(b, a, generator=generator) / a**0.5).requires_grad_() for a, b in pairwise(sizes)]


def inputs(spec, n_points=700, width=32, n_hidden=1, seed=0):
    """(positions, table, density weights, feature weights), some points outside the box, and two cotangents."""
    generator = torch.Generator().manual_seed(seed)
    positions = (torch.rand(n_points, 3, generator=generator) * 2.4 - 1.2) * spec.radius
    table = torch.randn(spec.grid.n_entries, spec.grid.n_features, generator=generator)
    density = network(generator, spec.grid.width, width, n_hidden, 1)
    features = network(generator, spec.grid.width, width, n_hidden, 3)
    d = torch.randn(n_points, generator=generator), torch.randn(n_points, 3, generator=generator)
    return (positions.requires_grad_(), table.requires_grad_(), density, features), d


def leaves(arguments):
    positions, table, density, features = arguments
    return positions, table, *density, *features


def compare(spec, **sizes):
    arguments, d = inputs(spec, **sizes)
    out, ref = ops.field(*arguments, spec), ops.field_ref(*arguments, spec)
    for a, b in zip(out, ref):
        close_to_largest("field", a, b)
    gradients = torch.autograd.grad(out, leaves(arguments), d)
    for a, b in zip(gradients, torch.autograd.grad(ref, leaves(arguments), d)):
        close_to_largest("field.gradients", a, b)


@pytest.mark.parametrize("n_points", [0, 1, 63, 192, 1700])
def test_sizes(n_points):
    compare(FieldSpec(GRID), n_points=n_points)


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("n_hidden", [1, 2, 3])
def test_networks(width, n_hidden):
    compare(FieldSpec(GRID), n_points=250, width=width, n_hidden=n_hidden)


@pytest.mark.parametrize(
    "flags",
    [
        {"density_activation": "exp", "bias_scale": 1.0},
        {"density_activation": "none", "bias_scale": 0.5},
        {"color_sigmoid": False},
        {"bias_scale": 0.0},
        {"bias_scale": 3.0, "bias_std": 0.2, "radius": 0.7},
        {"radius": 2.5},
        {"grid": HashGrid(n_levels=3, n_features=1, log2_size=8, base_resolution=4)},
        {"grid": HashGrid(n_levels=3, n_features=4, log2_size=8, base_resolution=4)},
        {"grid": HashGrid(n_levels=3, n_features=8, log2_size=8, base_resolution=4)},
    ],
    ids=str,
)
def test_flags(flags):
    compare(FieldSpec(**({"grid": GRID} | flags)))


@pytest.mark.parametrize("kept", ["sigmas", "rgb"])
def test_gradient_of_one_output(kept):
    spec = FieldSpec(GRID)
    arguments, d = inputs(spec)
    which = ["sigmas", "rgb"].index(kept)
    wanted = [x for x in leaves(arguments) if not any(x is y for y in arguments[3 - which])]
    actual = torch.autograd.grad(ops.field(*arguments, spec)[which], wanted, d[which])
    for a, b in zip(actual, torch.autograd.grad(ops.field_ref(*arguments, spec)[which], wanted, d[which])):
        close_to_largest("field.gradients", a, b)


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_inputs_change_no_other_gradient(frozen):
    spec = FieldSpec(GRID)
    arguments, d = inputs(spec)
    names = ["positions", "table", *["density"] * 2, *["features"] * 2]
    expected = dict(enumerate(torch.autograd.grad(ops.field(*arguments, spec), leaves(arguments), d)))
    chosen = ["positions", "table", "density", "features"][frozen]
    frozen_arguments = list(arguments)
    part = arguments[frozen]
    frozen_arguments[frozen] = [w.detach() for w in part] if isinstance(part, list) else part.detach()
    trained = [i for i, name in enumerate(names) if name != chosen]
    out = ops.field(*frozen_arguments, spec)
    for i, gradient in zip(trained, torch.autograd.grad(out, [leaves(arguments)[i] for i in trained], d)):
        assert torch.equal(gradient, expected[i])


def test_density_alone_is_the_same():
    spec = FieldSpec(GRID)
    (positions, table, density, features), (d, _) = inputs(spec)
    sigmas = ops.field_density(positions, table, density, spec)
    assert torch.equal(sigmas, ops.field(positions, table, density, features, spec)[0])
    ref = ops.field_density_ref(positions, table, density, spec)
    wanted = [positions, table, *density]
    for a, b in zip(torch.autograd.grad(sigmas, wanted, d), torch.autograd.grad(ref, wanted, d)):
        close_to_largest("field.gradients", a, b)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_same_bits_for_any_number_of_threads(set_threads):
    spec = FieldSpec(GRID)
    arguments, d = inputs(spec, n_points=7000)  # several blocks of tiles, the last one partial

    def run(n_threads):
        set_threads(n_threads)
        out = ops.field(*arguments, spec)
        return *out, *torch.autograd.grad(out, leaves(arguments), d)

    first = run(1)
    for n_threads in (2, 3, 4, 8):
        assert all(torch.equal(a, b) for a, b in zip(first, run(n_threads)))


def test_batch_longer_than_a_run():
    # 256 columns: a run holds 32,768 points at most, so that this batch is worked on in two.
    grid = HashGrid(n_levels=32, n_features=8, log2_size=6, base_resolution=2, growth=1.1)
    spec = FieldSpec(grid)
    arguments, d = inputs(spec, n_points=33_000, width=16)
    positions, *parameters = arguments
    half = 20_000

    def gradients(part):
        out = ops.field(positions[part], *parameters, spec)
        return out, torch.autograd.grad(out, leaves(arguments), [x[part] for x in d])

    whole, first, second = gradients(slice(None)), gradients(slice(0, half)), gradients(slice(half, None))
    for i in range(2):
        assert torch.equal(whole[0][i], torch.cat([first[0][i], second[0][i]]))
    assert torch.equal(whole[1][0], first[1][0] + second[1][0])
    for total, a, b in zip(whole[1][1:], first[1][1:], second[1][1:]):
        close_to_largest("field.gradients", total, a + b)


def test_activations_far_from_zero():
    # Zero weights leave the density bias alone: raw densities from 100 down to -100 along an axis.
    spec = FieldSpec(GRID, bias_scale=100.0, bias_std=0.5)
    x = torch.linspace(0, 1, 401)
    positions = torch.stack([x, 0 * x, 0 * x], dim=-1)
    zeros = [torch.zeros(16, spec.grid.width), torch.zeros(1, 16)]
    table = torch.zeros(spec.grid.n_entries, 2)
    raw = 100 * (1 - x / 0.5)
    for name, expected in (("softplus", torch.nn.functional.softplus(raw.double())), ("exp", raw.double().exp())):
        sigmas = ops.field_density(positions, table, zeros, FieldSpec(GRID, 1.0, 100.0, 0.5, name)).double()
        normal = expected.float().isfinite() & (expected > 1.2e-38)
        # One rounding of `raw` near 100 is 4e-6, and that is the relative change of exp(raw).
        assert ((sigmas - expected).abs() <= 1e-5 * expected)[normal].all()
        assert (sigmas[expected <= 1.2e-38] <= 1.2e-38).all()
        assert sigmas[~expected.float().isfinite()].isinf().all()


def test_colors_far_from_zero():
    grid = HashGrid(n_levels=1, n_features=1, base_resolution=2)
    spec = FieldSpec(grid)
    density = [torch.zeros(16, 1), torch.zeros(1, 16)]
    features = [torch.ones(16, 1), torch.tensor([[1.0], [-1.0], [0.0]]).expand(3, 16).contiguous()]
    for value in (0.01, 1.0, 5.0, 50.0):
        _, rgb = ops.field(torch.zeros(1, 3), torch.full((8, 1), value), density, features, spec)
        expected = torch.tensor([16 * value, -16 * value, 0.0]).double().sigmoid()
        # Relative accuracy down to the smallest normal number, below which 0 is the answer.
        assert ((rgb[0] - expected).abs() <= 3e-6 * expected + 1.2e-38).all()


@pytest.mark.parametrize("broken", range(1, 4))
@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_nan_in_parameters_shows(broken, activation):
    # A diverged optimisation must not pass for an empty scene.
    spec = FieldSpec(GRID, density_activation=activation)
    arguments = [x.detach() if torch.is_tensor(x) else [w.detach() for w in x] for x in inputs(spec, n_points=50)[0]]
    (arguments[broken] if broken == 1 else arguments[broken][0]).fill_(float("nan"))
    for out, ref in zip(ops.field(*arguments, spec), ops.field_ref(*arguments, spec)):
        assert torch.equal(out.isnan(), ref.isnan())
        assert ref.isnan().all() or broken > 1


def test_gradient_at_the_centre_is_finite():
    spec = FieldSpec(GRID)
    (_, table, density, features), _ = inputs(spec, n_points=1)
    centre = torch.zeros(1, 3, requires_grad=True)
    for field in (ops.field, ops.field_ref):
        sigmas, _ = field(centre, table, density, features, spec)
        assert torch.autograd.grad(sigmas.sum(), centre)[0].isfinite().all()


def test_strided_inputs():
    spec = FieldSpec(GRID)
    (positions, table, density, features), _ = inputs(spec)
    expected = ops.field(positions, table, density, features, spec)
    strided = [w.detach().t().contiguous().t().requires_grad_() for w in features]
    padded = torch.cat([positions, positions], dim=1)[:, :3].detach().requires_grad_()
    actual = ops.field(padded, table.t().contiguous().t(), density, strided, spec)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    # A sum hands a stride-0 cotangent down.
    a = torch.autograd.grad(sum(x.sum() for x in actual), [padded, *strided])
    b = torch.autograd.grad(sum(x.sum() for x in expected), [positions, *features])
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_gradients_of_the_reference():
    spec = FieldSpec(HashGrid(n_levels=2, n_features=2, log2_size=4, base_resolution=2, growth=2.0), bias_scale=2.0)
    arguments, _ = inputs(spec, n_points=2, width=16, seed=5)
    doubles = [x.detach().double().requires_grad_() for x in leaves(arguments)]

    def run(positions, table, *weights):
        return ops.field(positions, table, weights[:2], weights[2:], spec)  # float64 runs the reference

    assert torch.autograd.gradcheck(run, doubles, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, doubles, fast_mode=True)


def test_second_derivatives_of_the_native_op():
    spec = FieldSpec(GRID)
    (positions, table, density, features), (d, _) = inputs(spec, n_points=50)

    def second(field):
        sigmas, rgb = field(positions, table, density, features, spec)
        (slope,) = torch.autograd.grad(sigmas, positions, d, create_graph=True)
        return torch.autograd.grad((slope.square().sum(), rgb.sum()), [positions, table, *density, *features])

    for a, b in zip(second(ops.field), second(ops.field_ref)):
        close_to_largest("second_derivatives", a, b)


def test_densities_have_no_gradient_in_the_colors_weights():
    spec = FieldSpec(GRID)
    (positions, table, density, features), (d, _) = inputs(spec, n_points=20)
    frozen = [positions.detach(), table.detach(), [w.detach() for w in density], features]
    sigmas, _ = ops.field(*frozen, spec)
    gradients = torch.autograd.grad(sigmas, features, d, create_graph=True)
    assert [g.shape for g in gradients] == [w.shape for w in features]
    assert not any(g.any() for g in gradients)


def test_second_derivatives_under_autocast_are_those_without_it():
    spec = FieldSpec(GRID)
    (positions, table, density, features), (d, _) = inputs(spec, n_points=50)

    def slope():
        sigmas, _ = ops.field(positions, table, density, features, spec)
        return torch.autograd.grad(sigmas, positions, d, create_graph=True)[0]

    wanted = slope()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = slope()
    assert torch.equal(got, wanted)
    leaf = [table, *density]
    second = [torch.autograd.grad(x.square().sum(), leaf) for x in (got, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*second, strict=True))


def test_forward_mode_goes_through_the_reference():
    spec = FieldSpec(GRID)
    positions, table, density, features = (
        x.detach() if torch.is_tensor(x) else [w.detach() for w in x] for x in inputs(spec, n_points=20)[0]
    )
    step = torch.ones_like(density[1])
    _, along = torch.func.jvp(
        lambda last: ops.field(positions, table, [density[0], last], features, spec)[0], (density[1],), (step,)
    )
    wide = [x.double() for x in (positions, table, *density, *features)]
    ends = [ops.field_ref(*wide[:2], [wide[2], wide[3] + e], wide[4:], spec)[0] for e in (1e-4, -1e-4)]
    torch.testing.assert_close(along.double(), (ends[0] - ends[1]) / 2e-4, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="field: arguments must be plain tensors, got a vmapped one"):
        torch.func.vmap(lambda x: ops.field(x, table, density, features, spec))(positions[None])


@pytest.mark.parametrize("fixed", ["nothing", "positions", "table", "density", "features"])
def test_the_registered_form(fixed):
    spec = FieldSpec(GRID)
    names = ("positions", "table", "density", "features")
    arguments = [
        x if name != fixed else x.detach() if torch.is_tensor(x) else [w.detach() for w in x]
        for name, x in zip(names, inputs(spec, n_points=9, width=16)[0], strict=True)
    ]
    numbers = [*map(float, astuple(GRID)), spec.radius, spec.bias_scale, spec.bias_std]
    flags = (numbers, spec.density_activation, spec.color_sigmoid)
    torch.library.opcheck(torch.ops.mvdream_fast.field.default, (*arguments, *flags))


@pytest.mark.parametrize("color", [True, False])
def test_compiles_in_one_graph(color):
    spec = FieldSpec(GRID)
    arguments, d = inputs(spec, n_points=50)
    positions, table, density, features = arguments

    def run(positions, table, density, features):
        if not color:
            return (ops.field_density(positions, table, density, spec),)
        return ops.field(positions, table, density, features, spec)

    compiled, results = torch.compile(run, fullgraph=True, backend="aot_eager"), []
    wanted = leaves(arguments) if color else (positions, table, *density)
    for function in (run, compiled):
        out = function(*arguments)
        results.append([*out, *torch.autograd.grad(out, wanted, d[: len(out)])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_arguments_are_named():
    spec = FieldSpec(GRID)
    positions, table, density, features = inputs(spec, n_points=5)[0]
    thin = [torch.zeros(24, GRID.width), torch.zeros(1, 24)]
    deep = [density[0], *[torch.zeros(32, 32)] * 3, density[1]]
    for bad, error, message in [
        ((positions[0], table, density, features), ValueError, r"field: positions must be of shape \[any, 3\]"),
        ((positions, table[:-1], density, features), ValueError, "field: table must be of shape"),
        ((positions, table, thin, features), ValueError, r"field: density_weights\[0\] must be \[width, 12\], got"),
        ((positions, table, deep, features), ValueError, "field: density_weights must be 2 to 4 matrices, got 5; use"),
        ((positions, table, density, density), ValueError, r"field: feature_weights\[1\] must be of shape \[3, 32\]"),
        ((positions, table, [w.double() for w in density], features), TypeError, r"field: density_weights\[0\] must"),
    ]:
        with pytest.raises(error, match=message):
            ops.field(*bad, spec)
    nan = torch.full((5, 3), float("nan"))
    with pytest.raises(ValueError, match="field: positions must be numbers, got NaN; check what produced them"):
        ops.field(nan, table, density, features, spec)
    with pytest.raises(ValueError, match="FieldSpec: density_activation must be softplus, exp or none, got 'relu'"):
        FieldSpec(GRID, density_activation="relu")


def run_isa(isa, *arguments):
    path = os.pathsep.join(filter(None, sys.path))  # this file imports its neighbours, there too
    environment = os.environ | {"MVDREAM_FAST_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def outputs_of_every_op():
    """What the packed-sample ops answer to one input: to be compared between instruction sets."""
    spec = FieldSpec(GRID)
    arguments, d = inputs(spec)
    out = ops.field(*arguments, spec)
    grids = [HashGrid(3, n_features, 8, 4) for n_features in (1, 4, 8)]
    encoded = [ops.hash_encode(*inputs(FieldSpec(grid))[0][:2], grid) for grid in grids]
    return [*out, *torch.autograd.grad(out, leaves(arguments), d), *encoded, *outputs_along_rays()]


def outputs_along_rays():
    generator = torch.Generator().manual_seed(7)
    rays_o = torch.nn.functional.normalize(torch.randn(60, 3, generator=generator), dim=-1) * 2.5
    rays_d = torch.nn.functional.normalize(-rays_o + 0.3 * torch.randn(60, 3, generator=generator), dim=-1)
    box, bits = (-1.0,) * 3 + (1.0,) * 3, torch.randint(0, 256, (512,), generator=generator, dtype=torch.uint8)
    samples = ops.march_rays(rays_o, rays_d, box, bits, 16, 0.02, torch.rand(60, generator=generator))
    positions = samples.positions(rays_o, rays_d)
    sigmas = (20 * positions[:, 0] ** 2).detach().requires_grad_()
    rgb = positions.abs().requires_grad_()
    out = ops.composite(sigmas, rgb, samples.t_starts, samples.t_ends, packed_info=samples.packed_info)
    gradients = torch.autograd.grad(out.rgb.sum() + out.z_variance.sum(), (sigmas, rgb))
    kept = ops.prune_samples(samples, sigmas.detach(), 0.01, 0.1)
    scans = [ops.packed_scan(sigmas.detach() / 20, samples.packed_info, product) for product in (False, True)]
    image = ops.render(rays_o, rays_d, lambda x: (20 * x[:, 0] ** 2, x.abs()), box, bits, 16, 0.02)
    occupancy = ops.update_occupancy(torch.rand(4096, generator=generator), torch.rand(4096, generator=generator))
    geometry = (samples.t_starts, samples.t_ends, kept.t_starts, kept.packed_info)
    return [*geometry, *out, *gradients, *scans, *image[:3], *occupancy]


def test_instruction_sets_agree(tmp_path):
    from mvdream_fast import _C

    usable = _C.build_info()["isa_usable"].split(", ")
    assert usable[0] == "baseline"
    results = {}
    for isa in usable:
        done = run_isa(isa, __file__, str(tmp_path / isa))
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [isa]
        results[isa] = torch.load(tmp_path / isa)
    for isa in usable[1:]:
        for a, b in zip(results[isa], results["baseline"], strict=True):
            close_to_largest("instruction_sets", a, b)


def test_instruction_sets_are_reported():
    from mvdream_fast import _C

    info = _C.build_info()
    untested = info.get("isa_untested", "").split(", ")
    names = info["isa_usable"].split(", ") + [name for name in untested if name]
    assert names[0] == "baseline"
    if os.uname().machine == "x86_64":
        assert names == ["baseline", "avx2", "avx512"]  # the widest is built everywhere, run only where the CPU has it
    assert info["isa"] in info["isa_usable"].split(", ")
    for name in (*filter(None, untested), "mmx"):
        refused = run_isa(name, "-c", "from mvdream_fast import _C; _C.build_info()")
        assert refused.returncode != 0
        assert f"got {name}; unset it to take the best one" in refused.stderr


if __name__ == "__main__":
    from mvdream_fast import _C

    print(_C.build_info()["isa"])
    torch.save([x.detach().double() for x in outputs_of_every_op()], Path(sys.argv[1]))
