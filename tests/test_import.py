"""Importing the package is free: no torch, no numpy, no device; and the folder `kernels` isn't to be imported bare."""

import subprocess
import sys
from pathlib import Path

import pytest

import mvdream_fast

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "diffusers", "transformers", "triton", "PIL", "safetensors", "mvdream_fast._C")


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_import_loads_nothing_heavy():
    done = python(f"import sys, mvdream_fast; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_version_is_known_without_torch():
    done = python("import mvdream_fast, sys; print(mvdream_fast.__version__, 'torch' in sys.modules)")
    assert done.stdout.split() == [mvdream_fast.__version__, "False"]


BEFORE_TORCH = ["models.config", "models.tokenizer", "core.errors", "core.cli", "core.machine", "core.run_folder",
                "diffusion.schedule", "distill.recipes", "distill.request", "serve", "web.board"]  # fmt: skip


@pytest.mark.parametrize("module", BEFORE_TORCH)
def test_what_commands_need_before_torch_is_free_of_it(module):
    done = python(f"import sys, mvdream_fast.{module}; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("name", ["ops", "camera", "schedule", "kernels"])
def test_modules_are_found_on_first_use(name):
    done = python(f"import mvdream_fast; print(mvdream_fast.{name}.__name__)")
    assert done.stdout.strip().endswith(f".{name}"), done.stderr


def test_public_names_are_found_on_first_use():
    from mvdream_fast import pipeline

    assert mvdream_fast.MVDreamPipeline is pipeline.MVDreamPipeline
    assert set(mvdream_fast.__all__) <= set(dir(mvdream_fast))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mvdream_fast.nothing  # noqa: B018 (the access is the test)


def test_a_bare_import_of_kernels_is_of_no_use():
    done = python("import kernels; kernels.geglu")
    assert done.returncode != 0
    assert "import mvdream_fast.kernels instead" in done.stderr


def test_kernels_are_part_of_the_package():
    done = python("import mvdream_fast.kernels as k; print(k.__name__)", cwd=ROOT / "tests")
    assert done.stdout.strip() == "mvdream_fast.kernels", done.stderr
