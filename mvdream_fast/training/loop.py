"""The loop around every trainer: log lines, checkpoints, reports, signals; and the sheet that the reports draw.

The optimisations themselves are unet.py, vae.py, evaluator.py and tuning/dreambooth.py.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mvdream_fast.core import run_folder, sharded_checkpoint
from mvdream_fast.core.errors import DivergedError
from mvdream_fast.core.images import png_bytes, sheet
from mvdream_fast.core.processes import ALONE, Ranks, is_sharded
from mvdream_fast.core.progress import Every

Report = Callable[[], dict[str, float]]  # validates, draws sheets; the figures for the log


@dataclass(frozen=True)
class LoopOptions:
    """When the loop stops, and what it writes on the way (minutes of wall time, or steps; 0 = never).

    rate_flag: by which a run that goes on may be given another learning rate; "" where the rate stays as it was begun.
    """

    steps: int
    checkpoint_minutes: float = 5.0
    sheet_minutes: float = 15.0
    log_every: int = 10
    checkpoint_steps: int = 0
    report_steps: int = 0
    rate_flag: str = ""


class Loop:
    """Runs a trainer to a number of steps: log lines, checkpoints, and `report` every so often.

    Works on anything with `step`, `train_step()`, `check_weights()`, `ahead`, `state()`, `like()` and `meta()`. Of
    several processes the first one's clock counts, and it alone writes, but for sharded checkpoints.
    """

    def __init__(self, trainer, folder: Path, options: LoopOptions, report: Report | None = None, ranks: Ranks = ALONE):
        self.trainer, self.folder, self.options, self.report, self.ranks = trainer, folder, options, report, ranks
        self.log = run_folder.JsonlLog(folder / "log.jsonl")
        self.checkpoints = folder / "checkpoints"

    def resume(self) -> bool:
        """Continues from the folder's latest checkpoint; False where there is none."""
        latest = run_folder.load_latest(self.checkpoints, self.trainer.like())
        if latest is None:
            return False
        self.trainer.restore(*latest)
        if self.ranks.first:
            self.log.truncate_after(self.trainer.step)
        return True

    def save(self) -> None:
        """Writes a checkpoint of the trainer as it is: a file, or each process its share of a sharded one.

        Raises DivergedError for weights that are not finite: the checkpoint before stays the latest.
        """
        self.trainer.check_weights()
        step, state, meta = self.trainer.step, self.trainer.state(), self.trainer.meta()
        if any(map(is_sharded, state.values())):
            sharded_checkpoint.save(self.checkpoints, run_folder.LATEST, step, state, meta, self.ranks)
        elif self.ranks.first:
            run_folder.save_checkpoint(self.checkpoints, step, state, meta)

    def run(self) -> int:
        """Trains until `steps` or until a signal asks to stop; leaves a checkpoint then. Returns the exit code.

        Raises DivergedError where loss, gradients, weights or a figure of the log are not finite; it says what to do.
        """
        try:
            return self._run()
        except DivergedError as error:
            raise DivergedError(f"{error}; {self._remedy()}") from error

    def _run(self) -> int:
        options, window, since, stopped = self.options, [], time.monotonic(), 0
        saving, reporting = Every(60 * options.checkpoint_minutes), Every(60 * options.sheet_minutes)
        with run_folder.Interrupt() as interrupt:
            while self.trainer.step < options.steps and not stopped:
                window.append(self.trainer.train_step())
                if self.trainer.step % options.log_every == 0:
                    now = time.monotonic()
                    self._log(window, (now - since) / len(window))
                    window, since = [], now
                show = self._due(reporting, options.report_steps)
                save = self._due(saving, options.checkpoint_steps)
                stopped, show, save = self.ranks.largest(interrupt.exit_code, show, save)
                if show and self.report:
                    self._report()
                    reporting.begin()
                    since = time.monotonic()
                if save:
                    self.save()
                    saving.begin()
                    since = time.monotonic()
            stopped = self.ranks.largest(interrupt.exit_code)[0]
        self.trainer.ahead.close()
        self.save()
        if self.report and not stopped:
            self._report()
        return stopped

    def _due(self, every: Every, steps: int) -> int:
        """1 where the time is over, or the step is one of every `steps`; the last step has its own save and report.

        The first process' clock counts.
        """
        at_step = steps > 0 and self.trainer.step % steps == 0 and self.trainer.step < self.options.steps
        return int(self.ranks.first and (at_step or every.due()))

    def _log(self, window: list[dict[str, float]], seconds: float) -> None:
        means = {key: sum(w[key] for w in window) / len(window) for key in window[0]}
        self._say({"seconds_per_step": seconds, **means})

    def _report(self) -> None:
        if self.report is not None:
            self.trainer.check_weights()
            self._say(self.report())

    def _say(self, record: dict[str, float]) -> None:
        if not self.ranks.first:
            return
        check_figures(self.trainer.step, record)
        self.log.write({"step": self.trainer.step, **record})
        print(f"step {self.trainer.step}: " + " ".join(f"{k} {x:.4g}" for k, x in record.items()), flush=True)

    def _remedy(self) -> str:
        """What to do about a run that has diverged, so that it works: from which checkpoint, or anew."""
        flag, folder = self.options.rate_flag, self.checkpoints
        if not flag:
            return "begin again with a smaller learning rate"
        if not (folder / run_folder.LATEST).exists():
            return f"begin again with a smaller {flag}"
        if (step := run_folder.latest_step(folder)) < self.trainer.step:
            return f"go on from step {step} by --resume with a smaller {flag}"
        # The same weights would fail in the same way: a step's batch doesn't depend on the rate.
        if older := run_folder.older_checkpoint(folder):
            return f"write '{older}' into {folder / run_folder.LATEST} and go on by --resume with a smaller {flag}"
        return f"begin again in another folder with a smaller {flag}"


def check_figures(step: int, figures: Mapping[str, float]) -> None:
    """Raises DivergedError, naming the first of the figures that is not finite."""
    for name, x in figures.items():
        if not math.isfinite(x):
            raise DivergedError(f"{name} is {x} at step {step}")


def save_samples(folder: Path, step: int, images: Tensor) -> None:
    """Writes samples/STEP.png, with one row for each prompt of [B, V, 3, Hp, Wp] in [0, 1]."""
    (folder / "samples").mkdir(exist_ok=True)
    run_folder.atomic_write(folder / "samples" / f"{step:06d}.png", png_bytes(sheet(images)))
