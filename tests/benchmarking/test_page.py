"""The page of a results file: whole, by itself, and with every figure of its pictures in words."""

import dataclasses
import itertools
import re
from html.parser import HTMLParser

import pytest
from sample_results import FIELD, GEGLU, MARCH, RESULTS

from mvdream_fast.benchmarking import charts
from mvdream_fast.benchmarking.page import page

VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Elements with their attributes, the text, and whether every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def html():
    return page(RESULTS)


@pytest.fixture(scope="module")
def read(html):
    return Reader(html)


def test_every_tag_is_closed(read):
    assert read.open == []


def test_nothing_is_loaded_from_elsewhere(html, read):
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in read.elements}
    assert not re.search(r"https?://|url\(|@import", html)


def test_links_lead_to_headings(read):
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"] for attributes in read.all("a")} <= {f"#{name}" for name in ids}


def test_phones_and_dark_mode(html, read):
    assert {"name": "viewport", "content": "width=device-width,initial-scale=1"} in read.all("meta")
    assert "prefers-color-scheme:dark" in html
    assert all(
        div["tabindex"] == "0" and div["aria-label"] for div in read.all("div")
    )  # wide tables scroll by keyboard


def test_pictures_have_words_and_bars_stand_beside_figures(read):
    for svg in read.all("svg"):
        assert svg.get("aria-label") or svg.get("aria-hidden") == "true"
    assert [svg["aria-label"].split(":")[0] for svg in read.all("svg") if "aria-label" in svg] == [
        "Roofline",
        "field forward",
    ]
    for figure in ("4.00\xa0ms", "1.25x", "2.00\xa0ms", "64\xa0MB", "170\xa0ms", "30\xa0%", "47.0"):
        assert figure in read.text


def test_goals_are_counted_and_missed_ones_are_missed(html, read):
    assert "Goals: 1 met, 1 missed" in read.text
    assert html.count('<td class="missed">missed</td>') == 1


def test_text_from_a_file_is_text():
    evil = dataclasses.replace(MARCH, group='<script>"&')
    assert "<script" not in page(dataclasses.replace(RESULTS, contests=(evil,)))


def test_what_is_not_there_is_left_out():
    bare = Reader(page(dataclasses.replace(RESULTS, contests=(MARCH,))))
    assert "Goals" not in bare.text
    assert "limit of" not in bare.text
    assert [svg for svg in bare.all("svg") if "aria-label" in svg] == []


def test_bars_by_hand():
    """Half as long for half of the time; the range is centred on the end."""
    reference, _, ours = GEGLU.rows
    assert '<rect class="reference" y="1" width="100.00"' in charts.bar(reference, 4e-3)
    assert '<rect class="ours" y="1" width="50.00"' in charts.bar(ours, 4e-3)
    assert '<rect class="range" x="48.75" y="4.5" width="2.50"' in charts.bar(ours, 4e-3)


def test_axes_by_hand():
    axes = charts.Axes.around([2, 900], [0.01, 10])
    assert axes == charts.Axes(0, 3, -2, 1)
    assert axes.x(1) == charts.LEFT
    assert axes.x(1000) == charts.WIDTH - charts.RIGHT
    assert axes.y(0.01) == charts.HEIGHT - charts.BOTTOM
    assert axes.y(10) == charts.TOP
    assert charts.Axes.around([5], [10]) == charts.Axes(0, 1, 1, 2)  # one point, and a power of ten


def test_a_roof_bends_where_bandwidth_meets_the_peak():
    """100 GFLOP/s at 20 GB/s: at five operations a byte, at 5 GB/s at twenty."""
    picture = charts.roofline(RESULTS)
    axes = charts.Axes.around([2 / 3, 10, 20], [2, 100])
    for gb_s in (20, 5):
        assert f"{axes.x(100 / gb_s):.1f},{axes.y(100):.1f}" in picture
    assert "geglu (2048, 1024) forward, ours: 4.00 GFLOP/s at 0.667 operations a byte" in picture
    assert picture.count("<circle") == 4  # three of ours, one peer
    assert picture.count('<rect class="mark reference"') == 1


def test_a_curve_goes_through_its_points():
    picture = charts.scaling(FIELD)
    axes = charts.Axes.around([1e4, 1e6], [2e-3, 0.17])
    path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in FIELD.scaling.points["ours"])
    assert f'<polyline class="curve ours dash1" points="{path}"/>' in picture
    assert "<title>ours: 170 ms at 1,000,000 samples</title>" in picture
    assert charts.scaling(GEGLU) == ""


def test_names_of_curves_do_not_cover_each_other():
    points = {name: ((1e4, 1e-3), (1e6, seconds)) for name, seconds in {"ours": 0.2, "a": 0.201, "b": 9.0}.items()}
    picture = charts.scaling(dataclasses.replace(FIELD, scaling=dataclasses.replace(FIELD.scaling, points=points)))
    heights = sorted(float(y) for y in re.findall(r'<text class="name" x="[\d.]+" y="([\d.]+)"', picture))
    assert len(heights) == 3
    assert all(b - a >= charts.LINE for a, b in itertools.pairwise(heights))
