"""LDM's KL autoencoder in plain torch, straight from a state dict in LDM's names; uses neither ours nor diffusers'."""

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def _conv(state: State, name: str, x: Tensor, **options) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def _norm(state: State, name: str, x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    grouped = x.reshape(b, groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled.reshape(b, c, h, w) * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _res(state: State, name: str, x: Tensor, groups: int) -> Tensor:
    h = _conv(state, f"{name}.conv1", _swish(_norm(state, f"{name}.norm1", x, groups)), padding=1)
    h = _conv(state, f"{name}.conv2", _swish(_norm(state, f"{name}.norm2", h, groups)), padding=1)
    shortcut = f"{name}.nin_shortcut"
    return h + (_conv(state, shortcut, x) if f"{shortcut}.weight" in state else x)


def _attention(state: State, name: str, x: Tensor, groups: int) -> Tensor:
    """One head over all channels; 1x1 convolutions as projections."""
    y = _norm(state, f"{name}.norm", x, groups)
    q, k, v = (_conv(state, f"{name}.{part}", y).flatten(2) for part in "qkv")  # [B, C, N]
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5, dim=-1)
    out = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    return x + _conv(state, f"{name}.proj_out", out)


def _middle(state: State, name: str, x: Tensor, groups: int) -> Tensor:
    x = _res(state, f"{name}.block_1", x, groups)
    return _res(state, f"{name}.block_2", _attention(state, f"{name}.attn_1", x, groups), groups)


def encode(state: State, images: Tensor, noise: Tensor, groups: int = 32, scale: float = 0.18215) -> Tensor:
    """Scaled latents of the posterior's sample."""
    x, level = _conv(state, "encoder.conv_in", images, padding=1), 0
    while f"encoder.down.{level}.block.0.conv1.weight" in state:
        block = 0
        while f"encoder.down.{level}.block.{block}.conv1.weight" in state:
            x = _res(state, f"encoder.down.{level}.block.{block}", x, groups)
            block += 1
        if f"encoder.down.{level}.downsample.conv.weight" in state:
            # One row and column of zeros at the right and at the bottom only.
            x = _conv(state, f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        level += 1
    x = _swish(_norm(state, "encoder.norm_out", _middle(state, "encoder.mid", x, groups), groups))
    mean, logvar = _conv(state, "quant_conv", _conv(state, "encoder.conv_out", x, padding=1)).chunk(2, 1)
    return scale * (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise)


def decode(state: State, latents: Tensor, groups: int = 32, scale: float = 0.18215) -> Tensor:
    x = _conv(state, "decoder.conv_in", _conv(state, "post_quant_conv", latents / scale), padding=1)
    x = _middle(state, "decoder.mid", x, groups)
    levels = {int(name.split(".")[2]) for name in state if name.startswith("decoder.up.")}
    for level in sorted(levels, reverse=True):
        block = 0
        while f"decoder.up.{level}.block.{block}.conv1.weight" in state:
            x = _res(state, f"decoder.up.{level}.block.{block}", x, groups)
            block += 1
        if f"decoder.up.{level}.upsample.conv.weight" in state:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = _conv(state, f"decoder.up.{level}.upsample.conv", x, padding=1)
    return _conv(state, "decoder.conv_out", _swish(_norm(state, "decoder.norm_out", x, groups)), padding=1)
