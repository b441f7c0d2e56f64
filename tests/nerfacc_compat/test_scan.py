"""The four scans: numbers by hand, packed against batched, gradients, halves, and what is refused."""

import pytest
import torch
from reference.nerfacc_data import LENGTHS, close, draw, packing, strided

from mvdream_fast import nerfacc_compat as nerfacc
from mvdream_fast.ops.packed_scan import packed_scan, packed_scan_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("product", [False, True])
def test_scan_parity_with_the_reference(dtype, exclusive, product):
    values = draw(42, dtype=dtype) * 2
    values[[5, 9, 20]] = 0
    inputs = [values.clone().requires_grad_() for _ in range(2)]
    outs = [f(x, packing(), product, exclusive) for f, x in zip((packed_scan, packed_scan_ref), inputs, strict=True)]
    cotangent = draw(42, seed=1, dtype=dtype)
    gradients = [torch.autograd.grad(out, x, cotangent)[0] for out, x in zip(outs, inputs, strict=True)]
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    close(outs[0], outs[1], **tolerance)
    close(gradients[0], gradients[1], **tolerance)
    assert outs[0].dtype == dtype


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("product", [False, True])
def test_scan_gradients_and_registered_form(exclusive, product):
    values = (draw(42) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: packed_scan_ref(x, packing(), product, exclusive), values)
    assert torch.autograd.gradcheck(lambda x: packed_scan(x, packing(), product, exclusive), values)
    torch.library.opcheck(torch.ops.mvdream_fast.packed_scan.default, (values, packing(), product, exclusive))


@pytest.mark.parametrize("n_threads", [2, 4, 8])
def test_scans_are_the_same_for_any_number_of_threads(n_threads):
    lengths = torch.randint(0, 40, (2000,), generator=torch.Generator().manual_seed(3))
    values = draw(int(lengths.sum()), dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    for n in (1, n_threads):
        torch.set_num_threads(n)
        results.append([packed_scan(values, packing(lengths), product) for product in (False, True)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("function", ["inclusive_sum", "exclusive_sum", "inclusive_prod", "exclusive_prod"])
def test_scans_packed_equal_batched(function):
    values, function = draw(3, 5) - 0.3, getattr(nerfacc, function)
    values[1, 2] = 0
    flat, batched = values.flatten().requires_grad_(), values.clone().requires_grad_()
    packed_info = torch.tensor([[0, 5], [5, 5], [10, 5]])
    a, b = function(flat, packed_info), function(batched)
    close(a.view(3, 5), b, rtol=1e-12, atol=1e-12)
    cotangent = draw(3, 5, seed=2)
    (a * cotangent.flatten()).sum().backward()
    (b * cotangent).sum().backward()
    close(flat.grad.view(3, 5), batched.grad, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: function(x, packed_info), (values.flatten().requires_grad_(),))


def test_scans_by_hand():
    values, packed_info = torch.arange(1.0, 10), torch.tensor([[0, 2], [2, 3], [5, 4]])
    assert nerfacc.inclusive_sum(values, packed_info).tolist() == [1, 3, 3, 7, 12, 6, 13, 21, 30]
    assert nerfacc.exclusive_sum(values, packed_info).tolist() == [0, 1, 0, 3, 7, 0, 6, 13, 21]
    assert nerfacc.inclusive_prod(values, packed_info).tolist() == [1, 2, 3, 12, 60, 6, 42, 336, 3024]
    assert nerfacc.exclusive_prod(values, packed_info).tolist() == [1, 1, 1, 3, 12, 1, 6, 42, 336]
    packed_info = nerfacc.pack_info(torch.tensor([0, 0, 1, 1, 1, 3]), n_rays=5)
    assert packed_info.tolist() == [[0, 2], [2, 3], [5, 0], [5, 1], [6, 0]]
    assert nerfacc.pack_info(torch.tensor([0, 2])).tolist() == [[0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["inclusive_sum", "exclusive_sum", "inclusive_prod", "exclusive_prod"])
def test_scans_of_strided_values(name, dtype):
    function, far_apart = getattr(nerfacc, name), packing().T.contiguous().T
    for values, plain in strided(draw(42, dtype=dtype)):
        assert not values.is_contiguous()
        results = []
        for x, info in ((values, far_apart), (plain, packing())):
            x = x.detach().requires_grad_()
            out = function(x, info)
            results.append([out, *torch.autograd.grad(out, x, draw(1, seed=1, dtype=dtype).expand(42))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


SCANS = ["inclusive_sum", "exclusive_sum", "inclusive_prod", "exclusive_prod"]


def test_scans_by_the_ray_of_each_value():
    values, indices = torch.arange(1.0, 10), torch.tensor([0, 0, 2, 2, 2, 3, 3, 3, 3])  # ray 1 has none
    assert nerfacc.inclusive_sum(values, indices=indices).tolist() == [1, 3, 3, 7, 12, 6, 13, 21, 30]
    assert nerfacc.exclusive_sum(values, indices=indices).tolist() == [0, 1, 0, 3, 7, 0, 6, 13, 21]
    assert nerfacc.inclusive_prod(values, indices=indices).tolist() == [1, 2, 3, 12, 60, 6, 42, 336, 3024]
    assert nerfacc.exclusive_prod(values, indices=indices).tolist() == [1, 1, 1, 3, 12, 1, 6, 42, 336]
    assert nerfacc.exclusive_prod(values, None, indices.to(torch.int32)).tolist()[-1] == 336


@pytest.mark.parametrize("name", SCANS)
def test_indices_and_packed_info_give_the_same(name):
    function, indices, cotangent = getattr(nerfacc, name), torch.arange(6).repeat_interleave(LENGTHS), draw(42, seed=1)
    results = []
    for named in ({"packed_info": packing()}, {"indices": indices}, {"indices": indices.repeat(2, 1).T[:, 0]}):
        values = (draw(42) * 2).requires_grad_()
        out = function(values, **named)
        results.append([out, *torch.autograd.grad(out, values, cotangent)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    assert function(draw(0), indices=indices[:0]).shape == (0,)


def looped(values, lengths, product, exclusive):
    """A scan ray after ray in Python numbers."""
    out, values = [], iter(values.tolist())
    for length in lengths.tolist():
        total = float(product)
        for _ in range(length):
            before, x = total, next(values)
            total = before * x if product else before + x
            out.append(before if exclusive else total)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SCANS)
def test_scans_of_half_precision(name, dtype):
    function, lengths, eps = getattr(nerfacc, name), torch.tensor([7, 0, 7]), torch.finfo(dtype).eps
    values = (draw(14) + 0.5).to(dtype)
    wanted = looped(values, lengths, name.endswith("prod"), name.startswith("exclusive"))
    for x, options in ((values, {"packed_info": packing(lengths)}), (values.view(2, 7), {})):
        x = x.clone().requires_grad_()
        out = function(x, **options)
        close(out.flatten().double(), wanted, rtol=eps, atol=0)  # summed in more digits, rounded once
        out.sum().backward()
        assert (out.dtype, x.grad.dtype) == (dtype, dtype)


def test_sums_of_many_halves_go_on():
    ones = torch.ones(3000, dtype=torch.float16)  # which alone stop at 2048, whose neighbour is 2050
    assert nerfacc.inclusive_sum(ones, torch.tensor([[0, 3000]]))[-1] == 3000
    assert nerfacc.inclusive_sum(ones[None])[0, -1] == 3000


def test_batched_scans_of_whole_numbers_are_torchs():
    counts = torch.tensor([[3, 1, 2]])
    assert nerfacc.exclusive_sum(counts).tolist() == [[0, 3, 4]]
    assert nerfacc.inclusive_prod(counts).tolist() == [[3, 3, 6]]
    assert nerfacc.inclusive_sum(counts.int()).dtype == torch.int64


ONES, ZEROS = torch.ones(3), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.ones(3, 2), packing()), ValueError, r"inputs must be of shape \[S\] where .*, got \[3, 2\]"),
        ((ONES, packing(), ZEROS), ValueError, "packed_info or indices must be given alone"),
        ((ONES, None, ONES), TypeError, "indices must be of whole numbers, got torch.float32"),
        ((ONES, torch.ones(1, 2)), TypeError, "packed_info must be of whole numbers, got torch.float32"),
        ((ONES, torch.tensor([0, 3])), ValueError, r"packed_info must be of shape \[n_rays, 2\], got \[2\]"),
        ((ONES, torch.tensor([[0, 2]])), ValueError, "packed_info must be ray after ray without gaps, 3 samples"),
        ((ONES, torch.tensor([[1, 2], [0, 1]])), ValueError, "packed_info must be ray after ray without gaps"),
        ((ONES, None, ZEROS[:2]), ValueError, r"indices must be of shape \[3\], got \[2\]"),
        ((ONES, None, ZEROS[:, None]), ValueError, r"indices must be of shape \[3\], got \[3, 1\]"),
        ((ONES, None, torch.tensor([0, 2, 1])), ValueError, "indices must be sorted, got a decreasing index"),
        ((ONES, None, torch.tensor([-1, 0, 0])), ValueError, r"indices must be in \[0, 1\), got \[-1, 0\]"),
        ((ONES.long(), None, ZEROS), TypeError, "inputs must be float32, float16, bfloat16 or float64"),
        ((torch.tensor(1.0),), ValueError, "inputs must be of at least one axis"),
        (([1.0, 2.0],), TypeError, "inputs must be a tensor, got list"),
    ],
)
@pytest.mark.parametrize("name", SCANS)
def test_scans_refuse_by_their_own_name(name, arguments, error, text):
    with pytest.raises(error, match=f"^{name}: {text}"):
        getattr(nerfacc, name)(*arguments)


@pytest.mark.parametrize("name", SCANS)
def test_scans_in_one_graph(name):
    function, values = getattr(nerfacc, name), draw(42).requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [[out := f(values, packing()), *torch.autograd.grad(out.sum(), values)] for f in (function, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
