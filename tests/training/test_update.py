"""The update that all trainers share, on one weight with numbers worked by hand; and what a checkpoint must agree with.

Resumed runs of each trainer: test_train.py, test_dreambooth.py, test_evaluator.py.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import DivergedError, ModelError
from mvdream_fast.data.ahead import Ahead
from mvdream_fast.training.loop import Loop, LoopOptions
from mvdream_fast.training.update import BaseTrainer


@dataclass(frozen=True)
class Options:
    steps: int = 4
    lr: float = 1.0
    warmup: int = 0
    ema: float = 0.5
    clip: float = 2.0


def trainer(half: bool = False, **options) -> BaseTrainer:
    """Of one weight that is 1, under plain gradient descent."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    about = {"kind": "one weight", "config": {"size": {"n": 1}}}
    return BaseTrainer(module, torch.optim.SGD(module.parameters(), lr=0.0), Options(**options), about, half)


def down(one: BaseTrainer, slope: float) -> float:
    return one.descend(slope * one.parameters[0].sum())


def test_an_update_is_clipped_and_falls_with_the_cosine():
    one = trainer()
    assert down(one, 0.5) == 0.5
    assert one.parameters[0].item() == 0.5  # the first of four updates at the whole rate
    assert down(one, 8.0) == 8.0  # the norm before clipping to 2
    rate = 0.5 * (1 + 2**-0.5)  # (1 + cos(pi / 4)) / 2
    assert one.parameters[0].item() == pytest.approx(0.5 - 2 * rate, abs=1e-6)
    assert one.step == 2


def test_the_average_warms_up():
    """The first update is taken over by 1 - 1/11, the second by 1 - 2/12; with ema 0.05 both by 0.95."""
    for ema, kept in ((0.5, (1 / 11, 2 / 12)), (0.05, (0.05, 0.05))):
        one, average = trainer(ema=ema, steps=0), 1.0
        for share in kept:
            down(one, 0.5)
            average = share * average + (1 - share) * one.parameters[0].item()
            assert one.ema[0].item() == pytest.approx(average, abs=1e-6)


def test_inside_averaged_the_average_shows_and_after_it_the_weights():
    one = trainer()
    down(one, 0.5)
    with pytest.raises(KeyError), one.averaged():  # noqa: PT012 (what is raised is the point)
        assert one.parameters[0].item() == pytest.approx(0.5 + 0.5 / 11)
        with one.averaged():
            assert one.parameters[0].item() == pytest.approx(0.5 + 0.5 / 11)
        assert one.parameters[0].item() == pytest.approx(0.5 + 0.5 / 11)
        raise KeyError
    assert one.parameters[0].item() == 0.5


def test_without_an_average_the_weights_show():
    one = trainer(ema=0.0)
    down(one, 0.5)
    with one.averaged():
        assert one.parameters[0].item() == 0.5
    assert list(one.state()) == ["model.weight"]


@pytest.mark.parametrize("slope", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_touches_no_weight(slope):
    one = trainer()
    with pytest.raises(DivergedError, match=r"the loss is \w+ at step 0$"):
        down(one, slope)
    assert one.parameters[0].item() == 1
    assert one.parameters[0].grad is None


def test_gradients_that_are_not_finite_touch_no_weight():
    one = trainer()
    one.parameters[0].register_hook(lambda _: torch.tensor([[float("nan")]]))
    with pytest.raises(DivergedError, match="the norm of the gradients is nan at step 0"):
        down(one, 0.5)
    assert (one.parameters[0].item(), one.ema[0].item(), one.step) == (1, 1, 0)


@pytest.mark.parametrize("name", ["parameters", "ema"])
def test_weights_and_averages_are_looked_at(name):
    one = trainer()
    one.check_weights()
    getattr(one, name)[0].detach().fill_(float("inf"))
    with pytest.raises(DivergedError, match="a weight is no longer finite at step 0"):
        one.check_weights()


class Falling:
    """A trainer of one weight whose loss is a number for so many steps, and whose weight for so many."""

    def __init__(self, folder, steps, good=99, whole=99, flag="--lr"):
        self.one, self.good, self.whole = trainer(), good, whole
        self.loop = Loop(self, folder, LoopOptions(steps, checkpoint_steps=1, rate_flag=flag))

    def __getattr__(self, name):
        return getattr(self.one, name)

    def train_step(self):
        self.check_finite(1.0 if self.step < self.good else float("nan"))
        norm = down(self.one, 0.5)
        if self.step >= self.whole:
            self.parameters[0].detach().fill_(float("nan"))
        return {"loss": 1.0, "grad_norm": norm}

    ahead = Ahead(lambda step: step)


@pytest.mark.parametrize(
    ("steps", "values", "advice"),
    [
        (4, {"good": 0}, "the loss is nan at step 0; begin again with a smaller --lr"),
        (4, {"good": 1}, "the loss is nan at step 1; begin again in another folder with a smaller --lr"),
        (4, {"good": 3}, "at step 3; write '000002.safetensors' into .*LATEST and go on by --resume with a smaller"),
        (4, {"whole": 2}, "a weight is no longer finite at step 2; go on from step 1 by --resume with a smaller --lr"),
        (1, {"whole": 1}, "a weight is no longer finite at step 1; begin again with a smaller --lr"),
        (4, {"good": 2, "flag": ""}, "the loss is nan at step 2; begin again with a smaller learning rate"),
    ],
)
def test_a_run_that_diverged_says_what_works(steps, values, advice, tmp_path):
    """Checkpoints are of finite weights; one whose own step fails is not gone on from."""
    with pytest.raises(DivergedError, match=advice):
        Falling(tmp_path, steps, **values).loop.run()
    for path in tmp_path.glob("checkpoints/*.safetensors"):
        assert all(x.isfinite().all() for x in run_folder.load_checkpoint(path)[1].values())


def test_figures_that_are_not_finite_are_named(tmp_path):
    falling = Falling(tmp_path, 2)
    falling.loop.report = lambda: {"val": 1.0, "val_2d": float("inf")}
    with pytest.raises(DivergedError, match="val_2d is inf at step 2; write '000001.safetensors' into"):
        falling.loop.run()
    assert not (tmp_path / "log.jsonl").exists()


def test_a_step_that_the_scaler_leaves_out_has_no_norm():
    """A scaled gradient beyond float32, as float16's would be: the weight stays, and so does the log's JSON."""
    one = trainer(half=True)
    assert down(one, 2.0**120) == 0
    assert one.parameters[0].item() == 1
    assert one.scaler.get_scale() == 2.0**15
    assert down(trainer(half=True), 0.5) == 0.5


def test_a_checkpoint_brings_back_weights_average_and_scale():
    one, two = trainer(half=True), trainer(half=True)
    down(one, 2.0**120)
    down(one, 0.5)
    two.restore(one.step, {name: t.clone() for name, t in one.state().items()}, one.meta())
    assert (two.step, two.parameters[0].item(), two.ema) == (2, one.parameters[0].item(), one.ema)
    assert two.scaler.get_scale() == 2.0**15
    tensors = one.state()
    del tensors["ema.weight"]
    with pytest.raises(ModelError, match=r"has no ema\.weight; it was trained with other options"):
        two.restore(2, tensors, one.meta())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "two"}, "is of two, not of one weight"),
        ({"config": {"size": {"n": 2}}}, "another configuration: size.n differs"),
        ({"config": {}}, "another configuration: size.size differs"),
        ({"vocabulary": ["a"]}, "another vocabulary"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change, words):
    one = trainer()
    with pytest.raises(ModelError, match=words):
        one.restore(0, one.state(), one.meta() | change)
