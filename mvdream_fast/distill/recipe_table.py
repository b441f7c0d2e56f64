"""The table of recipes that `sds --list-recipes` prints; no torch here.

Times are those of finished runs on this machine, never guesses.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvdream_fast.core import machine
from mvdream_fast.core.errors import UserError
from mvdream_fast.core.files import parse_json, read_json, read_lines
from mvdream_fast.distill.recipes import RECIPES, guided_views
from mvdream_fast.distill.request import Request, read_run
from mvdream_fast.distill.systems import SDS_PRESETS

if TYPE_CHECKING:
    from rich.table import Table

LOOKED_AT = 100  # run folders, the newest first
SMALL = ("mini", "fast")  # the sizes for the models that ship
HEADS = ("recipe", "paper", "stages", "model", "guided views", "time here")


def print_recipes(root: Path) -> None:
    """Prints the table, with the times of the runs under `root`."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(measured(root)))
    console.print(
        "model: what it needs, and the one of this package that it takes unless --model (for later stages "
        "--refine-model) names another; guided views: how many it is asked about, with and without the prompt, at the "
        "presets "
        f"{', '.join(SMALL)} and paper; time here: of the steps of the last finished run under {root} on this machine",
        style="dim",
    )


def table(seconds: dict[tuple[str, str], float]) -> "Table":
    """A row for each recipe; seconds: of a run, by recipe and preset."""
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE, title="recipes", title_justify="left")
    for head in HEADS:
        out.add_column(head, no_wrap=head == "recipe")
    for name, recipe in RECIPES.items():
        views = ", ".join(str(guided_views(recipe.at(size))) for size in (*SMALL, "paper"))
        times = [f"{size} {seconds[name, size]:.0f} s" for size in SDS_PRESETS if (name, size) in seconds]
        priors = [recipe.prior, *([recipe.refine] if recipe.refine else [])]
        model = "; then ".join(f"{prior.needs}; {prior.embedded}" for prior in priors)
        out.add_row(name, recipe.paper, recipe.stages, model, views, ", ".join(times) or "-")
    return out


def measured(root: Path) -> dict[tuple[str, str], float]:
    """Seconds of the steps of the newest finished run of each recipe and preset, as the recipe has it, made here."""
    found: dict[tuple[str, str], float] = {}
    for folder in _newest(root):
        try:
            run, record = read_run(folder), read_json(folder / "config.json")
            if _is_plain(run) and _was_made_here(record) and (folder / "asset.safetensors").exists():
                found.setdefault((run.config.recipe, run.config.preset), seconds_of(folder))
        except UserError:  # an older version's, or no run at all
            continue
    return found


def seconds_of(folder: Path) -> float:
    """What the steps of a run took together, by its log.jsonl. Raises InputFileError."""
    path = folder / "log.jsonl"
    records = [parse_json(line, str(path)) for line in read_lines(path)]
    return sum(sum(record["seconds"].values()) for record in records)


def _newest(root: Path) -> Iterator[Path]:
    places = sorted(root.glob("*/*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return (path.parent for path in places[:LOOKED_AT])


def _is_plain(run: Request) -> bool:
    recipe = RECIPES[run.config.recipe]
    models = (recipe.prior.embedded, recipe.refine.embedded if recipe.refine else "")
    return run.config == recipe.at(run.config.preset) and (run.model, run.refine_model) == models


def _was_made_here(record: dict[str, Any]) -> bool:
    there, here = record.get("machine", {}), machine.about()
    return "resumed" not in record and all(there.get(name) == here[name] for name in ("processor", "cores"))
