"""Runs of several systems as one comparison: what is known of each, its means, and the table in Markdown.

The measures are judging.py's; the page is comparison_page.py's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvdream_fast.core.errors import UserError
from mvdream_fast.distill.child_run import Result, result_of
from mvdream_fast.distill.recipes import guided_views
from mvdream_fast.distill.request import Request
from mvdream_fast.evaluation.judging import Judge, evaluate_run, summary
from mvdream_fast.scene.asset import Asset

N_FRAMES = 36  # of a turn
SIZE = 160  # pixels a side of a frame

# What the tables have: key, head, format.
COLUMNS = (
    ("top1", "R-precision", ".2f"),
    ("azimuth_error_deg", "azimuth error (deg)", ".0f"),
    ("shows_front", "front seen", ".2f"),
    ("janus", "Janus", ".2f"),
    ("sharpness", "sharpness", ".2f"),
    ("fog", "fog", ".2f"),
    ("seconds", "time (s)", ".0f"),
    ("memory_gb", "memory (GB)", ".2f"),
    ("guided_views", "guided views", ".0f"),
)


@dataclass(frozen=True)
class Compared:
    """A run as the comparison shows it; `scores` and `frames` [N_FRAMES, SIZE, SIZE, 3] are None where it failed."""

    request: Request
    folder: Path
    result: Result
    scores: dict[str, Any] | None = None
    frames: np.ndarray | None = None

    @property
    def recipe(self) -> str:
        """The recipe's name."""
        return self.request.config.recipe

    def figures(self) -> dict[str, Any]:
        """What the tables show: the scores, and what the run cost; sharpness is over that of the model's own views."""
        cost = {"seconds": self.result.seconds, "memory_gb": self.result.peak_bytes / 2**30}
        return (self.scores or {}) | cost | {"guided_views": guided_views(self.request.config)}

    def to_dict(self, root: Path) -> dict[str, Any]:
        """For compare.json; the folder relative to `root`."""
        return self.figures() | {
            "prompt": self.request.prompt, "recipe": self.recipe, "seed": self.request.seed,
            "model": ", ".join(self.request.models()), "run": str(self.folder.relative_to(root)),
            "exit_code": self.result.exit_code, "message": self.result.message,
        }  # fmt: skip


def judged(request: Request, folder: Path, judge: Judge) -> Compared:
    """A run that has ended, with its scores and one turn of its asset; without both where it failed."""
    result = result_of(folder) or Result(1, message="the run has not ended")
    if result.exit_code:
        return Compared(request, folder, result)
    try:
        scores, _ = evaluate_run(folder, judge)
        frames = Asset.load(folder / "asset.safetensors").frames(N_FRAMES, SIZE)
    except UserError as error:  # a file was taken away, or damaged, since
        return Compared(request, folder, Result(error.exit_code, result.seconds, result.peak_bytes, str(error)))
    return Compared(request, folder, result, scores, frames)


def means(runs: Sequence[Compared]) -> dict[str, float]:
    """Of one recipe's runs: mean scores of those that finished, mean time, the largest memory, how many finished."""
    done = [run for run in runs if run.scores is not None]
    scores = summary([run.scores for run in done if run.scores]) if done else {}
    costs = [run.figures() for run in done]
    if costs:
        scores |= {
            "seconds": sum(cost["seconds"] for cost in costs) / len(costs),
            "memory_gb": max(cost["memory_gb"] for cost in costs),
            "guided_views": costs[0]["guided_views"],
        }
    return scores | {"finished": len(done), "runs": len(runs)}


def by_recipe(found: Sequence[Compared]) -> dict[str, list[Compared]]:
    """Each recipe's runs, in the order in which they were asked for."""
    return {recipe: [run for run in found if run.recipe == recipe] for recipe in dict.fromkeys(r.recipe for r in found)}


def number(values: dict[str, Any], key: str, form: str) -> str:
    """A figure as the tables write it."""
    value = values.get(key)
    return "-" if value is None else format(float(value), form)


def markdown(found: Sequence[Compared]) -> str:
    """The table of means, a row for each recipe."""
    heads = ["recipe", "finished", *(head for _, head, _ in COLUMNS)]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for recipe, runs in by_recipe(found).items():
        values = means(runs)
        cells = [recipe, f"{values['finished']} of {values['runs']}"]
        lines.append("| " + " | ".join([*cells, *(number(values, key, form) for key, _, form in COLUMNS)]) + " |")
    return "\n".join(lines) + "\n"
