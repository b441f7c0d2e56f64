"""Text files as users have them, read by one reader; files that appear whole or not at all. A leaf, without torch.

What is in a file is its reader's business. Writing is: temporary file, fsync, rename, fsync of the folder.
"""

import codecs
import contextlib
import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvdream_fast.core.arguments import user_path
from mvdream_fast.core.errors import InputFileError, OutputError, UserError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

MAX_TEXT_BYTES = 1 << 28
_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: "Path | Traversable", error: type[UserError] = InputFileError, limit: int = MAX_TEXT_BYTES) -> str:
    r"""A text file: UTF-8, or the encoding that its byte order mark names. Its lines end with \n, however they did.

    No other encoding is guessed at: Latin-1 read as its neighbour is wrong letters without a word.

    Args:
        error: what is raised; ModelError for the files of a model.
        limit: of the file, in bytes.
    Raises: `error` for a file that cannot be read, is larger, or is no text in these encodings.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror or reason}") from reason
    if len(data) > limit:
        raise error(f"cannot read {path}: it has more than {limit >> 20} MB; no such file is so large")
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as reason:
        if encoding != "utf-8":
            raise error(f"cannot read {path}: it begins as {encoding} and is not ({reason.reason})") from reason
        line = data.count(b"\n", 0, reason.start) + 1
        raise error(
            f"cannot read {path}: line {line} is not UTF-8 (byte 0x{data[reason.start]:02x}; Latin-1 or Windows-1252, "
            "perhaps); save it as UTF-8"
        ) from reason
    if "\0" in text[:2]:
        raise error(f"cannot read {path}: it is no text, or UTF-16 without its mark; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines(text: str) -> list[str]:
    r"""The lines of a text, which only \n, \r and \r\n end: a JSON string may hold U+2028, at which splitlines cuts."""
    rows = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return rows[:-1] if rows[-1] == "" else rows


def read_lines(path: "Path | Traversable", error: type[UserError] = InputFileError) -> list[str]:
    """The lines of a text file, as read_text reads it. Raises `error`."""
    return lines(read_text(path, error))


def parse_json(text: str, source: str, error: type[UserError] = InputFileError) -> Any:
    """JSON; raises `error`, naming `source`, for text that is none, and for a key that an object has twice."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as reason:
        raise error(f"{source} is not JSON: {reason}") from reason


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return data


def read_json(path: Path, error: type[UserError] = InputFileError, limit: int = MAX_TEXT_BYTES) -> Any:
    """What a JSON file holds. Raises `error`."""
    return parse_json(read_text(path, error, limit), str(path), error)


def make_folder(folder: Path) -> Path:
    """Makes a folder, with those above it, where there is none yet. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"the folder {folder} cannot be made: a file is in the way; name another place") from error
    except OSError as error:
        raise OutputError(f"the folder {folder} cannot be made: {error.strerror or error}") from error
    return folder


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Writes a file whole or not at all; `~` is the home folder.

    Raises: OutputError with the bytes needed; an older file stays as it was.
    """
    # A folder's name that is no UTF-8 comes as surrogates, and goes as the bytes that it is.
    data = data.encode(errors="surrogateescape") if isinstance(data, str) else data

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    replace_file(user_path(path), write, len(data))


def replace_file(path: Path, write: Callable[[Path], object], n_bytes: int) -> None:
    """Runs `write(temporary)`, flushes it to the disk and renames it to `path`; cleans up when anything fails."""
    _check_regular(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except Exception as error:
        _remove(temporary)
        if not _is_io_error(error):
            raise
        raise _kept(path, n_bytes, error) from error


def write_together(files: Mapping[Path, bytes]) -> None:
    """Writes files of one folder that belong together, all or none; the first is the one that names the others.

    All are on the disk under other names before one is renamed. The first goes first where older ones are replaced, and
    comes last, so that a kill in between leaves it absent and never beside others than its own.

    Raises: OutputError; older files are as they were.
    """
    first = next(iter(files))
    new = {path: path.with_name(f"{path.name}.tmp-{os.getpid()}") for path in files}
    old = {path: path.with_name(f"{path.name}.old.tmp-{os.getpid()}") for path in files}
    for path in files:
        _check_regular(path)
    replaced = [path for path in files if path.exists()]
    try:
        for path, data in files.items():
            new[path].write_bytes(data)
            _sync(new[path])
        for path in replaced:
            path.replace(old[path])
        for path in reversed([*files]):
            new[path].replace(path)
        _sync(first.parent)
    except OSError as error:
        for path in files:
            _remove(new[path])
            if path not in replaced:
                _remove(path)
            elif old[path].exists():
                with contextlib.suppress(OSError):
                    old[path].replace(path)
        raise _kept(first, sum(map(len, files.values())), error) from error
    for path in replaced:
        _remove(old[path])


def _remove(path: Path) -> None:
    """Deletes a file that is in the way, if it can be: what went wrong before is what there is to say."""
    with contextlib.suppress(OSError):
        path.unlink()


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise OutputError(f"cannot write {path}: it is not a regular file")


def _kept(path: Path, n_bytes: int, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"cannot write {path} ({n_bytes} bytes): {reason}; the file it would replace is kept")


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
            _remove(path)
