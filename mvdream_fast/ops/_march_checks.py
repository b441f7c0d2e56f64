"""What a march through an occupancy grid must be given, and the errors that the extension reports of it.

Shared by `march_rays`, `render` and `traverse_grids`, which march with the same conventions.
"""

import math
import operator
from collections.abc import Sequence
from numbers import Real

import torch

from mvdream_fast.ops._edges import check_same_device, check_shaped, check_tensors, count, number, require


def triple(resolution: int | Sequence[int]) -> tuple[int, ...]:
    """A number of cells a side, or three of them, as three; whole numbers of any library."""
    if isinstance(resolution, int):
        return (resolution,) * 3
    if getattr(resolution, "ndim", 1) == 0:
        return (operator.index(resolution),) * 3  # pyright: ignore[reportArgumentType] # NumPy's, a tensor's
    return tuple(n if isinstance(n, int) else operator.index(n) for n in resolution)


def of_rays(jitter, near, far) -> dict:
    """What must be tensors: a jitter that is given, and bounds that are no numbers."""
    bounds = {name: x for name, x in (("near", near), ("far", far)) if not isinstance(x, Real)}
    return bounds if jitter is None else {"jitter": jitter, **bounds}


def check_march(op, rays_o, rays_d, aabb, bits, resolution, step_size, jitter, near, far, max_samples=None):
    """The box as six floats and the resolution as three; raises what `march_rays` says."""
    check_shaped(op, "rays_o", rays_o, (None, 3))
    check_shaped(op, "rays_d", rays_d, tuple(rays_o.shape))
    try:
        box = [float(x) for x in torch.as_tensor(aabb, dtype=torch.float32).tolist()]
    except (TypeError, ValueError):
        box = []
    ordered = len(box) == 6 and all(math.isfinite(x) for x in box) and all(box[i] < box[i + 3] for i in range(3))
    require(
        ordered, op, "aabb", "six finite numbers, minimum below maximum", box or aabb, "pass (x0, y0, z0, x1, y1, z1)"
    )
    try:
        shape = triple(resolution)
    except (TypeError, ValueError, RuntimeError):
        shape = ()
    fits = len(shape) == 3 and min(shape) > 0
    require(fits, op, "resolution", "one or three positive whole numbers", resolution, "pass cells a side")
    check_tensors(op, occupancy_bits=bits)
    n_bytes = (math.prod(shape) + 7) // 8
    require(bits.dtype == torch.uint8, op, "occupancy_bits", "uint8", bits.dtype, "use pack_bits", TypeError)
    fits = tuple(bits.shape) == (n_bytes,)
    require(fits, op, "occupancy_bits", f"of shape [{n_bytes}]", list(bits.shape), "one bit a cell, see pack_bits")
    step = number(op, "step_size", step_size, "pass a length in scene units")
    positive = math.isfinite(step) and step > 0
    require(positive, op, "step_size", "positive and finite", step_size, "pass a length in scene units")
    tensors = of_rays(jitter, near, far)
    for name, value in tensors.items():
        if name == "jitter" or not isinstance(value, torch.Tensor) or value.ndim > 0:
            check_shaped(op, name, value, (rays_o.shape[0],))
    check_same_device(op, rays_o=rays_o, rays_d=rays_d, occupancy_bits=bits, **tensors)
    few = max_samples is None or count(op, "max_samples", max_samples, "leave it out for no limit") >= 0
    require(few, op, "max_samples", "None or at least 0", max_samples, "leave it out for no limit")
    if not isinstance(near, torch.Tensor) or near.ndim == 0:
        raise_for(op, 0 if math.isfinite(float(near)) else 1)
    if not isinstance(far, torch.Tensor) or far.ndim == 0:
        raise_for(op, 4 if math.isnan(float(far)) else 0)
    return box, shape


def raise_for(op: str, status: int) -> None:
    """A MarchStatus of csrc/march.h as the error that it stands for."""
    look = "look at the camera that made the rays"
    require(status != 1, op, "rays_o, rays_d and near", "finite", "a NaN or infinite number", look)
    require(status != 2, op, "rays_d", "non-zero", "a direction of length 0 (below 1e-30)", "normalise the directions")
    require(status != 4, op, "far", "a number", "NaN", "use infinity for no limit")
    require(status != 3, op, "jitter", "in [0, 1)", "a value outside", "pass a fraction of the step")
    few = "of a length that crosses the box in at most 2^32 steps"
    require(status != 5, op, "rays_d", few, "a shorter one", "normalise the directions, or take longer steps")
