"""The hash-grid encoding: tiny-cuda-nn's addressing against a slow oracle, gradients, determinism, odd inputs."""

import itertools
from dataclasses import astuple

import numpy as np
import pytest
import torch
from tolerances import close, close_to_largest
from torch.utils._python_dispatch import TorchDispatchMode

from mvdream_fast import ops
from mvdream_fast.ops.hash_encode import HashGrid, hash_encode_at_once

PAPER_RESOLUTIONS = [16, 24, 34, 49, 71, 102, 148, 213, 308, 446, 646, 934, 1352, 1956, 2831, 4096]
SMALL = {"n_levels": 5, "log2_size": 10, "base_resolution": 6, "growth": 1.6}  # two dense levels, three hashed


def encode_slowly(point, table, grid):
    """One point by Python integers and float64 weights; only the lattice coordinate is rounded to float32."""
    out, offset = [], 0
    for level in range(grid.n_levels):
        exponent = np.float32(level) * np.log2(np.float32(grid.growth))
        scale = np.exp2(exponent) * np.float32(grid.base_resolution) - np.float32(1)
        side = int(np.ceil(scale)) + 1
        size = min((side**3 + 7) // 8 * 8, 2**grid.log2_size)
        lattice = [np.float32(float(scale) * min(max(float(c), 0.0), 1.0) + 0.5) for c in point]
        value = np.zeros(grid.n_features)
        for corner in itertools.product((0, 1), repeat=3):
            vertex = [int(np.floor(c)) + bit for c, bit in zip(lattice, corner)]
            fraction = [float(c) - float(np.floor(c)) for c in lattice]
            weight = np.prod([f if bit else 1 - f for f, bit in zip(fraction, corner)])
            if side**3 <= size:
                index = (vertex[0] + vertex[1] * side + vertex[2] * side**2) % size
            else:
                index = (vertex[0] ^ (vertex[1] * 2654435761 % 2**32) ^ (vertex[2] * 805459861 % 2**32)) % size
            value += weight * table[offset + index].astype(np.float64)
        out.append(value)
        offset += size
    assert offset == len(table)
    return np.concatenate(out)


def inputs(grid, n_points, seed=0):
    """Points of which some lie outside the unit cube, a table of order 1 and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(n_points, 3, generator=generator) * 1.2 - 0.1
    table = torch.randn(grid.n_entries, grid.n_features, generator=generator)
    d_out = torch.randn(n_points, grid.width, generator=generator)
    return positions.requires_grad_(), table.requires_grad_(), d_out


def test_papers_grid():
    levels = HashGrid().levels
    assert [level.resolution for level in levels] == PAPER_RESOLUTIONS
    assert [level.hashed for level in levels] == [False] * 5 + [True] * 11
    assert HashGrid().n_entries == 6_299_960
    assert HashGrid().n_entries * 2 == 12_599_920
    assert all(level.offset % 8 == 0 for level in levels)


@pytest.mark.parametrize("encode", [ops.hash_encode, ops.hash_encode_ref])
def test_by_hand(encode):
    # One level of 2^3 vertices, scale 1, entry i holds i: vertex (x, y, z) is x + 2y + 4z, modulo 8.
    grid = HashGrid(n_levels=1, n_features=1, base_resolution=2)
    points = torch.tensor([[0.25, 0.0, 0.0], [1.0, 0.0, 0.0], [7.0, -3.0, 0.0]])
    # Lattice (0.75, 0.5, 0.5) gives 0.75 + 1 + 2. At x = 1 (lattice 1.5) half the weight wraps to vertices 2, 4, 6, 0.
    expected = torch.tensor([[3.75], [3.5], [3.5]])
    assert torch.equal(encode(points, torch.arange(8.0)[:, None], grid), expected)


@pytest.mark.parametrize("n_features", [1, 2, 4, 8])
@pytest.mark.parametrize("encode", [ops.hash_encode, ops.hash_encode_ref])
def test_against_slow_oracle(encode, n_features):
    grid = HashGrid(n_features=n_features, **SMALL)
    positions, table, _ = inputs(grid, 40)
    out = encode(positions, table, grid).detach()
    slow = [encode_slowly(p, table.detach().numpy(), grid) for p in positions.detach().numpy()]
    close_to_largest("hash_encode", out, torch.tensor(np.stack(slow), dtype=torch.float32))


def test_against_slow_oracle_on_papers_grid():
    # Fine levels: float32 lattice coordinates near 4096 carry 12 bits of fraction, so the rounding must agree.
    grid = HashGrid()
    positions, table, _ = inputs(grid, 8)
    slow = [encode_slowly(p, table.detach().numpy(), grid) for p in positions.detach().numpy()]
    slow = torch.tensor(np.stack(slow), dtype=torch.float32)
    close_to_largest("hash_encode", ops.hash_encode(positions, table, grid).detach(), slow)


@pytest.mark.parametrize("n_features", [1, 2, 4, 8])
@pytest.mark.parametrize("n_points", [0, 1, 192, 1001])
def test_native_matches_reference(n_features, n_points):
    grid = HashGrid(n_features=n_features, **SMALL)
    positions, table, d_out = inputs(grid, n_points)
    out, ref = ops.hash_encode(positions, table, grid), ops.hash_encode_ref(positions, table, grid)
    close_to_largest("hash_encode", out, ref)
    gradients = torch.autograd.grad(out, (positions, table), d_out)
    for d, d_ref in zip(gradients, torch.autograd.grad(ref, (positions, table), d_out)):
        close_to_largest("hash_encode.gradients", d, d_ref)


@pytest.mark.parametrize("wanted", ["positions", "table"])
def test_one_gradient_alone_is_the_same(wanted):
    grid = HashGrid(**SMALL)
    positions, table, d_out = inputs(grid, 100)
    both = torch.autograd.grad(ops.hash_encode(positions, table, grid), (positions, table), d_out)
    if wanted == "positions":
        alone = torch.autograd.grad(ops.hash_encode(positions, table.detach(), grid), positions, d_out)[0]
        assert torch.equal(alone, both[0])
    else:
        alone = torch.autograd.grad(ops.hash_encode(positions.detach(), table, grid), table, d_out)[0]
        assert torch.equal(alone, both[1])


def test_no_gradient_outside_the_cube():
    grid = HashGrid(**SMALL)
    points = torch.tensor([[1.5, 0.3, -0.2], [0.5, 0.5, 0.5], [0.0, 1.0, 1.0]], requires_grad=True)
    _, table, d_out = inputs(grid, 3)
    d = torch.autograd.grad(ops.hash_encode(points, table, grid), points, d_out)[0]
    assert ((d != 0) == torch.tensor([[False, True, False], [True, True, True], [True, True, True]])).all()


@pytest.mark.parametrize("n_levels", [5, 2])
def test_same_bits_for_any_number_of_threads(n_levels, n_threads):
    # Two levels: three and more threads share a level by ranges of entries.
    grid = HashGrid(**(SMALL | {"n_levels": n_levels}))
    positions, table, d_out = inputs(grid, 5000)

    def run(threads):
        n_threads(threads)
        out = ops.hash_encode(positions, table, grid)
        return out, *torch.autograd.grad(out, (positions, table), d_out)

    first = run(1)
    for threads in (2, 3, 4, 8):
        assert all(torch.equal(a, b) for a, b in zip(first, run(threads)))


@pytest.fixture
def n_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_batch_longer_than_a_run():
    # 256 columns: a run holds 32,768 points at most, so that this batch is worked on in two.
    grid = HashGrid(n_levels=32, n_features=8, log2_size=6, base_resolution=2, growth=1.1)
    positions, table, d_out = inputs(grid, 33_000)
    out = ops.hash_encode(positions, table, grid)
    halves = [slice(0, 20_000), slice(20_000, None)]
    pieces = [ops.hash_encode(positions[h], table, grid) for h in halves]
    assert torch.equal(out, torch.cat(pieces))
    d_positions, d_table = torch.autograd.grad(out, (positions, table), d_out)
    d_pieces = [torch.autograd.grad(p, (positions, table), d_out[h]) for p, h in zip(pieces, halves)]
    assert torch.equal(d_positions, d_pieces[0][0] + d_pieces[1][0])
    # 10^4 terms an entry, summed in two orders.
    close_to_largest("hash_encode.gradients", d_table, d_pieces[0][1] + d_pieces[1][1], factor=20)


def test_strided_inputs():
    grid = HashGrid(**SMALL)
    positions, table, _ = inputs(grid, 300)
    expected = torch.autograd.grad(ops.hash_encode(positions, table, grid).sum(), (positions, table))
    strided = positions.detach().t().contiguous().t().requires_grad_()
    odd = torch.cat([torch.zeros(1), table.detach().flatten()])[1:].view_as(table).requires_grad_()  # 4-byte aligned
    transposed = table.detach().t().contiguous().t().requires_grad_()
    for some_table in (odd, transposed):
        actual = torch.autograd.grad(ops.hash_encode(strided, some_table, grid).sum(), (strided, some_table))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    one = positions.detach()[:1]
    assert torch.equal(
        ops.hash_encode(one.expand(300, 3), table, grid), ops.hash_encode(one, table, grid).expand(300, grid.width)
    )


def test_inputs_are_not_written():
    grid = HashGrid(**SMALL)
    positions, table, d_out = inputs(grid, 300)
    before = [x.detach().clone() for x in (positions, table, d_out)]
    torch.autograd.grad(ops.hash_encode(positions, table, grid), (positions, table), d_out)
    assert all(torch.equal(a, b) for a, b in zip((positions, table, d_out), before))


@pytest.mark.parametrize("encode", [ops.hash_encode, ops.hash_encode_ref])
def test_extreme_positions(encode):
    grid = HashGrid(**SMALL)
    _, table, _ = inputs(grid, 1)
    far = torch.tensor([[float("inf"), float("-inf"), 1e30], [1.0, 0.0, 1.0]])
    out = encode(far, table, grid)
    assert torch.equal(out[0], out[1])
    with pytest.raises(ValueError, match="hash_encode: positions must be numbers, got NaN; check what produced them"):
        encode(torch.tensor([[0.5, float("nan"), 0.5]]), table, grid)
    huge = encode(torch.rand(20, 3), torch.full_like(table, 1e37), grid)
    assert torch.allclose(huge, torch.full_like(huge, 1e37), rtol=1e-5)


@pytest.mark.parametrize("n_features", [1, 2])
def test_gradients_of_the_reference(n_features):
    grid = HashGrid(n_levels=2, n_features=n_features, log2_size=4, base_resolution=2, growth=2.0)
    positions, table, _ = (x.detach().double().requires_grad_() for x in inputs(grid, 4, seed=3))

    def encode(x, t):
        return ops.hash_encode(x, t, grid)  # float64 runs the reference

    assert torch.autograd.gradcheck(encode, (positions, table))
    assert torch.autograd.gradgradcheck(encode, (positions, table))


@pytest.mark.parametrize("n_features", [1, 2, 4])
def test_all_levels_at_once_are_the_reference(n_features):
    grid = HashGrid(**SMALL | {"n_features": n_features})
    positions, table, d = inputs(grid, 90)
    positions.data[:8] = torch.tensor([0.0, 1, 1.5]).repeat(8, 1)
    out, ref = (encode(positions, table, grid) for encode in (hash_encode_at_once, ops.hash_encode_ref))
    close("hash_encode", out, ref)
    for a, b in zip(*(torch.autograd.grad(y, (positions, table), d) for y in (out, ref))):
        close_to_largest("hash_encode.gradients", a, b)


def test_second_derivatives_take_few_calls():
    """A GPU launches each by itself: for normals in training they were 10,490 with loops over levels and corners."""
    grid, calls = HashGrid(**SMALL), []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    positions, table, d = inputs(grid, 50)
    with Log():
        (slope,) = torch.autograd.grad(ops.hash_encode(positions, table, grid), positions, d, create_graph=True)
        torch.autograd.grad(slope.sum(), (positions, table))
    assert len(calls) < 400


def test_second_derivatives_of_the_native_op():
    grid = HashGrid(**SMALL)
    positions, table, d_out = inputs(grid, 50)

    def second(encode):
        (slope,) = torch.autograd.grad(encode(positions, table, grid), positions, d_out, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (positions, table))

    for d, d_ref in zip(second(ops.hash_encode), second(ops.hash_encode_ref)):
        close_to_largest("second_derivatives", d, d_ref)


def test_forward_mode_goes_through_the_reference():
    grid = HashGrid(**SMALL)
    positions, table, tangent = (x.detach() for x in inputs(grid, 20))
    tangent = torch.ones_like(table)
    _, along = torch.func.jvp(lambda t: ops.hash_encode(positions, t, grid), (table,), (tangent,))
    close_to_largest("hash_encode", along, ops.hash_encode(positions, tangent, grid))
    with pytest.raises(RuntimeError, match="hash_encode: arguments must be plain tensors, got a vmapped one"):
        torch.func.vmap(lambda x: ops.hash_encode(x, table, grid))(positions[None])


@pytest.mark.parametrize("fixed", ["nothing", "positions", "table"])
def test_the_registered_form(fixed):
    grid = HashGrid(**SMALL)
    positions, table, _ = inputs(grid, 9)
    arguments = [x.detach() if name == fixed else x for name, x in (("positions", positions), ("table", table))]
    torch.library.opcheck(torch.ops.mvdream_fast.hash_encode.default, (*arguments, *astuple(grid)))


def test_compiles_in_one_graph():
    grid = HashGrid(**SMALL)
    positions, table, d_out = inputs(grid, 50)

    def run(positions, table):
        return ops.hash_encode(positions, table, grid).sin()

    compiled, results = torch.compile(run, fullgraph=True, backend="aot_eager"), []
    for function in (run, compiled):
        results.append(torch.autograd.grad(function(positions, table), (positions, table), d_out))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_arguments_are_named():
    grid = HashGrid(**SMALL)
    positions, table, _ = (x.detach() for x in inputs(grid, 3))
    for bad, error, message in [
        ((positions[:, :2], table), ValueError, r"hash_encode: positions must be of shape \[any, 3\], got \[3, 2\]"),
        ((positions.half(), table), TypeError, "hash_encode: positions must be float32 or float64, got torch.float16"),
        ((positions, table[1:]), ValueError, r"hash_encode: table must be of shape \[\d+, 2\], got"),
        ((positions.double(), table), TypeError, "hash_encode: table must be torch.float64 like positions, got"),
        (
            (positions, table.to("meta")),
            RuntimeError,
            "hash_encode: table must be on the device of positions",
        ),
    ]:
        with pytest.raises(error, match=message):
            ops.hash_encode(*bad, grid)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_features": 3}, "HashGrid: n_features must be 1, 2, 4 or 8, got 3"),
        ({"n_levels": 0}, r"HashGrid: n_levels must be in \[1, 32\], got 0"),
        ({"log2_size": 30}, r"HashGrid: log2_size must be in \[3, 24\], got 30"),
        ({"growth": 0.5}, "HashGrid: growth must be >= 1 with a top resolution <= 2\\^20, got 0.5"),
        ({"growth": 10.0}, "HashGrid: growth must be >= 1"),
        ({"growth": float("nan")}, "HashGrid: growth must be >= 1"),
    ],
)
def test_impossible_grids_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        HashGrid(**values)
