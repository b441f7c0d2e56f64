"""nerfacc_compat: hand-worked numbers, packed against batched, gradients, zero samples, and nerfacc where it runs.

nerfacc 0.5.3 runs only its dense helpers without a GPU; the test against them is skipped where it isn't installed.
"""

import inspect
import math
import operator

import pytest
import torch
from reference.nerfacc_signatures import SIGNATURES

from mvdream_fast import nerfacc_compat as nerfacc
from mvdream_fast.ops.packed_scan import packed_scan, packed_scan_ref

ALPHAS = torch.tensor([0.4, 0.8, 0.1, 0.8, 0.1, 0.0, 0.9])
RAYS = torch.tensor([0, 0, 0, 1, 1, 2, 2])
PACKED = torch.tensor([[0, 3], [3, 2], [5, 2]])
LENGTHS = torch.tensor([4, 0, 1, 30, 0, 7])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def packing(lengths=LENGTHS):
    return torch.stack([lengths.cumsum(0) - lengths, lengths], -1)


def close(a, b, **options):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), **{"rtol": 1e-4, "atol": 1e-4} | options)


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


def test_rendering_family_by_hand():
    trans = [1, 0.6, 0.12, 1, 0.2, 1, 1]
    for layout in ({"ray_indices": RAYS}, {"ray_indices": RAYS, "n_rays": 3}, {"packed_info": PACKED}):
        close(nerfacc.render_transmittance_from_alpha(ALPHAS, **layout), torch.tensor(trans))
        weights, _ = nerfacc.render_weight_from_alpha(ALPHAS, **layout)
        close(weights, torch.tensor([0.4, 0.48, 0.012, 0.8, 0.02, 0, 0.9]))
        visible = nerfacc.render_visibility_from_alpha(ALPHAS, **layout, early_stop_eps=0.3, alpha_thre=0.2)
        assert visible.tolist() == [True, True, False, True, False, False, True]
        sigmas, t = -torch.log1p(-ALPHAS), torch.arange(7.0)
        weights, got, alphas = nerfacc.render_weight_from_density(t, t + 1, sigmas, **layout)
        close(alphas, ALPHAS)
        close(got, torch.tensor(trans))
        close(weights, torch.tensor([0.4, 0.48, 0.012, 0.8, 0.02, 0, 0.9]))
        visible = nerfacc.render_visibility_from_density(t, t + 1, sigmas, **layout, early_stop_eps=0.3, alpha_thre=0.2)
        assert visible.tolist() == [True, True, False, True, False, False, True]


def test_prefix_transmittance():
    prefix = torch.full((7,), 0.5)
    before = nerfacc.render_transmittance_from_alpha(ALPHAS, ray_indices=RAYS)
    close(nerfacc.render_transmittance_from_alpha(ALPHAS, ray_indices=RAYS, prefix_trans=prefix), before / 2)
    assert prefix.tolist() == [0.5] * 7


@pytest.mark.parametrize("kind", ["sigma", "alpha"])
def test_rendering_packed_equals_batched(kind):
    t_starts = torch.linspace(0, 1, 6, dtype=torch.float64).expand(4, 6)
    t_ends, values, rgbs = t_starts + 0.1, draw(4, 6) * 0.9, draw(4, 6, 3, seed=1)
    background = draw(3, seed=2)
    results = []
    for packed in (False, True):
        inputs = [x.clone().requires_grad_() for x in (values, rgbs, background)]
        shaped = [x.flatten(0, 1) if packed else x for x in inputs[:2]]
        t = [x.flatten() if packed else x for x in (t_starts, t_ends)]
        layout = {"ray_indices": torch.arange(4).repeat_interleave(6), "n_rays": 4} if packed else {}

        def function(*_, shaped=shaped):
            return shaped[1], shaped[0]

        named = {f"rgb_{kind}_fn": function}
        colors, opacities, depths, extras = nerfacc.rendering(*t, **layout, **named, render_bkgd=inputs[2])
        (colors.sin().sum() + opacities.cos().sum() + depths.sin().sum()).backward()
        results.append([colors, opacities, depths, *[x.grad for x in inputs]])
        wanted = {"weights", "alphas", "trans", "rgbs"} | ({"sigmas"} if kind == "sigma" else set())
        assert set(extras) == wanted
        assert (colors.shape, opacities.shape, depths.shape) == ((4, 3), (4, 1), (4, 1))
    for a, b in zip(*results, strict=True):
        close(a, b, rtol=1e-10, atol=1e-10)


def test_rendering_agrees_with_composite():
    from mvdream_fast.ops import composite

    lengths = LENGTHS
    rays = torch.repeat_interleave(torch.arange(6), lengths)
    t_starts = draw(42, dtype=torch.float32)
    sigmas, rgbs, background = draw(42, seed=1).float() * 20, draw(42, 3, seed=2).float(), draw(3, seed=3).float()
    colors, opacities, depths, extras = nerfacc.rendering(
        t_starts, t_starts + 0.1, rays, 6, rgb_sigma_fn=lambda *_: (rgbs, sigmas), render_bkgd=background
    )
    out = composite(sigmas, rgbs, t_starts, t_starts + 0.1, packed_info=packing(), background=background)
    close(colors, out.rgb, atol=1e-6)
    close(opacities[:, 0], out.opacity, atol=1e-6)
    close(depths[:, 0] * out.opacity, out.depth, atol=1e-6)
    close(extras["weights"], out.weights, atol=1e-6)


def test_accumulate():
    weights, values = draw(7), draw(7, 2, seed=1)
    wanted = torch.stack([(weights[i == RAYS, None] * values[i == RAYS]).sum(0) for i in range(4)])
    close(nerfacc.accumulate_along_rays(weights, values, RAYS, n_rays=4), wanted)
    outputs = torch.ones(4, 2, dtype=torch.float64)
    nerfacc.accumulate_along_rays_(weights, values, RAYS, outputs)
    close(outputs, wanted + 1)
    batched, outputs = draw(3, 5), torch.zeros(3, 1, dtype=torch.float64)
    nerfacc.accumulate_along_rays_(batched, None, None, outputs)
    close(outputs, batched.sum(-1, keepdim=True))
    close(nerfacc.accumulate_along_rays(batched), batched.sum(-1, keepdim=True))
    with pytest.raises(ValueError, match="accumulate_along_rays: n_rays must be given"):
        nerfacc.accumulate_along_rays(weights, None, RAYS)


def render_function(name):
    function, edges = getattr(nerfacc, name), (ALPHAS, ALPHAS + 1) if name.endswith("density") else ()
    return lambda rays, n: function(*edges, ALPHAS, ray_indices=rays, n_rays=n)


PACKED_FUNCTIONS = {name: render_function(name) for name in nerfacc.__all__ if name.startswith("render_")} | {
    "pack_info": lambda rays, n: nerfacc.pack_info(rays, n),
    "accumulate_along_rays": lambda rays, n: nerfacc.accumulate_along_rays(ALPHAS, None, rays, n),
    "accumulate_along_rays_": lambda rays, n: nerfacc.accumulate_along_rays_(ALPHAS, None, rays, torch.zeros(n, 1)),
    "distortion": lambda rays, n: nerfacc.distortion(ALPHAS, ALPHAS, ALPHAS + 1, rays, n),
    "rendering": lambda rays, n: nerfacc.rendering(
        ALPHAS, ALPHAS + 1, rays, n, rgb_alpha_fn=lambda *_: (torch.ones(7, 3), ALPHAS)
    ),
}


@pytest.mark.parametrize("name", PACKED_FUNCTIONS)
def test_ray_indices_are_checked(name):
    call, unsorted = PACKED_FUNCTIONS[name], RAYS.flip(0)
    call(RAYS, 3)
    for rays in (RAYS, RAYS - 1):
        with pytest.raises(ValueError, match=r"ray_indices must be in \[0, 2\)"):
            call(rays, 2)
    if name.startswith("accumulate"):  # a sum has no order
        call(unsorted, 3)
    else:
        with pytest.raises(ValueError, match="pack_info: ray_indices must be sorted, got a decreasing index"):
            call(unsorted, 3)


def test_packed_chunks_without_their_rays_are_refused():
    loose = nerfacc.RaySamples(torch.rand(7), ray_indices=RAYS.flip(0))
    with pytest.raises(ValueError, match="ray_indices must be sorted"):
        nerfacc.searchsorted(loose, loose)
    with pytest.raises(ValueError, match=r"accumulate_along_rays: ray_indices must be of shape \[7\], got \[6\]"):
        nerfacc.accumulate_along_rays(ALPHAS, None, RAYS[:6], 3)


def strided(values):
    """The same values with a stride, and one of them with stride 0 beside its contiguous copy."""
    one = values[:1].expand(values.shape)
    return [(torch.stack([values, -values], -1)[..., 0], values), (one, one.contiguous())]


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


@pytest.mark.parametrize("kind", ["alpha", "density"])
@pytest.mark.parametrize("name", ["transmittance", "weight", "visibility"])
def test_rendering_of_strided_values(name, kind):
    function, rays = getattr(nerfacc, f"render_{name}_from_{kind}"), torch.repeat_interleave(torch.arange(6), LENGTHS)
    for values, plain in strided(draw(42) * 0.9):
        results = []
        for x in (values, plain):
            edges = (x * 0, x * 0 + 1) if kind == "density" else ()
            out = function(*edges, x, ray_indices=rays.repeat(2, 1).T[:, 0], n_rays=6, prefix_trans=x[:1].expand(42))
            results.append(out if isinstance(out, tuple) else (out,))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_distortion():
    weights, t = draw(2, 4).requires_grad_(), draw(2, 5, seed=1).sort(-1).values
    t_starts, t_ends = t[:, :-1], t[:, 1:]
    mids, deltas = (t_starts + t_ends) / 2, t_ends - t_starts
    pairs = weights[:, :, None] * weights[:, None] * (mids[:, :, None] - mids[:, None]).abs()
    wanted = pairs.sum((1, 2)) + (weights**2 * deltas).sum(-1) / 3
    batched = nerfacc.distortion(weights, t_starts, t_ends)
    close(batched[:, 0], wanted, rtol=1e-10, atol=1e-10)
    flat = [x.flatten() for x in (weights, t_starts, t_ends)]
    packed = nerfacc.distortion(*flat, ray_indices=torch.tensor([0] * 4 + [1] * 4), n_rays=2)
    close(packed, batched, rtol=1e-10, atol=1e-10)
    (d_weights,) = torch.autograd.grad(packed.sum(), weights)
    close(d_weights, torch.autograd.grad(wanted.sum(), weights)[0], rtol=1e-10, atol=1e-10)


def test_searchsorted_by_hand():
    sequence = nerfacc.RayIntervals(torch.tensor([0.0, 1, 0, 1, 2]), packed_info=torch.tensor([[0, 2], [2, 3]]))
    values = nerfacc.RayIntervals(torch.tensor([0.5, 1.5, 2.5]), packed_info=torch.tensor([[0, 1], [1, 2]]))
    left, right = nerfacc.searchsorted(sequence, values)
    assert (left.tolist(), right.tolist()) == ([0, 3, 3], [1, 4, 4])


def test_searchsorted_batched_is_torch_searchsorted_clamped():
    keys, values = draw(5, 9).sort(-1).values, draw(5, 20, seed=1) * 1.4 - 0.2
    left, right = nerfacc.searchsorted(nerfacc.RaySamples(keys), nerfacc.RaySamples(values))
    wanted = torch.searchsorted(keys, values, right=True)
    assert torch.equal(right, wanted.clamp(max=8))
    # Past the last key both are it, as nerfacc does: its bisection leaves the last key out.
    assert torch.equal(left, (right - 1).clamp(min=0))


def test_importance_sampling_by_hand():
    intervals = nerfacc.RayIntervals(torch.tensor([0.0, 1, 0, 1, 2]), packed_info=torch.tensor([[0, 2], [2, 3]]))
    cdfs = torch.tensor([0.0, 0.5, 0.0, 0.5, 1.0])
    new, samples = nerfacc.importance_sampling(intervals, cdfs, 2)
    close(new.vals, torch.tensor([[0, 0.5, 1], [0, 1, 2]]))
    close(samples.vals, torch.tensor([[0.25, 0.75], [0.5, 1.5]]))
    new, samples = nerfacc.importance_sampling(intervals, cdfs, torch.tensor([0, 3]))
    close(samples.vals, torch.tensor([1 / 3, 1, 5 / 3]))
    close(new.vals, torch.tensor([0, 2 / 3, 4 / 3, 2]))
    assert new.packed_info.tolist() == [[0, 0], [0, 4]]
    assert new.is_left.tolist() == [True, True, True, False]
    assert new.is_right.tolist() == [False, True, True, True]
    assert samples.ray_indices.tolist() == [1, 1, 1]
    new, samples = nerfacc.importance_sampling(intervals, cdfs, 1)
    close(new.vals, torch.tensor([[0.0, 1], [0, 2]]))
    close(samples.vals, torch.tensor([[0.5], [1.0]]))


def test_importance_sampling_follows_the_density():
    edges = torch.linspace(0, 1, 11).expand(64, 11)
    cdfs = edges**3
    for stratified in (False, True):
        torch.manual_seed(0)
        new, samples = nerfacc.importance_sampling(nerfacc.RayIntervals(edges), cdfs, 50, stratified)
        assert (new.vals.shape, samples.vals.shape) == ((64, 51), (64, 50))
        u = torch.arange(50) / 50 + (0.01 if not stratified else 0)
        index = (samples.vals * 10).floor().clamp(max=9).long()
        low, high = cdfs.gather(1, index), cdfs.gather(1, index + 1)
        back = low + (samples.vals * 10 - index) * (high - low)
        shift = back - u
        assert bool(((shift >= -1e-5) & (shift <= (0.02 if stratified else 0) + 1e-5)).all())
        assert bool((new.vals.diff(dim=-1) >= 0).all())
        if stratified:
            close(shift, shift[:, :1].expand(64, 50), atol=1e-5)
            assert float(shift[:, 0].std()) > 0.004


def test_packed_and_batched_importance_sampling_agree():
    edges, cdfs = draw(4, 8).sort(-1).values, draw(4, 8, seed=1).sort(-1).values
    new, samples = nerfacc.importance_sampling(nerfacc.RayIntervals(edges), cdfs, 6)
    packed_info = torch.tensor([[0, 8], [8, 8], [16, 8], [24, 8]])
    packed = nerfacc.RayIntervals(edges.flatten(), packed_info=packed_info)
    new_p, samples_p = nerfacc.importance_sampling(packed, cdfs.flatten(), torch.full((4,), 6))
    close(samples_p.vals.view(4, 6), samples.vals)
    close(new_p.vals.view(4, 7), new.vals)


def rays_around(n_rays, distance=3.0):
    generator = torch.Generator().manual_seed(0)
    rays_o = torch.nn.functional.normalize(torch.randn(n_rays, 3, generator=generator), dim=-1) * distance
    target = 0.5 * torch.randn(n_rays, 3, generator=generator)
    return rays_o, torch.nn.functional.normalize(target - rays_o, dim=-1)


def test_ray_aabb_intersect():
    rays_o = torch.tensor([[-2.0, 0, 0], [0, 0, 0], [-2, 2, 0], [2, 0, 0], [-2, 1, 0]])
    rays_d = torch.tensor([[1.0, 0, 0]]).expand(5, 3)
    boxes = torch.tensor([[-1.0, -1, -1, 1, 1, 1], [-2, -2, -2, 0.5, 2, 2]])
    t_mins, t_maxs, hits = nerfacc.ray_aabb_intersect(rays_o, rays_d, boxes)
    assert hits.tolist() == [[True, True], [True, True], [False, True], [False, False], [True, True]]
    assert t_mins[0].tolist() == [1, 0]
    assert t_maxs[1].tolist() == [1, 0.5]
    assert t_mins[3].tolist() == [math.inf, math.inf]
    t_mins, t_maxs, _ = nerfacc.ray_aabb_intersect(rays_o, rays_d, boxes, 0.5, 1.2, -1.0)
    close(t_mins[0], torch.tensor([1.0, 0.5]))
    close(t_maxs[0], torch.tensor([1.2, 1.2]))
    assert t_maxs[3].tolist() == [-1, -1]


def brute_force(rays_o, rays_d, binaries, aabbs, near, far, step, cone):
    """Sequential marching in Python: of the lattice, the steps whose midpoint is in an occupied cell."""
    found = []
    for o, d, t, end in zip(rays_o.double(), rays_d.double(), near.tolist(), far.tolist(), strict=True):
        mine = []
        while t < min(end, 12.0):
            dt = max(t * cone, step)
            middle = t + dt / 2
            p = o + d * middle
            for binary, box in zip(binaries, aabbs.double(), strict=True):
                x = (p - box[:3]) / (box[3:] - box[:3])
                if bool(((x >= 0) & (x < 1)).all()):
                    cell = (x * torch.tensor(binary.shape)).long()
                    if bool(binary[tuple(cell.tolist())]) and middle < end:
                        mine.append((t, t + dt))
                    break
            t += dt
        found.append(mine)
    return found


@pytest.mark.parametrize("levels", [1, 3])
def test_traversal_against_brute_force(levels):
    rays_o, rays_d = rays_around(12)
    grid = nerfacc.OccGridEstimator([-0.5, -0.4, -0.5, 0.5, 0.6, 0.5], resolution=[4, 5, 6], levels=levels)
    grid.binaries[:] = draw(levels, 4, 5, 6, seed=4) < 0.4
    near, far = torch.linspace(0.5, 2, 12), torch.linspace(2.9, 6, 12)
    args = (rays_o, rays_d, grid.binaries, grid.aabbs, near, far)
    intervals, samples, ends = nerfacc.traverse_grids(*args, step_size=0.05)
    wanted = brute_force(*args, 0.05, 0.0)
    assert samples.packed_info[:, 1].tolist() == [len(w) for w in wanted]
    flat = torch.tensor([t for ray in wanted for t in ray], dtype=torch.float64).reshape(-1, 2)
    close(intervals.vals[intervals.is_left].double(), flat[:, 0], atol=1e-5)
    close(intervals.vals[intervals.is_right].double(), flat[:, 1], atol=1e-5)
    close(samples.vals.double(), flat.mean(-1), atol=1e-5)
    assert torch.equal(intervals.ray_indices[intervals.is_left], samples.ray_indices)
    assert bool(samples.is_valid.all())
    # An edge between two touching intervals is one edge.
    assert intervals.vals.shape[0] < 2 * samples.vals.shape[0]
    assert bool((ends[samples.packed_info[:, 1] > 0] > near[samples.packed_info[:, 1] > 0]).all())


def test_the_fast_way_and_the_general_one_find_the_same():
    rays_o, rays_d = rays_around(200)
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=16)
    grid.binaries[:] = draw(1, 16, 16, 16, seed=4) < 0.3
    rays, t_starts, t_ends = grid.sampling(rays_o, rays_d, near_plane=0.3, far_plane=4.0, render_step_size=0.02)
    near, far = torch.full((200,), 0.3), torch.full((200,), 4.0)
    intervals, samples, _ = nerfacc.traverse_grids(rays_o, rays_d, grid.binaries, grid.aabbs, near, far, 0.02)
    assert torch.equal(rays, samples.ray_indices)
    close(t_starts, intervals.vals[intervals.is_left], atol=1e-5)
    close(t_ends, intervals.vals[intervals.is_right], atol=1e-5)


def test_growing_steps():
    # All cells occupied: steps of max(0.1, t / 4) from t = 0.1, in the box from 1 to 3.
    binaries, aabbs = torch.ones(1, 4, 4, 4, dtype=torch.bool), torch.tensor([[-1.0, -1, -1, 1, 1, 1]])
    rays_o, rays_d = torch.tensor([[-2.0, 0.1, 0.1]]), torch.tensor([[1.0, 0, 0]])
    near = torch.tensor([1.0])
    intervals, samples, end = nerfacc.traverse_grids(rays_o, rays_d, binaries, aabbs, near, None, 0.1, 0.25)
    edges = [1.0, 1.25, 1.5625, 1.953125, 2.44140625, 3.0517578125]
    close(intervals.vals, torch.tensor(edges), atol=1e-5)
    assert end.item() == pytest.approx(edges[-1])
    assert intervals.is_left.tolist() == [True] * 5 + [False]


def test_cell_by_cell_and_the_limit():
    binaries = torch.ones(1, 4, 4, 4, dtype=torch.bool)
    binaries[0, 2] = False
    aabbs = torch.tensor([[0.0, 0, 0, 4, 4, 4]])
    rays_o, rays_d = torch.tensor([[-1.0, 0.5, 0.5], [5.0, 0.5, 0.5]]), torch.tensor([[1.0, 0, 0], [-1, 0, 0]])
    intervals, samples, _ = nerfacc.traverse_grids(rays_o, rays_d, binaries, aabbs, step_size=0.0)
    close(intervals.vals, torch.tensor([1.0, 2, 3, 4, 5, 1, 2, 3, 4, 5]))
    assert intervals.is_left.tolist() == [True, True, False, True, False, True, False, True, True, False]
    assert intervals.is_right.tolist() == [False, True, True, False, True, False, True, False, True, True]
    assert samples.packed_info.tolist() == [[0, 3], [3, 3]]
    mask = torch.tensor([False, True])
    limited = {"traverse_steps_limit": 2, "over_allocate": True, "rays_mask": mask}
    _, samples, ends = nerfacc.traverse_grids(rays_o, rays_d, binaries, aabbs, step_size=0.0, **limited)
    assert samples.packed_info.tolist() == [[0, 0], [0, 2]]
    assert ends.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rays_mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"rays_mask must be of shape \[4\], got \[3\]"),
        ({"rays_mask": torch.ones(4, 1, dtype=torch.bool)}, ValueError, r"rays_mask must be of shape \[4\]"),
        ({"rays_mask": torch.ones(4)}, TypeError, "rays_mask must be a bool tensor, got torch.float32"),
        ({"rays_mask": [True] * 4}, TypeError, "rays_mask must be a bool tensor, got list"),
        ({"far_planes": torch.tensor([9, 9, math.nan, 9])}, ValueError, "far must be a number, got NaN"),
        ({"near_planes": torch.tensor([0, math.nan, 0, 0])}, ValueError, "rays_o, rays_d and near must be finite"),
        ({"rays_o": torch.full((4, 3), math.nan)}, ValueError, "rays_o, rays_d and near must be finite"),
        ({"rays_d": torch.tensor([[1, 0, math.nan]] * 4)}, ValueError, "rays_o, rays_d and near must be finite"),
        ({"step_size": math.nan}, ValueError, "step_size must be a number, got NaN"),
        ({"rays_d": torch.full((4, 3), 9e-31)}, ValueError, "rays_d must be non-zero"),
        ({"step_size": 1e-11}, ValueError, "rays_d must be of a length that crosses the box in at most"),
        (
            {"rays_d": torch.full((4, 3), 1e-12)},
            ValueError,
            "rays_d must be of a length that crosses the box in at most",
        ),
    ],
)
def test_refusals_of_a_traversal(change, error, text):
    rays_o, rays_d = rays_around(4)
    cells, boxes = torch.ones(1, 4, 4, 4, dtype=torch.bool), torch.tensor([[-1.0, -1, -1, 1, 1, 1]])
    arguments = {"rays_o": rays_o, "rays_d": rays_d, "binaries": cells, "aabbs": boxes, "step_size": 0.1} | change
    with pytest.raises(error, match=f"traverse_grids: {text}"):
        nerfacc.traverse_grids(**arguments)


@pytest.mark.parametrize("cone_angle", [0.0, 0.1])  # the fast way, and the general one
@pytest.mark.parametrize("broken", ["rays_o", "rays_d", "t_min", "t_max"])
def test_rays_that_are_no_numbers_are_refused_by_sampling(cone_angle, broken):
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=4)
    rays_o, rays_d = rays_around(4)
    arguments = {"rays_o": rays_o, "rays_d": rays_d, "t_min": torch.zeros(4), "t_max": torch.full((4,), 9.0)}
    arguments[broken][2] = math.nan
    with pytest.raises(ValueError, match="far must be a number" if broken == "t_max" else "near must be finite"):
        grid.sampling(**arguments, render_step_size=0.1, cone_angle=cone_angle)


def test_estimator_finds_a_ball_and_samples_it():
    torch.manual_seed(0)
    grid = nerfacc.OccGridEstimator(torch.tensor([-1.0, -1, -1, 1, 1, 1]), resolution=16, levels=2)

    def ball(x):
        return (x.norm(dim=-1, keepdim=True) < 0.7).float()

    for step in range(0, 400, 16):
        grid.update_every_n_steps(step, ball)
    inner = grid.binaries[0].float().mean().item()
    assert inner == pytest.approx(4 / 3 * math.pi * 0.7**3 / 8, rel=0.3)
    rays_o, rays_d = rays_around(50)
    rays, t_starts, t_ends = grid.sampling(rays_o, rays_d, render_step_size=0.01)
    distance = (rays_o[rays] + rays_d[rays] * ((t_starts + t_ends) / 2)[:, None]).norm(dim=-1)
    assert float(distance.max()) < 0.7 + 4 * 3**0.5 / 16
    assert rays.numel() > 500
    visible = grid.sampling(rays_o, rays_d, lambda t0, t1, i: 50 * (t1 > 0), render_step_size=0.01, alpha_thre=0.01)
    assert 0 < visible[0].numel() < rays.numel()
    alphas = grid.sampling(rays_o, rays_d, alpha_fn=lambda t0, t1, i: 0.0 * t0, render_step_size=0.01, alpha_thre=0.01)
    assert alphas[0].numel() == 0
    jittered = grid.sampling(rays_o, rays_d, render_step_size=0.01, stratified=True)
    assert jittered[1].shape != t_starts.shape or not torch.equal(jittered[1], t_starts)
    with pytest.raises(RuntimeError, match="update_every_n_steps: the estimator must be in training mode"):
        grid.eval().update_every_n_steps(0, ball)


def test_invisible_cells_are_never_occupied():
    grid = nerfacc.OccGridEstimator([-1.0, -1, -1, 1, 1, 1], resolution=8)
    # A camera at z = -3 that looks along +z and sees only the middle.
    K = torch.tensor([[[40.0, 0, 8], [0, 40, 8], [0, 0, 1]]])
    c2w = torch.eye(4)[None].clone()
    c2w[0, 2, 3] = -3
    grid.mark_invisible_cells(K, c2w, 16, 16)
    unseen = (grid.occs < 0).view(8, 8, 8)
    assert 0 < unseen.float().mean() < 1
    assert bool(unseen[0, 0].all())
    assert not bool(unseen[4, 4, 4])
    grid.update_every_n_steps(0, lambda x: torch.rand(len(x), 1) + 1)
    assert not bool(grid.binaries[0][unseen].any())
    grid._update(300, lambda x: torch.rand(len(x), 1) + 1)
    assert bool((grid.occs.view(8, 8, 8)[unseen] == -1).all())


def test_estimator_checkpoints_carry_nerfaccs_names():
    grid = nerfacc.OccGridEstimator([0, 0, 0, 1, 1, 1], resolution=4, levels=2)
    shapes = {name: tuple(x.shape) for name, x in grid.state_dict().items()}
    assert shapes == {"resolution": (3,), "aabbs": (2, 6), "occs": (128,), "binaries": (2, 4, 4, 4)}
    close(grid.aabbs[1], torch.tensor([-0.5, -0.5, -0.5, 1.5, 1.5, 1.5]))


def test_no_samples_at_all():
    none, rays = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    empty = none.detach()
    for n_rays in (0, 3):
        layout = {"ray_indices": rays, "n_rays": n_rays}
        assert nerfacc.render_transmittance_from_alpha(none, **layout).shape == (0,)
        assert nerfacc.render_weight_from_density(empty, empty, none, **layout)[0].shape == (0,)
        assert nerfacc.render_visibility_from_density(empty, empty, none, **layout).shape == (0,)
        for kind in ("rgb_sigma_fn", "rgb_alpha_fn"):
            background = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
            colors, opacities, depths, _ = nerfacc.rendering(
                empty, empty, **layout, **{kind: lambda *_: pytest.fail("called")}, render_bkgd=background
            )
            close(colors, background.expand(n_rays, 3))
            assert opacities.shape == depths.shape == (n_rays, 1)
            colors.sum().backward()
            close(background.grad, torch.full((3,), float(n_rays)))
        assert nerfacc.distortion(none, empty, empty, **layout).tolist() == [[0.0]] * n_rays
    assert nerfacc.pack_info(rays).shape == (0, 2)
    for name in ("inclusive_sum", "exclusive_sum", "inclusive_prod", "exclusive_prod"):
        out = getattr(nerfacc, name)(none, torch.zeros(3, 2, dtype=torch.int64))
        out.sum().backward()
    assert none.grad.shape == (0,)


def test_no_rays_and_nothing_occupied():
    grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=4, levels=2)
    for rays in (rays_around(5), (torch.zeros(0, 3), torch.zeros(0, 3))):
        found = grid.sampling(*rays, lambda *_: pytest.fail("called"))
        assert [x.shape for x in found] == [(0,)] * 3
        intervals, samples, ends = nerfacc.traverse_grids(*rays, grid.binaries, grid.aabbs)
        assert intervals.vals.shape == samples.vals.shape == (0,)
        assert samples.packed_info.tolist() == [[0, 0]] * len(rays[0])
        assert ends.shape == rays[0].shape[:1]
        assert nerfacc.ray_aabb_intersect(*rays, grid.aabbs)[0].shape == (len(rays[0]), 2)
    intervals = nerfacc.RayIntervals(torch.zeros(0), packed_info=torch.zeros(2, 2, dtype=torch.int64))
    new, samples = nerfacc.importance_sampling(intervals, torch.zeros(0), 3)
    assert (new.vals.shape, samples.vals.shape) == ((2, 4), (2, 3))
    left, right = nerfacc.searchsorted(intervals, nerfacc.RaySamples(torch.zeros(2, 3)))
    assert left.tolist() == right.tolist() == [[0] * 3] * 2


def test_refusals():
    wrong = torch.ones(2, 3, 3), torch.ones(2)
    boxes, cells = torch.tensor([[0.0, 0, 0, 1, 1, 1]]), torch.ones(1, 2, 2, 2, dtype=torch.bool)
    loose = nerfacc.RaySamples(torch.zeros(3))
    with pytest.raises(ValueError, match="rendering: rgb_sigma_fn or rgb_alpha_fn must be given"):
        nerfacc.rendering(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="rendering: sigmas or alphas must be of shape"):
        nerfacc.rendering(torch.zeros(2, 3), torch.ones(2, 3), rgb_sigma_fn=lambda *_: wrong)
    with pytest.raises(ValueError, match="traverse_grids: rays_d must be non-zero"):
        nerfacc.traverse_grids(torch.zeros(1, 3), torch.zeros(1, 3), cells, boxes)
    with pytest.raises(ValueError, match="nerfacc_compat: packed vals must be given with packed_info or ray_indices"):
        nerfacc.searchsorted(loose, loose)


def test_submodules_have_nerfaccs_paths():
    from mvdream_fast.nerfacc_compat import data_specs, grid, losses, pack, pdf, scan, volrend
    from mvdream_fast.nerfacc_compat.estimators.base import AbstractEstimator
    from mvdream_fast.nerfacc_compat.estimators.occ_grid import OccGridEstimator

    assert OccGridEstimator is nerfacc.OccGridEstimator
    assert pack.pack_info is nerfacc.pack_info
    named = {data_specs: "RaySamples", grid: "traverse_grids", losses: "distortion", pdf: "importance_sampling"}
    named |= {scan: "exclusive_sum", volrend: "rendering"}
    assert all(getattr(module, name) is getattr(nerfacc, name) for module, name in named.items())
    assert isinstance(OccGridEstimator([0, 0, 0, 1, 1, 1], resolution=4), AbstractEstimator)
    assert AbstractEstimator().device == torch.device("cpu")
    for call in (AbstractEstimator().sampling, AbstractEstimator().update_every_n_steps):
        with pytest.raises(NotImplementedError, match=f"{call.__name__}: AbstractEstimator must define it"):
            call()


def parameters(function):
    """`x, n=3` of a function's or class' signature."""
    named = inspect.signature(function).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in named)


def test_names_parameters_and_defaults_are_nerfaccs():
    public = {name.partition(".")[0] for name in SIGNATURES}
    assert public <= set(nerfacc.__all__)
    assert set(nerfacc.__all__) - public == {"__version__", "accumulate_along_rays_", "distortion"}
    for name, wanted in SIGNATURES.items():
        assert parameters(operator.attrgetter(name)(nerfacc)) == wanted, name


def test_against_nerfacc_itself():
    theirs = pytest.importorskip("nerfacc", reason="nerfacc 0.5.3 is not installed")
    from nerfacc.grid import _ray_aabb_intersect

    skipped = {"PropNetEstimator"}
    for name in set(theirs.__all__) - skipped - {"__version__"}:
        ours, original = getattr(nerfacc, name), getattr(theirs, name)
        assert [*inspect.signature(ours).parameters] == [*inspect.signature(original).parameters], name
    for name in SIGNATURES:
        ours, original = (parameters(operator.attrgetter(name)(m)) for m in (nerfacc, theirs))
        assert ours == original, name
    t_starts = draw(5, 8).sort(-1).values
    t_ends, sigmas, rgbs = t_starts + 0.1, draw(5, 8, seed=1) * 9, draw(5, 8, 3, seed=2)
    background = draw(3, seed=3)
    for a, b in zip(
        *(m.rendering(t_starts, t_ends, rgb_sigma_fn=lambda *_: (rgbs, sigmas), render_bkgd=background)[:3]
          for m in (nerfacc, theirs)),
        strict=True,
    ):  # fmt: skip
        close(a, b, rtol=1e-12, atol=1e-12)
    alphas = draw(5, 8, seed=4)
    for name in ("render_weight_from_alpha", "render_transmittance_from_alpha", "render_visibility_from_alpha"):
        ours, original = (getattr(m, name)(alphas) for m in (nerfacc, theirs))
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, original)), strict=True):
            close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(m.render_weight_from_density(t_starts, t_ends, sigmas) for m in (nerfacc, theirs)), strict=True):
        close(a, b, rtol=1e-12, atol=1e-12)
    rays = torch.tensor([0] * 3 + [2] * 5)
    packed = [m.accumulate_along_rays(sigmas[0], rgbs[0], rays, 4) for m in (nerfacc, theirs)]
    close(*packed, rtol=1e-12, atol=1e-12)
    for name in ("inclusive_sum", "exclusive_sum", "inclusive_prod", "exclusive_prod"):
        close(getattr(nerfacc, name)(sigmas), getattr(theirs, name)(sigmas), rtol=1e-12, atol=1e-12)
    rays_o, rays_d = rays_around(300, 1.5)
    boxes = torch.tensor([[-1.0, -1, -1, 1, 1, 1], [0.2, 0, -2, 0.7, 3, 1]])
    for a, b in zip(
        nerfacc.ray_aabb_intersect(rays_o, rays_d, boxes, 0.1, 2.0, 7.0),
        _ray_aabb_intersect(rays_o, rays_d, boxes, 0.1, 2.0, 7.0),
        strict=True,
    ):
        close(a, b, rtol=1e-5, atol=1e-5)
