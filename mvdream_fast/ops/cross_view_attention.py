"""Self-attention over the tokens of all views of a scene, with camera vectors added as the tiles are loaded.

Projections before and after it live in models/; attention to text is torch's own scaled_dot_product_attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.ops._edges import check_float, is_batched, vmap_error

OP = "cross_view_attention"
MAX_HEAD_DIM = 256


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
    (slices of one packed QKV projection are); other strides are read as they are by the CUDA kernel and copied on the
    CPU. Softmax and sums are float32 for every dtype; the gradient is deterministic on CUDA. float32 products are
    exact there unless `torch.backends.cuda.matmul.allow_tf32` is set. Under autocast everything is cast to its dtype.

    Args:
        q, k, v: [B*V, N, H, D], D from 1 to 256, any strides; float32, float16, bfloat16 (float64 on the CPU).
        n_views: V, must divide the batch.
        camera_q, camera_k, camera_v: [B*V, H, D] or None: added to every token of their view.
        cross_view: False attends within each view only (2D mode).
        scale: 1/sqrt(D) when None.

    Returns:
        [B*V, N, H, D]; zero-size inputs give a zero-size result.

    Raises:
        ValueError, TypeError: shapes, n_views, dtypes.
        RuntimeError: tensors on two devices, under vmap, or a CUDA tensor without Triton.

    Source: Shi et al. 2023, "MVDream", section 3.1 (inflated self-attention); Dao 2023, "FlashAttention-2".
    """
    _check(q, k, v, n_views, camera_q, camera_k, camera_v)
    if is_batched(q, k, v, camera_q, camera_k, camera_v):
        raise vmap_error(OP)
    views = n_views if cross_view else 1
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _cpu(q, k, v, views, camera_q, camera_k, camera_v, scale)


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
    scale = width**-0.5 if scale is None else scale
    if camera_q is not None:
        q = q + camera_q[:, None]
    if camera_k is not None:
        k = k + camera_k[:, None]
    if camera_v is not None:
        v = v + camera_v[:, None]
    scenes = (images // views, views * tokens, heads, width)
    q, k, v = (x.reshape(scenes).transpose(1, 2) for x in (q, k, v))  # [scenes, H, views * N, D]
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
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
) -> None:
    check_float(OP, "q", q)
    if q.ndim != 4:
        raise ValueError(f"{OP}: q must be [B*V, N, H, D], got {tuple(q.shape)}; split the heads first")
    images, _, heads, width = q.shape
    if not 1 <= width <= MAX_HEAD_DIM:
        raise ValueError(f"{OP}: q must have a head width of 1 to {MAX_HEAD_DIM}, got {width}; use more heads")
    if n_views < 1 or images % n_views:
        raise ValueError(f"{OP}: n_views must divide the batch of {images} images, got {n_views}; views are fastest")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(
                f"{OP}: {name} must be {tuple(q.shape)} as q, got {tuple(x.shape)}; tokens attend in pairs"
            )
        _check_like(name, x, q)
    for name, x in (("camera_q", camera_q), ("camera_k", camera_k), ("camera_v", camera_v)):
        if x is None:
            continue
        if x.shape != (images, heads, width):
            raise ValueError(
                f"{OP}: {name} must be [B*V, H, D] = {(images, heads, width)}, got {tuple(x.shape)}; one row per view"
            )
        _check_like(name, x, q)


def _check_like(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise RuntimeError(f"{OP}: {name} must be on the device of q, got {x.device} and {q.device}; move one")
    if x.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
        raise TypeError(f"{OP}: {name} must be {q.dtype} as q, got {x.dtype}; convert it first")


def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    views: int,
    camera_q: Tensor | None,
    camera_k: Tensor | None,
    camera_v: Tensor | None,
    scale: float,
) -> Tensor:
    """torch's scaled_dot_product_attention on regrouped views; views = 1 attends within a view."""
    shape = q.shape
    if camera_q is not None:
        q = q + camera_q[:, None]
    if camera_k is not None:
        k = k + camera_k[:, None]
    if camera_v is not None:
        v = v + camera_v[:, None]
    if q.numel() == 0:
        return q + k + v  # zero-size, and still a function of all three
    images, tokens, heads, width = shape
    scenes = (images // views, views * tokens, heads, width)
    out = F.scaled_dot_product_attention(
        q.reshape(scenes).transpose(1, 2),
        k.reshape(scenes).transpose(1, 2),
        v.reshape(scenes).transpose(1, 2),
        scale=scale,
    )
    return out.transpose(1, 2).reshape(shape)
