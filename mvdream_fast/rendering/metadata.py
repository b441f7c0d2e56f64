"""metadata.csv: what is known of the meshes in a folder beside their captions.

Columns, by the names in the first line, in any order: `file` (its path in the folder) and `caption` (a noun phrase in
lower case without an article, colours as the asset has them: "small house with a red roof"); and where they are known
`noun` ("house"), `category`, `tags` (with ";" between), `has_front` (yes or no: whether azimuth 0 means anything),
`pack`, `creator`, `licence` (an SPDX name such as CC0-1.0). Other columns are passed over.
"""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.core.files import read_text
from mvdream_fast.data.captions import MAX_LENGTH, clean, head_noun

NAME = "metadata.csv"
FRONTS = {"yes": True, "no": False, "": None}


@dataclass(frozen=True)
class Metadata:
    """One line: `phrase` says what the mesh shows, `noun` what kind of thing that is."""

    phrase: str
    noun: str
    category: str = ""
    tags: tuple[str, ...] = ()
    has_front: bool | None = None  # None where that is not said
    pack: str = ""
    creator: str = ""
    licence: str = ""


def read_metadata(folder: Path, meshes: Iterable[str], say: Callable[[str], None]) -> dict[str, Metadata]:
    """Mesh -> its line of metadata.csv; nothing where there is no such file. Files that are not there are said.

    Args: meshes: their paths in the folder, with "/".
    Raises: InputFileError for a file that is no table of these columns, or that says two things of one mesh.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    known, found, lost = set(meshes), {}, []
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        columns = [name.strip().lower() for name in next(rows, [])]
        if missing := [name for name in ("file", "caption") if name not in columns]:
            raise InputFileError(f"{path}: its first line must name the columns file and caption, {missing[0]} is not")
        for cells in rows:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"{path}, line {rows.line_num}"
            if len(cells) > len(columns):
                raise InputFileError(f"{where}: it has {len(cells)} cells for {len(columns)} columns")
            row = dict(zip(columns, (clean(cell) for cell in cells)))
            name = row.get("file", "").replace("\\", "/").removeprefix("./")
            if name not in known:
                lost.append(name)
            elif name in found:
                raise InputFileError(f"{where}: {name!r:.80} has a line already; keep one")
            else:
                found[name] = _metadata(row, where)
    except csv.Error as error:
        raise InputFileError(f"{path}, line {rows.line_num}: {error}") from None
    if lost and not found:
        raise InputFileError(f"{path}: none of its {len(lost)} files is in {folder}, the first is {lost[0]!r:.80}")
    if lost:
        say(f"{NAME}: {len(lost)} of {len(lost) + len(found)} files are not there, the first is {lost[0]!r:.80}")
    return found


def _metadata(row: dict[str, str], where: str) -> Metadata:
    phrase = clean(row.get("caption", ""), MAX_LENGTH).lower()
    front = row.get("has_front", "").lower()
    if not phrase:
        raise InputFileError(f"{where}: the caption is empty; say what the mesh shows")
    if front not in FRONTS:
        raise InputFileError(f"{where}: has_front must be yes, no or empty, got {front!r:.40}")
    return Metadata(
        phrase=phrase,
        noun=row.get("noun", "").lower() or head_noun(phrase),
        category=row.get("category", ""),
        tags=tuple(tag.strip() for tag in row.get("tags", "").split(";") if tag.strip()),
        has_front=FRONTS[front],
        pack=row.get("pack", ""),
        creator=row.get("creator", ""),
        licence=row.get("licence", ""),
    )
