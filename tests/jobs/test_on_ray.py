"""How workers are hired on Ray, without Ray: a stand-in of the few calls that are made. With it: test_campaign.py."""

import types

import pytest

from mvdream_fast.core.errors import UserError
from mvdream_fast.jobs import on_ray
from mvdream_fast.jobs.on_ray import Cluster, Crew
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


class Ray:
    """The calls of Ray that a crew makes. room: of the cluster. lost: futures that end with their actor's death."""

    class RayError(Exception):
        pass

    def __init__(self, **room: float):
        self.room, self.asked, self.ended, self.lost, self.told = room, [], [], [], []
        self.exceptions = types.SimpleNamespace(RayError=self.RayError)

    def cluster_resources(self) -> dict[str, float]:
        return self.room

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


def test_who_is_lost_is_replaced_and_who_joins_is_used(monkeypatch):
    monkeypatch.setattr(on_ray, "GRACE_S", 0.5)
    ray = Ray(CPU=2.0)
    crew = Crew(ray, Setup("out"))
    crew.hire(None)
    assert [*crew.at_work] == ["0", "1"]
    ray.lost.append("0")
    crew.release(0.0)
    assert [*crew.at_work] == ["1"]
    ray.room = {"CPU": 3.0}
    crew.hire(None)
    assert [*crew.at_work] == ["1", "2", "3"]
    ray.ended += ["1", "2", "3"]
    crew.stop()
    assert ray.told == ["stop"] * 3
    assert not crew.at_work
