"""Bakes a mesh's colours into a texture: an atlas of its surface, and the field's colour at every texel.

xatlas unwraps; which texel shows which point of the surface, and the padding around the charts, are computed here.
"""

import dataclasses

import numpy as np
import torch

from mvdream_fast.core.images import to_bytes
from mvdream_fast.ops import interpolate, rasterize
from mvdream_fast.scene.mesh.mesh import CHUNK, ColorFn, Mesh, smooth_normals

PADDING = 2  # texels between charts; the rest of the sheet repeats the nearest chart's border


def bake_texture(mesh: Mesh, color_fn: ColorFn, size: int) -> Mesh:
    """The same surface with UV coordinates and a texture of `size` x `size` texels.

    Vertices are doubled along the seams, and keep their normals. Texels outside of every chart take the colour of the
    nearest one inside, so that no seam shows when a renderer filters or shrinks the texture.
    """
    source, faces, uvs = _unwrap(mesh, size)
    vertices = mesh.vertices[source]
    positions, covered = texel_positions(vertices, faces, uvs, size)
    with torch.no_grad():
        points = torch.from_numpy(positions[covered])
        colors = torch.cat([color_fn(chunk) for chunk in points.split(CHUNK)])
    sheet = np.zeros((size, size, 3), dtype=np.uint8)
    sheet[covered] = to_bytes(colors)
    return dataclasses.replace(
        mesh,
        vertices=vertices,
        faces=faces,
        colors=mesh.colors[source],
        normals=smooth_normals(mesh.vertices, mesh.faces)[source],
        uvs=uvs,
        texture=spread_over_gaps(sheet, covered),
    )


def _unwrap(mesh: Mesh, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """xatlas: the vertex of the mesh that each new vertex is [n], faces [m, 3], and uvs [n, 2] from the lower left."""
    import xatlas

    atlas = xatlas.Atlas()
    atlas.add_mesh(mesh.vertices, mesh.faces.astype(np.uint32))
    pack = xatlas.PackOptions()
    pack.resolution, pack.padding, pack.bilinear = size, PADDING, True
    atlas.generate(xatlas.ChartOptions(), pack)
    source, faces, uvs = atlas[0]
    # With a fixed resolution a very long chart may not fit, and goes to a second sheet: one that does fit everything.
    if atlas.atlas_count > 1:
        pack.resolution = 0
        atlas.generate(xatlas.ChartOptions(), pack)
        source, faces, uvs = atlas[0]
    return source.astype(np.int64), faces.astype(np.int32), uvs.astype(np.float32)


def texel_positions(
    vertices: np.ndarray, faces: np.ndarray, uvs: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The point of the surface under the centre of every texel: [size, size, 3] float32, and which are covered.

    Row 0 is the top of the sheet, v = 1. A triangle too small to hold a texel's centre leaves none.
    """
    corners = torch.from_numpy(np.asarray(uvs, dtype=np.float32)) * 2 - 1  # the sheet is the screen
    flat = torch.cat([corners, torch.zeros(len(corners), 1), torch.ones(len(corners), 1)], 1)
    tri = torch.from_numpy(np.ascontiguousarray(faces, dtype=np.int32))
    with torch.no_grad():
        rast, _ = rasterize(flat, tri, (size, size))
        positions, _ = interpolate(torch.from_numpy(np.asarray(vertices, dtype=np.float32)), rast, tri)
    return positions[0].flip(0).numpy(), (rast[0, ..., 3] > 0).flip(0).numpy()


def spread_over_gaps(sheet: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Every texel that is not covered takes the nearest covered one's colour."""
    from scipy.ndimage import distance_transform_edt

    if not covered.any():
        return sheet
    rows, columns = np.asarray(distance_transform_edt(~covered, return_distances=False, return_indices=True))
    return sheet[rows, columns]
