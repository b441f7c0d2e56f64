"""The files of a cache of latents: made, given their room on the disk, and mapped. What is in them is batches.py's."""

import contextlib
import errno
import fcntl
import gc
import os
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mvdream_fast.core.errors import OutputError
from mvdream_fast.core.files import make_folder

Parts = Mapping[Path, tuple[type, tuple[int, ...]]]  # a file's dtype and shape
NO_RESERVING = (errno.EINVAL, errno.EOPNOTSUPP)  # what file systems say that cannot


class LatentCache:
    """`NAME.npy`, the latents, `NAME.filled.npy`, which of them are there, and `NAME.key`, what they were made of.

    Made again where the key is another, or a file is not as it was made. A lock (flock) on NAME.key is shared by all
    that use the cache, and one process' alone while it is made. It goes with the last of the process and the workers
    that it forked, however they end; a file system that knows no locks goes without.

    Args:
        file: NAME; a dot in it is part of it.
        key: names what the latents are of.
        shape: of the latents, [n, backgrounds, V, C, h, w].
    Raises: OutputError where a run uses it under another key, the disk is full, or a file cannot be written.

    latents: float16 [n, backgrounds, V, C, h, w]; filled: uint8 [n, backgrounds]. Both write to their files.
    """

    def __init__(self, file: Path, key: str, shape: tuple[int, ...]):
        make_folder(file.parent)
        made_of = f"{key} {shape}".encode()
        parts: Parts = {_beside(file, ".npy"): (np.float16, shape), _beside(file, ".filled.npy"): (np.uint8, shape[:2])}
        try:
            lock = os.open(_beside(file, ".key"), os.O_RDWR | os.O_CREAT, 0o666)
            weakref.finalize(self, os.close, lock)
            maps = _opened(lock, made_of, parts)
        except OSError as error:
            n_bytes = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in parts.values())
            raise OutputError(
                f"the latent cache {file} must be a place with {n_bytes} bytes that can be written, got: "
                f"{error.strerror or error}; name another with --latents"
            ) from error
        if maps is None:
            raise OutputError(
                f"the latent cache {file} is in use by a run of another autoencoder or other shards; wait until it is "
                "done, or name another with --latents"
            )
        self.latents, self.filled = maps


def _beside(file: Path, ending: str) -> Path:
    """A file of the cache; where it is a link, what that leads to."""
    return Path(os.path.realpath(f"{file}{ending}"))


def _opened(lock: int, made_of: bytes, parts: Parts) -> list[np.memmap] | None:
    """The files, mapped, and the lock shared; None where they are of another key and not ours to make again."""
    alone = _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not alone:
        gc.collect()  # a run of this very process that has ended may still hold its lock
        alone = _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if alone:
        if _whole(lock, made_of, parts) is None:
            _make(lock, made_of, parts)
        else:
            _reserve(parts)  # older versions left holes
    _locked(lock, fcntl.LOCK_SH)  # waits for one that makes the cache
    return _whole(lock, made_of, parts)  # looked at again: between the two locks another may have made it


def _locked(lock: int, operation: int) -> bool:
    """Whether no other process' lock is in the way."""
    try:
        fcntl.flock(lock, operation)
    except BlockingIOError:
        return False
    except OSError:
        pass  # no locks here
    return True


def _whole(lock: int, made_of: bytes, parts: Parts) -> list[np.memmap] | None:
    """The files, mapped to be written; None unless all are as `_make` left them."""
    if os.pread(lock, len(made_of) + 1, 0) != made_of:
        return None
    try:
        for path, (dtype, shape) in parts.items():
            there = np.lib.format.open_memmap(path, "r")  # "r+" would lengthen a cut file with zeros
            size = there.offset + there.nbytes
            if (there.dtype, there.shape, path.stat().st_size) != (dtype, shape, size):
                return None
    except (FileNotFoundError, EOFError, ValueError):
        return None
    return [np.lib.format.open_memmap(path, "r+") for path in parts]


def _make(lock: int, made_of: bytes, parts: Parts) -> None:
    """Empty files. The note comes last: without it they are made again."""
    os.ftruncate(lock, 0)
    try:
        for path, (dtype, shape) in parts.items():
            path.unlink(missing_ok=True)  # not emptied: whoever has it mapped without a lock keeps what it had
            np.lib.format.open_memmap(path, "w+", dtype, shape)
        _reserve(parts)
        os.pwrite(lock, made_of, 0)
    except OSError:
        for path in parts:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def _reserve(parts: Parts) -> None:
    """Gives all of the files room on the disk. A full one would end a process that writes to a mapped hole (SIGBUS)."""
    for path in parts if hasattr(os, "posix_fallocate") else ():
        file = os.open(path, os.O_RDWR)
        try:
            os.posix_fallocate(file, 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in NO_RESERVING:
                raise
        finally:
            os.close(file)
