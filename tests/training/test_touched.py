"""What the trainers of both networks beside the decoder share: a pool of scenes, and runs that go on to the byte."""

import pytest
from test_cleaner import cleaner_trainer
from test_matting import data, matting_trainer, tiny
from test_train import assert_same, weights

from mvdream_fast.training.loop import Loop, LoopOptions
from mvdream_fast.training.touched import TouchedTrainer

__all__ = ["data", "tiny"]  # fixtures
BOTH = pytest.mark.parametrize("make", [cleaner_trainer, matting_trainer])


@BOTH
def test_pairs_are_made_once_and_come_again(make, data, monkeypatch):
    trainer, asked = make(data), []
    monkeypatch.setattr(type(trainer), "pool_size", 2)
    draw = trainer.draw
    trainer.ahead.draw = lambda place: asked.append(place) or draw(place)
    for _ in range(5):
        trainer.train_step()
    assert asked == [0, 1]


@BOTH
def test_a_resumed_run_has_the_same_bytes(make, data, tmp_path, monkeypatch):
    straight, first, second = (make(data) for _ in range(3))
    monkeypatch.setattr(type(straight), "pool_size", 3)
    losses = [straight.train_step()["loss"] for _ in range(8)]
    Loop(first, tmp_path, LoopOptions(steps=4)).run()
    Loop(second, tmp_path, LoopOptions(steps=8)).resume()
    assert [second.train_step()["loss"] for _ in range(4)] == losses[4:]
    assert_same(weights(straight), weights(second))


def test_what_is_kept_of_scenes_is_each_network_s_own():
    with pytest.raises(TypeError, match="abstract"):
        TouchedTrainer(None, None, None, None, "cleaner")
