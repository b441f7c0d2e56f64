"""Files that appear whole or not at all: temporary file, fsync, rename, fsync of the folder. A leaf, without torch."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from mvdream_fast.core.arguments import user_path
from mvdream_fast.core.errors import OutputError


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Writes a file whole or not at all; `~` is the home folder.

    Raises: OutputError with the bytes needed; an older file stays as it was.
    """
    data = data.encode() if isinstance(data, str) else data

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    replace_file(user_path(path), write, len(data))


def replace_file(path: Path, write: Callable[[Path], object], n_bytes: int) -> None:
    """Runs `write(temporary)`, flushes it to the disk and renames it to `path`; cleans up when anything fails."""
    if path.exists() and not path.is_file():
        raise OutputError(f"cannot write {path}: it is not a regular file")
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        if not _is_io_error(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"cannot write {path} ({n_bytes} bytes): {reason}; the file it would replace is kept"
        ) from error


def _is_io_error(error: Exception) -> bool:
    """OSError, and safetensors' own error, which wraps one as text."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def remove_stale(folder: Path) -> None:
    """Deletes temporary files left behind by processes that are gone."""
    for path in folder.glob("*.tmp-*"):
        pid = path.name.rpartition("-")[2]
        if not (pid.isdigit() and Path(f"/proc/{pid}").exists()):
            path.unlink(missing_ok=True)
