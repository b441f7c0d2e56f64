"""Numbers as bytes, images, sheets and PNG files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mvdream_fast.core.images import png_bytes, sheet, to_bytes, to_image


@pytest.mark.parametrize("kind", [torch.tensor, np.array, lambda x: torch.tensor(x, requires_grad=True)])
def test_numbers_are_rounded_and_cut_off(kind):
    found = to_bytes(kind([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 1.0, 7.0]))
    assert found.dtype == np.uint8
    assert found.tolist() == [0, 0, 0, 1, 128, 255, 255]  # 127.5 goes to the even number


def test_an_image_and_its_png():
    image = to_image(torch.tensor([[[1.0, 0.0]], [[0.0, 0.2]], [[0.0, 1.0]]]))  # one row of two pixels
    again = Image.open(io.BytesIO(png_bytes(image)))
    assert again.format == "PNG"
    for found in (image, again):
        assert (found.size, found.getpixel((0, 0)), found.getpixel((1, 0))) == ((2, 1), (255, 0, 0), (0, 51, 255))


def test_a_sheet_has_its_images_in_rows():
    """Two rows of three images of 1 x 2 pixels; each image is as grey as its number."""
    numbers = torch.arange(6.0).view(2, 3, 1, 1, 1).expand(2, 3, 3, 1, 2)
    found = np.asarray(sheet(numbers / 255))
    assert found.shape == (2, 6, 3)
    assert found[..., 0].tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]


def test_an_image_lies_the_right_way_in_a_sheet():
    one = torch.arange(6.0).view(1, 2, 3).expand(3, 2, 3) / 255
    assert np.asarray(sheet(one[None, None]))[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]
