"""Silhouettes that move smoothly: colours at the edges of what is seen, and the vertices' gradients through them."""

from typing import NamedTuple

import torch
from torch import Tensor

from mvdream_fast.ops._edges import (
    BACKENDS,
    address,
    check_same_device,
    is_batched,
    is_watched,
    load_native,
    new_result,
    queue_of,
    require,
    runs_natively,
    thread_count,
    vmap_error,
)
from mvdream_fast.ops._registered import differentiable, register
from mvdream_fast.ops._triangles import check_as, check_faces, check_indices, check_rast
from mvdream_fast.ops.rasterize import meshes_of


class Crossings(NamedTuple):
    """Where outlines pass between neighbouring pixels: image [K], edge [K] (three times the triangle, plus the corner
    that it is opposite to), axis [K] (0: the pixels are neighbours in a row), line [K] (the row or column), first [K]
    (the left or lower pixel of the two), first_owns [K] (whether the outline's surface is at that one), depth [K]."""

    image: Tensor
    edge: Tensor
    axis: Tensor
    line: Tensor
    first: Tensor
    first_owns: Tensor
    depth: Tensor


def antialias(color: Tensor, rast: Tensor, pos: Tensor, tri: Tensor, topology: Tensor | None = None) -> Tensor:
    """Blends the colours of neighbouring pixels where a silhouette passes between them, by how much each it covers.

    color: [B, Hp, Wp, C]. rast: [B, Hp, Wp, 4] of `rasterize`. pos: [V, 4] (B = 1) or [B, V, 4] and tri: [F, 3] int32
    as given to it. topology: `edge_topology(tri)`, to be made once for a mesh that keeps its triangles; None makes it.

    An outline is an edge that has one triangle, or two that lie on one side of it, and is followed over the screen.
    Where it crosses the line between two neighbouring pixels' centres at less than 45 degrees from its normal, with a
    surface shown by the pixel on its triangles' side and something farther than itself by the other, it is a
    silhouette; of several the nearest is. At distance d from the surface's pixel, that pixel takes 1/2 - d of the
    other's colour, or the other one d - 1/2 of its. So the image is continuous in the silhouettes' places: the only
    gradients of pos that `rasterize` has not.

    nvdiffrast's function looks at the triangles that the two pixels show alone. At the limb of anything round that is
    rarely the one with the outline, which is seen from the side and covers no pixel's centre: so it leaves most of a
    fine mesh's outline as it is, without a gradient. Here the triangles at an outline need not be seen.

    Differentiable in color and pos; a second time through the plain-torch reference. float32 runs natively, on a CPU
    with the same bits for any number of threads; float64 is plain torch. On CUDA numbers of triangles and vertices that
    there are not leave a pixel as it is instead of an error, which would wait for the GPU.

    Returns: [B, Hp, Wp, C].
    Raises: ValueError, TypeError, RuntimeError for unfitting arguments, and for numbers of triangles and vertices that
    there are not (CPU).
    Source: Laine et al., Modular Primitives for High-Performance Differentiable Rendering (2020), section 3.5, for what
    a silhouette does.
    """
    images = _check(color, rast, pos, tri, topology)
    rast = rast.detach()
    topology = edge_topology(tri) if topology is None else topology
    if torch.compiler.is_compiling() and color.dtype == torch.float32:
        return torch.ops.mvdream_fast.antialias(color, rast, images, tri, topology)[0]
    if not runs_natively(color, rast, images, devices=BACKENDS):
        _check_values(rast, images, tri, topology)
        return antialias_ref(color, rast, images, tri, topology)[0]
    return _Antialias.apply(color, rast, images, tri, topology)


@torch.no_grad()
def edge_topology(tri: Tensor) -> Tensor:
    """[F, 3] int32: across the edge opposite to each corner of each triangle, the other triangle's third vertex.

    -1 where there is no other triangle, or more than one. tri: [F, 3] int32, on which alone it depends. C++ on a CPU.
    """
    check_faces("edge_topology", tri)
    if tri.device.type != "cpu" or torch.compiler.is_compiling() or is_watched():
        return edge_topology_ref(tri)
    tri = tri.contiguous()
    opposite = torch.empty_like(tri)
    load_native("edge_topology").edge_topology(address(tri), len(tri), address(opposite), thread_count())
    return opposite


def edge_topology_ref(tri: Tensor) -> Tensor:
    """The same in plain torch: one sort."""
    ends = torch.stack([tri.roll(-1, 1), tri.roll(-2, 1)], -1).long().sort(-1).values.reshape(-1, 2)  # [3 F, 2]
    order = torch.argsort(ends[:, 0] * (1 << 32) + ends[:, 1], stable=True)
    ends, corner = ends[order], tri.reshape(-1)[order]
    same = (ends[1:] == ends[:-1]).all(1)
    border = same.new_zeros(1)
    after, before = torch.cat([same, border]), torch.cat([border, same])  # the next, the last edge is the same
    lone_after = after & ~before & ~torch.cat([after[1:], border])[: len(after)]
    lone_before = before & ~after & ~torch.cat([border, before[:-1]])[: len(before)]
    across = torch.where(lone_after, corner.roll(-1), torch.where(lone_before, corner.roll(1), -1))
    across = torch.where(ends[:, 0] == ends[:, 1], -1, across)
    return torch.empty_like(across).index_put_((order,), across).reshape(tri.shape).to(torch.int32)


def antialias_ref(color: Tensor, rast: Tensor, pos: Tensor, tri: Tensor, topology: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch, and what is kept of each pair of pixels [B, Hp, Wp, 2] int32 (csrc/antialias.h);
    differentiable any number of times.

    pos: [B, V, 4]; topology: of `edge_topology`.
    """
    with torch.no_grad():
        crossings, kept = _nearest(_crossings(pos, tri, topology, rast))
    at = _places(crossings, pos, tri, rast.shape)[0] - crossings.first
    distance = torch.where(crossings.first_owns, at, 1 - at)  # from the owner
    distance = distance + (distance.detach().clamp(0, 1) - distance.detach())
    first, second = _pixels(crossings, rast.shape)
    first_takes = (distance < 0.5) == crossings.first_owns
    taker, giver = torch.where(first_takes, first, second), torch.where(first_takes, second, first)
    flat = color.flatten(0, 2)
    change = (distance - 0.5).abs()[:, None] * (flat[giver] - flat[taker])
    pairs = torch.zeros(*rast.shape[:3], 2, dtype=torch.int32, device=color.device)
    pairs.view(-1)[2 * first + crossings.axis] = kept
    return flat.index_add(0, taker, change).view(color.shape), pairs


def _crossings(pos: Tensor, tri: Tensor, topology: Tensor, rast: Tensor) -> Crossings:
    """All silhouettes, several of some pairs."""
    image, edge, left = _outlines(pos, tri, topology)
    start, end = _on_screen(pos[image[:, None], _ends(edge, tri)], rast.shape).unbind(1)  # [K, 2]
    way = end - start
    axis = (way[:, 0].abs() > way[:, 1].abs()).long()
    across = torch.stack([start, end], 1).gather(2, (1 - axis)[:, None, None].expand(-1, 2, 1))[..., 0]
    limit = torch.tensor([rast.shape[1], rast.shape[2]], device=pos.device)[axis]
    low, high = (torch.minimum(x.ceil().clamp(min=0), limit).long() for x in (across.amin(1), across.amax(1)))
    count = (high - low).clamp(min=0)
    row = torch.arange(len(edge), device=pos.device).repeat_interleave(count)
    line = low[row] + torch.arange(len(row), device=pos.device) - (count.cumsum(0) - count)[row]
    first_owns = torch.where(axis == 0, way[:, 1] > 0, way[:, 0] < 0) == left
    found = Crossings(image[row], edge[row], axis[row], line, line, first_owns[row], line)
    at, depth = _places(found, pos, tri, rast.shape)
    found = found._replace(first=at.floor().long(), depth=depth)
    last = torch.tensor([rast.shape[2], rast.shape[1]], device=pos.device)[found.axis] - 1
    found = _rows(found, (at >= 0) & (at < last))
    first, second = (rast.reshape(-1, 4)[pixel] for pixel in _pixels(found, rast.shape))
    own, other = (torch.where(found.first_owns[:, None], *x) for x in ((first, second), (second, first)))
    farther = (other[:, 3] == 0) | (other[:, 2] > found.depth)
    return _rows(found, (own[:, 3] > 0) & (own[:, 3] != other[:, 3]) & farther)


def _outlines(pos: Tensor, tri: Tensor, topology: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """image [K], edge [K], and whether its triangles are on its left [K], of what may be seen of outlines."""
    corners, beyond = pos[:, tri.long()], pos[:, topology.long().clamp(min=0)]  # [B, F, 3, 4]
    a, b = corners.roll(-1, 2), corners.roll(-2, 2)
    own = _side(*corners.unbind(2))[..., None].expand(-1, -1, 3)
    its = torch.where(topology < 0, own, _side(a, b, beyond))
    once = (topology < 0) | (topology >= tri)  # the other triangle has the same edge
    outline = once & (own * its >= 0) & (own + its != 0) & (a[..., 3] > 0) & (b[..., 3] > 0)
    image, edge = outline.flatten(1).nonzero().unbind(1)
    return image, edge, (own + its).flatten(1)[image, edge] > 0


def _side(a: Tensor, b: Tensor, p: Tensor) -> Tensor:
    """Positive where a point lies left of the line from a to b on the screen, also behind the camera; [..., 4] each."""
    (ax, ay, aw), (bx, by, bw), (x, y, w) = (t[..., [0, 1, 3]].unbind(-1) for t in (a, b, p))
    return ax * (by * w - bw * y) - ay * (bx * w - bw * x) + aw * (bx * y - by * x)


def _nearest(found: Crossings) -> tuple[Crossings, Tensor]:
    """One for each two pixels, and what is kept of it [K] (csrc/antialias.h)."""
    steps = ((found.depth.double() + 1) * 2.0**35).clamp(0, 2.0**36 - 1).long()
    key = steps << 27 | 2 * found.edge + found.first_owns.long()
    order = torch.argsort(key)
    pair = torch.stack([found.image, found.axis, found.line, found.first], 1)[order]
    _, which = torch.unique(pair, dim=0, return_inverse=True)
    leads = torch.full((len(pair),), len(pair), device=key.device)
    leads = leads.scatter_reduce(0, which, torch.arange(len(pair), device=key.device), "amin")
    found = _rows(found, order[leads[leads < len(pair)]])
    return found, (2 * found.edge + found.first_owns.long() + 1).to(torch.int32)


def _places(found: Crossings, pos: Tensor, tri: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Where along the line of pixels [K], in their numbers, and how deep [K] (z / w) the crossings are."""
    ends = pos[found.image[:, None], _ends(found.edge, tri)]  # [K, 2, 4]
    screen, depth = _on_screen(ends, shape), ends[..., 2] / ends[..., 3]
    along, across = (
        screen.gather(2, axis[:, None, None].expand(-1, 2, 1))[..., 0] for axis in (found.axis, 1 - found.axis)
    )
    share = (found.line - across[:, 0]) / (across[:, 1] - across[:, 0])
    return along[:, 0] + share * (along[:, 1] - along[:, 0]), depth[:, 0] + share * (depth[:, 1] - depth[:, 0])


def _ends(edge: Tensor, tri: Tensor) -> Tensor:
    """The vertices [K, 2] at the ends of edges."""
    face, corner = edge // 3, edge % 3
    return torch.stack([tri[face, (corner + 1) % 3], tri[face, (corner + 2) % 3]], 1).long()


def _on_screen(pos: Tensor, shape: torch.Size) -> Tensor:
    """[..., 2]: x and y in pixels, whole numbers at their centres."""
    half = pos.new_tensor([shape[2] / 2, shape[1] / 2])
    return (pos[..., :2] / pos[..., 3:] + 1) * half - 0.5


def _pixels(found: Crossings, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The numbers of both pixels among all of all images, [K] each."""
    _, height, width, _ = shape
    row = torch.where(found.axis == 0, found.line, found.first)
    column = torch.where(found.axis == 0, found.first, found.line)
    first = (found.image * height + row) * width + column
    return first, first + torch.where(found.axis == 0, 1, width)


def _rows(found: Crossings, kept: Tensor) -> Crossings:
    return Crossings(*(x[kept] for x in found))


def _forward(color, rast, pos, tri, topology) -> tuple[Tensor, Tensor]:
    color, rast, pos, tri, topology = (x.contiguous() for x in (color, rast, pos, tri, topology))
    native = load_native("antialias", color)
    out, crossings = new_result(color, *color.shape), new_result(color, *color.shape[:3], 2, dtype=torch.int32)
    outlines = _arguments(color, rast, pos, tri, topology)
    status = native.antialias_forward(outlines, *map(address, (color, crossings, out)), queue_of(color))
    _refuse(status, len(tri), pos.shape[1])
    return out, crossings


def _backward(cotangents, kept, wanted, color, rast, pos, tri, topology) -> list[Tensor | None]:
    color, rast, pos, tri, topology = (x.contiguous() for x in (color, rast, pos, tri, topology))
    native, d_out = load_native("antialias", color), cotangents[0].contiguous()
    d_color, d_pos = (new_result(x, *x.shape) if want else None for x, want in ((color, wanted[0]), (pos, wanted[2])))
    outlines = _arguments(color, rast, pos, tri, topology)
    addresses = map(address, (color, kept[0], d_out, d_color, d_pos))
    native.antialias_backward(outlines, *addresses, queue_of(color))
    return [d_color, None, d_pos]


def _arguments(color, rast, pos, tri, topology):
    _, height, width, n_channels = color.shape
    meshes = meshes_of(pos, tri, height, width)
    return load_native("antialias").Silhouettes(meshes, address(rast), address(topology), n_channels)


def _fake(color, *_) -> tuple[Tensor, Tensor]:
    return color.new_empty(color.shape), color.new_empty(*color.shape[:3], 2, dtype=torch.int32)


_Antialias = differentiable(_forward, _backward, keeps=(1,), twice=lambda *arguments: antialias_ref(*arguments)[:1])
_registered = differentiable(_forward, _backward, keeps=(1,))
register(
    "antialias(Tensor color, Tensor rast, Tensor pos, Tensor tri, Tensor topology) -> (Tensor, Tensor)",
    cpu=_registered,
    cuda=_registered,
    fake=_fake,
)


def _check(color, rast, pos, tri, topology) -> Tensor:
    """The vertices as [B, V, 4]."""
    op = "antialias"
    if is_batched(color, rast, pos, tri, topology):
        raise vmap_error(op)
    check_rast(op, rast)
    check_as(op, "color", color, (*rast.shape[:3], None), "rast", rast)
    images = pos[None] if getattr(pos, "ndim", 0) == 2 else pos
    check_as(op, "pos", images, (len(rast), None, 4), "rast", rast)
    check_faces(op, tri)
    if topology is not None:
        check_indices(op, "topology", topology, tuple(tri.shape))
    check_same_device(op, color=color, rast=rast, pos=pos, tri=tri, topology=topology)
    return images


def _check_values(rast: Tensor, pos: Tensor, tri: Tensor, topology: Tensor) -> None:
    """What the native op finds as it goes."""
    faces, n_vertices = rast[..., 3], pos.shape[1]
    ok = not faces.numel() or bool(faces.min() >= 0 and faces.max() <= len(tri))
    ok = ok and (not tri.numel() or bool(tri.min() >= 0 and max(tri.max(), topology.max()) < n_vertices))
    _refuse(0 if ok else 3, len(tri), n_vertices)


def _refuse(status: int, n_faces: int, n_vertices: int) -> None:
    wanted = f"of a mesh with {n_faces} triangles and {n_vertices} vertices"
    require(status == 0, "antialias", "rast", wanted, "a triangle or vertex outside", "pass rast, tri and pos of one")
