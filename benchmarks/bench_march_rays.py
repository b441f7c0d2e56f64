"""march_rays and prune_samples: which samples of the rays lie in occupied cells, and which of them can be seen."""

import functools

import pytest
from contest import even, faster, size, sizes
from scenes import BOX, CELLS, STEP, draw, grid_of, marched, rays_of

from mvdream_fast import ops
from mvdream_fast.ops.march_rays import Samples

OPS = {"reference": ops.march_rays_ref, "ours": ops.march_rays}


def packed(samples: Samples):
    return samples.t_starts, samples.t_ends, samples.packed_info


def march(op, n_views: int, side: int, share: str):
    rays, bits = rays_of(n_views, side), grid_of(share)
    bits = bits.to(rays.rays_o.device)
    return lambda: op(rays.rays_o, rays.rays_d, BOX, bits, CELLS, STEP)


def work(samples: Samples) -> dict[str, float]:
    """A ray is read as 6 floats and a sample written as 2; the arithmetic is that of a sample's place and cell."""
    n_rays, n = len(samples.packed_info), samples.n_samples
    return {"rays": n_rays, "samples": n, "flop": 20 * n, "bytes": 40 * n_rays + 8 * n}


@pytest.mark.parametrize("share", ["10 %", "full"])
@pytest.mark.parametrize("views", sizes([(1, 64)], [(1, 8)]), ids=str)
def bench_march_rays(contest, views, share):
    contest.run(
        f"march_rays {views[0]}x{views[1]}x{views[1]} {share}",
        "forward",
        {name: functools.partial(march, op, *views, share) for name, op in OPS.items()},
        work=work(marched(*views, share)),
        goals=[faster(18, "reference")],
        seen=packed,
    )


def bench_emptiness(contest):
    """What a tenth of the grid costs of all of it: empty cells should be nearly free."""
    side = size(512, 8)
    contest.run(
        f"march_rays 1x{side}x{side} by occupancy",
        "forward",
        {f"ours, {share}": functools.partial(march, ops.march_rays, 1, side, share) for share in ("full", "10 %")},
        work={"rays": side * side},
        goals=[faster(5, "ours, full", "ours, 10 %")],
        seen=lambda samples: len(samples.packed_info),
    )


def bench_samples(contest):
    """By samples, through all of the grid: the rays of smaller images have fewer."""
    samples = {side: marched(1, side, "full") for side in sizes((6, 20, 64, 200), (2, 4))}
    by_count = {x.n_samples: side for side, x in samples.items()}

    contest.scale(
        "march_rays by samples",
        "forward",
        "samples",
        {n: {"ours": functools.partial(march, ops.march_rays, 1, side, "full")} for n, side in by_count.items()},
        work=lambda n: work(samples[by_count[n]]),
        goals=[even("samples", min(by_count), max(by_count), 1.5)],
        seen=packed,
    )


def bench_prune_samples(contest):
    """Half of the samples seen: those in front, with a density that varies."""
    samples = marched(1, size(64, 8), "full")
    sigmas, n = 20 * draw(samples.n_samples), samples.n_samples
    contest.run(
        "prune_samples",
        "forward",
        {
            "reference": lambda: lambda: ops.prune_samples_ref(samples, sigmas, 0.01, 1e-2),
            "ours": lambda: lambda: ops.prune_samples(samples, sigmas, 0.01, 1e-2),
        },
        work={"samples": n, "flop": 10 * n, "bytes": 20 * n},
        seen=packed,
    )
