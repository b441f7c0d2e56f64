"""What a queue shows: one line, a live page that loads itself again, and a page of all assets with a search.

Both pages are whole files that link to what lies beside them, and open from file:// without a network.
"""

import html
from collections import Counter
from collections.abc import Sequence

from mvdream_fast.jobs.job import Job, State, Status
from mvdream_fast.jobs.store import Store

LIVE, SUMMARY = "progress.html", "index.html"
MOST = 200  # rows of each table of the live page
RELOAD_S = 2
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222;background:#fafafa}
h1{font-size:1.4em} h2{font-size:1.1em;margin-top:2em} a{color:#0b57a4} progress{width:100%;height:1.2em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums} td,th{padding:.15em 1em .15em 0;text-align:left}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(160px,1fr));gap:1em} figure{margin:0}
figure img,.none{width:100%;aspect-ratio:1;background:#ddd} .none{display:grid;place-items:center;text-align:center}
figcaption{font-size:.85em;overflow-wrap:anywhere} .note{color:#555} input{font:inherit;width:20em;max-width:100%}
"""
SCRIPT = """
const search = document.getElementById("search"), found = document.getElementById("found");
const figures = [...document.querySelectorAll("figure")];
function show() {
  const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let n = 0;
  for (const figure of figures) {
    figure.hidden = !words.every((word) => figure.dataset.words.includes(word));
    n += !figure.hidden;
  }
  found.textContent = `${n} of ${figures.length}`;
}
search.addEventListener("input", show);
show();
"""
Rows = Sequence[tuple[Job, Status]]


def line(rows: Rows, elapsed: float = 0.0, done_before: int = 0) -> str:
    """All of a queue in one line: "12 of 40 done, 4 running (56 %), 1 failed, 3.2 min left".

    Args: elapsed, the seconds in which what is done was made, all but `done_before`.
    """
    count = Counter(status.state for _, status in rows)
    running = [status.progress for _, status in rows if status.state == State.RUNNING]
    shares = [p.done / p.total for p in running if p.total]
    parts = [f"{count[State.DONE]} of {len(rows)} done"]
    if running:
        parts.append(f"{len(running)} running ({100 * sum(shares) / len(running):.0f} %)")
    parts += [f"{count[state]} {state}" for state in (State.FAILED, State.CANCELLED) if count[state]]
    made = count[State.DONE] - done_before + sum(shares)
    left = count[State.QUEUED] + len(running) - sum(shares)
    if elapsed and made > 0 and left:
        seconds = elapsed / made * left
        parts.append(f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.1f} min left")
    return ", ".join(parts)


def write_pages(store: Store, rows: Rows, told: str, live: bool = True) -> None:
    """Both pages, into the place of the queue. told: the line. live: the first loads itself again."""
    store.write(LIVE, live_page(rows, told, live).encode())
    store.write(SUMMARY, summary_page(rows, told).encode())


def live_page(rows: Rows, told: str, live: bool = True) -> str:
    """What is at work, what failed, and how much is left."""
    by_state = {state: [(j, s) for j, s in rows if s.state == state] for state in State}
    n_ended = len(rows) - len(by_state[State.QUEUED]) - len(by_state[State.RUNNING])
    parts = [
        f'<h1>{html.escape(told)}</h1><progress max="{max(1, len(rows))}" value="{n_ended}">{n_ended}</progress>',
        f'<p class="note"><a href="{SUMMARY}">The assets</a></p>',
    ]
    running = [
        (job.title, f"{s.progress.done} of {s.progress.total}" if s.progress.total else "", s.progress.message,
         s.worker, f"{s.seconds:.0f} s", str(s.attempt))
        for job, s in by_state[State.RUNNING]
    ]  # fmt: skip
    parts += _table("Running", ("prompt", "step", "at", "worker", "so far", "attempt"), running)
    failed = [(job.title, s.message, str(s.exit_code)) for job, s in by_state[State.FAILED]]
    parts += _table("Failed", ("prompt", "why", "code"), failed)
    parts += _table("Waiting", ("prompt", "kind"), [(job.title, job.kind) for job, _ in by_state[State.QUEUED]])
    reload = f'<meta http-equiv="refresh" content="{RELOAD_S}">' if live else ""
    return _page(told, reload, parts)


def summary_page(rows: Rows, told: str) -> str:
    """Every asset with its turntable, and what failed with its reason; a search over prompts and settings."""
    parts = [
        f'<h1>Assets</h1><p>{html.escape(told)} · <a href="{LIVE}">progress</a></p>'
        '<p><label>Search <input id="search" type="search"></label> <span id="found" role="status"></span></p>'
        '<div class="grid">'
    ]
    parts += [_figure(job, status) for job, status in rows if status.state in (State.DONE, State.FAILED)]
    parts.append(f"</div><script>{SCRIPT}</script>")
    return _page("Assets", "", parts)


def _figure(job: Job, status: Status) -> str:
    title, folder = html.escape(job.title), html.escape(str(status.result.get("folder", "")))
    words = html.escape(f"{job.title} {job.kind} {job.id} {job.request.get('seed', '')} {status.state}".lower())
    seed = f", seed {job.request['seed']}" if "seed" in job.request else ""
    if status.state != State.DONE:
        image, links = f'<div class="none">failed: {html.escape(status.message)}</div>', ""
    elif job.kind == "sds":
        image = f'<img loading="lazy" src="{folder}/turntable.webp" alt="{title}, turning">'
        links = f' · <a href="{folder}/report.html">report</a> · <a href="{folder}/mesh.glb">GLB</a>'
    elif job.kind == "generate":
        image, links = f'<img loading="lazy" src="{folder}/views.png" alt="{title}, four views">', ""
    else:
        image, links = f'<div class="none">{html.escape(job.kind)}</div>', f' · <a href="{folder}/">folder</a>'
    caption = f"{title}{html.escape(seed)}, {status.seconds:.0f} s{links}"
    return f'<figure data-words="{words}">{image}<figcaption>{caption}</figcaption></figure>'


def _table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in cells) + "</tr>"  # noqa: E731
    more = f'<p class="note">and {len(rows) - MOST} more</p>' if len(rows) > MOST else ""
    body = "".join(row(cells, "td") for cells in rows[:MOST])
    return [f"<h2>{title} ({len(rows)})</h2><table>{row(head, 'th')}{body}</table>{more}"]


def _page(title: str, head: str, parts: Sequence[str]) -> str:
    head = f'<meta charset="utf-8">{head}<title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'
