"""torch's own attention, in the form that is fastest where gradients are wanted on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores that may be written out at a time: 64 MB in bfloat16.
MOST_SCORES = 1 << 25


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v of [B, H, N, D] with keys and values [B, H, L, D]; scale 1/sqrt(D) when None.

    torch's blocked attention converts every block of bfloat16 to float32 and back on a CPU: forward and backward
    together take 2.5 to 4.5 times as long there as plain matrix products with the scores written out.
    """
    if not _by_products(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> bool:
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not recorded or q.device.type != "cpu" or not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return False
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= MOST_SCORES
