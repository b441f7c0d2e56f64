"""What a worker makes of text-to-3D jobs, in the sizes of tests: few frames of a turn, few steps for the first views."""

import os
import signal
import time
from functools import partialmethod
from pathlib import Path

from mvdream_fast.jobs import asset, making
from mvdream_fast.jobs.setup import Setup
from mvdream_fast.jobs.worker import Runner
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.asset import Asset


def runners(setup: Setup) -> dict[str, Runner]:
    """As making.runners, quick; each worker leaves its process number in PLACE.pids, for those who kill."""
    Asset.turntable = partialmethod(Asset.turntable, n_frames=2)
    call = MVDreamPipeline.__call__
    MVDreamPipeline.__call__ = lambda *given, **named: call(*given, **named | {"n_steps": 2})
    asset.has_video = lambda: False
    asset.write_report = lambda *_: None
    pids = Path(f"{setup.place}.pids")
    pids.mkdir(exist_ok=True)
    (pids / str(os.getpid())).touch()
    return making.runners(setup)


def dying(setup: Setup) -> dict[str, Runner]:
    """A worker that dies right after its start."""
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}
