"""What every reader of a mesh format shares: the files beside the mesh, the caps, and what it has to say."""

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

from mvdream_fast.rendering.mesh import MeshError
from mvdream_fast.rendering.sources import place

MAX_FILE_BYTES = 256 << 20
MAX_FACES = 1_000_000
MAX_VERTICES = 20_000_000


class Reading:
    """One mesh while it is read. `siblings` are the only other files that are ever opened: no URI, no parent folder."""

    def __init__(self, siblings: Mapping[str, bytes]):
        self.siblings = siblings
        self.notes: dict[str, None] = {}  # in order, each once
        self.n_faces = self.n_vertices = 0

    def file(self, name: str) -> bytes | None:
        """The file of that name, else of its last path component: exporters leave their own absolute paths."""
        name = name.replace("\\", "/").removeprefix("file://").removeprefix("./")
        for candidate in dict.fromkeys((name, name.rpartition("/")[2])):
            try:
                return self.siblings[candidate]
            except KeyError:
                continue
        return None

    def note(self, text: str) -> None:
        """Remembers what of the file is not drawn."""
        self.notes[text] = None

    def count_faces(self, n: int) -> None:
        """Called before anything is made for `n` more faces. Raises: MeshError where they are too many."""
        self.n_faces += n
        if self.n_faces > MAX_FACES:
            raise MeshError(f"the mesh has {self.n_faces} faces, at most {MAX_FACES} are taken; decimate it first")

    def count_vertices(self, n: int) -> None:
        """As count_faces, where vertices may be many that no face uses."""
        self.n_vertices += n
        if self.n_vertices > MAX_VERTICES:
            raise MeshError(f"the mesh has {self.n_vertices} vertices, at most {MAX_VERTICES} are taken")


class Folder(Mapping):
    """The files beside a mesh as name -> bytes; names that lead out of the folder do not exist.

    Links in the folder are followed, wherever they lead: the user put them there, and no mesh file can.
    """

    def __init__(self, source: Path | bytes):
        self.root = place(source).parent if isinstance(source, Path) else None
        self.asked: dict[str, None] = {}  # paths that were looked for, found or not

    def __getitem__(self, name: str) -> bytes:
        if self.root is None or "\0" in name:
            raise KeyError(name)
        path = Path(os.path.normpath(self.root / name))
        if not path.is_relative_to(self.root):
            raise KeyError(name)
        self.asked[str(path)] = None
        if not path.is_file():
            raise KeyError(name)
        return read_bytes(path, name)

    def __iter__(self):
        return iter(())

    def __len__(self) -> int:
        return 0


def read_bytes(source: Path | bytes, name: str) -> bytes:
    """The content of a file. Raises: MeshError where it has more than MAX_FILE_BYTES."""
    size = len(source) if isinstance(source, bytes) else os.stat(source).st_size
    if size > MAX_FILE_BYTES:
        raise MeshError(f"{name}: the file has {size >> 20} MB, at most {MAX_FILE_BYTES >> 20} are taken")
    return source if isinstance(source, bytes) else source.read_bytes()


def check_archive(content: bytes) -> bool:
    """Whether it is a zip, as 3MF is and a .dae may be. Raises: MeshError where it unpacks to more than MAX_FILE_BYTES.

    Judged as the readers judge, by a zip's end: it may begin with anything.
    """
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return False
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        total = sum(info.file_size for info in archive.infolist())
    if total > MAX_FILE_BYTES:
        raise MeshError(f"unpacks to {total >> 20} MB, at most {MAX_FILE_BYTES >> 20} are taken")
    return True


def has_colors(content: bytes) -> bool:
    """Whether a 3MF has colours. Raises: MeshError, as check_archive."""
    if not check_archive(content):
        return False
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return any(b' pid="' in archive.read(name) for name in archive.namelist() if name.lower().endswith(".model"))


def text_of(content: bytes) -> str:
    """Text in UTF-8 or UTF-16 with or without its mark, else Latin-1."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")
