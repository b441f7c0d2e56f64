"""The page's colours have the contrast that WCAG 2.2 asks for at level AA, in both schemes."""

import re

import pytest

from mvdream_fast.web.app import page_file

BLOCKS = re.findall(r":root \{(.*?)\}", page_file("style.css").decode(), re.DOTALL)
LIGHT, DARK = (dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in BLOCKS)
TEXT = [("ink", "paper"), ("ink", "card"), ("soft", "paper"), ("soft", "card"), ("accent", "paper"), ("accent", "card"),
        ("on-accent", "accent"), ("bad", "bad-tint"), ("ink", "tint")]  # fmt: skip
EDGES = [("edge", "card"), ("edge", "paper"), ("accent", "rule"), ("accent", "card")]


def luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_hand():
    assert contrast("#fff", "#000000") == pytest.approx(21.0)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", [LIGHT, LIGHT | DARK], ids=["light", "dark"])
def test_text_and_edges_can_be_seen(scheme):
    assert {pair: round(contrast(scheme[pair[0]], scheme[pair[1]]), 2) for pair in TEXT
            if contrast(scheme[pair[0]], scheme[pair[1]]) < 4.5} == {}  # fmt: skip
    assert {pair: round(contrast(scheme[pair[0]], scheme[pair[1]]), 2) for pair in EDGES
            if contrast(scheme[pair[0]], scheme[pair[1]]) < 3.0} == {}  # fmt: skip


def test_white_on_the_waiting_tile_can_be_read():
    assert contrast("#fff", "#55585c") > 4.5
