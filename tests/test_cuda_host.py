"""The CUDA kernels compiled for the host (tests/cuda_shim) and put in the CPU backend's place: the same parity tests.

A GPU runs the same sources. What a GPU alone can show (speed, memory ordering between blocks) is not tested here.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import test_composite
import test_hash_encode
import test_march_rays
import test_update_occupancy

import mvdream_fast

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def cuda_host():
    """The host build of csrc/cuda as a module; ninja compiles what has changed."""
    import pybind11

    tree = ROOT / "build/cuda-host"
    if not (tree / "build.ninja").exists():
        configure = ["cmake", "-S", ROOT / "tests/cuda_shim", "-B", tree, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        subprocess.run(configure, check=True, capture_output=True)
    built = subprocess.run(["cmake", "--build", tree, "--parallel", "2"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:]
    (library,) = tree.glob("_cuda_host*.so")
    spec = importlib.util.spec_from_file_location("_cuda_host", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def host_instead_of_cpu(cuda_host, monkeypatch):
    """The ops' CPU backend is the host build."""
    from mvdream_fast import _C

    for shared in ("HashGrid", "Field"):
        setattr(cuda_host, shared, getattr(_C, shared))
    monkeypatch.setattr(mvdream_fast, "_C", cuda_host)


def borrow(module, without=()):
    """The tests of an op's own file, for this backend."""
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_") and name not in without}
    globals().update({f"{module.__name__}_{name.removeprefix('test_')}": test for name, test in tests.items()})


THREADS = "test_same_bits_for_any_number_of_threads"
borrow(test_composite, without=["test_gradcheck_of_the_reference", THREADS])
borrow(test_march_rays, without=["test_parity_campaign", THREADS])
borrow(test_update_occupancy, without=["test_grid_finds_the_ball"])
borrow(
    test_hash_encode,
    without=[
        "test_gradients_of_the_reference",
        "test_batch_longer_than_a_run",
        "test_same_bits_for_any_number_of_threads",
    ],
)
