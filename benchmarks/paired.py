"""This commit against the one before: the work of paired_work.py, in one run, by a process for each, taking turns.

    python benchmarks/paired.py [--base REV]

The base is where this branch left origin's, else the commit before. It is checked out in a worktree that is removed
again; its extension is built only where its sources differ. What moved is printed. A halving of speed that is there
again when it is repeated fails (1); noise does not: both sides of a pair have the same neighbours.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
HALVED = 1.75  # times the time: a measure of 2 with its error; at 2 itself every other halving would pass
MOVED = 1.1  # times the time that is worth a word
TURNS, TURN_S, BUDGET_S = 15, 0.03, 5.0  # pairs of turns, the least that a turn takes, and all turns of one work
TOTAL_S = 100  # after which nothing more is begun, on a machine that is busy
# Of both sides. Who waits for a turn leaves the cores to the other. Memory that is free again stays a process's own:
# else it hangs on how a heap happens to lie whether the next call gets its pages anew, which takes as long as the work.
QUIET = {"GOMP_SPINCOUNT": "5000", "MALLOC_TRIM_THRESHOLD_": str(1 << 28), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
NATIVE = ("csrc", "CMakeLists.txt", "setup.py")  # what the extension is made of


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a commit to compare with")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        return serve(flags.serve)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the worktree goes
    return compare(ROOT, flags.base, HERE.with_name("paired_work.py"))


def compare(root: Path, base: str | None, work: Path, budget_s: float = BUDGET_S, total_s: float = TOTAL_S) -> int:
    """Prints what moved between `base` and the tree as it is; 1 where something halved its speed."""
    base = base or base_of(root)
    if base is None:
        print("paired: there is no earlier commit at hand (a shallow clone?), so nothing is compared")
        return 0
    print(f"paired: this tree against {_git(root, 'log', '-1', '--format=%h %s', base)}")
    with contextlib.ExitStack() as stack:
        try:
            before = stack.enter_context(Side(stack.enter_context(worktree(root, base)), work))
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"paired: the earlier commit cannot be run, so nothing is compared: {error}")
            return 0
        now = stack.enter_context(Side(root, work))
        start, failed = time.monotonic(), []
        for name in now.names:
            if time.monotonic() - start > total_s:
                print(f"  {name}: left out, this machine is too busy")
            elif not _compared(name, before, now, budget_s):
                failed.append(name)
    if failed:
        print(f"paired: half the speed, or no result: {', '.join(failed)}")
    return int(bool(failed))


def _compared(name: str, before: "Side", now: "Side", budget_s: float) -> bool:
    """Prints how the work moved; whether it is done, and has not halved its speed in both of two tries."""
    made = {side: side.ask(name, 0) for side in (before, now)}  # made, and warmed up
    if "missing" in made[now]:
        print(f"  {name}: fails in this tree: {made[now]['missing']}")
        return False
    if "missing" in made[before]:
        print(f"  {name}: not in the earlier commit ({made[before]['missing']})")
        return True
    pairs = turns(name, before, now, budget_s)
    if pairs.halved:
        print(f"  {name}: {pairs}; once more:")
        pairs = turns(name, before, now, budget_s)
    print(f"  {name}: {pairs}")
    return not pairs.halved


@dataclass(frozen=True)
class Pairs:
    """Seconds of a call, (before, now) of each pair of turns."""

    seconds: Sequence[tuple[float, float]]

    @property
    def ratios(self) -> list[float]:
        """Times the time that it takes now."""
        return [now / before for before, now in self.seconds]

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    @property
    def halved(self) -> bool:
        """Whether pairs and fastest turns say so: noise only ever adds to a time, and seldom to every turn's."""
        fastest = [min(side) for side in zip(*self.seconds)]
        return self.ratio >= HALVED and fastest[1] >= HALVED * fastest[0]

    @property
    def moved(self) -> bool:
        """Whether the middle half of the pairs agree on which way, and it is far enough to speak of."""
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return (low > 1 and self.ratio > MOVED) or (high < 1 and self.ratio < 1 / MOVED)

    def __str__(self) -> str:
        low, _, high = statistics.quantiles(self.ratios, n=4)
        before, now = (statistics.median(side) * 1e3 for side in zip(*self.seconds))
        word = ("SLOWER" if self.ratio > 1 else "faster") if self.moved else "as before"
        return f"{word}, {self.ratio:.2f} times the time ({low:.2f} to {high:.2f}; {before:.3g} -> {now:.3g} ms)"


def turns(name: str, before: "Side", now: "Side", budget_s: float) -> Pairs:
    """Pairs of turns, the one who begins changing from pair to pair."""
    one = max(side.ask(name, 1)["seconds"] for side in (before, now))
    n_calls = max(1, round(TURN_S / one))
    n_pairs = max(4, min(TURNS, round(budget_s / (2 * n_calls * one))))
    found = []
    for i in range(n_pairs):
        taken = {side: side.ask(name, n_calls)["seconds"] for side in ((before, now) if i % 2 else (now, before))}
        found.append((taken[before], taken[now]))
    return Pairs(found)


def base_of(root: Path) -> str | None:
    """The commit to compare with: where this branch left origin's main one, else the one before; None without."""
    try:
        head = _git(root, "rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None
    for question in (("merge-base", "HEAD", "origin/HEAD"), ("rev-parse", "--verify", "HEAD~1^{commit}")):
        with contextlib.suppress(subprocess.CalledProcessError):
            if (found := _git(root, *question)) != head:
                return found
    return None


@contextlib.contextmanager
def worktree(root: Path, base: str) -> Iterator[Path]:
    """The package as it was at `base`, with its extension, in a folder that goes again."""
    with tempfile.TemporaryDirectory(prefix="mvdream_fast_paired_") as folder:
        tree = Path(folder) / "tree"
        _git(root, "worktree", "add", "--quiet", "--detach", str(tree), base)
        try:
            if (tree / "kernels").is_dir():
                (tree / "mvdream_fast" / "kernels").symlink_to(tree / "kernels")
            _extension(root, tree, base)
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _extension(root: Path, tree: Path, base: str) -> None:
    """The extension of this tree where its sources are the same, else one built of the earlier ones."""
    built = list((root / "mvdream_fast").glob("_C*.so"))
    if subprocess.run(["git", "-C", str(root), "diff", "--quiet", base, "--", *NATIVE], check=False).returncode == 0:
        for path in built:
            shutil.copy2(path, tree / "mvdream_fast")
    elif built:
        print("paired: the native sources differ, the earlier extension is built", flush=True)
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True)


class Side:
    """A process that imports the package of one tree, and does its work when it is asked to."""

    def __init__(self, tree: Path, work: Path):
        paths = [str(tree), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        for name, value in QUIET.items():
            environment.setdefault(name, value)
        line = [sys.executable, str(HERE), "--serve", str(work)]
        self.process = subprocess.Popen(
            line, env=environment, cwd=tree, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            hello = self._answer()
            if not Path(hello["package"]).is_relative_to(tree.resolve()):
                raise RuntimeError(f"paired: the package of {tree} must be imported, got {hello['package']}")
        except BaseException:
            self.close()
            raise
        self.names: list[str] = hello["names"]

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, name: str, n_calls: int) -> dict[str, Any]:
        """{"seconds": of a call} or {"missing": why}; with no calls the work is made and done once."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([name, n_calls]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"paired: a side ended with {self.process.wait()}, its last lines are above")
        return json.loads(line)


def serve(work: Path) -> int:
    """The other end of a Side: questions come by stdin, answers go to what was stdout; what is printed, to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import mvdream_fast

    spec = importlib.util.spec_from_file_location("work", work)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls: dict[str, Any] = {}
    print(json.dumps({"package": str(Path(mvdream_fast.__file__).resolve()), "names": [*module.WORK]}), file=answers)
    for line in sys.stdin:
        name, n_calls = json.loads(line)
        try:
            if name not in calls:
                calls.clear()  # one at a time is in memory
                calls[name] = module.WORK[name]()
                calls[name]()
            print(json.dumps({"seconds": _seconds(calls[name], n_calls)}), file=answers)
        except Exception as error:
            print(json.dumps({"missing": f"{type(error).__name__}: {error}".splitlines()[0]}), file=answers)
    return 0


def _seconds(call: Any, n_calls: int) -> float:
    start = time.perf_counter()
    for _ in range(n_calls):
        call()
    return (time.perf_counter() - start) / max(1, n_calls)


def _git(root: Path, *words: str) -> str:
    """Raises CalledProcessError."""
    line = ["git", "-C", str(root), *words]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
