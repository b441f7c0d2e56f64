"""The files of a comparison: a self-contained page whose assets turn together, a grid of images, a table, all figures.

The page opens from file:// without a network; its assets are strips of rendered frames, so that it needs no WebGL and
shows what was optimised, not a mesh of it.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mvdream_fast.core.files import atomic_write
from mvdream_fast.core.images import png_bytes
from mvdream_fast.distill.config import settings_of
from mvdream_fast.distill.recipes import RECIPES
from mvdream_fast.evaluation.comparison import (
    COLUMNS,
    N_FRAMES,
    SIZE,
    Compared,
    by_recipe,
    markdown,
    means,
    number,
)

if TYPE_CHECKING:
    import PIL.Image

LABEL = 22  # pixels above a row of the grid
STYLE = f"""
body{{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222;background:#fafafa}}
h1{{font-size:1.5em}} h2{{font-size:1.1em;margin:2em 0 .5em}} .row{{display:flex;gap:1em;flex-wrap:wrap}}
figure{{margin:0;width:{SIZE}px}} figcaption{{font-size:.85em;overflow-wrap:anywhere}} .note{{color:#666}}
.asset{{width:{SIZE}px;height:{SIZE}px;cursor:grab;touch-action:pan-y;background-size:{N_FRAMES * SIZE}px {SIZE}px}}
.failed{{width:{SIZE}px;height:{SIZE}px;background:#ddd;display:grid;place-items:center;text-align:center}}
table{{border-collapse:collapse;font-variant-numeric:tabular-nums}} td,th{{padding:.15em .9em .15em 0;text-align:left}}
.turn{{position:sticky;top:0;background:#fafafa;padding:.5em 0}} input{{width:20em;vertical-align:middle}}
"""
SCRIPT = f"""
const turn = document.getElementById("turn"), assets = document.querySelectorAll(".asset"), n = {N_FRAMES};
let spinning = !matchMedia("(prefers-reduced-motion: reduce)").matches, from = null;
function show(frame) {{
  turn.value = ((Math.round(frame) % n) + n) % n;
  for (const asset of assets) asset.style.backgroundPosition = `${{-turn.value * {SIZE}}}px 0`;
}}
function stop() {{ spinning = false; }}
setInterval(() => {{ if (spinning) show(+turn.value + 1); }}, 100);
turn.addEventListener("input", () => {{ stop(); show(+turn.value); }});
document.getElementById("spin").addEventListener("click", () => {{ spinning = !spinning; }});
for (const asset of assets) asset.addEventListener("pointerdown", (event) => {{
  stop();
  from = {{ x: event.clientX, frame: +turn.value }};
  event.preventDefault();
}});
addEventListener("pointermove", (event) => {{ if (from) show(from.frame - (event.clientX - from.x) / 8); }});
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => {{ from = null; }});
addEventListener("keydown", (event) => {{
  const by = {{ ArrowLeft: -1, ArrowRight: 1 }}[event.key];
  if (by && event.target !== turn) {{ stop(); show(+turn.value + by); }}
}});
show(0);
"""


def write_comparison(folder: Path, found: Sequence[Compared]) -> str:
    """Writes compare.html, .png, .md and .json into `folder`, and returns the Markdown."""
    table = markdown(found)
    averages = {recipe: means(runs) for recipe, runs in by_recipe(found).items()}
    figures = {"runs": [run.to_dict(folder) for run in found], "means": averages}
    atomic_write(folder / "compare.json", json.dumps(figures, indent=2) + "\n")
    atomic_write(folder / "compare.md", table)
    atomic_write(folder / "compare.png", png_bytes(grid(found)))
    atomic_write(folder / "compare.html", page(found))
    return table


def by_prompt(found: Sequence[Compared]) -> dict[str, list[Compared]]:
    """The runs of each prompt, in order."""
    prompts = dict.fromkeys(run.request.prompt for run in found)
    return {prompt: [run for run in found if run.request.prompt == prompt] for prompt in prompts}


def grid(found: Sequence[Compared]) -> "PIL.Image.Image":
    """A row for each prompt, a column for each recipe: the front and, half a turn on, the back; grey where none is."""
    from PIL import Image, ImageDraw, ImageFont

    rows, n = by_prompt(found), len(by_recipe(found))
    font = ImageFont.load_default(14)
    image = Image.new("RGB", (n * 2 * SIZE, LABEL + len(rows) * (LABEL + SIZE)), "white")
    draw = ImageDraw.Draw(image)
    for column, recipe in enumerate(by_recipe(found)):
        draw.text((column * 2 * SIZE + 4, 3), recipe, "black", font)
    for row, (prompt, runs) in enumerate(rows.items()):
        top = LABEL + row * (LABEL + SIZE)
        draw.text((4, top + 3), prompt, "black", font)
        for column, run in enumerate(runs):
            left = column * 2 * SIZE
            if run.frames is None:
                draw.rectangle((left, top + LABEL, left + 2 * SIZE, top + LABEL + SIZE), "#dddddd")
                draw.text((left + 4, top + LABEL + 4), "failed", "black", font)
                continue
            for k, frame in enumerate((0, N_FRAMES // 2)):
                image.paste(Image.fromarray(run.frames[frame]), (left + k * SIZE, top + LABEL))
    return image


def page(found: Sequence[Compared]) -> str:
    """The whole page."""
    prompts = by_prompt(found)
    title = html.escape(f"{', '.join(by_recipe(found))}: {'; '.join(prompts)}"[:200])
    parts = [f"<h1>{'Systems side by side' if len(prompts) > 1 else html.escape(next(iter(prompts)))}</h1>"]
    parts.append(
        '<p class="turn"><label>Turn all <input id="turn" type="range" min="0" '
        f'max="{N_FRAMES - 1}" value="0"></label> <button id="spin">play / pause</button> '
        '<span class="note">or drag any asset, or press the arrow keys</span></p>'
    )
    if len(prompts) > 1:
        parts += ["<h2>Means over the prompts</h2>", _means_table(found)]
    for prompt, runs in prompts.items():
        parts += [f"<h2>{html.escape(prompt)}</h2>"] if len(prompts) > 1 else []
        parts.append(f'<div class="row">{"".join(map(_figure, runs))}</div>')
        parts += [_failure(run) for run in runs if run.frames is None]
        parts.append(_runs_table(runs))
    parts += ["<h2>Recipes</h2>", _recipes(found), "<h2>Settings in which they differ</h2>", _settings(found)]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}<body>{"".join(parts)}<script>{SCRIPT}</script></body></html>\n'


def _figure(run: Compared) -> str:
    caption = f"<figcaption>{html.escape(run.recipe)}</figcaption>"
    if run.frames is None:
        return f'<figure><div class="failed">failed</div>{caption}</figure>'
    label = html.escape(f"{run.request.prompt}, {run.recipe}", quote=True)
    image = f"background-image:url({_strip(run.frames)})"
    return f'<figure><div class="asset" role="img" aria-label="{label}" style="{image}"></div>{caption}</figure>'


def _failure(run: Compared) -> str:
    why = html.escape(f"{run.recipe} failed with exit code {run.result.exit_code}: {run.result.message}")
    return f'<p class="note">{why}</p>'


def _strip(frames: np.ndarray) -> str:
    """Frames [n, s, s, 3] beside each other, as a data URI."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(out, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def _means_table(found: Sequence[Compared]) -> str:
    rows = {}
    for recipe, runs in by_recipe(found).items():
        values = means(runs)
        finished = f"{values['finished']} of {values['runs']}"
        rows[recipe] = [finished, *(number(values, key, form) for key, _, form in COLUMNS)]
    return _table(["recipe", "finished", *(head for _, head, _ in COLUMNS)], rows)


def _runs_table(runs: Sequence[Compared]) -> str:
    rows = {run.recipe: [number(run.figures(), key, form) for key, _, form in COLUMNS] for run in runs}
    return _table(["recipe", *(head for _, head, _ in COLUMNS)], rows)


def _recipes(found: Sequence[Compared]) -> str:
    rows = {
        name: [RECIPES[name].paper, RECIPES[name].stages, ", ".join(runs[0].request.models())]
        for name, runs in by_recipe(found).items()
    }
    return _table(["recipe", "paper", "stages", "model"], rows)


def _settings(found: Sequence[Compared]) -> str:
    """Settings that are not the same for all, by recipe and stage; of a single one, all of them."""
    columns = {
        f"{recipe}, stage {number}" if number > 1 else recipe: settings_of(stage)
        for recipe, runs in by_recipe(found).items()
        for number, stage in enumerate(runs[0].request.config.stages, 1)
    }
    names = [
        name
        for name in dict.fromkeys(name for values in columns.values() for name in values)
        if len(columns) == 1 or len({json.dumps(values.get(name)) for values in columns.values()}) > 1
    ]
    rows = {name: [json.dumps(values.get(name)) for values in columns.values()] for name in names}
    return _table(["setting", *columns], rows)


def _table(heads: Sequence[str], rows: dict[str, list[str]]) -> str:
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in (name, *cells))}</tr>"
        for name, cells in rows.items()
    )
    return f"<table><tr>{top}</tr>{body}</table>"
