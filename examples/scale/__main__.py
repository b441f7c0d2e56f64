"""`python examples/scale`: 1 to 1,000 GPUs at text to 3D, rendering and training, simulated.

Prints the tables of docs/scale.md; `--docs docs` puts them there, and the picture beside them. Every number that it is
given is a flag, and a row of the first table. Seconds on a CPU, no GPU; the same seed, the same bytes.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).parents[1])  # examples/, so that this folder is found as a package

import tyro  # noqa: E402 (the path comes first)

from mvdream_fast.core import cli  # noqa: E402
from mvdream_fast.core.files import atomic_write  # noqa: E402
from scale.inputs import Inputs  # noqa: E402
from scale.report import Report  # noqa: E402


@dataclass(frozen=True)
class Flags:
    """Simulates 1 to 1,000 GPUs at text to 3D, rendering and training; prints the tables of docs/scale.md."""

    inputs: Annotated[Inputs, tyro.conf.arg(name="")]
    docs: Path | None = None
    """folder whose scale.md gets the tables, and scale.webp the picture"""
    seed: int = 0
    """of failures and of all that varies"""


def placed(page: str, name: str, table: str) -> str:
    """The page with a table between its two marks. Raises ValueError where they are not there."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    found, n = re.subn(pattern, lambda match: f"{match[1]}\n{table}\n{match[2]}", page, count=1, flags=re.DOTALL)
    if not n:
        raise ValueError(f"the page has no place for the table {name}")
    return found


def main(flags: Flags) -> None:
    report = Report(flags.inputs, flags.seed)
    page = flags.docs / "scale.md" if flags.docs else None
    text = page.read_text(encoding="utf-8") if page else ""
    for name, table in report.tables():
        print(f"{name}\n\n{table}", flush=True)
        text = placed(text, name, table) if page else ""
    if page:
        atomic_write(page, text.encode())
        report.draw(page.with_name("scale.webp"))


if __name__ == "__main__":
    cli.run(main, Flags, prog="scale", command="python examples/scale")
