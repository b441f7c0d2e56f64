"""The CUDA sources compiled for the host with the header of tests/cuda_shim; ninja compiles what has changed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def built() -> Path:
    """The extension module that holds the CUDA ops."""
    import pybind11

    sanitize = "ON" if os.environ.get("MVDREAM_FAST_SANITIZE") else "OFF"  # set by `make sanitize`
    tree = ROOT / ("build/cuda-host" if sanitize == "OFF" else "build/sanitize/cuda-host")
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # no sanitized compilers
    if not (tree / "build.ninja").exists():
        configure = ["cmake", "-S", ROOT / "tests/cuda_shim", "-B", tree, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DMVDREAM_FAST_SANITIZE={sanitize}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        subprocess.run(configure, check=True, capture_output=True, env=plain)
    build = ["cmake", "--build", tree, "--parallel", "2"]
    done = subprocess.run(build, capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stdout[-4000:]
    (library,) = tree.glob("_cuda_host*.so")
    return library


def loaded(library: Path) -> ModuleType:
    """The module in what `built` returns."""
    spec = importlib.util.spec_from_file_location("_cuda_host", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
