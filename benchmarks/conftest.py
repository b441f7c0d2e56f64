"""The fixture `contest`, what every benchmark records of its machine, and a line that says how far a run is."""

import importlib.metadata
import os
import platform
from pathlib import Path

import contest as contests
import pytest
from progress import Progress

from mvdream_fast.benchmarking.journal import PLUGIN

TWO = min(2, os.cpu_count() or 1)
PACKAGES = ("torch", "numpy", "diffusers", "drjit", "nerfacc", "onnxruntime", "openvino", "xformers", "triton",
            "tinycudann", "nvdiffrast")  # fmt: skip


def pytest_configure(config):
    """Benches choose their sizes when they are imported: pytest-benchmark measures nothing beside other tests."""
    beside_others = hasattr(config, "workerinput") or config.getoption("dist", "no") != "no"
    contests.smoke = beside_others or config.getoption("benchmark_disable")


@pytest.fixture
def contest(benchmark, request):
    """A contest on two threads (on one where nothing is measured), told on the terminal when it is over."""
    import torch

    threads, before = 1 if contests.smoke else TWO, torch.get_num_threads()
    torch.set_num_threads(threads)
    yield contests.Contest(benchmark, threads, _teller(request.config))
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A folder of random weights: the model of whole runs where nothing is measured."""
    from reference.random_model import random_model

    from mvdream_fast.checkpoints.open import save_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(random_model(), folder)
    return str(folder)


def _teller(config):
    """A function that prints a line, whatever pytest captures."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")

    def say(line: str) -> None:
        if reporter:
            with capture.global_and_fixture_disabled():
                reporter.ensure_newline()
                reporter.write_line(line)

    return say


def pytest_collection_finish(session):
    if not contests.smoke and session.items:
        plugins = session.config.pluginmanager
        n_before = getattr(plugins.get_plugin(PLUGIN), "n_before", 0)
        n_cases = n_before + len(session.items)
        plugins.register(Progress(_teller(session.config), n_cases, n_before), "benchmark progress")


def pytest_benchmark_update_machine_info(config, machine_info):
    """Adds to what pytest-benchmark finds by itself; the same values however often it is called."""
    import psutil
    import torch

    machine_info["mvdream_fast"] = {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "torch_threads": TWO,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
