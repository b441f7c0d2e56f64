"""Words: colours from pixels, nouns, articles, plurals, variants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvdream_fast.data import captions as C


@pytest.mark.parametrize("name", C.TARGETS)
@pytest.mark.parametrize("light", [0.85, 1.0, 1.1])
def test_what_is_painted_in_a_color_is_named_so(name, light):
    rgb = np.clip(np.array(C.TARGETS[name]) * light, 0, 1)
    assert C.NAMES[C.color_names(rgb)[0]] == name


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((255, 0, 0), "red"), ((128, 0, 0), "red"), ((0, 128, 0), "green"), ((0, 0, 128), "blue"),
        ((255, 255, 0), "yellow"), ((255, 165, 0), "orange"), ((128, 0, 128), "purple"), ((255, 192, 203), "pink"),
        ((139, 69, 19), "brown"), ((245, 222, 179), "beige"), ((210, 180, 140), "beige"), ((128, 128, 128), "gray"),
        ((255, 255, 255), "white"), ((0, 0, 0), "black"), ((30, 30, 34), "black"), ((0, 128, 128), "blue"),
        ((85, 107, 47), "green"), ((255, 105, 180), "pink"), ((240, 240, 245), "white"),
    ],
)  # fmt: skip
def test_colors_have_their_common_names(rgb, name):
    assert C.NAMES[C.color_names(np.array(rgb) / 255)[0]] == name


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_every_color_has_one_name_and_shares_sum_to_one(rgb):
    table = C.shares(np.array(rgb))
    assert sum(table.values()) == pytest.approx(1)
    assert list(table.values()) == sorted(table.values(), reverse=True)
    assert 1 <= len(C.mentioned(table)) <= 2


def test_at_most_two_colors_and_only_large_ones():
    assert C.mentioned({"red": 0.5, "blue": 0.3, "green": 0.2}) == ("red", "blue")
    assert C.mentioned({"red": 0.8, "blue": 0.2}) == ("red",)
    assert C.mentioned({"red": 0.21, "blue": 0.2, "green": 0.2, "pink": 0.2, "brown": 0.19}) == ("red",)
    assert C.mentioned({}) == ()


def test_bright_colors_count_more_than_dull_ones():
    assert C.mentioned({"black": 0.5, "gray": 0.3, "yellow": 0.2}) == ("black", "yellow")


@pytest.mark.parametrize(
    ("name", "noun"),
    [
        ("Table", "table"), ("car 02", "car"), ("123", "object"), ("", "object"), ("Teddy\x00 bear\n", "teddy bear"),
        ("Stuhl mit 3 Füßen", "stuhl mit 3 füßen"), ("椅子", "椅子"), ("box 2 0", "box"), ("r2d2", "r2d2"),
        # The furniture catalogue's translations are for its own names only.
        ("Short", "short"), ("Socket", "socket"), ("Hood", "hood"), ("Cone", "cone"), ("Tool", "tool"),
        ("Sofa 2 seats", "sofa 2 seats"), ("Apple pie", "apple pie"), ("VW new beetle", "vw new beetle"),
    ],
)  # fmt: skip
def test_nouns_of_files(name, noun):
    assert C.noun(name) == noun


@pytest.mark.parametrize(
    ("colors", "name", "expected"),
    [
        (("red",), "chair", "a red chair"),
        (("orange", "white"), "sofa", "an orange and white sofa"),
        ((), "armchair", "an armchair"),
        ((), "urinal", "a urinal"),
        ((), "umbrella", "an umbrella"),
        ((), "utensil", "a utensil"),
        ((), "suv", "an suv"),
        (("red",), "tulips", "red tulips"),
        (("white", "green"), "tulips", "white and green tulips"),
        ((), "keys", "keys"),
        ((), "bus", "a bus"),
        ((), "beer glass", "a beer glass"),
        ((), "cactus", "a cactus"),
        (("brown",), "bread", "brown bread"),
        (("white",), "white lily", "a white lily"),
        (("red",), "chair with cushions", "a red chair with cushions"),
        (("black",), "pool table", "a black pool table"),
    ],
)
def test_captions(colors, name, expected):
    assert C.caption(colors, name) == expected


def test_variants_are_other_true_captions():
    texts = C.variants(("red", "white"), "chair", "wooden", ("seat", "chair", "office"))
    assert texts == [
        "a chair", "a red chair", "a red and white wooden chair", "a wooden chair",
        "a red and white chair, seat", "a red and white chair, office",
    ]  # fmt: skip
    assert C.caption(("red",), "wooden bench", "wooden") == "a red wooden bench"
    assert C.caption((), "glass table", "glass") == "a glass table"


@pytest.mark.parametrize(
    ("phrase", "left"),
    [
        ("white house with a red roof", "house"), ("house with a flat roof", "house with a flat roof"),
        ("black, blue and yellow tang fish", "tang fish"), ("blue whale", "blue whale"),
        ("gray and wooden chest", "wooden chest"), ("dark wooden chair", "wooden chair"), ("orange", "orange"),
        ("sliced orange", "sliced orange"), ("orange with leaves", "orange with leaves"), ("red panda", "red panda"),
        ("hooded rogue in green", "hooded rogue"), ("jar with yellow liquid", "jar"), ("golden crown", "crown"),
        ("row of red, white and green books", "row of books"), ("man in red shorts", "man"),
        ("reddish box", "reddish box"),
    ],
)  # fmt: skip
def test_what_is_left_of_a_phrase_without_its_colors(phrase, left):
    assert C.without_colors(phrase) == left


@pytest.mark.parametrize(
    ("colors", "name", "expected"),
    [
        (("red",), "small barn", "a small red barn"), (("blue",), "three banners", "three blue banners"),
        (("red",), "open round box", "an open round red box"), ((), "man in shorts", "a man in shorts"),
        (("green",), "grass", "green grass"), ((), "lens", "a lens"), ((), "small", "a small"),
    ],
)  # fmt: skip
def test_sizes_and_numbers_come_before_colors(colors, name, expected):
    assert C.caption(colors, name) == expected


def test_shapes_and_other_names_are_variants():
    texts = C.variants(("red",), "sofa", None, (), "long")
    assert texts == [
        "a sofa", "a long red sofa", "a long sofa", "a red couch", "a couch", "a red settee", "a settee",
    ]  # fmt: skip
    assert "a tall small sofa" not in C.variants((), "small sofa", None, (), "tall")


def test_material_needs_more_than_half():
    assert C.material_word([("Wood_01", 0.4), ("oak leg", 0.2), ("Chrome", 0.4)]) == "wooden"
    assert C.material_word([("Wood_01", 0.5), ("Chrome", 0.5)]) is None
    assert C.material_word([]) is None


@given(st.text(max_size=500))
@settings(max_examples=200, deadline=None)
def test_clean_text_is_printable(text):
    out = C.clean(text)
    assert out == out.strip()
    assert len(out) <= 300
    assert out.isprintable()
