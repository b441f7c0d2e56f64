"""The CUDA sources compiled for the host with the header of tests/cuda_shim; ninja compiles what has changed."""

import fcntl
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def alone_in(tree: Path) -> Iterator[None]:
    """The only process that builds in this folder; another one waits, and finds the work done."""
    tree.mkdir(parents=True, exist_ok=True)
    with (tree / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def built() -> Path:
    """The extension module that holds the CUDA ops."""
    sanitize = "ON" if os.environ.get("MVDREAM_FAST_SANITIZE") else "OFF"  # set by `make sanitize`
    tree = ROOT / ("build/cuda-host" if sanitize == "OFF" else "build/sanitize/cuda-host")
    with alone_in(tree):
        _build(tree, sanitize)
    (library,) = tree.glob("_cuda_host*.so")
    return library


def _build(tree: Path, sanitize: str) -> None:
    import pybind11

    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # no sanitized compilers
    if not (tree / "build.ninja").exists():
        configure = ["cmake", "-S", ROOT / "tests/cuda_shim", "-B", tree, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DMVDREAM_FAST_SANITIZE={sanitize}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        subprocess.run(configure, check=True, capture_output=True, env=plain)
    build = ["cmake", "--build", tree, "--parallel", "2"]
    done = subprocess.run(build, capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stdout[-4000:]


def loaded(library: Path) -> ModuleType:
    """The module in what `built` returns."""
    spec = importlib.util.spec_from_file_location("_cuda_host", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
