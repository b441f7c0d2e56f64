"""What keeps a mesh smooth while images pull at it; the weights are a recipe's."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals [n, 3]: the mean of the faces around a vertex, weighted by their area; up (0, 0, 1) where that is
    no direction. vertices: [n, 3]; faces: [m, 3] int32."""
    corners = vertices.index_select(0, faces.flatten().long()).view(-1, 3, 3)
    of_faces = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    spread = of_faces[:, None].expand(-1, 3, -1).reshape(-1, 3)
    total = torch.zeros_like(vertices).index_add(0, faces.flatten().long(), spread)
    flat = (total.detach() ** 2).sum(1, keepdim=True) <= 1e-20
    return normalize(torch.where(flat, total.new_tensor([0.0, 0.0, 1.0]), total), dim=1)


def unique_edges(faces: Tensor, topology: Tensor) -> Tensor:
    """[E, 2] int64: the edges of a mesh, each once, but those of more than two faces once a face.

    faces: [m, 3] int32, neighbours turning the same way; topology: `edge_topology` of them.
    """
    ends = torch.stack([faces.roll(-1, 1), faces.roll(-2, 1)], -1).view(-1, 2).long()
    return ends[(ends[:, 0] < ends[:, 1]) | (topology.view(-1) < 0)]


def normal_consistency(normals: Tensor, edges: Tensor) -> Tensor:
    """Mean over edges [E, 2] of 1 - cos of the angle between the unit normals [n, 3] at their ends; 0 without edges.

    Source: as threestudio's magic3d-refine and prolificdreamer-geometry weigh it, by 1e4.
    """
    a, b = normals.index_select(0, edges.flatten()).view(-1, 2, 3).unbind(1)
    return (1 - (a * b).sum(1)).sum() / max(len(edges), 1)


def laplacian(vertices: Tensor, edges: Tensor) -> Tensor:
    """Mean over vertices [n, 3] of |sum over neighbours of (vertex - neighbour)|; 0 without vertices.

    Uniform and not divided by the number of neighbours: a vertex of valence k at distance d from its neighbours' mean
    adds k d. Source: as threestudio's prolificdreamer-geometry weighs it, by 1e4.
    """
    a, b = vertices.index_select(0, edges.flatten()).view(-1, 2, 3).unbind(1)
    away = torch.stack([a - b, b - a], 1).view(-1, 3)
    sums = torch.zeros_like(vertices).index_add(0, edges.flatten(), away)
    return torch.linalg.vector_norm(sums, dim=1).sum() / max(len(vertices), 1)
