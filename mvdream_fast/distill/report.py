"""One self-contained page of a text-to-3D run: the asset to turn, its images, curves, settings and times.

Opens from file:// without a network: images are data URIs, and trimesh's viewer brings its own three.js.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from mvdream_fast.core.errors import DivergedError
from mvdream_fast.core.files import atomic_write
from mvdream_fast.distill.config import settings_of
from mvdream_fast.distill.recipes import RECIPES
from mvdream_fast.distill.systems import SDS_PRESETS
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.mesh.animation import webp_bytes
from mvdream_fast.scene.mesh.export import viewer_html
from mvdream_fast.scene.mesh.mesh import Mesh

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222;background:#fafafa}
h1{font-size:1.5em} h2{font-size:1.1em;margin-top:2em} img{max-width:100%} iframe{width:100%;height:480px;border:0}
table{border-collapse:collapse} td,th{padding:.15em .9em .15em 0;text-align:left;vertical-align:top}
td:last-child{font-variant-numeric:tabular-nums} .row{display:flex;gap:1em;flex-wrap:wrap} .note{color:#666}
"""


def write_report(
    folder: Path, config: dict, records: list[dict], notes: Sequence[str] = (), mesh: Mesh | None = None
) -> Path:
    """Writes `folder/report.html` from what the run has left there so far; parts that are missing are left out.

    Args:
        config: the run's config.json. records: the lines of log.jsonl. notes: sentences to show on top. mesh: to turn.
    """
    previews = sorted((folder / "preview").glob("*.png"))
    images = {f"step {int(path.stem)}": _file_uri(path) for path in thin(previews, 6)}
    page = _page(
        config, records, notes, mesh, _file_uri(folder / "turntable.webp"), _file_uri(folder / "views.png"), images
    )
    path = folder / "report.html"
    atomic_write(path, page)
    return path


def asset_report(asset: Asset, records: list[dict[str, Any]], path: Path) -> Path:
    """The same page of an asset alone, as `asset.report("report.html")` writes it: without files of a run."""
    try:
        mesh = asset.mesh()
        notes = [mesh.describe()]
    except DivergedError as error:
        mesh, notes = None, [f"There is no mesh: {error}."]
    config = {"prompt": asset.prompt, "seed": asset.seed, "sds": asset.settings}
    turntable = _data_uri(webp_bytes(asset.frames()), "image/webp")
    atomic_write(path, _page(config, records, notes, mesh, turntable, "", {}))
    return path


def _page(
    config: dict, records: list[dict], notes: Sequence[str], mesh: Mesh | None, turntable: str, views: str,
    previews: dict[str, str],
) -> str:  # fmt: skip
    """The whole page; images are data URIs, "" where there is none."""
    title = html.escape(config.get("prompt", ""))
    stages = stages_of(config.get("sds", {}))
    parts = [f"<h1>{title}</h1>", *(f'<p class="note">{html.escape(note)}</p>' for note in notes)]
    parts += _section("The asset", _viewer(mesh), _image(turntable, "turntable"))
    parts += _section("Views sampled from the model", _image(views, "views"))
    parts += _section("How it grew", *(_image(uri, step) for step, uri in previews.items()))
    parts += _section("Stages", _table(_stages(stages), "steps", "what it optimised"))
    parts += _section("Curves", _curves(records))
    parts += _section("Where the time went", _table(time_split(records), "part of a step", "share"))
    events = {f"step {r['step'] + 1}": r["event"] for r in records if r.get("event")}
    parts += _section("What went wrong and was mended", _table(events, "", ""))
    about = {k: json.dumps(v) for k, v in config.items() if k != "sds" and not isinstance(v, dict)}
    parts += _section("Run", _table(about, "", ""))
    for number, settings in enumerate(stages, 1):
        of = f" of stage {number}" if len(stages) > 1 else ""
        differing = differences(settings, number)
        values = {name: json.dumps(value) for name, value in settings.items()}
        parts += _section(f"Settings{of} that differ from the recipe", _table(differing, "setting", "value (recipe's)"))
        parts += _section(f"All settings{of}", _table(values, "setting", "value"))
    parts += _section("Machine", _table(config.get("machine", {}), "", ""))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}<body>{"".join(parts)}</body></html>'


def stages_of(settings: dict | list[dict]) -> list[dict]:
    """The settings of each stage, as config.json holds them or an asset of the last one."""
    return settings if isinstance(settings, list) else settings.get("stages", [settings])


def _stages(stages: list[dict]) -> dict[str, str]:
    """What each of several stages made, by its steps."""
    if len(stages) < 2:
        return {}
    ends = [0, *accumulate(stage["steps"] for stage in stages)]
    spans = [f"{first + 1} to {last}" for first, last in pairwise(ends)]
    return dict(zip(spans, (f"{stage['shape']}, {stage['mode']} {stage['kind']}" for stage in stages), strict=True))


def differences(settings: dict, number: int = 1) -> dict[str, str]:
    """Settings of a stage, counted from 1, that are not its recipe's at this preset: the value, and the recipe's in
    brackets."""
    recipe, preset = RECIPES.get(settings.get("recipe", "mvdream")), settings.get("preset")
    stages = () if recipe is None or preset not in SDS_PRESETS else recipe.at(preset).stages
    if number > len(stages):
        return {}
    plain = json.loads(json.dumps(settings_of(stages[number - 1])))
    found = json.loads(json.dumps(settings))
    return {k: f"{json.dumps(v)} ({json.dumps(plain.get(k))})" for k, v in found.items() if v != plain.get(k)}


def time_split(records: list[dict]) -> dict[str, str]:
    """Share of all step time by part, largest first, and the seconds a step."""
    totals: dict[str, float] = {}
    for record in records:
        for name, seconds in record.get("seconds", {}).items():
            totals[name] = totals.get(name, 0.0) + seconds
    everything = sum(totals.values())
    if not everything:
        return {}
    split = {k: f"{100 * v / everything:.1f} %" for k, v in sorted(totals.items(), key=lambda item: -item[1])}
    return split | {"a step, on average": f"{everything / len(records):.3f} s"}


def thin(items: list, n: int) -> list:
    """At most n of the items, evenly spread, first and last included."""
    if len(items) <= n:
        return items
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def _section(title: str, *content: str) -> list[str]:
    parts = [part for part in content if part]
    return [f"<h2>{title}</h2>", '<div class="row">', *parts, "</div>"] if parts else []


def _data_uri(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _file_uri(path: Path) -> str:
    return _data_uri(path.read_bytes(), f"image/{path.suffix[1:]}") if path.exists() else ""


def _image(uri: str, title: str) -> str:
    return f'<img src="{uri}" alt="{html.escape(title)}" title="{html.escape(title)}">' if uri else ""


def _viewer(mesh: Mesh | None) -> str:
    """The mesh to turn, in a frame of its own that may run scripts and reach nothing else."""
    if mesh is None:
        return ""
    page = html.escape(viewer_html(mesh), quote=True)
    return f'<iframe sandbox="allow-scripts" title="the asset" srcdoc="{page}"></iframe>'


def _curves(records: list[dict]) -> str:
    """Loss, opacity and occupancy over the steps, as one SVG."""
    if len(records) < 2:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 2.6), layout="constrained")
    for i, name in enumerate(("loss", "opacity", "occupancy")):
        axes = figure.add_subplot(1, 3, i + 1)
        values = [float("nan") if r.get(name) is None else r[name] for r in records]
        axes.plot([r["step"] for r in records], values, linewidth=0.8)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        if name == "loss":
            axes.set_yscale("log")
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return f'<img src="{_data_uri(out.getvalue(), "image/svg+xml")}" alt="curves of loss, opacity and occupancy">'


def _table(rows: dict, left: str, right: str) -> str:
    if not rows:
        return ""
    body = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    head = f"<tr><th>{left}</th><th>{right}</th></tr>" if left else ""
    return f"<table>{head}{body}</table>"
