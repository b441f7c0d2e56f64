"""The distortion regulariser of rendering weights."""

from torch import Tensor

from mvdream_fast.nerfacc_compat._inputs import check_alike, floats, packing, promoted, ray_count
from mvdream_fast.nerfacc_compat.scan import scan
from mvdream_fast.nerfacc_compat.volrend import summed


def distortion(
    weights: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
) -> Tensor:
    """How spread out the weights of each ray are: sum_ij w_i w_j |t_i - t_j| + 1/3 sum_i w_i^2 delta_i, [R, 1].

    Packed [S] with ray_indices and n_rays, or batched [R, n]; samples of a ray go from near to far. Differentiable in
    the weights and distances. Raises: ValueError for shapes and indices that don't fit.
    Source: Barron et al., arXiv 2111.12077, eq. 15.
    """
    check_alike("distortion", weights=weights, t_starts=t_starts, t_ends=t_ends)
    n_rays = None if ray_indices is None else ray_count("distortion", n_rays)
    packed_info = packing("distortion", "weights", weights, None, ray_indices, n_rays)
    dtype = promoted(weights, t_starts, t_ends)
    weights, t_starts, t_ends = map(floats, (weights, t_starts, t_ends))
    mids = 0.5 * (t_starts + t_ends)
    before, weighted = (scan(x, packed_info, product=False, exclusive=True) for x in (weights, weights * mids))
    within = weights * (t_ends - t_starts) / 3
    each = weights * (2 * (before * mids - weighted) + within)
    return summed(each, None, ray_indices, n_rays).to(dtype)
