"""ops.cross_view_attention: CPU path, registered form and Triton kernels against the reference."""

import random
from importlib import import_module

import pytest
import torch
import triton
import triton.language as tl
from mvdream_fast.kernels._attention_rows import token_offsets
from threads import by_threads
from tolerances import PARITY, close, within_flash_rule
from torch.utils.checkpoint import checkpoint
from triton_on_cpu import CAMPAIGN, DEVICE, DRAWN, SMALL, SMALL_AHEAD

from mvdream_fast.ops import cross_view_attention as attention
from mvdream_fast.ops import cross_view_attention_ref as attention_ref

OP = "cross_view_attention"
CAMERAS = ("camera_q", "camera_k", "camera_v")


def draw(shape=(4, 5, 2, 8), *, cameras=CAMERAS, dtype=torch.float32, layout="plain", seed=0, size=1.0, device="cpu"):
    """q, k, v and the camera vectors, leaves that want gradients, and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    images, tokens, heads, width = shape

    def normal(*sizes):
        return (torch.randn(*sizes, generator=generator) * size).to(dtype).to(device)

    if layout == "packed":  # slices of one QKV projection
        rows = normal(images, tokens, 3, heads, width).unbind(2)
    elif layout == "heads first":
        rows = [normal(images, heads, tokens, width).transpose(1, 2) for _ in range(3)]
    elif layout == "every other":
        rows = [normal(images * 2, tokens, heads, width * 2)[::2, :, :, ::2] for _ in range(3)]
    elif layout == "stride 0":
        rows = [normal(1, tokens, heads, width).expand(shape) for _ in range(3)]
    else:
        rows = [normal(*shape) for _ in range(3)]
    named = dict(zip("qkv", rows)) | {name: normal(images, heads, width) for name in cameras}
    return {name: x.detach().requires_grad_() for name, x in named.items()}, normal(*shape) / size


def run(function, inputs, d_out, n_views, **flags):
    """The output and every gradient, by name."""
    out = function(**inputs, n_views=n_views, **flags)
    grads = torch.autograd.grad(out, list(inputs.values()), d_out)
    return {"out": out.detach()} | {f"d_{name}": g for name, g in zip(inputs, grads)}


def double(inputs):
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


def by_kernels(q, k, v, n_views, *, camera_q=None, camera_k=None, camera_v=None, cross_view=True, scale=None):
    """The Triton path, whatever the device."""
    from mvdream_fast.ops.cross_view_attention import _CrossViewAttention

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    views = n_views if cross_view else 1
    return _CrossViewAttention.apply(q, k, v, views, camera_q, camera_k, camera_v, scale)


@pytest.fixture(params=[SMALL, SMALL_AHEAD], ids=["small", "ahead"])
def small_tiles(monkeypatch, request):
    from mvdream_fast.kernels import cross_view_attention as kernels

    monkeypatch.setattr(kernels, "forward_tile", lambda *_: request.param)
    monkeypatch.setattr(kernels, "backward_tile", lambda *_: request.param)
    kept = (kernels._forward_launch, kernels._backward_launches)  # by layout, with the tiles they were made for
    for launches in kept:
        launches.cache_clear()
    yield
    for launches in kept:
        launches.cache_clear()


@pytest.fixture
def always_native(monkeypatch):
    """The extension's kernel for sequences of any length."""
    monkeypatch.setattr(import_module("mvdream_fast.ops.cross_view_attention"), "NATIVE_FROM", 1)


@pytest.fixture(params=["native", "torch's"])
def native_or_not(request):
    if request.param == "native":
        request.getfixturevalue("always_native")


@pytest.mark.parametrize("layout", ["plain", "packed", "heads first", "every other", "stride 0"])
@pytest.mark.parametrize("cross_view", [True, False])
@pytest.mark.parametrize("cameras", [(), CAMERAS, ("camera_k",)])
def test_cpu_path_matches_reference(layout, cross_view, cameras, native_or_not):
    inputs, d_out = draw((6, 7, 2, 12), layout=layout, cameras=cameras)
    results = run(attention, inputs, d_out, 3, cross_view=cross_view)
    expected = run(attention_ref, inputs, d_out, 3, cross_view=cross_view)
    for name, x in results.items():
        close(OP, x, expected[name])


def test_worked_by_hand(native_or_not):
    # Two views of one token: keys 0 and ln 3 for a query of 1 give weights 1/4 and 3/4, values 4 and 8 give 7.
    q = torch.ones(2, 1, 1, 1)
    k = torch.tensor([0.0, 3.0]).log().nan_to_num(neginf=0.0).reshape(2, 1, 1, 1)
    v = torch.tensor([4.0, 8.0]).reshape(2, 1, 1, 1)
    assert attention(q, k, v, 2, scale=1.0).flatten().tolist() == pytest.approx([7.0, 7.0])
    assert attention(q, k, v, 2, scale=1.0, cross_view=False).flatten().tolist() == [4.0, 8.0]
    camera = torch.tensor([3.0, 0.0]).log().nan_to_num(neginf=0.0).reshape(2, 1, 1)  # now both keys are ln 3
    assert attention(q, k, v, 2, scale=1.0, camera_k=camera).flatten().tolist() == pytest.approx([6.0, 6.0])


def test_permuting_views_permutes_the_output_and_scenes_do_not_mix():
    inputs, _ = draw((8, 5, 2, 8))
    out = attention(**inputs, n_views=4)
    order = torch.tensor([2, 0, 3, 1, 4, 5, 6, 7])
    close(OP, attention(**{name: x[order] for name, x in inputs.items()}, n_views=4), out[order])
    first = attention(**{name: x[:4] for name, x in inputs.items()}, n_views=4)
    close(OP, first, out[:4])


def test_regrouping_packed_views_makes_no_copy():
    from mvdream_fast.ops.cross_view_attention import _scene_shape, _scenes

    q = torch.randn(8, 6, 3, 2, 16).unbind(2)[1]
    assert _scenes(q, _scene_shape(q, 4)).data_ptr() == q.data_ptr()


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (4, 0, 2, 8), (4, 5, 0, 8)])
@pytest.mark.parametrize("function", [attention, by_kernels])
def test_empty(shape, function):
    inputs, d_out = draw(shape, device=DEVICE)
    results = run(function, inputs, d_out, 2)
    assert results["out"].shape == shape
    assert all(not results[f"d_{name}"].any() and results[f"d_{name}"].shape == x.shape for name, x in inputs.items())


def test_gradients_in_float64():
    inputs, _ = draw((4, 3, 2, 4), dtype=torch.float64)
    names = list(inputs)

    def registered(*tensors):
        x = dict(zip(names, tensors))
        cameras = [x[name] for name in CAMERAS]
        return torch.ops.mvdream_fast.cross_view_attention(x["q"], x["k"], x["v"], 2, *cameras, 0.5)[0]

    assert torch.autograd.gradcheck(registered, tuple(inputs.values()))
    assert torch.autograd.gradcheck(lambda *t: attention(**dict(zip(names, t)), n_views=2), tuple(inputs.values()))


def term_sizes(inputs, d_out, n_views, *, cross_view=True, scale=None):
    """The largest sum of absolute terms behind each result, in float64: what its rounding errors are relative to."""
    images, tokens, heads, width = d_out.shape
    x = {name: x.detach().double() for name, x in inputs.items()}
    rows = [x[n] + (x[f"camera_{n}"][:, None] if f"camera_{n}" in x else 0) for n in "qkv"]
    views = n_views if cross_view else 1
    q, k, v, d = (
        y.reshape(images // views, views * tokens, heads, width).transpose(1, 2) for y in (*rows, d_out.double())
    )
    scale = width**-0.5 if scale is None else scale
    scores = q @ k.mT * scale
    weights = scores.softmax(-1)
    d_weights = d @ v.mT
    d_scores = weights * (d_weights.abs() + (weights * d_weights).sum(-1, keepdim=True).abs()) * scale
    sizes = {
        "out": weights @ v.abs(),
        "d_q": d_scores @ k.abs(),
        "d_k": d_scores.mT @ q.abs(),
        "d_v": weights.mT @ d.abs(),
    }
    sizes |= {f"d_camera_{n}": sizes[f"d_{n}"].unflatten(2, (views, tokens)).sum(3) for n in "qkv"}
    # exp turns a rounding of its argument, float32 in every dtype, into a relative error of the argument's size.
    logit = scores.abs().max().item() * torch.finfo(torch.float32).eps / torch.finfo(d_out.dtype).eps
    return {name: size.max().item() * (1 + logit) for name, size in sizes.items()}


def random_case(case):
    """Sizes, layout and flags of one drawn case: small, odd more often than not."""
    rng = random.Random(case)
    views, scenes, heads = rng.choice([(1, 1, 2), (2, 1, 1), (2, 2, 1), (3, 1, 2), (4, 1, 1), (5, 1, 1)])
    width = rng.choice([1, 3, 8, 15, 16, 17, 20, 24, 32, 33, 40, 64] + [80, 160, 256] * (case % 10 == 0))
    return {
        "shape": (scenes * views, rng.randint(1, max(2, 44 // views)), heads, width),
        "dtype": rng.choice([torch.float32, torch.float16]),
        "layout": rng.choice(["plain", "packed", "heads first", "every other", "stride 0"]),
        "cameras": rng.choice([(), CAMERAS, CAMERAS, ("camera_q",), ("camera_k", "camera_v")]),
        "seed": case,
    }, {
        "n_views": views,
        "cross_view": rng.random() < 0.8,
        "scale": rng.choice([None, None, 0.3, 0.9]),
    }


def check_case(case):
    drawn, flags = random_case(case)
    inputs, d_out = draw(**drawn, device=DEVICE)
    if case % 7 == 0:
        d_out = d_out[:1, :1, :1, :1].expand(d_out.shape)  # what sum().backward() hands over
    results = run(by_kernels, inputs, d_out, **flags)
    plain = run(attention_ref, inputs, d_out, **flags)
    exact = run(attention_ref, double(inputs), d_out.double(), **flags)
    terms = term_sizes(inputs, d_out, **flags)
    for name, x in results.items():
        within_flash_rule(x, plain[name], exact[name], terms[name])


@pytest.mark.parametrize("case", DRAWN)
def test_kernels_follow_the_flash_rule(case, small_tiles):
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CAMPAIGN)
def test_kernels_follow_the_flash_rule_campaign(case, small_tiles):
    check_case(case)


@pytest.mark.parametrize("size", [1.0, 30.0, 200.0])
def test_kernels_hold_large_logits_in_float16(size, small_tiles):
    # A logit reaches size^2 * 64 = 2.6e6, forty times the largest float16; products stay float32 inside the kernel.
    inputs, d_out = draw((4, 9, 1, 64), dtype=torch.float16, size=size, cameras=(), device=DEVICE)
    results = run(by_kernels, inputs, d_out, 2, scale=1.0)
    wide = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    plain = run(attention_ref, wide, d_out.float(), 2, scale=1.0)  # in float16 itself the reference overflows
    exact = run(attention_ref, double(inputs), d_out.double(), 2, scale=1.0)
    terms = term_sizes(inputs, d_out, 2, scale=1.0)
    for name, x in results.items():
        assert torch.isfinite(x).all()
        within_flash_rule(x, plain[name].half(), exact[name], terms[name])


def test_kernels_repeat_bit_for_bit(small_tiles):
    inputs, d_out = draw((4, 9, 1, 16), dtype=torch.float16, device=DEVICE)
    first = run(by_kernels, inputs, d_out, 4)
    for _ in range(19):
        again = run(by_kernels, inputs, d_out, 4)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_kernels_with_the_tiles_of_a_gpu():
    inputs, d_out = draw((4, 32, 1, 64), layout="packed", device=DEVICE)  # 128 tokens: even tiles, no masks
    results = run(by_kernels, inputs, d_out, 4)
    plain = run(attention_ref, inputs, d_out, 4)
    exact = run(attention_ref, double(inputs), d_out.double(), 4)
    for name, x in results.items():
        within_flash_rule(x, plain[name], exact[name])


@triton.jit
def write_offsets(out, scene, views, tokens, strides, FLAT: tl.constexpr):
    rows = tl.arange(0, 8)
    tl.store(out + rows, token_offsets(tl.cast(scene, tl.int64), rows, views, tokens, strides, FLAT))


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("image", "token"), [(2**31 - 1, 3), (2**31 + 1, 2**30), (2**33, 2**31 - 1)])
def test_offsets_pass_two_to_the_31(flat, image, token):
    out = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    image = 2 * token if flat else image  # flat: two tokens an image
    write_offsets[(1,)](out, 3, 4, 2, (image, token, 1, 1), flat)
    assert out.tolist() == [(12 + r // 2) * image + (r % 2) * token for r in range(8)]


@pytest.mark.parametrize("function", [attention, by_kernels])
def test_gradient_checkpointing(function, small_tiles):
    inputs, d_out = draw((4, 5, 1, 16), device=DEVICE)
    expected = run(function, inputs, d_out, 2)

    def body(n_views, **named):
        return checkpoint(
            lambda *t: function(**dict(zip(named, t)), n_views=n_views), *named.values(), use_reentrant=False
        )

    again = run(body, inputs, d_out, 2)
    assert all(torch.equal(x, again[name]) for name, x in expected.items())


def test_autocast_casts_all_arguments():
    inputs, _ = draw()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(**inputs, n_views=2)
    assert out.dtype == torch.bfloat16
    low = {name: x.detach().bfloat16().requires_grad_() for name, x in inputs.items()}
    assert torch.equal(out, attention(**low, n_views=2))


SAMPLES = [
    ((4, 5, 2, 8), CAMERAS, "plain", 2),
    ((4, 5, 2, 8), (), "plain", 4),
    ((3, 4, 1, 5), (), "packed", 1),
    ((4, 3, 2, 8), ("camera_q",), "heads first", 2),
    ((2, 6, 3, 7), ("camera_k", "camera_v"), "every other", 2),
    ((0, 5, 2, 8), CAMERAS, "plain", 2),
    ((4, 0, 2, 8), CAMERAS, "plain", 2),
    ((6, 3, 1, 16), CAMERAS, "stride 0", 3),
]


@pytest.mark.parametrize(("shape", "cameras", "layout", "views"), SAMPLES)
def test_opcheck(shape, cameras, layout, views, native_or_not):
    inputs, _ = draw(shape, cameras=cameras, layout=layout)
    rows = [inputs[name] for name in "qkv"]
    arguments = (*rows, views, *(inputs.get(name) for name in CAMERAS), 0.4)
    results = torch.library.opcheck(torch.ops.mvdream_fast.cross_view_attention.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("cameras", [(), CAMERAS])
def test_compiles_to_one_graph(cameras, native_or_not):
    inputs, d_out = draw(cameras=cameras)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results, expected = run(compiled, inputs, d_out, 2), run(attention, inputs, d_out, 2)
    for name, x in results.items():
        close(OP, x, expected[name])


def test_vmap_is_refused():
    x = torch.randn(3, 4, 5, 2, 8)
    with pytest.raises(RuntimeError, match="cross_view_attention: arguments must be plain tensors, got a vmapped one"):
        torch.func.vmap(lambda q: attention(q, q, q, 2))(x)
    with pytest.raises(RuntimeError, match="got a vmapped one"):
        torch.func.vmap(torch.func.grad(lambda q: attention(q, q, q, 2).sum()))(x)
    with pytest.raises(RuntimeError, match="got a vmapped one"):
        torch.func.vmap(lambda q: attention(q, q, q, 2))(x.to("meta"))


def test_float64_under_autocast_is_all_or_nothing():
    inputs, _ = draw(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(**inputs, n_views=2).dtype == torch.float64
        with pytest.raises(TypeError, match="must be float64 under autocast where one is, got torch.float64, torch.bf"):
            attention(**inputs | {"k": inputs["k"].detach().float()}, n_views=2)


def called_by(*rows):
    """The names of what an attention over two views calls of torch."""
    called = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        attention(*rows, 2)
    return called


def test_strides_are_read_without_a_copy(always_native):
    every_other = [torch.randn(4, 6, 2, 16, 2).unbind(-1)[0] for _ in "qkv"]  # a stride of 2 along the head
    heads_first = [torch.randn(4, 2, 6, 16).transpose(1, 2) for _ in "qkv"]
    assert called_by(*every_other) == called_by(*heads_first) == ["aten.new_empty.default"]
    wide = called_by(*(x.double() for x in every_other))  # must not write the score matrix out
    assert any("flash_attention_for_cpu" in name for name in wide)


def test_short_sequences_are_torchs():
    q = torch.randn(4, 32, 2, 8)
    assert any("flash_attention_for_cpu" in name for name in called_by(*[q[:, :31]] * 3))  # 62 tokens a scene
    assert called_by(q, q, q) == ["aten.new_empty.default"]


# (images, tokens, heads, width), views: blocks are of 512 keys and 64 queries, panels of 32 columns
NATIVE_SHAPES = [
    ((2, 256, 1, 64), 2),  # one whole block of keys
    ((3, 171, 1, 40), 3),  # one key more than a block, and a panel of half the width
    ((4, 257, 2, 33), 4),  # three blocks of keys, the last of 4
    ((1, 1, 3, 1), 1),
    ((5, 7, 2, 17), 1),
    ((1, 65, 1, 160), 1),
    ((2, 31, 1, 256), 2),
]


@pytest.mark.parametrize(("shape", "views"), NATIVE_SHAPES)
@pytest.mark.parametrize("cameras", [(), CAMERAS])
def test_native_sizes_and_threads(shape, views, cameras, always_native):
    inputs, d_out = draw(shape, cameras=cameras)
    first, *others = by_threads(lambda: run(attention, inputs, d_out, views))
    plain = run(attention_ref, inputs, d_out, views)
    exact = run(attention_ref, double(inputs), d_out.double(), views)
    terms = term_sizes(inputs, d_out, views)
    for name, x in first.items():
        within_flash_rule(x, plain[name], exact[name], terms[name])
    assert all(torch.equal(first["out"], other["out"]) for other in others)


def test_native_log_sum_exp():
    from mvdream_fast.ops.cross_view_attention import _forward_native

    q, k, v = (x.detach() for x in draw((4, 150, 2, 24), cameras=())[0].values())
    _, lse = _forward_native(q, k, v, 4, None, None, None, 0.7)
    scores = torch.einsum("qhd,khd->hqk", q.flatten(0, 1).double(), k.flatten(0, 1).double()) * 0.7
    close(OP, lse, scores.logsumexp(-1)[None, None])


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_native_holds_any_scale_and_large_scores(scale):
    # Scores reach 5e5 and 5e9: one key has all the weight. With a scale of 0 all have the same.
    inputs, d_out = draw((2, 300, 1, 64), cameras=(), size=30.0)
    out = attention(**inputs, n_views=2, scale=scale)
    exact = attention_ref(**double(inputs), n_views=2, scale=scale)
    plain = attention_ref(**inputs, n_views=2, scale=scale)
    within_flash_rule(out, plain, exact, term_sizes(inputs, d_out, 2, scale=scale)["out"])


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("token", [0, 3, 599])
def test_native_shows_what_is_not_finite_where_the_reference_does(name, value, token):
    inputs, _ = draw((1, 600, 1, 8), cameras=())
    inputs = {n: x.detach().abs() for n, x in inputs.items()}  # scores of one sign: inf is no NaN by cancelling
    inputs[name][0, token, 0, 2] = value
    out, expected = attention(**inputs, n_views=1), attention_ref(**inputs, n_views=1)
    torch.testing.assert_close(out, expected, equal_nan=True, atol=PARITY[OP], rtol=PARITY[OP])


def test_keys_without_weight_and_a_late_first_one():
    # A block of 512 keys whose scores are all -inf, and two more keys behind it.
    k = torch.full((1, 514, 1, 1), float("-inf"))
    k[0, 512:] = torch.tensor([0.0, 3.0]).log1p()[:, None, None]  # weights 1/5 and 4/5
    v = torch.arange(514.0).reshape(1, 514, 1, 1)
    assert attention(torch.ones_like(k), k, v, 1, scale=1.0)[0, 0].item() == pytest.approx(512.8)


def test_several_cotangents_at_once(native_or_not):
    inputs, d_out = draw((4, 5, 2, 8))
    out, leaves = attention(**inputs, n_views=2), list(inputs.values())
    d_outs = torch.stack([d_out, 2 * d_out])
    both = torch.autograd.grad(out, leaves, d_outs, retain_graph=True, is_grads_batched=True)
    for grad, first in zip(both, torch.autograd.grad(out, leaves, d_out)):
        close(OP, grad[0], first)
        close(OP, grad[1], 2 * first)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"n_views": 3}, ValueError, "n_views must divide the batch of 4 images, got 3"),
        ({"n_views": 0}, ValueError, "n_views must divide the batch"),
        ({"n_views": 2.0}, TypeError, "n_views must be an int, got 2.0"),
        ({"n_views": True}, TypeError, "n_views must be an int, got True"),
        ({"scale": -1.0}, ValueError, "scale must be 0 or more, got -1.0; pass None"),
        ({"q": torch.zeros(4, 5, 16)}, ValueError, r"q must be \[B\*V, N, H, D\], got \(4, 5, 16\)"),
        ({"k": torch.zeros(4, 6, 2, 8)}, ValueError, r"k must be \(4, 5, 2, 8\), got \(4, 6, 2, 8\); it is q's"),
        ({"v": torch.zeros(4, 5, 2, 8).double()}, TypeError, "v must be torch.float32 as q, got torch.float64"),
        ({"q": torch.zeros(4, 5, 2, 8).int()}, TypeError, "q must be float32, float16, bfloat16 or float64"),
        ({"camera_k": torch.zeros(4, 2, 9)}, ValueError, r"camera_k must be \(4, 2, 8\), got \(4, 2, 9\)"),
        ({"k": torch.zeros(4, 5, 2, 8, device="meta")}, RuntimeError, "k must be on the device of q, got meta and cpu"),
        ({n: torch.zeros(4, 5, 1, 257) for n in "qkv"}, ValueError, "a head width of 1 to 256, got 257"),
    ],
)
def test_bad_arguments(change, error, text):
    arguments = {name: torch.zeros(4, 5, 2, 8) for name in "qkv"} | {"n_views": 2} | change
    with pytest.raises(error, match=f"cross_view_attention: .*{text}"):
        attention(**arguments)


def test_a_cuda_tensor_without_triton_says_what_to_install(monkeypatch):
    import sys

    from mvdream_fast.ops import _edges

    monkeypatch.setattr(_edges, "_kernels", {})
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "mvdream_fast.kernels.cross_view_attention", raising=False)
    with pytest.raises(
        RuntimeError, match=r"q must be a CPU tensor where Triton is not installed.*mvdream_fast\[gpu\]"
    ):
        _edges.load_kernels("cross_view_attention", "q", torch.zeros(1))
