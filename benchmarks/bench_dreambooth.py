"""A DreamBooth step of `mini` against the same model from diffusers' modules: photos in 2D mode, and the pull back."""

import functools

import pytest
import trainings
from bench_train import LAYOUTS
from contest import faster, size
from contestants import Contestant


@pytest.mark.timeout(1800)
def bench_step(contest):
    model, n_photos = size("mini", "tiny"), size(4, 2)
    contest.run(
        f"DreamBooth step {model}, {n_photos} photos",
        "step",
        [
            Contestant(name, functools.partial(trainings.dreambooth, model, layout, n_photos), apart=True)
            for name, layout in LAYOUTS.items()
        ],
        work={"images": n_photos},
        goals=[faster(1.2, name) for name in LAYOUTS if name != "ours"],
        tolerance=1e-3,
    )
