"""The body-centred lattice: its tetrahedra fill it, are all alike, and name their edges as their neighbours do."""

import pytest
import torch

from mvdream_fast.scene.tets.lattice import EDGES, Lattice, border_of, positions_of, whole_coordinates

CPU = torch.device("cpu")


def test_points_are_all_even_or_all_odd():
    lattice = Lattice(4)
    expected = [(x, y, z) for x in (0, 2, 4) for y in (0, 2, 4) for z in (0, 2, 4)]
    expected += [(x, y, z) for x in (1, 3) for y in (1, 3) for z in (1, 3)]
    assert whole_coordinates(lattice, CPU).tolist() == [list(p) for p in expected]
    assert (lattice.n_corners, lattice.n_points, lattice.spacing) == (27, 35, 0.5)
    assert positions_of(Lattice(4, 3.0), CPU)[0].tolist() == [-3.0, -3.0, -3.0]


def test_tetrahedra_are_congruent_right_handed_and_fill_the_lattice():
    lattice = Lattice(8)
    points = positions_of(lattice, CPU).double()[lattice.tetrahedra().points]
    volumes = torch.linalg.det(points[:, 1:] - points[:, :1]) / 6
    torch.testing.assert_close(volumes / lattice.spacing**3, torch.full_like(volumes, 2 / 3))
    # around every line between centres an octahedron of two pyramids, on squares of 2 x 2 spacings, 1 high
    assert len(points) == 4 * 3 * 3 * 4 * 4
    lengths = torch.stack([(points[:, i] - points[:, j]).norm(dim=1) for i, j in EDGES], 1) / lattice.spacing
    wanted = torch.tensor([3**0.5] * 4 + [2.0] * 2).double()
    torch.testing.assert_close(lengths.sort(1).values, wanted.expand(len(lengths), 6))


def test_no_two_tetrahedra_overlap():
    lattice = Lattice(6)
    corners = positions_of(lattice, CPU).double()[lattice.tetrahedra().points]
    where = (torch.rand(300, 3, generator=torch.Generator().manual_seed(0)).double() - 0.5) * 1.2
    turned = torch.linalg.inv((corners[:, 1:] - corners[:, :1]).transpose(1, 2))  # [K, 3, 3]
    weights = torch.einsum("kij,pkj->pki", turned, where[:, None] - corners[None, :, 0])
    inside = (weights > 0).all(2) & (weights.sum(2) < 1)
    assert inside.sum(1).tolist() == [1] * 300


def test_edges_have_one_number_and_their_ends_follow_from_it():
    lattice = Lattice(6)
    tetrahedra = lattice.tetrahedra()
    row = torch.arange(len(tetrahedra.points)).repeat_interleave(6)
    numbers = lattice.edges(tetrahedra, row, torch.arange(6).repeat(len(tetrahedra.points)))
    pairs = tetrahedra.points[:, torch.tensor(EDGES)].view(-1, 2).sort(1).values
    assert torch.equal(lattice.ends(numbers).sort(1).values, pairs)
    assert len(numbers.unique()) == len(pairs.unique(dim=0))
    assert numbers.min() >= 0
    assert numbers.max() < lattice.n_edges


@pytest.mark.parametrize("seed", range(3))
def test_crossed_tetrahedra_are_those_with_both_signs(seed):
    lattice = Lattice(8)
    inside = torch.rand(lattice.n_points, generator=torch.Generator().manual_seed(seed)) < (0.02, 0.5, 0.98)[seed]
    everything = lattice.tetrahedra().points
    count = inside[everything].sum(1)
    expected = everything[(count > 0) & (count < 4)]
    assert sorted(lattice.crossed(inside).points.tolist()) == sorted(expected.tolist())


def test_the_border_bounds_the_tetrahedra():
    """A triangle that only one tetrahedron has is made of border points, and the others are inside."""
    lattice = Lattice(6)
    points = lattice.tetrahedra().points
    sides = torch.cat([points[:, [i for i in range(4) if i != k]] for k in range(4)]).sort(1).values
    triangles, count = sides.unique(dim=0, return_counts=True)
    assert count.max() == 2
    border = torch.zeros(lattice.n_points, dtype=torch.bool)
    border[triangles[count == 1].flatten()] = True
    of_tetrahedra = points.unique()  # the points on the cube's own edges are in none
    assert torch.equal(border[of_tetrahedra], border_of(lattice, CPU)[of_tetrahedra])
    assert border_of(lattice, CPU).sum() == lattice.n_points - (2**3 + 1)


@pytest.mark.parametrize(
    ("resolution", "radius", "message"),
    [(5, 1.0, "resolution must be even"), (2, 1.0, "at least 4"), (8, 0.0, "radius must be positive")],
)
def test_odd_settings_are_refused(resolution, radius, message):
    with pytest.raises(ValueError, match=message):
        Lattice(resolution, radius)
