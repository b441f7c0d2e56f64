"""The simulation behind docs/scale.md: its laws on cases worked by hand, and the tables of the page."""

import re
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import pytest
from scale import fleet, training, workloads
from scale.__main__ import placed
from scale.events import Clock, Link, Process, Server, both
from scale.fleet import Jobs, Machines, simulate
from scale.inputs import KINDS, Inputs, rows
from scale.report import Report

DOCS = Path(__file__).parents[1] / "docs"


def times(clock, *waits):
    """When each wait ends that begins at its time: pairs of a time and a wait."""
    ends = {}

    def steps(number, start, wait):
        yield clock.sleep(start)
        yield wait
        ends[number] = clock.now

    processes = [Process(steps(i, *pair)) for i, pair in enumerate(waits)]
    return ends, processes


def test_a_link_is_shared_evenly():
    clock = Clock()
    link = Link(clock, total=10.0)
    # The first has moved 10 bytes when the second comes; then each has 5 a second, until the second has its 5.
    ends, _ = times(clock, (0.0, link.move(20.0)), (1.0, link.move(5.0)))
    clock.run()
    assert ends == {1: 2.0, 0: 2.5}


def test_a_transfer_is_no_faster_than_its_own_end_of_the_link():
    clock = Clock()
    link = Link(clock, total=10.0, each=4.0)
    ends, _ = times(clock, (0.0, link.move(8.0)), (0.0, link.move(8.0)), (10.0, link.move(8.0)))
    clock.run()
    assert ends == {0: 2.0, 1: 2.0, 2: 12.0}


def test_a_transfer_that_is_given_up_leaves_its_share():
    clock = Clock()
    link = Link(clock, total=10.0)
    ends, processes = times(clock, (0.0, link.move(10.0)), (0.0, link.move(100.0)))
    clock.at(1.0, processes[1].stop)  # by then the first has 5 bytes
    clock.run()
    assert ends == {0: 1.5}


def test_a_server_answers_one_after_the_other():
    clock = Clock()
    server = Server(clock, rate=10.0, latency=0.5)
    # Ten operations take a second of the server and five of who asks; one behind them waits for the server only.
    ends, _ = times(clock, (0.0, server.serve(10)), (0.0, server.serve(1)), (0.25, server.serve(20)))
    clock.run()
    assert ends == pytest.approx({0: 5.0, 1: 1.1, 2: 10.25})


def test_two_waits_at_once():
    clock = Clock()
    ends, processes = times(
        clock, (0.0, both(clock.sleep(2.0), clock.sleep(3.0))), (0.0, both(clock.sleep(2.0), clock.sleep(9.0)))
    )
    clock.at(1.0, processes[1].stop)
    clock.run()
    assert ends == {0: 3.0}


def test_one_worker_without_failures_takes_the_sum_of_the_work():
    found = simulate(Jobs([3.0, 5.0, 7.0]), Machines(gpus=1))
    assert (found.seconds, found.efficiency, found.failures) == (15.0, 1.0, 0)


def test_everything_that_one_worker_does_takes_its_time():
    """Start 2, load 6 bytes: 3; each of two jobs: begin 1, two parts with a checkpoint of 4 bytes in between: 2, result
    of 8 bytes: 4. Together 5 + 2 (1 + 10 + 2 + 4)."""
    jobs = Jobs([10.0, 10.0], start=1.0, write=8.0, state=4.0, interval=5.0, queued=False)
    found = simulate(jobs, Machines(gpus=1, start=2.0, load=6.0, link=2.0))
    assert found.seconds == 39.0
    spent = {name: seconds for name, seconds in found.spent.items() if seconds}
    assert spent == {"starting": 4.0, "loading": 3.0, "computing": 20.0, "checkpoints": 4.0, "writing": 8.0}
    assert found.moved == 6 + 2 * 12


def test_two_workers_by_hand():
    found = simulate(Jobs([4.0, 3.0, 2.0]), Machines(gpus=2))
    assert found.seconds == 5.0  # the second takes the last
    assert found.efficiency == 0.9
    assert found.spent["idle"] == 1.0


def test_work_waits_for_what_it_reads():
    """Two workers of 10 bytes over 4 bytes a second: 5 seconds, 2 of which are computation."""
    found = simulate(Jobs([2.0, 2.0], read=10.0), Machines(gpus=2, link=4.0))
    assert found.seconds == 5.0
    assert found.spent["computing"] == 4.0
    assert found.spent["reading"] == 6.0
    assert simulate(Jobs([2.0, 2.0], read=10.0), Machines(gpus=2, link=20.0)).seconds == 2.0


@pytest.mark.parametrize(("gpus", "seconds"), [(1, 1 + 100), (10, 10 + 10), (100, 100 + 1)])
def test_what_all_share_bounds_the_speed_up(gpus, seconds):
    """A model of 1 byte for each GPU over 1 byte a second, then 100 jobs of a second: the fastest is neither 1 nor
    100 GPUs, and each node that reads once for eight GPUs pays once."""
    machines = Machines(gpus=gpus, per_node=1, load=1.0, load_each=True, link=1.0)
    assert simulate(Jobs([1.0] * 100), machines).seconds == pytest.approx(seconds)
    once = simulate(Jobs([1.0] * 100), Machines(gpus=gpus, per_node=10, load=1.0, link=1.0))
    assert once.seconds == pytest.approx(ceil(gpus / 10) + 100 / gpus)


def test_the_longest_job_bounds_the_time():
    """Amdahl's law of a list: no number of workers is faster than the longest job."""
    jobs = Jobs([50.0] + [1.0] * 50)
    assert [simulate(jobs, Machines(gpus=n)).seconds for n in (1, 2, 1000)] == [100.0, 50.0, 50.0]


def claims(change, seed=0):
    """Seconds that three workers of three long jobs take to claim them, a second for each operation."""
    machines = Machines(gpus=3, operations=1.0, **change)
    found = simulate(Jobs([100.0] * 3), machines, seed)
    return found.seconds - 100, found.spent["claims"]


def test_claims_by_hand():
    """A look, a claim and the name of its kind are 3 operations. The second worker's claim fails once (2 operations,
    behind the third's look), and the third's too; then the second has the second job, and the third tries it in vain
    as well, or where it takes any of the two that are left, does so every other time."""
    assert claims({"same_order": True}) == (15, 3 + 11 + 15)
    found = [claims({}, seed) for seed in range(40)]
    assert {*found} == {(13, 3 + 11 + 13), (15, 3 + 11 + 15)}
    assert 10 <= found.count((13, 27)) <= 30  # of 20 expected, with a deviation of 3


@pytest.mark.parametrize(
    ("change", "few", "spent"),
    [({}, 20, 16), ({}, 0, 15), ({"read_beats": True}, 20, 24), ({"read_events": True}, 20, 12)],
)
def test_what_claims_read(monkeypatch, change, few, spent):
    """Two workers, the second of which is too late once and claims twice. A list, a claim and its name are 3 seconds:
    3 + (6 + 2) + 5, since two events have happened to the first's job when it looks again: to be read, or, where they
    are not few, one list of names. Two heartbeats in each look: 5 + (10 + 2) + 7. Without the names of kinds:
    2 + (4 + 2) + 4."""
    monkeypatch.setattr(fleet, "FEW", few)
    jobs, machines = Jobs([20.0, 1.0, 1.0]), Machines(gpus=2, operations=1.0, **change)
    assert simulate(jobs, machines).spent["claims"] == spent


def mean_and_error(values):
    return np.mean(values), np.std(values, ddof=1) / sqrt(len(values))


def test_failures_cost_what_the_formula_says():
    """A node that fails 20 s apart on average and is back after 5, parts of 10 s: (M + R) (exp(10 / M) - 1) each."""
    jobs, machines = Jobs([200.0], interval=10.0), Machines(gpus=1, mtbf=20.0, repair=5.0)
    mean, error = mean_and_error([simulate(jobs, machines, seed).seconds for seed in range(300)])
    assert error < 5
    assert mean == pytest.approx(20 * 25 * np.expm1(10 / 20), abs=4 * error)


def test_a_node_takes_its_workers_along_and_no_job_is_lost():
    jobs = Jobs([10.0] * 64, interval=2.0, state=1.0)
    machines = Machines(gpus=16, per_node=8, mtbf=30.0, repair=3.0, expiry=1.0, link=100.0, start=0.5)
    for seed in range(5):
        found = simulate(jobs, machines, seed)
        assert found.spent["computing"] == pytest.approx(640.0)
        assert found.failures
        assert found.spent["again"] > 0
        assert sum(found.spent.values()) == pytest.approx(16 * found.seconds)
        assert found == simulate(jobs, machines, seed)


class Fails:
    """Failures that come when they are told to, instead of a generator of random numbers."""

    def __init__(self, *gaps):
        self.gaps = [*gaps, 1e9]

    def exponential(self, _):
        return self.gaps.pop(0)


def test_a_training_with_failures_by_hand():
    """Ten steps of a second, a checkpoint of one after five. A failure at 8 loses two steps; two restarts, of which the
    first is cut short after one second; the last five steps: 5 + 1 + 2 + 1 + 2 + 5."""
    found = training.train(np.ones(10), 5.0, 1.0, 2.0, 1.0, Fails(8.0, 1.0))
    assert found == training.Training(16.0, 10.0, 1.0, 2.0, 3.0, 2)
    assert training.train(np.ones(10), 5.0, 1.0, 2.0, 1.0, Fails(5.5)).again == 5.5  # the checkpoint was not whole


def test_trainings_fail_as_dalys_formula_says():
    steps, mtbf = np.ones(2000), 50.0
    runs = [training.train(steps, 10.0, 1.0, 3.0, mtbf, np.random.default_rng(i)).seconds for i in range(100)]
    mean, error = mean_and_error(runs)
    assert error < 20
    assert mean == pytest.approx(training.daly(2000.0, 10.0, 1.0, 3.0, mtbf), abs=4 * error)


def test_youngs_interval_is_close_to_the_best():
    best = training.young(checkpoint=2.0, mtbf=3600.0)
    assert best == 120.0
    cost = {factor: training.daly(1e6, factor * best, 2.0, 60.0, 3600.0) for factor in (0.5, 0.9, 1.0, 1.1, 2.0)}
    assert cost[0.5] > cost[0.9] > cost[1.0]
    assert cost[2.0] > cost[1.1]
    assert cost[1.0] == pytest.approx(min(cost.values()), rel=1e-3)


def test_the_slowest_of_many():
    random = np.random.default_rng(0)
    drawn = np.maximum(1 + 0.1 * random.standard_normal((4000, 16)).max(axis=1), 1.0)
    told = training.slowest(16, 0.1, 4000, random)
    assert told.mean() == pytest.approx(drawn.mean(), abs=0.004)
    assert told.std() == pytest.approx(drawn.std(), abs=0.004)
    assert (training.slowest(16, 0.0, 10, random) == 1).all()


def test_ranks_that_divide_a_batch():
    assert [training.usable(n, 1024) for n in (1, 8, 100, 1000, 5000)] == [1, 8, 64, 512, 1024]


PLAN = training.Plan(
    world=64, group=8, flops=3e12, activations=1e9, resident=4e9, all_gather=3e9, reduce_scatter=1e9, n_gathers=10,
    all_reduce=0.8e9, n_reduces=5, checkpoint=14e9,
)  # fmt: skip


def test_communication_by_hand():
    """In a node 4 GB at 0.8 x 450 GB/s and ten rings of seven hops; between eight nodes 0.8 GB at 0.8 x 50 GB/s a GPU
    and five trees of three levels, up and down."""
    inputs = Inputs(hop_us=5.0)
    assert training.gathered(inputs, PLAN) == pytest.approx(4 / 360 + 10 * 7 * 5e-6)
    assert training.reduced(inputs, PLAN) == pytest.approx(0.8 / 40 + 5 * 2 * 3 * 5e-6)


def test_a_step_by_hand():
    """16 scenes of 3 TFLOP each, at the rate of 2 TFLOP (two forwards of a third of a scene) in 10 ms, and 64 images to
    encode. All but the first and the last of 15 collectives hide behind that."""
    inputs = Inputs(guided_ms=10.0, launch_ms=20.0, encode_ms=0.5)
    assert training.rate(inputs, 3e12) == pytest.approx(2e14)
    step = training.step(inputs, PLAN)
    assert step.computing == pytest.approx(16 * 0.015 + 64 * 0.0005)
    assert step.waiting == pytest.approx(2 / 15 * step.communicating)
    assert step.memory == 20e9
    launches = training.step(Inputs(guided_ms=10.0, launch_ms=200.0, encode_ms=0.5), PLAN)
    assert launches.computing == pytest.approx(3 * 0.2)  # a forward's launches, three times
    slow = training.step(Inputs(node_net_gb_s=1.0), PLAN)
    assert slow.seconds == pytest.approx(slow.communicating)


def test_the_volume_of_the_full_model_by_hand():
    """867,572,164 weights of the UNet in FSDP2 on 8 GPUs: each sends 7/8 of its float32 gradients, and what is gathered
    twice, in bfloat16, is most of them."""
    plan = workloads.plan(8, "fsdp2", 8)
    n = 867_572_164
    assert plan.reduce_scatter == pytest.approx(4 * n * 7 / 8, rel=1e-3)
    assert 2 * 2 * 0.6 * n * 7 / 8 < plan.all_gather < 2 * 4 * (n + 354_032_641) * 7 / 8
    ddp = workloads.plan(8, "ddp", 8)
    assert ddp.all_reduce == pytest.approx(2 * 4 * n * 7 / 8, rel=1e-6)
    assert ddp.all_gather == ddp.n_gathers == 0


def test_an_asset_by_hand():
    """A step at 64 px: 32,768 rays of 10 samples of 1 ns, two calls of 8 ms, twice 6 ms; at 256 px 262,144, 8 and 6."""
    inputs = Inputs(samples_per_ray=10.0, sample_ns=1.0, unet_ms=8.0, vae_ms=6.0, sds_steps=1000, export_s=2.0)
    first, second = workloads.sds_step(inputs)
    assert first == pytest.approx(327.68e-6 + 28e-3)
    assert second == pytest.approx(2621.44e-6 + 14e-3)
    assert workloads.asset_seconds(inputs) == pytest.approx(500 * (first + second) + 2)


def test_every_input_says_where_it_comes_from():
    for name, _, kind, origin in rows(Inputs()):
        assert kind in KINDS, name
        assert origin, name


def test_the_pages_tables_are_what_the_script_prints():
    page = (DOCS / "scale.md").read_text(encoding="utf-8")
    names = []
    for name, table in Report(Inputs()).tables():
        assert placed(page, name, table) == page, f"{name}: run python examples/scale --docs docs"
        names.append(name)
    assert re.findall(r"<!-- (?!end)(\w+) -->", page) == names
    assert (DOCS / "scale.webp").stat().st_size <= 100_000


def test_a_page_without_a_place_for_a_table():
    with pytest.raises(ValueError, match="no place for the table batch"):
        placed("<!-- render -->\n<!-- end -->", "batch", "| a |")
