"""The public functions of nerfacc 0.5.3 with their parameters and defaults, as its wheel has them (facts, no code).

Its proposal-network and VDB estimators are left out; `distortion` is not in the wheel but in the project's later files.
"""

_PER_RAY = "packed_info=None, ray_indices=None, n_rays=None"
_SEEN = "early_stop_eps=0.0001, alpha_thre=0.0, prefix_trans=None"
_DENSITY = f"t_starts, t_ends, sigmas, {_PER_RAY}"
_UPDATE = "self, step, occ_eval_fn, occ_thre=0.01, ema_decay=0.95, warmup_steps=256"

SIGNATURES = {
    "OccGridEstimator.__init__": "self, roi_aabb, resolution=128, levels=1, kwargs",
    "OccGridEstimator._get_all_cells": "self",
    "OccGridEstimator._sample_uniform_and_occupied_cells": "self, n",
    "OccGridEstimator._update": _UPDATE,
    "OccGridEstimator.mark_invisible_cells": "self, K, c2w, width, height, near_plane=0.0, chunk=32768",
    "OccGridEstimator.sampling": "self, rays_o, rays_d, sigma_fn=None, alpha_fn=None, near_plane=0.0, "
    "far_plane=10000000000.0, t_min=None, t_max=None, render_step_size=0.001, early_stop_eps=0.0001, alpha_thre=0.0, "
    "stratified=False, cone_angle=0.0",
    "OccGridEstimator.update_every_n_steps": f"{_UPDATE}, n=16",
    "RayIntervals": "vals, packed_info=None, ray_indices=None, is_left=None, is_right=None",
    "RaySamples": "vals, packed_info=None, ray_indices=None, is_valid=None",
    "accumulate_along_rays": "weights, values=None, ray_indices=None, n_rays=None",
    "exclusive_prod": "inputs, packed_info=None",
    "exclusive_sum": "inputs, packed_info=None",
    "importance_sampling": "intervals, cdfs, n_intervals_per_ray, stratified=False",
    "inclusive_prod": "inputs, packed_info=None",
    "inclusive_sum": "inputs, packed_info=None",
    "pack_info": "ray_indices, n_rays=None",
    "ray_aabb_intersect": "rays_o, rays_d, aabbs, near_plane=-inf, far_plane=inf, miss_value=inf",
    "render_transmittance_from_alpha": f"alphas, {_PER_RAY}, prefix_trans=None",
    "render_transmittance_from_density": f"{_DENSITY}, prefix_trans=None",
    "render_visibility_from_alpha": f"alphas, {_PER_RAY}, {_SEEN}",
    "render_visibility_from_density": f"{_DENSITY}, {_SEEN}",
    "render_weight_from_alpha": f"alphas, {_PER_RAY}, prefix_trans=None",
    "render_weight_from_density": f"{_DENSITY}, prefix_trans=None",
    "rendering": "t_starts, t_ends, ray_indices=None, n_rays=None, rgb_sigma_fn=None, rgb_alpha_fn=None, "
    "render_bkgd=None",
    "searchsorted": "sorted_sequence, values",
    "traverse_grids": "rays_o, rays_d, binaries, aabbs, near_planes=None, far_planes=None, step_size=0.001, "
    "cone_angle=0.0, traverse_steps_limit=None, over_allocate=False, rays_mask=None, t_sorted=None, t_indices=None, "
    "hits=None",
}
