"""What must be known before torch and Triton are imported, and fixtures of many folders."""

import os
import warnings

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes test side by side: they share the cores out
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))

import torch

if not torch.cuda.is_available():  # Triton interprets its kernels
    os.environ["TRITON_INTERPRET"] = "1"

if os.environ.get("MVDREAM_FAST_SANITIZE"):  # `make sanitize` means its own build, not the installed one
    from mvdream_fast import _C

    assert "sanitize" in _C.__file__, f"make sanitize: the sanitized build must be tested, got {_C.__file__}"


@pytest.fixture
def capturable_without_a_word(monkeypatch):
    """Graphs on a CPU, and every warning an error: none of them is left out."""
    from reference.graph_stand_in import capturable

    capturable(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """`tiny`, a folder of random weights, as the commands take one."""
    from reference.random_model import random_model

    from mvdream_fast.checkpoints.open import save_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(random_model(), folder)
    return str(folder)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """A current folder of the test's own, where a command writes its outputs/."""
    monkeypatch.chdir(tmp_path)
