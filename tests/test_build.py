"""setup.py and what goes into a source distribution. cmake configures here, and compiles nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
CMAKE, NINJA = (shutil.which(name, path=PLACES) for name in ("cmake", "ninja"))
SYSTEM = "/usr/bin:/bin"  # has a C++ compiler, and on most machines no nvcc


@pytest.fixture
def tree(tmp_path):
    """A copy of what configures the extension, and bin/, whose cmake leaves the compiling out."""
    pytest.importorskip("pybind11")
    if not CMAKE or not NINJA:
        pytest.skip("cmake and ninja are needed to build")
    for name in ("setup.py", "CMakeLists.txt", "mvdream_fast/_version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ninja").symlink_to(NINJA)
    (tmp_path / "bin/cmake").write_text(f'#!/bin/sh\n[ "$1" = --build ] || exec "{CMAKE}" "$@"\n')
    (tmp_path / "bin/cmake").chmod(0o755)
    return tmp_path


def configure(tree: Path, arguments: str) -> tuple[str, list[str]]:
    """What a build said that failed, or nothing, and the lines of the kept tree's CMakeCache.txt."""
    environment = os.environ | {"PATH": f"{tree / 'bin'}:{SYSTEM}", "CMAKE_ARGS": arguments}
    line = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"]
    done = subprocess.run(line, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    (cache,) = tree.glob("build/*/CMakeCache.txt")
    return done.stderr if done.returncode else "", cache.read_text().splitlines()


def test_a_build_forgets_the_options_of_the_one_before(tree):
    """A try with CUDA where there is no nvcc says what to do, and both ways of doing it work."""
    said, cache = configure(tree, "-DMVDREAM_FAST_CUDA=ON -DMVDREAM_FAST_SANITIZE=ON")
    assert {"MVDREAM_FAST_CUDA:BOOL=ON", "MVDREAM_FAST_SANITIZE:BOOL=ON"} <= {*cache}
    if said:
        assert "MVDREAM_FAST_CUDA is ON but there is no CUDA compiler" in said
        assert not [line for line in cache if line.startswith("CMAKE_CUDA_COMPILER:")]  # so that it is looked for again
    said, cache = configure(tree, "")
    assert not said
    assert {"MVDREAM_FAST_CUDA:BOOL=OFF", "MVDREAM_FAST_SANITIZE:BOOL=OFF"} <= {*cache}


def test_a_source_distribution_has_every_file(tmp_path):
    """What the Makefile asks for, what README links, what the tests read; as setuptools lists it."""
    if not (ROOT / ".git").exists():
        pytest.skip("which files these are is asked of git")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {name for name in tracked.split("\0") if name and (ROOT / name).is_file()} - {".gitignore"}
    for name in names:  # a copy, because the list holds what else lies in the folder
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    line = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", "."]
    subprocess.run(line, cwd=tmp_path, capture_output=True, check=True)
    assert not names - {*(tmp_path / "mvdream_fast.egg-info/SOURCES.txt").read_text().splitlines()}
