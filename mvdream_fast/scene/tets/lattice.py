"""A body-centred lattice of tetrahedra over a cube, as arithmetic: no file, and no list of its tetrahedra.

All tetrahedra are congruent, with edges of 1 and sqrt(3)/2 cells and angles of 60 and 90 degrees between faces, and the
cube's 48 symmetries map the lattice to itself. Six tetrahedra a cube around one diagonal are thinner (edges of 1,
sqrt(2) and sqrt(3)) and lean towards it: what is mirrored would not give the mirrored mesh.

Source: Labelle and Shewchuk, Isosurface Stuffing (2007), section 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# The edges that leave a point towards larger coordinates: along the axes, and diagonals.
WAYS = ((2, 0, 0), (0, 2, 0), (0, 0, 2), (1, -1, -1), (1, -1, 1), (1, 1, -1), (1, 1, 1))
SLOTS = len(WAYS)
EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # of a tetrahedron, by its corners


class Tetrahedra(NamedTuple):
    """points [K, 4] of tetrahedra, right-handed, and the kind [K] of each, out of twelve."""

    points: Tensor
    kind: Tensor


@dataclass(frozen=True)
class Lattice:
    """The points of [-radius, radius]^3 whose whole coordinates, 0 to `resolution`, are all even or all odd.

    The even ones, (n + 1)^3 corners of n = resolution / 2 cells a side, come first, then the n^3 centres, x slowest. A
    tetrahedron has two neighbouring centres and two neighbouring corners of the square between their cells. An edge's
    number is SLOTS times that of its end with the smaller coordinates (x decides on diagonals), plus its direction.
    """

    resolution: int
    radius: float = 1.0

    def __post_init__(self) -> None:
        if self.resolution < 4 or self.resolution % 2:
            raise ValueError(f"Lattice: resolution must be even and at least 4, got {self.resolution}; 64 is usual")
        if not self.radius > 0:
            raise ValueError(f"Lattice: radius must be positive, got {self.radius}; 1 is usual")

    @property
    def cells(self) -> int:
        """A side."""
        return self.resolution // 2

    @property
    def spacing(self) -> float:
        """Between planes of points; neighbours are two of it apart along an axis, or one along each of the three."""
        return 2 * self.radius / self.resolution

    @property
    def n_corners(self) -> int:
        """Points with even coordinates."""
        return (self.cells + 1) ** 3

    @property
    def n_points(self) -> int:
        """All points."""
        return self.n_corners + self.cells**3

    @property
    def n_edges(self) -> int:
        """Numbers that edges may have; at the border some have none."""
        return SLOTS * self.n_points

    def whole_coordinates(self) -> Tensor:
        """[n_points, 3] int64, each 0 to resolution."""
        even, odd = (torch.arange(first, self.resolution + 1, 2) for first in (0, 1))
        return torch.cat([torch.cartesian_prod(x, x, x) for x in (even, odd)])

    def positions(self) -> Tensor:
        """[n_points, 3] float32, scene units."""
        return (self.whole_coordinates() - self.cells).float() * self.spacing

    def border(self) -> Tensor:
        """[n_points] bool: corners of the surface that bounds all tetrahedra."""
        whole = self.whole_coordinates()
        return ((whole <= 1) | (whole >= self.resolution - 1)).any(1)

    def crossed(self, inside: Tensor) -> Tetrahedra:
        """The tetrahedra that have points inside and points outside. inside: [n_points] bool.

        Whole blocks of four, around the line between two centres, are looked at before any of their tetrahedra is.
        """
        n = self.cells
        corners = inside[: self.n_corners].view(n + 1, n + 1, n + 1).byte()
        centres = inside[self.n_corners :].view(n, n, n).byte()
        mixed = []
        for axis in range(3):
            k, c = corners.movedim(axis, 0)[1:-1], centres.movedim(axis, 0)
            count = c[:-1] + c[1:] + k[:, :-1, :-1] + k[:, 1:, :-1] + k[:, :-1, 1:] + k[:, 1:, 1:]
            mixed.append(((count > 0) & (count < 6)).movedim(0, axis).nonzero())
        points, kind = self._blocks(mixed)
        count = inside.index_select(0, points.flatten()).view(-1, 4).sum(1)
        kept = ((count > 0) & (count < 4)).nonzero()[:, 0]
        return Tetrahedra(points.index_select(0, kept), kind.index_select(0, kept))

    def tetrahedra(self) -> Tetrahedra:
        """All of them, 12 (n - 1) n^2: for who must see each; `crossed` makes do with those at a surface."""
        sides = [[self.cells - (axis == along) for axis in range(3)] for along in range(3)]
        return self._blocks([torch.cartesian_prod(*map(torch.arange, side)) for side in sides])

    def edges(self, tetrahedra: Tetrahedra, row: Tensor, edge: Tensor) -> Tensor:
        """Numbers [M] of edges: `edge` [M] of the six of the tetrahedron `row` [M]."""
        tables = _tables(self.cells, row.device)
        which = tetrahedra.kind.index_select(0, row) * len(EDGES) + edge
        first = tetrahedra.points.flatten().index_select(0, row * 4 + tables.first.index_select(0, which))
        return first * SLOTS + tables.slots.index_select(0, which)

    def ends(self, edges: Tensor) -> Tensor:
        """[M, 2]: the points at both ends of edges with these numbers, the one with the smaller coordinates first."""
        first = edges // SLOTS
        whole = whole_coordinates(self, edges.device)[first] + _ways(edges.device)[edges % SLOTS]
        odd = whole[:, 0] % 2
        half, side = whole // 2, self.cells + 1 - odd
        return torch.stack([first, odd * self.n_corners + (half[:, 0] * side + half[:, 1]) * side + half[:, 2]], 1)

    def _blocks(self, cells: list[Tensor]) -> Tetrahedra:
        """The four tetrahedra around the lines from cells' centres along each axis.

        cells: for each axis [M, 3], the cell that the line starts in.
        """
        n, found, kinds = self.cells, [], []
        for axis, start in enumerate(cells):
            centre, corner = ((start * start.new_tensor(_strides(m))).sum(1) for m in (n, n + 1))
            first = torch.stack([centre, centre, corner, corner], -1)  # [M, 4]
            kind = torch.arange(4 * axis, 4 * axis + 4, device=start.device)
            found.append((first[:, None] + _tables(n, start.device).offsets[kind]).flatten(0, 1))
            kinds.append(kind.repeat(len(start)))
        return Tetrahedra(torch.cat(found), torch.cat(kinds))


class _Tables(NamedTuple):
    """Of the twelve kinds of tetrahedra, four for each axis: offsets [12, 4] of the points' numbers from those of the
    first cell's centre and lower corner; of their edges first [72], which of the points they start from, and slots
    [72]."""

    offsets: Tensor
    first: Tensor
    slots: Tensor


def _strides(m: int) -> list[int]:
    return [m * m, m, 1]


@cache
def _tables(cells: int, device: torch.device) -> _Tables:
    offsets, first, slots = [], [], []
    for points in _shapes():
        centres, corners = points[:2] // 2 @ _strides(cells), (points[2:] + 1) // 2 @ _strides(cells + 1)
        offsets.append([*centres + (cells + 1) ** 3, *corners])
        for i, j in EDGES:
            start, way = (i, points[j] - points[i]) if _is_ahead(points[j] - points[i]) else (j, points[i] - points[j])
            first.append(start)
            slots.append(WAYS.index((*way.tolist(),)))
    return _Tables(*(torch.tensor(np.array(x), device=device) for x in (offsets, first, slots)))


@cache
def _ways(device: torch.device) -> Tensor:
    return torch.tensor(WAYS, device=device)


@cache
def positions_of(lattice: Lattice, device: torch.device) -> Tensor:
    """[n_points, 3] float32, scene units; made once."""
    return (whole_coordinates(lattice, device) - lattice.cells).float() * lattice.spacing


@cache
def border_of(lattice: Lattice, device: torch.device) -> Tensor:
    """[n_points] bool: corners of the surface that bounds all tetrahedra; made once."""
    whole = whole_coordinates(lattice, device)
    return ((whole <= 1) | (whole >= lattice.resolution - 1)).any(1)


@cache
def whole_coordinates(lattice: Lattice, device: torch.device) -> Tensor:
    """[n_points, 3] int64, each 0 to the resolution; made once."""
    even, odd = (torch.arange(first, lattice.resolution + 1, 2, device=device) for first in (0, 1))
    return torch.cat([torch.cartesian_prod(x, x, x) for x in (even, odd)])


def _shapes() -> Iterator[np.ndarray]:
    """[4, 3] whole coordinates of each kind, relative to the first centre; right-handed."""
    for axis in range(3):
        along, b, c = np.roll(np.eye(3, dtype=np.int64), -axis, axis=0)  # axis and the two after it
        square = [along - b - c, along + b - c, along + b + c, along - b + c]  # counter-clockwise around the axis
        for k in range(4):
            yield np.stack([0 * along, 2 * along, square[k], square[(k + 1) % 4]])


def _is_ahead(way: np.ndarray) -> bool:
    return bool(way[way != 0][0] > 0)
