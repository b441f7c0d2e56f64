"""Small files that processes and machines share: in a local or shared folder, or behind any URL that fsspec knows.

A file appears whole or not at all, and `create` makes one only if it is absent: with that alone queue.py decides who
does what. What is in the files is not known here.
"""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from mvdream_fast.core.arguments import user_path
from mvdream_fast.core.errors import OutputError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = ".tmp-"


class Store(Protocol):
    """Names are relative paths with slashes. All methods raise OutputError where the place cannot be used."""

    place: str
    folder: Path | None  # where the files lie on this machine; None behind a URL

    def read(self, name: str) -> bytes | None:
        """The file's bytes, None where there is none."""
        ...

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """The files that exist, by name; at once where the place is far."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Makes or replaces a file, whole or not at all."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Makes a file; False, and nothing changed, where it is there already. Of several callers one gets True."""
        ...

    def mark(self, name: str) -> None:
        """Makes an empty file, with what costs least; nothing happens where it is there already."""
        ...

    def names(self, folder: str) -> list[str]:
        """What lies right in `folder`, by its name there, in no order; nothing where there is no such folder."""
        ...

    def delete(self, name: str) -> None:
        """Removes a file or a folder with all it holds; nothing happens where there is none."""
        ...


def open_store(place: Path | str) -> Store:
    """The store in a folder (made when it is first written to) or behind a URL, such as s3://bucket/name.

    Raises: OutputError for a URL whose filesystem is not installed, or cannot create a file only if it is absent.
    """
    text = str(place)
    if "://" in text and not text.startswith("file://"):
        return ObjectStore(text)
    return LocalStore(user_path(text.removeprefix("file://")))


def absolute(place: str) -> str:
    """A place as processes in other folders name it."""
    return place if "://" in place else str(user_path(place).absolute())


def is_shared(place: str) -> bool:
    """Whether other processes find there what this one writes; memory:// is each one's own, by itself or under another
    filesystem."""
    return not any(link.startswith("memory://") for link in place.split("::"))


def lacks_space(error: BaseException | None) -> bool:
    """Whether an error says, or was raised from one that says, that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if any(os.strerror(code) in str(error) for code in NO_SPACE):  # safetensors' own, which is but text
            return True
        error = error.__cause__ or error.__context__
    return False


class LocalStore:
    """A folder, which several machines may have mounted."""

    def __init__(self, folder: Path):
        self.folder: Path | None = folder.absolute()
        self.place = str(self.folder)
        self._root = self.folder

    def read(self, name: str) -> bytes | None:
        try:
            return (self._root / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(self._root / name, error) from error

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        found = ((name, self.read(name)) for name in names)
        return {name: data for name, data in found if data is not None}

    def write(self, name: str, data: bytes) -> None:
        with self._temporary(name, data) as temporary:
            temporary.replace(self._root / name)

    def create(self, name: str, data: bytes) -> bool:
        path = self._root / name
        if path.exists():
            return False
        with self._temporary(name, data) as temporary:
            try:
                os.link(temporary, path)  # fails where the name is taken, on network filesystems, too
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
                    raise
                return _created_by_rename(temporary, path)
            return True

    def mark(self, name: str) -> None:
        path = self._root / name
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise _unusable(path, error) from error

    @contextlib.contextmanager
    def _temporary(self, name: str, data: bytes):
        """The data on the disk, under a name of its own; gone at the end."""
        path = self._root / name
        temporary = path.with_name(f"{path.name}{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        except OSError as error:
            raise _unusable(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self._root / folder) as entries:
                return [entry.name for entry in entries if _TEMPORARY not in entry.name]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unusable(self._root / folder, error) from error

    def delete(self, name: str) -> None:
        import shutil

        path = self._root / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


class ObjectStore:
    """A place behind an fsspec URL. Its filesystem must have an atomic `pipe_file(mode="create")`, as S3's and Google
    Cloud's have, and memory:// within a thread."""

    def __init__(self, place: str):
        import fsspec

        self.folder: Path | None = None
        self.place = place.rstrip("/")
        try:
            self._files, self._root = fsspec.url_to_fs(self.place, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise OutputError(f"cannot use {place}: {error}") from error
        self._check_create()

    def _check_create(self) -> None:
        name = f".probe-{uuid.uuid4().hex}"
        try:
            only_once = self.create(name, b"1") and not self.create(name, b"2")
        finally:
            self.delete(name)
        if not only_once:
            raise OutputError(
                f"{self.place} cannot be shared by workers: its filesystem ({type(self._files).__name__}) replaces a "
                'file where it was asked to create one; install a version that knows pipe_file(mode="create")'
            )

    def read(self, name: str) -> bytes | None:
        try:
            return self._files.cat_file(self._path(name))
        except (FileNotFoundError, IsADirectoryError):
            return None
        except OSError as error:
            raise _unusable(self._path(name), error) from error

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        paths = {self._path(name): name for name in names}
        if not paths:
            return {}
        found: dict[str, Any] = self._files.cat([*paths], on_error="return")
        failed = next((x for x in found.values() if isinstance(x, Exception) and not _is_missing(x)), None)
        if failed is not None:
            raise _unusable(self.place, failed) from failed
        return {paths[path]: data for path, data in found.items() if isinstance(data, bytes)}

    def write(self, name: str, data: bytes) -> None:
        try:
            self._files.pipe_file(self._path(name), data)
        except OSError as error:
            raise _unusable(self._path(name), error) from error

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._files.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            raise _unusable(self._path(name), error) from error
        return True

    def mark(self, name: str) -> None:
        self.write(name, b"")

    def names(self, folder: str) -> list[str]:
        try:
            found: list[dict[str, Any]] = self._files.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unusable(self._path(folder), error) from error
        return [str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in found]

    def delete(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self._files.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")


def _created_by_rename(temporary: Path, path: Path) -> bool:
    """Where there are no hard links: whoever makes the empty file first may fill it."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    temporary.replace(path)
    return True


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError | KeyError)


def _unusable(path: object, error: Exception) -> OutputError:
    return OutputError(f"cannot use {path}: {getattr(error, 'strerror', None) or error}")
