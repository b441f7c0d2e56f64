"""The moving maximum that an occupancy grid keeps, and the bits made of it; choosing the cells lives in field."""

import torch

from mvdream_fast.ops._edges import (
    address,
    as_constant,
    check_probability,
    check_same_device,
    check_shaped,
    check_tensors,
    load_native,
    number,
    plain32,
    queue_of,
    require,
)
from mvdream_fast.ops._registered import register
from mvdream_fast.ops.march_rays import pack_bits


def update_occupancy(
    ema: torch.Tensor,
    values: torch.Tensor,
    cells: torch.Tensor | None = None,
    decay: float = 0.95,
    threshold: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ema' = max(decay * ema, value) at the given cells, and the bits of ema' > min(mean(ema'), threshold).

    Cells that are not given keep their value; a NaN counts as 0. A cell given twice takes the larger value, in any
    order. A negative entry marks a cell that no camera sees: it stays as it is, is never occupied, and does not count
    in the mean. Not differentiable; nothing is changed in place.

    ema: [cells] float32, or float64, which runs through the plain-torch reference. values: [P], rounded to ema's dtype:
    density times step at the cells. cells: [P] int64, None for all in order.

    Returns: (ema' [cells] of ema's dtype, bits [ceil(cells / 8)] uint8, see `march_rays`).
    Raises: ValueError, TypeError, RuntimeError for unfitting arguments or an index outside.
    Source: Müller et al., arXiv 2201.05989, appendix C; thresholds of nerfacc 0.5.3.
    """
    if torch.compiler.is_compiling():
        return torch.ops.mvdream_fast.update_occupancy(ema, values, cells, decay, threshold)
    return as_constant("update_occupancy", _checked, ema, values, cells, decay, threshold)


def run_update(ema, values, cells, decay, threshold) -> tuple[torch.Tensor, torch.Tensor]:
    """`update_occupancy` of cells that are known to lie in the grid: nothing is read, so nothing waits for a GPU."""
    run = _update if ema.dtype == torch.float32 else update_occupancy_ref
    return run(ema, values, cells, decay, threshold)


def _checked(ema, values, cells, decay, threshold) -> tuple[torch.Tensor, torch.Tensor]:
    op = "update_occupancy"
    check_shaped(op, "ema", ema, (None,))
    if cells is not None:
        check_tensors(op, cells=cells)
    check_shaped(op, "values", values, (ema.shape[0],) if cells is None else tuple(cells.shape))
    check_same_device(op, ema=ema, values=values, cells=cells)
    check_probability(op, "decay", decay, "pass a fraction")
    number(op, "threshold", threshold, "pass a density times step")
    if cells is not None:
        require(cells.dtype == torch.int64, op, "cells", "int64", cells.dtype, "convert with .long()", TypeError)
        within = cells.numel() == 0 or (int(cells.min()) >= 0 and int(cells.max()) < ema.shape[0])
        require(within, op, "cells", f"in [0, {ema.shape[0]})", "an index outside", "pass flat cell indices")
    return run_update(ema, values, cells, decay, threshold)


@torch.no_grad()
def update_occupancy_ref(ema, values, cells=None, decay=0.95, threshold=0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    values = torch.where(values.isnan(), 0, values).to(ema.dtype)
    if cells is None:
        new = torch.maximum(ema * decay, values)
    else:
        decayed = ema.clone()
        decayed[cells] = ema[cells] * decay
        new = decayed.scatter_reduce(0, cells, values, "amax")
    seen = ema >= 0
    new = torch.where(seen, new, ema)
    total = torch.where(seen, new, 0).double().sum()
    limit = torch.clamp((total / seen.sum()).to(ema.dtype), max=threshold)
    return new, pack_bits(seen & (new > limit))


def _update(ema, values, cells, decay, threshold) -> tuple[torch.Tensor, torch.Tensor]:
    native = load_native("update_occupancy", ema)
    ema, values = plain32(ema), plain32(values)
    cells = cells if cells is None else cells.contiguous()
    new, bits = torch.empty_like(ema), ema.new_empty((ema.shape[0] + 7) // 8, dtype=torch.uint8)
    native.update_occupancy(
        *(ema.data_ptr(), ema.shape[0], values.data_ptr(), address(cells), values.shape[0], decay, threshold),
        *(new.data_ptr(), bits.data_ptr(), *([queue_of(ema)] if ema.is_cuda else [])),  # one thread on a CPU
    )
    return new, bits


def _fake(ema, *_):
    n = ema.shape[0]
    return ema.new_empty(n), ema.new_empty((n + 7) // 8, dtype=torch.uint8)


register(
    "update_occupancy(Tensor ema, Tensor values, Tensor? cells, float decay, float threshold) -> (Tensor, Tensor)",
    cpu=_checked,
    cuda=_checked,
    fake=_fake,
)
