"""Tetrahedra: marching them, and a step that refines them beside a step of score distillation of `mini`."""

import functools

import distillations
import pytest
import torch
from contest import BACKWARD, faster, named, passes, size, sizes, slower, within
from contestants import Contestant

from mvdream_fast.scene.tets.lattice import EDGES, Lattice, positions_of
from mvdream_fast.scene.tets.marching import TRIANGLES, Surface, march


def plain_march(lattice: Lattice, sdf: torch.Tensor, deformation: torch.Tensor) -> Surface:
    """As the paper's authors have it: every tetrahedron is looked at, and an edge is known by the sorted pair of its
    ends, which `unique` numbers. For surfaces that stay away from the lattice's border."""
    points = all_tetrahedra(lattice)
    inside = (sdf < 0)[points]  # [K, 4]
    mixed = inside.any(1) & ~inside.all(1)
    points, inside = points[mixed], inside[mixed]
    ends = points[:, torch.tensor(EDGES)].sort(-1).values.reshape(-1, 2)
    edges, number = ends.unique(dim=0, return_inverse=True)
    is_crossed = (sdf < 0)[edges].sum(1) == 1
    rows = torch.where(is_crossed, is_crossed.cumsum(0) - 1, -1)[number].view(-1, len(EDGES))
    moved = positions_of(lattice, sdf.device) + torch.tanh(deformation) * (lattice.spacing / 2)
    (from_a, from_b), (a, b) = moved[edges[is_crossed]].unbind(1), sdf.abs()[edges[is_crossed]].unbind(1)
    vertices = from_a + (a / (a + b))[:, None] * (from_b - from_a)
    case = (inside * torch.tensor([1, 2, 4, 8])).sum(1)
    faces = [rows[case == k][:, triangle] for k, found in enumerate(TRIANGLES) for triangle in found]
    return Surface(vertices, torch.cat(faces).int())


@functools.cache
def all_tetrahedra(lattice: Lattice) -> torch.Tensor:
    return lattice.tetrahedra().points


def shape(answer) -> tuple:
    """What is the same in any order of vertices and faces: their numbers, coordinates, area, volume, gradients."""
    (vertices, faces), *gradients = answer
    a, b, c = vertices.detach()[faces.long()].double().unbind(1)
    normals = torch.linalg.cross(b - a, c - a)
    sizes = torch.stack([normals.norm(dim=1).sum(), (a * normals).sum()])
    return len(vertices), len(faces), vertices.detach().sort(0).values, sizes, gradients


def marching(way, resolution: int, backward: bool):
    """A ball of radius 0.7, the largest surface that a scene has: its vertices and faces, and the gradients."""
    lattice = Lattice(resolution)
    points = positions_of(lattice, torch.device("cpu"))
    sdf = (points.norm(dim=1) - 0.7).requires_grad_(backward)
    deformation = torch.zeros_like(points).requires_grad_(backward)

    def call():
        surface = way(lattice, sdf, deformation)
        gradients = torch.autograd.grad((surface.vertices**3).sum(), (sdf, deformation)) if backward else ()
        return tuple(surface), *gradients

    return call


@pytest.mark.parametrize("backward", BACKWARD)
def bench_march(contest, backward):
    """By vertices of the lattice, beside the plain way where it is no matter of seconds."""
    sides = sizes((32, 64, 128), (4, 8))

    def makes(side):
        ways = ({"reference": plain_march} if side <= 64 else {}) | {"ours": march}
        return {name: functools.partial(marching, way, side, backward) for name, way in ways.items()}

    few = sides[-2]
    contest.scale(
        "marching tetrahedra by vertices",
        passes(backward),
        "vertices",
        {side**3: makes(side) for side in sides},
        goals=[
            faster(5, named("reference", few**3, "vertices"), named("ours", few**3, "vertices")),
            *([] if backward else [within(15e-3, named("ours", few**3, "vertices"))]),
        ],
        seen=shape,
        tolerance=1e-3,  # edges that start at their other end
    )


@pytest.mark.timeout(1800)
def bench_step(contest):
    """Their losses are of different shapes: nothing is compared. The images are four times as wide as mini's. The SDS
    step of a volume stands beside plain torch and diffusers in bench_sds, a refining step's ops in their benches."""
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
