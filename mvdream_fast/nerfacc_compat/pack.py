"""The packing of samples: which of them belong to which ray."""

import torch
from torch import Tensor

from mvdream_fast.nerfacc_compat._inputs import pack, whole
from mvdream_fast.ops._edges import require


@torch.no_grad()
def pack_info(ray_indices: Tensor, n_rays: int | None = None) -> Tensor:
    """Start and count of each ray's samples, [R, 2], of sorted ray_indices [S]; n_rays defaults to the last + 1.

    The result has the dtype of ray_indices.
    Raises: ValueError for indices that are not sorted, or not in [0, n_rays); TypeError for other than whole numbers.
    """
    indices = whole("pack_info", "ray_indices", ray_indices, ray_indices)
    require(indices.ndim == 1, "pack_info", "ray_indices", "of shape [S]", list(indices.shape), "flatten them")
    return pack("pack_info", "ray_indices", indices, indices.shape[0], n_rays).to(ray_indices.dtype)
