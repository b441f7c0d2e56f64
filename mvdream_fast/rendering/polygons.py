"""From corners to parts: polygons into triangles, normals where a file has none, equal corners joined.

For the formats that list polygons or index each attribute by itself: OBJ, PLY, DAE, STL, OFF, 3MF.
"""

from collections.abc import Iterator

import numpy as np

from mvdream_fast.rendering.mesh import MeshError, Part, grey_where_nothing_is_said

CREASE_COSINE = 0.7  # edges sharper than 45 degrees stay sharp
MAX_VALENCE = 64
CORNERS_AT_A_TIME = 1 << 18


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., 3] of length 1; zero stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def face_normals(positions: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """[M, 3], twice the area long."""
    a, b, c = (positions[faces[:, i]] for i in range(3))
    return np.cross(b - a, c - a)


def triangulated(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Polygons as triangles: rows of `points` [K, 3], three each, [3M]; `counts` [n] corners belong to each polygon.

    Convex ones become fans from their first corner; from concave ones ears are cut. Ordered by the number of corners.
    """
    first = np.cumsum(counts) - counts
    out = [np.zeros(0, int)]
    for n in np.unique(counts[counts >= 3]).tolist():
        corners = first[counts == n][:, None] + np.arange(n)
        fans = np.stack([np.zeros(n - 2, int), np.arange(1, n - 1), np.arange(2, n)], 1).reshape(-1)
        triangles = corners[:, fans]
        if n > 3:
            for row in np.flatnonzero(_concave(points[corners])):
                triangles[row] = corners[row][_ears(points[corners[row]])]
        out.append(triangles.reshape(-1))
    return np.concatenate(out)


def _turns(polygons: np.ndarray) -> np.ndarray:
    """How each corner of [n, k, 3] turns, seen along the polygon's own normal (Newell's): [n, k]."""
    before, after = np.roll(polygons, 1, 1), np.roll(polygons, -1, 1)
    normal = np.cross(polygons, after).sum(1, keepdims=True)
    return (np.cross(polygons - before, after - polygons) * normal).sum(2)


def _concave(polygons: np.ndarray) -> np.ndarray:
    turns = _turns(polygons - polygons[:, :1])
    return turns.min(1) < -1e-9 * np.abs(turns).max(1)


def _ears(polygon: np.ndarray) -> np.ndarray:
    """Triangles [3 (k - 2)] of a simple polygon [k, 3]: corners that turn outwards and hold no other are cut off."""
    if len(polygon) > 1000:
        raise MeshError(f"a concave polygon has {len(polygon)} corners, at most 1000 are taken")
    normal = np.cross(polygon, np.roll(polygon, -1, 0)).sum(0)
    rest, out = list(range(len(polygon))), []
    while len(rest) > 3:
        ears = (i for i in range(len(rest)) if _is_ear(polygon, rest, i, normal))
        i = next(ears, 1)  # a polygon that crosses itself has none: any corner will do
        out += [rest[i - 1], rest[i], rest[(i + 1) % len(rest)]]
        del rest[i]
    return np.array(out + rest)


def _is_ear(polygon: np.ndarray, rest: list[int], i: int, normal: np.ndarray) -> bool:
    ear = [rest[i - 1], rest[i], rest[(i + 1) % len(rest)]]
    triangle = polygon[ear]
    sides = np.roll(triangle, -1, 0) - triangle
    if np.cross(sides[0], sides[1]) @ normal <= 0:
        return False
    others = polygon[[k for k in rest if k not in ear]]
    side_of = np.cross(sides[None], others[:, None] - triangle[None]) @ normal
    return not (side_of >= 0).all(1).any()


def joined(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [K, 3], each once, and the row of every one: for formats that repeat a position in each of its faces."""
    rows = np.ascontiguousarray(points, np.float64) + 0.0  # -0 and 0 are the same
    _, first, index = np.unique(_as_rows(rows), return_index=True, return_inverse=True)
    return rows[first], index


def _as_rows(table: np.ndarray) -> np.ndarray:
    """The rows of a table [K, n] as one value each, [K], which are sorted several times as fast as with axis=0."""
    return table.view(np.dtype((np.void, table.strides[0]))).reshape(-1)


def part(
    positions: np.ndarray,
    faces: np.ndarray,
    normals: np.ndarray | None = None,
    colors: np.ndarray | None = None,
    uv: np.ndarray | None = None,
    **look,
) -> Part:
    """A Part of positions [P, 3] and faces [M, 3], whose other attributes belong to corners: rows of [3M, ...].

    Without normals, edges under 45 degrees are smooth; without colours, it is light grey. `look` goes to Part; its
    textures are given without coordinates, as functions of `uv`.
    """
    faces = np.asarray(faces, np.int64)
    positions = np.asarray(positions, np.float64)
    if normals is None:
        normals = _creased(positions, faces)
    colors = grey_where_nothing_is_said(faces.size) if colors is None else colors
    uv = np.zeros((faces.size, 2)) if uv is None else uv
    corners = np.hstack([positions[faces.reshape(-1)], unit(np.nan_to_num(normals)), colors, uv]).astype(np.float32)
    rows = _as_rows(np.ascontiguousarray(corners + 0.0))  # -0 and 0 are the same
    _, first, index = np.unique(rows, return_index=True, return_inverse=True)
    kept = corners[first]
    for name in ("texture", "emission_texture"):
        if look.get(name) is not None:
            look[name] = look[name](np.ascontiguousarray(kept[:, 10:]))
    triangles = index.reshape(-1, 3).astype(np.int32)
    positions, normals, colors = (np.ascontiguousarray(kept[:, a:b]) for a, b in ((0, 3), (3, 6), (6, 10)))
    return Part(positions, normals, colors, triangles, **look)


def _creased(positions: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Corner normals [3M, 3] for files without any: each face's own, averaged with its neighbours at the corner that
    turn by less than CREASE_COSINE (by area, so that slivers do not tilt them)."""
    area = face_normals(positions, faces)
    direction = unit(area)
    total = np.empty((faces.size, 3))
    for begin, end, corner, other in _neighbours(faces, len(positions)):
        near = (direction[corner // 3] * direction[other // 3]).sum(1) > CREASE_COSINE
        corner, weight = corner[near] - begin, area[other[near] // 3]
        total[begin:end] = np.stack([np.bincount(corner, weight[:, k], end - begin) for k in range(3)], 1)
    return np.where((total**2).sum(1, keepdims=True) > 0, unit(total), np.repeat(direction, 3, axis=0))


def _neighbours(faces: np.ndarray, n_vertices: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """All pairs of corners (rows of faces.reshape(-1)) that share a vertex, each with itself included.

    They come as (begin, end, corner, other), those of corners begin..end at a time: a million faces have many. A corner
    of a vertex with more than MAX_VALENCE is paired with itself only: pairs grow with the square.
    """
    vertex = faces.reshape(-1)
    order = np.argsort(vertex, kind="stable")
    valence = np.bincount(vertex, minlength=n_vertices)
    first = np.cumsum(valence) - valence
    count = np.where(valence[vertex] > MAX_VALENCE, 1, valence[vertex])
    for begin in range(0, len(vertex), CORNERS_AT_A_TIME):
        end = min(begin + CORNERS_AT_A_TIME, len(vertex))
        repeats = count[begin:end]
        corner = np.repeat(np.arange(begin, end), repeats)
        within = np.arange(len(corner)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        crowded = valence[vertex[corner]] > MAX_VALENCE
        yield begin, end, corner, np.where(crowded, corner, order[(first[vertex[corner]] + within) % len(order)])
