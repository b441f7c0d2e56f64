"""The stand-in for CUDA graphs: what it refuses, and what it records."""

import pytest
import torch
from reference.graph_stand_in import GraphStandIn, Refused


def record(work) -> GraphStandIn:
    graph = GraphStandIn(torch.device("cpu"))
    graph.record(work)
    return graph


def test_the_stand_in_refuses_what_a_capture_refuses():
    x = torch.ones(3)
    for refused in (
        lambda: x.sum().item(),
        lambda: float(x[0]),
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: torch.equal(x, x + 1),
        lambda: torch.tensor([1.0]),
        lambda: torch.get_rng_state(),
        lambda: x.cpu(),
        lambda: x.repeat_interleave(torch.tensor([1, 2, 3])),
    ):
        with pytest.raises(Refused):
            record(refused)
    record(lambda: torch.full((3,), 2.0) + x[torch.arange(2)].repeat_interleave(2).sum())
    assert x.sum().item() == 3  # everything is as before


def test_the_stand_in_changes_nothing_before_a_replay_and_shows_what_is_baked_in():
    x, total, now = torch.ones(2), torch.zeros(2), [5.0]
    made = []

    def work():
        made.append(x * now[0])
        total.add_(made[-1])
        return made[-1]

    graph = record(work)
    assert made[0].isnan().all()
    assert total.tolist() == [0, 0]
    now[0] = 7.0  # a number of Python's: a graph does not see it
    x.fill_(2)
    for _ in range(2):
        graph.replay()
    assert total.tolist() == [20, 20]
    assert {x.data_ptr(), total.data_ptr()} == graph.outside.keys()
