"""Images of materials: decoded under caps to RGBA, and shrunk in linear light to what a render can show."""

import io
from dataclasses import replace

import numpy as np

from mvdream_fast.core.color import to_linear, to_srgb
from mvdream_fast.core.images import to_bytes
from mvdream_fast.rendering.mesh import MeshError, Texture

# Of Pillow's formats those of textures whose size is known before they are decoded: an EPS it hands to Ghostscript, a
# program, and in an ICO lie further images.
FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "TGA", "DDS", "JPEG2000", "PPM", "PCX", "PSD", "SGI",
)  # fmt: skip
MAX_TEXTURE_PIXELS = 8192 * 8192
TEXTURE_SIZE = 512


def decode(content: bytes, formats: tuple[str, ...] = FORMATS) -> np.ndarray:
    """[h, w, 4] uint8 with sides of at most TEXTURE_SIZE; colour profiles and EXIF rotations are not applied (glTF).

    `formats` are Pillow's names of those that are taken. Raises: MeshError for what is too large or no such image.
    """
    from PIL import Image

    known = [kind for kind in formats if readable(kind)]
    # Pillow's own limit would come first, as a warning or with another sentence.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(io.BytesIO(content), formats=known) as image:
            if image.width * image.height > MAX_TEXTURE_PIXELS:
                raise MeshError(f"a texture has {image.width} x {image.height} pixels; make it smaller")
            return _shrunk(_rgba(image))
    except (OSError, ValueError, SyntaxError) as error:
        raise MeshError(f"a texture is damaged, or not {', '.join(formats)} ({error})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def readable(kind: str) -> bool:
    """Whether Pillow reads that kind of image: AVIF came with 11.3."""
    from PIL import Image

    Image.init()
    return kind in Image.OPEN


def _rgba(image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's conversion would clip at 255
        grey = np.round(np.asarray(image).astype(np.float64).clip(0, 65535) / 257).astype(np.uint8)
        return np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    return np.asarray(image.convert("RGBA"))


def _shrunk(pixels: np.ndarray) -> np.ndarray:
    """Box means of linear light: those of sRGB values would darken fine patterns."""
    from PIL import Image

    height, width = pixels.shape[:2]
    if max(height, width) <= TEXTURE_SIZE:
        return pixels
    size = (min(TEXTURE_SIZE, width), min(TEXTURE_SIZE, height))
    values = np.arange(256, dtype=np.float32) / 255
    tables = [to_linear(values).astype(np.float32)] * 3 + [values]
    planes = [
        np.asarray(Image.fromarray(table[pixels[..., i]]).resize(size, Image.Resampling.BOX))
        for i, table in enumerate(tables)
    ]
    small = np.dstack([*map(to_srgb, planes[:3]), planes[3]])
    return to_bytes(small)


def with_alpha(base: np.ndarray | None, alpha: np.ndarray) -> np.ndarray:
    """`base` [h, w, 4] (white where there is none) with another image's `alpha` [h', w'], brought to its size."""
    from PIL import Image

    if base is None:
        return np.dstack([np.full((*alpha.shape, 3), 255, np.uint8), alpha])
    size = (base.shape[1], base.shape[0])
    return np.dstack([base[..., :3], np.asarray(Image.fromarray(alpha).resize(size, Image.Resampling.BILINEAR))])


def mirrored(texture: Texture, axes: tuple[bool, bool]) -> Texture:
    """A texture that repeats in turn as it is and mirrored, along u and v: its period is twice the image."""
    pixels, uv = texture.pixels, texture.uv
    if axes[0]:
        pixels, uv = np.concatenate([pixels, pixels[:, ::-1]], 1), uv * np.array([0.5, 1], np.float32)
    if axes[1]:
        pixels, uv = np.concatenate([pixels, pixels[::-1]], 0), uv * np.array([1, 0.5], np.float32)
    return replace(texture, pixels=pixels, uv=uv)
