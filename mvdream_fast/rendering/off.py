"""OFF: polygons with colours (sRGB) of vertices (COFF) or of faces, as Geomview and MeshLab write them."""

from collections.abc import Iterator

import numpy as np

from mvdream_fast.core import files
from mvdream_fast.core.color import to_linear
from mvdream_fast.rendering.mesh import MeshError, Part
from mvdream_fast.rendering.polygons import part, triangulated
from mvdream_fast.rendering.reading import Reading, text_of


def read(content: bytes, reading: Reading) -> Iterator[Part]:
    """One part. Raises: MeshError, and ValueError for numbers that are none."""
    lines = [line for line in (raw.split("#", 1)[0].strip() for raw in files.lines(text_of(content))) if line]
    kind = lines[0].split()[0] if lines else ""
    if not kind.endswith("OFF") or set(kind[:-3]) - set("STCN"):
        raise MeshError("is no text OFF with three coordinates: it must begin with OFF, COFF, NOFF or STOFF")
    lines[0] = lines[0][len(kind) :].strip()
    rows = [line.split() for line in lines if line]
    n_vertices, n_faces = int(rows[0][0]), int(rows[0][1])
    vertices, faces = rows[1 : 1 + n_vertices], rows[1 + n_vertices : 1 + n_vertices + n_faces]
    if len(vertices) < n_vertices or len(faces) < n_faces:
        raise MeshError("promises more rows than the file has: it is cut short")
    positions = np.array([row[:3] for row in vertices], float).reshape(-1, 3)
    counts = np.array([int(row[0]) for row in faces], int)
    index = np.array([i for row, n in zip(faces, counts) for i in row[1 : 1 + n]], int)
    if len(index) != counts.sum() or (len(index) and (index.min() < 0 or index.max() >= n_vertices)):
        raise MeshError(f"a face refers to a vertex that is not there: there are {n_vertices}")
    corner = triangulated(positions[index], counts)
    reading.count_faces(len(corner) // 3)
    if "C" in kind:
        at = 6 if "N" in kind else 3
        colors = _linear([row[at : at + 4] for row in vertices])[index[corner]]
    else:
        given = [row[1 + n :] for row, n in zip(faces, counts)]
        owner = np.repeat(np.arange(n_faces), counts)[corner]
        colors = _linear(given)[owner] if any(len(row) >= 3 for row in given) else None
    blend = colors is not None and bool(colors[:, 3].min(initial=1) < 1)
    yield part(positions, index[corner].reshape(-1, 3), colors=colors, blend=blend)


def _linear(rows: list[list[str]]) -> np.ndarray:
    """Linear light and alpha [n, 4] of `r g b [a]` in [0, 1], or in [0, 255] where all are whole; else 0.8 grey."""
    whole = all(word.isdigit() for row in rows for word in row)
    scale = 255 if whole else 1
    padded = [[*row, str(scale)][:4] if len(row) >= 3 else [str(0.8 * scale)] * 3 + [str(scale)] for row in rows]
    values = np.clip(np.array(padded, float).reshape(-1, 4) / scale, 0, 1)
    return np.hstack([to_linear(values[:, :3]), values[:, 3:]])
