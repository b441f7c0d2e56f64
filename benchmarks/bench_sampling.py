"""Guided DDIM sampling of four views: what `generate` does between the text and the decoder, ours beside diffusers'."""

import functools

import pytest
import torch
import unets
from contest import faster, size, sizes
from contestants import Contestant
from peers import CUDA

SIZES = sizes(["mini", "sd21"] if CUDA else ["mini", pytest.param("width-64", marks=pytest.mark.slow)], ["tiny"])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.timeout(1800)
def bench_sampling(contest, name):
    n_steps = size(10, 2)
    makes = {
        "reference": functools.partial(unets.sampling, unets.diffusers, name=name, n_steps=n_steps),
        "diffusers channels_last": functools.partial(
            unets.sampling, unets.diffusers, torch.channels_last, name=name, n_steps=n_steps
        ),
        "ours": functools.partial(unets.sampling, unets.ours, name=name, n_steps=n_steps),
    }
    contest.run(
        f"sampling {name}, {n_steps} steps",
        "run",
        [Contestant(who, make, apart=not CUDA) for who, make in makes.items()],
        work={"steps": n_steps, "flop": n_steps * unets.flop(name)},
        goals=[faster(1.3, "diffusers channels_last")],
        budget_s=15,
        tolerance=3e-2 if CUDA else 2e-3,
    )


def bench_steps(contest):
    """By steps: linear in them, nothing is paid once a run."""
    counts = sizes((2, 5, 10), (1, 2))
    contest.scale(
        f"sampling {size('mini', 'tiny')} by steps",
        "run",
        "steps",
        {
            n: {"ours": functools.partial(unets.sampling, unets.ours, name=size("mini", "tiny"), n_steps=n)}
            for n in counts
        },
    )
