"""What sharpens the end of a text-to-3D run: falling learning rates, opaque surfaces, repainted views, and all of them.

    python examples/repainting.py -o WORK [--docs docs] [--only NAME ...] [--prompts 5]

The first prompts of benchmarks/prompts.txt, seed 0. All variants of a prompt share the beginning of its run, which is
made once; WORK keeps it, every asset and its figures, so a second call goes on where the first was stopped. The
table of the variants that are done for every prompt goes into DOCS/ablations.md between its two marks, and another of
those that are done for the first two; the figure shows two views of each.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mvdream_fast.core.files import atomic_write
from mvdream_fast.core.images import to_image
from mvdream_fast.distill.config import SDSConfig
from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.recipes import resolve_config
from mvdream_fast.distill.state import RunState
from mvdream_fast.evaluation import measures, runs
from mvdream_fast.evaluation.evaluator import EVALUATOR_FOLDER, load_evaluator
from mvdream_fast.evaluation.judging import SIZE, TURN, Judge, read_prompts, turntable
from mvdream_fast.evaluation.reference import Reference
from mvdream_fast.pipeline import MVDreamPipeline

STEPS = 300
EARLY, LATE = 0.4, 0.7  # shares of the run: where variants begin to differ
SEARCHED = 2  # prompts that more variants are tried on


def falling(first: float) -> dict[str, Any]:
    """Learning rates that fall to a tenth."""
    return {"lr_decay": 0.1, "lr_decay_from": first}


def opaque(first: float, weight: float) -> dict[str, Any]:
    """The opaque loss, whole half-way to the end."""
    return {"lambda_opaque": (first * STEPS, 0.0, weight, 0.5 * (1 + first) * STEPS)}


def repaint(
    first: float, strength: tuple[float, float], every: int = 10, groups: int = 8, scale: float = 5.0
) -> dict[str, Any]:
    """Repainting, with the strengths at its beginning and at the end."""
    return {
        "repaint_from": first, "repaint_strength": strength, "repaint_every": every, "repaint_groups": groups,
        "repaint_scale": scale,
    }  # fmt: skip


# What is changed, and from which share of the run on.
VARIANTS: dict[str, tuple[float, dict[str, Any]]] = {
    "today's recipe": (LATE, {}),
    "40 %: falling rates, opaque 100": (EARLY, falling(EARLY) | opaque(EARLY, 100)),
    "40 %: falling rates, opaque 100, repainting 0.9 to 0.4": (
        EARLY,
        falling(EARLY) | opaque(EARLY, 100) | repaint(EARLY, (0.9, 0.4)),
    ),
    "70 %: falling rates": (LATE, falling(LATE)),
    "70 %: opaque 100": (LATE, opaque(LATE, 100)),
    "70 %: falling rates, opaque 100": (LATE, falling(LATE) | opaque(LATE, 100)),
    "70 %: repainting 0.5 to 0.2": (LATE, repaint(LATE, (0.5, 0.2))),
    "70 %: repainting 0.5 to 0.2, opaque 100": (LATE, repaint(LATE, (0.5, 0.2)) | opaque(LATE, 100)),
    "70 %: falling rates, opaque 300": (LATE, falling(LATE) | opaque(LATE, 300)),
    "70 %: falling rates, opaque 1000": (LATE, falling(LATE) | opaque(LATE, 1000)),
    "70 %: repainting 0.4 to 0.2, 3 groups, every 15, scale 7.5, opaque 300": (
        LATE,
        repaint(LATE, (0.4, 0.2), every=15, groups=3, scale=7.5) | opaque(LATE, 300),
    ),
    "70 %: repainting 0.6 to 0.4, 3 groups, every 30, opaque 300": (
        LATE,
        repaint(LATE, (0.6, 0.4), every=30, groups=3) | opaque(LATE, 300),
    ),
}
COLUMNS = {
    "fog": "fog", "sharpness": "sharpness", "top1": "R-precision", "similarity": "similarity",
    "azimuth_error_deg": "azimuth error (deg)",
}  # fmt: skip
BEGIN, END = "<!-- repainting: written by examples/repainting.py -->", "<!-- end of repainting -->"


def main() -> None:
    """Makes what is missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    flags.output.mkdir(parents=True, exist_ok=True)
    prompts = read_prompts()[: flags.prompts]
    maker = Maker(flags.output)
    for name in flags.only:
        for prompt in prompts:
            maker.make(name, prompt)
        print(line(name, [maker.figures(name, prompt) for prompt in prompts]), flush=True)
    if flags.docs is not None:
        write(flags.docs, maker, prompts)


class Maker:
    """Assets by variant and prompt, with their figures, in one folder."""

    def __init__(self, folder: Path):
        self.folder, self.pipeline = folder, MVDreamPipeline.from_pretrained("embedded", "cpu")
        reference = Reference.load(EVALUATOR_FOLDER)
        self.judge = Judge(load_evaluator(EVALUATOR_FOLDER), reference, read_prompts())

    def path(self, name: str, prompt: str, ending: str) -> Path:
        """Of a file of one asset."""
        return self.folder / f"{name}, {prompt}.{ending}".replace(" ", "-").replace(",", "")

    def figures(self, name: str, prompt: str) -> dict[str, Any]:
        """What was measured of an asset."""
        return json.loads(self.path(name, prompt, "json").read_text())

    def make(self, name: str, prompt: str) -> None:
        """One asset and its figures, unless they are there."""
        if self.path(name, prompt, "json").exists():
            return
        first, changes = VARIANTS[name]
        state = self._state(resolve_config("fast", steps=STEPS, **changes), prompt)
        state.restore(self._beginning(first, prompt))
        for step in range(round(first * STEPS), STEPS):
            state.step(step)
        asset, views = state.asset, self._views(prompt)
        shown, turn = asset.render(runs.orbit(4), SIZE).rgb.clamp(0, 1), asset.render(runs.orbit(TURN), SIZE)
        azimuths = torch.arange(TURN) * (360.0 / TURN)
        figures = {
            "fog": measures.fog(asset.render(runs.orbit(8), 128).opacity),
            "sharpness": measures.mean_gradient(shown) / measures.mean_gradient(views),
            **turntable(turn.rgb.clamp(0, 1), turn.opacity, azimuths, prompt, self.judge),
        }
        to_image(torch.cat([*shown], -1)).save(self.path(name, prompt, "png"))
        atomic_write(self.path(name, prompt, "json"), json.dumps(figures).encode())
        print(line(f"{name}: {prompt}", [figures]), flush=True)

    def _state(self, config: SDSConfig, prompt: str) -> RunState:
        return RunState(config, prompt, 0, new_guidance(self.pipeline, prompt, config, 0))

    def _beginning(self, share: float, prompt: str) -> dict[str, torch.Tensor]:
        """The state after a share of today's run; the later one goes on from the earlier one."""
        path, step = self.path(f"beginning {share}", prompt, "pt"), 0
        if not path.exists():
            state = self._state(resolve_config("fast", steps=STEPS), prompt)
            if share == LATE:
                state.restore(self._beginning(EARLY, prompt))
                step = round(EARLY * STEPS)
            for k in range(step, round(share * STEPS)):
                state.step(k)
            torch.save(state.state(), path)
        return torch.load(path)

    def _views(self, prompt: str) -> torch.Tensor:
        path = self.path("views", prompt, "pt")
        if not path.exists():
            torch.save(self.pipeline(prompt, 4, seed=0, warn=lambda _: None).tensor, path)
        return torch.load(path)


def line(name: str, figures: list[dict[str, Any]]) -> str:
    """A row of the table: means over the prompts that have a number."""
    cells = []
    for column in COLUMNS:
        known = [x[column] for x in figures if x[column] is not None]
        cells.append(f"{sum(known) / len(known):.3g}" if known else "")
    return f"| {name} | {' | '.join(cells)} |"


def write(docs: Path, maker: Maker, prompts: list[str]) -> None:
    """The tables between the marks of the page, and the figure beside it: a row for each variant."""

    def done(prompts: list[str]) -> list[str]:
        return [name for name in VARIANTS if all(maker.path(name, prompt, "json").exists() for prompt in prompts)]

    def table(names: list[str], prompts: list[str]) -> str:
        rows = [line(name, [maker.figures(name, prompt) for prompt in prompts]) for name in names]
        head = [f"| {len(prompts)} prompts | {' | '.join(COLUMNS.values())} |", "| --- " * (1 + len(COLUMNS)) + "|"]
        return "\n".join([*head, *rows])

    names, tried = done(prompts), done(prompts[:SEARCHED])
    parts = [table(names, prompts), "![each variant, each prompt](repainting.png)"]
    if len(tried) > len(names):
        parts.insert(1, table(tried, prompts[:SEARCHED]))
    text = (docs / "ablations.md").read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    body = "\n\n".join(parts)
    atomic_write(docs / "ablations.md", f"{before}\n{body}\n{after}".encode())
    picture = Image.new("RGB", (len(prompts) * 2 * SIZE, len(names) * SIZE))
    for i, name in enumerate(names):
        for j, prompt in enumerate(prompts):
            with Image.open(maker.path(name, prompt, "png")) as views:
                picture.paste(views.crop((0, 0, 2 * SIZE, SIZE)), (j * 2 * SIZE, i * SIZE))
    picture.save(docs / "repainting.png")


if __name__ == "__main__":
    main()
