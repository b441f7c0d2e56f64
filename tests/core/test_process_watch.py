"""A process of a run that dies ends the others, with one sentence; one that has an error lets them have it, too."""

import subprocess
import sys
import textwrap
import time

import pytest

# One rank, without torch: `rank world folder`. It enters, does as its line of the folder's file "do" says, and leaves.
RANK = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path
    from mvdream_fast.core import process_watch
    from mvdream_fast.core.processes import Ranks

    class Told(Ranks):
        def largest(self, *values):
            path = Path(sys.argv[3]) / "port"
            if values[0]:
                path.with_suffix(".new").write_text(str(values[0]))
                path.with_suffix(".new").rename(path)
            while not path.exists():
                time.sleep(0.01)
            return [int(path.read_text())]

    process_watch.GRACE_S, process_watch.NEWS_S = 2.0, 0.5
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    do = sys.argv[4].split(",")[rank]
    with process_watch.watched(Told(rank, world), "127.0.0.1"):
        print("in", flush=True)
        time.sleep(0.3)
        if do == "die":
            os.kill(os.getpid(), 9)
        if do == "fail":
            raise ValueError("mine")
        if do == "stay":
            time.sleep(100)
    assert "torch" not in sys.modules
    print("done", flush=True)
""")


@pytest.fixture
def run(tmp_path):
    """(exit codes, all of stderr) of ranks that do as they are told."""
    started = []

    def run(*do):
        for rank in range(len(do)):
            command = [sys.executable, "-c", RANK, str(rank), str(len(do)), str(tmp_path), ",".join(do)]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        outputs = [process.communicate(timeout=60) for process in started]
        return [process.returncode for process in started], "".join(errors for _, errors in outputs)

    yield run
    for process in started:
        process.kill()


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_death_ends_the_others_with_one_sentence(run, dead):
    do = ["stay"] * 3
    do[dead] = "die"
    start = time.monotonic()
    codes, errors = run(*do)
    assert time.monotonic() - start < 50
    assert codes == [-9 if rank == dead else 1 for rank in range(3)]
    assert (
        errors
        == f"train: process {dead} of 3 is gone; the others stop, and --resume goes on from the latest checkpoint\n"
    )


def test_an_error_of_one_alone_ends_the_others_after_a_while(run):
    codes, errors = run("stay", "stay", "fail")
    assert codes == [1, 1, 1]
    assert errors.count("ValueError: mine") == 1
    assert errors.count("process 2 of 3 has ended with an error of its own; the others stop") == 1


def test_an_error_of_all_is_theirs(run):
    codes, errors = run("fail", "fail", "fail")
    assert codes == [1, 1, 1]
    assert errors.count("ValueError: mine") == 3
    assert "process" not in errors.replace("process_watch", "")


def test_those_that_are_done_leave_in_peace(run):
    assert run("", "", "") == ([0, 0, 0], "")
