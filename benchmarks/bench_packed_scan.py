"""packed_scan: sums and products along rays, of the samples of a march."""

import functools

import pytest
from contest import BACKWARD, size
from peers import need, need_gpu
from scenes import draw, marched

from mvdream_fast import ops


def nerfacc(product, values, packed_info):
    need("nerfacc")
    need_gpu("nerfacc's packed scan")
    import nerfacc

    return (nerfacc.exclusive_prod if product else nerfacc.exclusive_sum)(values, packed_info)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("product", [False, True], ids=["sum", "product"])
def bench_packed_scan(contest, product, backward):
    samples = marched(1, size(64, 8), "full")
    n = samples.n_samples
    contest.op(
        f"packed_scan {'product' if product else 'sum'}",
        {
            "reference": lambda values, info: ops.packed_scan_ref(values, info, product, True),
            "nerfacc": functools.partial(nerfacc, product),
            "ours": lambda values, info: ops.packed_scan(values, info, product, True),
        },
        [0.9 + 0.1 * draw(n), samples.packed_info],
        backward,
        differentiable=[0],
        work={"samples": n, "flop": (3 if backward else 1) * n, "bytes": (24 if backward else 8) * n},
        tolerance=1e-3,  # a sum of hundreds of numbers, in another order
    )
