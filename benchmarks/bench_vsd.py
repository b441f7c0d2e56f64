"""A step of variational score distillation against one of score distillation: the same recipe, model and images.

VSD asks the model three times as SDS does once (the learner without a graph, and once there and back). The reference is
SDS itself: there is no other VSD of these views to hold it to, and SDS beside plain torch and diffusers is bench_sds.
"""

import functools

import distillations
import pytest
from contest import size, slower
from contestants import Contestant


@pytest.mark.parametrize("mode", ["3d", "2d"])
@pytest.mark.timeout(1800)
def bench_step(contest, mode, tiny_model):
    model = size("embedded", tiny_model)
    names = {kind: f"ours, {kind.upper()}" for kind in ("sds", "vsd")}
    contest.run(
        f"VSD step {mode}",
        "step",
        [
            Contestant(name, functools.partial(distillations.pipeline_step, kind, mode, model), case=kind, apart=True)
            for kind, name in names.items()
        ],
        work={"views": 4},
        goals=[slower(3.2, names["sds"], names["vsd"])],
    )
