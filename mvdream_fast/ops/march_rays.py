"""Ray marching through a bit-packed occupancy grid, and the pruning of the samples found: geometry without gradients.

The lattice, the midpoints and the cells are computed in float64 from float32 inputs, in a form whose every product is
exact, so that every backend finds the same samples to the bit. Evaluating the field lives elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from mvdream_fast.core.reads import read
from mvdream_fast.ops._edges import (
    BACKENDS,
    address,
    as_constant,
    check_probability,
    check_same_device,
    check_shaped,
    check_tensors,
    is_recorded,
    load_native,
    plain32,
    queue_of,
    require,
    runs_natively,
)
from mvdream_fast.ops._march_checks import check_march, of_rays, raise_for, triple
from mvdream_fast.ops._packing import check_packing, exclusive_sum_packed, pack_info, packed_counts, rows_of
from mvdream_fast.ops._registered import register

_RAYS_PER_BLOCK = 2048
_MOST_SAMPLES = 1 << 40  # 8 TB is a mistake, and torch's own words for it name no argument


@dataclass(frozen=True)
class Samples:
    """Samples of all rays, packed ray after ray and nearest first.

    t_starts, t_ends: [S] float32. packed_info: [R, 2] int64, start and count of each ray. `ray_indices` is made of them
    when first asked for, and kept: a training step without shading never needs its 8 bytes a sample. What `march_rays`
    and `prune_samples` made is trusted to be packed so; what a caller puts together is checked by every op that takes
    it, which on a GPU waits for it.
    """

    t_starts: torch.Tensor
    t_ends: torch.Tensor
    packed_info: torch.Tensor
    _is_ours: bool = field(default=False, init=False, repr=False, compare=False)

    @property
    def n_samples(self) -> int:
        """S, the samples of all rays."""
        return self.t_starts.shape[0]

    @property
    def n_rays(self) -> int:
        """R, those without a sample included."""
        return self.packed_info.shape[0]

    @cached_property
    def ray_indices(self) -> torch.Tensor:
        """The ray of each sample, [S] int64."""
        return rows_of(self.packed_info, self.n_samples)

    @property
    def t_mids(self) -> torch.Tensor:
        """Distances of the midpoints, [S]."""
        return 0.5 * (self.t_starts + self.t_ends)

    def positions(self, rays_o: torch.Tensor, rays_d: torch.Tensor) -> torch.Tensor:
        """Midpoints in scene units, [S, 3]; differentiable in the rays.

        rays_o, rays_d: [R, 3], those that were marched. Raises: as `march_rays` for unfitting arguments.
        """
        if torch.compiler.is_compiling():
            return positions_ref(self, rays_o, rays_d)
        check_samples("Samples.positions", self, rays_o=rays_o, rays_d=rays_d)
        tensors = (rays_o, rays_d, self.t_starts, self.t_ends)
        if runs_natively(*tensors, devices=BACKENDS) and not is_recorded(*tensors):
            return _positions(self, rays_o, rays_d)
        return positions_ref(self, rays_o, rays_d)

    def select(self, keep: torch.Tensor) -> "Samples":
        """The subset where `keep` [S] bool is true."""
        up_to = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
        starts, counts = self.packed_info.unbind(-1)
        counts = up_to[starts + counts] - up_to[starts]
        kept = Samples(self.t_starts[keep], self.t_ends[keep], packed_counts(counts))
        return ours(kept) if self._is_ours else kept


def ours(samples: Samples) -> Samples:
    """Marks samples that this package made, by the rules, as not to be checked again."""
    object.__setattr__(samples, "_is_ours", True)
    return samples


def join_samples(parts: Sequence[Samples]) -> Samples:
    """The samples of consecutive blocks of rays as one."""
    t_starts, t_ends = (torch.cat([getattr(part, name) for part in parts]) for name in ("t_starts", "t_ends"))
    joined = Samples(t_starts, t_ends, packed_counts(torch.cat([part.packed_info[:, 1] for part in parts])))
    return ours(joined) if all(part._is_ours for part in parts) else joined


def positions_ref(samples: Samples, rays_o: torch.Tensor, rays_d: torch.Tensor) -> torch.Tensor:
    """`Samples.positions` in plain torch."""
    rays = samples.ray_indices
    return rays_o[rays] + rays_d[rays] * samples.t_mids[:, None]


def march_rays(
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    aabb: torch.Tensor | Sequence[float],
    occupancy_bits: torch.Tensor,
    resolution: int | Sequence[int],
    step_size: float,
    jitter: torch.Tensor | None = None,
    near: float | torch.Tensor = 0.0,
    far: float | torch.Tensor = math.inf,
    max_samples: int | None = None,
) -> Samples:
    """Samples on each ray's lattice `near + jitter * step_size + k * step_size` whose midpoint is occupied.

    An interval is kept when its midpoint lies inside the box, nearer than `far`, in a cell whose bit is set. Cells are
    half open, x is the slowest index and bit `i % 8` of byte `i // 8` belongs to cell i. The lattice is not restarted
    behind an empty cell. Not differentiable; the result's size needs one synchronisation on a GPU.

    rays_o, rays_d: [R, 3]; directions need not be of unit length, distances are in units of them.
    aabb: [6], minimum then maximum. occupancy_bits: [ceil(cells / 8)] uint8. jitter: [R] in [0, 1), None for none.
    near, far: numbers, or [R]. max_samples: at most this many samples of one ray, the nearest; None for all.

    Returns: Samples; with no ray or no occupied cell there are none, and every count is 0.
    Raises: ValueError for shapes, for a NaN, infinite or zero ray, a NaN bound, an empty box, steps so short that a ray
    would take more than 2^32 of them through the box; TypeError; RuntimeError.
    Source: the conventions of nerfacc 0.5.3's occupancy-grid estimator (Li et al., arXiv 2305.04966).
    """
    given = (rays_o, rays_d, aabb, occupancy_bits, resolution, step_size, jitter, near, far, max_samples)
    if torch.compiler.is_compiling():
        return _registered(*given)
    return as_constant("march_rays", _checked, *given)


@torch.no_grad()
def march_rays_ref(
    rays_o, rays_d, aabb, occupancy_bits, resolution, step_size, jitter=None, near=0.0, far=math.inf, max_samples=None
) -> Samples:
    """The same in plain torch: every lattice point inside the box is tested, a block of rays at a time."""
    box = torch.as_tensor(aabb, dtype=torch.float32, device=rays_o.device).double()
    shape = torch.tensor(triple(resolution), device=rays_o.device)
    step = torch.tensor(step_size, dtype=torch.float32).double().item()
    n_rays = rays_o.shape[0]
    occupied = unpack_bits(occupancy_bits, math.prod(triple(resolution)))
    start = _per_ray(near, rays_o)
    if jitter is not None:
        start = start + jitter.float().double() * step
    far = _per_ray(far, rays_o)
    found = [
        _march_block(rays_o[i:j], rays_d[i:j], box, occupied, shape, step, start[i:j], far[i:j], max_samples, i)
        for i in range(0, n_rays, _RAYS_PER_BLOCK)
        for j in [min(i + _RAYS_PER_BLOCK, n_rays)]
    ]
    if not found:
        none = rays_o.new_zeros(0, dtype=torch.float32)
        return Samples(none, none, none.new_zeros((0, 2), dtype=torch.int64))
    ray_indices, t_starts, t_ends = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Samples(t_starts, t_ends, pack_info(ray_indices, n_rays))


def check_samples(op: str, samples: Samples, **rays: torch.Tensor) -> None:
    """What the extension reads by packed_info lies in the samples; `rays` are [R, 3] of as many as were marched."""
    _check_kind(op, samples)
    check_shaped(op, "t_starts", samples.t_starts, (None,))
    check_shaped(op, "t_ends", samples.t_ends, (len(samples.t_starts),))
    check_same_device(op, t_starts=samples.t_starts, t_ends=samples.t_ends, packed_info=samples.packed_info, **rays)
    if not samples._is_ours:
        check_packing(op, len(samples.t_starts), None, samples.packed_info, None)
    for name, ray in rays.items():
        check_shaped(op, name, ray, (samples.n_rays, 3))


def _check_kind(op: str, samples: object) -> None:
    require(isinstance(samples, Samples), op, "samples", "Samples", type(samples).__name__, "march first", TypeError)


def prune_samples(
    samples: Samples, sigmas: torch.Tensor, alpha_thre: float = 0.0, early_stop_eps: float = 1e-4
) -> Samples:
    """The samples that can be seen: alpha >= `alpha_thre`, and transmittance before them >= `early_stop_eps`.

    Transmittance counts every sample given, the dropped ones too. Not differentiable. sigmas: [S], not negative.

    Returns: Samples, the subset in its order. Raises: ValueError, TypeError, RuntimeError for unfitting arguments.
    Source: nerfacc 0.5.3, visibility from density.
    """
    _check_kind("prune_samples", samples)
    packed = (samples.t_starts, samples.t_ends, samples.packed_info)
    if torch.compiler.is_compiling():
        return Samples(*torch.ops.mvdream_fast.prune_samples(*packed, sigmas, alpha_thre, early_stop_eps))
    thresholds = (alpha_thre, early_stop_eps)
    return as_constant("prune_samples", _checked_prune, *packed, samples._is_ours, sigmas, *thresholds)


def _checked_prune(t_starts, t_ends, packed_info, is_ours, sigmas, alpha_thre, early_stop_eps) -> Samples:
    op, samples = "prune_samples", Samples(t_starts, t_ends, packed_info)
    check_samples(op, ours(samples) if is_ours else samples)
    check_shaped(op, "sigmas", sigmas, (samples.n_samples,))
    check_same_device(op, sigmas=sigmas, t_starts=samples.t_starts)
    check_probability(op, "alpha_thre", alpha_thre)
    check_probability(op, "early_stop_eps", early_stop_eps)
    return _prune(samples, sigmas, alpha_thre, early_stop_eps)


@torch.no_grad()
def prune_samples_ref(samples, sigmas, alpha_thre=0.0, early_stop_eps=1e-4) -> Samples:
    """The same in plain torch."""
    return samples.select(visible_ref(samples, sigmas, alpha_thre, early_stop_eps))


def visible_ref(samples, sigmas, alpha_thre=0.0, early_stop_eps=1e-4) -> torch.Tensor:
    """Which samples `prune_samples` keeps, [S] bool; both thresholds are compared as optical depths, without exp."""
    depth = (sigmas.float() * (samples.t_ends - samples.t_starts)).double()
    before = exclusive_sum_packed(depth, samples.packed_info)
    return (depth >= optical_depth(1 - alpha_thre)) & (before <= optical_depth(early_stop_eps))


def optical_depth(transmittance: float) -> float:
    """-log(transmittance), infinite at 0."""
    return -math.log(transmittance) if transmittance > 0 else math.inf


def unpack_bits(bits: torch.Tensor, n_cells: int) -> torch.Tensor:
    """bits [ceil(n_cells / 8)] uint8 -> [n_cells] bool; bit i % 8 of byte i // 8 is cell i."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits[:, None] >> shifts) & 1).bool().reshape(-1)[:n_cells]


def pack_bits(occupied: torch.Tensor) -> torch.Tensor:
    """[n_cells] bool -> [ceil(n_cells / 8)] uint8, the inverse of `unpack_bits`."""
    padded = torch.nn.functional.pad(occupied.reshape(-1).to(torch.uint8), (0, -occupied.numel() % 8))
    shifts = torch.arange(8, device=occupied.device, dtype=torch.uint8)
    return (padded.reshape(-1, 8) << shifts).sum(-1, dtype=torch.uint8)


def _checked(rays_o, rays_d, aabb, bits, resolution, step_size, jitter, near, far, max_samples) -> Samples:
    march = (rays_o, rays_d, aabb, bits, resolution, step_size, jitter, near, far, max_samples)
    box, shape = check_march("march_rays", *march)
    return _march(rays_o, rays_d, box, bits, shape, step_size, jitter, near, far, max_samples)


def _march(rays_o, rays_d, box, bits, shape, step_size, jitter, near, far, max_samples) -> Samples:
    native = load_native("march_rays", rays_o)
    args, _alive = march_args("march_rays", rays_o, rays_d, box, bits, shape, step_size, jitter, near, far, max_samples)
    status, counts = torch.empty(rays_o.shape[0] + 1, dtype=torch.int64, device=rays_o.device).tensor_split([1])
    native.march_count(args, counts.data_ptr(), status.data_ptr())
    worst, n_samples = read(torch.cat([status, counts.sum(0, keepdim=True)]))  # together: on a GPU each read waits
    raise_for("march_rays", worst)
    samples = _empty_samples("march_rays", counts, n_samples)
    native.march_fill(args, *map(address, (samples.packed_info, samples.t_starts, samples.t_ends)))
    return samples


def march_args(op, rays_o, rays_d, box, bits, shape, step_size, jitter, near, far, max_samples=None):
    """The arguments of a march for the extension, and the tensors that must live as long as they are used."""
    per_ray = [plain32(x) if isinstance(x, torch.Tensor) and x.ndim else None for x in (jitter, near, far)]
    near, far = (0.0 if isinstance(x, torch.Tensor) and x.ndim else float(x) for x in (near, far))
    tensors = [plain32(rays_o), plain32(rays_d), *per_ray, bits.contiguous()]
    args = load_native(op, rays_o).MarchArgs(
        *map(address, tensors[:5]),
        *(near, far, rays_o.shape[0], tensors[5].data_ptr(), shape, box, step_size),
        *(-1 if max_samples is None else max_samples, queue_of(rays_o)),
    )
    return args, tensors


def _prune(samples, sigmas, alpha_thre, early_stop_eps) -> Samples:
    native = load_native("prune_samples", sigmas)
    sigmas, t_starts, t_ends = (plain32(x) for x in (sigmas, samples.t_starts, samples.t_ends))
    packed_info = samples.packed_info.contiguous()
    packed = native.Packed(*map(address, (t_starts, t_ends, packed_info)), samples.n_rays, queue_of(sigmas))
    keep = torch.empty(samples.n_samples, dtype=torch.uint8, device=sigmas.device)
    counts = torch.empty(samples.n_rays, dtype=torch.int64, device=sigmas.device)
    depths = optical_depth(1 - alpha_thre), optical_depth(early_stop_eps)
    native.prune_count(packed, sigmas.data_ptr(), *depths, keep.data_ptr(), counts.data_ptr())
    kept = _empty_samples("prune_samples", counts, *read(counts.sum(0, keepdim=True)))
    native.prune_fill(packed, *map(address, (keep, kept.packed_info, kept.t_starts, kept.t_ends)))
    return kept


def _positions(samples, rays_o, rays_d) -> torch.Tensor:
    native = load_native("march_rays", rays_o)
    tensors = [x.detach().contiguous() for x in (samples.t_starts, samples.t_ends, samples.packed_info, rays_o, rays_d)]
    packed = native.Packed(*map(address, tensors[:3]), samples.n_rays, queue_of(rays_o))
    positions = rays_o.new_empty(samples.n_samples, 3)
    native.sample_positions(packed, *map(address, (*tensors[3:], positions)))
    return positions


def _empty_samples(op: str, counts: torch.Tensor, n_samples: int) -> Samples:
    """Room for the samples that rays have, counts [R], n_samples in all."""
    few = n_samples <= _MOST_SAMPLES
    require(few, op, "step_size", "long enough for 2^40 samples at most", f"{n_samples} samples", "take longer steps")
    t_starts, t_ends = (torch.empty(n_samples, dtype=torch.float32, device=counts.device) for _ in range(2))
    return ours(Samples(t_starts, t_ends, packed_counts(counts)))


def _registered(rays_o, rays_d, aabb, bits, resolution, step_size, jitter, near, far, max_samples) -> Samples:
    """The march by its registered form, for graphs: numbers and tensors apart, and nothing else checked beforehand."""
    check_tensors("march_rays", **of_rays(jitter, near, far))
    shared = [0.0 if isinstance(x, torch.Tensor) else float(x) for x in (near, far)]
    per_ray = [x if isinstance(x, torch.Tensor) else None for x in (jitter, near, far)]
    grid = ([float(x) for x in aabb], list(triple(resolution)), step_size)
    return Samples(*torch.ops.mvdream_fast.march_rays(rays_o, rays_d, bits, *grid, *per_ray, *shared, max_samples))


def _op(rays_o, rays_d, bits, aabb, resolution, step_size, jitter, nears, fars, near, far, max_samples):
    near, far = (shared if each is None else each for shared, each in ((near, nears), (far, fars)))
    samples = _checked(rays_o, rays_d, aabb, bits, resolution, step_size, jitter, near, far, max_samples)
    return samples.t_starts, samples.t_ends, samples.packed_info


register(
    "march_rays(Tensor rays_o, Tensor rays_d, Tensor occupancy_bits, float[] aabb, SymInt[] resolution,"
    " float step_size, Tensor? jitter, Tensor? nears, Tensor? fars, float near, float far, SymInt? max_samples)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_op,
    cuda=_op,
    fake=lambda rays_o, *_: _unknown_samples(rays_o, rays_o.shape[0]),
)


def _prune_op(t_starts, t_ends, packed_info, sigmas, alpha_thre, early_stop_eps):
    kept = _checked_prune(t_starts, t_ends, packed_info, False, sigmas, alpha_thre, early_stop_eps)
    return kept.t_starts, kept.t_ends, kept.packed_info


register(
    "prune_samples(Tensor t_starts, Tensor t_ends, Tensor packed_info, Tensor sigmas, float alpha_thre,"
    " float early_stop_eps) -> (Tensor, Tensor, Tensor)",
    cpu=_prune_op,
    cuda=_prune_op,
    fake=lambda t_starts, t_ends, packed_info, *_: _unknown_samples(t_starts, packed_info.shape[0]),
)


def _unknown_samples(like: torch.Tensor, n_rays: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = torch.library.get_ctx().new_dynamic_size()
    t_starts, t_ends = (like.new_empty(n, dtype=torch.float32) for _ in range(2))
    return t_starts, t_ends, like.new_empty((n_rays, 2), dtype=torch.int64)


def _march_block(rays_o, rays_d, box, occupied, shape, step, start, far, max_samples, first_ray):
    o, d = rays_o.float().double(), rays_d.float().double()
    k_low, k_high = _lattice_range(o, d, box, start, far, step)
    n = int((k_high - k_low).clamp(min=0).max())
    k = (k_low[:, None] + torch.arange(n, device=o.device)).double()  # an int64 times a number would be float32
    t_starts = (start[:, None] + k * step).float()
    t_ends = (start[:, None] + (k + 1) * step).float()
    t_mids = 0.5 * (t_starts.double() + t_ends.double())
    scale = shape / (box[3:] - box[:3])
    cells = torch.floor((o[:, None] + d[:, None] * t_mids[..., None] - box[:3]) * scale).long()
    inside = ((cells >= 0) & (cells < shape)).all(-1) & (t_mids < far[:, None]) & (k < k_high[:, None])
    cells = torch.minimum(cells.clamp(min=0), shape - 1)
    keep = inside & occupied[(cells[..., 0] * shape[1] + cells[..., 1]) * shape[2] + cells[..., 2]]
    if max_samples is not None:
        keep &= keep.cumsum(-1) <= max_samples
    return torch.nonzero(keep)[:, 0] + first_ray, t_starts[keep], t_ends[keep]


def _lattice_range(o, d, box, start, far, step):
    """First and one past the last lattice index that can lie in the box, two steps generous: [R] int64 each."""
    a, b = (box[:3] - o) / d, (box[3:] - o) / d
    parallel, within = d == 0, (o >= box[:3]) & (o <= box[3:])
    blocked = torch.where(within, -math.inf, math.inf)
    t_enter = torch.where(parallel, blocked, torch.minimum(a, b)).amax(-1)
    t_exit = torch.minimum(torch.where(parallel, -blocked, torch.maximum(a, b)).amin(-1), far)
    hit = t_exit >= torch.maximum(t_enter, start)
    low = torch.where(hit, (t_enter - start) / step - 2, 0.0).clamp(min=0)
    high = torch.where(hit, (t_exit - start) / step + 2, 0.0).clamp(min=0)
    return low.floor().long(), high.ceil().long()


def _per_ray(value: float | torch.Tensor, rays_o: torch.Tensor) -> torch.Tensor:
    value = torch.as_tensor(value, dtype=torch.float32, device=rays_o.device)
    return value.double().expand(rays_o.shape[0])
