"""Pixels in triangles: worked by hand, and against every pixel asked by itself."""

import numpy as np
import pytest

from mvdream_fast.core import triangles
from mvdream_fast.core.triangles import covered_pixels


def gathered(corners, size, **options):
    parts = list(covered_pixels(np.array(corners, dtype=np.float64), size, **options))
    return [np.concatenate(column) for column in zip(*parts)] if parts else [np.empty(0)] * 4


def test_worked_by_hand():
    # The lower left half of a 3 x 3 sheet, its diagonal from (0, 3) to (3, 0), on which three centres lie.
    face, x, y, weights = gathered([[(0, 0), (3, 0), (0, 3)]], 3)
    assert sorted(zip(x.tolist(), y.tolist())) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    assert face.tolist() == [0] * 6
    first = weights[(x == 0) & (y == 0)][0]  # (0.5, 0.5): a sixth of each side
    assert first.tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6])


@pytest.mark.parametrize(
    "corners",
    [
        [(0.6, 0.6), (1.4, 0.6), (1.0, 1.4)],  # between the centres
        [(0, 0), (2, 2), (4, 4)],  # no area
        [(9, 9), (12, 9), (9, 12)],  # beside the sheet
        [(-5, -5), (-1, -5), (-5, -1)],
    ],
)
def test_triangles_that_cover_nothing(corners):
    assert len(gathered([corners], 4)[0]) == 0
    assert list(covered_pixels(np.empty((0, 3, 2)), 4)) == []


def test_a_tolerance_takes_centres_just_outside():
    corners = [[(0, 0), (3 - 1e-12, 0), (0, 3 - 1e-12)]]  # its diagonal runs just below three centres
    assert len(gathered(corners, 3)[0]) == 3
    assert len(gathered(corners, 3, tolerance=1e-9)[0]) == 6


@pytest.mark.parametrize("pairs", [1, 50, 1 << 20])
def test_every_pixel_asked_by_itself(monkeypatch, pairs):
    monkeypatch.setattr(triangles, "PAIRS", pairs)
    corners = np.random.default_rng(0).uniform(-3, 12, (30, 3, 2))
    face, x, y, weights = gathered(corners, 9)
    assert (np.diff(face) >= 0).all()  # in the order of the triangles
    expected = []
    for i, triangle in enumerate(corners):
        system = np.vstack([triangle.T, np.ones(3)])
        for row in range(9):
            for column in range(9):
                w = np.linalg.solve(system, [column + 0.5, row + 0.5, 1])
                if (w >= 0).all():
                    expected.append((i, column, row, *w))
    assert np.allclose(np.column_stack([face, x, y, weights]), expected, atol=1e-9)
