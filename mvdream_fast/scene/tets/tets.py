"""Deep marching tetrahedra as a representation: a signed distance and small shifts on a lattice, and their surface.

Source: Shen et al., Deep Marching Tetrahedra (2021); as the second stage of Lin et al., Magic3D (2023), section 4.2.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mvdream_fast.core import reads
from mvdream_fast.core.errors import DivergedError
from mvdream_fast.core.ramp import ramp
from mvdream_fast.core.rng import Stream
from mvdream_fast.ops import edge_topology
from mvdream_fast.scene.background import FixedBackground
from mvdream_fast.scene.base import HasMesh, Lighting, Rendered, Statistic
from mvdream_fast.scene.mesh.distance import signed_distance
from mvdream_fast.scene.mesh.mesh import CHUNK, Mesh, colored_mesh
from mvdream_fast.scene.mesh.texture import bake_texture
from mvdream_fast.scene.raster import Body, MeshRendered, Seen
from mvdream_fast.scene.tets.colored import ColoredMesh
from mvdream_fast.scene.tets.config import TetsConfig
from mvdream_fast.scene.tets.lattice import Lattice, positions_of, whole_coordinates
from mvdream_fast.scene.tets.losses import laplacian, normal_consistency, unique_edges, vertex_normals
from mvdream_fast.scene.tets.marching import march

if TYPE_CHECKING:
    from mvdream_fast.camera import Rays

REACH = 4  # planes of points: farther than that from a mesh one is as far as another


class Tets(ColoredMesh):
    """A Representation (scene/base.py): the surface of a signed distance on a lattice, whose points may shift a little.

    A fresh one is a sphere. `from_representation` and `from_sdf` start from what there is.
    """

    def __init__(self, config: TetsConfig, stream: Stream | None = None):
        super().__init__(config, stream or Stream(0, 0, "volume"))
        self.config = config
        self.lattice = Lattice(config.tets_resolution, self.radius)
        points = positions_of(self.lattice, torch.device("cpu"))
        self.sdf = nn.Parameter(points.norm(dim=1) - config.sphere_radius)
        self.deformation = nn.Parameter(torch.zeros_like(points))
        if config.shows == "normals":
            self.background = FixedBackground()
        self._rendered: Body | None = None

    @staticmethod
    def from_sdf(config: TetsConfig, sdf: Callable[[Tensor], Tensor], seed: int = 0) -> "Tets":
        """One whose signed distance is `sdf`: points [P, 3] in scene units -> [P], negative inside.

        Raises: ValueError for numbers that are not finite.
        """
        tets = Tets(config, Stream(seed, 0, "volume"))
        with torch.no_grad():
            points = positions_of(tets.lattice, torch.device("cpu"))
            tets.sdf.copy_(torch.cat([sdf(chunk) for chunk in points.split(CHUNK)]))
        if not tets.sdf.isfinite().all():
            raise ValueError("Tets.from_sdf: sdf must give finite numbers, got NaN or infinity; check the function")
        return tets

    @staticmethod
    def from_representation(config: TetsConfig, source: HasMesh, seed: int = 0) -> "Tets":
        """One that shows the mesh of another representation in its colours, as well as its lattice can.

        Raises: DivergedError where it has no mesh.
        """
        tets = Tets(config, Stream(seed, 0, "volume"))
        lattice = tets.lattice
        mesh = source.mesh(lattice.resolution)
        at = whole_coordinates(lattice, torch.device("cpu")).numpy()
        reach = REACH * lattice.spacing
        with torch.no_grad():
            tets.sdf.copy_(torch.from_numpy(signed_distance(mesh, lattice.resolution, lattice.radius, reach, at)))
        tets.take_colors(source, mesh, seed)
        return tets

    def body(self) -> Body:
        """The surface as it is now."""
        vertices, faces = march(self.lattice, self.sdf, self.deformation)
        return Body(vertices, vertex_normals(vertices, faces), faces, edge_topology(faces))

    def seen_colors(self, seen: Seen) -> Tensor:
        """Colours [K, 3] of the pixels that show the mesh, or its normals."""
        return seen.normals / 2 + 0.5 if self.config.shows == "normals" else super().seen_colors(seen)

    def render(
        self, rays: "Rays", stream: Stream | None = None, training: bool = False, lighting: Lighting | None = None
    ) -> MeshRendered:
        """Rays [R] of whole images in front of the background; see `ColoredMesh`. Normals are not lit."""
        if self.config.shows == "normals":
            lighting = None
        rendered = super().render(rays, stream, training, lighting)
        self._rendered = rendered.body
        return rendered

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Distances and shifts, table, network, background."""
        config = self.config
        geometry = {"params": [self.sdf, self.deformation], "lr": config.lr_geometry}
        return [geometry, *self.color_groups(config.lr_encoding, config.lr_mlp, config.lr_background)]

    def regularizers(self, rendered: Rendered, rays: "Rays", step: int) -> Tensor:
        """Consistency of normals and the Laplacian, those that are switched on at this step."""
        if not isinstance(rendered, MeshRendered):
            raise TypeError(f"Tets: rendered must be a render of this mesh, got {type(rendered).__name__}; pass it")
        total, body = super().regularizers(rendered, rays, step), rendered.body
        consistency, smooth = (
            ramp(self.config.lambda_normal_consistency, step),
            ramp(self.config.lambda_laplacian, step),
        )
        if not consistency and not smooth:
            return total
        edges = unique_edges(body.faces, body.topology)
        if consistency:
            total = total + consistency * normal_consistency(body.normals, edges)
        if smooth:
            total = total + smooth * laplacian(body.vertices, edges)
        return total

    def statistics(self) -> dict[str, Statistic]:
        """Triangles and vertices of the mesh that was rendered last, and its edges with other than two triangles."""
        body = self._rendered
        if body is None:
            return {"n_faces": 0, "n_vertices": 0, "n_open_edges": 0}
        n_open = reads.Later((body.topology < 0).sum()[None])
        return {
            "n_faces": len(body.faces),
            "n_vertices": len(body.vertices),
            "n_open_edges": lambda: n_open.get()[0],
        }

    def restart(self, seed: int) -> None:
        """Takes the values of a fresh sphere of this seed."""
        self.load_state_dict(Tets(self.config, Stream(seed, 0, "volume")).state_dict())

    def mesh(self, resolution: int = 128, max_faces: int | None = None, texture: int | None = None) -> Mesh:
        """The very mesh that is optimised, whatever the resolution; simplified only where `max_faces` asks for it.

        Raises: DivergedError where there is none.
        """
        with torch.no_grad():
            body = self.body()
        if not len(body.faces):
            raise DivergedError("the tetrahedra have no surface: their signed distance has one sign everywhere")
        mesh = colored_mesh(body.vertices.cpu().numpy(), body.faces.cpu().numpy(), self.colors, max_faces)
        return mesh if texture is None else bake_texture(mesh, self.colors, texture)
