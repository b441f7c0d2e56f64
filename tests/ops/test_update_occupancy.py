"""update_occupancy and the OccupancyGrid that calls it: parity, hand-worked cells, and which cells are probed when."""

import math

import pytest
import torch

from mvdream_fast.core.rng import Stream
from mvdream_fast.ops.march_rays import unpack_bits
from mvdream_fast.ops.update_occupancy import update_occupancy, update_occupancy_ref
from mvdream_fast.scene.nerf.occupancy import OccupancyGrid, default_step_size


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_cells", [0, 1, 63, 4096])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("threshold", [0.01, 0.9])
def test_parity(n_cells, some, threshold):
    ema = draw(n_cells) ** 2
    ema[::7] = -1
    cells = (draw(2 * n_cells, seed=1) * n_cells).long() if some else None
    values = draw(n_cells if cells is None else cells.shape[0], seed=2)
    values[::11] = math.nan
    before = ema.clone()
    fast, reference = (f(ema, values, cells, 0.95, threshold) for f in (update_occupancy, update_occupancy_ref))
    assert torch.equal(fast[0], reference[0])
    assert torch.equal(fast[1], reference[1])
    assert torch.equal(ema, before)


def test_by_hand():
    ema = torch.tensor([0.8, 0.8, 0.0, -1.0])
    # Cell 0 decays to 0.4 and meets 0.1 and 0.6; cell 1 is not given; cell 3 is never seen.
    new, bits = update_occupancy(ema, torch.tensor([0.1, 0.6, 0.5, 9.0]), torch.tensor([0, 0, 2, 3]), 0.5, 0.55)
    torch.testing.assert_close(new, torch.tensor([0.6, 0.8, 0.5, -1.0]))
    # Mean of the seen (0.633) is above the threshold 0.55: cells 0 and 1.
    assert bits.tolist() == [0b0011]
    _, bits = update_occupancy(ema, torch.tensor([0.1, 0.6, 0.5]), torch.tensor([0, 0, 2]), 0.5, 10.0)
    assert bits.tolist() == [0b0010]  # the mean decides: only cell 1 is above it


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize(("dtype", "other"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_results_have_the_dtype_of_ema(dtype, other, some):
    ema, cells = (draw(60) ** 2).to(dtype), torch.tensor([3, 1, 3, 59]) if some else None
    values = draw(4 if some else 60, seed=2).to(other) / 3
    fast, reference = (f(ema, values, cells, 0.95, 0.2) for f in (update_occupancy, update_occupancy_ref))
    assert fast[0].dtype == reference[0].dtype == dtype
    assert torch.equal(fast[0], reference[0])
    assert torch.equal(fast[1], reference[1])
    torch.library.opcheck(torch.ops.mvdream_fast.update_occupancy.default, (ema, values, cells, 0.95, 0.2))


def test_all_equal_cells_are_empty_and_all_unseen_too():
    _, bits = update_occupancy(torch.zeros(9), torch.zeros(9))
    assert bits.tolist() == [0, 0]
    _, bits = update_occupancy(torch.full((9,), -1.0), torch.ones(9))
    assert bits.tolist() == [0, 0]


def test_strided_inputs():
    ema, values = draw(64), draw(64, seed=3)
    wanted = update_occupancy(ema, values)
    pair = torch.stack([ema, values], -1)
    got = update_occupancy(pair[:, 0], pair[:, 1])
    assert torch.equal(got[0], wanted[0])
    got = update_occupancy(ema, values[:1].expand(64))
    assert torch.equal(got[0], torch.maximum(ema * 0.95, values[:1]))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"values": torch.zeros(3)}, ValueError, "values must be of shape"),
        ({"cells": torch.tensor([0, 8])}, ValueError, r"cells must be in \[0, 8\)"),
        ({"cells": torch.tensor([-1, 2])}, ValueError, r"cells must be in \[0, 8\)"),
        ({"cells": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "cells must be int64"),
        ({"decay": 1.5}, ValueError, "decay must be in"),
        ({"ema": torch.zeros(2, 4)}, ValueError, "ema must be of shape"),
    ],
)
def test_refusals(change, error, text):
    arguments = {"ema": torch.zeros(8), "values": torch.zeros(2 if "cells" in change else 8)} | change
    with pytest.raises(error, match=f"update_occupancy: {text}"):
        update_occupancy(**arguments)


@pytest.mark.parametrize("some", [False, True])
def test_registered_forms(some):
    ema, cells = draw(60), torch.tensor([3, 1, 3, 59]) if some else None
    values = draw(4 if some else 60, seed=1)
    torch.library.opcheck(torch.ops.mvdream_fast.update_occupancy.default, (ema, values, cells, 0.95, 0.01))
    compiled = torch.compile(update_occupancy, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(ema, values, cells), update_occupancy(ema, values, cells)))


def ball(positions):
    return 100.0 * (positions.norm(dim=-1) < 0.5)


def test_grid_finds_the_ball():
    grid = OccupancyGrid(resolution=16)
    assert grid.fraction == 1.0
    assert grid.update(0, ball, Stream(0, 0, "occupancy"))
    centres = (torch.stack(torch.meshgrid(*[torch.arange(16)] * 3, indexing="ij"), -1).reshape(-1, 3) + 0.5) / 8 - 1
    distance, half_diagonal = centres.norm(dim=-1), 3**0.5 / 16
    assert bool(grid.occupied[distance < 0.5 - half_diagonal].all())
    assert not bool(grid.occupied[distance > 0.5 + half_diagonal].any())
    assert grid.ema.max().item() == pytest.approx(100 * default_step_size(1.0))


def test_grid_updates_every_16_steps_and_probes_half_the_cells_later():
    calls = []

    def sigma_fn(positions):
        calls.append(positions)
        return ball(positions)

    grid = OccupancyGrid(resolution=16)
    done = [grid.update(step, sigma_fn, Stream(0, step, "occupancy")) for step in range(33)]
    assert [step for step, it in enumerate(done) if it] == [0, 16, 32]
    assert [len(c) for c in calls] == [4096] * 3
    n_occupied = int(grid.occupied.sum())
    assert grid.update(256, sigma_fn, Stream(0, 256, "occupancy"))
    assert len(calls[-1]) == 1024 + min(n_occupied, 1024)
    grid.fill()
    grid.ema.fill_(1.0)  # all are occupied, as has been found
    grid.update(272, sigma_fn, Stream(0, 272, "occupancy"))
    assert len(calls[-1]) == 2048
    assert all(bool((c.abs() <= 1).all()) for c in calls)


@pytest.mark.parametrize(
    "again", [OccupancyGrid.fill, lambda grid: grid.load_state_dict(OccupancyGrid(16).state_dict())]
)
def test_a_grid_that_begins_again_late_probes_every_cell_first(again):
    """Those that it passed over would be empty from then on."""
    calls, grid = [], OccupancyGrid(resolution=16)

    def sigma_fn(positions):
        calls.append(len(positions))
        return ball(positions)

    grid.update(0, sigma_fn, Stream(0, 0, "occupancy"))
    n_occupied = int(grid.occupied.sum())
    again(grid)
    assert grid.fraction == 1
    for step in (320, 336):
        grid.update(step, sigma_fn, Stream(0, step, "occupancy"))
    assert calls[1] == 4096
    assert calls[2] < 4096
    assert int(grid.occupied.sum()) == pytest.approx(n_occupied, rel=0.2)


def test_grid_probes_each_cell_inside_itself():
    grid, seen = OccupancyGrid(resolution=5, radius=2.0), []
    grid.update(0, lambda p: seen.append(p) or torch.zeros(len(p)), Stream(3, 0, "occupancy"))
    cells = ((seen[0] / 2 + 1) / 2 * 5).floor().long()
    assert torch.equal((cells[:, 0] * 5 + cells[:, 1]) * 5 + cells[:, 2], torch.arange(125))


def test_grid_is_a_function_of_its_stream_and_travels_in_a_checkpoint():
    grids = [OccupancyGrid(resolution=16) for _ in range(2)]
    for grid in grids:
        for step in (0, 256, 272):
            grid.update(step, ball, Stream(7, step, "occupancy"))
    assert torch.equal(grids[0].ema, grids[1].ema)
    other = OccupancyGrid(resolution=16)
    other.load_state_dict(grids[0].state_dict())
    assert torch.equal(other.bits, grids[0].bits)
    assert torch.equal(other.occupied, unpack_bits(grids[0].bits, 4096))
    assert other.mean == pytest.approx(float(grids[0].ema.double().mean()))


def test_cells_that_empty_are_forgotten():
    grid = OccupancyGrid(resolution=8, warmup_steps=10**6)
    grid.update(0, ball, Stream(0, 0, "occupancy"))
    was = int(grid.occupied.sum())
    for step in range(16, 16 * 200, 16):
        grid.update(step, lambda p: 0 * p[:, 0], Stream(0, step, "occupancy"))
    # The maximum decays by 0.95 an update: all cells fall together, and what is above the mean stays.
    assert int(grid.occupied.sum()) == was
    assert float(grid.ema.max()) < 1e-3
