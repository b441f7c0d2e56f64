"""Pictures of contests as SVG text: bars, a roofline and curves of cost against work.

They take their colours from the page's variables, so that they follow its dark mode, and say in `<title>` what they
show; the figures themselves stand in the tables beside them.
"""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mvdream_fast.benchmarking.figures import amount, number, seconds
from mvdream_fast.benchmarking.results import Contest, Limit, Results, Row

Point = tuple[float, float]
WIDTH, HEIGHT = 420, 300  # of a plot: a phone's width, so that letters keep their size there
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 18, 40
LINE = 12  # pixels from one name to the next
MARKS = {"reference": "square", "peer": "ring", "ours": "disc"}


def bar(row: Row, longest: float) -> str:
    """One contestant's time as a bar, its interquartile range as a line across the end. The cell beside it says it in
    figures, so readers that speak are spared it."""
    end, half = 100 * row.median_s / longest, 50 * row.spread_s / longest
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="{row.role}" y="1" width="{end:.2f}" height="8"/>'
        f'<rect class="range" x="{max(0.0, end - half):.2f}" y="4.5" width="{2 * half:.2f}" height="1"/></svg>'
    )


def roofline(results: Results) -> str:
    """GFLOP/s against operations a byte of every contestant that has both, under the machine's limit; empty without."""
    points = [
        (contest, row, (row.gflop_s / row.gb_s, row.gflop_s))
        for contest in results.contests
        for row in contest.rows
        if row.gflop_s and row.gb_s
    ]
    limits = [contest.limit for contest in results.contests if contest.limit]
    if not points or not limits:
        return ""
    roof = _best(limits)
    xs, ys = [x for _, _, (x, _) in points], [y for _, _, (_, y) in points]
    ridge = roof.multiply_add_gflop_s / roof.gather_gb_s
    axes = Axes.around([*xs, ridge], [*ys, roof.multiply_add_gflop_s])
    parts = [_slope(axes, "copy", roof.copy_gb_s, roof), _slope(axes, "gather", roof.gather_gb_s, roof)]
    for contest, row, point in sorted(points, key=lambda one: one[1].role == "ours"):
        words = f"{contest.name}, {row.name}: {number(point[1])} GFLOP/s at {number(point[0])} operations a byte"
        parts.append(axes.mark(point, row.role, words))
    return axes.svg(
        "Roofline: GFLOP/s against operations a byte, under the machine's multiply-add peak and its bandwidths",
        ("operations a byte", "GFLOP/s"),
        parts,
    )


def scaling(contest: Contest) -> str:
    """Seconds against work, a curve for each contestant, both axes logarithmic; empty where there is none."""
    if contest.scaling is None:
        return ""
    curves = contest.scaling.points
    axes = Axes.around([x for x, _ in _all(curves)], [y for _, y in _all(curves)])
    parts = []
    for i, (name, points) in enumerate(curves.items()):
        role = next((row.role for row in contest.rows if row.name.startswith(name)), "peer")
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in sorted(points))
        parts.append(f'<polyline class="curve {role} dash{i % 4}" points="{path}"/>')
        parts += [
            axes.mark((x, y), role, f"{name}: {seconds(y)} at {amount(x)} {contest.scaling.x}") for x, y in points
        ]
    parts += _names(axes, {name: max(points) for name, points in curves.items()})
    title = f"{contest.name}: seconds against {contest.scaling.x}"
    return axes.svg(title, (contest.scaling.x, "seconds"), parts)


@dataclass(frozen=True)
class Axes:
    """Two logarithmic axes, each over whole powers of ten."""

    low_x: int
    high_x: int
    low_y: int
    high_y: int

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float]) -> "Axes":
        """Axes that hold all of these."""
        return cls(*_decades(xs), *_decades(ys))

    def x(self, value: float) -> float:
        """Where a value lies from the left."""
        return LEFT + (math.log10(value) - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Where a value lies from the top."""
        return HEIGHT - BOTTOM - (math.log10(value) - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)

    def mark(self, point: Point, role: str, words: str) -> str:
        """A mark with its words, in the shape of its role: nothing is told by colour alone."""
        x, y = self.x(point[0]), self.y(point[1])
        if MARKS[role] == "square":
            shape = f'<rect class="mark {role}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7">'
            end = "</rect>"
        else:
            shape, end = f'<circle class="mark {role}" cx="{x:.1f}" cy="{y:.1f}" r="4">', "</circle>"
        return f"{shape}<title>{html.escape(words)}</title>{end}"

    def svg(self, title: str, names: tuple[str, str], parts: Sequence[str]) -> str:
        """The whole picture: grid, labels, `parts`."""
        label = html.escape(title, quote=True)
        body = "".join([*self._grid(), *parts])
        return (
            f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
            f'{body}<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(names[0])}</text>'
            f'<text transform="translate(12 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{html.escape(names[1])}'
            "</text></svg>"
        )

    def _grid(self) -> Iterator[str]:
        for power in range(self.low_x, self.high_x + 1):
            x = self.x(10.0**power)
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            yield f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{_power(power)}</text>'
        for power in range(self.low_y, self.high_y + 1):
            y = self.y(10.0**power)
            yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{_power(power)}</text>'


def _names(axes: Axes, ends: Mapping[str, Point]) -> Iterator[str]:
    """The names of curves beside their ends, one below the other where these lie close together."""
    free = 0.0
    for name, (x, y) in sorted(ends.items(), key=lambda end: -end[1][1]):
        place = max(axes.y(y) - 7, free)
        free = place + LINE
        yield f'<text class="name" x="{axes.x(x) - 6:.1f}" y="{place:.1f}">{html.escape(name)}</text>'


def _slope(axes: Axes, name: str, gb_s: float, roof: Limit) -> str:
    """A roof: bandwidth times operations a byte, up to the multiply-add peak."""
    peak = roof.multiply_add_gflop_s
    left = max(10.0**axes.low_x, 10.0**axes.low_y / gb_s)
    corners = [(left, left * gb_s), (peak / gb_s, peak), (10.0**axes.high_x, peak)]
    path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in corners)
    words = f"{name}: {number(gb_s)} GB/s, multiply-adds: {number(peak)} GFLOP/s"
    x, y = axes.x(peak / gb_s), axes.y(peak)
    return (
        f'<polyline class="roof {name}" points="{path}"><title>{words}</title></polyline>'
        f'<text class="name" x="{max(x - 6, LEFT + 32):.1f}" y="{y - 4:.1f}">{name}</text>'
    )


def _best(limits: Sequence[Limit]) -> Limit:
    """The best that any of the runs saw: a machine's limit is not lower for having been busy."""
    return Limit(
        max(limit.multiply_add_gflop_s for limit in limits),
        max(limit.copy_gb_s for limit in limits),
        max(limit.gather_gb_s for limit in limits),
    )


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low = math.floor(math.log10(min(values)) + 1e-9)
    return low, max(low + 1, math.ceil(math.log10(max(values)) - 1e-9))


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -2 <= power <= 3 else f'10<tspan dy="-4" font-size="8">{power}</tspan>'


def _all(curves: Mapping[str, Sequence[Point]]) -> list[Point]:
    return [point for points in curves.values() for point in points]
