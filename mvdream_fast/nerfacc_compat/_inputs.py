"""What the functions of this folder ask of their arguments, in the caller's names, before anything is broadcast.

Every dtype of real numbers is taken: sums are made in at least float32, and results come back in the caller's dtype.
Where to read a tensor's numbers is to wait for them, on CUDA, they are not read, as nerfacc doesn't: what is wrong with
rays is then found by the traversal, and wrong packings give wrong results, which torch's indexing refuses at best.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import SupportsIndex

import torch
from torch import Tensor

from mvdream_fast.core import reads
from mvdream_fast.ops._edges import FLOATS, check_same_device, check_shaped, require
from mvdream_fast.ops._packing import check_packing, pack_runs, pack_sorted

HALVES = (torch.float16, torch.bfloat16)


def check_real(op: str, name: str, x: Tensor) -> None:
    """A tensor of real numbers."""
    require(isinstance(x, Tensor), op, name, "a tensor", type(x).__name__, "pass a tensor", TypeError)
    require(not x.is_complex(), op, name, "of real numbers", x.dtype, "take its real part", TypeError)


def check_tensor(op: str, name: str, x: Tensor) -> None:
    """A tensor of real numbers with at least one axis."""
    check_real(op, name, x)
    require(x.ndim > 0, op, name, "of at least one axis", "a single number", "pass [S], or [R, n]")


def check_alike(op: str, **tensors: Tensor) -> None:
    """Tensors of real numbers with the shape of the first, on its device."""
    first = next(iter(tensors))
    for name, x in tensors.items():
        check_tensor(op, name, x)
        wanted, got = list(tensors[first].shape), list(x.shape)
        require(got == wanted, op, name, f"of shape {wanted} like {first}", got, "reshape or expand it")
    check_same_device(op, **tensors)


def check_fits(op: str, name: str, x: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Real numbers on the device of `like` that expand to `shape`, and so make nothing larger than that."""
    check_real(op, name, x)
    axes = zip(reversed(x.shape), reversed(shape), strict=False)
    fits = x.ndim <= len(shape) and all(n in (1, m) for n, m in axes)
    require(fits, op, name, f"of shape {list(shape)}, or 1 along an axis", list(x.shape), "reshape it")
    check_same_device(op, **{"the samples": like, name: x})


def check_rays(op: str, rays_o: Tensor, rays_d: Tensor) -> int:
    """How many rays there are, both [R, 3] and numbers, directions not zero; one look at the numbers."""
    check_shaped(op, "rays_o", rays_o, (None, 3), FLOATS)
    check_shaped(op, "rays_d", rays_d, tuple(rays_o.shape), FLOATS)
    check_same_device(op, rays_o=rays_o, rays_d=rays_d)
    if reads.reads_wait(rays_o.device):
        return rays_o.shape[0]
    longest = rays_d.detach().double().abs().amax(-1)
    if bool((torch.isfinite(rays_o).all(-1) & torch.isfinite(longest) & (longest >= 1e-30)).all()):
        return rays_o.shape[0]
    for name, x in {"rays_o": rays_o, "rays_d": rays_d}.items():
        fine, look = bool(torch.isfinite(x).all()), "look at the camera that made the rays"
        require(fine, op, name, "finite", "a NaN or infinite number", look)
    raise ValueError(f"{op}: rays_d must be non-zero, got a direction of length 0; normalise the directions")


def check_bound(op: str, name: str, bound: Tensor, rays_o: Tensor, least: bool) -> None:
    """One distance a ray, [R]: a number or infinity, which as the least one says that the ray misses; -infinity is
    refused there."""
    check_fits(op, name, bound, rays_o.shape[:1], rays_o)
    if reads.reads_wait(bound.device):
        return
    refused = bound.isnan() | (bound == -math.inf) if least else bound.isnan()
    wanted, got = ("a number or infinity", "NaN or -infinity") if least else ("a number", "NaN")
    require(not bool(refused.any()), op, name, wanted, got, "look at what computes it")


def without_misses(near: Tensor, far: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds that the traversals take, and which rays [R] miss: those that begin at infinity, where
    ray_aabb_intersect puts the boxes that are missed. They end where they begin, at 0, and have no samples."""
    misses = near.float() == math.inf
    return near.masked_fill(misses, 0.0), far.masked_fill(misses, 0.0), misses


def packing(
    op: str,
    name: str,
    values: Tensor,
    packed_info: Tensor | None,
    ray_indices: Tensor | None,
    n_rays: int | None = None,
    index_name: str = "ray_indices",
) -> Tensor | None:
    """The packing [R, 2] int64 of packed `values` [S], by packed_info or else ray_indices; None for batched ones."""
    if packed_info is None and ray_indices is None:
        return None
    shape = list(values.shape)
    require(len(shape) == 1, op, name, "of shape [S] where the samples are packed", shape, "flatten it")
    if packed_info is not None:
        packed_info = whole(op, "packed_info", packed_info, values)
        if torch.compiler.is_compiling():  # a graph cannot read values: the registered scan checks them when it runs
            return packed_info
        return check_packing(op, shape[0], None, packed_info, n_rays, bounded=True)
    if ray_indices is None:
        return None
    indices = whole(op, index_name, ray_indices, values)
    if n_rays is None and reads.reads_wait(indices.device):
        _check_indices(op, index_name, indices, shape[0])
        return pack_runs(indices)
    return pack(op, index_name, indices, shape[0], n_rays)


def pack(op: str, name: str, indices: Tensor, n_samples: int, n_rays: int | None) -> Tensor:
    """Start and count of each ray, [R, 2], of sorted int64 indices [S]; without n_rays the last + 1."""
    _check_indices(op, name, indices, n_samples)
    if n_rays is None:
        n_rays = max(int(indices[-1]) + 1, 0) if n_samples else 0
    return pack_sorted(op, indices, ray_count(op, n_rays), name, bounded=True)


def _check_indices(op: str, name: str, indices: Tensor, n_samples: int) -> None:
    got = list(indices.shape)
    require(got == [n_samples], op, name, f"of shape [{n_samples}]", got, "one ray a sample")


def whole(op: str, name: str, x: Tensor, like: Tensor) -> Tensor:
    """A tensor of whole numbers on the device of `like`, as int64."""
    require(isinstance(x, Tensor), op, name, "a tensor", type(x).__name__, "pass a tensor", TypeError)
    is_whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    require(is_whole, op, name, "of whole numbers", x.dtype, "convert it with .long()", TypeError)
    check_same_device(op, **{"the samples": like, name: x})
    return x.long()


def ray_count(op: str, n_rays: object) -> int:
    """n_rays as a number; whatever Python counts with is taken."""
    count = int(n_rays) if isinstance(n_rays, SupportsIndex) else -1
    wanted = "given with ray_indices, and at least 0"
    require(count >= 0, op, "n_rays", wanted, n_rays, "rays without samples count too")
    return count


def check_range(op: str, name: str, indices: Tensor, n_rays: int) -> None:
    """Indices of rays lie in [0, n_rays): one look at them, none in a graph or on CUDA, where index_add checks them."""
    if indices.numel() and not torch.compiler.is_compiling() and not reads.reads_wait(indices.device):
        ends = [int(x) for x in torch.aminmax(indices)]
        require(ends[0] >= 0 and ends[1] < n_rays, op, name, f"in [0, {n_rays})", ends, "check n_rays")


def widened(x: Tensor) -> Tensor:
    """float32 where x is of half precision, x itself elsewhere."""
    return x.float() if x.dtype in HALVES else x


def floats(x: Tensor) -> Tensor:
    """The same, and float32 for whole numbers and masks."""
    return widened(x) if x.is_floating_point() else x.float()


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that torch gives a quotient of all of these: a floating one."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors if x is not None))
    return dtype if dtype.is_floating_point else torch.float32
