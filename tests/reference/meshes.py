"""Small meshes with known shapes, cameras for them, and a rasteriser that asks every pixel of every triangle."""

import math

import torch


def sphere(n_rings=12, n_around=16, dtype=torch.float32):
    """A closed sphere of radius 1, outwards: vertices [V, 3] and faces [F, 3] int32. Poles are single vertices."""
    theta = torch.arange(1, n_rings, dtype=torch.float64) * math.pi / n_rings
    phi = torch.arange(n_around, dtype=torch.float64) * 2 * math.pi / n_around
    rings = torch.stack(
        [
            theta.sin()[:, None] * phi.cos(),
            theta.cos()[:, None].expand(-1, n_around),
            -theta.sin()[:, None] * phi.sin(),
        ],
        -1,
    ).reshape(-1, 3)
    poles = torch.tensor([[0.0, 1, 0], [0, -1, 0]], dtype=torch.float64)
    top, bottom, faces = len(rings), len(rings) + 1, []
    for j in range(n_around):
        k = (j + 1) % n_around
        faces.append((top, j, k))
        for i in range(n_rings - 2):
            a, b, c, d = (i * n_around + j, i * n_around + k, (i + 1) * n_around + j, (i + 1) * n_around + k)
            faces += [(a, c, b), (b, c, d)]
        last = (n_rings - 2) * n_around
        faces.append((bottom, last + k, last + j))
    return torch.cat([rings, poles]).to(dtype), torch.tensor(faces, dtype=torch.int32)


def box(half=1.0):
    """A closed box, outwards: 8 vertices and 12 faces."""
    vertices = torch.tensor([[x, y, z] for x in (-half, half) for y in (-half, half) for z in (-half, half)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [f for a, b, c, d in quads for f in ((a, b, c), (a, c, d))]
    return vertices, torch.tensor(faces, dtype=torch.int32)


def sheet(n=8, jitter=0.0, seed=0):
    """A square [-1, 1]^2 of n x n quads, each of two triangles; its inner vertices moved at random: [V, 2], [F, 3]."""
    line = torch.linspace(-1, 1, n + 1)
    points = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    generator = torch.Generator().manual_seed(seed)
    points[1:-1, 1:-1] += jitter * (torch.rand(n - 1, n - 1, 2, generator=generator) - 0.5) * 2 / n
    i, j = (t.reshape(-1) for t in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    a, b, c, d = (i * (n + 1) + j, i * (n + 1) + j + 1, (i + 1) * (n + 1) + j, (i + 1) * (n + 1) + j + 1)
    faces = torch.cat([torch.stack([a, c, b], -1), torch.stack([b, c, d], -1)])
    return points.reshape(-1, 2), faces.int()


def perspective(points, distance=3.0, near=1.0, far=10.0, focal=2.0):
    """Clip space [V, 4] of points [V, 3] seen from (0, 0, distance) towards -z."""
    x, y, z = points.unbind(-1)
    z = z - distance
    depth = -(far + near) / (far - near) * z - 2 * far * near / (far - near)
    return torch.stack([focal * x, focal * y, depth, -z], -1)


def flat(points, depth=0.0):
    """Clip space [V, 4] of points [V, 2] on the screen."""
    return torch.cat([points, torch.full_like(points[:, :1], depth), torch.ones_like(points[:, :1])], -1)


def soup(n_faces=60, size=0.7, with_w=True, seed=0, n_images=1):
    """Random triangles in clip space [n_images, 3 n_faces, 4], some behind the camera or beside the screen."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randn(n_images, n_faces, 1, 3, generator=generator)
    corners = corners + size * torch.randn(n_images, n_faces, 3, 3, generator=generator)
    w = corners[..., 2:] + 0.8 if with_w else torch.ones_like(corners[..., 2:])
    depth = corners[..., 2:] * (1 if with_w else 0.25)
    pos = torch.cat([corners[..., :2], depth, w], -1).reshape(n_images, -1, 4)
    return pos, torch.arange(3 * n_faces, dtype=torch.int32).reshape(-1, 3)


def asked_one_by_one(pos, tri, resolution, margin=1e-3):
    """What every pixel shows, by the weights of its place among each triangle's homogeneous corners, in float64.

    Nothing is snapped, clipped or sorted: a point of a triangle is a sum of its corners with weights that are not
    negative, and is seen where its w is positive and -w <= z <= w. Returns: triangle + 1 [H, W], depth [H, W], and
    where the answer is certain [H, W]: no edge, depth or plane nearer than `margin` (pixels, or units of depth).
    """
    height, width = resolution
    x = (torch.arange(width, dtype=torch.float64) + 0.5) * 2 / width - 1
    y = (torch.arange(height, dtype=torch.float64) + 0.5) * 2 / height - 1
    place = torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width)], -1)
    nearest = torch.full(resolution, torch.inf, dtype=torch.float64)
    face, sure = torch.zeros(resolution, dtype=torch.int64), torch.ones(resolution, dtype=torch.bool)
    for number, corners in enumerate(pos.double()[tri.long()], 1):
        system = corners[:, [0, 1, 3]].T  # corners' x, y, w as columns
        if abs(torch.linalg.det(system)) < 1e-12:
            continue
        weights = torch.linalg.solve(system, place.reshape(-1, 3).T).T.reshape(height, width, 3)
        w = 1 / weights.sum(-1)  # of the point whose x / w and y / w are the pixel's
        depth = (weights * corners[:, 2]).sum(-1)  # z / w: weights of points are w times these
        per_pixel = torch.linalg.inv(system)[:, :2].abs().sum(-1) * 2 / min(height, width)  # change over a pixel
        inside = (weights >= 0).all(-1) & (w > 0) & (depth.abs() <= 1)
        close = ((weights.abs() < margin * per_pixel).any(-1)) | ((depth.abs() - 1).abs() < margin)
        possible = (weights >= -margin * per_pixel).all(-1) & (depth <= nearest + margin)
        sure &= ~(close & possible) & ~(inside & ((depth - nearest).abs() < 1e-9))
        nearer = inside & (depth < nearest)
        nearest, face = torch.where(nearer, depth, nearest), torch.where(nearer, number, face)
    return face, nearest, sure
