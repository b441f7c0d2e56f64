"""A user's captions of the meshes in a folder: captions.csv, .tsv, .json or .jsonl as others write them.

Which mesh a caption is for is found out here, or refused; how a caption is worded is the user's own business.
"""

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.core.files import lines, parse_json, read_text

NAMES = ("captions.csv", "captions.tsv", "captions.json", "captions.jsonl")
FILE_WORDS = ("file", "filename", "filepath", "path", "mesh", "model", "asset", "object", "key", "uid", "id", "name")
CAPTION_WORDS = ("caption", "captions", "text", "prompt", "description")
DELIMITERS = ",;\t|"
SHOWN = 3  # of the names that a sentence is about


@dataclass(frozen=True)
class Row:
    """One caption: `where` says its place in its file, `file` what it calls the mesh."""

    where: str
    file: str
    caption: str


def read_captions(folder: Path, meshes: list[str], say: Callable[[str], None]) -> dict[str, str]:
    """Mesh -> caption, of the caption files in `folder`; what names no mesh, and what has no caption, is said.

    A mesh is named by its path in the folder, or by its name alone, with or without the ending, in any case.

    Args: meshes: their paths in the folder, with "/".
    Raises: InputFileError for a file that cannot be read, names no mesh at all, means several by one name, or says two
    things of one.
    """
    index, found = _Index(folder, meshes), {}
    paths = sorted(p for p in folder.iterdir() if p.name.lower() in NAMES and p.is_file())
    for path in paths:
        read = _read_table if path.suffix.lower() in (".csv", ".tsv") else _read_json
        rows, lost = read(path, index), []
        for row in rows:
            named = index.one(row.file, f"{path}, {row.where}")
            if not named:
                lost.append(row.file)
            for mesh in named if row.caption else ():
                other, text = found.setdefault(mesh, (f"{path.name}, {row.where}", row.caption))
                if text != row.caption:
                    raise InputFileError(f"{path}, {row.where}: {mesh} has another caption in {other}; keep one")
        if lost:
            told = f"{len(lost)} of {len(rows)} captions name no file of {folder}: {_some(lost)}"
            if len(lost) == len(rows):
                raise InputFileError(
                    f"{path}: {told}; a line is FILE,CAPTION, or the first line names the columns file and caption"
                )
            say(f"{path.name}: {told}")
    bare = [mesh for mesh in meshes if mesh not in found]
    if paths and bare:
        say(f"{len(bare)} of {len(meshes)} meshes have no caption and go by their file's name: {_some(bare)}")
    return {mesh: text for mesh, (_, text) in found.items()}


def _some(names: list[str]) -> str:
    return ", ".join(repr(name[:80]) for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


class _Index:
    """The meshes by all that a caption file may call them. Names are only ever compared, never opened."""

    def __init__(self, folder: Path, meshes: list[str]):
        self.prefixes = [f"{name}/" for name in (folder.resolve().as_posix(), folder.as_posix(), folder.name, ".")]
        self.tables: list[dict[str, list[str]]] = [{} for _ in range(5)]  # the surer ones first
        for mesh in meshes:
            plain = _folded(mesh)
            bare = plain.rpartition(".")[0]
            forms = (mesh, plain, bare, plain.rpartition("/")[2], bare.rpartition("/")[2])
            for table, form in zip(self.tables, forms):
                table.setdefault(form, []).append(mesh)

    def find(self, name: str) -> list[str]:
        """The meshes that a name may mean."""
        name = name.strip().replace("\\", "/")
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        forms = (name, *[_folded(name)] * 4)
        return next((table[form] for table, form in zip(self.tables, forms) if form in table), [])

    def one(self, name: str, where: str) -> list[str]:
        """The mesh that a name means, in all its formats, or none. Raises InputFileError where it may mean two."""
        found = self.find(name)
        if len({mesh.rpartition(".")[0] for mesh in found}) > 1:
            raise InputFileError(f"{where}: {name!r} names {len(found)} files, {_some(found)}; write the whole path")
        return found


def _ending(name: str) -> str:
    return "." + _folded(name).rpartition(".")[2]


def _folded(name: str) -> str:
    """Without regard to case, and to the two ways of writing an accent (macOS's file names, and everybody else)."""
    return unicodedata.normalize("NFC", name).casefold()


@dataclass(frozen=True)
class _Table:
    """A way to read a table: rows of (line, cells), which columns count, how many columns there are.

    `score`: how much the column of files names meshes (twice where with their ending), and how many rows have columns.
    """

    rows: list[tuple[int, list[str]]]
    file: int
    caption: int
    width: int
    delimiter: str
    score: tuple[int, int]


def _read_table(path: Path, index: _Index) -> list[Row]:
    """The delimiter, and the order of columns without names, are those by which the most rows name a mesh."""
    text, delimiters = read_text(path), DELIMITERS
    if told := re.match("sep=(.)\n", text):  # a line that Excel reads and writes
        text, delimiters = text[told.end() - 1 :], told[1]
    tables, wrong = [], None
    for delimiter in delimiters:
        try:
            tables += _tables(_split(text, delimiter), delimiter, index)
        except csv.Error as error:
            wrong = wrong or error
    best = max(tables, key=lambda table: table.score, default=None)
    if best is None or (wrong and best.score == (0, 0)):
        raise InputFileError(f"unreadable captions in {path}: {wrong or 'it is empty'}")
    rows = []
    for line, cells in best.rows:
        if len(cells) > best.width:
            raise InputFileError(
                f"{path}, line {line}: it has {len(cells)} cells, not {best.width}; put quotes around a caption that "
                f"holds {best.delimiter!r}, or name the columns file and caption in the first line"
            )
        cells = cells + [""] * (best.width - len(cells))
        rows.append(Row(f"line {line}", cells[best.file], cells[best.caption].strip()))
    return rows


def _split(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The rows that hold anything, without empty cells at their end, and the lines where they begin."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows, line = [], 1
    try:
        for cells in reader:
            while cells and not cells[-1].strip():
                cells.pop()
            if cells:
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"line {line}: {error}") from None
    return rows


def _tables(rows: list[tuple[int, list[str]]], delimiter: str, index: _Index) -> Iterator[_Table]:
    """The ways to read rows as a table: by the names in the first one, else as two columns in either order."""
    if not rows:
        return
    named = _columns(rows[0][1])
    ways = [(*named, len(rows[0][1]))] if named else [(0, 1, 2), (1, 0, 2)]
    body = rows[1:] if named else rows
    for file, caption, width in ways:
        named_here = [(cells[file], index.find(cells[file])) for _, cells in body if len(cells) > file]
        hits = sum(1 + _folded(name).endswith(_ending(found[0])) for name, found in named_here if found)
        yield _Table(body, file, caption, width, delimiter, (hits, sum(len(cells) > 1 for _, cells in body)))


def _columns(names: list[str]) -> tuple[int, int] | None:
    """Which of some names are those of the file and of its caption."""
    file, caption = _which(names, FILE_WORDS), _which(names, CAPTION_WORDS)
    return None if file is None or caption is None else (file, caption)


def _which(names: list[str], words: tuple[str, ...]) -> int | None:
    """Where the first of the words is that is among the names, whatever their case, spaces and underscores."""
    plain = [re.sub(r"[\W_]", "", name).lower() for name in names]
    return next((plain.index(word) for word in words if word in plain), None)


def _read_json(path: Path, index: _Index) -> list[Row]:
    """{file: caption}, a list of pairs or of objects with names such as file and caption, or one such a line."""
    text = read_text(path)
    numbered = [(k, line) for k, line in enumerate(lines(text), 1) if line.strip()]
    try:
        whole = parse_json(text, str(path))
    except InputFileError:
        if len(numbered) < 2 or not _is_json(numbered[0][1]):
            raise
        by_line = [(f"line {k}", parse_json(line, f"{path}, line {k}")) for k, line in numbered]
        return [row for where, data in by_line for row in _rows(data, where, path)]
    return list(_rows(whole, "", path))


def _is_json(text: str) -> bool:
    try:
        parse_json(text, "")
    except InputFileError:
        return False
    return True


def _rows(data: Any, where: str, path: Path) -> Iterator[Row]:
    """The captions in a piece of JSON."""
    if isinstance(data, dict):
        values = list(data.values())
        if columns := _columns(list(data)):
            yield _row(values[columns[0]], values[columns[1]], where or "item 1", path)
            return
        for k, (name, value) in enumerate(data.items(), 1):
            inner = _which(list(value), CAPTION_WORDS) if isinstance(value, dict) else None
            yield _row(name, value if inner is None else list(value.values())[inner], where or f"item {k}", path)
    elif isinstance(data, list) and len(data) == 2 and all(isinstance(x, str) for x in data):
        yield _row(data[0], data[1], where or "item 1", path)
    elif isinstance(data, list):
        for k, item in enumerate(data, 1):
            yield from _rows(item, where or f"item {k}", path)
    else:
        raise InputFileError(f"unreadable captions in {path}: {where or 'it'} is {data!r:.60}, no file and caption")


def _row(file: Any, caption: Any, where: str, path: Path) -> Row:
    if not isinstance(file, (str, int)) or not isinstance(caption, str | None):
        raise InputFileError(f"{path}, {where}: the caption of {file!r:.60} must be text, got {caption!r:.60}")
    return Row(where, str(file), (caption or "").strip())
