"""Where there is no GPU, Triton interprets its kernels: that must be known before anything imports it."""

import os
import warnings

import pytest
import torch

if not torch.cuda.is_available():
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
