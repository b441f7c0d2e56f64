"""The sds command for tests: run in the process of the test, in sizes of a moment; what a run left, and its bytes."""

import hashlib
from functools import partialmethod
from pathlib import Path

import pytest

from mvdream_fast import sds
from mvdream_fast.core import cli
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.asset import Asset

QUICK = ["--render-size", "8", "--mesh-resolution", "24", "--device", "cpu", "--threads", "1", "--dtype", "float32"]
SETTLED = ["--preset", "mini", "--recipe", "mvdream", *QUICK]  # one stage, a volume


def command(*arguments: str, whole: bool = False) -> int:
    """The exit code of the command, run in this process.

    whole: with 120 frames of a turn and 25 steps for the first views, which are most of the work of so small a run.
    """
    call = MVDreamPipeline.__call__
    with pytest.MonkeyPatch.context() as short:
        if not whole:
            short.setattr(Asset, "turntable", partialmethod(Asset.turntable, n_frames=4))
            short.setattr(MVDreamPipeline, "__call__", lambda *given, **named: call(*given, **named | {"n_steps": 2}))
        try:
            cli.run(sds.main, sds.Flags, prog="sds", argv=list(arguments))
        except SystemExit as stop:
            return stop.code or 0
    return 0


def latest() -> Path:
    return Path("outputs/latest").resolve()


def digest(folder: Path) -> str:
    """Of everything that the optimisation made."""
    state = Asset.load(folder / "asset.safetensors").state()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def uninterrupted(arguments: list[str]) -> str:
    """The digest of the same run without trouble, made where `outputs/latest` does not point to."""
    assert command(*arguments, "-o", "whole", whole=True) == 0
    return digest(Path("whole"))
