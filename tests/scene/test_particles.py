"""Particles are optimised in turn, one a step; the first is the asset."""

import collections

import pytest
import torch

from mvdream_fast.camera import generate_rays, orbit_cameras
from mvdream_fast.core.errors import ArgumentError, ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.distill.config import replaced
from mvdream_fast.distill.state import RunState
from mvdream_fast.distill.systems import mini
from mvdream_fast.guidance.reconstruction import Reconstruction
from mvdream_fast.scene.kinds import new_representation
from mvdream_fast.scene.particles import Particles, seed_of

CONFIG = replaced(mini(), steps=40, render_size=(8,), samples_per_ray=16, kind="vsd", particles=3)


def state_of(config=CONFIG, seed: int = 0, representation=None) -> RunState:
    guidance = Reconstruction(torch.full((4, 3, 8, 8), 0.25), orbit_cameras(4))
    return RunState(config, "a red car", seed, guidance, representation=representation)


def copies(particles: Particles) -> list[dict]:
    return [{name: x.clone() for name, x in one.named_parameters()} for one in particles.particles]


def test_a_step_moves_one_of_them_and_each_has_its_turn():
    state, turns = state_of(), collections.Counter()
    for step in range(40):
        before = copies(state.representation)
        state.step(step)
        after = copies(state.representation)
        moved = [i for i in range(3) if any(not torch.equal(x, before[i][name]) for name, x in after[i].items())]
        assert len(moved) == 1
        turns[moved[0]] += 1
    assert min(turns[i] for i in range(3)) >= 6  # of 40 thirds, 2.4 standard deviations below 13.3


def test_they_begin_apart_and_the_first_as_a_run_of_one():
    state = state_of(seed=5)
    one, *others = state.representation.particles
    assert state.asset.representation is one
    assert torch.equal(one.volume.table, new_representation(CONFIG.representation, 5).volume.table)
    assert all(not torch.equal(one.volume.table, other.volume.table) for other in others)
    state.representation.restart(6)
    assert torch.equal(one.volume.table, new_representation(CONFIG.representation, 6).volume.table)
    assert torch.equal(others[0].volume.table, new_representation(CONFIG.representation, seed_of(6, 1)).volume.table)
    assert not hasattr(state_of(replaced(CONFIG, particles=1)).representation, "particles")


def test_all_are_looked_after_and_the_first_is_shown(monkeypatch):
    state = state_of()
    seen = []
    for i, particle in enumerate(state.representation.particles):
        monkeypatch.setattr(particle.occupancy, "update", lambda step, *_, i=i: seen.append((i, step)))
    state.step(0)
    assert seen == [(0, 0), (1, 0), (2, 0)]
    rays = generate_rays(orbit_cameras(1), 8, 8)
    with torch.no_grad():
        shown, first = (one.render(rays).rgb for one in (state.representation, state.representation.first))
    assert torch.equal(shown, first)
    state.representation.save_memory(64)
    assert {particle.max_samples for particle in state.representation.particles} == {64 * 16 // 2}


def test_a_state_goes_on_with_the_same_bytes_and_one_of_fewer_is_refused():
    one, other = state_of(), state_of()
    for step in range(3):
        one.step(step)
    other.restore({name: x.clone() for name, x in one.state().items()})
    for step in range(3, 8):
        one.step(step)
        other.step(step)
    ends = one.state(), other.state()
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())
    with pytest.raises(ModelError, match="the saved volume is of another configuration"):
        other.restore(state_of(replaced(CONFIG, particles=2)).state())


def test_representations_of_ones_own_come_as_many():
    one = new_representation(CONFIG.representation)
    with pytest.raises(
        ArgumentError, match="particles must be 1, the number in the representation that was given, got 3"
    ):
        state_of(representation=one)
    own = Particles([new_representation(CONFIG.representation, seed) for seed in range(3)])
    assert state_of(representation=own).asset.representation is own.first


def test_everything_is_drawn_from_the_render_s_stream():
    state = state_of()
    rays = generate_rays(orbit_cameras(1), 8, 8)
    drawn = []
    for step in (0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5):
        state.representation.render(rays, Stream(0, step, "render"), training=True)
        drawn.append(state.representation._drawn)
    assert drawn[:6] == drawn[6:]
    assert len({*map(id, drawn)}) > 1
