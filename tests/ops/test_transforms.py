"""What torch may do around an op: cotangents in batches, derivatives of derivatives, torch.func, and negative views."""

import pytest
import torch

from mvdream_fast import ops

GRID = ops.HashGrid(4, 2, 10, 4, 1.5)
PACKED, T_STARTS = torch.tensor([[0, 3], [3, 0], [3, 3]]), torch.tensor([0.0, 1, 2, 0, 1, 2])
BOX, ALL = (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0), torch.full((1,), 255, dtype=torch.uint8)
TRI = torch.tensor([[0, 1, 2]], dtype=torch.int32)
POS = torch.tensor([[-0.8, -0.8, 0, 1], [0.8, -0.7, 0, 1], [0.1, 0.8, 0, 1]])
CELLS = torch.ones(1, 2, 2, 2, dtype=torch.bool)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def composited(sigmas, rgb, background):
    return ops.composite(sigmas, rgb, T_STARTS, T_STARTS + 1, packed_info=PACKED, background=background)


def attended(q, k, v, *cameras):
    names = ("camera_q", "camera_k", "camera_v")
    return ops.cross_view_attention(q, k, v, 4, **dict(zip(names, cameras)))


def rast():
    return ops.rasterize(POS, TRI, (6, 7)).rast


def embedded(t, camera, *weights):
    mlps = ops.MLP(*weights[:4]), ops.MLP(*weights[4:8])
    return ops.time_camera_embedding(t, camera, *mlps, *weights[8:])


def convolved(x, weight, bias):
    return ops.winograd_conv3x3(x, weight, bias)


MLP = [(8, 6), (8,), (8, 8), (8,)]
DIFFERENTIABLE = {  # a function, and the shapes of what it is differentiated in, or those tensors
    "geglu": (ops.geglu, [(6, 8)]),
    "group_norm_silu": (lambda *x: ops.group_norm_silu(*x[:3], 2, emb=x[3]), [(2, 8, 3, 3), (8,), (8,), (2, 8)]),
    "group_norm_silu, channels_last": (
        lambda x, *rest: ops.group_norm_silu(x.to(memory_format=torch.channels_last), *rest, 2),
        [(2, 8, 3, 3), (8,), (8,)],
    ),
    "cross_view_attention": (attended, [(4, 3, 2, 8)] * 3),
    "cross_view_attention, native": (attended, [(4, 16, 2, 8)] * 3 + [(4, 2, 8)] * 3),
    "winograd_conv3x3": (convolved, [(1, 4, 4, 4), (3, 4, 3, 3), (3,)]),
    "camera_embedding": (lambda camera, *mlp: ops.camera_embedding(camera, ops.MLP(*mlp)), [(4, 6), *MLP]),
    "time_camera_embedding": (
        lambda *x: embedded(torch.arange(4.0), *x),
        [(4, 6), (8, 8), (8,), (8, 8), (8,), *MLP, (5, 8), (5,)],
    ),
    "hash_encode": (lambda p, table: ops.hash_encode(p, table, GRID), [draw(5, 3).sigmoid(), (GRID.n_entries, 2)]),
    "field": (
        lambda p, table, *w: ops.field(p, table, w[:2], w[2:], ops.FieldSpec(GRID)),
        [draw(5, 3).sigmoid(), (GRID.n_entries, 2), (16, 8), (1, 16), (16, 8), (3, 16)],
    ),
    "field_density": (
        lambda p, table, *w: ops.field_density(p, table, w, ops.FieldSpec(GRID)),
        [draw(5, 3).sigmoid(), (GRID.n_entries, 2), (16, 8), (1, 16)],
    ),
    "composite": (composited, [draw(6).abs(), (6, 3), (3,)]),
    "packed_scan": (lambda x: ops.packed_scan(x, PACKED), [(6,)]),
    "packed_scan, product": (lambda x: ops.packed_scan(x, PACKED, True, True), [(6,)]),
    "rasterize": (lambda pos: ops.rasterize(pos, TRI, (6, 7)), [POS]),
    "interpolate": (lambda attr, rast: ops.interpolate(attr, rast, TRI)[0], [(3, 2), rast()]),
    "antialias": (lambda color, pos: ops.antialias(color, rast(), pos, TRI), [(1, 6, 7, 3), POS]),
    "texture": (ops.texture, [(1, 4, 4, 3), (1, 5, 5, 2)]),
}


def made(name):
    """The function of an op and its tensors."""
    function, inputs = DIFFERENTIABLE[name]
    inputs = [draw(*x, seed=i) if isinstance(x, tuple) else x.clone() for i, x in enumerate(inputs)]
    return function, [x.requires_grad_() for x in inputs]


def outputs_of(results):
    results = (results,) if isinstance(results, torch.Tensor) else results
    return [y for y in results if y.requires_grad]


def batches_and_alone(outputs, inputs):
    """Three cotangents in a batch, and the gradients of each alone."""
    batch = [draw(3, *y.shape, seed=i) for i, y in enumerate(outputs)]
    alone = [torch.autograd.grad(outputs, inputs, list(ds), retain_graph=True) for ds in zip(*batch, strict=True)]
    return batch, [torch.stack(ds) for ds in zip(*alone, strict=True)]


def close(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * max(1, float(b.abs().max())))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_cotangents_in_a_batch(name):
    function, inputs = made(name)
    outputs = outputs_of(function(*inputs))
    batch, wanted = batches_and_alone(outputs, inputs)
    together = torch.autograd.grad(outputs, inputs, batch, is_grads_batched=True, retain_graph=True)
    close(together, wanted)
    assert not any(d.requires_grad for d in together)
    mapped = torch.func.vmap(lambda *ds: torch.autograd.grad(outputs, inputs, ds, retain_graph=True))(*batch)
    close(mapped, wanted)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["composite", "group_norm_silu, channels_last", "packed_scan, product", "texture"])
def test_jacobians_at_once(name):
    function, inputs = made(name)
    inputs = tuple(x.detach() for x in inputs)

    def first(*inputs):
        return outputs_of(function(*inputs))[0]

    at_once, in_rows = (torch.autograd.functional.jacobian(first, inputs, vectorize=v) for v in (True, False))
    close(at_once, in_rows)


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if "attention" not in name])
def test_an_input_that_was_made_of_another_counts_once(name):
    """With a graph of the gradients, too, where they are of the op in plain torch."""
    function, inputs = made(name)
    root = draw(1).requires_grad_()
    given = [inputs[0] * (1 + 0.01 * root)]
    given += [x + 0.01 * given[0].sum() if x.is_floating_point() else x for x in inputs[1:]]
    if name == "interpolate":
        given[1] = inputs[1]  # a triangle's number is no number to add to
    outputs = outputs_of(function(*given))
    cotangents = [draw(*y.shape, seed=i) for i, y in enumerate(outputs)]
    plain, graphed = (
        torch.autograd.grad(outputs, [root, *inputs], cotangents, retain_graph=True, create_graph=create)
        for create in (False, True)
    )
    close([d.detach() for d in graphed], plain)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_cotangents_that_are_negative_views(name):
    function, inputs = made(name)
    outputs = outputs_of(function(*inputs))
    cotangents = [draw(*y.shape, seed=i) for i, y in enumerate(outputs)]
    wanted = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)
    close(torch.autograd.grad(outputs, inputs, [negative(d) for d in cotangents]), wanted)


def negative(x):
    """x as a contiguous view of -x."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    assert torch.equal(view, x)
    return view


def marched(**changes):
    rays = {"rays_o": torch.tensor([[0.1, 0.1, -2], [0.2, -2, 0.1]]), "rays_d": torch.tensor([[0.0, 0, 1], [0, 1, 0]])}
    bounds = {"near": torch.tensor([0.5, 0.6]), "far": torch.tensor([2.5, 2.6]), "jitter": torch.tensor([0.1, 0.2])}
    return rays | bounds | changes


def march(**tensors):
    samples = ops.march_rays(aabb=BOX, occupancy_bits=ALL, resolution=2, step_size=0.25, **tensors)
    return samples.t_starts, samples.t_ends, samples.packed_info


def prune(sigmas, t_starts=T_STARTS, t_ends=T_STARTS + 1):
    kept = ops.prune_samples(ops.Samples(t_starts, t_ends, PACKED), sigmas, 0.1, 0.2)
    return kept.t_starts, kept.t_ends, kept.packed_info


def traverse(jitter=None, **tensors):
    return ops.traverse_grids(binaries=CELLS, aabbs=torch.tensor([BOX]), step_size=0.25, **tensors)


def render(jitter=None, background=None, **tensors):
    def field(positions):
        return negative(3 * positions.norm(dim=-1)), negative(positions.abs())

    return ops.render(
        field=field, aabb=BOX, occupancy_bits=ALL, resolution=2, step_size=0.25, background=background, **tensors
    )


CONSTANT = {  # ops without derivatives: a function of the tensors that count
    "march_rays": (march, marched()),
    "prune_samples": (prune, {"sigmas": draw(6).abs(), "t_starts": T_STARTS, "t_ends": T_STARTS + 1}),
    "traverse_grids": (traverse, marched()),
    "update_occupancy": (ops.update_occupancy, {"ema": draw(6).abs(), "values": draw(6, seed=1).abs()}),
    "render": (render, marched(background=torch.tensor([0.1, 0.2, 0.3]))),
}


def numbers_of(results):
    return [x.clone() for x in results if isinstance(x, torch.Tensor)]


def equal(got, wanted):
    return len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted))


@pytest.mark.parametrize("name", CONSTANT)
def test_negative_views_are_read_as_what_they_are(name):
    function, tensors = CONSTANT[name]
    wanted = numbers_of(function(**tensors))
    assert equal(numbers_of(function(**{name: negative(x) for name, x in tensors.items()})), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("product", [False, True])
def test_scans_of_negative_views(product, dtype):
    values = draw(6).to(dtype)
    torch.testing.assert_close(
        ops.packed_scan(negative(values), PACKED, product), ops.packed_scan(values, PACKED, product)
    )
    of_a_complex_number = torch.tensor([1 + 2j]).conj().imag
    assert ops.packed_scan(of_a_complex_number, torch.tensor([[0, 1]])).tolist() == [-2]


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("wrapped", [False, True])
def test_transforms_see_constants(name, wrapped):
    function, tensors = CONSTANT[name]
    wanted, seen = numbers_of(function(**tensors)), []

    def loss(x):
        inputs = {name: value + 0 * x if wrapped else value for name, value in tensors.items()}
        results = [y for y in function(**inputs) if isinstance(y, torch.Tensor)]
        seen.append(results)
        return x * sum(y.double().sum() for y in results)

    x = torch.tensor(2.0)
    slope = sum(float(y.double().sum()) for y in wanted)
    assert float(torch.func.grad(loss)(x)) == pytest.approx(slope)
    assert float(torch.func.jvp(loss, (x,), (torch.ones(()),))[1]) == pytest.approx(slope)
    assert [y.shape for y in seen[0]] == [y.shape for y in wanted]


@pytest.mark.parametrize("name", [*CONSTANT, "packed_scan"])
def test_vmap_is_refused_by_name(name):
    functions = CONSTANT | {"packed_scan": (lambda values: ops.packed_scan(values, PACKED), {"values": draw(6)})}
    function, tensors = functions[name]
    sentence = f"^{name}: arguments must be plain tensors, got a vmapped one; put the extra axis into the batch"
    with pytest.raises(RuntimeError, match=sentence):
        torch.func.vmap(lambda several: function(**several))({key: torch.stack([x, x]) for key, x in tensors.items()})


@pytest.mark.parametrize("product", [False, True])
def test_scans_under_torch_func(product):
    values, direction = draw(6), draw(6, seed=1)

    def followed(scan):
        def loss(x):
            return (scan(x, PACKED, product) ** 2).sum()

        leaf = values.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        by_torch_func = torch.func.grad(loss)(values), *torch.func.jvp(loss, (values,), (direction,))
        return gradient, *by_torch_func, torch.func.hessian(loss)(values)

    fast, reference = followed(ops.packed_scan), followed(ops.packed_scan_ref)
    close(fast, reference)
    close(fast[:1], fast[1:2])
