"""What a run keeps so that it goes on with the same bytes, and what it goes back to after bad numbers."""

import pytest
import torch
from reference.studio import TINY, Painter, Studio, fresh_asset, same

from mvdream_fast.core import run_folder
from mvdream_fast.distill.config import replaced
from mvdream_fast.distill.state import MAX_SKIPPED
from mvdream_fast.guidance.base import no_timing


class Stop:
    """An interrupt that is asked for after so many steps."""

    def __init__(self, after: int):
        self.after, self.requested, self.exit_code = after, None, 130

    def __call__(self, progress):
        if progress.record.step + 1 == self.after:
            self.requested = 2


def stopped_and_resumed(folder, new_guidance, after, config):
    """The asset of a run that was stopped after so many steps and went on."""
    stop = Stop(after)
    Studio(new_guidance())("x", config=config, callback=stop, checkpoints=folder, interrupt=stop)
    return Studio(new_guidance())("x", config=config, checkpoints=folder)


class Remembering(Painter):
    """Asks at every third step, and goes on from that answer at the two between."""

    answer = None

    def score(self, rgb, views, step, stream, timing=no_timing):
        if step % 3 == 0:
            self.answer = rgb.detach() * 0.5 + 0.1 * stream.normal(*rgb.shape)
        return (rgb - self.answer).square().sum(), 7

    def state(self):
        return {"answer": self.answer}

    def restore(self, tensors):
        self.answer = tensors.get("answer")


@pytest.mark.parametrize("after", [3, 4, 5])
def test_a_run_that_will_grow_goes_on_from_the_answer_in_use(tmp_path, after):
    config = replaced(TINY, steps=9, render_size=(8, 16), n_groups=(1, 1), milestones=(6,), updates_per_guidance=3)
    whole = Studio(Remembering())("x", config=config)
    assert same(whole.state(), stopped_and_resumed(tmp_path, Remembering, after, config).state())


class Hungry(Painter):
    """Runs out of memory once, at one of these steps."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def score(self, rgb, views, step, stream, timing=no_timing):
        if step in self.steps:
            self.steps = set()
            raise MemoryError("too little")
        return super().score(rgb, views, step, stream)


def test_a_run_with_half_of_its_samples_goes_on_with_as_many(tmp_path):
    config = replaced(TINY, samples_per_ray=64)
    whole = Studio(Hungry({2}))("x", config=config)
    resumed = stopped_and_resumed(tmp_path, lambda: Hungry({2}), 6, config)
    assert resumed.representation.max_samples == whole.representation.max_samples is not None
    assert same(whole.state(), resumed.state())
    more = fresh_asset(config).representation.max_samples
    assert more is None or more > resumed.representation.max_samples


def test_checkpoints_that_do_not_say_so_have_all_samples(tmp_path):
    stop = Stop(3)
    Studio()("x", config=TINY, callback=stop, checkpoints=tmp_path, interrupt=stop)
    step, tensors, meta = run_folder.load_latest(tmp_path)
    tensors["counters"] = tensors["counters"][:3].clone()  # as versions before wrote them
    run_folder.save_checkpoint(tmp_path, step, tensors, meta)
    resumed = Studio()("x", config=TINY, checkpoints=tmp_path)
    assert same(Studio()("x", config=TINY).state(), resumed.state())


class Poisoned(Painter):
    """Spoils a value of the asset in the update of a step; from then on no loss is finite until it is gone."""

    def __init__(self, at):
        super().__init__()
        self.at, self.values, self.is_done = at, None, False

    def score(self, rgb, views, step, stream, timing=no_timing):
        loss, t = super().score(rgb, views, step, stream)
        return loss * (float("nan") if self.values is not None and self.values[0, 0] > 50 else 1.0), t

    def after_step(self, step, stream):
        if step == self.at and not self.is_done:
            self.is_done = True
            with torch.no_grad():
                self.values[0, 0] = 100.0


@pytest.mark.parametrize(("every", "back_to"), [(100, None), (10, 10), (14, None), (5, 10)])
def test_a_recovery_goes_back_to_before_the_trouble(tmp_path, every, back_to):
    """However often the run saves: what is saved in the middle of the trouble would bring it back."""
    guidance = Poisoned(at=12)
    config = replaced(TINY, steps=30)
    representation = fresh_asset(config).representation
    guidance.values, events = representation.volume.table, []

    def note(progress):
        if progress.record.event:
            events.append((progress.record.step, progress.record.event))

    settings = {"checkpoints": tmp_path, "checkpoint_every": every, "representation": representation}
    asset = Studio(guidance)("x", config=config, callback=note, **settings)
    assert len(asset.records) == 30
    assert sum(record["skipped"] for record in asset.records) == MAX_SKIPPED
    (event,) = (text for _, text in events)
    assert (f"back to the values of step {back_to}" in event) == (back_to is not None)
