"""What every benchmark records besides its times (the machine, the libraries, the threads), and a fixture for many."""

import os
import platform
from pathlib import Path

import pytest

TWO = min(2, os.cpu_count() or 1)


@pytest.fixture
def threads(request):
    """torch has as many threads as the parameter says, two without one; what is yielded changes that."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", TWO))
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
