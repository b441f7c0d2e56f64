"""Running sums and products along the rays of packed samples; what they are sums of is not known here."""

import torch

from mvdream_fast.ops._edges import (
    BACKENDS,
    WIDE_FLOATS,
    address,
    check_same_device,
    check_shaped,
    is_batched,
    load_native,
    queue_of,
    runs_natively,
    vmap_error,
)
from mvdream_fast.ops._packing import check_packing, rows_of
from mvdream_fast.ops._registered import differentiable, register


def packed_scan(
    values: torch.Tensor, packed_info: torch.Tensor, product: bool = False, exclusive: bool = False
) -> torch.Tensor:
    """Running sum (or product) of values [S] along each ray, of the samples up to each one, or (exclusive) before it.

    Differentiable, twice through the plain-torch reference; the gradient of a product is right for factors of zero,
    too. packed_info: [R, 2] int64, start and count of each ray, ray after ray without gaps; on CUDA that is not looked
    at, which would cost a synchronisation: of another packing the values come as they come. float32 and float64 run
    natively; what torch.func looks on, or is a negative view, through the reference.

    Returns: [S]. Raises: ValueError, TypeError, RuntimeError for unfitting arguments.
    """
    if torch.compiler.is_compiling():
        return torch.ops.mvdream_fast.packed_scan(values, packed_info, product, exclusive)
    check_shaped("packed_scan", "values", values, (None,))
    check_same_device("packed_scan", values=values, packed_info=packed_info)
    if is_batched(values, packed_info):
        raise vmap_error("packed_scan")
    packed_info = check_packing("packed_scan", values.shape[0], None, packed_info, None, bounded=True)
    return checked_scan(values, packed_info, product, exclusive)


def checked_scan(values, packed_info, product=False, exclusive=False) -> torch.Tensor:
    """`packed_scan` of arguments that have been checked."""
    if torch.compiler.is_compiling():
        return torch.ops.mvdream_fast.packed_scan(values, packed_info, product, exclusive)
    if not runs_natively(values, devices=BACKENDS, dtypes=WIDE_FLOATS):
        return packed_scan_ref(values, packed_info, product, exclusive)
    return _PackedScan.apply(values, packed_info, product, exclusive)


def packed_scan_ref(values, packed_info, product=False, exclusive=False) -> torch.Tensor:
    """The same in plain torch, along the padded rows of the rays."""
    n_rays, n_samples = packed_info.shape[0], values.shape[0]
    if n_samples == 0:
        return values * 0
    starts, counts = packed_info.unbind(-1)
    rows = rows_of(packed_info, n_samples)
    columns = torch.arange(n_samples, device=values.device) - starts[rows]
    # Column 0 is the neutral element, so that an exclusive scan is an inclusive one read one column earlier.
    padded = values.new_full((n_rays, int(counts.max()) + 1), float(product))
    padded = padded.index_put((rows, columns + 1), values)
    return (padded.cumprod(-1) if product else padded.cumsum(-1))[rows, columns + (not exclusive)]


def _forward(values, packed_info, product, exclusive) -> torch.Tensor:
    values, packed_info, out = values.contiguous(), packed_info.contiguous(), torch.empty_like(values)
    load_native("packed_scan", values).packed_scan(_args(values, packed_info, product, exclusive, False, out))
    return out


def _backward(cotangents, kept, wanted, values, packed_info, product, exclusive) -> list[torch.Tensor]:
    native, values, d_out = load_native("packed_scan", values), values.contiguous(), cotangents[0].contiguous()
    packed_info, d_values = packed_info.contiguous(), torch.empty_like(values)
    if product:
        native.packed_product_backward(_args(values, packed_info, True, exclusive, False, d_values), d_out.data_ptr())
    else:
        native.packed_scan(_args(d_out, packed_info, False, exclusive, True, d_values))
    return [d_values]


def _checked(values, packed_info, product, exclusive) -> torch.Tensor:
    packed_info = check_packing("packed_scan", values.shape[0], None, packed_info, None, bounded=True)
    return _forward(values, packed_info, product, exclusive)


_PackedScan = differentiable(_forward, _backward, twice=packed_scan_ref)
_in_graphs = differentiable(_checked, _backward)
register(
    "packed_scan(Tensor values, Tensor packed_info, bool product, bool exclusive) -> Tensor",
    cpu=_in_graphs,
    cuda=_in_graphs,
    fake=lambda values, *_: values.new_empty(values.shape),
)


def _args(values, packed_info, product, exclusive, reverse, out):
    flags = (values.dtype == torch.float64, product, exclusive, reverse)
    sizes = packed_info.shape[0], values.shape[0]
    return load_native("packed_scan", values).ScanArgs(
        *(address(values), address(packed_info), *sizes, *flags, address(out), queue_of(values))
    )
