"""The assets that a rendering leaves out, each with its reason: quarantine.jsonl beside the shards, one line an asset.

Files that a reader refuses are read again by every run, which costs little. What ended a process, took its time or its
memory is left alone until its file changes, or somebody asks for it.
"""

import datetime
import json
import os
from pathlib import Path

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.core.files import atomic_write, parse_json, read_lines
from mvdream_fast.rendering.catalogue import Entry

NAME = "quarantine.jsonl"
REFUSED = "refused"  # by its reader, in a sentence
READ = {"id": str, "kind": str, "reason": str, "size": int, "mtime_ns": int}  # of a record, by a later run


class Quarantine:
    """The records of a folder: id, path, member, source, kind ("refused", "failed", "died", "hung", "memory"), reason,
    when, and size and mtime_ns of the file as it was. With `retry` nothing is held.
    """

    def __init__(self, folder: Path, retry: bool = False):
        self.path, self.records = folder / NAME, dict[str, dict]()
        if retry:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            self.records = _read(self.path)

    def holds(self, entry: Entry) -> bool:
        """Whether the asset is not to be tried."""
        record = self.records.get(entry.id)
        return record is not None and record["kind"] != REFUSED and (record["size"], record["mtime_ns"]) == _of(entry)

    def add(self, entry: Entry, kind: str, reason: str) -> None:
        """Writes an asset down."""
        size, time = _of(entry)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.records[entry.id] = {
            "id": entry.id, "path": str(entry.archive), "member": entry.member, "source": entry.library, "kind": kind,
            "reason": reason, "when": now, "size": size, "mtime_ns": time,
        }  # fmt: skip
        self._save()

    def keep(self, ids: set[str]) -> None:
        """Drops the records of all other assets: they could be read, or are there no more."""
        if not self.records.keys() <= ids:
            self.records = {id_: record for id_, record in self.records.items() if id_ in ids}
            self._save()

    def reasons(self) -> dict[str, str]:
        """Id -> sentence."""
        return {id_: record["reason"] for id_, record in self.records.items()}

    def _save(self) -> None:
        if not self.records:
            self.path.unlink(missing_ok=True)
            return
        atomic_write(self.path, "".join(json.dumps(self.records[id_]) + "\n" for id_ in sorted(self.records)))


def _read(path: Path) -> dict[str, dict]:
    """The records by id. Raises: InputFileError for a line that is none."""
    records = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        record = parse_json(line, f"line {number} of {path}")
        if not isinstance(record, dict) or not all(isinstance(record.get(key), of) for key, of in READ.items()):
            raise InputFileError(
                f"line {number} of {path} is no record of an asset, with {', '.join(READ)}; delete the line, and the "
                "asset is tried again"
            )
        records[record["id"]] = record
    return records


def _of(entry: Entry) -> tuple[int, int]:
    try:
        state = os.stat(entry.archive)
    except OSError:
        return 0, 0
    return state.st_size, state.st_mtime_ns
