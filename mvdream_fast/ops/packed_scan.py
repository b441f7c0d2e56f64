"""Running sums and products along the rays of packed samples; what they are sums of is the caller's business."""

import torch

from mvdream_fast.ops._checks import address, check_float, check_same_device, load_native
from mvdream_fast.ops.composite import check_packing


def packed_scan(
    values: torch.Tensor, packed_info: torch.Tensor, product: bool = False, exclusive: bool = False
) -> torch.Tensor:
    """Running sum (or product) of values [S] along each ray, of the samples up to each one, or (exclusive) before it.

    Differentiable once on a CPU; the gradient of a product is right for factors of zero, too.
    packed_info: [R, 2] int64, start and count of each ray, ray after ray without gaps.

    Returns: [S]. Raises: ValueError, TypeError, RuntimeError for unfitting arguments.
    """
    check_float("packed_scan", "values", values, (None,))
    check_same_device("packed_scan", values=values, packed_info=packed_info)
    packed_info = check_packing("packed_scan", values.shape[0], None, packed_info, None)
    if values.is_cuda:
        return packed_scan_ref(values, packed_info, product, exclusive)
    return _PackedScan.apply(values, packed_info.contiguous(), product, exclusive)


def packed_scan_ref(values, packed_info, product=False, exclusive=False) -> torch.Tensor:
    """The same in plain torch, along the padded rows of the rays."""
    n_rays, n_samples = packed_info.shape[0], values.shape[0]
    if n_samples == 0:
        return values * 0
    starts, counts = packed_info.unbind(-1)
    rows = torch.repeat_interleave(torch.arange(n_rays, device=values.device), counts, output_size=n_samples)
    columns = torch.arange(n_samples, device=values.device) - starts[rows]
    # Column 0 is the neutral element, so that an exclusive scan is an inclusive one read one column earlier.
    padded = values.new_full((n_rays, int(counts.max()) + 1), float(product))
    padded = padded.index_put((rows, columns + 1), values)
    return (padded.cumprod(-1) if product else padded.cumsum(-1))[rows, columns + (not exclusive)]


class _PackedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, packed_info, product, exclusive):
        values, out = values.contiguous(), torch.empty(values.shape, dtype=values.dtype)
        ctx.product, ctx.exclusive = product, exclusive
        ctx.save_for_backward(values, packed_info)
        load_native("packed_scan").packed_scan(_args(values, packed_info, product, exclusive, False, out))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        (values, packed_info), native = ctx.saved_tensors, load_native("packed_scan")
        d_out, d_values = d_out.contiguous(), torch.empty_like(values)
        if ctx.product:
            args = _args(values, packed_info, True, ctx.exclusive, False, d_values)
            native.packed_product_backward(args, d_out.data_ptr())
        else:
            native.packed_scan(_args(d_out, packed_info, False, ctx.exclusive, True, d_values))
        return d_values, None, None, None


def _args(values, packed_info, product, exclusive, reverse, out):
    flags = (values.dtype == torch.float64, product, exclusive, reverse)
    native = load_native("packed_scan")
    return native.ScanArgs(
        *(address(values), address(packed_info), packed_info.shape[0], *flags, address(out)), torch.get_num_threads()
    )
