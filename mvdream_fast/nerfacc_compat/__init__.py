"""nerfacc 0.5.3's public names over our ops: `from mvdream_fast import nerfacc_compat as nerfacc`.

Same names, signatures, conventions and gradients, packed and batched, on CPUs and GPUs. What differs: zero samples are
defined everywhere (nerfacc crashes), `exclusive_prod` has its true gradient for factors of zero, masked rays have no
samples with or without over-allocation, and packed chunks must lie ray after ray. The proposal-network and VDB
estimators and the lens models are not here.
"""

from mvdream_fast.nerfacc_compat.data_specs import RayIntervals, RaySamples
from mvdream_fast.nerfacc_compat.grid import ray_aabb_intersect, traverse_grids
from mvdream_fast.nerfacc_compat.losses import distortion
from mvdream_fast.nerfacc_compat.occ_grid import OccGridEstimator
from mvdream_fast.nerfacc_compat.pdf import importance_sampling, searchsorted
from mvdream_fast.nerfacc_compat.scan import exclusive_prod, exclusive_sum, inclusive_prod, inclusive_sum, pack_info
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
