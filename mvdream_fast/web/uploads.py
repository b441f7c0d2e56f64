"""Photos from a browser: decoded, made square and small, and written again as PNG under names of our own.

What was sent is never kept: no name, no place where it was taken, nothing but the pixels.
"""

import contextlib
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from mvdream_fast.core.errors import ArgumentError, InputFileError, OutputError
from mvdream_fast.core.files import atomic_write, make_folder, remove_stale
from mvdream_fast.core.images import png_bytes
from mvdream_fast.tuning.photos import MAX_PHOTOS, load_photo

SIZE = 512  # pixels a side, twice what the largest model draws
MAX_KEPT = 400  # photos that wait to be learned; the oldest go first
NAME = re.compile(r"[0-9a-f]{16}")


class Uploads:
    """The photos in `folder`/photos, and the sets of them that are learned in `folder`/sets."""

    def __init__(self, folder: Path):
        self._photos, self._sets = folder / "photos", folder / "sets"
        self._one_at_a_time = threading.Lock()  # a large one takes hundreds of MB while it is decoded

    def add(self, data: bytes) -> str:
        """Keeps a photo, and returns its name. Raises InputFileError for what is none, or too large."""
        with self._one_at_a_time:
            make_folder(self._photos)
            remove_stale(self._photos)
            png = self._encoded(data)
            name = hashlib.sha256(png).hexdigest()[:16]
            atomic_write(self._photos / f"{name}.png", png)
            self._forget_the_oldest()
        return name

    def _encoded(self, data: bytes) -> bytes:
        from PIL import Image

        raw = self._photos / f"raw.tmp-{os.getpid()}"
        try:
            _keep(raw, data)
            return png_bytes(Image.fromarray(load_photo(raw, SIZE)))
        except InputFileError as error:
            raise InputFileError(str(error).replace(str(raw), "this file")) from None
        finally:
            with contextlib.suppress(OSError):
                raw.unlink(missing_ok=True)

    def _forget_the_oldest(self) -> None:
        kept = sorted(self._photos.glob("*.png"), key=lambda path: path.stat().st_mtime)
        for path in kept[:-MAX_KEPT]:
            path.unlink(missing_ok=True)

    def path(self, name: str) -> Path | None:
        """A photo's file, None where there is none of this name."""
        if not NAME.fullmatch(name):
            return None
        path = self._photos / f"{name}.png"
        return path if path.is_file() else None

    def collect(self, names: Sequence[str]) -> Path:
        """A folder with copies of these photos, the same for the same ones.

        Raises: ArgumentError for none, too many, or one that is not there.
        """
        names = sorted(set(names))
        if not 1 <= len(names) <= MAX_PHOTOS:
            raise ArgumentError(f"1 to {MAX_PHOTOS} photos can be learned, got {len(names)}; choose others")
        folder = self._sets / hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]
        with self._one_at_a_time:
            if not folder.is_dir():
                self._copy(names, folder)
        return folder

    def _copy(self, names: Sequence[str], folder: Path) -> None:
        """The photos as a folder that appears whole."""
        paths = [path for name in names if (path := self.path(name))]
        if len(paths) < len(names):
            raise ArgumentError("a photo is not there any more; choose the photos again")
        making = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(making, ignore_errors=True)
        make_folder(making)
        try:
            for number, path in enumerate(paths):
                shutil.copyfile(path, making / f"{number:02d}.png")
            making.replace(folder)
        except OSError as error:
            raise OutputError(f"the photos cannot be kept in {folder}: {error.strerror}; make room") from error


def _keep(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OutputError(f"the photo cannot be kept as {path}: {error.strerror}; make room") from error
