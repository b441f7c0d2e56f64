"""Anti-aliased outlines of closed meshes whose triangles may be thinner than a pixel there, with gradients.

`ops.antialias` looks, like nvdiffrast, at the triangle that a pixel shows. At the limb of anything round that is rarely
the one with the outline: the triangles there are seen from the side, and cover no pixel's centre. Of a ball of 10,000
triangles at 256 x 256 it finds an outline at one pixel in sixty, so hardly anything pulls at the ball's size. Here the
outline's own edges are followed from pixel to pixel instead; blending is the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Crossings(NamedTuple):
    """Where edges cross the lines between neighbouring pixels: image [K], ends [K, 2] (vertices of the edge), axis [K]
    (0: the pixels are neighbours in a row), line [K] (the row or column), first [K] (the left or upper pixel of the
    two) and after [K], whether the surface is at the second."""

    image: Tensor
    ends: Tensor
    axis: Tensor
    line: Tensor
    first: Tensor
    after: Tensor


def smooth_outlines(image: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, topology: Tensor) -> Tensor:
    """Blends the numbers of neighbouring pixels where an outline passes between them, by how much each it covers.

    image: [V, Hp, Wp, C]. rast: [V, Hp, Wp, 4] of `rasterize`. clip: [V, n, 4] with y downwards; faces: [m, 3] int32,
    counter-clockwise from outside; topology: `edge_topology` of them.

    An outline is an edge with one triangle, or between one that faces the camera and one that does not. Where it
    crosses the line between two pixels' centres at less than 45 degrees from its normal, with its surface shown at one
    and something farther at the other, the pixel on whose half the crossing is takes the other's numbers in part: at
    distance d from the surface's pixel, that one 1/2 - d of the other's, or the other d - 1/2 of its. Of several edges
    between two pixels the nearest to the camera counts. Differentiable in image and clip.

    Returns: [V, Hp, Wp, C].
    """
    with torch.no_grad():
        found = _nearest(_crossings(clip, faces, topology, rast.shape[1:3]), clip, rast)
    at = _place(found, clip, rast.shape[1:3])[0] - found.first
    distance = torch.where(found.after, 1 - at, at).clamp(0, 1)  # from the surface's pixel
    first, second = _pixels(found, rast.shape)
    own, other = torch.where(found.after, second, first), torch.where(found.after, first, second)
    near = distance < 0.5
    taker, giver = torch.where(near, own, other), torch.where(near, other, own)
    flat = image.flatten(0, 2)
    change = flat.index_select(0, giver) - flat.index_select(0, taker)
    return flat.index_add(0, taker, (distance - 0.5).abs()[:, None] * change).view(image.shape)


def _crossings(clip: Tensor, faces: Tensor, topology: Tensor, size: torch.Size) -> Crossings:
    """All crossings of the outlines, seen or hidden."""
    screen = torch.where(clip[..., 3:] > 0, _screen(clip, size), torch.nan)  # [V, n, 2]; NaN is no outline
    triangles = torch.stack([screen.index_select(1, column) for column in faces.long().unbind(1)], 2)  # [V, m, 3, 2]
    a, b, c = triangles.unbind(2)
    area = _cross(b - a, c - a)
    border = (topology < 0).any(1)
    image, face = ((area < 0) | (border & (area > 0))).nonzero().unbind(1)  # negative faces us, with y downwards
    own, corners = area[image, face], triangles[image, face]
    start, end = corners.roll(-1, 1), corners.roll(-2, 1)  # [K, 3, 2], of the edge opposite to each corner
    across = topology.index_select(0, face).long()
    beyond = screen.flatten(0, 1)[(image * screen.shape[1])[:, None] + across.clamp(min=0)]
    outline = (across < 0) | ((own[:, None] < 0) & (_cross(end - start, beyond - start) <= 0))
    row, corner = outline.nonzero().unbind(1)
    image, own, face, way = image[row], own[row], face[row], (end - start)[row, corner]
    ends = torch.stack([faces[face, (corner + 1) % 3], faces[face, (corner + 2) % 3]], 1).long()
    axis = (way[:, 0].abs() > way[:, 1].abs()).long()  # of the pixels, across the edge
    rows = torch.arange(len(image), device=clip.device)
    low, high = (screen[image, ends[:, k], 1 - axis] for k in (0, 1))
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    limit = clip.new_tensor([size[0], size[1]])[axis]
    first, last = (torch.minimum(x.ceil().clamp(min=0), limit).long() for x in (low, high))
    count = (last - first).clamp(min=0)
    edge = rows.repeat_interleave(count)
    line = first[edge] + torch.arange(len(edge), device=clip.device) - (count.cumsum(0) - count)[edge]
    # The surface is where the area has the triangle's sign: along x that is minus the way's y times the step.
    rise = torch.where(axis == 0, -way[:, 1], way[:, 0])
    after = (rise * own > 0)[edge]
    found = Crossings(image[edge], ends[edge], axis[edge], line, line, after)
    return found._replace(first=_place(found, clip, size)[0].floor().long())


def _nearest(found: Crossings, clip: Tensor, rast: Tensor) -> Crossings:
    """Those with the surface at one pixel and something farther at the other; one for each two pixels."""
    limit = torch.tensor([rast.shape[2], rast.shape[1]], device=rast.device)[found.axis]
    found = _rows(found, (found.first >= 0) & (found.first < limit - 1))
    depth = _place(found, clip, rast.shape[1:3])[1]
    first, second = _pixels(found, rast.shape)
    shown = rast.view(-1, 4)
    other = shown[torch.where(found.after, first, second)]
    own = shown[torch.where(found.after, second, first)]
    kept = (own[:, 3] > 0) & ((other[:, 3] == 0) | (other[:, 2] > depth))
    found, depth, first = _rows(found, kept), depth[kept], first[kept]
    order = torch.argsort(depth, stable=True)
    pair = (first * 2 + found.axis)[order]
    by_pair = torch.argsort(pair, stable=True)
    order, pair = order[by_pair], pair[by_pair]
    leads = torch.cat([pair.new_ones(min(len(pair), 1), dtype=torch.bool), pair[1:] != pair[:-1]])
    return _rows(found, order[leads])


def _place(found: Crossings, clip: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
    """Where along the line between the pixels [K], in pixels' numbers, and how deep [K] (z / w) the crossing is."""
    ends = clip[found.image[:, None], found.ends]  # [K, 2, 4]
    screen, depth = _screen(ends, size), ends[..., 2] / ends[..., 3]
    across = screen.gather(2, (1 - found.axis)[:, None, None].expand(-1, 2, 1))[..., 0]
    along = screen.gather(2, found.axis[:, None, None].expand(-1, 2, 1))[..., 0]
    share = (found.line - across[:, 0]) / (across[:, 1] - across[:, 0])
    return along[:, 0] + share * (along[:, 1] - along[:, 0]), depth[:, 0] + share * (depth[:, 1] - depth[:, 0])


def _screen(clip: Tensor, size: torch.Size) -> Tensor:
    """[..., 2]: x and y in pixels, whole numbers at their centres."""
    half = clip.new_tensor([size[1] / 2, size[0] / 2])
    return (clip[..., :2] / clip[..., 3:] + 1) * half - 0.5


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _pixels(found: Crossings, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The numbers of both pixels among all of all images, [K] each."""
    _, height, width, _ = shape
    row = torch.where(found.axis == 0, found.line, found.first)
    column = torch.where(found.axis == 0, found.first, found.line)
    first = (found.image * height + row) * width + column
    return first, first + torch.where(found.axis == 0, 1, width)


def _rows(found: Crossings, kept: Tensor) -> Crossings:
    return Crossings(*(x[kept] for x in found))
