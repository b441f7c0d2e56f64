"""Model folders as they appear and disappear: written beside, then renamed; and the JSON files in them.

No torch here, so that a command can look at its target first. What is in the folder is open.py's.
"""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mvdream_fast.core import files
from mvdream_fast.core.errors import ModelError, OutputError

_MAX_JSON_BYTES = 1 << 20
_OWN = ("config.json", "vocabulary.txt", "stand_ins.txt")  # what a model folder holds besides its .safetensors files


@contextmanager
def new_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling that takes the folder's name when the block ends well, and is removed when it does not.

    Raises:
        OutputError: if the folder exists (unless it holds a model and `overwrite`), or cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    check_target(folder, overwrite)
    temporary, old = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        temporary.mkdir()
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        check_target(folder, overwrite)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        _fsync(folder.parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        place = f": {error.filename}" if error.filename else ""
        raise OutputError(f"cannot write {folder}: {error.strerror or error}{place}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def check_target(folder: Path, overwrite: bool) -> None:
    """Raises OutputError if `new_folder` would refuse this folder."""
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise OutputError(f"{folder} exists already; choose another name, or replace it with --overwrite")
    if not folder.is_dir() or folder.is_symlink() or (any(folder.iterdir()) and not is_model_folder(folder)):
        raise OutputError(f"{folder} is not a model folder, so it is not replaced; choose another name")
    others = sorted(path.name for path in folder.iterdir() if path.suffix != ".safetensors" and path.name not in _OWN)
    if others:
        raise OutputError(f"{folder} holds {others[0]} besides a model, so it is not replaced; choose another name")


def _remove_stale(folder: Path) -> None:
    """Deletes what writers of this folder left that were killed, one whose process is gone."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.tmp-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_model_folder(folder: Path) -> bool:
    """Whether the folder holds a model of ours, judged by its config.json."""
    try:
        return read_json(folder / "config.json").get("kind") == "model"
    except ModelError:
        return False


def read_json(path: Path) -> dict:
    """The object in a JSON file; an empty one if there is no file. Raises ModelError for anything else."""
    try:
        path.stat()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    data = files.read_json(path, ModelError, _MAX_JSON_BYTES)
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return data
