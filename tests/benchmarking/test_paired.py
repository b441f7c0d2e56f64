"""benchmarks/paired.py on a small repository of its own: a halving is caught, noise is not, nothing is left behind."""

import random
import subprocess

import paired
import pytest

# A package whose work says how long it takes: a clock of the work's own goes on by that, and no test waits.
STEADY = "def work():\n    return 0.01\n"
HALVED = STEADY.replace("0.01", "0.02")
NOISY = "import random\ndice = random.Random(0)\n" + STEADY.replace("0.01", "0.01 * dice.choice([1, 1, 1, 2.5])")
WORK = """
import time
import mvdream_fast
now = 0.0
def call():
    global now
    now += mvdream_fast.work()
time.perf_counter = lambda: now
WORK = {"work": lambda: call}
"""
FAULTS = """
import resource, time
import numpy as np
def call():
    [np.ones(1 << 20) for _ in range(3)]
time.perf_counter = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
WORK = {"work": lambda: call}
"""


class Repository:
    """A git repository with a package `mvdream_fast` of one function."""

    def __init__(self, root):
        self.root, self.work = root / "repository", root / "work.py"
        (self.root / "mvdream_fast").mkdir(parents=True)
        self.work.write_text(WORK)
        self.git("init", "--quiet", "--initial-branch=main")

    def commit(self, source, message="a change"):
        (self.root / "mvdream_fast" / "__init__.py").write_text(source)
        self.git("add", ".")
        self.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--allow-empty", "-m", message)

    def git(self, *words):
        line = ["git", "-C", str(self.root), *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    def compare(self, **kwargs):
        return paired.compare(self.root, None, self.work, **kwargs)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_DIR", raising=False)
    return Repository(tmp_path)


def test_a_halving_is_caught_and_confirmed(repository, capsys):
    repository.commit(STEADY, "steady")
    repository.commit(HALVED)
    assert repository.compare() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("steady")
    assert lines[1].startswith("  work: SLOWER, ")
    assert lines[1].endswith("once more:")
    assert lines[-1] == "paired: half the speed, or no result: work"


def test_noise_is_not(repository, capsys):
    repository.commit(STEADY)
    repository.commit(NOISY)
    assert repository.compare() == 0
    assert "  work: " in capsys.readouterr().out


def test_the_tree_is_compared_as_it_is_and_nothing_is_left(repository, capsys):
    """What is not committed counts, too; the worktree is gone from the disk and from git."""
    repository.commit(STEADY)
    repository.commit(STEADY)
    (repository.root / "mvdream_fast" / "__init__.py").write_text(HALVED)
    assert repository.compare() == 1
    assert len(repository.git("worktree", "list").splitlines()) == 1
    assert repository.git("status", "--short") == "M mvdream_fast/__init__.py"


def test_work_that_the_earlier_commit_does_not_know(repository, capsys):
    repository.commit("")
    repository.commit(STEADY)
    assert repository.compare() == 0
    assert "work: not in the earlier commit (AttributeError: " in capsys.readouterr().out


def test_an_earlier_commit_that_does_not_run(repository, capsys):
    """Its fault is not this one's; this one's is."""
    repository.commit("import nowhere\n")
    repository.commit(STEADY)
    assert repository.compare() == 0
    assert "the earlier commit cannot be run, so nothing is compared" in capsys.readouterr().out
    assert len(repository.git("worktree", "list").splitlines()) == 1
    repository.commit("import nowhere\n")
    with pytest.raises(RuntimeError, match="a side ended with 1"):
        repository.compare()


def test_work_that_fails_now(repository, capsys):
    repository.commit(STEADY)
    repository.commit("def work():\n    raise ValueError('no')\n")
    assert repository.compare() == 1
    assert "work: fails in this tree: ValueError: no" in capsys.readouterr().out


def test_a_busy_machine_leaves_the_rest_out(repository, capsys):
    repository.commit(STEADY)
    repository.commit(HALVED)
    assert repository.compare(total_s=0) == 0
    assert "work: left out, this machine is too busy" in capsys.readouterr().out


def test_without_an_earlier_commit(repository, tmp_path, capsys):
    repository.commit(STEADY)
    assert repository.compare() == 0
    assert "no earlier commit" in capsys.readouterr().out
    assert paired.base_of(tmp_path) is None  # no repository at all


def test_a_shallow_clone_has_no_earlier_commit(repository, tmp_path):
    repository.commit(STEADY)
    repository.commit(HALVED)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--depth=1", f"file://{repository.root}", str(clone)], check=True)
    assert paired.base_of(clone) is None


def test_a_branch_is_held_to_where_it_left_the_main_one(repository, tmp_path):
    repository.commit(STEADY)
    repository.commit(STEADY)
    fork = repository.git("rev-parse", "HEAD")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(repository.root), str(clone)], check=True)
    repository.root = clone
    assert paired.base_of(clone) == repository.git("rev-parse", "HEAD~1")  # on the main one: the commit before
    repository.commit(HALVED)
    repository.commit(HALVED)
    assert paired.base_of(clone) == fork


def test_a_side_must_import_its_own_tree(tmp_path):
    """An installed package must not stand in for one that a tree lacks."""
    work = tmp_path / "work.py"
    work.write_text(WORK)
    with pytest.raises(RuntimeError, match="must be imported, got"):
        paired.Side(tmp_path, work)


def test_no_side_gets_its_memory_anew_at_each_call(tmp_path):
    """It did in trees at some paths, and the same commit was half as fast there as elsewhere."""
    work = tmp_path / "work.py"
    work.write_text(FAULTS)
    with paired.Side(paired.ROOT, work) as side:
        side.ask("work", 0)
        assert side.ask("work", 10)["seconds"] < 100  # pages a call; the arrays have 6144


def test_the_extension_is_taken_over_where_its_sources_are_the_same(repository):
    (repository.root / "csrc").mkdir()
    (repository.root / "csrc" / "a.cpp").write_text("int a;\n")
    (repository.root / ".gitignore").write_text("*.so\n")
    (repository.root / "setup.py").write_text("open('mvdream_fast/_C.built.so', 'w').write('of the old sources')\n")
    repository.commit(STEADY)
    built = repository.root / "mvdream_fast" / "_C.built.so"
    built.write_text("of these sources")
    base = repository.git("rev-parse", "HEAD")
    with paired.worktree(repository.root, base) as tree:
        assert (tree / "mvdream_fast" / built.name).read_text() == "of these sources"
    (repository.root / "csrc" / "a.cpp").write_text("int b;\n")
    with paired.worktree(repository.root, base) as tree:
        assert (tree / "mvdream_fast" / built.name).read_text() == "of the old sources"
    assert not tree.exists()


def test_pairs_by_hand():
    """Medians, not means; a halving is one by the fastest turns as well."""
    assert paired.Pairs([(1, 2)] * 5).halved
    assert not paired.Pairs([(1, 1.7)] * 5).halved
    assert paired.Pairs([(1, 1.7)] * 5).moved
    assert not paired.Pairs([(1, 9), (1, 9), (1, 9), (1, 1), (1, 1)]).halved
    assert str(paired.Pairs([(2e-3, 1e-3)] * 5)) == "faster, 0.50 times the time (0.50 to 0.50; 2 -> 1 ms)"
    assert str(paired.Pairs([(1e-3, 1.05e-3)] * 5)).startswith("as before, 1.05 times the time")
    dice = random.Random(0)
    for _ in range(200):  # neighbours that slow either side of a pair down threefold, now and then
        pairs = paired.Pairs([tuple(dice.choice([1, 1, 1, 3]) for _ in range(2)) for _ in range(9)])
        assert not pairs.halved
