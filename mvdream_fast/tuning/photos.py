"""Photographs of one subject: found in a folder, checked, turned upright, made square, and handed out as 2D batches.

What is made of them is dreambooth.py's. Listing a folder imports neither torch nor Pillow.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.core.processes import ALONE, Ranks

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from mvdream_fast.core.rng import Stream
    from mvdream_fast.data.batches import Batch

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp")
HEIC_SUFFIXES = (".heic", ".heif")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # whatever the ending says
NEEDS_HEIF = "HEIC, which needs pillow-heif; pip install 'mvdream_fast[heic]', or save as JPEG"
MAX_PHOTOS = 50
MAX_BYTES = 64 << 20  # of a file
MAX_PIXELS = 64_000_000  # of an image; decoding one takes about 12 bytes a pixel
CUT_OUT_SHARE = 0.01  # of the pixels that are more than half transparent: a stray or soft one makes no cut-out
MIN_ALPHA = 26  # of 255; an image without a more solid pixel shows nothing
Fit = Literal["auto", "crop", "pad"]


def list_photos(folder: Path, say: Callable[[str], None] = lambda _: None) -> list[Path]:
    """The photos of a folder by name. What is passed over, `say` is told in one sentence: hidden files, folders, other
    formats, and HEIC where pillow-heif is not installed.

    Raises: InputFileError where there is no such folder, or no photo in it, or more than MAX_PHOTOS, or one that is no
    file or larger than MAX_BYTES.
    """
    try:
        entries = sorted(folder.iterdir())
    except NotADirectoryError:
        raise InputFileError(f"{folder} must be a folder of photos, got a file; name the folder it lies in") from None
    except OSError as error:
        raise InputFileError(f"cannot read the folder of photos {folder}: {error.strerror}") from error
    reasons = {path: _passed_over(path) for path in entries}
    photos = [path for path, reason in reasons.items() if not reason]
    told = _told(reasons)
    if not photos:
        raise InputFileError(
            f"{folder} must hold PNG, JPEG, WebP or HEIC photos, got none among {len(entries)} entries{told}"
        )
    if told:
        say(f"{len(entries) - len(photos)} of the {len(entries)} entries of {folder} are passed over{told}")
    if len(photos) > MAX_PHOTOS:
        raise InputFileError(f"{folder} must hold 1 to {MAX_PHOTOS} photos, got {len(photos)}; keep the clearest")
    for path in photos:
        _check_file(path)
    return photos


def _passed_over(path: Path) -> str:
    """Why an entry of the folder is no photo to use; empty for a photo."""
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        return "hidden"
    if suffix in SUFFIXES or (suffix in HEIC_SUFFIXES and _has_heif()):
        return ""
    if suffix in HEIC_SUFFIXES:
        return NEEDS_HEIF
    return "a folder, not looked into" if path.is_dir() else "no PNG, JPEG, WebP or HEIC"


def _told(reasons: dict[Path, str]) -> str:
    """Each reason with how many it is and the first of their names."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        by_reason.setdefault(reason, []).append(path.name)
    by_reason.pop("", None)
    groups = [
        f"{len(names)} {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for reason, names in by_reason.items()
    ]
    return f": {'; '.join(groups)}" if groups else ""


def _has_heif() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():
            raise InputFileError(f"{path} must be a photo, got a folder or a device; move it elsewhere")
        size = path.stat().st_size
    except OSError as error:
        raise InputFileError(f"cannot read the photo {path}: {error.strerror}") from error
    if size > MAX_BYTES:
        raise InputFileError(f"{path} must be at most {MAX_BYTES >> 20} MB, got {size / 2**20:.0f} MB; save it smaller")


def load_photo(path: Path, size: int, fit: Fit = "auto") -> np.ndarray:
    """One photo as straight-alpha RGBA, [size, size, 4] uint8; of an animation the first frame. Colour profiles are
    not applied.

    The EXIF orientation is. `crop` takes the square in the middle; `pad` adds transparent borders, which are the
    training grey later; `auto` pads a cut-out (CUT_OUT_SHARE of it transparent) and crops any other.

    Raises: InputFileError for a file that cannot be decoded, that shows nothing, or of more than MAX_PIXELS; nothing of
    it is decoded then.
    """
    import numpy as np
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is the stricter one
            with Image.open(path, formats=_formats(path)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputFileError(_too_large(path, f"{image.width} x {image.height}"))
                photo = np.array(_square(image, size, fit))
    except InputFileError:
        raise
    except Image.DecompressionBombError:
        raise InputFileError(_too_large(path, "far more")) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise InputFileError(f"{path} cannot be read as PNG, JPEG, WebP or HEIC: {error}; leave it out") from error
    if photo[..., 3].max() < MIN_ALPHA:
        raise InputFileError(f"{path} shows nothing: its square is transparent all over; leave it out")
    return photo


def _formats(path: Path) -> tuple[str, ...]:
    """Pillow's names of what the file may be. Its HEIC reader is registered when the first such file comes."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] != b"ftyp" or head[8:] not in HEIC_BRANDS:
        return ("PNG", "JPEG", "WEBP")
    if not _has_heif():
        raise InputFileError(f"{path} is {NEEDS_HEIF}")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return ("HEIF",)


def _too_large(path: Path, got: str) -> str:
    return f"{path} must have at most {MAX_PIXELS // 1_000_000} million pixels, got {got}; make it smaller"


def _square(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    """Upright, square, RGBA, `size` pixels a side. A small image is enlarged."""
    from PIL import Image, ImageOps

    image.draft(None, (2 * size, 2 * size))  # a JPEG is decoded at a fraction of its size where that is enough
    image = ImageOps.exif_transpose(_to_rgba(image))
    if fit == "auto":
        transparent = sum(image.getchannel("A").histogram()[:128])
        fit = "pad" if transparent >= CUT_OUT_SHARE * image.width * image.height else "crop"
    if fit == "crop":  # first, as a long strip that is enlarged as a whole takes gigabytes
        side = min(image.size)
        left, top = ((whole - side) / 2 for whole in image.size)
        return image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    scale = size / max(image.size)
    shape = [max(1, round(side * scale)) for side in image.size]
    image = image.resize(shape, Image.Resampling.LANCZOS)  # Pillow weighs colours by their alpha
    left, top = ((size - side) // 2 for side in image.size)
    out = Image.new("RGBA", (size, size), (128, 128, 128, 0))
    out.paste(image, (left, top))
    return out


def _to_rgba(image: Image.Image) -> Image.Image:
    """Any mode to RGBA with its EXIF kept; 16-bit greys are scaled, which Pillow's own conversion would clip."""
    if image.mode.startswith("I;16") or image.mode == "I":
        import numpy as np
        from PIL import Image

        exif, clear = image.getexif(), image.info.get("transparency")
        levels = np.asarray(image).astype(np.uint32)
        grey = (levels // 257).clip(0, 255).astype(np.uint8)
        is_clear = levels == clear if isinstance(clear, int) else np.zeros_like(levels, bool)
        image = Image.fromarray(np.dstack([grey, np.where(is_clear, 0, 255).astype(np.uint8)]), "LA")
        image.info["exif"] = exif.tobytes()
    return image.convert("RGBA")


class PhotoSource:
    """2D batches of a few images of one subject, all under one caption, without cameras.

    Args: images [n, 3, Hp, Wp] in [-1, 1], or their latents where `encoded`; caption.
    """

    def __init__(self, images: Tensor, caption: str, encoded: bool = False):
        self.images, self.caption, self.encoded = images, caption, encoded

    def batch(self, stream: Stream, n_scenes: int, n_views: int, multi_view: bool, ranks: Ranks = ALONE) -> Batch:
        """n_scenes*n_views images: every one of them as often as any other, in an order of the stream's."""
        from mvdream_fast.data.batches import Batch

        if multi_view:
            raise ValueError("PhotoSource: multi_view must be False, got True; photos have no cameras")
        rows = ranks.part(draw(len(self.images), n_scenes * n_views, stream))
        return Batch(self.images[rows], None, [self.caption] * len(rows), 1, self.encoded)


def draw(total: int, n: int, stream: Stream) -> list[int]:
    """n indices below total, each as often as any other give or take one."""
    rounds: Sequence[list[int]] = [stream.permutation(total).tolist() for _ in range(-(-n // total))]
    return [i for row in rounds for i in row][:n]
