"""ops.time_camera_embedding: CPU path, registered form and Triton kernels against the reference."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from tolerances import close, within_flash_rule
from torch.utils.checkpoint import checkpoint
from triton_on_cpu import CAMPAIGN, DEVICE, DRAWN

from mvdream_fast.ops import MLP, camera_embedding, time_camera_embedding, time_camera_embedding_ref
from mvdream_fast.ops.time_camera_embedding import _d_silu, _forward_cpu, _TimeCameraEmbedding, sinusoid

OP = "time_camera_embedding"


def draw(
    images=3,
    width=16,
    frequencies=12,
    outputs=20,
    *,
    camera="matrix",
    dtype=torch.float32,
    seed=0,
    device="cpu",
    steps=1000,
):
    """The op's arguments by name (`camera`: "matrix", "embedding" or "none"), and a cotangent; t wants no gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes, scale=1.0):
        return (torch.randn(*sizes, generator=generator) * scale).to(dtype).to(device).requires_grad_()

    def mlp(n_in):
        first = normal(width, n_in, scale=n_in**-0.5)
        return MLP(first, normal(width), normal(width, width, scale=width**-0.5), normal(width))

    arguments = {
        "t": torch.randint(0, steps, (images,), generator=generator).to(device),
        "camera": normal(images, 16) if camera == "matrix" else None,
        "time_mlp": mlp(2 * frequencies),
        "camera_mlp": mlp(16) if camera == "matrix" else None,
        "projections_weight": normal(outputs, width, scale=width**-0.5),
        "projections_bias": normal(outputs),
        "camera_embedding": normal(images, width) if camera == "embedding" else None,
    }
    return arguments, torch.randn(images, outputs, generator=generator).to(dtype).to(device)


def leaves(arguments):
    """The tensors that want gradients, by name."""
    found = {}
    for name, x in arguments.items():
        for i, y in enumerate(x if isinstance(x, tuple) else [x]):
            if y is not None and y.requires_grad:
                found[f"{name}{i}"] = y
    return found


def run(function, arguments, d_out):
    out = function(**arguments)
    named = leaves(arguments)
    return {"out": out.detach()} | dict(zip(named, torch.autograd.grad(out, list(named.values()), d_out)))


def double(arguments):
    def one(x):
        return x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) and x.requires_grad else x

    return {n: MLP(*map(one, x)) if isinstance(x, MLP) else one(x) for n, x in arguments.items()}


def by_kernels(t, camera, time_mlp, camera_mlp, projections_weight, projections_bias, camera_embedding):
    second = camera_mlp or (None,) * 4
    return _TimeCameraEmbedding.apply(
        t, camera, camera_embedding, *time_mlp, *second, projections_weight, projections_bias
    )


CAMERAS = ["matrix", "embedding", "none"]


@pytest.mark.parametrize("camera", CAMERAS)
def test_cpu_path_matches_reference(camera):
    arguments, d_out = draw(camera=camera)
    results = run(time_camera_embedding, arguments, d_out)
    for name, expected in run(time_camera_embedding_ref, arguments, d_out).items():
        close(OP, results[name], expected)


def test_sinusoid_has_cosines_first():
    # width 4: frequencies 1 and 1/100
    expected = [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]
    assert sinusoid(torch.tensor([3]), 4)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_worked_by_hand():
    # t = 0: the sinusoid is (1, 0). Every weight 1, every bias 0, width 1: hidden 1, silu(1) = 0.731059,
    # the camera (1, 0, ...) adds the same, so emb = 1.462117 and silu(emb) = 1.187029, twice that with weight 2.
    one = torch.ones(1, 1)
    time_mlp, camera_mlp = (MLP(torch.ones(1, n), torch.zeros(1), one, torch.zeros(1)) for n in (2, 16))
    camera = torch.zeros(1, 16)
    camera[0, 0] = 1
    out = time_camera_embedding(torch.tensor([0]), camera, time_mlp, camera_mlp, 2 * one, torch.tensor([10.0]))
    assert out.item() == pytest.approx(10 + 2 * 1.1870289, abs=1e-5)


def test_a_precomputed_camera_part_gives_the_same():
    arguments, _ = draw()
    expected = time_camera_embedding(**arguments)
    ready = camera_embedding(arguments["camera"], arguments["camera_mlp"])
    close(OP, time_camera_embedding(**arguments | {"camera": None, "camera_embedding": ready}), expected)


@pytest.mark.parametrize("function", [time_camera_embedding, by_kernels])
def test_empty(function):
    arguments, d_out = draw(images=0, device=DEVICE)
    results = run(function, arguments, d_out)
    assert results.pop("out").shape == (0, 20)
    assert not any(g.any() for g in results.values())


@pytest.mark.parametrize("camera", CAMERAS)
def test_gradients_in_float64(camera):
    arguments, _ = draw(2, 3, 2, 4, camera=camera, dtype=torch.float64)
    flat = leaves(arguments)

    def rebuild(function):
        def call(*tensors):
            rest = dict(zip(flat, tensors))
            mlps = {n: MLP(*(rest[f"{n}{i}"] for i in range(4))) for n in ("time_mlp", "camera_mlp") if f"{n}0" in rest}
            singles = {n: rest[f"{n}0"] for n in arguments if f"{n}0" in rest and n not in mlps}
            return function(**dict.fromkeys(arguments) | {"t": arguments["t"]} | mlps | singles)

        return call

    def registered(t, camera, time_mlp, camera_mlp, projections_weight, projections_bias, camera_embedding):
        second = camera_mlp or (None,) * 4
        return torch.ops.mvdream_fast.time_camera_embedding(
            t, camera, camera_embedding, *time_mlp, *second, projections_weight, projections_bias
        )[0]

    assert torch.autograd.gradcheck(rebuild(registered), tuple(flat.values()))


def term_sizes(arguments, d_out):
    """The largest sum of absolute terms behind each result, in float64: what its rounding errors are relative to."""
    a, d = double(arguments), d_out.double().abs()
    weight, bias = a["projections_weight"], a["projections_bias"]
    camera_mlp = a["camera_mlp"] or (None,) * 4
    inputs = (a["t"], a["camera"], a["camera_embedding"], *a["time_mlp"], *camera_mlp, weight, bias)
    _, emb, hidden_t, hidden_c = _forward_cpu(*inputs)
    active, d_emb = F.silu(emb).abs(), d @ weight.abs() * _d_silu(emb).abs()
    sizes = {"out": active @ weight.abs().t() + bias.abs(), "camera_embedding0": d_emb}
    sizes |= {"projections_weight0": d.t() @ active, "projections_bias0": d.sum(0)}
    wave = sinusoid(a["t"], a["time_mlp"].w0.shape[1], torch.float64)
    for name, x, hidden in (("time_mlp", wave, hidden_t), ("camera_mlp", a["camera"], hidden_c)):
        if hidden is not None:
            d_hidden = d_emb @ a[name].w2.abs() * _d_silu(hidden).abs()
            grads = (d_hidden.t() @ x.abs(), d_hidden.sum(0), d_emb.t() @ F.silu(hidden).abs(), d_emb.sum(0))
            sizes |= {f"{name}{i}": g for i, g in enumerate(grads)} | {"camera0": d_hidden @ a[name].w0.abs()}
    return {name: size.max().item() for name, size in sizes.items()}


def check_case(case):
    rng = random.Random(case)
    arguments, d_out = draw(
        rng.choice([1, 2, 3, 5] + [17] * (case % 20 == 0)),
        rng.choice([1, 7, 16, 33] + [70] * (case % 10 == 0)),
        rng.choice([1, 5, 16, 20]),
        rng.choice([1, 9, 16, 40] + [70] * (case % 10 == 5)),
        camera=rng.choice(CAMERAS),
        dtype=(dtype := rng.choice([torch.float32, torch.float16])),
        seed=case,
        device=DEVICE,
        # In float32 an angle of 1000 is known to 3e-5, more than all the rest: large steps have a test of their own.
        steps=1000 if dtype == torch.float16 else 10,
    )
    results, plain = run(by_kernels, arguments, d_out), run(time_camera_embedding_ref, arguments, d_out)
    exact = run(time_camera_embedding_ref, double(arguments), d_out.double())
    terms = term_sizes(arguments, d_out)
    for name, result in results.items():
        # Three layers of values of order 1 round by about 4 ulp of 1, whatever the last of them sums.
        within_flash_rule(result, plain[name], exact[name], max(4, terms[name]))


@pytest.mark.parametrize("case", DRAWN)
def test_kernels_follow_the_flash_rule(case):
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CAMPAIGN)
def test_kernels_follow_the_flash_rule_campaign(case):
    check_case(case)


def test_kernels_know_large_steps_to_the_rounding_of_their_angle():
    arguments, _ = draw(4, 16, 20, 9, device=DEVICE)
    arguments["t"][0] = 999
    exact = time_camera_embedding_ref(**double(arguments))
    torch.testing.assert_close(by_kernels(**arguments).double(), exact, atol=1e-4, rtol=1e-4)


def test_kernels_repeat_bit_for_bit():
    arguments, d_out = draw(dtype=torch.float16, device=DEVICE)
    first = run(by_kernels, arguments, d_out)
    for _ in range(19):
        again = run(by_kernels, arguments, d_out)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.parametrize("function", [time_camera_embedding, by_kernels])
def test_gradient_checkpointing(function):
    arguments, d_out = draw(device=DEVICE)

    def body(**named):
        return checkpoint(lambda *a: function(**dict(zip(named, a))), *named.values(), use_reentrant=False)

    again = run(body, arguments, d_out)
    assert all(torch.equal(x, again[name]) for name, x in run(function, arguments, d_out).items())


def test_autocast_computes_in_the_weights_dtype_and_casts_the_result():
    arguments, _ = draw()
    with torch.autocast("cpu", torch.bfloat16):
        out = time_camera_embedding(**arguments)
    assert torch.equal(out, time_camera_embedding(**arguments).bfloat16())


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize(("images", "dtype"), [(3, torch.float32), (1, torch.float32), (2, torch.float64)])
def test_opcheck(camera, images, dtype):
    x, _ = draw(images, camera=camera, dtype=dtype)
    second = x["camera_mlp"] or (None,) * 4
    rest = (x["projections_weight"], x["projections_bias"])
    arguments = (x["t"], x["camera"], x["camera_embedding"], *x["time_mlp"], *second, *rest)
    results = torch.library.opcheck(torch.ops.mvdream_fast.time_camera_embedding.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("camera", CAMERAS)
def test_compiles_to_one_graph(camera):
    arguments, d_out = draw(camera=camera)
    results = run(torch.compile(time_camera_embedding, fullgraph=True, backend="aot_eager"), arguments, d_out)
    for name, expected in run(time_camera_embedding, arguments, d_out).items():
        close(OP, results[name], expected)


def test_vmap_is_refused():
    arguments, _ = draw()
    with pytest.raises(RuntimeError, match="time_camera_embedding: arguments must be plain tensors, got a vmapped one"):
        torch.func.vmap(lambda t: time_camera_embedding(**arguments | {"t": t}))(torch.zeros(2, 3))


def test_not_differentiable_in_t():
    arguments, _ = draw()
    t = torch.tensor([1.0, 2.0, 3.0]).requires_grad_()
    out = time_camera_embedding(**arguments | {"t": t})
    assert out.requires_grad  # by its weights
    assert torch.autograd.grad(out.sum(), t, allow_unused=True) == (None,)


def test_autocast_keeps_float64_and_the_camera_part_its_dtype():
    arguments, _ = draw()
    mlp = arguments["camera_mlp"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(camera_embedding(arguments["camera"], mlp), camera_embedding(arguments["camera"], mlp))
        assert camera_embedding(arguments["camera"], mlp).dtype == torch.float32
        wide = {k: MLP(*(w.double() for w in v)) if isinstance(v, tuple) else v for k, v in arguments.items()}
        wide |= {k: wide[k].double() for k in ("projections_weight", "projections_bias")}
        assert time_camera_embedding(**wide).dtype == torch.float64


def test_the_camera_part_refuses_other_shapes():
    arguments, _ = draw()
    with pytest.raises(ValueError, match=r"camera must be \[B\*V, 16\], got \[3, 15\]; flatten each matrix"):
        camera_embedding(torch.zeros(3, 15), arguments["camera_mlp"])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"t": torch.zeros(3, 1)}, ValueError, r"t must be \[B\*V\], got \(3, 1\)"),
        ({"camera": torch.zeros(2, 16)}, ValueError, r"camera must be \[3, 16\], got \[2, 16\]"),
        ({"camera_mlp": None}, ValueError, "camera_mlp must be given with camera, got None"),
        ({"camera_embedding": torch.zeros(3, 16)}, ValueError, "camera must be None with camera_embedding, got both"),
        ({"projections_bias": torch.zeros(19)}, ValueError, "projections_weight and projections_bias must be"),
        ({"projections_bias": torch.zeros(20).half()}, TypeError, "projections_bias must be torch.float32"),
        ({"t": torch.zeros(3, device="meta")}, RuntimeError, "t must be on the device of projections_weight"),
        ({"time_mlp": MLP(*(torch.zeros(16, 16),) * 4)}, ValueError, r"time_mlp.w0, b0 and b2 .*, got \[16, 16\]"),
    ],
)
def test_bad_arguments(change, error, text):
    with pytest.raises(error, match=f"time_camera_embedding: {text}"):
        time_camera_embedding(**draw()[0] | change)
