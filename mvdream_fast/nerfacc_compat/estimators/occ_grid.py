"""The occupancy-grid estimator: nested grids of a scene, what they skip, and how they learn it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mvdream_fast.nerfacc_compat._inputs import check_alike, check_bound, check_rays, widened
from mvdream_fast.nerfacc_compat.estimators.base import AbstractEstimator
from mvdream_fast.nerfacc_compat.grid import _enlarge_aabb, check_grids, sample_grids
from mvdream_fast.nerfacc_compat.pack import pack_info
from mvdream_fast.nerfacc_compat.volrend import render_visibility_from_alpha, render_visibility_from_density
from mvdream_fast.ops._edges import require
from mvdream_fast.ops.march_rays import unpack_bits
from mvdream_fast.ops.traverse_grids import MAX_GRIDS
from mvdream_fast.ops.update_occupancy import run_update


class OccGridEstimator(AbstractEstimator):
    """Occupancy of `levels` nested grids, each twice as large as the one before, around roi_aabb.

    Buffers as in nerfacc, so that its checkpoints load: resolution [3], aabbs [levels, 6], occs [levels * cells] and
    binaries [levels, x, y, z], all empty at first. Random points come from torch's generator.
    """

    DIM = 3
    resolution: Tensor
    aabbs: Tensor
    occs: Tensor
    binaries: Tensor
    grid_coords: Tensor
    grid_indices: Tensor

    def __init__(self, roi_aabb: list | Tensor, resolution: int | list | Tensor = 128, levels: int = 1, **kwargs):
        super().__init__()
        if "contraction_type" in kwargs:
            raise ValueError(
                "OccGridEstimator: contraction_type must be left out (gone since 0.4), got one; use levels"
            )
        resolution, roi_aabb = self._checked(resolution, roi_aabb, levels)
        self.levels, self.cells_per_lvl = levels, int(resolution.prod())
        self.register_buffer("resolution", resolution)
        self.register_buffer("aabbs", torch.stack([_enlarge_aabb(roi_aabb, 2**i) for i in range(levels)]))
        self.register_buffer("occs", torch.zeros(levels * self.cells_per_lvl))
        self.register_buffer("binaries", torch.zeros([levels, *resolution.tolist()], dtype=torch.bool))
        axes = [torch.arange(int(n)) for n in resolution]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        self.register_buffer("grid_coords", coordinates, persistent=False)
        self.register_buffer("grid_indices", torch.arange(self.cells_per_lvl), persistent=False)

    @staticmethod
    def _checked(resolution, roi_aabb, levels: int) -> tuple[Tensor, Tensor]:
        """Resolution [3] int32 and box [6] float32."""
        op, cells = "OccGridEstimator", torch.as_tensor(resolution)
        sides = cells.shape in ((), (3,)) and not cells.is_floating_point() and bool((cells > 0).all())
        require(sides, op, "resolution", "one or three whole numbers above 0", resolution, "pass cells a side")
        box = torch.as_tensor(roi_aabb, dtype=torch.float32)
        ordered = box.shape == (6,) and bool((box[:3] < box[3:]).all()) and bool(box.isfinite().all())
        remedy = "pass (x0, y0, z0, x1, y1, z1)"
        require(ordered, op, "roi_aabb", "six finite numbers, minimum below maximum", box.tolist(), remedy)
        require(0 < levels <= MAX_GRIDS, op, "levels", f"1 to {MAX_GRIDS}", levels, "make the box larger")
        return cells.to(torch.int32).expand(3).clone(), box

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
        self._check_sampling(rays_o, rays_d, near_plane, far_plane, t_min, t_max, render_step_size, cone_angle)
        rays_o, rays_d, boxes = map(widened, (rays_o, rays_d, self.aabbs))
        near = torch.full_like(rays_o[..., 0], near_plane)
        far = torch.full_like(rays_o[..., 0], far_plane)
        near = near if t_min is None else near.maximum(t_min)
        far = far if t_max is None else far.minimum(t_max)
        if stratified:
            near = near + torch.rand_like(near) * render_step_size
        ray_indices, t_starts, t_ends = sample_grids(
            rays_o, rays_d, self.binaries, boxes, near, far, render_step_size, cone_angle
        )
        answer = alpha_fn if sigma_fn is None else sigma_fn
        if answer is None or not (alpha_thre > 0 or early_stop_eps > 0) or not t_starts.numel():
            return ray_indices, t_starts, t_ends
        if alpha_thre > 0:
            alpha_thre = min(alpha_thre, self.occs.mean().item())
        packed_info = pack_info(ray_indices, rays_o.shape[0])
        values = answer(t_starts, t_ends, ray_indices)
        check_alike("sampling", t_starts=t_starts, **{"alphas" if sigma_fn is None else "sigmas": values})
        if sigma_fn is not None:
            keep = render_visibility_from_density(
                t_starts, t_ends, values, packed_info, early_stop_eps=early_stop_eps, alpha_thre=alpha_thre
            )
        else:
            keep = render_visibility_from_alpha(
                values, packed_info, early_stop_eps=early_stop_eps, alpha_thre=alpha_thre
            )
        kept = torch.nonzero(keep)[:, 0]
        return ray_indices[kept], t_starts[kept], t_ends[kept]

    def _check_sampling(self, rays_o, rays_d, near_plane, far_plane, t_min, t_max, step_size, cone_angle) -> None:
        op = "sampling"
        check_rays(op, rays_o, rays_d)
        check_grids(op, "binaries", self.binaries, "aabbs", self.aabbs, rays_o)
        require(math.isfinite(near_plane), op, "near_plane", "finite", near_plane, "pass 0 for the rays' origins")
        require(not math.isnan(far_plane), op, "far_plane", "a number", far_plane, "pass infinity for no limit")
        for name, bound in {"t_min": t_min, "t_max": t_max}.items():
            if bound is not None:
                check_bound(op, name, bound, rays_o, least=name == "t_min")
        require(math.isfinite(step_size), op, "render_step_size", "finite", step_size, "pass 0 for one sample a cell")
        require(cone_angle >= 0, op, "cone_angle", "at least 0", cone_angle, "pass the growth of a step per distance")

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

        K: [N, 3, 3] or [1, 3, 3], in pixels. c2w: [N, 3, 4] or [N, 4, 4], cameras that look along +z. To be called
        once, first; looks at `chunk` cells together, in float64. Raises: ValueError for shapes; TypeError.
        """
        op, n = "mark_invisible_cells", c2w.shape[0] if isinstance(c2w, Tensor) and c2w.ndim else None
        for name, x in {"K": K, "c2w": c2w}.items():
            require(isinstance(x, Tensor), op, name, "a tensor", type(x).__name__, "pass a tensor", TypeError)
        got = list(c2w.shape)
        require(got in ([n, 3, 4], [n, 4, 4]), op, "c2w", "of shape [N, 3, 4] or [N, 4, 4]", got, "one a camera")
        got = list(K.shape)
        require(got in ([n, 3, 3], [1, 3, 3]), op, "K", f"of shape [{n}, 3, 3] or [1, 3, 3]", got, "one a camera")
        require(chunk > 0, op, "chunk", "at least 1", chunk, "pass how many cells to look at together")
        K, c2w = (x.to(self.device, torch.float64) for x in (K, c2w))
        to_camera = c2w[:, :3, :3].transpose(1, 2)
        shift = -to_camera @ c2w[:, :3, 3:]
        for level, indices in enumerate(self._get_all_cells()):
            low, high = self.aabbs[level].double().view(2, 3)
            for part in indices.split(chunk):
                positions = low + self.grid_coords[part] / (self.resolution - 1).clamp(min=1).double() * (high - low)
                u, v, depth = (K @ (to_camera @ positions.T + shift)).unbind(1)
                u, v = u / depth, v / depth
                in_image = (depth >= 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
                seen = (in_image & (depth >= near_plane)).any(0) & ~(in_image & (depth < near_plane)).any(0)
                self.occs[level * self.cells_per_lvl + part] = torch.where(seen, 0.0, -1.0).to(self.occs.dtype)

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
        occs, bits = run_update(widened(self.occs), torch.cat(values), torch.cat(cells), ema_decay, occ_thre)
        self.occs.copy_(occs)
        self.binaries.copy_(unpack_bits(bits, occs.shape[0]).view_as(self.binaries))

    def _probe(self, level: int, cells: Tensor, occ_eval_fn: Callable) -> Tensor:
        corner = self.grid_coords[cells].float()
        unit = (corner + torch.rand_like(corner)) / self.resolution
        box = self.aabbs[level]
        values = occ_eval_fn(box[:3] + unit * (box[3:] - box[:3]))
        op, n = "update_every_n_steps", cells.shape[0]
        fits = isinstance(values, Tensor) and list(values.shape) in ([n], [n, 1])
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        require(fits, op, "the answer of occ_eval_fn", f"of shape [{n}, 1]", got, "return one value a position")
        return values.reshape(-1).float()
