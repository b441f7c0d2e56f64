"""The solid that views of a thing leave of space: their visual hull, as a mesh in the views' colours.

Source: Laurentini, The visual hull concept for silhouette-based image understanding (1994).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.camera import Cameras
from mvdream_fast.core.errors import DivergedError
from mvdream_fast.scene.mesh.mesh import Mesh, extract_mesh
from mvdream_fast.scene.raster import clip_matrices

LEVEL = 0.4  # of a silhouette, from which on a pixel is of the thing: under a half, or what is thin goes
LEAST = 64  # triangles of a hull that is a thing and no speck
FACING = 4  # the power of how frontally a view sees a place, by which it counts for its colour
SELDOM = 1e-4  # what a view counts that sees a place from behind, where no other sees it either
OUTLINE = 1e-2  # what a pixel counts beside the background, which it has some of, or which a decoder has mixed it with


@dataclass(frozen=True)
class Hull:
    """What V views show, from which a mesh begins.

    images: [V, 3, Hp, Wp] in [0, 1]. silhouettes: [V, 1, Hp, Wp], how far each pixel shows the thing, 0 to 1. radius:
    it lies in [-radius, radius]^3.
    """

    images: Tensor
    silhouettes: Tensor
    cameras: Cameras
    radius: float = 1.0

    def occupancy(self, points: Tensor, missing: int = 0) -> Tensor:
        """How far points [P, 3] lie inside all silhouettes but the `missing` least of them, [P] in [0, 1]; outside of
        an image there is nothing."""
        inside = self._seen(self.silhouettes, points)[:, :, 0]  # [V, P]
        return inside.sort(0).values[missing]

    def mesh(self, resolution: int = 64) -> Mesh:
        """Its surface on a grid of so many cells a side. Where the views agree so little that nothing is left, those
        that say least are passed over, one after the other.

        Raises: DivergedError where even one view alone shows nothing.
        """
        for missing in range(len(self.images)):
            try:
                mesh = extract_mesh(
                    lambda points, missing=missing: self.occupancy(points, missing), torch.zeros_like,
                    radius=self.radius, threshold=LEVEL, resolution=resolution + 1,
                )  # fmt: skip
            except DivergedError:
                continue
            if len(mesh.faces) >= LEAST:
                return replace(mesh, colors=self._colors(mesh).numpy())
        raise DivergedError("the sampled views show nothing in front of their backgrounds; no solid is left of them")

    def _colors(self, mesh: Mesh) -> Tensor:
        """What the views show at the vertices, [n, 3]. What hides a place from a view is not asked: such a view mostly
        sees it from the side or from behind."""
        if mesh.normals is None:
            raise AssertionError  # extract_mesh gives them
        points, normals = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.normals)
        inner = -F.max_pool2d(-self.silhouettes, 3, 1, 1)
        clear = inner**2 + OUTLINE * self.silhouettes**2
        seen = self._seen(torch.cat([self.images, clear], 1), points)  # [V, n, 4]
        towards = F.normalize(self.cameras.c2w[:, None, :3, 3].to(points) - points, dim=-1)
        facing = (towards * normals).sum(-1, keepdim=True).clamp(min=0) ** FACING + SELDOM
        weight = facing * seen[..., 3:]
        return (weight * seen[..., :3]).sum(0) / weight.sum(0).clamp(min=1e-12)

    def _seen(self, maps: Tensor, points: Tensor) -> Tensor:
        """Maps [V, C, Hp, Wp] where points [P, 3] are seen, [V, P, C]; 0 outside of an image and behind a camera."""
        matrices = clip_matrices(self.cameras, (maps.shape[2], maps.shape[3]), 3**0.5 * self.radius).to(points)
        clip = points @ matrices[:, :, :3].transpose(1, 2) + matrices[:, None, :, 3]  # [V, P, 4]
        before = clip[..., 3:] > 0
        at = torch.where(before, clip[..., :2] / clip[..., 3:], torch.full_like(clip[..., :2], 2.0))
        found = F.grid_sample(maps.to(points), at[:, None], align_corners=False, padding_mode="zeros")  # [V, C, 1, P]
        return found[:, :, 0].transpose(1, 2)
