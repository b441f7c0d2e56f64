"""Processes that die, hang, eat and raise: each costs its own piece of work, and says why."""

from collections import deque

import bad_work
import pytest

from mvdream_fast.core.errors import OutOfMemoryError
from mvdream_fast.rendering.workers import Limits, Lost, Stopped, Workers

LIMITS = Limits(seconds=4.0, memory=400 << 20)


def outcomes(words, begin=bad_work.begin, stop=lambda: False, n=2):
    with Workers(n, begin, LIMITS, stop) as pool:
        out = dict(pool.map(bad_work.work, deque(words)))
        workers = [worker.process for worker in pool.all]
    assert not any(process.is_alive() for process in workers)
    return out


def test_each_costs_its_own_piece():
    found = outcomes(["a", "abort", "b", "leave", "sleep", "eat", "c"])
    assert {word: found[word] for word in "abc"} == {"a": "A", "b": "B", "c": "C"}
    assert found["abort"] == Lost("abort", "died", "its process was ended by SIGABRT")
    assert found["leave"] == Lost("leave", "died", "its process left with code 3")
    assert found["sleep"] == Lost("sleep", "hung", "nothing came of it in 4 seconds")
    assert found["eat"] == Lost("eat", "memory", "it took more than 0.4 GB of memory")


def test_what_comes_back_can_be_put_in_again():
    words, tries = deque(["abort", "a"]), []
    with Workers(1, bad_work.begin, LIMITS, lambda: False) as pool:
        for word, answer in pool.map(bad_work.work, words):
            tries.append(word)
            if isinstance(answer, Lost) and tries.count(word) < 2:
                words.append(word)
    assert tries == ["abort", "a", "abort"]


def test_errors_of_the_work_are_errors_here():
    with pytest.raises(ValueError, match="of a native library"):
        outcomes(["raise"])
    with pytest.raises(ValueError, match="no renderer"):
        outcomes(["a"], bad_work.begin_badly)
    with pytest.raises(OutOfMemoryError, match=r"ended by itself \(its process left with code 7\)"):
        outcomes(["a"], bad_work.die_at_once)


def test_whoever_asks_for_the_end_gets_it():
    with pytest.raises(Stopped):
        outcomes(["sleep"], stop=lambda: True)
