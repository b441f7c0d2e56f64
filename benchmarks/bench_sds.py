"""One step of score distillation, ours against the same step of the same maths in plain torch and diffusers.

Every contestant has a process of its own, whose memory is all of it. Figures are of a run's first steps, whose volume
is still full.
"""

import functools

import distillations
import pytest
from contest import faster, sizes
from contestants import Contestant


@pytest.mark.parametrize("size", sizes(["mini", "paper"], ["tiny"]))
@pytest.mark.timeout(1800)
def bench_step(contest, size):
    makes = {"reference": distillations.plain_step, "ours": distillations.our_step}
    contest.run(
        f"SDS step {size}",
        "step",
        [Contestant(name, functools.partial(make, size), apart=True) for name, make in makes.items()],
        work={"views": 4},
        goals=[faster(1.5, "reference")],
        tolerance=1e-2,  # of the loss: which samples are seen is decided by sums that round otherwise
    )
