"""Images of a mesh with gradients to its vertices: what the representations that are meshes render with.

Which colour a point of the surface has is the caller's; rays' cameras and sizes come with them (camera.py).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mvdream_fast.ops import antialias, interpolate, rasterize
from mvdream_fast.scene.base import Lighting, Rendered
from mvdream_fast.scene.shading import ALBEDO, shade

if TYPE_CHECKING:
    from mvdream_fast.camera import Cameras, Rays

NEAREST = 0.01  # scene units before a camera that are not drawn


@dataclass(frozen=True)
class Body:
    """A mesh to draw: vertices and normals [n, 3], faces [m, 3] int32, and topology [m, 3], `edge_topology` of them."""

    vertices: Tensor
    normals: Tensor
    faces: Tensor
    topology: Tensor


@dataclass(frozen=True)
class MeshRendered(Rendered):
    """A rendered batch of rays, and the mesh that was drawn."""

    body: Body


@dataclass(frozen=True)
class Seen:
    """What the pixels of some images show of a body: clip [V, n, 4]; rast, rast_db [V, Hp, Wp, 4] of `rasterize`; and
    of the K pixels that show it their rays' numbers pixel [K], the places positions [K, 3] and unit normals [K, 3]."""

    body: Body
    clip: Tensor
    rast: Tensor
    rast_db: Tensor
    pixel: Tensor
    positions: Tensor
    normals: Tensor


def clip_matrices(cameras: "Cameras", size: tuple[int, int], reach: float) -> Tensor:
    """World -> clip space [V, 4, 4], y downwards, so that row 0 of an image is its top.

    reach: what is drawn lies within so much of the origin; near and far planes hug that ball.
    """
    height, width = size
    rotation, place = cameras.c2w[:, :3, :3].float(), cameras.c2w[:, :3, 3:].float()
    distance = torch.linalg.vector_norm(place, dim=1)  # [V, 1]
    far, near = distance + reach, (distance - reach).clamp(min=NEAREST)
    f = 1 / torch.tan(cameras.fovy.float() / 2)[:, None]
    back = rotation.transpose(1, 2)
    x, y, z = torch.cat([back, -back @ place], 2).unbind(1)  # [V, 4] each: a camera's axes, and its place on them
    last = z.new_tensor([0.0, 0.0, 0.0, 1.0])
    depth = ((far + near) * z + 2 * far * near * last) / (near - far)
    return torch.stack([f * height / width * x, -f * y, depth, -z], 1)


def see(body: Body, rays: "Rays", reach: float) -> Seen:
    """What is seen along rays; `body` lies within `reach` of the origin.

    Raises: ValueError for rays that are not those of whole images.
    """
    if rays.cameras is None or rays.size is None:
        raise ValueError("see: rays must carry their cameras and size, got neither; make them with generate_rays")
    matrices = clip_matrices(rays.cameras, rays.size, reach)
    clip = body.vertices @ matrices[:, :, :3].transpose(1, 2) + matrices[:, None, :, 3]  # [V, n, 4]
    rast, rast_db = rasterize(clip, body.faces, rays.size)
    pixel = (rast[..., 3] > 0).flatten().nonzero()[:, 0]
    attributes, _ = interpolate(torch.cat([body.vertices, body.normals], 1), rast, body.faces)
    positions, normals = attributes.view(-1, 6).index_select(0, pixel).split(3, 1)
    return Seen(body, clip, rast, rast_db, pixel, positions, normalize(normals, dim=1))


def compose(
    seen: Seen, colors: Tensor, rays: "Rays", background: Tensor, lighting: Lighting | None = None
) -> MeshRendered:
    """The images of a body: colours [K, 3] at the pixels that show it, under a light, before a background [R, 3].

    Silhouettes are anti-aliased, in all that is returned: opacity and depth are blended with 0, so that depth, as in a
    volume, is the distance along the ray times the opacity.
    """
    if lighting is not None and lighting.shading is not ALBEDO and lighting.lights is not None:
        lights = lighting.lights.index_select(0, seen.pixel)
        lit = shade(colors, seen.normals, seen.positions, lights, lighting.shading)
        plain = lighting.plain
        colors = lit if plain is None else torch.where(plain.index_select(0, seen.pixel)[:, None], colors, lit)
    distance = torch.linalg.vector_norm(seen.positions - rays.rays_o.index_select(0, seen.pixel), dim=1, keepdim=True)
    there = torch.cat([colors, torch.ones_like(distance), distance], 1)  # [K, 5]
    behind = torch.cat([background, background.new_zeros(len(background), 2)], 1)
    image = behind.index_put((seen.pixel,), there).view(*seen.rast.shape[:3], 5)
    body = seen.body
    smooth = antialias(image, seen.rast, seen.clip, body.faces, body.topology).view(-1, 5)
    return MeshRendered(smooth[:, :3], smooth[:, 3], smooth[:, 4], body)
