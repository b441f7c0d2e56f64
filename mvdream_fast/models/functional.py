"""Layers of the UNet as functions of its modules: plain torch under autograd, without it a leaner way to do the same.

A module that is not plain (plain.py), as a LoRA wrapper, or a layer with a hook or a forward of its own, is called as
it is. No weights live here: packed weights are the parameters' own storage, so they cannot go stale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvdream_fast.models.plain import hooked_everywhere, is_plain, is_untouched
from mvdream_fast.ops import geglu, group_norm_silu, winograd_conv3x3, winograd_pays

# Hidden rows of a feed-forward that are alive at a time. The next stage then finds them in the cache, and the
# allocation stays under glibc's largest mmap threshold (32 MB), above which every call pays for fresh pages.
_FEED_FORWARD_ROWS = 1024
# From this many weights on, a convolution whose rows are fewer than its output channels is faster as a matrix product:
# oneDNN would copy the weights into its own layout on every call.
_GEMM_WEIGHTS = 2_000_000


def lean(x: Tensor) -> bool:
    """Whether nothing records or rewrites the calls on x: in-place updates and shared weight storage are then safe."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not recorded and not torch.is_autocast_enabled(x.device.type) and type(x) is Tensor


def group_norm(norm: nn.Module, x: Tensor, emb: Tensor | None = None, silu: bool = True) -> Tensor:
    """silu(norm(x + emb)) of a GroupNorm, [B*V, C, h, w] with emb [B*V, C]; statistics in float32."""
    if not isinstance(norm, nn.GroupNorm):
        raise TypeError(f"group_norm: norm must be a GroupNorm, got {type(norm).__name__}; leave norms unwrapped")
    if is_untouched(norm) and not hooked_everywhere():
        return fused_group_norm(norm, x, emb, silu)
    y = norm(x if emb is None else x + emb[:, :, None, None])
    return F.silu(y) if silu else y


def fused_group_norm(norm: nn.GroupNorm, x: Tensor, emb: Tensor | None = None, silu: bool = True) -> Tensor:
    """`group_norm` by the norm's weights, whatever is on it: for those whose own forward it is."""
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, emb, silu)


def linear(module: nn.Module, x: Tensor, like: Tensor | None = None) -> Tensor:
    """A Linear, or a 1x1 convolution applied to tokens: [..., C] -> [..., C_out].

    like: [B*V, ?, h, w], the image whose pixels the tokens are, for a convolution that has to be called.
    """
    if is_plain(module, nn.Conv2d):
        return F.linear(x, module.weight.flatten(1), module.bias)
    if type(module) is nn.Linear or like is None or not _convolves(module):
        return _called(module, x)
    return tokens(_called(module, images(x, like)))


def add_linear(h: Tensor, module: nn.Module, x: Tensor, like: Tensor | None = None) -> Tensor:
    """h + module(x); without autograd h [..., C_out] is overwritten, so it must be the caller's own and contiguous.

    like: as of `linear`.
    """
    if not (lean(x) and (is_plain(module, nn.Linear) or is_plain(module, nn.Conv2d))):
        return h + linear(module, x, like)
    rows = h.view(-1, h.shape[-1])
    if module.bias is not None:
        rows.add_(module.bias)
    rows.addmm_(x.reshape(-1, x.shape[-1]), module.weight.flatten(1).t())
    return h


def add(h: Tensor, x: Tensor) -> Tensor:
    """h + x; without autograd h is overwritten."""
    return h.add_(x) if lean(x) else h + x


def widen(x: Tensor, batch: int) -> Tensor:
    """x repeated along dim 0 until it has `batch` rows; itself where it has them already."""
    return x if len(x) == batch else torch.cat([x] * (batch // len(x)))


def tokens(x: Tensor) -> Tensor:
    """[B*V, C, h, w] -> [B*V, h*w, C], a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def images(x: Tensor, like: Tensor) -> Tensor:
    """[B*V, h*w, C] -> [B*V, C, h, w] with the height and width of `like`, a channels-last view."""
    return x.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def packed(tensors: list[Tensor]) -> Tensor:
    """Tensors of equal width joined along dim 0, as a view of their common storage when nothing is recorded.

    On first use without autograd the parameters move into one allocation (same names, same values); a later load,
    optimiser step or swap of weights is seen, as the view reads the parameters themselves.
    """
    plain = all(type(t) in (nn.Parameter, Tensor) and t.device.type != "meta" for t in tensors)
    if not plain or not lean(tensors[0].detach()):
        return torch.cat(tensors)
    ends = [t.data_ptr() + t.nbytes for t in tensors]
    adjacent = all(t.data_ptr() == end for t, end in zip(tensors[1:], ends[:-1], strict=True))
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    if not (adjacent and len(storages) == 1 and all(t.is_contiguous() for t in tensors)):
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be trained afterwards
            joined = torch.cat([t.detach() for t in tensors])
        for t, part in zip(tensors, joined.split([len(t) for t in tensors]), strict=True):
            t.data = part
    first = tensors[0].detach()
    return first.as_strided((sum(len(t) for t in tensors), *first.shape[1:]), first.stride())


def linears(modules: list[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """Several Linears of one input as one GEMM: [..., C] -> one [..., C_i] for each, views of one tensor."""
    plain = [m for m in modules if is_plain(m, nn.Linear)]
    if len(plain) < len(modules):
        return tuple(m(x) for m in modules)
    bias = None if plain[0].bias is None else packed([m.bias for m in plain])
    joined = F.linear(x, packed([m.weight for m in plain]), bias)
    return joined.split([m.out_features for m in plain], dim=-1)


def conv3x3(module: nn.Module, x: Tensor) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1: [B*V, C, h, w] -> [B*V, C_out, h, w], channels last."""
    if not is_plain(module, nn.Conv2d, 3):
        return _called(module, x)
    if _by_winograd(module, x):
        return winograd_conv3x3(x, module.weight, module.bias)
    if not _by_gemm(module, x):
        return module(x)
    n_rows = x.shape[0] * x.shape[2] * x.shape[3]
    if module.weight.numel() < _GEMM_WEIGHTS or n_rows >= module.weight.shape[0]:
        return module(x)
    return _gemm_conv(F.pad(_nhwc(x), (0, 0, 1, 1, 1, 1)), _nhwc(module.weight), module.bias).permute(0, 3, 1, 2)


def upsample_conv(module: nn.Module, x: Tensor) -> Tensor:
    """Nearest up-sampling by 2, then a 3x3 convolution: [B*V, C, h, w] -> [B*V, C_out, 2h, 2w], channels last.

    Where Winograd's algorithm does not pay: each of the four sub-pixels sees only 2x2 different inputs, so four 2x2
    convolutions with summed weights do the work with 4/9 of the arithmetic. The sums cost what few rows do not repay.
    """
    wide = F.interpolate(x, scale_factor=2.0, mode="nearest")
    n_rows = x.shape[0] * x.shape[2] * x.shape[3]
    if not is_plain(module, nn.Conv2d, 3) or not _by_gemm(module, x):
        return conv3x3(module, wide)
    if 4 * n_rows < module.out_channels or _by_winograd(module, wide):
        return conv3x3(module, wide)
    batch, _, height, width = x.shape
    padded, weight = F.pad(_nhwc(x), (0, 0, 1, 1, 1, 1)), _nhwc(module.weight)
    out = x.new_empty(batch, height, 2, width, 2, weight.shape[0])
    for i in range(2):
        rows = _pair_sums(weight, i, 1)
        for j in range(2):
            window = padded[:, i : i + height + 1, j : j + width + 1]
            out[:, :, i, :, j] = _gemm_conv(window, _pair_sums(rows, j, 2), module.bias)
    return out.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def feed_forward(h: Tensor, norm: nn.Module, proj: nn.Module, out: nn.Module) -> Tensor:
    """h + out(geglu(proj(norm(h)))) on [B*V, N, C]; on a CPU without autograd a block of rows at a time, into h."""
    by_rows = lean(h) and h.device.type == "cpu"  # a GPU has no cache to stay in, and every block is five launches
    # What is not plain need not take a row like any other, and is called once.
    if not (by_rows and is_plain(norm, nn.LayerNorm) and is_plain(proj, nn.Linear) and is_plain(out, nn.Linear)):
        return h + out(geglu(proj(norm(h))))
    for rows in h.view(-1, h.shape[-1]).split(_FEED_FORWARD_ROWS):
        rows.copy_(add_linear(rows, out, geglu(proj(norm(rows)))))  # nothing to copy where it wrote in place
    return h


def _called(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), the caller's own to overwrite: a hook or a wrapper may have kept what it returns."""
    y = module(x)
    if not lean(x) or is_plain(module, nn.Linear):
        return y
    return y.clone(memory_format=torch.channels_last if y.ndim == 4 else torch.contiguous_format)


def _convolves(module: nn.Module) -> bool:
    """Whether it takes images: a convolution, or a wrapper that shows the weight of one."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 4


def _by_gemm(module: nn.Conv2d, x: Tensor) -> bool:
    return lean(x) and x.device.type == "cpu" and x.dtype == torch.float32


def _by_winograd(module: nn.Conv2d, x: Tensor) -> bool:
    """Recorded by autograd or not; under autocast the dtypes differ, and in a compiled graph the op is not known."""
    if torch.compiler.is_compiling() or not winograd_pays(x, module.weight, module.bias):
        return False
    return not torch.is_autocast_enabled("cpu")


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _pair_sums(weight: Tensor, phase: int, dim: int) -> Tensor:
    """Three taps along `dim` as the two that one sub-pixel sees: a, b + c for the first and a + b, c for the second."""
    a, b, c = weight.unbind(dim)
    return torch.stack((a, b + c) if phase == 0 else (a + b, c), dim)


def _gemm_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution without padding, as one GEMM over gathered windows. x: [B, h', w', C], weight: [O, k, k, C]."""
    n_out, size, _, channels = weight.shape
    batch, height, width = x.shape[0], x.shape[1] - size + 1, x.shape[2] - size + 1
    s_batch, s_row, s_column, _ = x.stride()
    shape, strides = (batch, height, width, size, size, channels), (s_batch, s_row, s_column, s_row, s_column, 1)
    columns = x.as_strided(shape, strides, x.storage_offset()).reshape(batch * height * width, size * size * channels)
    weight = weight.view(n_out, -1).t()
    out = columns @ weight if bias is None else torch.addmm(bias, columns, weight)
    return out.view(batch, height, width, n_out)
