"""Who works behind the page. One process draws four views and does nothing else, so that they come in seconds while
an asset grows: its model is loaded before the first prompt. The others grow assets and learn subjects, and let it go
first.

They are ordinary workers of the queue, and know nothing of the page.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mvdream_fast.core.run_folder import Interrupt
from mvdream_fast.jobs.job import Job
from mvdream_fast.jobs.local import Slot, Workers
from mvdream_fast.jobs.setup import Setup
from mvdream_fast.jobs.worker import Runner, Task

# A worker with nothing to do looks for work as often as it would beat, and a person waits for these: every second the
# drawer, which is alone with its kind and takes nobody for dead; every five the others, instead of ten.
DRAWER_EXPIRY_S, GROWER_EXPIRY_S = 5.0, 30.0
GROWERS_NICE = 5


@dataclass(frozen=True)
class Desk(Setup):
    """A worker's set-up that also says which model a prompt will most likely ask for."""

    model: str = "embedded"


def hire(desk: Desk, slots: list[Slot], say: Callable[[str], None]) -> list[Workers]:
    """All workers of a page, not started yet: a drawer at the first slot, a grower at each."""
    drawer = replace(desk, runners="mvdream_fast.web.staff:draws", expiry=DRAWER_EXPIRY_S)
    grower = replace(desk, runners="mvdream_fast.web.staff:grows", expiry=GROWER_EXPIRY_S)
    return [Workers(drawer, slots[:1], say), Workers(grower, slots, say)]


def draws(setup: Desk) -> dict[str, Runner]:
    """What the drawer does; its model is loaded and has drawn once by then."""
    from mvdream_fast.jobs import making

    draw = making.runners(setup)["generate"]
    with TemporaryDirectory() as folder:
        first = Job("generate", {"prompt": "a chair", "model": setup.model, "n_steps": 2})
        draw(Task(first, Path(folder), Interrupt(), _nothing, _nothing, _nothing, Path))
    return {"generate": draw}


def grows(setup: Desk) -> dict[str, Runner]:
    """What all others do."""
    from mvdream_fast.jobs import making

    os.nice(GROWERS_NICE)
    known = making.runners(setup)
    return {kind: known[kind] for kind in ("sds", "dreambooth")}


def _nothing(*_: Any) -> None:
    """Who is told of a drawing that nobody asked for."""
