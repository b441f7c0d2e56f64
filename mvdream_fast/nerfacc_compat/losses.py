"""The distortion regulariser of rendering weights."""

from torch import Tensor

from mvdream_fast.nerfacc_compat.scan import exclusive_sum, pack_info
from mvdream_fast.nerfacc_compat.volrend import accumulate_along_rays


def distortion(
    weights: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
) -> Tensor:
    """How spread out the weights of each ray are: sum_ij w_i w_j |t_i - t_j| + 1/3 sum_i w_i^2 delta_i, [R, 1].

    Packed [S] with ray_indices and n_rays, or batched [R, n]; samples of a ray go from near to far. Differentiable in
    the weights and distances. Source: Barron et al., arXiv 2111.12077, eq. 15.
    """
    mids = 0.5 * (t_starts + t_ends)
    packed_info = None if ray_indices is None else pack_info(ray_indices, n_rays)
    nearer = exclusive_sum(weights, packed_info) * mids - exclusive_sum(weights * mids, packed_info)
    within = weights * (t_ends - t_starts) / 3
    return accumulate_along_rays(weights * (2 * nearer + within), None, ray_indices, n_rays)
