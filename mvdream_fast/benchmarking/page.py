"""A results file as one page: tables, bars, a roofline and curves. It opens from file://, without a script or a
network, on a phone and in the dark; whatever a picture shows stands in a table beside it."""

import html
import re
from collections.abc import Sequence
from itertools import groupby

from mvdream_fast.benchmarking import charts, tables
from mvdream_fast.benchmarking.figures import amount
from mvdream_fast.benchmarking.results import Contest, Results

STYLE = """
:root{color-scheme:light dark;--text:#1c1c1c;--back:#fcfcfc;--soft:#5a5a5a;--line:#d5d5d5;--ours:#0b63a8;--peer:#8a5a00;
--reference:#6e6e6e;--bad:#b00020;--good:#1b6e2c}
@media (prefers-color-scheme:dark){:root{--text:#e8e8e8;--back:#161616;--soft:#ababab;--line:#3d3d3d;--ours:#6cb6f2;
--peer:#e0b050;--reference:#a8a8a8;--bad:#ff8a94;--good:#7fd28d}}
body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:0 auto;padding:1em;color:var(--text);
background:var(--back);overflow-wrap:anywhere}
h1{font-size:1.5em} h2{font-size:1.2em;margin:2.2em 0 .3em} h3{font-size:1em;margin:1.2em 0 .3em}
a{color:var(--ours)} .note{color:var(--soft)} code{font-size:.9em} nav ul{columns:16em;padding-left:1.2em}
.wide{overflow-x:auto} table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
td,th{padding:.2em .9em .2em 0;text-align:left;border-bottom:1px solid var(--line);font-weight:normal}
thead th{color:var(--soft)} th[scope=row].ours{font-weight:bold} .missed{color:var(--bad);font-weight:bold}
.met{color:var(--good)} .words,th[scope=row]{min-width:8em}
.bar{width:8em;height:1em;display:block} .plot{width:100%;max-width:640px;height:auto}
.bar .ours{fill:var(--ours)} .bar .peer{fill:var(--peer)} .bar .reference{fill:var(--reference)}
.bar .range{fill:var(--text)} svg text{font:11px system-ui,sans-serif;fill:var(--text)} .name{text-anchor:end}
.grid{stroke:var(--line)} .roof,.curve{fill:none;stroke:var(--text);stroke-width:1.5} .roof.gather{stroke-dasharray:6 3}
.curve.ours{stroke:var(--ours)} .curve.peer{stroke:var(--peer)} .curve.reference{stroke:var(--reference)}
.dash1{stroke-dasharray:6 3} .dash2{stroke-dasharray:2 3} .dash3{stroke-dasharray:8 3 2 3}
.mark.ours{fill:var(--ours)} .mark.reference{fill:var(--reference)}
.mark.peer{fill:var(--back);stroke:var(--peer);stroke-width:2}
"""
KEY = (
    "A disc is ours, a square the plain reference, a ring a peer. The full line is the roof of copying and "
    "multiply-adds, the dashed one that of gathering from a hash table, the best of all that the contests saw beside "
    "them. Pointing at a mark names it; the tables below hold the same figures."
)


def page(results: Results) -> str:
    """The whole page."""
    groups = [(name, list(contests)) for name, contests in groupby(results.contests, key=lambda one: one.group)]
    parts = [
        f"<h1>How fast, on {html.escape(results.machine.cpu)}</h1>",
        _about(results),
        _goals(results),
        _roof(results),
    ]
    parts.append(_contents([name for name, _ in groups]))
    parts += [_group(results, name, contests) for name, contests in groups]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>mvdream_fast, how fast: {html.escape(results.name)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _about(results: Results) -> str:
    words = (
        "Contestants of one table did the same work on the same numbers and took turns in one run: medians, with the "
        "interquartile range as the spread. The machine's limit was measured in the same run."
    )
    return f"<p>{_prose(tables.about(results))} {_prose(tables.limits(results))}</p><p>{words}</p>"


def _goals(results: Results) -> str:
    rows = tables.goal_cells(results.contests)
    if not rows:
        return ""
    missed = sum(word == tables.MISSED for word, *_ in rows)
    body = [
        [f'<td class="{word}">{word}</td>', *map(_cell, cells), f'<th scope="row">{_link(contest)}</th>']
        for word, *cells, contest in rows
    ]
    heading = f"<h2>Goals: {len(rows) - missed} met, {missed} missed</h2>"
    return heading + _table(tables.GOALS, body, "goals")


def _roof(results: Results) -> str:
    picture = charts.roofline(results)
    return f'<h2>How far from the machine\'s limit</h2>{picture}<p class="note">{KEY}</p>' if picture else ""


def _contents(groups: Sequence[str]) -> str:
    items = "".join(f'<li><a href="#{_anchor(name)}">{html.escape(name)}</a></li>' for name in groups)
    return f'<h2>Contests</h2><nav aria-label="contests"><ul>{items}</ul></nav>'


def _group(results: Results, name: str, contests: Sequence[Contest]) -> str:
    parts = [f'<h2 id="{_anchor(name)}">{html.escape(name)}</h2>']
    for contest in contests:
        parts += [f'<h3 id="{_anchor(contest.name)}">{html.escape(contest.what)}</h3>', _contestants(contest)]
        if contest.work:
            work = ", ".join(f"{key.replace('_', ' ')} {amount(value)}" for key, value in contest.work.items())
            parts.append(f'<p class="note">Work: {html.escape(work)}.</p>')
        if contest.scaling:
            parts += [charts.scaling(contest), _scaling(contest)]
    parts += [f'<p class="note">{_prose(line)}</p>' for line in [tables.left_out(contests)] if line]
    return "\n".join([*parts, f"<p><code>{html.escape(tables.command(results, contests))}</code></p>"])


def _contestants(contest: Contest) -> str:
    """A row for each contestant, with a bar in it."""
    heads, rows = tables.contestant_cells(contest)
    longest = max(row.median_s + row.spread_s / 2 for row in contest.rows)
    body = [
        [
            f'<th scope="row" class="{row.role}">{html.escape(name)}</th>',
            f"<td>{charts.bar(row, longest)}</td>",
            *map(_cell, cells),
        ]
        for row, (name, *cells) in zip(contest.rows, rows)
    ]
    return _table([heads[0], "", *heads[1:]], body, contest.name)


def _scaling(contest: Contest) -> str:
    heads, rows = tables.scaling_cells(contest)
    body = [[f'<th scope="row">{name}</th>', *map(_cell, cells)] for name, *cells in rows]
    return _table(heads, body, f"{contest.name}, cost against work")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    """A table that scrolls by itself where it is wider than a phone, by the keyboard, too."""
    top = "".join(f'<th scope="col">{html.escape(head)}</th>' if head else "<td></td>" for head in heads)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    label = html.escape(name, quote=True)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{label}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """A cell; a figure and its unit stay together, a sentence has room."""
    if text[:1].isdigit():
        return f"<td>{html.escape(text).replace(' ', '&nbsp;')}</td>"
    return f'<td class="words">{html.escape(text)}</td>' if text else "<td></td>"


def _link(name: str) -> str:
    return f'<a href="#{_anchor(name)}">{html.escape(name)}</a>'


def _prose(text: str) -> str:
    """A sentence of Markdown, whose only mark is that of code."""
    return re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text))


def _anchor(name: str) -> str:
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower().replace("+", " and ")))
