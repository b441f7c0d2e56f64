"""Silhouettes that move smoothly: colours at the edges of what is seen, and the vertices' gradients through them."""

import torch
from torch import Tensor

from mvdream_fast.ops._edges import (
    BACKENDS,
    address,
    check_same_device,
    is_batched,
    load_native,
    queue_of,
    require,
    runs_natively,
    vmap_error,
)
from mvdream_fast.ops._registered import differentiable, register
from mvdream_fast.ops._triangles import check_as, check_faces, check_indices, check_rast
from mvdream_fast.ops.rasterize import meshes_of

SLACK = 1 / 256  # of a pixel: coverage is decided on snapped vertices, crossings on exact ones


def antialias(color: Tensor, rast: Tensor, pos: Tensor, tri: Tensor, topology: Tensor | None = None) -> Tensor:
    """Blends the colours of neighbouring pixels where a silhouette passes between them, by how much each it covers.

    color: [B, Hp, Wp, C]. rast: [B, Hp, Wp, 4] of `rasterize`. pos: [V, 4] (B = 1) or [B, V, 4] and tri: [F, 3] int32
    as given to it. topology: `edge_topology(tri)`, to be made once for a mesh that keeps its triangles; None makes it.

    Of two pixels, neighbours in a row or a column, that show different triangles, the nearer triangle is looked at. An
    edge of it that has no other triangle, or one that folds back behind it, and that crosses the line between the two
    centres at less than 45 degrees from its normal, is a silhouette. At distance d from the triangle's own pixel, that
    pixel takes 1/2 - d of the other's colour, or the other one d - 1/2 of its. So the image is continuous in the
    silhouettes' places: the only gradients of pos that `rasterize` has not. A pixel that shows another triangle than
    the one with the silhouette is left as it is; where triangles at an outline are thinner than a pixel, that is most.

    Differentiable in color and pos; a second time through the plain-torch reference. float32 runs natively, on a CPU
    with the same bits for any number of threads; float64 is plain torch. On CUDA numbers of triangles and vertices that
    there are not leave a pixel as it is instead of an error, which would wait for the GPU.

    Returns: [B, Hp, Wp, C].
    Raises: ValueError, TypeError, RuntimeError for unfitting arguments, and for numbers of triangles and vertices that
    there are not (CPU).
    Source: Laine et al., Modular Primitives for High-Performance Differentiable Rendering (2020), section 3.5.
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

    -1 where there is no other triangle, or more than one. tri: [F, 3] int32. One sort; depends on tri alone.
    """
    check_faces("edge_topology", tri)
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
    """The same in plain torch, and the crossings (csrc/antialias.h); differentiable any number of times.

    pos: [B, V, 4]; topology: of `edge_topology`.
    """
    out, crossings = color, []
    for axis in range(2):
        dim = 2 - axis
        first, second = (rast.narrow(dim, start, max(0, rast.shape[dim] - 1)) for start in (0, 1))
        pairs = (first[..., 3] != second[..., 3]).nonzero()  # [K, 3]
        of_first = first[tuple(pairs.T)]
        of_second = second[tuple(pairs.T)]
        first_owns = (of_second[:, 3] == 0) | ((of_first[:, 3] != 0) & (of_first[:, 2] < of_second[:, 2]))
        face = torch.where(first_owns, of_first[:, 3], of_second[:, 3]).long() - 1
        distance, found = _crossings(pos, tri, topology, pairs, face, first_owns, axis, rast.shape)
        pairs, first_owns, distance = pairs[found], first_owns[found], distance[found]
        neighbours = pairs.clone()
        neighbours[:, dim] += 1
        owner, other = (torch.where(first_owns[:, None], *ab) for ab in ((pairs, neighbours), (neighbours, pairs)))
        owner_takes = distance < 0.5
        taker, giver = (torch.where(owner_takes[:, None], *ab) for ab in ((owner, other), (other, owner)))
        share = torch.where(owner_takes, 0.5 - distance, distance - 0.5)[:, None]
        change = share * (color[tuple(giver.T)] - color[tuple(taker.T)])
        out = out.index_put(tuple(taker.T), change, accumulate=True)
        number = torch.where(first_owns, 1 + distance, -1 - distance).detach()
        crossings.append(color.new_zeros(rast.shape[:3]).index_put(tuple(pairs.T), number.to(color.dtype)))
    return out, torch.stack(crossings, -1)


def _crossings(pos, tri, topology, pairs, face, first_owns, axis, shape) -> tuple[Tensor, Tensor]:
    """How far from the owner's centre its triangle's silhouette crosses the line to the other pixel [K], and where."""
    image, height, width = pairs[:, 0], shape[1], shape[2]
    corners = pos[image[:, None], tri.long()[face]]  # [K, 3, 4]
    across_edges = topology.long()[face]
    beyond = pos[image[:, None], across_edges.clamp(min=0)]
    step = (~first_owns).long()
    centre = torch.stack([pairs[:, 2] + (step if axis == 0 else 0), pairs[:, 1] + (step if axis == 1 else 0)], -1) + 0.5
    half = pos.new_tensor([width / 2, height / 2])
    before_camera = corners[..., 3] > 0
    w = torch.where(before_camera, corners[..., 3], 1)
    on_screen = (corners[..., :2] / w[..., None] + 1) * half - centre[:, None].to(pos.dtype)  # [K, 3, 2], in pixels
    along, across = on_screen.unbind(-1) if axis == 0 else on_screen.flip(-1).unbind(-1)
    (a, b), (p, q) = ((t.roll(-1, 1), t.roll(-2, 1)) for t in (along, across))  # the ends of each corner's edge
    passes = ((p < 0) != (q < 0)) & before_camera.roll(-1, 1) & before_camera.roll(-2, 1)
    direction = torch.where(first_owns, 1, -1)[:, None]
    distance = direction * (a * q - b * p) / torch.where(passes, q - p, 1)
    edge = torch.where(passes, distance, -torch.inf).argmax(1, keepdim=True)
    ends = corners.roll(-1, 1)[..., [0, 1, 3]], corners.roll(-2, 1)[..., [0, 1, 3]]
    own, its = (torch.linalg.det(torch.stack([*ends, t[..., [0, 1, 3]]], -1)) for t in (corners, beyond))
    outline = (across_edges < 0) | (own * its >= 0)
    steep = (q - p).abs() >= (b - a).abs()
    within = (distance >= -SLACK) & (distance <= 1 + SLACK)
    found = (passes & outline & steep & within).gather(1, edge)[:, 0]
    distance = distance.gather(1, edge)[:, 0]
    return distance + (distance.detach().clamp(0, 1) - distance.detach()), found


def _forward(color, rast, pos, tri, topology) -> tuple[Tensor, Tensor]:
    color, rast, pos, tri, topology = (x.contiguous() for x in (color, rast, pos, tri, topology))
    native = load_native("antialias", color)
    out, crossings = torch.empty_like(color), color.new_empty(*color.shape[:3], 2)
    outlines = _outlines(color, rast, pos, tri, topology)
    status = native.antialias_forward(outlines, *map(address, (color, crossings, out)), queue_of(color))
    _refuse(status, len(tri), pos.shape[1])
    return out, crossings


def _backward(cotangents, kept, wanted, color, rast, pos, tri, topology) -> list[Tensor | None]:
    color, rast, pos, tri, topology = (x.contiguous() for x in (color, rast, pos, tri, topology))
    native, d_out = load_native("antialias", color), cotangents[0].contiguous()
    d_color, d_pos = (torch.empty_like(x) if want else None for x, want in ((color, wanted[0]), (pos, wanted[2])))
    outlines = _outlines(color, rast, pos, tri, topology)
    addresses = map(address, (color, kept[0], d_out, d_color, d_pos))
    native.antialias_backward(outlines, *addresses, queue_of(color))
    return [d_color, None, d_pos]


def _outlines(color, rast, pos, tri, topology):
    _, height, width, n_channels = color.shape
    meshes = meshes_of(pos, tri, height, width)
    return load_native("antialias").Silhouettes(meshes, address(rast), address(topology), n_channels)


def _fake(color, *_) -> tuple[Tensor, Tensor]:
    return torch.empty_like(color, memory_format=torch.contiguous_format), color.new_empty(*color.shape[:3], 2)


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
