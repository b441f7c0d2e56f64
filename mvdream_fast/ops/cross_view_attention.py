"""Self-attention over the tokens of all views of a scene, with camera vectors added as the tokens are loaded.

Projections before and after it live in models/; attention to text is torch's own scaled_dot_product_attention.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mvdream_fast.ops._edges import (
    address,
    by_name,
    check_float,
    check_tensors,
    is_autocast,
    is_batched,
    is_followed,
    is_recorded,
    is_watched,
    load_native,
    run_kernels,
    runs_natively,
    thread_count,
    vmap_error,
)
from mvdream_fast.ops._registered import differentiable, register
from mvdream_fast.ops._torch_attention import torch_attention

OP = "cross_view_attention"
MAX_HEAD_DIM = 256
# Where torch's own attention was measured to be faster than our kernel, forward and with backward: compute capability
# and head width -> from how many tokens on (docs/gpu_measured.md; float16, taken to hold for bfloat16). Elsewhere ours
# was faster, or nothing but the launch was measured.
TORCH_FROM = {(90, 64): 16_384}
SHORTEST = min(TORCH_FROM.values())
# From how many tokens of a scene on our float32 kernel is what a CPU runs: there it was measured to be 1.1 to 2.6 times
# as fast as torch's attention (docs/benchmarks.md), for fewer 0.7 to 1.7 times.
NATIVE_FROM = 64


def cross_view_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_views: int,
    *,
    camera_q: Tensor | None = None,
    camera_k: Tensor | None = None,
    camera_v: Tensor | None = None,
    cross_view: bool = True,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v over all V*N tokens of a scene, or within each view.

    Views are the fastest batch index, so the regrouping of views is no copy when the batch stride is N token strides
    (slices of one packed QKV projection are); other strides are read as they are by our kernels, and copied where torch
    attends on a CPU: for all dtypes but float32, and few tokens (NATIVE_FROM). Softmax and sums are float32 for every
    dtype. Our CPU kernel gives the same bits for any number of threads; gradients are by torch there. They are
    deterministic on CUDA, but for what is left to torch's attention there (`_is_torchs`, never under
    torch.use_deterministic_algorithms). There, float32 GEMMs are exact unless `torch.backends.cuda.matmul.allow_tf32`
    is set. Under autocast everything is cast to its dtype (float64 stays). First derivatives only.

    Args:
        q, k, v: [B*V, N, H, D], D from 1 to 256, any strides; float32, float16, bfloat16 (float64 on the CPU).
        n_views: V, must divide the batch.
        camera_q, camera_k, camera_v: [B*V, H, D] or None: added to every token of their view.
        cross_view: False attends within each view only (2D mode).
        scale: not negative; 1/sqrt(D) when None.

    Returns:
        [B*V, N, H, D]; zero-size inputs give a zero-size result.

    Raises:
        ValueError, TypeError: shapes, n_views, dtypes.
        RuntimeError: tensors on two devices, under vmap, or a CUDA tensor without Triton.

    Source: Shi et al. 2023, "MVDream", section 3.1 (inflated self-attention); Dao 2023, "FlashAttention-2".
    """
    _check(q, k, v, n_views, camera_q, camera_k, camera_v, scale)
    views = n_views if cross_view else 1
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_autocast(q):
        q, k, v, camera_q, camera_k, camera_v = _autocast(q, k, v, camera_q, camera_k, camera_v)
    if by_name(q):
        return torch.ops.mvdream_fast.cross_view_attention(q, k, v, views, camera_q, camera_k, camera_v, scale)[0]
    if is_batched(q, k, v, camera_q, camera_k, camera_v):
        raise vmap_error(OP)
    if q.is_cuda and _is_torchs(q, k, v, views, camera_q, camera_k, camera_v):
        return _by_torch(q, k, v, views, None, None, None, scale)
    if q.is_cuda and is_followed(q, k, v, camera_q, camera_k, camera_v):
        return _CrossViewAttention.apply(q, k, v, views, camera_q, camera_k, camera_v, scale)
    if q.is_cuda:
        return _forward_kernels(q, k, v, views, camera_q, camera_k, camera_v, scale, keep=False)[0]
    if not _is_native(q, k, v, views, camera_q, camera_k, camera_v):
        return _by_torch(q, k, v, views, camera_q, camera_k, camera_v, scale)
    if is_recorded(q, k, v, camera_q, camera_k, camera_v):
        return _OnCpu.apply(q, k, v, views, camera_q, camera_k, camera_v, scale)
    return _forward_native(q, k, v, views, camera_q, camera_k, camera_v, scale, keep=False)[0]


def cross_view_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_views: int,
    *,
    camera_q: Tensor | None = None,
    camera_k: Tensor | None = None,
    camera_v: Tensor | None = None,
    cross_view: bool = True,
    scale: float | None = None,
) -> Tensor:
    """cross_view_attention in plain torch with the score matrix written out; any device, differentiable.

    Products run in the inputs' dtype, softmax at least in float32.
    """
    images, tokens, heads, width = q.shape
    views = n_views if cross_view else 1
    factor: float = width**-0.5 if scale is None else scale
    if camera_q is not None:
        q = q + camera_q[:, None]
    if camera_k is not None:
        k = k + camera_k[:, None]
    if camera_v is not None:
        v = v + camera_v[:, None]
    scenes = (images // views, views * tokens, heads, width)
    q, k, v = (x.reshape(scenes).transpose(1, 2) for x in (q, k, v))  # [scenes, H, views * N, D]
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * factor
    out = torch.softmax(scores, dim=-1).to(v.dtype) @ v
    return out.transpose(1, 2).reshape(images, tokens, heads, width)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_views: int,
    camera_q: Tensor | None,
    camera_k: Tensor | None,
    camera_v: Tensor | None,
    scale: float | None,
) -> None:
    """Raises what is wrong with the arguments; good ones pass by a few comparisons, as every microsecond counts."""
    check_float(OP, "q", q)
    if scale is not None and not scale >= 0:
        raise ValueError(f"{OP}: scale must be 0 or more, got {scale}; pass None for 1/sqrt(D)")
    shape = q.shape
    if len(shape) != 4:
        raise ValueError(f"{OP}: q must be [B*V, N, H, D], got {tuple(shape)}; split the heads first")
    images, _, heads, width = shape
    if not 1 <= width <= MAX_HEAD_DIM:
        raise ValueError(f"{OP}: q must have a head width of 1 to {MAX_HEAD_DIM}, got {width}; use more heads")
    if not isinstance(n_views, int) or n_views is True:
        raise TypeError(f"{OP}: n_views must be an int, got {n_views!r}; pass the number of views of a scene")
    if n_views < 1 or images % n_views:
        raise ValueError(
            f"{OP}: n_views must divide the batch of {images} images, got {n_views}; see the batch's order"
        )
    if not (isinstance(k, Tensor) and isinstance(v, Tensor)):
        check_tensors(OP, k=k, v=v)
    if not (k.shape == shape == v.shape and k.dtype == q.dtype == v.dtype and k.device == q.device == v.device):
        for name, x in (("k", k), ("v", v)):
            _check_like(name, x, q, shape, "it is q's, as tokens attend in pairs")
    if camera_q is camera_k is camera_v is None:
        return
    for name, x in (("camera_q", camera_q), ("camera_k", camera_k), ("camera_v", camera_v)):
        if x is not None:
            _check_like(name, x, q, (images, heads, width), "it is [B*V, H, D], one row per view")


def _check_like(name: str, x: Tensor, q: Tensor, shape: tuple[int, ...], why: str) -> None:
    check_tensors(OP, **{name: x})
    if x.shape != shape:
        raise ValueError(f"{OP}: {name} must be {tuple(shape)}, got {tuple(x.shape)}; {why}")
    if x.device != q.device:
        raise RuntimeError(f"{OP}: {name} must be on the device of q, got {x.device} and {q.device}; move one")
    if x.dtype != q.dtype and not is_autocast(q):
        raise TypeError(f"{OP}: {name} must be {q.dtype} as q, got {x.dtype}; convert it first")


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """As torch does for its own attention: float64 stays. Raises: TypeError where only some of them are."""
    given = [x for x in tensors if x is not None]
    dtype = torch.get_autocast_dtype(given[0].device.type)
    cast = [x if x.dtype == torch.float64 else x.to(dtype) for x in given]
    if len({x.dtype for x in cast}) > 1:
        dtypes = ", ".join(str(x.dtype) for x in cast)
        raise TypeError(f"{OP}: all tensors must be float64 under autocast where one is, got {dtypes}; convert them")
    rest = iter(cast)
    return tuple(x if x is None else next(rest) for x in tensors)


def _scenes(x: Tensor, shape: tuple[int, ...], camera: Tensor | None = None) -> Tensor:
    """[B*V, N, H, D] -> [B, H, V*N, D], the camera rows added; a view where strides allow. shape: [B, V*N, H, D]."""
    if camera is not None:
        x = x + camera[:, None]
    image, token, head, number = x.stride()
    if image != x.shape[1] * token or torch.is_grad_enabled() or is_watched():
        return x.reshape(shape).transpose(1, 2)
    scenes, tokens, heads, width = shape  # the same view by one call instead of two, 2 us less each
    return x.as_strided((scenes, heads, tokens, width), (tokens * token, head, token, number))


def _scene_shape(q: Tensor, views: int) -> tuple[int, ...]:
    images, tokens, heads, width = q.shape
    return images // views, views * tokens, heads, width


def _is_torchs(q, k, v, views, camera_q, camera_k, camera_v) -> bool:
    """Whether a call on CUDA is torch's: where TORCH_FROM says so, without camera vectors, views regrouped without a
    copy, and nobody asked for deterministic gradients. All others are our kernel's."""
    _, tokens, _, width = q.shape
    if views * tokens < SHORTEST or not camera_q is camera_k is camera_v is None:
        return False
    if views * tokens < TORCH_FROM.get((_capability(q.device), width), math.inf):
        return False
    if q.dtype not in (torch.float16, torch.bfloat16) or torch.are_deterministic_algorithms_enabled():
        return False
    strides = (q.stride(), k.stride(), v.stride())
    return all(s[3] == 1 and (views == 1 or s[0] == tokens * s[1]) for s in strides)


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _by_torch(q, k, v, views, camera_q, camera_k, camera_v, scale) -> Tensor:
    """torch's attention on regrouped views, under torch's own autograd; views = 1 attends within a view."""
    shape, scenes = q.shape, _scene_shape(q, views)
    q, k, v = _scenes(q, scenes, camera_q), _scenes(k, scenes, camera_k), _scenes(v, scenes, camera_v)
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:  # else torch would write the score matrix out
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    if q.numel() == 0:
        return (q + k + v).reshape(shape)  # zero-size, and still a function of all of them
    return torch_attention(q, k, v, scale).transpose(1, 2).reshape(shape)


def _is_native(q: Tensor, k: Tensor, v: Tensor, views: int, *cameras: Tensor | None) -> bool:
    return views * q.shape[1] >= NATIVE_FROM and q.numel() > 0 and runs_natively(q, k, v, *cameras)


def _forward_native(
    q, k, v, views, camera_q, camera_k, camera_v, scale, keep: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The output, and the log-sum-exp [1, B, H, V*N] unless nothing is to be kept for a backward."""
    images, _, heads, width = q.shape
    cameras = [c if c is None else c.contiguous() for c in (camera_q, camera_k, camera_v)]
    rows = [_native_tokens(x, views, c) for x, c in zip((q, k, v), cameras)]
    out, lse = q.new_empty(q.shape), _empty_lse(q, views) if keep else None
    sizes, results = (images // views, heads, width, scale), (address(out), address(lse))
    load_native(OP).attention_forward(*rows, *sizes, *results, thread_count())
    return out, lse


def _native_tokens(x: Tensor, views: int, camera: Tensor | None) -> object:
    return load_native(OP).Tokens(address(x), *x.stride(), views, x.shape[1], address(camera))


def _forward_cpu(q, k, v, views, camera_q, camera_k, camera_v, scale) -> tuple[Tensor, Tensor | None]:
    """The output, and the log-sum-exp [1, B, H, V*N] that the backward needs."""
    images, tokens, heads, _ = q.shape
    if q.numel() == 0:
        return q.new_empty(q.shape), _empty_lse(q, views)
    if _is_native(q, k, v, views, camera_q, camera_k, camera_v):
        return _forward_native(q, k, v, views, camera_q, camera_k, camera_v, scale)
    scenes = _scene_shape(q, views)
    rows = [_unit_stride(_scenes(x, scenes, c)) for x, c in ((q, camera_q), (k, camera_k), (v, camera_v))]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, scale=scale)
    return out.transpose(1, 2).reshape(q.shape), lse.reshape(1, images // views, heads, views * tokens).contiguous()


def _backward_cpu(cotangents, kept, wanted, q, k, v, views, *cameras_and_scale):
    *cameras, scale = cameras_and_scale
    if q.numel() == 0:
        d_cameras = (None if c is None else torch.zeros_like(c) for c in cameras)
        return *(q.new_empty(q.shape) for _ in range(3)), None, *d_cameras
    scenes, (out, lse) = _scene_shape(q, views), kept
    rows = [_unit_stride(_scenes(x, scenes, c)) for x, c in zip((q, k, v), cameras)]
    d_out, out = _unit_stride(_scenes(cotangents[0], scenes)), _scenes(out, scenes)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, *rows, out, lse[0], 0.0, False, scale=scale
    )
    grads = [g.transpose(1, 2).reshape(q.shape).contiguous() for g in grads]
    return *grads, None, *(None if c is None else g.sum(1) for c, g in zip(cameras, grads))


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_lse(q: Tensor, views: int) -> Tensor:
    images, tokens, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    parts = 2 if q.is_cuda else 1  # the kernels keep its largest score apart from the rest
    return q.new_empty((parts, images // views, heads, views * tokens), dtype=wide)


def _allow_tf32(q: Tensor) -> bool:
    return q.dtype == torch.float32 and bool(torch.backends.cuda.matmul.allow_tf32)


def _forward_kernels(q, *arguments, keep: bool = True) -> tuple[Tensor, Tensor | None]:
    return run_kernels(OP, "q", q, "forward", q, *arguments, _allow_tf32(q), None, keep)


def _backward_kernels(cotangents, kept, wanted, q, k, v, *arguments):
    grads = run_kernels(OP, "q", q, "backward", *cotangents, q, k, v, *kept, *arguments, _allow_tf32(q))
    return *grads[:3], None, *grads[3:]


_CrossViewAttention = differentiable(_forward_kernels, _backward_kernels, keeps=(0, 1))
_OnCpu = differentiable(_forward_cpu, _backward_cpu, keeps=(0, 1))
register(
    "cross_view_attention(Tensor q, Tensor k, Tensor v, SymInt views, Tensor? camera_q, Tensor? camera_k,"
    " Tensor? camera_v, float scale) -> (Tensor, Tensor)",
    cpu=_OnCpu,
    cuda=_CrossViewAttention,
    fake=lambda q, k, v, views, *_: (q.new_empty(q.shape), _empty_lse(q, views)),
)
