"""The CUDA kernels compiled for the host (tests/cuda_shim) and put in the CPU backend's place: the same parity tests.

A GPU runs the same sources. What a GPU alone can show (speed, memory ordering between blocks) is not tested here.
"""

import math
import sys
from types import SimpleNamespace

import pytest
import test_antialias
import test_composite
import test_field
import test_hash_encode
import test_interpolate
import test_march_rays
import test_rasterize
import test_render_op
import test_texture
import test_update_occupancy
import torch
from reference.cuda_host import built, loaded
from tolerances import PARITY, close_to_largest

import mvdream_fast
from mvdream_fast import ops
from mvdream_fast.ops import _edges
from mvdream_fast.ops._edges import load_native
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig

SHAPE_NAMES = ("rasterize", "interpolate", "antialias", "texture")
SHAPE_OPS = [sys.modules[f"mvdream_fast.ops.{name}"] for name in SHAPE_NAMES]
field_op, hash_encode_op = (sys.modules[f"mvdream_fast.ops.{name}"] for name in ("field", "hash_encode"))


SHARED = (  # what the CPU's module has for both
    *("HashGrid", "Field", "Meshes", "Attributes", "Silhouettes", "Textured"),
    *("edge_topology", "advise_huge_pages"),
)


@pytest.fixture(scope="session")
def cuda_host():
    """The host build of csrc/cuda as a module."""
    return loaded(built())


@pytest.fixture(autouse=True)
def host_instead_of_cpu(cuda_host, monkeypatch):
    """The ops' CPU backend is the host build."""
    from mvdream_fast import _C

    for shared in SHARED:
        setattr(cuda_host, shared, getattr(_C, shared))
    monkeypatch.setattr(mvdream_fast, "_C", cuda_host)
    monkeypatch.setattr(_edges, "has_vector_loads", lambda tensor: True)  # as on CUDA; UBSan sees where it matters


def borrow(module, without):
    """The tests of an op's own file, for this backend."""
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_") and name not in without}
    globals().update({f"{module.__name__}_{name.removeprefix('test_')}": test for name, test in tests.items()})


NOT_HERE = [  # the references' own tests, the CPU's promises, and what takes long under the host build
    "test_same_bits_for_any_number_of_threads",
    "test_gradcheck_of_the_reference",
    "test_the_registered_form",
    "test_gradients_of_the_registered_form",
    "test_compiles_in_one_graph",
    "test_gradients_of_the_reference",
    "test_parity_campaign",
    "test_batch_longer_than_a_run",
    "test_grid_finds_the_ball",
    "test_cells_that_empty_are_forgotten",
    "test_instruction_sets_agree",
    "test_instruction_sets_are_reported",
    "test_extreme_positions",  # on CUDA a NaN position is not refused: see below
    "test_wrong_arguments_are_named",
    "test_frozen_inputs_change_no_other_gradient",  # to the bit in deterministic mode only: see below
    "test_forward_mode_goes_through_the_reference",
    "test_registered_forms",
    # Of the rasteriser: `fragments` is a CPU's; what is no number and what there is not is left out instead of refused.
    "test_every_pixel_of_a_sheet_is_covered_once",
    "test_sheets_whose_edges_run_through_the_centres",
    "test_a_closed_surface_has_a_front_and_a_back_at_every_pixel",
    "test_fragments_are_those_of_each_triangle_alone",
    "test_the_area_of_a_sphere_s_outline",
    "test_a_million_triangles",
    "test_a_screen_that_is_much_larger_than_a_tile",
    "test_gradients_by_finite_differences",
    "test_gradients_of_the_reference_by_finite_differences",
    "test_areas_and_their_gradients_by_sub_pixel_shifts",
    "test_a_turned_box_pulls_its_outline",
    "test_vertices_that_are_no_numbers_are_refused",
    "test_vertices_that_there_are_not_are_refused",
    "test_triangles_that_there_are_not_are_refused",
    "test_numbers_that_there_are_not_are_refused",
]
SHAPES = (test_rasterize, test_interpolate, test_antialias, test_texture)
for ops_tests in (test_composite, test_march_rays, test_update_occupancy, test_hash_encode, test_field, *SHAPES):
    borrow(ops_tests, NOT_HERE)


@pytest.fixture
def deterministic(monkeypatch, cuda_host):
    """The ops' calls as torch.use_deterministic_algorithms makes them on CUDA."""
    for op in (hash_encode_op, field_op, *SHAPE_OPS):
        monkeypatch.setattr(op, "queue_of", lambda like: cuda_host.Queue(0, deterministic=True))


@pytest.mark.parametrize("n_features", [1, 2, 4, 8])
def test_deterministic_table_gradient(deterministic, n_features):
    test_hash_encode.test_native_matches_reference(n_points=1001, n_features=n_features)


@pytest.mark.parametrize("frozen", range(4))
def test_deterministic_gradients_are_equal_to_the_bit(deterministic, frozen):
    test_field.test_frozen_inputs_change_no_other_gradient(frozen)


def gradients_in_order(order, monkeypatch):
    monkeypatch.setenv("MVDREAM_FAST_SHIM_ORDER", order)
    spec = test_field.FieldSpec(test_field.GRID)
    arguments, d = test_field.inputs(spec, n_points=200)
    out = ops.field(*arguments, spec)
    return [*out, *torch.autograd.grad(out, test_field.leaves(arguments), d)]


def test_no_order_of_threads_changes_a_bit(deterministic, monkeypatch):
    """A missing barrier, or a sum by float atomics, would show."""
    forward, reverse = (gradients_in_order(order, monkeypatch) for order in ("forward", "reverse"))
    assert all(torch.equal(a, b) for a, b in zip(forward, reverse, strict=True))


def shapes_in_order(order, monkeypatch):
    monkeypatch.setenv("MVDREAM_FAST_SHIM_ORDER", order)
    pos, tri, _ = test_rasterize.SCENES["two images"]()
    return [
        *test_rasterize.outputs_and_gradient(ops.rasterize, pos, tri, (15, 21)),
        *test_interpolate.outputs_and_gradients(ops.interpolate, *test_interpolate.scene(2, shared=True), "all"),
        *test_antialias.outputs_and_gradients(ops.antialias, *test_antialias.scene()),
        *test_texture.outputs_and_gradients(*test_texture.scene(), "linear-mipmap-linear"),
    ]


def test_no_order_of_threads_changes_a_bit_of_shapes(deterministic, monkeypatch):
    forward, reverse = (shapes_in_order(order, monkeypatch) for order in ("forward", "reverse"))
    assert all(torch.equal(a, b) for a, b in zip(forward, reverse, strict=True))


@pytest.mark.parametrize("scene", test_rasterize.SCENES)
def test_deterministic_gradients_of_vertices(deterministic, scene):
    test_rasterize.test_parity(scene)


def test_deterministic_gradients_of_attributes_outlines_and_texels(deterministic):
    test_interpolate.test_parity(2, True, "all")
    test_antialias.test_parity()
    test_texture.test_parity("linear-mipmap-linear", "wrap", (16, 32), 1)


def test_cotangents_that_are_no_numbers(deterministic):
    pos, tri, resolution = test_rasterize.SCENES["flat"]()
    rast = ops.rasterize(pos.requires_grad_(), tri, resolution).rast
    cotangent = torch.zeros_like(rast)
    cotangent[..., 0] = float("nan")
    assert torch.autograd.grad(rast, pos, cotangent)[0].isnan().all()


def test_what_is_not_there_is_left_out():
    pos, tri, resolution = test_rasterize.SCENES["flat"]()
    whole = ops.rasterize(pos, tri, resolution).rast
    seen = whole[..., 3].unique()[1:4]
    first, second, third = (seen.long() - 1).tolist()
    broken, numbers = pos.clone(), tri.clone()
    broken[0, 3 * first] = float("nan")
    numbers[second, 1], numbers[third, 2] = -1, pos.shape[1]
    rast = ops.rasterize(broken, numbers, resolution).rast
    assert not torch.isin(rast[..., 3], seen).any()
    kept = ~torch.isin(whole[..., 3], seen)
    assert torch.equal(rast[kept][:, 3], whole[kept][:, 3])
    whole[0, 3, 4, 3], whole[0, 5, 6, 3] = len(tri) + 1, float("nan")
    out, _ = ops.interpolate(torch.rand(pos.shape[1], 2), whole, tri)
    assert not out[0, 3, 4].any()
    assert not out[0, 5, 6].any()
    color = torch.rand(1, *resolution, 2)
    assert ops.antialias(color, whole, pos, tri).isfinite().all()


def test_float_atomics_change_the_table_alone(monkeypatch):
    forward, reverse = (gradients_in_order(order, monkeypatch) for order in ("forward", "reverse"))
    equal = [torch.equal(a, b) for a, b in zip(forward, reverse, strict=True)]
    assert equal[:3] + equal[4:] == [True] * (len(equal) - 1)  # outputs 0 and 1, positions 2, table 3, weights
    close_to_largest("hash_encode", reverse[3], forward[3])


def test_fixed_point_of_cotangents_that_are_no_numbers(deterministic):
    grid = test_hash_encode.HashGrid(**test_hash_encode.SMALL)
    positions, table, d_out = test_hash_encode.inputs(grid, 50)
    d_out[3, 1] = float("inf")
    (d_table,) = torch.autograd.grad(ops.hash_encode(positions, table, grid), table, d_out)
    assert d_table.isnan().all()


def test_nan_positions_make_nan_outputs_and_no_gradient():
    spec = test_field.FieldSpec(test_field.GRID)
    arguments, d = test_field.inputs(spec, n_points=40)
    arguments[0].data[7, 1] = float("nan")
    sigmas, rgb = ops.field(*arguments, spec)
    assert sigmas.isnan().nonzero().tolist() == [[7]]
    assert rgb.isnan().any(-1).nonzero().tolist() == [[7]]
    gradients = torch.autograd.grad((sigmas, rgb), test_field.leaves(arguments), d)
    assert gradients[0].isnan().any(-1).nonzero().tolist() == [[7]]
    assert all(g.isfinite().all() for g in gradients[1:])


def test_tf32_has_the_error_of_ten_bits(monkeypatch, cuda_host):
    monkeypatch.setattr(field_op, "queue_of", lambda like: cuda_host.Queue(0, tf32=True))
    spec = test_field.FieldSpec(test_field.GRID, density_activation="softplus")
    arguments, _ = test_field.inputs(spec, n_points=300)
    for out, ref in zip(ops.field(*arguments, spec), ops.field_ref(*arguments, spec)):
        error = ((out - ref).abs() / (1 + ref.abs())).max()
        assert 1e-5 < error < 5e-3


def test_three_parts_of_tf32_are_as_good_as_float32(monkeypatch):
    """Against float64 the outputs are off by 9.3e-7 (float32 in plain torch: 7.6e-7), the gradients by 2.6e-6 of the
    largest (2.6e-6). With both parts rounded to tf32 instead of cut off it would be 7.0e-7 and 2.7e-6."""
    spec, errors = test_field.FieldSpec(test_field.GRID), []
    for width, n_hidden in ((64, 1), (128, 3)):
        arguments, d = test_field.inputs(spec, n_points=600, width=width, n_hidden=n_hidden)
        exact = [[w.double() for w in x] if isinstance(x, list) else x.double() for x in arguments]
        out, ref = ops.field(*arguments, spec), ops.field_ref(*exact, spec)
        errors += [((a - b).abs() / (1 + b.abs())).max().item() for a, b in zip(out, ref)]
        pairs = ((out, d), (ref, [x.double() for x in d]))
        gradients = [torch.autograd.grad(y, test_field.leaves(arguments), x) for y, x in pairs]
        for a, b in zip(*gradients):
            assert (a - b).abs().max() <= 3e-6 * max(1, b.abs().max())
    assert 1e-8 < max(errors) < 1e-6


@pytest.fixture
def slabs(cuda_host):
    """Every batch is one of many: level by level, 96 samples at a time."""
    cuda_host.set_slabs(0, 96)
    yield
    cuda_host.set_slabs(1 << 16, 1 << 18)


@pytest.mark.parametrize("n_points", [0, 1, 33, 96, 1001])
@pytest.mark.parametrize("n_features", [1, 2, 4, 8])
def test_encoding_level_by_level(slabs, n_features, n_points):
    test_hash_encode.test_native_matches_reference(n_points=n_points, n_features=n_features)


def test_encoding_level_by_level_to_the_bit(slabs, cuda_host):
    grid = test_hash_encode.HashGrid(**test_hash_encode.SMALL)
    positions, table, _ = test_hash_encode.inputs(grid, 300)
    positions.data[7, 1] = float("nan")
    slabbed = ops.hash_encode(positions, table, grid)
    cuda_host.set_slabs(1 << 16, 1 << 18)
    assert torch.equal(slabbed.nan_to_num(9), ops.hash_encode(positions, table, grid).nan_to_num(9))
    assert slabbed.isnan().any(-1).nonzero().tolist() == [[7]]


@pytest.mark.parametrize("n_points", [0, 1, 96, 700])
def test_field_level_by_level(slabs, n_points):
    test_field.test_sizes(n_points)


@pytest.mark.parametrize("n_features", [1, 2, 4, 8])
def test_field_features_level_by_level(slabs, n_features):
    test_field.test_flags({"grid": test_field.HashGrid(3, n_features, 8, 4)})


@pytest.mark.parametrize("frozen", range(4))
def test_deterministic_field_level_by_level(slabs, deterministic, frozen):
    test_field.test_frozen_inputs_change_no_other_gradient(frozen)


def test_nan_positions_level_by_level(slabs):
    test_nan_positions_make_nan_outputs_and_no_gradient()


@pytest.mark.parametrize(("width", "n_hidden"), [(64, 1), (64, 3), (128, 3)])
def test_networks_level_by_level(slabs, width, n_hidden):
    """The last are too large for shared memory (here 99 KB, as on small GPUs)."""
    test_field.test_networks(width, n_hidden)


@pytest.fixture
def launches(cuda_host, monkeypatch):
    """Ops queue on device 2; the current device after each call and that of its launches, by the function's name."""
    for name in ("march_rays", "composite", "hash_encode", "field", "packed_scan", "traverse_grids", *SHAPE_NAMES):
        module = sys.modules[f"mvdream_fast.ops.{name}"]
        monkeypatch.setattr(module, "queue_of", lambda like: cuda_host.Queue(0, device=2))
    seen = {}

    def watched(name):
        def call(*arguments):
            out = getattr(cuda_host, name)(*arguments)
            seen[name] = cuda_host.devices()
            return out

        return call

    classes = {*SHARED, "MarchArgs", "Packed", "ScanArgs"}
    not_ops = ("devices", "syncs", "set_slabs", "update_occupancy", "edge_topology", "advise_huge_pages")
    functions = {name for name in dir(cuda_host) if name[0].islower() and name not in not_ops}
    backend = {name: getattr(cuda_host, name) for name in classes} | {name: watched(name) for name in functions}
    monkeypatch.setattr(mvdream_fast, "_C", SimpleNamespace(**backend))
    return seen, functions


def test_every_op_makes_its_device_current_and_restores_it(fused, launches):
    seen, functions = launches
    rays, ball, bits = test_render_op.rays_around(5), hash_grid_ball(), test_render_op.grid(0.3)
    fused(*rays, ball, test_render_op.BOX, bits, 32, test_render_op.STEP)
    samples = ops.march_rays(*rays, test_render_op.BOX, bits, 32, test_render_op.STEP)
    positions = samples.positions(*rays).requires_grad_()
    sigmas, rgb = ball(positions)
    out = ops.composite(sigmas, rgb, samples.t_starts, samples.t_ends, packed_info=samples.packed_info)
    (out.rgb.sum() + ops.hash_encode(positions, ball.table, ball.spec.grid).sum()).backward()
    ops.prune_samples(samples, sigmas)
    ops.packed_scan(sigmas.detach().requires_grad_(), samples.packed_info, product=True).sum().backward()
    near, cells = rays[0].new_zeros(5), torch.ones(1, 2, 2, 2, dtype=torch.bool)
    ops.traverse_grids(*rays, cells, torch.tensor([test_render_op.BOX]), near, near + 9, 0.1)
    color, rast, pos, tri = (x.requires_grad_() if x.is_floating_point() else x for x in test_antialias.scene())
    out, _ = ops.interpolate(pos, ops.rasterize(pos, tri, rast.shape[1:3]).rast, tri)
    out = ops.antialias(out[..., :2].contiguous(), rast, pos, tri)
    ops.texture(color[:1], out).sum().backward()
    assert set(seen) == functions
    assert len(functions) == 24
    assert all(devices == [0, 2] for devices in seen.values()), seen


def test_update_occupancy_makes_its_device_current(cuda_host):
    numbers = torch.rand(8)
    out, bits = torch.empty(8), torch.empty(1, dtype=torch.uint8)
    addresses = (numbers.data_ptr(), 8, numbers.data_ptr(), 0, 8, 0.95, 0.01, out.data_ptr(), bits.data_ptr())
    cuda_host.update_occupancy(*addresses, cuda_host.Queue(0, device=3))
    assert cuda_host.devices() == [0, 3]
    with pytest.raises(RuntimeError, match="device: CUDA must succeed, got an error"):
        cuda_host.update_occupancy(*addresses, cuda_host.Queue(0, device=4))
    assert cuda_host.devices()[0] == 0


@pytest.fixture
def fused(monkeypatch):
    """`render` by the way that CUDA takes."""
    render_op = sys.modules["mvdream_fast.ops.render"]
    monkeypatch.setattr(render_op, "_render_cpu", render_op._render_cuda)
    return ops.render


def hash_grid_ball(width=32, n_hidden=1):
    """A small hash-grid field, dense in the middle."""
    spec = test_field.FieldSpec(test_field.GRID)
    _, table, density, features = test_field.inputs(spec, width=width, n_hidden=n_hidden)[0]
    return ops.HashGridField(table.detach(), [w.detach() for w in density], [w.detach() for w in features], spec)


@pytest.mark.parametrize("background", [None, torch.tensor([0.2, 0.5, 0.9]), torch.rand(70, 3)])
@pytest.mark.parametrize(("alpha_thre", "early_stop_eps"), [(0.0, 0.0), (0.01, 1e-4), (0.02, 0.3)])
def test_fused_render_equals_the_ops_in_a_row(fused, background, alpha_thre, early_stop_eps):
    rays, bits, ball = test_render_op.rays_around(70), test_render_op.grid(0.1), hash_grid_ball()
    thresholds = (alpha_thre, early_stop_eps)
    out = fused(*rays, ball, test_render_op.BOX, bits, 32, test_render_op.STEP, background, 0, math.inf, *thresholds)
    wanted, n_samples = test_render_op.in_a_row(*rays, ball, bits, background, *thresholds)
    for name in ("rgb", "opacity", "depth"):
        torch.testing.assert_close(getattr(out, name), getattr(wanted, name), rtol=PARITY["render.fused"], atol=1e-5)
    assert out.n_samples == n_samples if early_stop_eps == 0 else out.n_samples <= n_samples
    assert out.opacity.max() > 0.2


@pytest.mark.parametrize(("width", "n_hidden"), [(64, 1), (128, 2)])
def test_fused_render_of_wider_networks(fused, width, n_hidden):
    rays, bits, ball = test_render_op.rays_around(40), test_render_op.grid(0.02), hash_grid_ball(width, n_hidden)
    out = fused(*rays, ball, test_render_op.BOX, bits, 32, test_render_op.STEP)
    wanted, _ = test_render_op.in_a_row(*rays, ball, bits, None, 0.0, 1e-4)
    torch.testing.assert_close(out.rgb, wanted.rgb, rtol=PARITY["render.fused"], atol=1e-5)


def test_a_field_that_only_a_call_can_evaluate_is_called(fused):
    """A volume of another class may compute anything: here the density of its parent, all black."""

    class Black(Volume):
        def forward(self, positions):
            sigmas, rgb = super().forward(positions)
            return sigmas, torch.zeros_like(rgb)

    config = VolumeConfig(n_levels=3, log2_size=8, base_resolution=4, top_resolution=8, width=16)
    rays, bits = test_render_op.rays_around(70), test_render_op.grid(0.1)
    plain, black, called = (
        fused(*rays, volume, test_render_op.BOX, bits, 32, test_render_op.STEP)
        for volume in (Volume(config), Black(config), test_render_op.shell)
    )
    assert plain.rgb.max() > 0.1
    assert black.rgb.abs().max() == 0
    torch.testing.assert_close(black.opacity, plain.opacity, rtol=PARITY["render.fused"], atol=1e-5)
    wanted, _ = test_render_op.in_a_row(*rays, test_render_op.shell, bits, None, 0.0, 1e-4)
    torch.testing.assert_close(called.rgb, wanted.rgb, rtol=PARITY["render"], atol=1e-5)


@pytest.mark.parametrize("n_rays", [0, 3])
def test_fused_render_of_nothing(fused, n_rays):
    rays, bits = test_render_op.rays_around(n_rays), test_render_op.grid(0.0)
    out = fused(*rays, hash_grid_ball(), test_render_op.BOX, bits, 32, test_render_op.STEP, torch.ones(3))
    assert torch.equal(out.rgb, torch.ones(n_rays, 3))
    assert out.n_samples == 0


def test_a_build_without_cuda_says_so(monkeypatch):
    monkeypatch.undo()
    from mvdream_fast import _C

    if hasattr(_C, "cuda"):
        pytest.skip("this build has the CUDA backend")
    on_gpu = SimpleNamespace(is_cuda=True, device="cuda:0")
    with pytest.raises(RuntimeError, match="composite: tensors must be on a CPU where mvdream_fast was built without"):
        load_native("composite", on_gpu)
