"""The functions of nerfacc with their parameters and defaults, as its main branch has them (facts, no code).

Those of its wheel 0.5.3 are the same but for what ADDED_SINCE lists. A name with a module's name before it isn't in the
package itself. The VDB estimator is left out; of the private functions those that nerfacc's own tests call are here.
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
    "PropNetEstimator.__init__": "self, optimizer=None, scheduler=None",
    "PropNetEstimator._update": "self, trans, loss_scaler=1.0",
    "PropNetEstimator.compute_loss": "self, trans, loss_scaler=1.0",
    "PropNetEstimator.sampling": "self, prop_sigma_fns, prop_samples, num_samples, n_rays, near_plane, far_plane, "
    "sampling_type=lindisp, stratified=False, requires_grad=False",
    "PropNetEstimator.update_every_n_steps": "self, trans, requires_grad=False, loss_scaler=1.0",
    "exclusive_prod": "inputs, packed_info=None, indices=None",
    "exclusive_sum": "inputs, packed_info=None, indices=None",
    "importance_sampling": "intervals, cdfs, n_intervals_per_ray, stratified=False",
    "inclusive_prod": "inputs, packed_info=None, indices=None",
    "inclusive_sum": "inputs, packed_info=None, indices=None",
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
    "cameras._opencv_lens_distortion": "uv, params",
    "cameras._opencv_lens_distortion_fisheye": "uv, params, eps=1e-10",
    "cameras._opencv_lens_undistortion": "uv, params, eps=1e-06, iters=10",
    "cameras.opencv_lens_undistortion": "uv, params, eps=1e-06, iters=10",
    "cameras.opencv_lens_undistortion_fisheye": "uv, params, eps=1e-06, iters=10",
    "estimators.base.AbstractEstimator.sampling": "self, args, kwargs",
    "estimators.base.AbstractEstimator.update_every_n_steps": "self, args, kwargs",
    "estimators.prop_net._lossfun_outer": "t, w, t_env, w_env",
    "estimators.prop_net._outer": "t0_starts, t0_ends, t1_starts, t1_ends, y1",
    "estimators.prop_net._pdf_loss": "segments_query, cdfs_query, segments_key, cdfs_key, eps=1e-07",
    "estimators.prop_net._transform_stot": "transform_type, s_vals, t_min, t_max",
    "estimators.prop_net.get_proposal_requires_grad_fn": "target=5.0, num_steps=1000",
    "grid._enlarge_aabb": "aabb, factor",
    "grid._query": "x, data, base_aabb",
    "grid._ray_aabb_intersect": "rays_o, rays_d, aabbs, near_plane=-inf, far_plane=inf, miss_value=inf",
    "losses.distortion": "weights, t_starts, t_ends, ray_indices=None, n_rays=None",  # there without the defaults
    "pdf._sample_from_weighted": "bins, weights, num_samples, stratified=False, vmin=-inf, vmax=inf",
    "volrend.accumulate_along_rays_": "weights, values=None, ray_indices=None, outputs=None",
}

# What follows the parameters of 0.5.3 on the main branch, or None for a function that it doesn't have.
ADDED_SINCE = dict.fromkeys(["exclusive_prod", "exclusive_sum", "inclusive_prod", "inclusive_sum"], ", indices=None")
ADDED_SINCE["losses.distortion"] = None
