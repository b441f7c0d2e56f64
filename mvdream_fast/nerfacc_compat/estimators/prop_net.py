"""The proposal-network estimator: small networks that learn where along the rays the samples are worth it.

Source: Barron et al., Mip-NeRF 360, arXiv 2111.12077, section 3 and eq. 13.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mvdream_fast.core import reads
from mvdream_fast.nerfacc_compat._inputs import check_alike, check_fits, check_tensor, floats, ray_count
from mvdream_fast.nerfacc_compat.data_specs import RayIntervals
from mvdream_fast.nerfacc_compat.estimators.base import AbstractEstimator
from mvdream_fast.nerfacc_compat.pdf import importance_sampling, searchsorted
from mvdream_fast.nerfacc_compat.volrend import render_transmittance_from_density
from mvdream_fast.ops._edges import require


class PropNetEstimator(AbstractEstimator):
    """Draws samples level by level, each from the weights that a proposal network gave those before, and trains them.

    One step: `sampling(requires_grad=True)`, a rendering of what it returns, and `update_every_n_steps` with the
    transmittances of that rendering. The optimizer and scheduler are those of the proposal networks.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ):
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.prop_cache: list[tuple[RayIntervals, Tensor | None]] = []  # None for the samples, the last

    @torch.no_grad()
    def sampling(
        self,
        prop_sigma_fns: Sequence[Callable],
        prop_samples: Sequence[int],
        num_samples: int,
        n_rays: int,
        near_plane: float | Tensor,
        far_plane: float | Tensor,
        sampling_type: Literal["uniform", "lindisp"] = "lindisp",
        stratified: bool = False,
        requires_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Samples of every ray between the planes: (t_starts, t_ends), each [R, num_samples].

        Each of prop_sigma_fns is called as fn(t_starts, t_ends) -> densities [R, n], n its number in prop_samples.
        "uniform" samples are equally far apart where nothing is known, "lindisp" ones in the inverse distance. With
        requires_grad the answers are kept, with their graph, for the loss; what an earlier call kept is dropped.
        Raises: ValueError for numbers, planes and shapes that don't fit; TypeError.
        """
        n_rays, n_fns = ray_count("sampling", n_rays), len(prop_sigma_fns)
        same = len(prop_samples) == n_fns
        require(same, "sampling", "prop_samples", f"{n_fns} numbers like prop_sigma_fns", prop_samples, "one a network")
        planes = self._planes(near_plane, far_plane, sampling_type, n_rays)
        cdfs = torch.tensor([0.0, 1.0], device=self.device).expand(n_rays, 2)
        intervals, kept = RayIntervals(cdfs), []
        for sigma_fn, n_samples in zip(prop_sigma_fns, prop_samples, strict=True):
            intervals, _ = importance_sampling(intervals, cdfs, n_samples, stratified)
            t = _transform_stot(sampling_type, intervals.vals, *planes)
            with torch.set_grad_enabled(requires_grad):
                cdfs = _cdfs_of(_answer(sigma_fn, t[..., :-1], t[..., 1:]))
            kept.append((intervals, cdfs))
        intervals, _ = importance_sampling(intervals, cdfs, num_samples, stratified)
        t = _transform_stot(sampling_type, intervals.vals, *planes)
        if requires_grad:
            self.prop_cache = [*kept, (intervals, None)]
        return t[..., :-1], t[..., 1:]

    def _planes(self, near_plane, far_plane, sampling_type: str, n_rays: int) -> list[Tensor]:
        named = {"near_plane": near_plane, "far_plane": far_plane}
        planes = {name: torch.as_tensor(x, dtype=torch.float32) for name, x in named.items()}
        for name, x in planes.items():
            check_fits("sampling", name, x, (n_rays, 1), x)
        near, far = planes.values()
        if any(reads.reads_wait(x.device) for x in (near, far)):
            return [x.to(self.device) for x in (near, far)]
        require(bool((near < far).all()), "sampling", "far_plane", "above near_plane", far_plane, "swap them")
        if sampling_type == "lindisp":
            remedy = 'move it away from the camera, or pass sampling_type="uniform"'
            require(bool((near > 0).all()), "sampling", "near_plane", "above 0 with lindisp", near_plane, remedy)
        return [x.to(self.device) for x in (near, far)]

    @torch.enable_grad()
    def compute_loss(self, trans: Tensor, loss_scaler: float = 1.0) -> Tensor:
        """The proposals' loss for the last sampling with requires_grad: a number, 0 where nothing was kept.

        trans: [R, num_samples], the transmittances of the samples; no gradient goes there. What was kept is used up.
        Raises: ValueError for another shape.
        """
        if not self.prop_cache:
            return torch.zeros((), device=self.device)
        intervals = self.prop_cache[-1][0]
        check_tensor("compute_loss", "trans", trans)
        wanted, got = [intervals.vals.shape[0], intervals.vals.shape[1] - 1], list(trans.shape)
        require(got == wanted, "compute_loss", "trans", f"of shape {wanted}", got, "render the samples of `sampling`")
        cdfs, proposals = _cdfs_of(trans.detach()), self.prop_cache[:-1]
        self.prop_cache = []
        losses = [_pdf_loss(intervals, cdfs, key, own) for key, own in proposals if own is not None]
        means = [loss.sum() / max(loss.numel(), 1) for loss in losses]  # without rays 0, where a mean would be NaN
        return sum(means, torch.zeros((), device=self.device)) * loss_scaler

    @torch.enable_grad()
    def update_every_n_steps(self, trans: Tensor, requires_grad: bool = False, loss_scaler: float = 1.0) -> float:
        """A step of the optimizer (where requires_grad, as in `sampling`) and of the scheduler; the loss."""
        if requires_grad:
            return self._update(trans, loss_scaler)
        if self.scheduler is not None:
            self.scheduler.step()
        return 0.0

    @torch.enable_grad()
    def _update(self, trans: Tensor, loss_scaler: float = 1.0) -> float:
        op, kept = "update_every_n_steps", len(self.prop_cache) > 1
        optimizer = self.optimizer
        if optimizer is None:
            raise RuntimeError(f"{op}: the estimator must be given an optimizer, got None; pass one")
        remedy = "call sampling with requires_grad=True and proposal networks first"
        require(kept, op, "the samples", "kept by sampling", "none", remedy, RuntimeError)
        loss = self.compute_loss(trans, loss_scaler)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.item()


def get_proposal_requires_grad_fn(target: float = 5.0, num_steps: int = 1000) -> Callable[[int], bool]:
    """A function of the step: whether the proposals learn in it. Often at first, later each `target` steps."""
    since_last = 0

    def requires_grad(step: int) -> bool:
        nonlocal since_last
        due = since_last > target * min(step / num_steps, 1.0)
        since_last = 1 if due else since_last + 1
        return due

    return requires_grad


def _answer(sigma_fn: Callable, t_starts: Tensor, t_ends: Tensor) -> Tensor:
    """Transmittances in front of the samples, by the densities that a network answers."""
    sigmas = sigma_fn(t_starts, t_ends)
    check_alike("sampling", t_starts=t_starts, sigmas=sigmas)
    return render_transmittance_from_density(t_starts, t_ends, sigmas)[0]


def _cdfs_of(trans: Tensor) -> Tensor:
    """Share of the light [R, n + 1] that is gone at the edges of samples [R, n]: all of it at the last."""
    return torch.nn.functional.pad(1 - floats(trans), (0, 1), value=1.0)


def _transform_stot(transform_type: str, s_vals: Tensor, t_min: float | Tensor, t_max: float | Tensor) -> Tensor:
    """Distances between the planes of values in [0, 1]."""
    if transform_type == "uniform":
        return s_vals * t_max + (1 - s_vals) * t_min
    if transform_type == "lindisp":
        return 1 / (s_vals / t_max + (1 - s_vals) / t_min)
    raise ValueError(f"sampling: sampling_type must be uniform or lindisp, got {transform_type}; choose one of them")


def _pdf_loss(
    segments_query: RayIntervals, cdfs_query: Tensor, segments_key: RayIntervals, cdfs_key: Tensor, eps: float = 1e-7
) -> Tensor:
    """How far each weight is above what the proposal's intervals that touch its interval weigh: max(0, w - W)^2 / w."""
    left, right = searchsorted(segments_key, segments_query)
    if segments_query.vals.ndim > 1:
        starts, ends = left[..., :-1], right[..., 1:]
        w = cdfs_query.diff(dim=-1)
    else:
        is_left, is_right = segments_query.is_left, segments_query.is_right
        both = is_left is not None and is_right is not None
        require(both, "_pdf_loss", "is_left and is_right", "given with packed intervals", "none", "pass both")
        starts, ends = left[is_left], right[is_right]
        w = cdfs_query[is_right] - cdfs_query[is_left]
    touching = cdfs_key.gather(-1, ends) - cdfs_key.gather(-1, starts)
    return _above(w, touching, eps)


def _lossfun_outer(t: Tensor, w: Tensor, t_env: Tensor, w_env: Tensor) -> Tensor:
    """The same of weights w [..., n] at edges t [..., n + 1] and a proposal's, [..., m] at [..., m + 1].

    An interval outside of the proposal's counts as inside its first or last one.
    """
    return _above(w, _outer(t[..., :-1], t[..., 1:], t_env[..., :-1], t_env[..., 1:], w_env), torch.finfo(t.dtype).eps)


def _outer(t0_starts: Tensor, t0_ends: Tensor, t1_starts: Tensor, t1_ends: Tensor, y1: Tensor) -> Tensor:
    """What intervals [..., m] with weights y1 that touch each interval [..., n] weigh together."""
    last = y1.shape[-1] - 1
    first = (torch.searchsorted(t1_starts.contiguous(), t0_starts.contiguous(), right=True) - 1).clamp(0, last)
    final = torch.searchsorted(t1_ends.contiguous(), t0_ends.contiguous(), right=True).clamp(0, last)
    total = torch.nn.functional.pad(y1.cumsum(-1), (1, 0))
    return total.gather(-1, final + 1) - total.gather(-1, first)


def _above(w: Tensor, bound: Tensor, eps: float) -> Tensor:
    return (w - bound).clamp(min=0) ** 2 / (w + eps)
