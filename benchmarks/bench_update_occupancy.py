"""update_occupancy: the grid's averages and bits from new densities, of all cells or, after the warm-up, of half."""

import functools

import pytest
import torch
from contest import sizes
from scenes import draw

from mvdream_fast import ops


@pytest.mark.parametrize("cells", ["all", "half"])
@pytest.mark.parametrize("side", sizes([32, 128], [4]))
def bench_update_occupancy(contest, side, cells):
    n = side**3
    chosen = None if cells == "all" else torch.randperm(n, generator=torch.Generator().manual_seed(0))[: n // 2]
    chosen = None if chosen is None else chosen.to(draw(1).device)
    n_values = n if chosen is None else len(chosen)
    ema, values = draw(n), draw(n_values, seed=1)
    contest.op(
        f"update_occupancy {side}^3 {cells}",
        {
            "reference": functools.partial(ops.update_occupancy_ref, cells=chosen),
            "ours": functools.partial(ops.update_occupancy, cells=chosen),
        },
        [ema, values],
        backward=False,
        work={"cells": n, "flop": 3 * n, "bytes": 8 * n + n / 8 + n_values * (4 if chosen is None else 12)},
    )
