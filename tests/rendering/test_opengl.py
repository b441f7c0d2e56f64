"""An OpenGL context lives beside what else a process loads."""

import importlib.util
import subprocess
import sys

import pytest

from mvdream_fast.rendering.opengl import new_context

CONTEXT_THEN_TRITON = """
from mvdream_fast.rendering.opengl import new_context
context = new_context()
import triton
print(triton.__version__, context.info["GL_RENDERER"])
"""


def test_triton_can_be_imported_once_there_is_a_context():
    """Both bring an LLVM: in the wrong order the process would end by a signal, with all the tests after this one."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    try:
        new_context().release()
    except Exception as error:  # moderngl and its loaders raise many kinds
        pytest.skip(f"no OpenGL here: {error}")
    done = subprocess.run([sys.executable, "-c", CONTEXT_THEN_TRITON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-500:]}"
    assert done.stdout
