"""What a process of a sharded training is estimated to hold and to send, against FSDP2 itself.

torch's "fake" backend makes one process the first of many that aren't there: modules are sharded as they would be, and
every collective is called, with nothing in it.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from rank_of_a_run import SMALL
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from mvdream_fast.checkpoints.manifest import build
from mvdream_fast.core import cli
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.processes import Ranks
from mvdream_fast.models.config import SD21
from mvdream_fast.training import sharded_estimate
from mvdream_fast.training.sharded_estimate import estimate_sharded
from mvdream_fast.training.unet import TextAndUNet, shard_model

SCENES, VIEWS = 2, 2


class Volume(TorchDispatchMode):
    """Bytes by kind of collective: what comes out of an all-gather, what goes into the others; and the calls."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("c10d::").strip("_")
        if func.namespace == "c10d":
            tensor = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            whole = args[1] if name == "reduce_scatter_base" else tensor
            self.bytes[name] += whole.nbytes
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake_ranks(request):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield Ranks(0, request.param)
    dist.destroy_process_group()


def sharded(ranks, group, half=False, checkpointing=False):
    module = TextAndUNet(build("unet", SMALL), build("text", SMALL))
    module.unet.gradient_checkpointing = checkpointing
    return shard_model(module, ranks, group, half)


@pytest.mark.parametrize(("fake_ranks", "group"), [(1, 1), (3, 3), (6, 2)], indirect=["fake_ranks"])
def test_weights_are_those_of_the_sharded_module(fake_ranks, group):
    model = sharded(fake_ranks, group)
    padded = sum(p._local_tensor.untyped_storage().nbytes() // 4 for p in model.parameters())
    guess = estimate_sharded(SMALL, SCENES, fake_ranks.world, group=group, n_views=VIEWS)
    assert guess.weights == guess.trained == padded
    assert guess.memory["weights"] == 4 * padded
    assert guess.memory["Adam's moments"] == 8 * padded


@pytest.mark.parametrize("fake_ranks", [3, 6], indirect=True)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_volume_is_what_a_step_sends(fake_ranks, half, checkpointing):
    world, n = fake_ranks.world, SCENES * VIEWS
    model = sharded(fake_ranks, 3, half, checkpointing)
    latents, cameras = torch.zeros(n, 4, 4, 4), torch.zeros(n, 16)
    t, ids = torch.zeros(n, dtype=torch.int64), torch.zeros(SCENES, SMALL.text.context_length, dtype=torch.int64)
    with Volume() as seen, torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(latents, t, ids, cameras, VIEWS).sum().backward()
    guess = estimate_sharded(SMALL, SCENES, world, group=3, n_views=VIEWS, half=half, checkpointing=checkpointing)
    assert guess.all_gather == pytest.approx(seen.bytes["allgather_base"] * 2 / 3)
    assert guess.reduce_scatter == pytest.approx(seen.bytes["reduce_scatter_base"] * 2 / 3)
    copies = world // 3
    assert guess.all_reduce == pytest.approx(seen.bytes["allreduce"] * 2 * (copies - 1) / copies)
    assert guess.n_collectives == sum(seen.calls.values())


def test_the_plan_at_full_width():
    """867,572,164 weights of the UNet and 340,387,840 of the text tower, of which eight processes keep an eighth."""
    n = 867_572_164 + 340_387_840
    plans = {world: estimate_sharded(SD21, 1, world, resolution=64) for world in (1, 8, 64)}
    for world, plan in plans.items():
        assert n / world <= plan.weights < 1.001 * n / world + 50_000
        assert plan.memory["moving average"] == plan.memory["weights"] == plan.memory["gradients"]
    assert plans[1].all_gather == plans[1].reduce_scatter == 0
    assert plans[8].reduce_scatter == pytest.approx(4 * n * 7 / 8, rel=1e-4)
    assert 4 * n * 7 / 8 < plans[8].all_gather < 2 * 4 * n * 7 / 8
    hybrid = estimate_sharded(SD21, 1, 64, group=8, resolution=64)
    assert hybrid.all_gather == plans[8].all_gather
    assert hybrid.all_reduce == pytest.approx(2 * 4 * n / 8 * 7 / 8, rel=1e-4)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ArgumentError, match="group must be a divisor of the 8 processes, got 3"):
        estimate_sharded(SMALL, 1, 8, group=3)


def command(*words: str) -> None:
    cli.run(sharded_estimate.main, sharded_estimate.Flags, prog="training.sharded_estimate", argv=list(words))


@pytest.mark.parametrize(("words", "heads"), [((), "1 | 8 | 64"), (("2", "3"), "2 | 3")])
def test_the_table_has_a_column_for_each_number(words, heads, monkeypatch, capsys):
    small = lambda _config, _scenes, world, **more: estimate_sharded(SMALL, SCENES, world, n_views=VIEWS, **more)  # noqa: E731
    monkeypatch.setattr(sharded_estimate, "estimate_sharded", small)
    command(*words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"| processes | {heads} |"
    assert {line.count("|") for line in lines} == {heads.count("|") + 3}


@pytest.mark.parametrize(("word", "told"), [("0", "PROCESSES must be at least 1, got 0"), ("abc", "abc")])
def test_what_is_no_number_of_processes_is_refused(word, told, capsys):
    with pytest.raises(SystemExit) as stop:
        command("8", word)
    assert stop.value.code == ArgumentError.exit_code
    assert told in capsys.readouterr().err
