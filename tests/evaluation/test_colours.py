"""Whether views have the colours that a prompt names: of flat images whose colours are known, and of no image."""

import pytest
import torch

from mvdream_fast.data.captions import TARGETS
from mvdream_fast.evaluation.colours import asked, kept


def views(*colours, share=0.5):
    """One view of the first colour above the second, the background's or none, and which pixels show them."""
    images, masks = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 8, 8, dtype=torch.bool)
    rows = round(8 * share)
    for at, colour in zip((slice(rows), slice(rows, 8)), colours):
        images[0, :, at] = torch.tensor(TARGETS[colour])[:, None, None]
        masks[0, at] = True
    return images, masks


def test_colours_are_read_as_captions_name_them():
    assert asked("A Red car.") == {"red"}
    assert asked("a grey and beige bus, 3d asset") == {"gray", "beige"}
    assert asked("a redwood table") == asked("") == frozenset()


@pytest.mark.parametrize("colour", TARGETS)
def test_what_recolouring_paints_with_is_kept(colour):
    assert kept(*views(colour), f"a {colour} chair") == 1.0
    other = "red" if colour != "red" else "blue"
    assert kept(*views(other), f"a {colour} chair") == 0.0


def test_of_two_colours_each_counts_half():
    images, masks = views("red", "blue")
    assert kept(images, masks, "a red and blue chair") == 1.0
    assert kept(images, masks, "a red and green chair") == 0.5
    assert kept(images, masks, "a chair") is None


def test_a_colour_that_a_caption_would_not_say_is_none():
    images, masks = views("red", "blue", share=0.9)
    assert kept(images, masks, "a blue chair") == 0.0
    assert kept(images, masks, "a red chair") == 1.0


def test_the_background_and_an_empty_image_say_nothing():
    images, masks = views("green", share=0.25)
    assert kept(images, masks, "a gray chair") == 0.0  # though most of the image is
    assert kept(images, torch.zeros_like(masks), "a green chair") == 0.0
