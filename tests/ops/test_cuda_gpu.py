"""The ops on real CUDA tensors, by the parity tests of their own files; skipped where there is no GPU or no CUDA build.

Those tests make CPU tensors: here the ops that they name take their arguments to the GPU and their results back, which
autograd follows, and are compared with references that stay on the CPU. docs/gpu.md says how to run this.
"""

import copy
import dataclasses
from functools import wraps

import pytest
import test_composite
import test_cuda_host
import test_field
import test_grid
import test_hash_encode
import test_march_rays
import test_render_op
import test_scan
import test_update_occupancy
import torch

from mvdream_fast import ops
from mvdream_fast.ops.march_rays import Samples

DEVICE = torch.device("cuda")


def missing():
    """What keeps these tests from running, if anything does."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    from mvdream_fast import _C

    return "" if hasattr(_C, "cuda") else "mvdream_fast was built without CUDA (docs/gpu.md says how to build it)"


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")


def moved(x, device):
    """The same with its CPU tensors on a device (or back): tuples, samples, fields and modules too."""
    if isinstance(x, torch.Tensor):
        if x.device.type not in ("cpu", "cuda"):
            return x  # what a test of refusals passes
        there = x.to(device)
        return there if x.is_contiguous() else torch.stack([there, there], -1)[..., 0]
    if isinstance(x, torch.nn.Module):
        return copy.deepcopy(x).to(device)
    if isinstance(x, (Samples, ops.HashGridField)):
        return type(x)(*(moved(getattr(x, part.name), device) for part in dataclasses.fields(x)))
    if isinstance(x, (tuple, list)):
        parts = [moved(part, device) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return {name: moved(part, device) for name, part in x.items()} if isinstance(x, dict) else x


def on_gpu(op):
    """The op on the GPU, for arguments on the CPU, where its results come back; others are left where they are."""

    @wraps(op)
    def call(*arguments, **named):
        if is_there((arguments, named)):
            return op(*arguments, **named)
        return moved(op(*moved(arguments, DEVICE), **moved(named, DEVICE)), "cpu")

    return call


def is_there(x):
    """Whether any tensor in there is a CUDA tensor."""
    if isinstance(x, (tuple, list, dict)):
        return any(map(is_there, x.values() if isinstance(x, dict) else x))
    if isinstance(x, Samples):
        return x.t_starts.is_cuda
    return isinstance(x, torch.Tensor) and x.is_cuda


@pytest.fixture(autouse=True)
def ops_on_the_gpu(monkeypatch):
    for module, names in {
        test_composite: ("composite", "march_rays"),
        test_march_rays: ("march_rays", "prune_samples"),
        test_render_op: ("render",),
        test_scan: ("packed_scan",),
        test_update_occupancy: ("update_occupancy",),
        ops: ("composite", "field", "field_density", "hash_encode", "march_rays", "prune_samples", "traverse_grids"),
        Samples: ("positions",),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, on_gpu(getattr(module, name)))


def borrow(module, without=(), only=""):
    """The tests of a file but for what the host build can't run either, and for what is only about CPUs."""
    without = (*test_cuda_host.NOT_HERE, *without)
    for name, test in vars(module).items():
        if name.startswith("test_") and only in name and name not in without and callable(test):
            globals()[f"{module.__name__}_{name.removeprefix('test_')}"] = test


borrow(test_composite, ["test_float64_goes_through_the_reference"])  # to the bit: a GPU's exp is another
borrow(test_march_rays)
# Those that are given the op when they are collected, before it is moved.
borrow(test_hash_encode, ["test_by_hand", "test_against_slow_oracle"])
borrow(test_field)
borrow(test_update_occupancy, [name for name in vars(test_update_occupancy) if name.startswith("test_grid_")])
# Those with fields that make CPU tensors, or about the rounds that CPUs go in.
borrow(
    test_render_op,
    [
        "test_chunks_change_nothing",
        "test_constant_slab",
        "test_opaque_rays_stop_early",
        "test_what_a_field_returns_is_checked",
        "test_bounds_of_each_ray_follow_it_into_its_chunk",
    ],
)
borrow(test_scan, only="parity_with_the_reference")
borrow(test_grid, only="traversal")
for what in ("fused_render", "deterministic_", "fixed_point_", "nan_positions_"):
    borrow(test_cuda_host, only=what)


@pytest.fixture
def fused():
    return on_gpu(ops.render)


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_composite_float64_goes_through_the_reference():
    sigmas, rgb, t_starts, t_ends, packed_info = test_composite.scene(20, dtype=torch.float64)
    out = test_composite.composite(sigmas, rgb, t_starts, t_ends, packed_info=packed_info)
    wanted = test_composite.composite_ref(sigmas, rgb, t_starts, t_ends, packed_info)
    for a, b in zip(out, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)  # and dtypes


# To the bit, where atomics add in whatever order they come: in deterministic mode only.
@pytest.mark.parametrize("wanted", ["positions", "table"])
def test_hash_encode_one_gradient_alone_is_the_same(deterministic, wanted):
    test_hash_encode.test_one_gradient_alone_is_the_same(wanted)


def test_hash_encode_strided_inputs(deterministic):
    test_hash_encode.test_strided_inputs()


def test_the_ops_answer_with_cuda_tensors():
    *rays, bits = moved([*test_render_op.rays_around(20), test_render_op.grid()], DEVICE)
    samples = ops.march_rays(*rays, test_render_op.BOX, bits, 32, test_render_op.STEP)
    sigmas, rgb = test_render_op.exact(samples.positions(*rays))
    out = ops.composite(sigmas, rgb, samples.t_starts, samples.t_ends, packed_info=samples.packed_info)
    assert all(x.device.type == DEVICE.type for x in (samples.t_starts, sigmas, *out))
    assert out.opacity.max() > 0


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_tf32_has_the_error_of_ten_bits(tf32):
    spec = test_field.FieldSpec(test_field.GRID, density_activation="softplus")
    arguments, _ = test_field.inputs(spec, n_points=300)
    for out, ref in zip(ops.field(*arguments, spec), ops.field_ref(*arguments, spec)):
        error = ((out - ref).abs() / (1 + ref.abs())).max()
        assert 1e-5 < error < 5e-3


def test_an_op_runs_on_the_device_of_its_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    rays, bits = test_render_op.rays_around(20), test_render_op.grid()
    wanted = ops.march_rays(*rays, test_render_op.BOX, bits, 32, test_render_op.STEP)
    with torch.cuda.device(0):
        *rays, bits = moved([*rays, bits], "cuda:1")
        got = ops.march_rays(*rays, test_render_op.BOX, bits, 32, test_render_op.STEP)
        assert torch.cuda.current_device() == 0
    assert got.t_starts.device == torch.device("cuda:1")
    assert torch.equal(got.t_starts.cpu(), wanted.t_starts)
