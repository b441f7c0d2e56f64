"""Checkpoints that several processes write together, each its own share, and any number of processes read again.

A folder STEP.shards of safetensors files in the layout of torch.distributed.checkpoint, whose headers say which part of
which tensor is where, and meta.json. It appears whole: it has another name until all have written. Where every process
has all (or there is one), a checkpoint is a single file: run_folder.py.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvdream_fast.core.errors import ModelError, OutputError
from mvdream_fast.core.files import atomic_write, read_json
from mvdream_fast.core.processes import Ranks

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"(\d+)(?:-\d+)?\.shards")
PARTIAL, META = "partial.shards", "meta.json"
FILES = "files"  # in META: name -> bytes; the reader would leave out what is not there, and not say so


def save(
    folder: Path, latest: str, step: int, tensors: "Mapping[str, torch.Tensor]", meta: dict[str, Any], ranks: Ranks,
    keep: int = 2,
) -> None:  # fmt: skip
    """Writes a checkpoint into `folder`, then `latest`, the file that names it; deletes all but the newest `keep`.

    All processes call it with the same names; what is not sharded is written once. Raises: OutputError, on all of them;
    the previous checkpoint stays.
    """
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    partial = folder / PARTIAL
    if ranks.first:
        with contextlib.suppress(OSError):  # the others' turn, or the writer's, to say what is wrong
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    ranks.wait()
    try:
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        state_dict_saver.save({**tensors}, storage_writer=writer)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise OutputError(f"cannot write the checkpoint {partial}: {reason}; the one before is kept") from error
    if ranks.first:
        _finish(folder, latest, step, meta, keep)


def _finish(folder: Path, latest: str, step: int, meta: dict[str, Any], keep: int) -> None:
    partial = folder / PARTIAL
    names = (f"{step:06d}{again}.shards" for again in ("", *(f"-{n}" for n in range(2, 1000))))
    path = folder / next(name for name in names if not (folder / name).exists())
    try:
        for file in partial.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        about = {**meta, "step": step, FILES: _sizes(partial)}
        atomic_write(partial / META, json.dumps(about, sort_keys=True))
        partial.rename(path)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"cannot write the checkpoint {path}: {reason}; the one before is kept") from error
    atomic_write(folder / latest, path.name + "\n")
    found = [p for p in folder.glob("[0-9]*.shards") if p != path and NAME.fullmatch(p.name)]
    for old in sorted(found, key=lambda p: p.stat().st_mtime_ns)[: len(found) + 1 - keep]:
        shutil.rmtree(old, ignore_errors=True)


def load(path: Path, like: "Mapping[str, torch.Tensor]") -> "tuple[int, dict[str, torch.Tensor], dict[str, Any]]":
    """The step, tensors and meta of a checkpoint: those named in `like` are sharded as they are there, others whole.

    All processes call it. Raises: ModelError where the checkpoint cannot be read.
    """
    import torch
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        meta = load_meta(path)
        found = _sizes(path)
        if damaged := [name for name, size in meta[FILES].items() if found.get(name) != size]:
            raise ValueError(f"{damaged[0]} is missing, or is not whole")
        known = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        tensors: dict[str, torch.Tensor] = {}
        for name, stored in known.items():
            held = like.get(name)
            if held is not None and isinstance(stored, TensorStorageMetadata) and held.shape == stored.size:
                tensors[name] = torch.empty_like(held)
            elif isinstance(stored, TensorStorageMetadata):
                tensors[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, as is meant
            state_dict_loader.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
        return int(meta["step"]), tensors, meta
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, CheckpointException) as error:
        raise ModelError(f"cannot read the checkpoint {path}: {error}; {_others(path)}") from error


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}


def load_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run. Raises ModelError."""
    return read_json(path / META, ModelError)


def _others(path: Path) -> str:
    others = sorted(p.name for p in path.parent.glob("[0-9]*") if p != path)
    return f"write '{others[-1]}' into {path.parent / 'LATEST'} to go on from there" if others else "no other is there"
