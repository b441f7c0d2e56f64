"""How workers are hired on Ray, without Ray: a stand-in of the few calls that are made. With it: test_campaign.py."""

import signal
import sys
import types
from multiprocessing import Value

import pytest

from mvdream_fast.core.errors import UserError
from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.jobs import on_ray
from mvdream_fast.jobs.job import Job
from mvdream_fast.jobs.on_ray import ROOM, Cluster, Crew
from mvdream_fast.jobs.setup import Setup


class Process:
    """What a process looks like to its parent."""

    def __init__(self, exitcode: int | None):
        self.exitcode, self.killed = exitcode, False

    def start(self) -> None:
        """It has its exit code already."""

    def kill(self) -> None:
        self.killed, self.exitcode = True, -9

    def join(self, *_: object) -> None:
        """It has ended."""

    def terminate(self) -> None:
        self.exitcode = 0


@pytest.fixture
def cluster(monkeypatch):
    """cluster(exit codes): its processes end with these, one after the other; None lives."""
    monkeypatch.setattr(on_ray, "AGAIN_S", 0.0)

    def make(*codes: int | None) -> tuple[Cluster, list[Process], list[str]]:
        said: list[str] = []
        made = Cluster(Setup("out"), "head:6379", None, said.append)
        processes = [Process(code) for code in codes]
        left = iter(processes)
        monkeypatch.setattr(made._context, "Process", lambda **_: next(left), raising=False)
        return made, processes, said

    return make


def test_a_cluster_that_is_lost_is_reached_for_again(cluster):
    made, processes, said = cluster(1, None, 0)
    made.start()
    made._reached.value = 1
    assert made.tend()
    assert made._process is None
    assert made.tend()
    assert made._process is processes[1]
    assert made.tend()
    made._heard.value = -1000.0  # it hangs
    assert made.tend()
    assert processes[1].killed
    assert made.tend()
    assert not made.tend(), "the third one has ended as it should"
    assert said == ["the Ray cluster head:6379 was lost; trying to reach it again"] * 2


def test_an_address_that_never_answers_is_wrong(cluster):
    made, _, said = cluster(1, 1, 1)
    made.start()
    assert [made.tend() for _ in range(4)] == [True] * 4
    with pytest.raises(UserError, match="no Ray cluster answers at head:6379; --ray must name"):
        made.tend()
    assert len(said) == 2


def test_a_cluster_without_room_is_told_once_and_given_up(cluster, monkeypatch):
    """At first others may be about to join; where there was room before, they may come back."""
    monkeypatch.setattr(on_ray, "ROOM_S", -1.0)
    for had_room in (False, True):
        made, _, said = cluster(None)
        made.start()
        assert made.tend(), "it was not looked at yet"
        if had_room:
            made._most.value = ROOM
            assert made.tend()
        made._most.value = 0
        assert made.tend()
        lacks = "the Ray cluster head:6379 must have a machine with 1 cores for a worker, got at most 0"
        assert said == [f"{lacks}; waiting for one"]
        if had_room:
            assert made.tend()
            assert len(said) == 1
        else:
            with pytest.raises(UserError, match=f"{lacks}; give workers fewer"):
                made.tend()


class Ray:
    """The calls of Ray that a crew makes. room: of its machine, machines: of several. lost: futures that end with their
    actor's death."""

    class RayError(Exception):
        pass

    def __init__(self, *machines: dict[str, float], **room: float):
        self.machines = [*machines, room]
        self.asked, self.ended, self.lost, self.told = [], [], [], []
        self.exceptions = types.SimpleNamespace(RayError=self.RayError)

    def nodes(self) -> list[dict]:
        gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        return [gone, *({"Alive": True, "Resources": room} for room in self.machines)]

    def remote(self, cls: type) -> "Ray":
        assert cls is on_ray.Actor
        return self

    def options(self, **asked: object) -> types.SimpleNamespace:
        self.asked.append(asked)
        work = types.SimpleNamespace(remote=lambda setup, name: name)
        stop = types.SimpleNamespace(remote=lambda: self.told.append("stop"))
        return types.SimpleNamespace(remote=lambda: types.SimpleNamespace(work=work, stop=stop))

    def wait(self, futures: list, num_returns: int, timeout: float) -> tuple[list, list]:
        assert num_returns == len(futures)
        return [x for x in futures if x in self.ended + self.lost], []

    def get(self, future: str) -> None:
        if future in self.lost:
            raise self.RayError("The actor died.\nmore")


@pytest.mark.parametrize(
    ("room", "setup", "workers", "n", "needs"),
    [
        ({"CPU": 8.0, "GPU": 2.0}, Setup("out"), None, 2, {"num_gpus": 1.0}),
        ({"CPU": 8.0, "GPU": 2.0}, Setup("out"), 4, 4, {"num_gpus": 0.5}),
        ({"CPU": 8.0, "GPU": 2.0}, Setup("out", device="cpu", threads=3), None, 2, {"num_cpus": 3}),
        ({"CPU": 8.0}, Setup("out", threads=2), 3, 3, {"num_cpus": 2}),
        ({}, Setup("out"), None, 0, None),
    ],
)
def test_as_many_are_hired_as_there_is_room_for(room, setup, workers, n, needs):
    ray = Ray(**room)
    crew = Crew(ray, setup)
    for _ in range(2):
        crew.hire(workers)
    assert len(crew.at_work) == n
    assert ray.asked == [{"max_concurrency": 2, **needs}] * n if n else not ray.asked


@pytest.mark.parametrize(
    ("machines", "setup", "n", "most"),
    [
        ([{"CPU": 4.0}, {"CPU": 6.0}], Setup("out", threads=4), 2, ROOM),
        ([{"CPU": 4.0}, {"CPU": 6.0}], Setup("out", threads=8), 0, 6),
        ([{"CPU": 4.0}, {"CPU": 6.0, "GPU": 1.0}], Setup("out", threads=8), 1, ROOM),
        ([{"CPU": 4.0}, {"CPU": 6.0, "GPU": 1.0}], Setup("out", device="cpu", threads=8), 0, 6),
        ([], Setup("out"), 0, 0),
    ],
)
def test_a_worker_is_hired_where_one_machine_can_hold_it(machines, setup, n, most):
    crew = Crew(Ray(*machines), setup)
    assert crew.hire(None) == most
    assert len(crew.at_work) == n


def test_a_driver_that_is_told_to_leave_by_others_is_no_end(tmp_path, monkeypatch):
    """It is started again, then, as work is left."""
    ray = Ray(CPU=2.0)
    ray.init = lambda **_: None
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(on_ray, "ROUND_S", 0.01)
    setup = Setup(str(tmp_path / "out"), threads=8)
    setup.queue().add(Job("x", {"prompt": "one"}))
    looks = []

    class ToldAtLook(Interrupt):
        def __init__(self):
            super().__init__()
            hire = Crew.hire
            monkeypatch.setattr(Crew, "hire", lambda crew, n: (looks.append(n), self._note(signal.SIGTERM, None),
                                                               hire(crew, n))[-1])  # fmt: skip

    monkeypatch.setattr(on_ray, "Interrupt", ToldAtLook)
    most = Value("i", on_ray.UNKNOWN)
    with pytest.raises(SystemExit) as ended:
        on_ray._drive(setup, "auto", None, Value("d", 0.0), Value("i", 0), most)
    assert (ended.value.code, looks, most.value) == (143, [None], 2)


def test_who_is_lost_is_replaced_and_who_joins_is_used(monkeypatch):
    monkeypatch.setattr(on_ray, "GRACE_S", 0.5)
    ray = Ray(CPU=2.0)
    crew = Crew(ray, Setup("out"))
    crew.hire(None)
    assert [*crew.at_work] == ["0", "1"]
    ray.lost.append("0")
    crew.release(0.0)
    assert [*crew.at_work] == ["1"]
    ray.machines = [{"CPU": 2.0}, {"CPU": 1.0}]
    crew.hire(None)
    assert [*crew.at_work] == ["1", "2", "3"]
    ray.ended += ["1", "2", "3"]
    crew.stop()
    assert ray.told == ["stop"] * 3
    assert not crew.at_work
