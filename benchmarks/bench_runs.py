"""Whole text-to-3D runs of the embedded model, and what repainting adds to one: slow, a run is a minute and more.

There is no reference: a whole run in plain torch takes several times as long, and its asset would be another of many
right ones. What a run is made of has its references in bench_sds, bench_unet, bench_nerf_step and bench_tets.
"""

import functools

import distillations
import pytest
from contest import size, sizes, slower, within
from contestants import Contestant

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def contestants(by_name):
    """Nothing but time and memory is compared: assets have no one right answer."""
    return [Contestant(name, make, case=name, apart=True) for name, make in by_name.items()]


@pytest.mark.parametrize("preset", ["fast", "mini"])
def bench_sds(contest, preset, tiny_model):
    settings = size({}, {"steps": 2, "render_size": (16,), "n_groups": (1,), "milestones": ()})
    make = functools.partial(distillations.whole_run, size("embedded", tiny_model), preset, **settings)
    goals = [within(60 if preset == "fast" else 120)]
    contest.run(f"sds {preset}", "run", contestants({"ours": make}), work={"runs": 1}, goals=goals, once=True)


def bench_repaint(contest, tiny_model):
    """A run whose last third is fitted to redrawn views, and one without."""
    model, settings = size("embedded", tiny_model), size({"steps": 100}, {"steps": 4})
    names = {"ours, distillation": 1.0, "ours, repainting": 0.7}
    by_name = {
        name: functools.partial(distillations.whole_run, model, "fast", repaint_from=x, **settings)
        for name, x in names.items()
    }
    contest.run(
        "sds fast with repainting", "run", contestants(by_name), work={"steps": settings["steps"]},
        goals=[slower(1.1, *names)], once=True,
    )  # fmt: skip


def bench_steps(contest, tiny_model):
    """By steps of a run."""
    make = functools.partial(distillations.whole_run, size("embedded", tiny_model), "fast")
    counts = sizes((20, 60, 120), (2, 4))
    contest.scale(
        "sds fast by steps", "run", "steps", {n: {"ours": functools.partial(make, steps=n)} for n in counts}, once=True
    )
