"""Wavefront OBJ: polygons whose corners index positions, texture coordinates and normals, in groups of a material."""

from collections.abc import Iterator

import numpy as np

from mvdream_fast.core.color import to_linear
from mvdream_fast.core.files import lines
from mvdream_fast.rendering import mtl
from mvdream_fast.rendering.mesh import MeshError, Part
from mvdream_fast.rendering.polygons import part, triangulated
from mvdream_fast.rendering.reading import Reading, text_of

MAX_CORNERS = 6_000_000


def read(content: bytes, reading: Reading) -> Iterator[Part]:
    """One part for each material, and for its faces with and without normals and coordinates.

    Raises: MeshError, ValueError.
    """
    file = _Statements(text_of(content), reading)
    positions, colors = _vertices(file.rows["v"])
    uvs = np.array([(*row, "0")[:2] for row in file.rows["vt"]], float).reshape(-1, 2)
    normals = np.array([row[:3] for row in file.rows["vn"]], float).reshape(-1, 3)
    tables = (positions, uvs, normals)
    for (name, *_), polygons in file.polygons.items():
        counts = np.array([len(polygon) for polygon in polygons])
        corners = np.array([corner for polygon in polygons for corner in polygon], np.int64).reshape(-1, 3)
        for table, column in zip(tables, corners.T):
            if len(column) and column.max() >= len(table):
                raise MeshError(f"a face refers to vertex {column.max() + 1}, and there are {len(table)}")
        corners = corners[triangulated(positions[corners[:, 0]], counts)]
        reading.count_faces(len(corners) // 3)
        yield _part(file, name, corners, tables, colors, reading)


def _part(file: "_Statements", name: str | None, corners, tables, colors, reading: Reading) -> Part:
    positions, uvs, normals = tables
    v, vt, vn = corners.T
    material = file.material(name)
    color = material.color() if material else np.array([1.0] * 4)
    has_uv = len(vt) and vt.min() >= 0
    if colors is not None:
        corner_colors = colors[v] * color
    else:
        corner_colors = np.tile(color, (len(v), 1)) if material else None
    look = material.look(reading) if material else {}
    if not has_uv:
        look |= {"texture": None, "emission_texture": None}
    return part(
        positions,
        v.reshape(-1, 3),
        normals[vn] if len(vn) and vn.min() >= 0 else None,
        corner_colors,
        uvs[vt] if has_uv else None,
        **look,
    )


class _Statements:
    """The lines of an OBJ sorted by what they say."""

    def __init__(self, text: str, reading: Reading):
        self.reading, self.materials = reading, {}
        self.rows: dict[str, list[list[str]]] = {"v": [], "vt": [], "vn": []}
        # (material, has coordinates, has normals) -> corners (v, vt, vn)
        self.polygons: dict[tuple[str | None, bool, bool], list] = {}
        name, n_corners = None, 0
        for line in lines(text.replace("\\\r\n", " ").replace("\\\n", " ")):
            words = line.split("#", 1)[0].split() if "mtl" not in line else line.split()
            if not words:
                continue
            key = words[0]
            if key in self.rows:
                self.rows[key].append(words[1:])
            elif key in ("f", "fo"):
                corners = [self._corner(word) for word in words[1:]]
                n_corners += len(corners)
                if n_corners > MAX_CORNERS:
                    raise MeshError(f"its faces have more than {MAX_CORNERS} corners; decimate it first")
                has_uv, has_normals = (all(corner[i] >= 0 for corner in corners) for i in (1, 2))
                self.polygons.setdefault((name, has_uv, has_normals), []).append(corners)
            elif key == "usemtl":
                name = line.strip()[len(key) :].strip()
            elif key == "mtllib":
                self._library(line.strip()[len(key) :].strip())
            elif key in ("p", "l", "curv", "surf"):
                reading.note("points, lines and free-form surfaces are not drawn")

    def material(self, name: str | None) -> mtl.Material | None:
        if name is not None and name not in self.materials:
            self.reading.note(f"the material {name} is nowhere defined")
        return self.materials.get(name)

    def _corner(self, word: str) -> tuple[int, int, int]:
        """Rows of positions, coordinates and normals, -1 for none; negative indices count back from the last so far."""
        indices = [int(index) if index else 0 for index in word.split("/")] + [0, 0]
        out = []
        for index, key in zip(indices, ("v", "vt", "vn")):
            row = index - 1 if index >= 0 else len(self.rows[key]) + index
            if row < -1 or (row == -1 and (index < 0 or key == "v")):
                raise MeshError(f"a face refers to vertex {index}, which is not there")
            out.append(row)
        return tuple(out)

    def _library(self, names: str) -> None:
        """`names` is one name, with spaces perhaps, or several."""
        whole = self.reading.file(names)
        for name, content in [(names, whole)] if whole else [(n, self.reading.file(n)) for n in names.split()]:
            if content is None:
                self.reading.note(f"the material file {name} is not there")
            else:
                self.materials = mtl.read(content) | self.materials


def _vertices(rows: list[list[str]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions [P, 3] and colours [P, 4] in linear light or None: `v x y z`, `v x y z w`, `v x y z [w] r g b`.

    Colours are sRGB in [0, 1], or in [0, 255] where one is larger than 1; vertices without any are white.
    """
    widths = {len(row) for row in rows}
    if min(widths, default=3) < 3:
        raise MeshError("a vertex has fewer than three numbers")
    positions = np.array([row[:3] for row in rows], float).reshape(-1, 3)
    if max(widths, default=3) < 6:
        return positions, None
    colors = np.array([row[-3:] if len(row) >= 6 else ["nan"] * 3 for row in rows], float)
    colors = colors / 255 if np.nanmax(colors) > 1 else colors
    linear = to_linear(np.clip(np.nan_to_num(colors, nan=1.0), 0, 1))
    return positions, np.hstack([linear, np.ones((len(rows), 1))])
