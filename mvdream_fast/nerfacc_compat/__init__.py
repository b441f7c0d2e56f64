"""nerfacc's public names over our ops: `from mvdream_fast import nerfacc_compat as nerfacc`.

Names, signatures, conventions and gradients of version 0.5.3 and of the main branch, packed and batched, on CPUs and
GPUs. What differs: zero samples are defined everywhere (nerfacc crashes), half and double precision are taken,
`exclusive_prod` has its true gradient for factors of zero, masked rays have no samples with or without
over-allocation, packed chunks must lie ray after ray, and a fisheye's point that nothing is seen at is NaN. The VDB
estimator, a shell around another package's grids, is not here.
"""

from mvdream_fast.nerfacc_compat.cameras import opencv_lens_undistortion, opencv_lens_undistortion_fisheye
from mvdream_fast.nerfacc_compat.data_specs import RayIntervals, RaySamples
from mvdream_fast.nerfacc_compat.estimators.occ_grid import OccGridEstimator
from mvdream_fast.nerfacc_compat.estimators.prop_net import PropNetEstimator
from mvdream_fast.nerfacc_compat.grid import ray_aabb_intersect, traverse_grids
from mvdream_fast.nerfacc_compat.losses import distortion
from mvdream_fast.nerfacc_compat.pack import pack_info
from mvdream_fast.nerfacc_compat.pdf import importance_sampling, searchsorted
from mvdream_fast.nerfacc_compat.scan import exclusive_prod, exclusive_sum, inclusive_prod, inclusive_sum
from mvdream_fast.nerfacc_compat.volrend import (
    accumulate_along_rays,
    accumulate_along_rays_,
    render_transmittance_from_alpha,
    render_transmittance_from_density,
    render_visibility_from_alpha,
    render_visibility_from_density,
    render_weight_from_alpha,
    render_weight_from_density,
    rendering,
)

__version__ = "0.5.3"

__all__ = [
    "OccGridEstimator",
    "PropNetEstimator",
    "RayIntervals",
    "RaySamples",
    "__version__",
    "accumulate_along_rays",
    "accumulate_along_rays_",
    "distortion",
    "exclusive_prod",
    "exclusive_sum",
    "importance_sampling",
    "inclusive_prod",
    "inclusive_sum",
    "opencv_lens_undistortion",
    "opencv_lens_undistortion_fisheye",
    "pack_info",
    "ray_aabb_intersect",
    "render_transmittance_from_alpha",
    "render_transmittance_from_density",
    "render_visibility_from_alpha",
    "render_visibility_from_density",
    "render_weight_from_alpha",
    "render_weight_from_density",
    "rendering",
    "searchsorted",
    "traverse_grids",
]
