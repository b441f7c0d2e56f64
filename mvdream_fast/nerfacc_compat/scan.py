"""Running sums and products, along the last axis or along packed rays.

Packed inputs [S] come with packed_info [R, 2], or with the sorted ray of each value, `indices` [S]; else the scan goes
along the last axis of [..., n]. The result has the shape and dtype of the inputs; half precision is summed as float32.
"""

import torch
from torch import Tensor

from mvdream_fast.nerfacc_compat._inputs import check_tensor, packing, widened
from mvdream_fast.ops._edges import check_float, require
from mvdream_fast.ops.packed_scan import checked_scan


def inclusive_sum(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """Sum of the values of a ray up to each one."""
    return _scan("inclusive_sum", inputs, packed_info, indices, product=False, exclusive=False)


def exclusive_sum(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """Sum of the values of a ray before each one, 0 for the first."""
    return _scan("exclusive_sum", inputs, packed_info, indices, product=False, exclusive=True)


def inclusive_prod(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """Product of the values of a ray up to each one."""
    return _scan("inclusive_prod", inputs, packed_info, indices, product=True, exclusive=False)


def exclusive_prod(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """Product of the values of a ray before each one, 1 for the first."""
    return _scan("exclusive_prod", inputs, packed_info, indices, product=True, exclusive=True)


def _scan(op: str, inputs, packed_info, indices, product: bool, exclusive: bool) -> Tensor:
    one, batched = packed_info is None or indices is None, packed_info is None and indices is None
    require(one, op, "packed_info or indices", "given alone", "both", "leave one of them out")
    check_tensor(op, "inputs", inputs)
    if batched and not inputs.is_floating_point():
        return scan(inputs, None, product, exclusive)  # counts, say, which torch adds up as int64
    check_float(op, "inputs", inputs)
    packed_info = packing(op, "inputs", inputs, packed_info, indices, index_name="indices")
    return scan(widened(inputs), packed_info, product, exclusive).to(inputs.dtype)


def scan(values: Tensor, packed_info: Tensor | None, product: bool, exclusive: bool) -> Tensor:
    """The scan of checked values, no halves: of packed ones [S], or along the last axis without packed_info."""
    if packed_info is not None:
        return checked_scan(values, packed_info, product, exclusive)
    if exclusive:
        values = torch.cat([torch.full_like(values[..., :1], product), values[..., :-1]], -1)
    return values.cumprod(-1) if product else values.cumsum(-1)
