"""The furniture catalogue's names and tags in plain English."""

from pathlib import Path

import pytest

from mvdream_fast.rendering.catalogue import Entry
from mvdream_fast.rendering.furniture import furniture_noun, usable_tags


@pytest.mark.parametrize(
    ("name", "noun"),
    [
        ("Female", "woman"), ("Sitting male", "sitting man"), ("Hashtray", "ashtray"), ("Trunck", "trunk"),
        ("Short", "shorts"), ("Little bank", "small bench"), ("Mocassin", "moccasin"), ("Bill 20€", "banknote"),
        ("Yamaha YZR R6", "motorbike"), ("VW new beetle", "beetle car"), ("Apple iMac 1998", "computer"),
        ("Square type E plug", "wall outlet"), ("Double French window 3 panes", "double french window"),
        ("Frame Hôi An", "picture frame"), ("Table", "table"), ("car 02", "car"), ("123", "object"), ("", "object"),
        ("Teddy\x00 bear\n", "teddy bear"), ("Sony radio", "radio"), ("Apple tree", "apple tree"),
    ],
)  # fmt: skip
def test_nouns(name, noun):
    assert furniture_noun(name) == noun


def test_only_what_lies_in_a_catalogue_is_translated():
    assert Entry("a", "Socket", Path("a.sh3f"), member="socket/socket.obj").noun == "sock"
    assert Entry("a", "Socket", Path("socket.obj")).noun == "socket"


def test_tags_without_placeholders():
    assert usable_tags(("Blend Swap", "Seat", "16", "Adjustable"), "Office") == ("seat", "office")
