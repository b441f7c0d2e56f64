"""torch's own attention, in the form that is fastest where gradients are wanted on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.ops._edges import is_watched
from mvdream_fast.ops._registered import differentiable

# Scores that may be written out at a time: 128 MB in float32.
MOST_SCORES = 1 << 25


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v of [B, H, N, D] with keys and values [B, H, L, D]; scale 1/sqrt(D) when None.

    torch's blocked attention converts every block of bfloat16 to float32 and back on a CPU: forward and backward
    together take 2.5 to 4.5 times as long there as plain matrix products with the scores written out. Those are
    float32, as is the softmax; its result, and what the gradients' matrix products take, is bfloat16.
    """
    if not _by_products(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    # A graph and torch.func follow torch's own calls alone.
    scores_of = _scores if torch.compiler.is_compiling() or is_watched() else _Scores.apply
    scores = scores_of(q, k, q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.softmax(-1).to(v.dtype) @ v


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q k^T * scale in float32, which holds a product of two bfloat16 exactly; [..., N, L]."""
    with torch.autocast(q.device.type, enabled=False):
        return (q.float() * scale) @ k.float().transpose(-1, -2)


def _backward(cotangents, kept, wanted, q, k, scale) -> list[Tensor | None]:
    """With the scores' gradients rounded to bfloat16 once, as torch's attention rounds them: half as many bytes, and on
    CPUs that multiply bfloat16 half the time."""
    d_scores = cotangents[0].to(q.dtype)
    d_q = d_scores @ k * scale if wanted[0] else None
    return [d_q, d_scores.transpose(-1, -2) @ q * scale if wanted[1] else None]


_Scores = differentiable(_scores, _backward, twice=_scores)


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> bool:
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not recorded or q.device.type != "cpu" or not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return False
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= MOST_SCORES
