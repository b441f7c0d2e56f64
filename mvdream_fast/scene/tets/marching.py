"""Marching tetrahedra: the surface of a signed distance on a lattice, with gradients to the distances and the points.

Which triangles there are is decided without gradient; where their corners lie is plain torch.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mvdream_fast.ops._edges import require
from mvdream_fast.scene.tets.lattice import Lattice, border_of, positions_of

# The edges (numbers of lattice.EDGES) that the triangles' corners lie on, counter-clockwise from outside, by which
# points are inside: bit i stands for point i. Of three inside the triangle is that of the fourth, turned over.
TRIANGLES = (
    (),
    ((0, 1, 2),),  # 0
    ((0, 4, 3),),  # 1
    ((1, 2, 4), (1, 4, 3)),  # 0 1
    ((1, 3, 5),),  # 2
    ((0, 3, 5), (0, 5, 2)),  # 0 2
    ((0, 4, 5), (0, 5, 1)),  # 1 2
    ((2, 4, 5),),  # 0 1 2
    ((2, 5, 4),),  # 3
    ((0, 1, 5), (0, 5, 4)),  # 0 3
    ((0, 2, 5), (0, 5, 3)),  # 1 3
    ((1, 5, 3),),  # 0 1 3
    ((1, 3, 4), (1, 4, 2)),  # 2 3
    ((0, 3, 4),),  # 0 2 3
    ((0, 2, 1),),  # 1 2 3
    (),
)


class Surface(NamedTuple):
    """Triangles: vertices [n, 3], with a graph, and faces [m, 3] int32, counter-clockwise from outside."""

    vertices: Tensor
    faces: Tensor


def march(lattice: Lattice, sdf: Tensor, deformation: Tensor) -> Surface:
    """The surface sdf = 0, closed: the points of the lattice's border count as outside, with |sdf|.

    sdf: [n_points], negative inside; 0 is outside. deformation: [n_points, 3]; a point is moved along each axis by
    tanh of it times half of the lattice's spacing, so that no two neighbours can pass each other.

    A vertex lies on an edge between an inside and an outside point where the sdf is 0 if it is linear there. Vertices
    come in the order of the edges' numbers, triangles in that of the tetrahedra: the same for the same signs.
    Differentiable in sdf and deformation. Without a crossing there are no triangles.

    Raises: ValueError for other shapes, and numbers that are not finite (CPU).
    Source: Shen et al., Deep Marching Tetrahedra (2021), section 3.1.1 and equation 4.
    """
    _check(lattice, sdf, deformation)
    with torch.no_grad():
        inside = (sdf < 0) & ~border_of(lattice, sdf.device)
        ends, faces = _triangles(lattice, inside)
    vertices = ends.flatten()
    start = positions_of(lattice, sdf.device).index_select(0, vertices).to(sdf.dtype)
    moved = start + torch.tanh(deformation.index_select(0, vertices)) * (lattice.spacing / 2)
    a, b = sdf.abs().index_select(0, vertices).view(-1, 2, 1).unbind(1)  # [n, 1] each; of one the sdf is negative
    from_a, from_b = moved.view(-1, 2, 3).unbind(1)
    return Surface(from_a + a / (a + b) * (from_b - from_a), faces)


def _triangles(lattice: Lattice, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The ends [n, 2] of the edges that are crossed, and the triangles [m, 3] int32 between them."""
    crossed, device = lattice.crossed(inside), inside.device
    bits = torch.tensor([1, 2, 4, 8], device=device)
    case = (inside.index_select(0, crossed.points.flatten()).view(-1, 4) * bits).sum(1)
    local = _table(device).index_select(0, case).view(-1, 3)  # [2 K, 3], -1 where there is no second triangle
    rows = (local[:, 0] >= 0).nonzero()[:, 0]
    tetrahedron = (rows // 2).repeat_interleave(3)
    numbers = lattice.edges(crossed, tetrahedron, local.index_select(0, rows).flatten())
    used = torch.zeros(lattice.n_edges, dtype=torch.bool, device=device)
    used[numbers] = True
    vertices = used.nonzero()[:, 0]
    row_of = torch.empty(lattice.n_edges, dtype=torch.int32, device=device)  # read where it has been written alone
    row_of[vertices] = torch.arange(len(vertices), dtype=torch.int32, device=device)
    return lattice.ends(vertices), row_of.index_select(0, numbers).view(-1, 3)


@cache
def _table(device: torch.device) -> Tensor:
    """TRIANGLES as [16, 2, 3], filled up with -1."""
    none = (-1, -1, -1)
    return torch.tensor([(*row, none, none)[:2] for row in TRIANGLES], device=device)


def _check(lattice: Lattice, sdf: Tensor, deformation: Tensor) -> None:
    n = lattice.n_points
    for name, x, shape in (("sdf", sdf, (n,)), ("deformation", deformation, (n, 3))):
        require(tuple(x.shape) == shape, "march", name, str(list(shape)), list(x.shape), "use the lattice's points")
        finite = x.is_cuda or bool(torch.stack(x.detach().aminmax()).isfinite().all())  # NaN is both
        require(finite, "march", name, "finite", "NaN or infinity", "check what produced it")
