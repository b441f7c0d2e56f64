"""A step of a text-to-3D run waits for a GPU twice, counted without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference.cuda_host import built
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
    "_march_checks.py:check_march",
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
    """Of numbers that have been on their way since the step before; here, where nothing is ever late, all reads count:
    the GPU of `test_a_step_waits_for_a_gpu_twice` knows which of them wait."""
    between, within = waits_of("mini", {"render_size": (48,)}, (0, 1, 2, 16, 17, 272, 273))
    assert [places.total() for places in between[1:]] == [0, 1, 1, 1, 1, 1]
    assert {place for places in between for place in places} == {"reads.py:get"}
    assert all(places["reads.py:read"] == 2 for places in within)  # how many were marched, and how many are left


def test_all_rays_of_the_papers_second_stage_are_one_block(as_on_a_gpu, monkeypatch):
    """4 x 256 x 256 rays, as many as there; fewer samples on each, and a small volume, for time's sake."""
    _, within = waits_of("paper", {"volume": "mini", "samples_per_ray": 4}, (5000, 5001))
    assert all(places["reads.py:read"] == 2 for places in within)


def waits_of(preset, settings, steps):
    """What the steps read between their renders, from the end of one to the start of the next, and inside of each."""
    pipeline = MVDreamPipeline.from_pretrained("embedded")
    config = resolve_config(preset, **settings)
    state = RunState(config, "a red chair", 0, new_guidance(pipeline, "a red chair", config, 0))
    between, within, plain = [], [], state.representation.render

    def render(*arguments):
        between.append(waits.take())
        rendered = plain(*arguments)
        within.append(waits.take())
        return rendered

    state.representation.render = render
    with Waits(HOST) as waits:
        for step in steps:
            state.step(step)
    return between, within


LIT = {"shading": True, "shading_from": 1} | {
    f"lambda_{name}": [0, 1, 1, 1] for name in ("orient", "sparsity", "opaque", "z_variance")
}


def test_a_step_waits_for_a_gpu_twice():
    """Render, guidance, optimiser, grid and log together, copies to the GPU and waits inside the extension counted.

    Fewer rays than the presets have: the number of waits knows the number of blocks alone, which is one for these as
    for those (above, and tests/scene/nerf/test_renderer.py for the cards that there are).
    """
    runs = [("mini", {}, (0, 16, 17)), ("paper", {}, (5000, 5008)), ("paper", LIT, (5001,))]  # 16, 5008: the grid, too
    waits = on_gpu("steps_on_gpu.py", json.dumps(runs))
    assert [len(steps) for steps in waits] == [len(steps) for *_, steps in runs]
    for (preset, *_), steps in zip(runs, waits, strict=True):
        assert all(sum(places.values()) <= 2 for places in steps), (preset, steps)
        assert all(places == {"read at reads.py:read": 2} for places in steps), (preset, steps)


def on_gpu(script, *arguments):
    """What a script of this folder prints, with the host build of the CUDA kernels as its first argument."""
    line = [sys.executable, Path(__file__).with_name(script), built(), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # pytest's, with the folders of the tests
    run = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def test_what_that_gpu_counts():
    waits_for = {
        "x.tolist()": {"read": 1},
        "x[0].item()": {"read": 1},
        "bool(x.sum() > 0)": {"read": 1},
        "x[x > 0]": {"read": 1},
        "x.nonzero()": {"read": 1},
        "x.cpu()": {"copy": 1},
        "host.to(DEVICE)": {"copy": 1},
        "host.to(DEVICE, non_blocking=True)": {"copy": 1},  # torch waits all the same
        "host.pin_memory().to(DEVICE, non_blocking=True)": {},
        "torch.tensor([1.0], device=DEVICE)": {"copy": 1},
        "Later(x).get()": {"event": 1},
        "(Later(x), x.tolist())[0].get()": {"read": 1},  # arrived with what was waited for
        "torch.where(x > 0, x, 0).sum() + x[1:] @ x[torch.zeros(2, device=DEVICE).long()]": {},
        "rays(1)": {"read": 1},
        "rays(1).positions(x[None], x[None])": {"read": 1},
        "rays(float('nan'))": "march_rays: rays_o, rays_d and near must be finite, got a NaN or infinite number",
        "x + host": "aten.add.Tensor: tensors of two devices, [[3]] on the CPU",
    }
    found = on_gpu("looks_on_gpu.py", *waits_for)
    for (look, wanted), seen in zip(waits_for.items(), found, strict=True):
        assert seen.startswith(wanted) if isinstance(wanted, str) else seen == wanted, (look, seen)


def test_the_counter_sees_waits_inside_the_extension():
    """The whole extension has two: the number of samples that `render` took, and the status of its rays."""
    found = on_gpu("looks_on_gpu.py", "evaluate(x)")
    assert found == [{"inside the extension": 2}]


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
