"""Runs Triton kernels on CPU tensors where there is no GPU; import it before anything that loads a kernel.

Triton's interpreter scans and patches its whole language module at every call of a device function; once patched, it
stays patched until the launch ends, so the scans of the nested calls are skipped here, and so are its checks of every
integer operation for overflow (together most of the time; offsets have tests of their own).
"""

import os
from dataclasses import replace

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Triton's own library is interpreted or not from its first import on; tests/conftest.py sets this before any.
    os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl  # noqa: E402

if DEVICE == "cpu":
    from triton.runtime import interpreter

    assert isinstance(tl.zeros, interpreter.InterpretedFunction), "triton was imported before tests/triton_on_cpu.py"

    _patch_lang = interpreter._patch_lang

    def _patch_once(fn):
        modules = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        unpatched = any(tl.core.is_builtin(x.load) for x in modules)
        return _patch_lang(fn) if unpatched else interpreter._LangPatchScope()

    interpreter._patch_lang = _patch_once
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)

from mvdream_fast.kernels._attention_tiles import Tile  # noqa: E402

# Attention tiles for tests, of which few tokens give several.
SMALL = Tile(16, 16, 4, 1)
SMALL_AHEAD = SMALL._replace(AHEAD=True)

# Random cases of an op: those of every run, among which is each value of each choice that any op draws (6 and 120 bring
# the last of them), and those that the slow campaign adds.
DRAWN = (6, 120, *range(2, 200, 3))
CAMPAIGN = sorted({*range(1000)} - {*DRAWN})
