"""CLIP's text transformer in plain torch, from a state dict in open_clip's names; explicit causal softmax."""

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


def _attention(state: State, name: str, x: Tensor, heads: int) -> Tensor:
    b, n, c = x.shape
    qkv = _linear(x, state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"])
    q, k, v = (y.reshape(b, n, heads, c // heads).transpose(1, 2) for y in qkv.split(c, dim=-1))
    scores = q @ k.transpose(-1, -2) / math.sqrt(c // heads)
    future = torch.arange(n)[None, :] > torch.arange(n)[:, None]
    weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    out = (weights @ v).transpose(1, 2).reshape(b, n, c)
    return _linear(out, state[f"{name}.out_proj.weight"], state[f"{name}.out_proj.bias"])


def _gelu(x: Tensor, quick: bool) -> Tensor:
    return x * torch.sigmoid(1.702 * x) if quick else 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def encode(state: State, ids: Tensor, heads: int, n_layers: int, quick_gelu: bool = False) -> Tensor:
    """[B, L] -> [B, L, C]: the first `n_layers` blocks, then ln_final."""
    x = state["token_embedding.weight"][ids] + state["positional_embedding"][: ids.shape[1]]
    for i in range(n_layers):
        block = f"transformer.resblocks.{i}"
        x = x + _attention(state, f"{block}.attn", _norm(state, f"{block}.ln_1", x), heads)
        h = _norm(state, f"{block}.ln_2", x)
        h = _gelu(_linear(h, state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"]), quick_gelu)
        x = x + _linear(h, state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])
    return _norm(state, "ln_final", x)
