"""Multi-view attention for any UNet of diffusers: `unet.set_attn_processor(CrossViewAttnProcessor(n_views=4))`.

It imports no diffusers: a processor is a plain callable. Loading and converting weights live in checkpoints/.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvdream_fast.core.arguments import whole
from mvdream_fast.ops import cross_view_attention

# diffusers' layers over time, which give each pixel a row of the batch and each frame a token
TEMPORAL = {"AnimateDiffTransformer3D", "I2VGenXLTransformerTemporalEncoder", "TemporalBasicTransformerBlock",
            "TransformerTemporalModel"}  # fmt: skip
_OVER_TIME: "WeakKeyDictionary[object, bool]" = WeakKeyDictionary()
Layer = Callable[..., Tensor]


class Attention(Protocol):
    """diffusers' module of that name, as far as it is used here."""

    heads: int
    scale: float
    spatial_norm: Layer | None
    group_norm: Layer | None
    norm_q: Layer | None
    norm_k: Layer | None
    norm_cross: object
    norm_encoder_hidden_states: Layer
    prepare_attention_mask: Layer
    to_q: Layer
    to_k: Layer
    to_v: Layer
    to_out: Sequence[Layer]
    residual_connection: bool
    rescale_output_factor: float


class CrossViewAttnProcessor:
    """Lets every self-attention of a UNet attend over all views of a scene; attention to text stays within a view.

    Views are the fastest batch index: images 0 to V-1 belong to the first scene. With `n_views=1` it is diffusers' own
    attention. It has no weights, so a checkpoint fits with or without it. Set it last: `fuse_qkv_projections()` and
    `set_attention_slice()` afterwards replace it, without a word, by processors that see one view.

    diffusers' layers over time (UNet3DConditionModel, motion modules) stay as they are: their batch is pixels.
    """

    def __init__(self, n_views: int):
        self.n_views = whole("CrossViewAttnProcessor", "n_views", n_views, "1 is the 2D mode")

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """[B*V, N, C] or [B*V, C, h, w] -> the same; `attn` is diffusers' Attention, which owns the weights.

        Raises:
            ValueError: a mask on self-attention, a batch that n_views does not divide, or what this processor does not
                know: projections of added keys and values (unCLIP), text in parts (IP-Adapter).
        """
        if getattr(attn, "add_k_proj", None) is not None or isinstance(encoder_hidden_states, (tuple, list)):
            raise ValueError(
                "CrossViewAttnProcessor: attn must attend to itself or to one text, got added keys and values; "
                "keep diffusers' own processor for it"
            )
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            if attention_mask is not None:
                raise ValueError(
                    "CrossViewAttnProcessor: attention_mask must be None for self-attention, got a mask; "
                    "all tokens of all views attend to each other"
                )
            q, k, v = (_heads(attn, linear(hidden_states)) for linear in (attn.to_q, attn.to_k, attn.to_v))
            n_views = 1 if _is_over_time(attn) else self.n_views
            out = cross_view_attention(*_normed(attn, q, k), v, n_views, scale=attn.scale)
        else:
            out = _to_text(attn, hidden_states, encoder_hidden_states, attention_mask)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2)))
        if image_shape is not None:
            out = out.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


def _is_module(x: object) -> TypeGuard[nn.Module]:
    return issubclass(type(x), nn.Module)  # an object's own __class__ is not asked


@torch.compiler.assume_constant_result  # pyright: ignore[reportUnknownMemberType] # torch has no types for it
def _is_over_time(attn: object) -> bool:
    """Whether an attention layer is part of one of TEMPORAL.

    Nothing that a processor is given tells: neither shapes nor the layer, which doesn't know where it hangs. So the
    modules that are alive are looked through, once for all layers of a network.

    Raises: RuntimeError where that may miss some, as the collector doesn't list what it has frozen.
    """
    if attn not in _OVER_TIME:
        listed = [x for x in gc.get_objects() if _is_module(x)]
        networks = [m for m in listed if hasattr(type(m), "set_attn_processor")]
        known = {id(m): m for network in networks for m in network.modules()}
        if gc.get_freeze_count() and id(attn) not in known:
            raise RuntimeError(
                "CrossViewAttnProcessor: attn must be part of a network that gc lists, got one of before gc.freeze(); "
                "call the network once before that, or after gc.unfreeze()"
            )
        modules = [*listed, *known.values()]
        roots = [m for m in modules if TEMPORAL & {kind.__name__ for kind in type(m).__mro__}]
        inside = {id(layer) for root in roots for layer in root.modules()}
        ours = [m for m in known.values() if isinstance(vars(m).get("processor"), CrossViewAttnProcessor)]
        _OVER_TIME.update({layer: id(layer) in inside for layer in (*ours, attn)})
    return _OVER_TIME[attn]


def _to_text(attn: Attention, hidden_states: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
    """[B*V, N, H, D]: each image attends to its own row of text."""
    if attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    q, k, v = (_heads(attn, x) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)))
    q, k = _normed(attn, q, k)
    if mask is not None:
        padded = attn.prepare_attention_mask(mask, text.shape[1], text.shape[0])
        mask = padded.view(text.shape[0], attn.heads, -1, padded.shape[-1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale).transpose(1, 2)


def _heads(attn: Attention, x: Tensor) -> Tensor:
    """[B*V, N, H*D] -> [B*V, N, H, D]"""
    return x.reshape(x.shape[0], x.shape[1], attn.heads, x.shape[2] // attn.heads)


def _normed(attn: Attention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of queries and keys that some checkpoints have."""
    return q if attn.norm_q is None else attn.norm_q(q), k if attn.norm_k is None else attn.norm_k(k)
