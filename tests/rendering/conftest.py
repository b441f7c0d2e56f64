"""Both renderers, where there is an OpenGL."""

import pytest

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.rendering.dataset import make_renderer


@pytest.fixture(scope="session", params=["gl", "numpy"])
def renderer(request):
    try:
        return make_renderer(request.param)
    except ArgumentError as error:
        pytest.skip(f"no OpenGL here: {error}")
