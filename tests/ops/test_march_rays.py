"""march_rays and prune_samples: parity with the reference, hand-worked lattices, and what must hold for any grid."""

import dataclasses
import math

import pytest
import torch
from reference.waits import Waits

from mvdream_fast.ops.composite import composite, composite_samples
from mvdream_fast.ops.march_rays import (
    Samples,
    join_samples,
    march_rays,
    march_rays_ref,
    pack_bits,
    pack_info,
    positions_ref,
    prune_samples,
    prune_samples_ref,
    unpack_bits,
)

BOX = (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0)
STEP = 1.732 * 2 / 512


def random_rays(n_rays, seed=0, spread=0.4):
    generator = torch.Generator().manual_seed(seed)
    rays_o = torch.nn.functional.normalize(torch.randn(n_rays, 3, generator=generator), dim=-1) * 2.5
    target = spread * torch.randn(n_rays, 3, generator=generator)
    return rays_o, torch.nn.functional.normalize(target - rays_o, dim=-1)


def random_grid(resolution, share, seed=0):
    cells = math.prod(resolution) if isinstance(resolution, tuple) else resolution**3
    return torch.rand(cells, generator=torch.Generator().manual_seed(seed)) < share


def equal(a: Samples, b: Samples) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("ray_indices", "t_starts", "t_ends", "packed_info"))


def aligned_rays():
    """Rays along axes and faces, from inside, behind, grazing a corner, with negative zeros."""
    o = [
        [-2, 0, 0],
        [-2, 0.5, 0.5],
        [0, 0, 0],
        [0.1, 0.2, 3],
        [-2, 1, 0],
        [-2, -1, 0],
        [2, 0, 0],
        [-2, -2, -2],
        [-2, 0.99, 0],
    ]
    d = [[1, 0, 0], [1, -0.0, 0], [0, 0, -1], [0, 0, -1], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1e-20, 0]]
    return torch.tensor(o, dtype=torch.float32), torch.tensor(d, dtype=torch.float32)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("resolution", [32, 1, 7, (5, 32, 9)])
def test_parity_of_sample_sets(share, resolution):
    bits = pack_bits(random_grid(resolution, share))
    rays = random_rays(500)
    assert equal(march_rays(*rays, BOX, bits, resolution, STEP), march_rays_ref(*rays, BOX, bits, resolution, STEP))


@pytest.mark.parametrize("share", [0.002, 0.05, 1.0])
@pytest.mark.parametrize("resolution", [(5, 6, 131), (9, 3, 64), (130, 2, 3), (4, 8, 200), (3, 1, 77)])
def test_parity_on_rows_of_several_words(resolution, share):
    """The scan of the grid reads 64 cells along z at a time, from any bit on."""
    bits, rays = pack_bits(random_grid(resolution, share, seed=5)), random_rays(200, spread=0.7)
    fast, reference = (f(*rays, BOX, bits, resolution, STEP) for f in (march_rays, march_rays_ref))
    assert reference.n_samples > 10
    assert equal(fast, reference)


@pytest.mark.parametrize("resolution", [32, 30])
def test_parity_on_a_ball_with_full_blocks_inside(resolution):
    centres = (torch.arange(resolution) + 0.5) / resolution * 2 - 1
    radius = torch.stack(torch.meshgrid(centres, centres, centres, indexing="ij")).norm(dim=0)
    bits, rays = pack_bits(radius < 0.7), random_rays(400, spread=0.6)
    fast, reference = (f(*rays, BOX, bits, resolution, STEP) for f in (march_rays, march_rays_ref))
    assert reference.n_samples > 10_000
    assert equal(fast, reference)


@pytest.mark.parametrize(
    "options",
    [
        {"jitter": torch.rand(500, generator=torch.Generator().manual_seed(3))},
        {"near": 1.7, "far": 2.6},
        {"near": torch.linspace(0, 3, 500), "far": torch.linspace(2, 3, 500)},
        {"max_samples": 17},
        {"max_samples": 0},
        {"near": -4.0},
    ],
)
def test_parity_of_options(options):
    bits = pack_bits(random_grid(32, 0.2))
    rays = random_rays(500)
    fast, reference = (f(*rays, BOX, bits, 32, STEP, **options) for f in (march_rays, march_rays_ref))
    assert equal(fast, reference)


@pytest.mark.parametrize("step", [0.3, 0.0625, 1e-3])
def test_parity_on_axis_aligned_rays(step):
    rays = aligned_rays()
    for share in (0.3, 1.0):
        bits = pack_bits(random_grid(32, share))
        assert equal(march_rays(*rays, BOX, bits, 32, step), march_rays_ref(*rays, BOX, bits, 32, step))


def test_parity_with_unnormalised_directions_and_an_odd_box():
    rays_o, rays_d = random_rays(300)
    rays_d = rays_d * torch.logspace(-1, 1, 300)[:, None]
    bits, box = pack_bits(random_grid((4, 6, 3), 0.4)), (-0.3, -1.5, 0.1, 0.9, -0.2, 2.0)
    fast, reference = (f(rays_o, rays_d, box, bits, (4, 6, 3), 0.01) for f in (march_rays, march_rays_ref))
    assert reference.n_samples > 1000
    assert equal(fast, reference)


@pytest.mark.slow
def test_parity_campaign():
    for seed in range(16):
        share, resolution = [0.01, 0.1, 0.5, 1.0][seed % 4], [8, 32, 48, 64][seed // 4 % 4]
        bits = pack_bits(random_grid(resolution, share, seed))
        rays, jitter = random_rays(4000, seed), torch.rand(4000, generator=torch.Generator().manual_seed(seed))
        fast, reference = (f(*rays, BOX, bits, resolution, STEP, jitter) for f in (march_rays, march_rays_ref))
        assert equal(fast, reference), (seed, share, resolution)


def test_lattice_by_hand():
    # Box [0, 4]^3 in 4 cells a side; only cell x = 2 of the row is occupied; start -1, step 0.5.
    occupied = torch.zeros(4, 4, 4, dtype=torch.bool)
    occupied[2, 1, 1] = True
    rays_o, rays_d = torch.tensor([[-1.0, 1.5, 1.5]]), torch.tensor([[1.0, 0.0, 0.0]])
    samples = march_rays(rays_o, rays_d, (0, 0, 0, 4, 4, 4), pack_bits(occupied), 4, 0.5)
    assert samples.t_starts.tolist() == [3.0, 3.5]
    assert samples.t_ends.tolist() == [3.5, 4.0]
    # Jitter of half a step: midpoints at x = 2.0 (in: cells are half open), 2.5, and 3.0 (out).
    samples = march_rays(rays_o, rays_d, (0, 0, 0, 4, 4, 4), pack_bits(occupied), 4, 0.5, torch.tensor([0.5]))
    assert samples.t_starts.tolist() == [2.75, 3.25]
    assert samples.packed_info.tolist() == [[0, 2]]
    assert samples.ray_indices.tolist() == [0, 0]


def test_every_sample_lies_in_an_occupied_cell():
    occupied = random_grid(32, 0.1)
    rays_o, rays_d = random_rays(1000)
    samples = march_rays(rays_o, rays_d, BOX, pack_bits(occupied), 32, STEP)
    cells = ((samples.positions(rays_o.double(), rays_d.double()) + 1) * 16).floor().long()
    assert bool(((cells >= 0) & (cells < 32)).all())
    assert bool(occupied[(cells[:, 0] * 32 + cells[:, 1]) * 32 + cells[:, 2]].all())


def test_samples_are_packed_in_order():
    rays = random_rays(200)
    samples = march_rays(*rays, BOX, pack_bits(random_grid(16, 0.5)), 16, STEP)
    assert bool((samples.ray_indices.diff() >= 0).all())
    same_ray = samples.ray_indices.diff() == 0
    assert bool((samples.t_starts[1:] >= samples.t_ends[:-1])[same_ray].all())
    assert torch.equal(samples.packed_info, pack_info(samples.ray_indices, 200))
    torch.testing.assert_close(
        samples.t_ends - samples.t_starts, torch.full_like(samples.t_ends, STEP), atol=5e-7, rtol=0
    )


def test_rotating_rays_and_grid_together_changes_nothing():
    # A quarter turn about z maps cells to cells: (x, y) -> (-y, x).
    occupied = random_grid(16, 0.3).reshape(16, 16, 16)
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    turned = torch.rot90(occupied, 1, (0, 1))
    rays_o, rays_d = random_rays(400)
    a = march_rays(rays_o, rays_d, BOX, pack_bits(occupied), 16, STEP)
    b = march_rays(rays_o @ turn.T, rays_d @ turn.T, BOX, pack_bits(turned), 16, STEP)
    # A midpoint exactly on a face belongs to the upper cell, which the turn swaps; random rays have none.
    assert equal(a, b)


def test_samples_of_another_default_dtype_and_their_rays():
    rays, bits = random_rays(50), pack_bits(random_grid(16, 0.5))
    wanted = march_rays(*rays, BOX, bits, 16, STEP)
    torch.set_default_dtype(torch.float64)
    try:
        assert equal(march_rays(*rays, BOX, bits, 16, STEP), wanted)
    finally:
        torch.set_default_dtype(torch.float32)
    keep = wanted.t_starts > wanted.t_starts.median()
    assert torch.equal(wanted.select(keep).ray_indices, wanted.ray_indices[keep])
    assert wanted.select(keep).n_rays == 50
    torch.testing.assert_close(wanted.positions(*rays), positions_ref(wanted, *rays), rtol=0, atol=1e-6)


def test_empty_inputs():
    none = torch.zeros(0, 3)
    full = pack_bits(random_grid(8, 1.0))
    for march in (march_rays, march_rays_ref):
        samples = march(none, none, BOX, full, 8, STEP)
        assert samples.packed_info.shape == (0, 2)
        assert samples.n_samples == 0
        samples = march(*random_rays(5), BOX, torch.zeros_like(full), 8, STEP)
        assert samples.packed_info.tolist() == [[0, 0]] * 5
        assert samples.n_samples == 0


def test_misses_and_a_box_behind():
    full = pack_bits(random_grid(8, 1.0))
    rays_o, rays_d = (
        torch.tensor([[3.0, 0, 0], [3.0, 0, 0], [0, 5, 0]]),
        torch.tensor([[1.0, 0, 0], [-1, 0, 0], [1, 0, 0]]),
    )
    counts = march_rays(rays_o, rays_d, BOX, full, 8, 0.01).packed_info[:, 1].tolist()
    assert counts == [0, 200, 0]


def test_strided_inputs():
    rays_o, rays_d = random_rays(64)
    bits = pack_bits(random_grid(16, 0.4))
    wanted = march_rays(rays_o, rays_d, BOX, bits, 16, STEP)
    wide = torch.stack([rays_o, rays_d], dim=-1)
    assert equal(march_rays(wide[..., 0], wide[..., 1], BOX, bits.repeat(2, 1).T[:, 0], 16, STEP), wanted)
    one = rays_o[:1].expand(64, 3)
    assert equal(
        march_rays(one, rays_d, BOX, bits, 16, STEP), march_rays(one.contiguous(), rays_d, BOX, bits, 16, STEP)
    )


def test_same_bits_for_any_number_of_threads():
    rays, bits = random_rays(1000), pack_bits(random_grid(32, 0.2))
    before, results = torch.get_num_threads(), []
    for n_threads in (1, 2, 4, 8):
        torch.set_num_threads(n_threads)
        samples = march_rays(*rays, BOX, bits, 32, STEP)
        results.append((samples, prune_samples(samples, samples.t_starts * 20, 0.01, 1e-2)))
    torch.set_num_threads(before)
    for samples, pruned in results[1:]:
        assert equal(samples, results[0][0])
        assert equal(pruned, results[0][1])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rays_o": torch.full((4, 3), math.nan)}, ValueError, "rays_o, rays_d and near must be finite"),
        ({"rays_d": torch.full((4, 3), math.inf)}, ValueError, "rays_o, rays_d and near must be finite"),
        ({"rays_d": torch.zeros(4, 3)}, ValueError, "rays_d must be non-zero"),
        ({"rays_d": torch.ones(5, 3)}, ValueError, "rays_d must be of shape"),
        ({"rays_o": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "rays_o must be float32 or float64"),
        ({"aabb": (0, 0, 0, 1, 0, 1)}, ValueError, "aabb must be six finite numbers"),
        ({"resolution": 9}, ValueError, r"occupancy_bits must be of shape \[92\]"),
        ({"occupancy_bits": torch.ones(64)}, TypeError, "occupancy_bits must be uint8"),
        ({"step_size": 0.0}, ValueError, "step_size must be positive"),
        ({"rays_d": torch.full((4, 3), 9e-31)}, ValueError, "rays_d must be non-zero"),
        (
            {"rays_d": torch.tensor([[1e-20, 0, 0]] * 4)},
            ValueError,
            "rays_d must be of a length that crosses the box in",
        ),
        ({"step_size": 1e-11}, ValueError, "rays_d must be of a length that crosses the box in at most 2.32 steps"),
        ({"jitter": torch.full((4,), 2.0)}, ValueError, "jitter must be in"),
        ({"jitter": torch.ones(4)}, ValueError, r"jitter must be in \[0, 1\)"),
        ({"jitter": torch.full((4,), math.nan)}, ValueError, "jitter must be in"),
        ({"jitter": torch.zeros(3)}, ValueError, "jitter must be of shape"),
        ({"near": math.inf}, ValueError, "near must be finite"),
        ({"near": torch.tensor([0, 0, math.nan, 0])}, ValueError, "near must be finite"),
        ({"far": math.nan}, ValueError, "far must be a number, got NaN"),
        ({"far": torch.tensor([1, 2, math.nan, 3])}, ValueError, "far must be a number, got NaN"),
        ({"max_samples": -1}, ValueError, "max_samples must be None or at least 0"),
    ],
)
def test_refusals(change, error, text):
    rays_o, rays_d = random_rays(4)
    arguments = {"rays_o": rays_o, "rays_d": rays_d, "aabb": BOX, "occupancy_bits": torch.zeros(64, dtype=torch.uint8)}
    arguments |= {"resolution": 8, "step_size": 0.1} | change
    with pytest.raises(error, match=f"march_rays: .*{text}"):
        march_rays(**arguments)


def test_directions_that_are_small_but_not_too_small():
    """An infinite `far` and directions along which a step hardly moves: the lattice is that of the reference."""
    rays_o, rays_d = torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[1e-3, 0.0, -1e-31]])
    bits = pack_bits(random_grid(4, 1.0))
    fast, reference = (f(rays_o, rays_d, BOX, bits, 4, 0.5) for f in (march_rays, march_rays_ref))
    assert reference.n_samples == 1800
    assert equal(fast, reference)
    assert march_rays(rays_o, rays_d * 1e-15, BOX, bits, 4, 0.5, far=2.0).n_samples == 4


def test_an_absurd_number_of_samples_is_refused():
    rays_o, rays_d = torch.tensor([[-1.0, 0, 0]]).expand(600, 3), torch.tensor([[1.0, 0, 0]]).expand(600, 3)
    with pytest.raises(ValueError, match=r"march_rays: step_size must be long enough for 2\^40 samples at most"):
        march_rays(rays_o, rays_d, BOX, torch.ones(1, dtype=torch.uint8), 1, 5e-10)


def test_bits_round_trip():
    for n in (0, 1, 8, 27, 100):
        occupied = random_grid((n, 1, 1), 0.5)
        bits = pack_bits(occupied)
        assert bits.shape == ((n + 7) // 8,)
        assert torch.equal(unpack_bits(bits, n), occupied)
    assert pack_bits(torch.tensor([True, False, False, True])).tolist() == [9]


def random_samples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 30, (300,), generator=generator)
    counts[::7] = 0
    ray_indices = torch.repeat_interleave(torch.arange(300), counts)
    t_starts = torch.rand(ray_indices.shape[0], generator=generator)
    samples = Samples(t_starts, t_starts + 0.05, pack_info(ray_indices, 300))
    return samples, torch.rand(ray_indices.shape[0], generator=generator) ** 4 * 60


@pytest.mark.parametrize(("alpha_thre", "early_stop_eps"), [(0, 0), (0.01, 1e-4), (0.3, 0.1), (1.0, 0), (0, 1.0)])
def test_prune_parity(alpha_thre, early_stop_eps):
    samples, sigmas = random_samples()
    fast, reference = (f(samples, sigmas, alpha_thre, early_stop_eps) for f in (prune_samples, prune_samples_ref))
    assert equal(fast, reference)
    if (alpha_thre, early_stop_eps) == (0, 0):
        assert equal(fast, samples)


def test_prune_by_hand():
    # alphas 0.4, 0.8, 0.1 | 0.8, 0.1 | 0, 0.9: transmittances 1, 0.6, 0.12 | 1, 0.2 | 1, 1.
    alphas = torch.tensor([0.4, 0.8, 0.1, 0.8, 0.1, 0.0, 0.9])
    rays = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    t_starts = torch.arange(7.0)
    samples = Samples(t_starts, t_starts + 1, pack_info(rays, 3))
    kept = prune_samples(samples, -torch.log1p(-alphas), alpha_thre=0.2, early_stop_eps=0.3)
    assert kept.t_starts.tolist() == [0.0, 1.0, 3.0, 6.0]
    assert kept.packed_info.tolist() == [[0, 2], [2, 1], [3, 1]]


def test_prune_of_strided_inputs():
    samples, sigmas = random_samples()
    wide = torch.stack([samples.t_starts, samples.t_ends, sigmas], -1)
    strided = Samples(wide[:, 0], wide[:, 1], samples.packed_info.T.contiguous().T)
    assert equal(prune_samples(strided, wide[:, 2], 0.1, 0.01), prune_samples(samples, sigmas, 0.1, 0.01))
    one = sigmas[:1].expand(sigmas.shape)
    assert equal(prune_samples(samples, one, 0.1, 0.01), prune_samples(samples, one.contiguous(), 0.1, 0.01))


def test_registered_forms():
    rays_o, rays_d = random_rays(6)
    bits, jitter = pack_bits(random_grid(8, 0.5)), torch.full((6,), 0.5)
    march = (rays_o, rays_d, bits, list(BOX), [8, 8, 8], 0.1, jitter, None, torch.full((6,), 9.0), 0.0, 9.0, None)
    torch.library.opcheck(torch.ops.mvdream_fast.march_rays.default, march)
    samples = march_rays(rays_o, rays_d, BOX, bits, 8, 0.1, jitter)
    assert samples.n_samples > 20
    prune = (samples.t_starts, samples.t_ends, samples.packed_info, samples.t_starts * 5, 0.01, 0.1)
    torch.library.opcheck(torch.ops.mvdream_fast.prune_samples.default, prune)


def test_compiles_in_one_graph():
    rays, bits = random_rays(20), pack_bits(random_grid(8, 0.5))

    def run(rays_o, rays_d, jitter):
        samples = march_rays(rays_o, rays_d, BOX, bits, 8, 0.1, jitter)
        kept = prune_samples(samples, samples.t_starts * 5, 0.01, 0.1)
        return kept.t_starts, kept.t_ends, kept.packed_info

    jitter = torch.rand(20, generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(run(*rays, jitter), compiled(*rays, jitter), strict=True))


def test_prune_of_nothing_and_refusals():
    empty = torch.zeros(0)
    samples = Samples(empty, empty, torch.zeros(3, 2, dtype=torch.int64))
    assert prune_samples(samples, empty).packed_info.tolist() == [[0, 0]] * 3
    with pytest.raises(ValueError, match=r"prune_samples: sigmas must be of shape \[0\]"):
        prune_samples(samples, torch.zeros(1))
    with pytest.raises(ValueError, match=r"prune_samples: alpha_thre must be in \[0, 1\], got 1.5"):
        prune_samples(samples, empty, alpha_thre=1.5)


BAD_PACKINGS = [
    (torch.tensor([[0, 2], [2, 1 << 40]]), ValueError, "packed_info must be ray after ray without gaps"),
    (torch.tensor([[0, 2], [-(1 << 40), 2]]), ValueError, "packed_info must be ray after ray without gaps"),
    (torch.tensor([[0, 2], [2, 1]]), ValueError, "packed_info must be ray after ray without gaps, 4 samples in all"),
    (torch.tensor([[0, 5], [5, -1]]), ValueError, "packed_info must be ray after ray without gaps"),
    (torch.tensor([0, 4]), ValueError, r"packed_info must be of shape \[n_rays, 2\]"),
    (torch.tensor([[0, 2], [2, 2]], dtype=torch.int32), TypeError, "packed_info must be int64"),
    (
        torch.zeros(2, 2, dtype=torch.int64, device="meta"),
        RuntimeError,
        "packed_info must be on the device of t_starts",
    ),
]


@pytest.mark.parametrize(("packed_info", "error", "text"), BAD_PACKINGS)
def test_a_packing_that_points_elsewhere_is_refused(packed_info, error, text):
    samples, rays = Samples(torch.rand(4), torch.rand(4) + 1, packed_info), torch.ones(2, 3)
    with pytest.raises(error, match=f"prune_samples: {text}"):
        prune_samples(samples, torch.ones(4))
    with pytest.raises(error, match=f"Samples.positions: {text}"):
        samples.positions(rays, rays)


def test_positions_are_of_the_rays_that_were_marched():
    samples, rays = Samples(torch.rand(4), torch.rand(4) + 1, torch.tensor([[0, 2], [2, 2]])), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"Samples.positions: rays_o must be of shape \[2, 3\], got \[1, 3\]"):
        samples.positions(rays[:1], rays)
    with pytest.raises(ValueError, match=r"Samples.positions: rays_d must be of shape \[2, 3\], got \[3, 3\]"):
        samples.positions(rays, torch.ones(3, 3))
    with pytest.raises(RuntimeError, match=r"Samples.positions: rays_d must be on the device of t_starts"):
        samples.positions(rays, rays.to("meta"))
    with pytest.raises(ValueError, match=r"Samples.positions: t_ends must be of shape \[4\], got \[3\]"):
        Samples(samples.t_starts, samples.t_ends[:3], samples.packed_info).positions(rays, rays)
    wide = Samples(samples.t_starts.double(), samples.t_ends.double(), samples.packed_info)
    torch.testing.assert_close(wide.positions(rays, rays), samples.positions(rays, rays).double(), atol=1e-6, rtol=0)


def test_samples_of_our_own_are_not_read_again():
    rays, bits = random_rays(50), pack_bits(random_grid(8, 0.5))
    with Waits(host=("_march_checks.py:check_march",)) as waits:
        marched = march_rays(*rays, BOX, bits, 8, 0.05)
        positions = marched.positions(*rays)
        kept = prune_samples(marched, positions.norm(dim=-1))
        joined = join_samples([kept, kept])
        out = composite_samples(torch.ones(joined.n_samples), torch.rand(joined.n_samples, 3), joined)
    assert waits.at == {"reads.py:read": 2}  # how many were marched, and how many are left
    assert joined.n_rays == 100
    assert torch.equal(out.rgb[:50].sum(-1) > 0, out.rgb[50:].sum(-1) > 0)


def test_samples_that_somebody_put_together_are_checked_in_full():
    rays, bits = random_rays(50), pack_bits(random_grid(8, 0.5))
    marched = march_rays(*rays, BOX, bits, 8, 0.05)
    moved = dataclasses.replace(marched, packed_info=marched.packed_info + torch.tensor([1, 0]))
    n = marched.n_samples
    halves = join_samples([marched, moved]), marched.select(torch.ones(n, dtype=torch.bool))
    assert not halves[0]._is_ours
    assert halves[1]._is_ours
    for look in (
        lambda: moved.positions(*rays),
        lambda: prune_samples(moved, torch.ones(n)),
        lambda: composite_samples(torch.ones(n), torch.ones(n, 3), moved),
        lambda: composite(torch.ones(n), torch.ones(n, 3), moved.t_starts, moved.t_ends, packed_info=moved.packed_info),
        lambda: moved.select(torch.arange(n) < n // 2).positions(*rays),
    ):
        with pytest.raises((ValueError, IndexError)):
            look()


def test_values_beside_samples_of_our_own_must_still_fit():
    rays, bits = random_rays(5), pack_bits(random_grid(8, 0.5))
    marched = march_rays(*rays, BOX, bits, 8, 0.05)
    n = marched.n_samples
    with pytest.raises(ValueError, match=rf"prune_samples: sigmas must be of shape \[{n}\], got \[{n - 1}\]"):
        prune_samples(marched, torch.ones(n - 1))
    with pytest.raises(ValueError, match=rf"composite: t_starts must be of shape \[{n - 1}\], got \[{n}\]"):
        composite_samples(torch.ones(n - 1), torch.ones(n - 1, 3), marched)
    with pytest.raises(ValueError, match=rf"composite: rgb must be of shape \[{n}, 3\], got \[{n}, 2\]"):
        composite_samples(torch.ones(n), torch.ones(n, 2), marched)
    with pytest.raises(ValueError, match=r"composite: background must be of shape \[5, 3\], got \[4, 3\]"):
        composite_samples(torch.ones(n), torch.ones(n, 3), marched, torch.ones(4, 3))
