"""Numbers in [0, 1] as images: bytes, PIL images, sheets of them, PNG files. Torch is not imported here."""

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import PIL.Image
    from torch import Tensor

GREY = 0.5  # the background that models are mostly trained on


def to_bytes(x: "Tensor | np.ndarray") -> np.ndarray:
    """Numbers in [0, 1], those beyond cut off, as uint8 0 to 255 of the same shape, rounded (halves to even)."""
    x = x if isinstance(x, np.ndarray) else x.detach().float().cpu().numpy()
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


def to_image(image: "Tensor") -> "PIL.Image.Image":
    """An image [3, Hp, Wp] in [0, 1]."""
    from PIL import Image

    return Image.fromarray(to_bytes(image.movedim(0, -1)))


def sheet(rows: "Tensor") -> "PIL.Image.Image":
    """One image of many, [rows, columns, 3, Hp, Wp] in [0, 1]."""
    return to_image(rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2))


def png_bytes(image: "PIL.Image.Image") -> bytes:
    """A PIL image as a PNG file's content."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
