"""The contests of benchmarks/: a peer that answers something else fails, turns alternate, figures are what they say.

The contestants are fakes whose calls move a clock by what they are said to take.
"""

from functools import partial
from types import SimpleNamespace

import contest
import contestants
import pytest
import torch
from contest import Contest, Disagreement, agree, even, faster, memory_a, near_limit, slower, within
from contestants import Apart, Contestant, Here, Unavailable
from limit import least_seconds

LIMIT = {"multiply_add_gflop_s": 100.0, "copy_gb_s": 10.0, "gather_gb_s": 2.0}


class Benchmark:
    """As much of pytest-benchmark's fixture as a contest asks for."""

    def __init__(self):
        self.extra_info, self.group = {}, None
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, function, args=(), rounds=1):
        for _ in range(rounds):
            self.stats.stats.data.append(0.0)
            function(*args)


@pytest.fixture
def stage(monkeypatch):
    """A contest with a clock that only contestants move, on a machine whose limit is known; `log` is who was called."""
    clock, log = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(contest, "smoke", False)
    monkeypatch.setattr(contest, "machine_limit", lambda threads, work: LIMIT)
    monkeypatch.setattr(contestants.time, "perf_counter", lambda: clock.now)

    def actor(name, seconds=1.0, value=1.0):
        def call():
            clock.now += seconds
            log.append(name)
            return torch.full((3,), value)

        return lambda: call

    return SimpleNamespace(contest=Contest(Benchmark(), 1, lambda line: None), actor=actor, log=log)


def cast(stage, **seconds):
    return {name: stage.actor(name, s) for name, s in seconds.items()}


def unavailable():
    raise Unavailable("there is no GPU")


def test_a_peer_that_disagrees_fails_before_anybody_is_timed(stage):
    makes = cast(stage, reference=1.0, ours=1.0) | {"wrong": stage.actor("wrong", value=1.001)}
    with pytest.raises(Disagreement, match=r"value 0 of wrong is 0\.001 off, 0\.0001 is allowed"):
        stage.contest.run("work", "forward", makes, {})
    assert stage.log == ["reference", "ours", "wrong"]
    assert "contest" not in stage.contest.benchmark.extra_info


def test_a_tolerance_is_relative_to_the_largest_value(stage):
    makes = cast(stage, reference=1.0) | {"ours": stage.actor("ours", value=1.001)}
    assert stage.contest.run("work", "forward", makes, {}, tolerance=2e-3)["rows"][1]["name"] == "ours"


@pytest.mark.parametrize(
    ("got", "said"),
    [
        ([torch.ones(2)], "1 values, the others 2"),
        ([torch.ones(3), torch.tensor([1, 2])], r"value 0 of x is \(3,\), the others' \(2,\)"),
        ([torch.ones(2), torch.tensor([1, 3])], "value 1 of x differs in 1 of 2 places"),
        ([torch.tensor([1.0, torch.nan]), torch.tensor([1, 2])], "value 0 of x is nan off"),
    ],
)
def test_what_agreement_means(got, said):
    wanted = [torch.ones(2), torch.tensor([1, 2])]
    agree("x", wanted, [torch.ones(2) + 1e-5, torch.tensor([1, 2])])
    with pytest.raises(Disagreement, match=said):
        agree("x", wanted, got)


def test_turns_alternate_and_nobody_always_follows_the_same(stage):
    rows = stage.contest.run("work", "forward", cast(stage, reference=1.0, peer=1.0, ours=1.0), {}, budget_s=9)["rows"]
    assert [row["n"] for row in rows] == [3, 3, 3]
    turns = stage.log[-9:]
    assert all(set(turns[i : i + 3]) == {"reference", "peer", "ours"} for i in (0, 3, 6))
    assert {turns[0], turns[3], turns[6]} == {"reference", "peer", "ours"}


def test_who_is_slow_has_fewer_turns_spread_over_the_contest(stage):
    record = stage.contest.run("work", "forward", cast(stage, reference=2.0, ours=0.2), {}, budget_s=8)
    assert {row["name"]: row["n"] for row in record["rows"]} == {"reference": 3, "ours": 20}
    slow = [i for i, name in enumerate(stage.log[-23:]) if name == "reference"]
    assert slow[0] < 9
    assert slow[-1] >= 21  # not all at the beginning


def test_short_calls_are_timed_in_a_row(stage):
    (row,) = stage.contest.run("work", "forward", cast(stage, ours=1e-4), {}, budget_s=1)["rows"]
    assert row["median_s"] == pytest.approx(1e-4)
    assert row["n"] == contest.MOST_TURNS
    assert len(stage.log) == 1 + 1 + contest.WARM_UP + contest.MOST_TURNS * 50  # output, memory, warm-up, 5 ms a turn


def test_long_runs_are_timed_once(stage):
    (row,) = stage.contest.run("work", "run", cast(stage, ours=60.0), {}, once=True)["rows"]
    assert (row["n"], row["median_s"], row["spread_s"]) == (1, 60.0, 0.0)
    assert stage.log == ["ours", "ours"]  # the proof, and the one that counts


def test_a_row_says_how_far_the_limit_is(stage):
    work = {"flop": 200e9, "bytes": 10e9, "gathered_bytes": 2e9}
    assert least_seconds(work, LIMIT) == pytest.approx(3)  # 2 s of arithmetic cover 1 s of copying; 1 s of gathering
    (row,) = stage.contest.run("work", "forward", cast(stage, ours=4.0), work)["rows"]
    assert (row["gflop_s"], row["gb_s"], row["of_limit"]) == (50.0, 3.0, 0.75)
    assert (row["role"], row["spread_s"]) == ("ours", 0.0)
    (row,) = stage.contest.run("work", "forward", cast(stage, ours=4.0), {"samples": 3})["rows"]
    assert (row["gflop_s"], row["gb_s"], row["of_limit"]) == (None, None, None)


def test_who_cannot_run_is_noted_with_the_reason(stage):
    def not_installed():
        import surely_no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]  # that is the point

    makes = cast(stage, reference=1.0, ours=1.0) | {"gpu peer": unavailable, "absent": not_installed}
    record = stage.contest.run("work", "forward", makes, {}, goals=[faster(2, "gpu peer")])
    assert record["skipped"] == [
        {"name": "gpu peer", "reason": "there is no GPU"},
        {"name": "absent", "reason": "surely_no_such_package is not installed"},
    ]
    assert record["goals"] == []
    assert [row["name"] for row in record["rows"]] == ["reference", "ours"]
    for makes in ({"ours": unavailable}, {"reference": unavailable, "ours": stage.actor("ours")}):
        with pytest.raises(Unavailable, match="no GPU"):
            stage.contest.run("work", "forward", makes, {})


def test_a_peer_that_breaks_is_no_peer_that_cannot_run(stage):
    def broken():
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        stage.contest.run("work", "forward", cast(stage, ours=1.0) | {"peer": broken}, {})


def test_goals(stage):
    goals = [faster(2, "reference"), faster(5, "reference"), slower(0.25, "reference"), slower(0.2, "reference")]
    goals += [within(1.0), within(0.5), near_limit(0.5), near_limit(0.51)]
    record = stage.contest.run("work", "step", cast(stage, reference=4.0, ours=1.0), {"flop": 50e9}, goals=goals)
    got = [(goal["goal"], goal["got"], goal["unit"], goal["met"]) for goal in record["goals"]]
    assert got == [
        *((2, 4.0, "x", True), (5, 4.0, "x", False), (0.25, 0.25, "x", True), (0.2, 0.25, "x", False)),
        *((1.0, 1.0, "s", True), (0.5, 1.0, "s", False), (0.5, 0.5, "x", True), (0.51, 0.5, "x", False)),
    ]
    assert record["goals"][0]["what"] == "speed of ours against reference: at least 2x"
    assert record["goals"][5]["what"] == "time of ours: at most 0.5 s"
    lines = contest.told(record)
    assert lines[0] == "work step"
    assert "  goal, speed of ours against reference: at least 5x: 4, MISSED" in lines


def test_a_goal_about_nobody_is_an_error(stage):
    with pytest.raises(ValueError, match="work: a goal is about eager, which is no contestant"):
        stage.contest.run("work", "forward", cast(stage, ours=1.0), {}, goals=[faster(2, "eager")])


def test_memory_goal_leaves_out_what_has_to_be_held():
    rows = {"ours": {"peak_mb": 3.0}}
    record = memory_a("samples", 64).record(rows, {"samples": 2**15, "held_bytes": 2**20})
    assert record == {
        "what": "memory of ours by samples: at most 64 B", "goal": 64, "got": 64.0, "unit": "B", "met": True
    }  # fmt: skip


def test_scaling(stage):
    makes = {n: {"ours": stage.actor("ours", seconds)} for n, seconds in ((10, 1.0), (1000, 20.0))}
    goals = [even("samples", 10, 1000, 1.5), even("samples", 1000, 10, 1.5)]
    record = stage.contest.scale("by samples", "forward", "samples", makes, lambda n: {"flop": n * 1e9}, goals=goals)
    assert record["scaling"] == {"x": "samples", "points": {"ours": [[10.0, 1.0], [1000.0, 20.0]]}}
    assert [row["gflop_s"] for row in record["rows"]] == [10.0, 50.0]
    assert record["work"] == {"flop": 1e12}
    assert [(goal["got"], goal["met"]) for goal in record["goals"]] == [
        (pytest.approx(5), False),
        (pytest.approx(0.2), True),
    ]


def test_threads_are_those_of_the_contestant(stage):
    def threads():
        seen.append(torch.get_num_threads())
        return torch.ones(1)

    seen, before = [], torch.get_num_threads()
    stage.contest.scale("by threads", "forward", "threads", {n: {"ours": lambda: threads} for n in (1, 2)})
    assert set(seen) == {1, 2}
    assert torch.get_num_threads() == before


def test_an_op_is_compared_in_its_gradients_too(stage):
    def square(x, y):
        return x * x + y

    def square_with_a_wrong_gradient(x, y):
        return x.detach() * x + y

    leaves = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    contest_ = stage.contest
    contest_.op("square", {"reference": square, "ours": square_with_a_wrong_gradient}, leaves, backward=False, work={})
    with pytest.raises(Disagreement, match="value 1 of ours"):
        contest_.op(
            "square", {"reference": square, "ours": square_with_a_wrong_gradient}, leaves, backward=True, work={}
        )
    contest_.op(
        "square",
        {"reference": square, "ours": square_with_a_wrong_gradient},
        leaves,
        backward=True,
        work={},
        differentiable=[1],
    )


def test_cotangents_have_the_layout_of_the_output():
    x = torch.randn(2, 3, 4, 5)
    call = {
        name: contest.differentiated(f, [x], True, [0])
        for name, f in (("plain", torch.sin), ("last", lambda t: t.sin().contiguous(memory_format=torch.channels_last)))
    }
    assert torch.equal(call["plain"]()[1][0], call["last"]()[1][0])


def test_the_smoke_run_proves_and_times_nothing(stage, monkeypatch):
    monkeypatch.setattr(contest, "smoke", True)
    assert contest.sizes([1, 2], [3]) == [3]
    assert contest.size(4, 5) == 5
    assert stage.contest.run("work", "forward", cast(stage, reference=1.0, ours=1.0), {}) is None
    assert stage.log == ["reference", "ours"]
    with pytest.raises(Disagreement):
        stage.contest.run("work", "forward", cast(stage, reference=1.0) | {"ours": stage.actor("ours", value=2.0)}, {})


def twice(size: int):
    """Made in another process."""
    held = torch.ones(size)
    return lambda: 2 * held[:3]


def test_here_says_what_a_call_takes():
    def make():
        return lambda: torch.ones(8 << 20)

    assert 30 < Here(Contestant("ours", make), 1).one_call()[0] < 40  # 32 MB


def test_a_process_of_its_own():
    place = Apart(Contestant("ours", partial(twice, 64 << 18)), 1)
    try:
        assert torch.equal(place.output(), torch.full((3,), 2.0))
        assert place.seconds(10) > 0
        assert place.one_call()[0] > 64  # all that the process holds: torch, and 64 MB
    finally:
        place.close()
    assert not place.process.is_alive()


def test_a_process_of_its_own_that_cannot_run():
    place = Apart(Contestant("peer", unavailable), 1)
    with pytest.raises(Unavailable, match="there is no GPU"):
        place.output()
    place.close()
