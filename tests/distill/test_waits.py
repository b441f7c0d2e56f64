"""A step of a text-to-3D run on a GPU waits for it twice between two renders, counted without one."""

import pytest
import torch
from reference.studio import TINY, Painter, Studio, same
from reference.waits import Waits

from mvdream_fast.core import reads
from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.recipes import resolve_config
from mvdream_fast.distill.state import RunState
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.nerf.occupancy import draw_occupied

# Cameras and timesteps are drawn on the CPU, whatever the device, and the box of a march is six numbers of Python.
HOST = (
    "camera.py:_finite",
    "camera.py:<listcomp>",
    "state.py:_are_finite",
    "sds.py:timestep",
    "march_rays.py:check_march",
)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The package goes the ways that spare a GPU's waits, with tensors of the CPU."""
    monkeypatch.setattr(reads, "reads_wait", lambda device: True)


def test_the_counter_sees_every_way_a_number_reaches_python():
    x = torch.tensor([1.0, 0.0, 2.0])
    looks = {
        "item": lambda: x[0].item(),
        "int": lambda: int(x[0]),
        "bool": lambda: bool(x[0]),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "nonzero": lambda: x.nonzero(),
        "mask": lambda: x[x > 0],
        "masked_select": lambda: x.masked_select(x > 0),
        "write by mask": lambda: x.clone().__setitem__(x > 0, torch.zeros(2)),
        "equal": lambda: torch.equal(x, x + 1),
        "unique": lambda: x.unique(),
        "repeat_interleave": lambda: x.repeat_interleave(torch.tensor([1, 0, 2])),
    }
    for name, look in looks.items():
        with Waits() as waits:
            look()
        assert waits.total() >= 1, name
    with Waits() as waits:
        torch.where(x > 0, x, 0).sum() + x[1:] @ x[torch.tensor([0, 1])]
        x.repeat_interleave(2)
    assert waits.total() == 0


def test_a_step_reads_the_device_at_most_twice_between_two_renders(as_on_a_gpu):
    pipeline = MVDreamPipeline.from_pretrained("embedded")
    config = resolve_config("mini", steps=400, render_size=(48,))  # more rays than a CPU's block
    state = RunState(config, "a red chair", 0, new_guidance(pipeline, "a red chair", config, 0))
    between, within, plain = [], [], state.representation.render

    def render(*arguments):
        between.append(waits.take())
        rendered = plain(*arguments)
        within.append(waits.take())
        return rendered

    state.representation.render = render
    with Waits(HOST) as waits:
        for step in (0, 1, 2, 16, 17, 272, 273):  # every 16th updates the grid; from 256 on, cells drawn from it
            state.step(step)
    # The grid's statistics after an update; the numbers of the step before, if there was one.
    assert [places.total() for places in between[1:]] == [1, 1, 1, 2, 1, 2]
    assert {place for places in between for place in places} == {"reads.py:get"}
    sizes = {"march_rays.py:_empty_samples": 2}  # how many samples were marched, and how many are left
    assert all(places == sizes for places in within[1:])


def test_records_come_one_step_late_and_the_run_is_the_same(as_on_a_gpu, tmp_path, monkeypatch):
    late = []
    whole = Studio()("x", config=TINY, seed=3, callback=lambda progress: late.append(progress.record))
    monkeypatch.undo()
    at_once = []
    same_run = Studio()("x", config=TINY, seed=3, callback=lambda progress: at_once.append(progress.record))
    assert same(whole.state(), same_run.state())
    told = [(r.step, r.loss, r.t, r.opacity, r.statistics, r.skipped) for r in late]
    assert told == [(r.step, r.loss, r.t, r.opacity, r.statistics, r.skipped) for r in at_once]


def test_a_step_that_is_not_finite_is_told_late_and_changes_nothing(as_on_a_gpu):
    state = RunState(TINY, "x", 0, Painter(spoil=(1,)))
    assert state.step(0) is None
    before = {name: p.detach().clone() for name, p in state.representation.named_parameters()}
    assert not state.step(1).skipped
    assert same(before, {name: p.detach() for name, p in state.representation.named_parameters()})
    record = state.step(2)
    assert record.skipped
    assert record.step == 1
    assert state.skipped == 1
    assert not state.settle().skipped
    assert state.skipped == 0
    assert state.settle() is None


@pytest.mark.parametrize("checkpoint_every", [100, 4])
def test_a_run_on_a_gpu_is_resumed_to_the_byte(as_on_a_gpu, tmp_path, checkpoint_every):
    whole = Studio()("x", config=TINY, seed=3)
    steps = []
    with Interrupt() as interrupt:

        def callback(progress):
            steps.append(progress.record.step)
            if progress.record.step == 5:
                interrupt.requested = 15

        options = {"config": TINY, "seed": 3, "checkpoints": tmp_path, "checkpoint_every": checkpoint_every}
        Studio()("x", callback=callback, interrupt=interrupt, **options)
    n_done = len(steps)
    resumed = Studio()("x", callback=lambda progress: steps.append(progress.record.step), **options)
    assert n_done < TINY.steps
    assert steps == list(range(TINY.steps))
    assert same(whole.state(), resumed.state())


def test_cells_are_drawn_without_counting_them():
    occupied = torch.zeros(10, dtype=torch.bool)
    uniform = torch.tensor([0.0, 0.26, 0.5, 0.99])
    assert draw_occupied(occupied, uniform).shape == (4,)  # of none, any
    occupied[[2, 7]] = True
    assert draw_occupied(occupied, uniform).tolist() == [2, 7, 2, 7]  # of fewer than 4, each in turn
    occupied[[3, 4, 5, 9]] = True  # 2 3 4 5 7 9: of more than 4, the sixths that the numbers lie in
    assert draw_occupied(occupied, uniform).tolist() == [2, 3, 5, 9]
