"""The solid that views of a thing leave of space: their visual hull, as a mesh in the views' colours.

Sampled views don't agree to the pixel, and what is thin, such as legs, is lost where two of them put it in different
places. So what a view shows and no solid explains is added where the other views miss it by least, and gaps that no
view shows clearly are closed.
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
SHOWN = 0.5  # of a silhouette, from which on a pixel must be explained
MISSED = (1, 2, 3)  # pixels by which the other views' silhouettes are widened for that, one after the other
GAP = 3 / 32  # of the radius: half of the widest gap between what may be one thing
CLEARLY = 2  # pixels from a silhouette, from which on a view shows that there is nothing
LEAST_PART = 0.02  # of all triangles: a smaller part that stands alone is what two views don't agree on
LEAST = 64  # triangles of a hull that is a thing and no speck
FACING = 4  # the power of how frontally a view sees a place, by which it counts for its colour
SELDOM = 1e-4  # what a view counts that sees a place from behind, where no other sees it either
OUTLINE = 1e-2  # what a pixel counts beside the background, which it has some of, or which a decoder has mixed it with


@dataclass(frozen=True)
class Hull:
    """What V views show, from which a mesh begins.

    images: [V, 3, Hp, Wp] in [0, 1]. silhouettes: [V, 1, Hp, Wp], how far each pixel shows the thing, 0 to 1. radius:
    it lies in [-radius, radius]^3. between: silhouettes and cameras of as many views half-way between these, evenly
    around. They only say where there is nothing, and only where two from opposite sides agree.
    """

    images: Tensor
    silhouettes: Tensor
    cameras: Cameras
    radius: float = 1.0
    between: tuple[Tensor, Cameras] | None = None

    def occupancy(self, points: Tensor, missing: int = 0) -> Tensor:
        """How far points [P, 3] lie inside all silhouettes but the `missing` least of them, [P] in [0, 1]; outside of
        an image there is nothing."""
        return self._solid(self._inside(points), missing)

    def mesh(self, resolution: int = 64) -> Mesh:
        """Its surface on a grid of so many cells a side. Where the views agree so little that nothing is left, those
        that say least are passed over, one after the other.

        Raises: DivergedError where even one view alone shows nothing.
        """
        axis = torch.linspace(-self.radius, self.radius, resolution + 1)
        points = torch.cartesian_prod(axis, axis, axis)
        inside = self._inside(points)
        for missing in range(len(self.images)):
            grid = self.explained(points, inside, self._solid(inside, missing)).view((resolution + 1,) * 3)
            grid = self.joined(points, grid, missing)
            try:
                mesh = extract_mesh(
                    self.occupancy, torch.zeros_like, radius=self.radius, threshold=LEVEL,
                    grid=grid.numpy(), min_part=LEAST_PART,
                )  # fmt: skip
            except DivergedError:
                continue
            if len(mesh.faces) >= LEAST:
                return replace(mesh, colors=self._colors(mesh).numpy())
        raise DivergedError("the sampled views show nothing in front of their backgrounds; no solid is left of them")

    def explained(self, points: Tensor, inside: Tensor, solid: Tensor) -> Tensor:
        """Occupancies solid [P] of points [P, 3], and more of them, so that each view sees something where it shows
        the thing.

        Args: inside: how far the points lie inside each silhouette, [V or more, P], as `_inside` says it.
        """
        n_views = len(self.images)
        for pixels in MISSED:
            left = (self.silhouettes >= SHOWN) & ~self._sees(points[solid > LEVEL])
            wanted = self._seen(_widened(left.float(), 1), self.cameras, points)[:, :, 0].minimum(inside[:n_views])
            at = (wanted > LEVEL).any(0).nonzero()[:, 0]
            if not len(at):
                break  # the next ones would find none either
            near, most = self._inside(points[at], pixels), solid[at]
            for view in range(n_views):
                others = torch.cat([near[:view], near[view + 1 :], wanted[view, at][None]])
                most = torch.maximum(most, others.min(0).values)
            solid = solid.index_put((at,), most)
        return solid

    def joined(self, points: Tensor, grid: Tensor, missing: int = 0) -> Tensor:
        """Occupancies of a grid [n, n, n] of points [n^3, 3], and its narrow gaps closed where no view shows clearly
        that there is nothing, but the `missing` that say least."""
        closed = _closed(grid, round(GAP * (len(grid) - 1) / 2))
        maybe = self._solid(self._inside(points, CLEARLY), missing)
        return grid.maximum(closed.minimum(maybe.view_as(grid)))

    def _sees(self, points: Tensor) -> Tensor:
        """Which pixels have one of the points [P, 3] within a pixel of their middle, bool [V, 1, Hp, Wp]."""
        height, width = self.silhouettes.shape[2:]
        clip = self._clip(self.cameras, points)
        size = torch.tensor([width, height])
        at = ((clip[..., :2] / clip[..., 3:] + 1) / 2 * size).floor().long()  # column, row
        there = (clip[..., 3] > 0) & ((at >= 0) & (at < size)).all(-1)
        seen = torch.zeros_like(self.silhouettes)
        view, point = there.nonzero(as_tuple=True)
        seen[view, 0, at[view, point, 1], at[view, point, 0]] = 1
        return _widened(seen, 1) > 0

    def _colors(self, mesh: Mesh) -> Tensor:
        """What the views show at the vertices, [n, 3]. What hides a place from a view is not asked: such a view mostly
        sees it from the side or from behind."""
        if mesh.normals is None:
            raise AssertionError  # extract_mesh gives them
        points, normals = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.normals)
        inner = -F.max_pool2d(-self.silhouettes, 3, 1, 1)
        clear = inner**2 + OUTLINE * self.silhouettes**2
        seen = self._seen(torch.cat([self.images, clear], 1), self.cameras, points)  # [V, n, 4]
        towards = F.normalize(self.cameras.c2w[:, None, :3, 3].to(points) - points, dim=-1)
        facing = (towards * normals).sum(-1, keepdim=True).clamp(min=0) ** FACING + SELDOM
        weight = facing * seen[..., 3:]
        return (weight * seen[..., :3]).sum(0) / weight.sum(0).clamp(min=1e-12)

    def _solid(self, inside: Tensor, missing: int) -> Tensor:
        """What lies inside all of the views but the `missing` least of them, and of those between them, [P]."""
        own, others = inside[: len(self.images)].sort(0).values[missing], inside[len(self.images) :]
        return torch.cat([own[None], others]).min(0).values

    def _inside(self, points: Tensor, pixels: int = 0) -> Tensor:
        """How far points [P, 3] lie inside each view's silhouette, widened by so many pixels, [V, P]; and, of views
        between, inside one of each two that are opposite, [V + V / 2, P]."""
        found = self._seen(_widened(self.silhouettes, pixels), self.cameras, points)[:, :, 0]
        if self.between is None:
            return found
        silhouettes, cameras = self.between
        more = self._seen(_widened(silhouettes, pixels), cameras, points)[:, :, 0]
        half = len(more) // 2
        return torch.cat([found, torch.maximum(more[:half], more[half:]) if len(more) == 2 * half else more])

    def _seen(self, maps: Tensor, cameras: Cameras, points: Tensor) -> Tensor:
        """Maps [V, C, Hp, Wp] where points [P, 3] are seen, [V, P, C]; 0 outside of an image and behind a camera."""
        clip = self._clip(cameras, points)
        before = clip[..., 3:] > 0
        at = torch.where(before, clip[..., :2] / clip[..., 3:], torch.full_like(clip[..., :2], 2.0))
        found = F.grid_sample(maps.to(points), at[:, None], align_corners=False, padding_mode="zeros")  # [V, C, 1, P]
        return found[:, :, 0].transpose(1, 2)

    def _clip(self, cameras: Cameras, points: Tensor) -> Tensor:
        """Points [P, 3] in the clip space of each camera, [V, P, 4]."""
        height, width = self.images.shape[2:]
        matrices = clip_matrices(cameras, (height, width), 3**0.5 * self.radius).to(points)
        return points @ matrices[:, :, :3].transpose(1, 2) + matrices[:, None, :, 3]


def _closed(grid: Tensor, cells: int) -> Tensor:
    """What is left of a grid [n, n, n] that is widened by so many cells and narrowed again: gaps of up to twice as many
    cells are filled, and nothing else changes but what is hollow there."""
    size, x = 2 * cells + 1, F.pad(grid[None, None], (2 * cells,) * 6)
    for sign in (1, -1):
        for kernel in ((size, 1, 1), (1, size, 1), (1, 1, size)):
            x = sign * F.max_pool3d(sign * x, kernel, 1)
    return x[0, 0]


def _widened(maps: Tensor, pixels: int) -> Tensor:
    """The largest of each square of 2 pixels + 1 a side: [V, 1, Hp, Wp] -> the same shape."""
    return F.max_pool2d(maps, 2 * pixels + 1, 1, pixels)
