"""Builds the native extension with CMake; every other setting lives in pyproject.toml."""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# The tree is kept, and with it what an earlier build was told: these hold unless CMAKE_ARGS says otherwise now.
OPTIONS = ("-DMVDREAM_FAST_CUDA=OFF", "-DMVDREAM_FAST_SANITIZE=OFF")


def version() -> str:
    """The one place that holds the version is mvdream_fast/_version.py; it is read, not imported."""
    return re.search(r'__version__ = "([^"]+)"', (ROOT / "mvdream_fast/_version.py").read_text()).group(1)


def build_jobs() -> int:
    """As many compilers at once as cores and memory allow (about 1.5 GB each), so that a small machine survives."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return int(os.environ.get("MAX_JOBS", cores))
    return int(os.environ.get("MAX_JOBS", max(1, min(cores, free // (3 << 29)))))


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt; the tree under build/ is kept, so a second build compiles only changes."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        tree.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMVDREAM_FAST_OUTPUT={out}",
            *OPTIONS,
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(tree), "--parallel", str(build_jobs())], check=True)


# Every folder of the package; a bare find_packages() would ship the top-level `kernels`, another package's name.
PACKAGES = [*find_packages(include=["mvdream_fast", "mvdream_fast.*"]), "mvdream_fast.kernels"]

setup(
    version=version(),
    packages=PACKAGES,
    package_dir={"mvdream_fast.kernels": "kernels"},
    package_data={
        "mvdream_fast": ["py.typed", "*.pyi"],
        "mvdream_fast.models": ["*.gz", "*.txt"],
        "mvdream_fast.evaluation": ["*.txt"],
        "mvdream_fast.web": ["page/*"],
        "mvdream_fast.weights": ["*", "*/*", "*/*/*"],
    },
    ext_modules=[Extension("mvdream_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
