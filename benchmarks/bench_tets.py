"""Tetrahedra: marching them, and a step that refines them beside a step of score distillation of `mini`."""

import functools

import distillations
import pytest
import torch
from contest import BACKWARD, named, passes, size, sizes, slower, within
from contestants import Contestant

from mvdream_fast.scene.tets.lattice import Lattice, positions_of
from mvdream_fast.scene.tets.marching import march


def marching(resolution: int, backward: bool):
    """A ball of radius 0.7, the largest surface that a scene has: its vertices and faces, and the gradients."""
    lattice = Lattice(resolution)
    points = positions_of(lattice, torch.device("cpu"))
    sdf = (points.norm(dim=1) - 0.7).requires_grad_(backward)
    deformation = torch.zeros_like(points).requires_grad_(backward)

    def call():
        surface = march(lattice, sdf, deformation)
        if backward:
            torch.autograd.grad(surface.vertices.sum(), (sdf, deformation))
        return surface.vertices, surface.faces

    return call


@pytest.mark.parametrize("backward", BACKWARD)
def bench_march(contest, backward):
    """By vertices of the lattice."""
    sides = sizes((32, 64, 128), (4, 8))
    contest.scale(
        "marching tetrahedra by vertices",
        passes(backward),
        "vertices",
        {side**3: {"ours": functools.partial(marching, side, backward)} for side in sides},
        goals=[] if backward or len(sides) < 3 else [within(15e-3, named("ours", 64**3, "vertices"))],
    )


@pytest.mark.timeout(1800)
def bench_step(contest):
    """Their losses are of different shapes: nothing is compared. The images are four times as wide as mini's."""
    model, side = size("mini", "tiny"), size(256, 16)
    makes = {"ours, SDS of a volume": functools.partial(distillations.our_step, model)}
    for resolution in sizes((64, 128), (8,)):
        makes[f"ours, lattice of {resolution}"] = functools.partial(
            distillations.refining_step, model, side, resolution
        )
    last = list(makes)[-1]
    contest.run(
        "refining step",
        "step",
        [Contestant(name, make, case=name, apart=True) for name, make in makes.items()],
        work={"views": 4, "pixels": 4 * side**2},
        goals=[slower(1.3, "ours, SDS of a volume", last)],
    )
