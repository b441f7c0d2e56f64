"""The scans and the traversal as CUDA kernels, compiled for the host (tests/cuda_shim), and how often nerfacc_compat
waits for a GPU: never more often than nerfacc does.
"""

import math

import pytest
import test_grid
import test_occ_grid
import test_scan
import test_volrend
import torch
from reference.nerfacc_data import draw, packing, rays_around
from reference.waits import Waits
from test_cuda_host import cuda_host, host_instead_of_cpu  # noqa: F401 # fixtures
from tolerances import PARITY

from mvdream_fast import nerfacc_compat as nerfacc
from mvdream_fast import ops
from mvdream_fast.core import reads

LONG = torch.tensor([0, 1, 31, 32, 33, 0, 64, 300, 2, 0])
NOT_HERE = [  # the CPU's promises, graphs, and what only looks at arguments
    "test_scans_are_the_same_for_any_number_of_threads",
    "test_scan_gradients_and_registered_form",
    "test_scans_in_one_graph",
    "test_scans_refuse_by_their_own_name",
]
for module in (test_scan, test_grid, test_occ_grid, test_volrend):
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_") and name not in NOT_HERE}
    globals().update({f"{module.__name__}_{name.removeprefix('test_')}": test for name, test in tests.items()})


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("product", [False, True])
def test_scans_of_rays_longer_than_a_warp(product, exclusive, dtype, order, monkeypatch):
    monkeypatch.setenv("MVDREAM_FAST_SHIM_ORDER", order)
    n = int(LONG.sum())
    values = 0.5 + draw(n)
    values[[5, 40, 41, 150, 300]] = 0
    cotangent = draw(n, seed=1) - 0.5
    wide = values.clone().requires_grad_()
    ref = ops.packed_scan_ref(wide, packing(LONG), product, exclusive)
    (wanted,) = torch.autograd.grad(ref, wide, cotangent)
    values = values.to(dtype).requires_grad_()
    out = ops.packed_scan(values, packing(LONG), product, exclusive)
    (gradient,) = torch.autograd.grad(out, values, cotangent.to(dtype))
    tolerance = PARITY["packed_scan"] if dtype == torch.float32 else 1e-12
    for a, b in ((out, ref), (gradient, wanted)):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("indices", [[], [3], [0, 0, 2, 2, 2, 7], [-1, -1, 5]])
@pytest.mark.parametrize("name", ["inclusive_sum", "exclusive_prod"])
def test_scans_by_index_without_asking_for_the_number_of_rays(name, indices, monkeypatch):
    function, indices, values = getattr(nerfacc, name), torch.tensor(indices, dtype=torch.int64), draw(len(indices))
    wanted = function(values, indices=indices - min(indices.tolist(), default=0))
    monkeypatch.setattr(reads, "reads_wait", lambda device: True)
    assert torch.equal(function(values, indices=indices), wanted)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_scans_of_nothing(lengths):
    info = packing(torch.tensor(lengths, dtype=torch.int64))
    values = torch.zeros(0, requires_grad=True)
    for product in (False, True):
        out = ops.packed_scan(values, info, product)
        assert torch.autograd.grad(out, values, torch.zeros(0))[0].shape == out.shape == (0,)


def test_scans_beyond_2_31_samples(cuda_host):  # noqa: F811
    """The samples that there are lie behind 2^31 others, which only have addresses."""
    first, n = (1 << 31) + 7, 70
    values, out, d_out = draw(n, dtype=torch.float32), torch.empty(n), draw(n, seed=1, dtype=torch.float32)
    info = torch.tensor([[first, n]])
    address, result, cotangent = (x.data_ptr() - 4 * first for x in (values, out, d_out))
    flags = (False, True, False, False)
    scan = cuda_host.ScanArgs(address, info.data_ptr(), 1, first + n, *flags, result, cuda_host.Queue(0))
    cuda_host.packed_scan(scan)
    torch.testing.assert_close(out, values.cumprod(0), rtol=1e-5, atol=0)
    cuda_host.packed_product_backward(scan, cotangent)
    leaf = values.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(leaf.cumprod(0), leaf, d_out)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Numbers are not read where nerfacc doesn't."""
    monkeypatch.setattr(reads, "reads_wait", lambda device: True)


def test_a_packing_that_is_none_touches_nothing_else(as_on_a_gpu):
    """Where its numbers are not looked at: values and results have neighbours, which stay as they are."""
    info = torch.tensor([[-3, 2], [2, 1 << 40], [8, 3], [1 << 40, 5], [4, -7]])
    for product in (False, True):
        values = torch.full((14,), math.nan)
        values[3:11] = 1.0
        inner = values[3:11].requires_grad_()
        out = ops.packed_scan(inner, info, product)
        assert out[2:].tolist() == [1.0] * 6 if product else [1.0, 2, 3, 4, 5, 6]
        gradient = torch.autograd.grad(out, inner, torch.ones(8))[0]
        assert gradient[2:].tolist() == [6.0, 5, 4, 3, 2, 1]


TOO_FINE = "rays_d must be of a length that crosses the box in at most"
BAD_RAYS = [
    ({"far": torch.tensor([9, 9, math.nan, 9])}, "far must be a number, got NaN"),
    ({"near": torch.tensor([0, -math.inf, 0, 0])}, "rays_o, rays_d and near must be finite"),
    ({"rays_o": torch.full((4, 3), math.nan)}, "rays_o, rays_d and near must be finite"),
    ({"rays_d": torch.full((4, 3), 9e-31)}, "rays_d must be non-zero"),
    (
        {"rays_d": torch.full((4, 3), 1e-12), "far": torch.full((4,), math.inf)},
        "rays_d must be of a length that crosses the box in at most",
    ),
    ({"step_size": 1e-11}, TOO_FINE),
    ({"aabbs": torch.tensor([[-1.0, -1, 1, 1, 1, 1]])}, "aabbs must be finite, minimum below maximum"),
    ({"aabbs": torch.tensor([[-1.0, -1, -math.inf, 1, 1, 1]])}, "aabbs must be finite, minimum below maximum"),
    ({"aabbs": torch.tensor([[-1.0, -1, -1, 1, 1, math.nan]])}, "aabbs must be finite, minimum below maximum"),
]


@pytest.mark.parametrize(("change", "text"), BAD_RAYS)
def test_the_traversal_itself_refuses_bad_rays(as_on_a_gpu, change, text):
    rays_o, rays_d = rays_around(4)
    cells, boxes = torch.ones(1, 4, 4, 4, dtype=torch.bool), torch.tensor([[-1.0, -1, -1, 1, 1, 1]])
    arguments = {"rays_o": rays_o, "rays_d": rays_d, "binaries": cells, "aabbs": boxes, "step_size": 0.1}
    arguments |= {"near": torch.zeros(4), "far": torch.full((4,), 9.0)} | change
    with pytest.raises(ValueError, match=f"^traverse_grids: {text}"):
        ops.traverse_grids(**arguments)
    planes = {f"{name}_planes": arguments.pop(name) for name in ("near", "far")}
    with Waits() as waits, pytest.raises(ValueError, match=f"^traverse_grids: {text}"):
        nerfacc.traverse_grids(**arguments, **planes)
    assert waits.total() == 1


def test_boxes_are_looked_at_without_rays():
    none, cells = torch.zeros(0, 3), torch.ones(1, 4, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="aabbs must be finite"):
        ops.traverse_grids(none, none, cells, torch.ones(1, 6), none[:, 0], none[:, 0], 0.1)


def scene(levels):
    estimator = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=8, levels=levels)
    estimator.binaries[:] = draw(levels, 8, 8, 8) < 0.4
    estimator.occs += 0.5
    return estimator, rays_around(20)


def sampled(levels, with_field, **options):
    estimator, rays = scene(levels)
    sigma_fn = (lambda t_starts, t_ends, rays: t_starts) if with_field else None
    return lambda: estimator.sampling(*rays, sigma_fn, render_step_size=0.1, **options)


def updated(step):
    estimator, _ = scene(2)
    return lambda: estimator._update(step, lambda x: x.square().sum(-1, keepdim=True))


def traversed():
    estimator, rays = scene(2)
    return lambda: nerfacc.traverse_grids(*rays, estimator.binaries, estimator.aabbs, step_size=0.1)


def rendered(function, *extra, **options):
    """A function of packed samples and its backward."""
    counts = torch.tensor([4, 0, 40, 6])
    rays, t = torch.arange(4).repeat_interleave(counts), torch.arange(50.0)

    def call():
        values = [x.requires_grad_() for x in (t / 50, t / 50 + 0.01, t / 60)]
        arguments = values[: 3 if "density" in function or function == "distortion" else 1]
        arguments = [arguments[i] for i in (2, 0, 1)] if function == "distortion" else arguments
        out = getattr(nerfacc, function)(*arguments, *extra, ray_indices=rays, n_rays=4, **options)
        out = out if isinstance(out, tuple) else (out,)
        if out[0].requires_grad:
            out[0].sum().backward()

    return call


def scanned(function, **options):
    def call():
        values = torch.rand(50, requires_grad=True)
        getattr(nerfacc, function)(values, **options).sum().backward()

    return call


def proposed():
    estimator, fn = nerfacc.PropNetEstimator(), lambda t_starts, t_ends: t_starts
    return lambda: estimator.sampling([fn], [16], 8, 5, 0.1, 4.0)


def importance(counts):
    intervals = nerfacc.RayIntervals(torch.linspace(0, 1, 9).expand(4, 9))
    return lambda: nerfacc.importance_sampling(intervals, torch.linspace(0, 1, 9).expand(4, 9), counts)


INDICES = torch.arange(4).repeat_interleave(torch.tensor([4, 0, 40, 6]))
INFO = torch.tensor([[0, 4], [4, 0], [4, 40], [44, 6]])
SCANS = ("inclusive_sum", "exclusive_sum", "inclusive_prod", "exclusive_prod")
VOLREND = ("weight", "transmittance", "visibility")
# What is called, and how often nerfacc 0.5.3 waits for it by its source: sizes of edges and of samples, a mask's for
# each tensor that it takes values from, and the mean occupancy.
CALLS = {
    **{f"{name}, {kind}": (scanned(name, **{kind: x}), 0) for name in SCANS for kind, x in
       (("packed_info", INFO), ("indices", INDICES))},
    **{f"{what} from {kind}": (rendered(f"render_{what}_from_{kind}"), 0) for what in VOLREND
       for kind in ("alpha", "density")},
    "pack_info": (lambda: nerfacc.pack_info(INDICES, 4), 0),
    "pack_info without a count": (lambda: nerfacc.pack_info(INDICES), 1),
    "accumulate_along_rays": (rendered("accumulate_along_rays", None), 0),
    "distortion": (rendered("distortion"), 0),
    "traverse_grids": (traversed(), 2),
    "sampling": (sampled(1, False), 4),
    "sampling with a field": (sampled(1, True, alpha_thre=0.01), 8),
    "sampling of nested grids": (sampled(3, False, stratified=True), 4),
    "sampling of nested grids with a field": (sampled(3, True, alpha_thre=0.01, cone_angle=0.01), 8),
    "update, warming up": (updated(0), 3),
    "update": (updated(1000), 5),
    "proposals": (proposed(), 0),
    "importance_sampling": (importance(8), 0),
    "importance_sampling of packed": (importance(torch.tensor([3, 0, 2, 5])), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_nerfacc_compat_waits_no_more_often_than_nerfacc(name, as_on_a_gpu, cuda_host):  # noqa: F811
    call, nerfaccs = CALLS[name]
    before = cuda_host.syncs()
    with Waits() as waits:
        call()
    assert waits.total() + cuda_host.syncs() - before <= nerfaccs, waits.at
