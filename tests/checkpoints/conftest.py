"""Models as they are published, narrow: made once, and never written to."""

from pathlib import Path

import pytest
import torch
from reference import upstream
from reference.tiny_model import write_tiny


@pytest.fixture(scope="session")
def flat21(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "21.pt"
    torch.save(upstream.flat(upstream.NARROW21), path)
    return path


@pytest.fixture(scope="session")
def published21(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("models") / "published"
    return folder, upstream.write_published(folder, upstream.NARROW21)


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A folder of ours, which the test may spoil."""
    return write_tiny(tmp_path / "tiny")
