"""The occupancy-grid estimator: nested grids of a scene, what they skip, and how they learn it."""

from collections.abc import Callable

import torch
from torch import Tensor

from mvdream_fast.nerfacc_compat.estimators.base import AbstractEstimator
from mvdream_fast.nerfacc_compat.grid import sample_grids
from mvdream_fast.nerfacc_compat.scan import pack_info
from mvdream_fast.nerfacc_compat.volrend import render_visibility_from_alpha, render_visibility_from_density
from mvdream_fast.ops.march_rays import unpack_bits
from mvdream_fast.ops.update_occupancy import update_occupancy


class OccGridEstimator(AbstractEstimator):
    """Occupancy of `levels` nested grids, each twice as large as the one before, around roi_aabb.

    Buffers as in nerfacc, so that its checkpoints load: resolution [3], aabbs [levels, 6], occs [levels * cells] and
    binaries [levels, x, y, z], all empty at first. Random points come from torch's generator.
    """

    DIM = 3

    def __init__(self, roi_aabb: list | Tensor, resolution: int | list | Tensor = 128, levels: int = 1, **kwargs):
        super().__init__()
        if "contraction_type" in kwargs:
            raise ValueError(
                "OccGridEstimator: contraction_type must be left out (gone since 0.4), got one; use levels"
            )
        resolution = torch.as_tensor([resolution] * 3 if isinstance(resolution, int) else resolution, dtype=torch.int32)
        roi_aabb = torch.as_tensor(roi_aabb, dtype=torch.float32)
        if resolution.shape != (3,) or roi_aabb.shape != (6,):
            got = list(resolution.shape), list(roi_aabb.shape)
            raise ValueError(f"OccGridEstimator: resolution and roi_aabb must be [3] and [6], got {got}; check them")
        self.levels, self.cells_per_lvl = levels, int(resolution.prod())
        centre, extent = (roi_aabb[:3] + roi_aabb[3:]) / 2, (roi_aabb[3:] - roi_aabb[:3]) / 2
        aabbs = [torch.cat([centre - extent * 2**i, centre + extent * 2**i]) for i in range(levels)]
        self.register_buffer("resolution", resolution)
        self.register_buffer("aabbs", torch.stack(aabbs))
        self.register_buffer("occs", torch.zeros(levels * self.cells_per_lvl))
        self.register_buffer("binaries", torch.zeros([levels, *resolution.tolist()], dtype=torch.bool))
        axes = [torch.arange(int(n)) for n in resolution]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        self.register_buffer("grid_coords", coordinates, persistent=False)
        self.register_buffer("grid_indices", torch.arange(self.cells_per_lvl), persistent=False)

    @torch.no_grad()
    def sampling(
        self,
        rays_o: Tensor,
        rays_d: Tensor,
        sigma_fn: Callable | None = None,
        alpha_fn: Callable | None = None,
        near_plane: float = 0.0,
        far_plane: float = 1e10,
        t_min: Tensor | None = None,
        t_max: Tensor | None = None,
        render_step_size: float = 1e-3,
        early_stop_eps: float = 1e-4,
        alpha_thre: float = 0.0,
        stratified: bool = False,
        cone_angle: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Samples of rays [R, 3] in occupied cells: (ray_indices, t_starts, t_ends), each [S].

        With sigma_fn or alpha_fn, called as fn(t_starts, t_ends, ray_indices) -> [S] and only if there are samples,
        those are dropped that cannot be seen: transmittance below early_stop_eps, or alpha below alpha_thre or the
        mean occupancy, whichever is less. `stratified` adds a random part of a step to the near plane of each ray.
        """
        near = torch.full_like(rays_o[..., 0], near_plane)
        far = torch.full_like(rays_o[..., 0], far_plane)
        near = near if t_min is None else near.maximum(t_min)
        far = far if t_max is None else far.minimum(t_max)
        if stratified:
            near = near + torch.rand_like(near) * render_step_size
        ray_indices, t_starts, t_ends = sample_grids(
            rays_o, rays_d, self.binaries, self.aabbs, near, far, render_step_size, cone_angle
        )
        seeing = (alpha_thre > 0 or early_stop_eps > 0) and (sigma_fn is not None or alpha_fn is not None)
        if not seeing or not t_starts.numel():
            return ray_indices, t_starts, t_ends
        thresholds = {"early_stop_eps": early_stop_eps, "alpha_thre": min(alpha_thre, self.occs.mean().item())}
        packed_info = pack_info(ray_indices, rays_o.shape[0])
        values = (sigma_fn or alpha_fn)(t_starts, t_ends, ray_indices)
        if values.shape != t_starts.shape:
            wanted, got = list(t_starts.shape), list(values.shape)
            raise ValueError(f"sampling: sigmas or alphas must be {wanted}, got {got}; squeeze the last axis")
        if sigma_fn is not None:
            keep = render_visibility_from_density(t_starts, t_ends, values, packed_info, **thresholds)
        else:
            keep = render_visibility_from_alpha(values, packed_info, **thresholds)
        return ray_indices[keep], t_starts[keep], t_ends[keep]

    @torch.no_grad()
    def update_every_n_steps(
        self,
        step: int,
        occ_eval_fn: Callable,
        occ_thre: float = 1e-2,
        ema_decay: float = 0.95,
        warmup_steps: int = 256,
        n: int = 16,
    ) -> None:
        """Update the grids if `step` is a multiple of n; occ_eval_fn: positions [P, 3] -> occupancies [P, 1].

        All cells before warmup_steps; afterwards a quarter drawn uniformly and up to another quarter of occupied ones.
        Raises: RuntimeError outside training mode.
        """
        if not self.training:
            raise RuntimeError(
                "update_every_n_steps: the estimator must be in training mode, got eval(); call train() or _update()"
            )
        if step % n == 0:
            self._update(step, occ_eval_fn, occ_thre, ema_decay, warmup_steps)

    @torch.no_grad()
    def mark_invisible_cells(
        self, K: Tensor, c2w: Tensor, width: int, height: int, near_plane: float = 0.0, chunk: int = 32**3
    ) -> None:
        """Mark the cells that no camera sees, or that lie too near to one, with -1: they are never occupied.

        K: [N, 3, 3] or [1, 3, 3]. c2w: [N, 3, 4] or [N, 4, 4], cameras that look along +z. To be called once, first.
        """
        to_camera = c2w[:, :3, :3].transpose(1, 2)
        shift = -to_camera @ c2w[:, :3, 3:]
        for level, indices in enumerate(self._get_all_cells()):
            for part in indices.split(chunk):
                unit = self.grid_coords[part] / (self.resolution - 1)
                positions = self.aabbs[level, :3] + unit * (self.aabbs[level, 3:] - self.aabbs[level, :3])
                u, v, depth = (K @ (to_camera @ positions.T + shift)).unbind(1)
                u, v = u / depth, v / depth
                in_image = (depth >= 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
                seen = (in_image & (depth >= near_plane)).any(0) & ~(in_image & (depth < near_plane)).any(0)
                self.occs[level * self.cells_per_lvl + part] = torch.where(seen, 0.0, -1.0)

    def _get_all_cells(self) -> list[Tensor]:
        """The cells of each level that some camera sees."""
        return [self.grid_indices[occs >= 0] for occs in self.occs.view(self.levels, -1)]

    def _sample_uniform_and_occupied_cells(self, n: int) -> list[Tensor]:
        chosen = []
        for occs, binary in zip(self.occs.view(self.levels, -1), self.binaries, strict=True):
            uniform = torch.randint(self.cells_per_lvl, (n,), device=self.device)
            uniform = uniform[occs[uniform] >= 0]
            occupied = torch.nonzero(binary.flatten())[:, 0]
            if n < occupied.shape[0]:
                occupied = occupied[torch.randint(occupied.shape[0], (n,), device=self.device)]
            chosen.append(torch.cat([uniform, occupied]))
        return chosen

    @torch.no_grad()
    def _update(
        self,
        step: int,
        occ_eval_fn: Callable,
        occ_thre: float = 0.01,
        ema_decay: float = 0.95,
        warmup_steps: int = 256,
    ) -> None:
        warm = step < warmup_steps
        chosen = self._get_all_cells() if warm else self._sample_uniform_and_occupied_cells(self.cells_per_lvl // 4)
        values = [self._probe(level, cells, occ_eval_fn) for level, cells in enumerate(chosen)]
        cells = [level * self.cells_per_lvl + cells for level, cells in enumerate(chosen)]
        occs, bits = update_occupancy(self.occs, torch.cat(values), torch.cat(cells), ema_decay, occ_thre)
        self.occs.copy_(occs)
        self.binaries.copy_(unpack_bits(bits, occs.shape[0]).view_as(self.binaries))

    def _probe(self, level: int, cells: Tensor, occ_eval_fn: Callable) -> Tensor:
        corner = self.grid_coords[cells].float()
        unit = (corner + torch.rand_like(corner)) / self.resolution
        box = self.aabbs[level]
        return occ_eval_fn(box[:3] + unit * (box[3:] - box[:3])).reshape(-1).float()
