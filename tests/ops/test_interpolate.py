"""interpolate: what is exact by construction, parity with plain torch, gradients, threads, refusals."""

import pytest
import torch
from reference.meshes import flat, perspective, soup, sphere
from threads import by_threads
from tolerances import PARITY

from mvdream_fast.ops.interpolate import interpolate, interpolate_ref
from mvdream_fast.ops.rasterize import rasterize

TRIANGLE = torch.tensor([[0, 1, 2]], dtype=torch.int32)


def scene(n_images=1, n_attr=5, shared=False, seed=0):
    """attr, rast, tri and rast_db of random triangles."""
    pos, tri = soup(50, n_images=n_images, seed=seed)
    rast, rast_db = rasterize(pos, tri, (31, 45))
    generator = torch.Generator().manual_seed(seed)
    shape = (pos.shape[1], n_attr) if shared else (n_images, pos.shape[1], n_attr)
    return torch.randn(shape, generator=generator), rast, tri, rast_db / (1 + rast_db.abs())


def outputs_and_gradients(function, attr, rast, tri, rast_db, diff_attrs):
    inputs = [x.detach().clone().requires_grad_() for x in (attr, rast, rast_db) if x is not None]
    out = function(*inputs[:2], tri, (inputs + [None])[2], diff_attrs)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in out]
    pairs = [(x, d) for x, d in zip(out, cotangents) if x.requires_grad]
    gradients = torch.autograd.grad([x for x, _ in pairs], inputs, [d for _, d in pairs], allow_unused=True)
    return *(x.detach() for x in out), *gradients


def test_by_hand():
    attr = torch.tensor([[1.0, 10], [2, 20], [4, 40]])
    rast, rast_db = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    rast[0, 0, 1] = torch.tensor([0.5, 0.25, 0, 1])
    rast_db[0, 0, 1] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    out, out_da = interpolate(attr, rast, TRIANGLE, rast_db, [1, 0])
    assert out.tolist() == [[[[0, 0], [2, 20]]]]
    # d/dX = 0.1 (first - third) + 0.3 (second - third), d/dY with 0.2 and 0.4
    torch.testing.assert_close(out_da[0, 0, 1], torch.tensor([-9.0, -14, -0.9, -1.4]))
    assert not out_da[0, 0, 0].any()


def test_clip_space_as_an_attribute_comes_out_at_the_pixels_place():
    vertices, tri = sphere(20, 30)
    pos = perspective(vertices)
    rast, _ = rasterize(pos, tri, (40, 56))
    out, _ = interpolate(pos, rast, tri)
    row, column = (rast[0, ..., 3] > 0).nonzero().unbind(-1)
    found = out[0, row, column]
    torch.testing.assert_close(found[:, 0] / found[:, 3], (column + 0.5) * 2 / 56 - 1, rtol=0, atol=3e-4)
    torch.testing.assert_close(found[:, 1] / found[:, 3], (row + 0.5) * 2 / 40 - 1, rtol=0, atol=3e-4)
    torch.testing.assert_close(found[:, 2] / found[:, 3], rast[0, row, column, 2], rtol=0, atol=1e-5)


def test_derivatives_of_a_flat_triangle_are_differences_of_neighbours():
    pos = flat(torch.tensor([[-3.0, -1], [3, -2], [0, 4]]))
    rast, rast_db = rasterize(pos, TRIANGLE, (9, 11))
    out, out_da = interpolate(
        torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), rast, TRIANGLE, rast_db, "all"
    )
    by_x, by_y = out[0].diff(dim=1), out[0].diff(dim=0)
    torch.testing.assert_close(out_da[0, :, 1:, 0::2], by_x, rtol=0, atol=1e-5)
    torch.testing.assert_close(out_da[0, 1:, :, 1::2], by_y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("diff_attrs", [None, "all", [3, 1]])
@pytest.mark.parametrize(("n_images", "shared"), [(1, True), (2, True), (3, False)])
def test_parity(n_images, shared, diff_attrs):
    attr, rast, tri, rast_db = scene(n_images, shared=shared)
    chosen = {None: [], "all": [*range(5)]}.get(diff_attrs if diff_attrs in (None, "all") else 0, diff_attrs)
    got = outputs_and_gradients(interpolate, attr, rast, tri, rast_db, diff_attrs)
    wide = attr.double(), rast.double(), tri, rast_db.double()
    wanted = outputs_and_gradients(interpolate_ref, *wide, chosen)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if b is None:
            assert a is None or not a.any()
            continue
        tolerance = PARITY["interpolate" if i < 2 else "interpolate.gradients"]
        largest = float(b.abs().max()) if b.numel() else 0
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * max(1, largest))


def test_gradients_of_the_reference_by_finite_differences():
    attr, rast, tri, rast_db = (x[..., :4, :5, :] if x.ndim == 4 else x for x in scene())
    inputs = [x.double().requires_grad_() for x in (attr, rast_db)]
    weights = rast[..., :2].double().requires_grad_()

    def function(attr, rast_db, weights):
        return interpolate_ref(attr, torch.cat([weights, rast[..., 2:]], -1), tri, rast_db, [2, 0])

    assert torch.autograd.gradcheck(function, (*inputs, weights))


def test_second_derivatives():
    attr, rast, tri, rast_db = scene()
    results = []
    for function, dtype in ((interpolate, torch.float32), (lambda *a: interpolate_ref(*a[:4], [1]), torch.float64)):
        inputs = [x.to(dtype).clone().requires_grad_() for x in (attr, rast)]
        out = function(*inputs, tri, rast_db.to(dtype), [1])
        loss = sum(x.square().sum() for x in out)
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), inputs))
    for got, wanted in zip(*results):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("shared", [True, False])
def test_same_bits_for_any_number_of_threads(shared):
    results = by_threads(lambda: outputs_and_gradients(interpolate, *scene(2, shared=shared), "all"))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("n_images", "n_attr", "n_faces"), [(0, 3, 2), (1, 0, 2), (1, 3, 0)])
def test_nothing(n_images, n_attr, n_faces):
    attr = torch.rand(6, n_attr, requires_grad=True)
    rast = torch.zeros(n_images, 3, 4, 4, requires_grad=True)
    out, out_da = interpolate(attr, rast, torch.zeros(n_faces, 3, dtype=torch.int32), rast, "all")
    assert out.shape == (n_images, 3, 4, n_attr)
    assert out_da.shape == (n_images, 3, 4, 2 * n_attr)
    (out.sum() + out_da.sum()).backward()
    assert not attr.grad.any()
    assert not rast.grad.any()


def test_strided_inputs():
    attr, rast, tri, rast_db = scene(2)
    wanted = outputs_and_gradients(interpolate, attr, rast, tri, rast_db, "all")
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (attr, rast, tri, rast_db)]
    got = outputs_and_gradients(interpolate, *strided, "all")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [51.0, -1.0, 1e30, float("nan"), float("inf")])
def test_triangles_that_there_are_not_are_refused(dtype, number):
    attr, rast, tri, _ = scene()
    rast[0, 5, 6, 3] = number
    with pytest.raises(ValueError, match="interpolate: rast must be of a mesh with 50 triangles and 150 vertices"):
        interpolate(attr.to(dtype), rast.to(dtype), tri)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", [-1, 150])
def test_vertices_that_there_are_not_are_refused(dtype, index):
    attr, rast, tri, _ = scene()
    tri[int(rast[rast[..., 3] > 0][0, 3]) - 1, 2] = index
    with pytest.raises(ValueError, match="interpolate: rast must be of a mesh with 50 triangles and 150 vertices"):
        interpolate(attr.to(dtype), rast.to(dtype), tri)


def test_wrong_arguments_are_named():
    attr, rast, tri, rast_db = scene()
    wrong = [
        ((attr, rast[0], tri), ValueError, "interpolate: rast must be of shape"),
        ((attr[0, 0], rast, tri), ValueError, "interpolate: attr must be of shape"),
        ((attr.double(), rast, tri), TypeError, "interpolate: attr must be torch.float32 like rast, got torch.float64"),
        ((attr, rast, tri.long()), TypeError, "interpolate: tri must be int32, got torch.int64"),
        ((attr, rast, tri, None, "all"), ValueError, "interpolate: rast_db must be given with diff_attrs, got None"),
        ((attr, rast, tri, rast_db[..., :2], "all"), ValueError, "interpolate: rast_db must be of shape"),
        ((attr, rast, tri, rast_db, [5]), ValueError, r'interpolate: diff_attrs must be "all" or numbers in \[0, 5\)'),
        ((attr, rast, tri.to("meta")), RuntimeError, "interpolate: tri must be on the device of attr"),
    ]
    for arguments, error, sentence in wrong:
        with pytest.raises(error, match=sentence):
            interpolate(*arguments)


@pytest.mark.parametrize("diff_attrs", [[], [2, 0]])
def test_the_registered_form(diff_attrs):
    attr, rast, tri, rast_db = scene()
    slopes = rast_db[:, :4, :5].requires_grad_() if diff_attrs else None
    inputs = (attr.requires_grad_(), rast[:, :4, :5].requires_grad_(), tri, slopes, diff_attrs)
    torch.library.opcheck(torch.ops.mvdream_fast.interpolate.default, inputs)
