"""What there is to render: the sweethome3d-furniture libraries, or a folder of the user's own meshes.

An Entry is a name, its credits and a way to load it; nothing here draws or words a caption.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from mvdream_fast.core.color import to_linear, to_srgb
from mvdream_fast.core.errors import InputFileError
from mvdream_fast.core.files import lines
from mvdream_fast.data.captions import MAX_LENGTH, clean, noun, without_colors
from mvdream_fast.rendering.caption_files import read_captions
from mvdream_fast.rendering.furniture import furniture_noun
from mvdream_fast.rendering.mesh import Mesh, MeshError, Part
from mvdream_fast.rendering.mesh_file import FOREIGN, FORMATS, WORLD_FROM_GLTF, load_mesh
from mvdream_fast.rendering.metadata import Metadata, read_metadata
from mvdream_fast.rendering.reading import MAX_FILE_BYTES

GAIN = 1.2  # these libraries' plain whites are Blender's old default, 0.64: the catalogue's own icons show them white
PROPERTIES = "PluginFurnitureCatalog.properties"
HOW_TO_GET = (
    "get it without installing: `apt-get download sweethome3d-furniture && dpkg -x sweethome3d-furniture_*.deb DIR`, "
    "then pass `--sweethome3d-dir DIR` (Debian and Ubuntu; 120 MB)"
)


@dataclass(frozen=True)
class Entry:
    """One asset: `id` is unique and safe as a file name; `name` is the source's own wording."""

    id: str
    name: str
    archive: Path  # the .sh3f, or the mesh file itself
    member: str = ""  # the model inside the archive
    category: str = ""
    tags: tuple[str, ...] = ()
    creator: str = ""
    library: str = ""
    licence: str = ""
    rotation: tuple[float, ...] | None = None  # 3x3, row-major, in the asset's own axes
    caption: str | None = None  # the user's own words, used as they are
    kind: str = ""  # what kind of thing it is, where metadata.csv says so; then `name` is a whole phrase with colours
    has_front: bool | None = None  # whether azimuth 0 means anything; None where that is not known

    @property
    def noun(self) -> str:
        """The name as a caption says it, without colours; only the furniture catalogue's names are translated."""
        if self.kind:
            return without_colors(self.name)
        return furniture_noun(self.name) if self.member else noun(self.name)

    def load(self) -> Mesh:
        """Returns the mesh in the world frame, not yet normalised. Raises MeshError."""
        if not self.member:
            return load_mesh(self.archive)
        mesh = _load_member(self.archive, self.member)
        mesh = replace(mesh, parts=tuple(map(_untinted, mesh.parts))).brightened(GAIN)
        if self.rotation is None:
            return mesh
        # The catalogue turns y-up meshes, ours are z-up already: conjugate by the change of axes.
        turn = np.asarray(self.rotation, np.float32).reshape(3, 3)
        return mesh.rotated(WORLD_FROM_GLTF @ turn @ WORLD_FROM_GLTF.T)


def read_sweethome3d(folder: Path) -> list[Entry]:
    """Every asset of the libraries under `folder` (the unpacked package or the folder of its .sh3f files), by id."""
    archives = sorted(folder.rglob("*.sh3f")) if folder.is_dir() else []
    if not archives:
        raise InputFileError(f"no sweethome3d-furniture libraries (*.sh3f) under {folder}; {HOW_TO_GET}")
    return sorted((entry for path in archives for entry in _read_library(path)), key=lambda entry: entry.id)


def read_folder(folder: Path, say: Callable[[str], None] = print) -> list[Entry]:
    """Every mesh file under `folder`, by id; words from metadata.csv, else captions.csv and its like, else file names.

    `say` is told what of the captions is of no use. Hidden files are passed over, such as macOS's `._box.glb`.

    Raises: InputFileError for a folder without meshes, and for captions that read_captions refuses.
    """
    if not folder.is_dir():
        raise InputFileError(f"{folder} is not a folder of meshes; give one, or the word sweethome3d")
    suffixes = {f".{suffix}" for suffix in (*FORMATS, *FOREIGN)}  # foreign ones are named when they fail to load
    paths = sorted(p for p in _files(folder) if p.suffix.lower() in suffixes)
    meshes = {p.relative_to(folder).as_posix(): p for p in paths}
    # macOS leaves a "._name" beside what it copies, and a folder of them in its archives.
    meshes = {name: p for name, p in meshes.items() if not re.search(r"(^|/)(\.|__MACOSX/)", name)}
    if not meshes:
        raise InputFileError(f"no meshes in {folder}; the formats are {', '.join(FORMATS)}")
    known = read_metadata(folder, meshes, say)
    captions = {} if known else read_captions(folder, list(meshes), say)
    long = [name for name, text in captions.items() if len(clean(text, len(text))) > MAX_LENGTH]
    if long:
        say(f"{len(long)} captions are cut to {MAX_LENGTH} characters, the first that of {long[0]}")
    entries = []
    for relative, path in meshes.items():
        if relative in known:
            entries.append(_described(_safe_id(relative), path, known[relative], folder.name))
            continue
        name = re.sub(r"[\s_\-]+", " ", path.stem).strip()
        caption = clean(captions.get(relative, "")) or None
        entries.append(Entry(_safe_id(relative), clean(name), path, library=folder.name, caption=caption))
    return _unique(entries)


def _files(folder: Path) -> Iterator[Path]:
    """Every file under a folder, by its lists alone: to ask for each file as well would take hours of a store that many
    machines share (docs/scale.md)."""
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)


def _described(entry_id: str, path: Path, known: Metadata, library: str) -> Entry:
    return Entry(
        entry_id, known.phrase, path, category=known.category, tags=known.tags, creator=known.creator,
        library=known.pack or library, licence=known.licence, kind=known.noun, has_front=known.has_front,
    )  # fmt: skip


def _safe_id(text: str) -> str:
    """Letters, digits and dashes, at most 64: it names shard members, which must fit a tar header."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "asset"
    if len(plain) <= 64:
        return plain
    digest = hashlib.sha256(text.encode(errors="surrogateescape"))  # a name on a disk need not be UTF-8
    return f"{plain[:55]}-{digest.hexdigest()[:8]}"


def _read_library(path: Path) -> list[Entry]:
    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read(PROPERTIES).decode("iso-8859-1")
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise InputFileError(f"{path} is not a sweethome3d library ({error}); {HOW_TO_GET}") from None
    head, rows = parse_properties(text)
    library = head.get("name", path.stem)
    licence = "CC0-1.0" if "public domain" in head.get("license", "").lower() else "CC-BY-3.0"
    entries = []
    for row in rows:
        if "name" not in row or "model" not in row:
            continue
        rotation = tuple(float(x) for x in row["modelRotation"].split()) if row.get("modelRotation") else None
        tags = tuple(tag.strip() for tag in row.get("tags", "").split(",") if tag.strip())
        entry_id = _safe_id(f"{path.stem}-{Path(row['model']).parent.name}-{Path(row['model']).stem}")
        entries.append(
            Entry(entry_id, row["name"], path, row["model"].lstrip("/"), row.get("category", ""), tags,
                  row.get("creator", ""), library, licence, rotation)
        )  # fmt: skip
    return _unique(entries)


def _unique(entries: list[Entry]) -> list[Entry]:
    seen: dict[str, int] = {}
    out = []
    for entry in entries:
        seen[entry.id] = seen.get(entry.id, 0) + 1
        out.append(entry if seen[entry.id] == 1 else replace(entry, id=f"{entry.id}-{seen[entry.id]}"))
    return out


def parse_properties(text: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Java properties -> (plain keys, one dict per #N of the `key#N` ones, in order of N)."""
    head: dict[str, str] = {}
    rows: dict[int, dict[str, str]] = {}
    for line in lines(text):
        if line.startswith(("#", "!")) or "=" not in line:
            continue
        key, value = (_unescape(side.strip()) for side in line.split("=", 1))
        name, _, number = key.partition("#")
        if number.isdigit():
            rows.setdefault(int(number), {})[name] = value
        else:
            head[key] = value
    return head, [rows[n] for n in sorted(rows)]


def _unescape(text: str) -> str:
    return re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", lambda m: chr(int(m[1], 16)) if m[1] else m[2], text)


class _Members(Mapping):
    """The files of one folder of an archive, read on demand; a name is looked up, never used as a path."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        self.archive, self.folder = archive, folder

    def __getitem__(self, name: str) -> bytes:
        info = self.archive.getinfo(f"{self.folder}/{name}")
        if info.file_size > MAX_FILE_BYTES:
            raise MeshError(f"{name}: the file has {info.file_size >> 20} MB, at most {MAX_FILE_BYTES >> 20} are taken")
        return self.archive.read(info)

    def __iter__(self):
        prefix = f"{self.folder}/"
        return (n.removeprefix(prefix) for n in self.archive.namelist() if n.startswith(prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _untinted(part: Part) -> Part:
    """These libraries leave a dark or arbitrary diffuse beside a texture: only gray textures take its hue."""
    if part.texture is None:
        return part
    mean, rgb = part.texture.pixels[..., :3].reshape(-1, 3).mean(0) / 255, to_srgb(part.colors[0, :3])
    colored = rgb.max() < 0.05 or mean.max() - mean.min() > 0.08
    colors = part.colors.copy()
    colors[:, :3] = 1 if colored else to_linear(rgb / rgb.max())
    return replace(part, colors=colors)


@lru_cache(maxsize=8)
def _open(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _load_member(path: Path, member: str) -> Mesh:
    folder, _, name = member.rpartition("/")
    files = _Members(_open(path), folder)
    try:
        content = files[name]
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise MeshError(f"{member}: not readable in {path.name} ({error})") from None
    return load_mesh(content, name.rpartition(".")[2], files)
