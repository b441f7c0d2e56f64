"""Which pixels lie in which triangles of a square sheet: of a rasteriser's picture, or of a texture."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

PAIRS = 1 << 20  # (triangle, pixel) candidates looked at in one go


class Covered(NamedTuple):
    """Pixels whose centres lie in triangles: face [K] the triangle, x, y [K], weights [K, 3] barycentric."""

    face: np.ndarray
    x: np.ndarray
    y: np.ndarray
    weights: np.ndarray


def covered_pixels(triangles: np.ndarray, size: int, tolerance: float = 0.0) -> Iterator[Covered]:
    """All of them for triangles [M, 3, 2] on size x size pixels, in chunks of about PAIRS candidates, in their order.

    Pixel (i, j) has its centre at (i + 0.5, j + 0.5). A centre between a triangle's lowest and highest x and y, and
    up to `tolerance` outside of it in barycentric weights, is inside. A triangle without area covers nothing.
    """
    low = np.clip(np.ceil(triangles.min(1) - 0.5), 0, size).astype(np.int64)  # [M, 2]
    high = np.clip(np.floor(triangles.max(1) - 0.5), -1, size - 1).astype(np.int64)
    span = np.maximum(high - low + 1, 0)
    counts = span.prod(1)
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        stop = max(start + 1, int(np.searchsorted(ends, (ends[start - 1] if start else 0) + PAIRS, "right")))
        chunk = np.arange(start, stop)[counts[start:stop] > 0]
        if len(chunk):
            yield _inside(triangles, chunk, low, span, counts[chunk], tolerance)
        start = stop


def _inside(triangles, chunk, low, span, counts, tolerance) -> Covered:
    face = np.repeat(chunk, counts)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    x, y = low[face, 0] + nth % span[face, 0], low[face, 1] + nth // span[face, 0]
    a, b, c = (triangles[face, k] for k in range(3))
    p = np.stack([x + 0.5, y + 0.5], 1)
    area = cross(b - a, c - a)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.stack([cross(c - b, p - b), cross(a - c, p - c), cross(b - a, p - a)], 1) / area[:, None]
    keep = (weights >= -tolerance).all(1)  # NaN, of a triangle without area, is not kept
    return Covered(face[keep], x[keep], y[keep], weights[keep])


def cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The signed areas of the parallelograms that pairs of vectors span, [K] for u, v [K, 2]."""
    return u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]
