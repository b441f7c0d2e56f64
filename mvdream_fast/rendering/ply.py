"""PLY, ascii and binary: its elements as arrays, and those that meshes use as parts.

Colours are sRGB, as MeshLab writes and shows them, of vertices or faces; texture coordinates go up, MeshLab's way.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mvdream_fast.core.color import to_linear
from mvdream_fast.core.files import lines
from mvdream_fast.rendering import images
from mvdream_fast.rendering.mesh import HOLE, MeshError, Part, Texture
from mvdream_fast.rendering.polygons import part, triangulated
from mvdream_fast.rendering.reading import Reading

TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
         "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
         "float32": "f4", "float64": "f8"}  # fmt: skip
ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
COLORS = (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue"))
COORDINATES = (("s", "t"), ("u", "v"), ("texture_u", "texture_v"))


@dataclass
class Element:
    """One kind of row: its number and its properties, (name, type, type of the length where it is a list)."""

    name: str
    count: int
    properties: list[tuple[str, str, str | None]] = field(default_factory=list)


# Of a list, its values in a row and the length of each.
Column = np.ndarray | tuple[np.ndarray, np.ndarray]


def read(content: bytes, reading: Reading) -> Iterator[Part]:
    """One part for each texture. Raises: MeshError, and ValueError for numbers that are none."""
    order, elements, names, body = _header(content)
    rows = (_ascii if order == "" else _binary)(body, elements, order)
    vertex, face = rows.get("vertex", {}), rows.get("face", {})
    positions = _matrix(vertex, ("x", "y", "z"))
    if positions is None:
        raise MeshError("has no vertices with x, y and z")
    index, counts = _polygons(face, rows)
    if len(index) and (index.max() >= len(positions) or index.min() < 0):
        raise MeshError(f"a face refers to vertex {index.max()}, and there are {len(positions)}")
    corner = triangulated(positions[index], counts)
    reading.count_faces(len(corner) // 3)
    owner = np.repeat(np.arange(len(counts)), counts)[corner]  # the face of each corner
    v = index[corner]
    normals, colors, uv, has_uv = _attributes(vertex, face, v, corner, owner, counts)
    alpha = colors is not None and colors[:, 3].min() < 1
    numbers = face["texnumber"][owner[::3]].astype(int) if "texnumber" in face else np.zeros(len(v) // 3, int)
    numbers = np.where(has_uv[::3], numbers, -1) if names else numbers  # only faces without any go without
    for number in np.unique(numbers):
        rows_of = np.repeat(numbers == number, 3)
        chosen = [None if a is None else a[rows_of] for a in (normals, colors, uv)]
        place = _texture(names, number, reading) if uv is not None else None
        if place is not None and colors is None:
            chosen[1] = np.ones((rows_of.sum(), 4))
        yield part(positions, v[rows_of].reshape(-1, 3), *chosen, texture=place, blend=bool(alpha), cutoff=HOLE)


def _attributes(vertex: dict, face: dict, v: np.ndarray, corner: np.ndarray, owner: np.ndarray, counts: np.ndarray):
    """Normals, colours and coordinates of the corners, each None where the file has none; which have coordinates."""
    normals = _matrix(vertex, ("nx", "ny", "nz"))
    colors = _colors(vertex, v)
    colors = _colors(face, owner) if colors is None else colors
    uv = next((m[v] for m in (_matrix(vertex, pair) for pair in COORDINATES) if m is not None), None)
    has_uv = np.full(len(v), uv is not None)
    if "texcoord" in face and len(face["texcoord"][1]) == len(counts):
        values, lengths = face["texcoord"][0], face["texcoord"][1].astype(np.int64)
        own = ((lengths == 2 * counts) & (counts > 0))[owner]
        first = np.cumsum(lengths) - lengths - 2 * (np.cumsum(counts) - counts)
        at = (first[owner] + 2 * corner)[own]
        uv = np.zeros((len(v), 2)) if uv is None else uv
        uv[own] = np.stack([values[at], values[at + 1]], 1)
        has_uv |= own
    return None if normals is None else normals[v], colors, uv, has_uv


def _matrix(columns: dict, names: tuple[str, ...]) -> np.ndarray | None:
    return np.stack([columns[n] for n in names], 1).astype(float) if all(n in columns for n in names) else None


def _colors(columns: dict, rows: np.ndarray) -> np.ndarray | None:
    """Linear light and alpha, [K, 4]; whole numbers reach to their type's largest."""
    names = next((names for names in COLORS if all(name in columns for name in names)), None)
    if names is None:
        return None

    def values(name: str) -> np.ndarray:
        column = columns[name]
        return np.clip(column / np.iinfo(column.dtype).max if column.dtype.kind in "iu" else column, 0, 1)

    rgb = np.stack([to_linear(values(name)) for name in names], 1)
    alpha = values("alpha") if "alpha" in columns else values("a") if "a" in columns else np.ones(len(rgb))
    return np.hstack([rgb, alpha[:, None]])[rows]


def _texture(names: list[str], number: int, reading: Reading):
    if not 0 <= number < len(names):
        return None
    content = reading.file(names[number])
    if content is None:
        reading.note(f"the texture {names[number]} is not there and is not drawn")
        return None
    pixels = images.decode(content)
    return lambda uv: Texture(pixels, np.stack([uv[:, 0], 1 - uv[:, 1]], 1))


def _polygons(face: dict, rows: dict) -> tuple[np.ndarray, np.ndarray]:
    """Vertex indices of all polygons in a row, and how many each has; strips end at -1."""
    for name in ("vertex_indices", "vertex_index"):
        if name in face:
            return face[name][0].astype(np.int64), face[name][1].astype(np.int64)
    strips = rows.get("tristrips", {}).get("vertex_indices")
    if strips is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    out = []
    for strip in np.split(strips[0].astype(np.int64), np.cumsum(strips[1])[:-1]):
        for run in np.split(strip, np.flatnonzero(strip == -1)):
            run = run[run != -1]
            i = np.arange(max(len(run) - 2, 0))
            out.append(run[np.stack([i, i + 1 + i % 2, i + 2 - i % 2], 1)].reshape(-1))
    index = np.concatenate(out)
    return index, np.full(len(index) // 3, 3)


def _header(content: bytes) -> tuple[str, list[Element], list[str], bytes]:
    """Byte order, elements, names of textures, and what follows."""
    head, mark, rest = content.partition(b"end_header")
    if content[:3] != b"ply" or not mark:
        raise MeshError("is no PLY: it must begin with ply and have an end_header")
    rest = rest[2:] if rest[:2] == b"\r\n" else rest[1:]
    order, elements, names = None, [], []
    for line in lines(head.decode("utf-8", "replace")):
        words = line.split()
        if words[:1] == ["format"]:
            order = ORDERS.get(words[1])
        elif words[:1] == ["element"]:
            elements.append(Element(words[1], int(words[2])))
        elif words[:2] == ["property", "list"]:
            elements[-1].properties.append((words[4], TYPES[words[3]], TYPES[words[2]]))
        elif words[:1] == ["property"]:
            elements[-1].properties.append((words[2], TYPES[words[1]], None))
        elif words[:2] == ["comment", "TextureFile"]:
            names.append(line.split(None, 2)[2].strip())
    if order is None:
        raise MeshError(f"its format is none of {', '.join(ORDERS)}")
    if any(element.count < 0 or element.count > len(rest) for element in elements):
        raise MeshError("promises more rows than the file has bytes: it is cut short")
    return order, elements, names, rest


def _ascii(body: bytes, elements: list[Element], order: str) -> dict[str, dict[str, Column]]:
    numbers, at, out = np.array(body.split(), np.float64), 0, {}
    for element in elements:
        if not any(length for _, _, length in element.properties):
            width = len(element.properties)
            table = numbers[at : at + element.count * width].reshape(element.count, width)
            at += table.size
            columns = {name: table[:, i].astype(kind) for i, (name, kind, _) in enumerate(element.properties)}
        else:
            columns, at = _lists(element, at, lambda kind, n, at: (numbers[at : at + n], at + n))
        out[element.name] = columns
    return out


def _binary(body: bytes, elements: list[Element], order: str) -> dict[str, dict[str, Column]]:
    def take(kind: str, n: int, at: int) -> tuple[np.ndarray, int]:
        return np.frombuffer(body, order + kind, n, at), at + n * np.dtype(kind).itemsize

    at, out = 0, {}
    for element in elements:
        out[element.name], at = _even(body, element, order, at) or _lists(element, at, take)
    return out


def _even(body: bytes, element: Element, order: str, at: int):
    """All rows at once, where every list is as long as in the first; else None."""
    fields, offset = [], at
    for name, kind, length in element.properties:
        n = 1
        if length and element.count:
            n = int(np.frombuffer(body, order + length, 1, offset)[0])
            fields.append((f"length of {name}", order + length))
            offset += np.dtype(length).itemsize
        fields.append((name, order + kind, (n,)))
        offset += n * np.dtype(kind).itemsize
    row = np.dtype(fields)
    if at + row.itemsize * element.count > len(body):
        return None
    table = np.frombuffer(body, row, element.count, at)
    columns = {}
    for name, _, length in element.properties:
        values = table[name]
        if length and element.count:
            counts = table[f"length of {name}"]
            if (counts != values.shape[1]).any():
                return None
            columns[name] = values.reshape(-1), counts
        else:
            columns[name] = (values[:0, 0], values[:0, 0]) if length else values[:, 0]
    return columns, at + row.itemsize * element.count


def _lists(element: Element, at: int, take) -> tuple[dict[str, Column], int]:
    """Row by row; `take(kind, n, at)` gives n numbers and where they end."""
    found: dict[str, list] = {name: [] for name, _, _ in element.properties}
    for _ in range(element.count):
        for name, kind, length in element.properties:
            n = 1
            if length:
                count, at = take(length, 1, at)
                n = int(count[0]) if len(count) else -1
            values, at = take(kind, max(n, 0), at)
            if len(values) < n or n < 0:
                raise MeshError(f"the {element.name} rows are cut short")
            found[name].append(values)
    columns = {}
    for name, kind, length in element.properties:
        values = np.concatenate(found[name]).astype(kind) if found[name] else np.zeros(0, kind)
        columns[name] = (values, np.array([len(v) for v in found[name]], np.int64)) if length else values
    return columns, at
