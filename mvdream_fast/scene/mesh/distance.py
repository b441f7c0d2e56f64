"""How far points of a regular grid are from a mesh, and on which side."""

import math

import numpy as np
import torch

from mvdream_fast.ops.rasterize import fragments
from mvdream_fast.scene.mesh.mesh import Mesh

NEIGHBOURS = 8  # triangles that a point's distance is the least of


def signed_distance(
    mesh: Mesh, resolution: int, radius: float, reach: float, at: np.ndarray | None = None
) -> np.ndarray:
    """Distances to a mesh, negative inside, cut off at +-reach: [n, n, n] float32 for n = resolution + 1, axes xyz.

    The points are a regular grid over [-radius, radius]^3 that includes its borders; at: [K, 3], the whole numbers of
    those that are wanted, for [K]. Inside is where the surface winds around a point: every column of points is a pixel
    of an image of the mesh from above, whose fragments say where the column enters and leaves. An open mesh gives what
    its triangles above a point add up to.
    """
    n = resolution + 1
    spacing = 2 * radius / resolution
    chosen = tuple(np.indices((n, n, n)).reshape(3, -1) if at is None else at.T)
    inside = (_winding(mesh, n, spacing) > 0)[chosen]
    close = _close(mesh, n, spacing, reach)[chosen]
    points = np.stack([np.linspace(-radius, radius, n)[axis[close]] for axis in chosen], -1)
    distance = np.full(len(close), reach)
    distance[close] = surface_distance(points, mesh, spacing, reach)
    signed = np.where(inside, -distance, distance).astype(np.float32)
    return signed.reshape(n, n, n) if at is None else signed


def _close(mesh: Mesh, n: int, spacing: float, reach: float) -> np.ndarray:
    """Which points of the grid can be within `reach` of the mesh, and more, [n, n, n]."""
    from scipy.ndimage import maximum_filter

    whole = np.rint(_samples(mesh, spacing / 2)[0] / spacing + (n - 1) / 2).astype(np.int64).clip(0, n - 1)
    near = np.zeros((n, n, n), np.uint8)
    near[tuple(whole.T)] = 1
    width = 2 * min(math.ceil(reach / spacing) + 1, n) + 1
    return np.asarray(maximum_filter(near, width, mode="constant")) > 0


def _winding(mesh: Mesh, n: int, spacing: float) -> np.ndarray:
    """How often the surface winds around each point, [n, n, n]."""
    whole = mesh.vertices.astype(np.float64) / spacing + (n - 1) / 2  # the grid's points are whole numbers
    top = np.abs(whole[:, 2] - (n - 1) / 2).max(initial=1) * 1.01
    clip = np.ones((len(whole), 4), np.float32)
    clip[:, :2] = (whole[:, :2] + 0.5) * 2 / n - 1
    clip[:, 2] = (whole[:, 2] - (n - 1) / 2) / top
    a, b, c = (clip[mesh.faces[:, k], :2].astype(np.float64) for k in range(3))
    up = np.sign((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0])
    passed = np.zeros((n * n, n + 1))
    for face, pixel, values in fragments(torch.from_numpy(clip), torch.from_numpy(mesh.faces), (n, n)):
        height = values[:, 2].double().numpy() * top + (n - 1) / 2
        first_above = np.ceil(height).clip(0, n).astype(np.int64)
        np.add.at(passed, (pixel.numpy(), first_above), up[face.numpy()])
    above = passed[:, ::-1].cumsum(1)[:, ::-1][:, 1:]  # [pixel, z]: the surfaces over each point
    return above.reshape(n, n, n).transpose(1, 0, 2)  # rows of the image are y


def surface_distance(points: np.ndarray, mesh: Mesh, spacing: float, reach: float) -> np.ndarray:
    """Unsigned distances [P], at most `reach`, to the nearest of the triangles whose samples are nearest."""
    from scipy.spatial import KDTree

    samples, face = _samples(mesh, spacing / 2)
    near, index = KDTree(samples).query(points, NEIGHBOURS, distance_upper_bound=reach + spacing)
    index, found = np.asarray(index), np.isfinite(near).nonzero()
    corners = mesh.vertices[mesh.faces[face[index[found]]]].astype(np.float64)
    distance = np.full(near.shape, reach)
    distance[found] = triangle_distance(points[found[0]], corners)
    return distance.min(1).clip(max=reach)


def _samples(mesh: Mesh, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Points [K, 3] inside of all triangles, at most `spacing` from their neighbours, and the face [K] of each."""
    corners = mesh.vertices[mesh.faces].astype(np.float64)  # [m, 3, 3]
    longest = np.linalg.norm(corners - np.roll(corners, 1, 1), axis=2).max(1, initial=0)
    parts = np.ceil(longest / spacing).astype(np.int64).clip(min=1)
    points, faces = [], []
    for n in np.unique(parts):
        chosen = np.flatnonzero(parts == n)
        weights = np.array([(i + 1 / 3, j + 1 / 3, n - i - j - 2 / 3) for i in range(n) for j in range(n - i)]) / n
        points.append(np.einsum("kc,mcd->mkd", weights, corners[chosen]).reshape(-1, 3))
        faces.append(np.repeat(chosen, len(weights)))
    return np.concatenate(points), np.concatenate(faces)


def triangle_distance(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Distances [K] of points [K, 3] from triangles [K, 3, 3]."""
    ends = np.roll(corners, -1, 1)
    edge, from_corner = ends - corners, points[:, None] - corners
    along = (edge * from_corner).sum(2) / np.maximum((edge * edge).sum(2), 1e-30)
    to_edges = np.linalg.norm(from_corner - along.clip(0, 1)[..., None] * edge, axis=2).min(1)
    normal = np.cross(edge[:, 0], edge[:, 1])
    length = np.linalg.norm(normal, axis=1)
    above = (np.cross(edge, from_corner) * normal[:, None]).sum(2).min(1) > 0  # the plane's nearest point is in it
    to_plane = np.abs((from_corner[:, 0] * normal).sum(1)) / np.maximum(length, 1e-30)
    return np.where(above, to_plane, to_edges)
