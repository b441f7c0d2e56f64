"""A fixed mesh whose colours are optimised: those of a field at its surface, or of a texture on its UV coordinates.

Source: the third stage of Wang et al., ProlificDreamer (2023), section 3.4.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvdream_fast.core import reads
from mvdream_fast.core.errors import DivergedError, ModelError
from mvdream_fast.core.images import to_bytes
from mvdream_fast.core.rng import Stream
from mvdream_fast.ops import edge_topology, interpolate, texture
from mvdream_fast.scene.base import Representation, Statistic
from mvdream_fast.scene.mesh.mesh import ColorFn, Mesh, colored_mesh
from mvdream_fast.scene.mesh.texture import bake_texture, spread_over_gaps, texel_positions
from mvdream_fast.scene.raster import Body, Seen
from mvdream_fast.scene.saved import check_state
from mvdream_fast.scene.tets.colored import ColoredMesh
from mvdream_fast.scene.tets.config import TexturedMeshConfig
from mvdream_fast.scene.tets.losses import vertex_normals

GEOMETRY = ("vertices", "faces", "uvs", "uv_faces", "vertex_of_uv")
DARKEST = 1 / 64  # of a texture that is started from: black and white would have no gradient


class TexturedMesh(ColoredMesh):
    """A Representation (scene/base.py): a mesh that stays, and colours that are learned.

    Vertices of one place are one, however many a seam of the UV coordinates had made of it: a seam is no silhouette.
    Args: mesh: None for one that shows nothing until `restore` gives it its mesh.
    Raises: ValueError for a mesh that is none.
    """

    vertices: Tensor  # [n, 3]
    faces: Tensor  # [m, 3] int32, of vertices
    uvs: Tensor  # [k, 2], from the lower left
    uv_faces: Tensor  # [m, 3] int32, of uvs
    vertex_of_uv: Tensor  # [k] int64
    normals: Tensor
    topology: Tensor

    def __init__(self, config: TexturedMeshConfig, mesh: Mesh | None = None, stream: Stream | None = None):
        super().__init__(config, stream or Stream(0, 0, "volume"))
        self.config = config
        self.logits = None
        if config.mesh_colors == "texture":
            self.logits = nn.Parameter(torch.zeros(1, config.texture_size, config.texture_size, 3))
        if mesh is not None:
            _check_mesh(mesh)
            if self.logits is not None and mesh.uvs is None:
                mesh = bake_texture(mesh, _nearest_color(mesh.vertices, mesh.colors), config.texture_size)
        self._hold(*_welded(mesh if mesh is not None else _NOTHING))
        if self.logits is not None and mesh is not None and mesh.texture is not None:
            self._start_from(mesh.texture)

    @staticmethod
    def from_representation(
        config: TexturedMeshConfig, source: Representation, seed: int = 0, resolution: int = 128
    ) -> "TexturedMesh":
        """One of another representation's mesh, and of its colours, as a field or as a texture.

        Raises: DivergedError where it has no mesh.
        """
        textured = config.mesh_colors == "texture"
        found = source.mesh(resolution, texture=config.texture_size if textured else None)
        mesh = TexturedMesh(config, found, Stream(seed, 0, "volume"))
        mesh.take_colors(source, None if textured else found, seed)
        return mesh

    def _hold(self, vertices: Tensor, faces: Tensor, uvs: Tensor, uv_faces: Tensor, vertex_of_uv: Tensor) -> None:
        for name, x in zip(GEOMETRY, (vertices, faces, uvs, uv_faces, vertex_of_uv), strict=True):
            self.register_buffer(name, x)
        self._reach = max([super().reach, *reads.read(vertices.norm(dim=1))])
        self.register_buffer("normals", vertex_normals(vertices, faces), persistent=False)
        self.register_buffer("topology", edge_topology(faces), persistent=False)

    def _start_from(self, sheet: np.ndarray) -> None:
        """The logits of a texture [T, T, 3] uint8, resampled to this one's size."""
        rows = torch.from_numpy(np.ascontiguousarray(sheet[::-1])).float().movedim(-1, 0)[None] / 255
        size = (self.config.texture_size,) * 2
        if rows.shape[2:] != size:
            rows = torch.nn.functional.interpolate(rows, size, mode="bilinear", antialias=True)
        with torch.no_grad():
            assert self.logits is not None
            self.logits.copy_(torch.logit(rows.movedim(1, -1).clamp(DARKEST, 1 - DARKEST)))

    @property
    def reach(self) -> float:
        """How far from the origin the mesh goes."""
        return self._reach

    def body(self) -> Body:
        """The mesh."""
        return Body(self.vertices, self.normals, self.faces, self.topology)

    def seen_colors(self, seen: Seen) -> Tensor:
        """Colours [K, 3] of the pixels that show the mesh."""
        if self.logits is None:
            return super().seen_colors(seen)
        uv, uv_da = interpolate(self.uvs, seen.rast, self.uv_faces, seen.rast_db, "all")
        sheet = texture(torch.sigmoid(self.logits), uv, uv_da, "linear-mipmap-linear", "clamp")
        return sheet.view(-1, 3).index_select(0, seen.pixel)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The texture, or the field's table and network; the background."""
        config = self.config
        if self.logits is None:
            return self.color_groups(config.lr_encoding, config.lr_mlp, config.lr_background)
        groups = [
            {"params": [self.logits], "lr": config.lr_texture},
            {"params": [*self.background.parameters()], "lr": config.lr_background},
        ]
        return [group for group in groups if group["params"]]

    def statistics(self) -> dict[str, Statistic]:
        """Triangles and vertices."""
        return {"n_faces": len(self.faces), "n_vertices": len(self.vertices)}

    def restart(self, seed: int) -> None:
        """Takes the colours of a fresh one of this seed, a grey texture; the mesh stays."""
        fresh = TexturedMesh(self.config, None, Stream(seed, 0, "volume"))
        self.volume.load_state_dict(fresh.volume.state_dict())
        self.background.load_state_dict(fresh.background.state_dict())
        if self.logits is not None:
            self.logits.data.zero_()

    @torch.no_grad()
    def mesh(self, resolution: int = 128, max_faces: int | None = None, texture: int | None = None) -> Mesh:
        """The mesh as it is, whatever the resolution; simplified only where `max_faces` asks for it.

        A texture that was optimised comes with its own size and UV coordinates, unless the mesh is simplified.
        Raises: DivergedError where there is no mesh.
        """
        if not len(self.faces):
            raise DivergedError("there is no mesh to export: none was given, and none restored")
        colors, simplified = self.colors, max_faces and len(self.faces) > max_faces
        if self.logits is not None:
            own, places, there = self._textured()
            if not simplified:
                return own
            colors = _nearest_color(places, there)
        mesh = colored_mesh(self.vertices.cpu().numpy(), self.faces.cpu().numpy(), colors, max_faces)
        return mesh if texture is None else bake_texture(mesh, colors, texture)

    def _textured(self) -> tuple[Mesh, np.ndarray, np.ndarray]:
        """The mesh with its texture, and of the texels that it shows the places [K, 3] and the colours [K, 3]."""
        assert self.logits is not None
        sheet, size = torch.sigmoid(self.logits), self.config.texture_size
        colors = texture(sheet, self.uvs[None, None])[0, 0]
        vertices, faces, uvs = (x.cpu().numpy() for x in (self.vertices[self.vertex_of_uv], self.uv_faces, self.uvs))
        positions, covered = texel_positions(vertices, faces, uvs, size)
        rows = spread_over_gaps(np.ascontiguousarray(to_bytes(sheet[0])[::-1]), covered)
        normals = self.normals[self.vertex_of_uv].cpu().numpy()
        textured = Mesh(vertices, faces, colors.cpu().numpy(), normals, uvs, rows)
        return textured, positions[covered], rows[covered].astype(np.float32) / 255

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the mesh, too. Raises ModelError for another configuration, a mesh that is none, and numbers that
        are not finite."""
        mesh = {name: tensors[name].clone() for name in GEOMETRY if name in tensors}
        check_state("mesh", {name: x for name, x in self.state().items() if name not in GEOMETRY} | mesh, tensors)
        if set(mesh) != set(GEOMETRY) or not _fit(*(mesh[name] for name in GEOMETRY)):
            raise ModelError("the saved mesh is damaged: its triangles name vertices that it has not")
        self._hold(*(mesh[name].to(self.device) for name in GEOMETRY))
        self.load_state_dict(tensors)


_NOTHING = Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32), np.zeros((0, 3), np.float32))


def _check_mesh(mesh: Mesh) -> None:
    fits = len(mesh.faces) and mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.vertices)
    if not fits:
        raise ValueError(
            f"TexturedMesh: mesh must have triangles of its {len(mesh.vertices)} vertices; check its faces"
        )
    if not np.isfinite(mesh.vertices).all():
        raise ValueError("TexturedMesh: mesh must have finite vertices, got NaN or infinity; check what produced it")


def _welded(mesh: Mesh) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The mesh as GEOMETRY: vertices of one place become one, UV coordinates keep theirs."""
    places, vertex_of_uv = np.unique(mesh.vertices, axis=0, return_inverse=True)
    vertex_of_uv = vertex_of_uv.reshape(-1).astype(np.int64)
    uvs = mesh.uvs if mesh.uvs is not None else np.zeros((len(mesh.vertices), 2))
    faces = mesh.faces.astype(np.int32)
    numbers = (places.astype(np.float32), vertex_of_uv[faces].astype(np.int32), uvs.astype(np.float32), faces)
    vertices, welded, coordinates, uv_faces = (torch.from_numpy(np.ascontiguousarray(x)) for x in numbers)
    return vertices, welded, coordinates, uv_faces, torch.from_numpy(vertex_of_uv)


def _fit(vertices: Tensor, faces: Tensor, uvs: Tensor, uv_faces: Tensor, vertex_of_uv: Tensor) -> bool:
    """Whether GEOMETRY is a mesh."""
    shapes = vertices.shape[1:] == (3,) and uvs.shape[1:] == (2,) and faces.shape == uv_faces.shape
    shapes = shapes and faces.shape[1:] == (3,) and vertex_of_uv.shape == (len(uvs),)
    indices = ((faces, len(vertices)), (uv_faces, len(uvs)), (vertex_of_uv, len(vertices)))
    return shapes and all(not x.numel() or bool(x.min() >= 0 and x.max() < n) for x, n in indices)


def _nearest_color(positions: np.ndarray, colors: np.ndarray) -> ColorFn:
    """The colour of the nearest of some points."""
    from scipy.spatial import KDTree

    tree = KDTree(positions)
    return lambda points: torch.from_numpy(colors[tree.query(points.cpu().numpy())[1]])
