"""The building blocks of the multi-view UNet, with the parameter names of the released latent-diffusion checkpoints.

How they are wired together is in unet.py, how their layers are computed in functional.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvdream_fast.models import functional as fn
from mvdream_fast.models.config import UNetConfig
from mvdream_fast.models.functional import images, tokens
from mvdream_fast.models.plain import is_plain
from mvdream_fast.ops import cross_view_attention
from mvdream_fast.ops._torch_attention import torch_attention

KeysValues = tuple[Tensor, Tensor]
Vectors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Conditions:
    """What every block of one UNet call is told besides its input.

    B counts the prompts here. Before the first text attention, a batch may hold the rows of the first prompt alone: the
    others' are the same.

    context: [B, L, Dt] or [B*V, L, Dt]. camera: embedding [B*V, E], None without cameras. tokens: [B*V, 1, Dt], one
    more context token for each image, or None.
    """

    batch: int
    n_views: int
    context: Tensor
    camera: Tensor | None = None
    tokens: Tensor | None = None


class ResBlock(nn.Module):
    """norm - SiLU - conv - (+ embedding) - norm - SiLU - conv, added to the input; `emb_layers` is run by the UNet."""

    index: int  # among the UNet's, in the order of use

    def __init__(self, channels: int, emb_channels: int, out_channels: int, n_groups: int):
        super().__init__()
        self.out_channels = out_channels
        conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(n_groups, channels), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        conv = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.out_layers = nn.Sequential(nn.GroupNorm(n_groups, out_channels), nn.SiLU(), nn.Dropout(0.0), conv)
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B*V, C, h, w]; emb: [B*V or more, C_out], this block's projection. Returns [B*V, C_out, h, w]."""
        h = fn.conv3x3(self.in_layers[2], fn.group_norm(self.in_layers[0], x))
        h = fn.conv3x3(self.out_layers[3], fn.group_norm(self.out_layers[0], h, emb[: len(x)]))
        if is_plain(self.skip_connection, nn.Identity):
            return fn.add(h, x)
        return images(fn.add_linear(tokens(h), self.skip_connection, tokens(x), x), h)


class Attention(nn.Module):
    """Projections of one attention; over the views' own tokens, over the views at each pixel, or over text."""

    def __init__(self, width: int, context_width: int, heads: int, head_width: int):
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context_width, inner, bias=False)
        self.to_v = nn.Linear(context_width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(0.0))

    def self_attention(self, x: Tensor, n_views: int, cross_view: bool, camera: Vectors | None = None) -> Tensor:
        """x: [B*V, N, C]; camera: vectors [B*V, H, D] for q, k and v. Returns [B*V, N, H*D], before `to_out`."""
        q, k, v = (self.split(y) for y in fn.linears([self.to_q, self.to_k, self.to_v], x))
        camera_q, camera_k, camera_v = camera or (None, None, None)
        return cross_view_attention(
            q, k, v, n_views, camera_q=camera_q, camera_k=camera_k, camera_v=camera_v, cross_view=cross_view
        ).flatten(2)

    def view_attention(self, x: Tensor, n_views: int) -> Tensor:
        """Attention over the views, at each pixel alone. x: [B*V, N, C] -> [B*V, N, H*D], before `to_out`."""
        n_tokens = x.shape[1]
        x = x.unflatten(0, (-1, n_views)).transpose(1, 2).flatten(0, 1)  # [B*N, V, C]
        y = self.self_attention(x, 1, False)
        return y.unflatten(0, (-1, n_tokens)).transpose(1, 2).flatten(0, 1)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Of text: [B, L, Dt] -> two [B, L, H, D]."""
        return self.split(self.to_k(context)), self.split(self.to_v(context))

    def text_attention(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """x: [B*V, N, C]; keys and values of B scenes (then their views share them) or of B*V images."""
        k, v = (y.transpose(1, 2) for y in keys_values)
        q = self.split(self.to_q(x))
        folded = q.reshape(k.shape[0], -1, *q.shape[2:]).transpose(1, 2)  # [B, H, V*N, D]
        out = torch_attention(folded, k, v)
        return out.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)

    def split(self, x: Tensor) -> Tensor:
        """[n, N, H*D] -> [n, H, N, D]."""
        return x.unflatten(-1, (self.heads, -1))


class FeedForward(nn.Module):
    """GEGLU: one Linear to [value | gate], value * gelu(gate), one Linear back."""

    def __init__(self, width: int):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, 8 * width)
        self.net = nn.ModuleList([first, nn.Dropout(0.0), nn.Linear(4 * width, width)])


class TransformerBlock(nn.Module):
    """Self-attention over all views of a scene, text attention and feed-forward, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, head_width: int, config: UNetConfig):
        super().__init__()
        self.mixing = config.view_mixing
        self.attn1 = Attention(width, width, heads, head_width)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, config.context_dim, heads, head_width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        if config.view_mixing == "temporal":
            self.norm_views = nn.LayerNorm(width)
            self.attn_views = Attention(width, width, heads, head_width)
            zero(self.attn_views.to_out[0])
        if "attention" in config.camera_places:
            self.camera_vectors = zero(nn.Linear(config.time_embed_dim, 3 * heads * head_width))

    def forward(self, h: Tensor, conditions: Conditions, keys_values: KeysValues | None) -> Tensor:
        """h: [B*V, N, C] contiguous, overwritten without autograd. Returns [B*V, N, C], for all prompts."""
        cross_view, camera = self.mixing == "3d", self._camera_vectors(conditions, len(h))
        y = self.attn1.self_attention(self.norm1(h), conditions.n_views, cross_view, camera)
        h = fn.add_linear(h, self.attn1.to_out[0], y)
        if self.mixing == "temporal":
            y = self.attn_views.view_attention(self.norm_views(h), conditions.n_views)
            h = fn.add_linear(h, self.attn_views.to_out[0], y)
        h = fn.widen(h, conditions.batch)
        y = self.attn2.text_attention(self.norm2(h), self._text(conditions, keys_values))
        h = fn.add_linear(h, self.attn2.to_out[0], y)
        return fn.feed_forward(h, self.norm3, self.ff.net[0].get_submodule("proj"), self.ff.net[2])

    def _camera_vectors(self, conditions: Conditions, batch: int) -> Vectors | None:
        if conditions.camera is None or not hasattr(self, "camera_vectors"):
            return None
        q, k, v = self.camera_vectors(conditions.camera[:batch]).chunk(3, dim=-1)
        return self.attn1.split(q), self.attn1.split(k), self.attn1.split(v)

    def _text(self, conditions: Conditions, keys_values: KeysValues | None) -> KeysValues:
        """Keys and values of the text, and of each view's camera token behind them where there is one."""
        pair = self.attn2.keys_values(conditions.context) if keys_values is None else keys_values
        if conditions.tokens is None:
            return pair
        extra = self.attn2.keys_values(conditions.tokens)
        repeats = len(conditions.tokens) // len(pair[0])
        k, v = (torch.cat([y.repeat_interleave(repeats, 0), z], 1) for y, z in zip(pair, extra, strict=True))
        return k, v


class MultiViewTransformer(nn.Module):
    """GroupNorm, projection to tokens, one transformer block, projection back, added to the input."""

    index: int  # among the UNet's, in the order of use

    def __init__(self, channels: int, heads: int, head_width: int, config: UNetConfig):
        super().__init__()
        inner = heads * head_width
        project: Callable[[int, int], nn.Module]
        project = nn.Linear if config.use_linear_in_transformer else lambda i, o: nn.Conv2d(i, o, 1)
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = project(channels, inner)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, heads, head_width, config)])
        self.proj_out = zero(project(inner, channels))

    def forward(self, x: Tensor, conditions: Conditions, keys_values: KeysValues | None = None) -> Tensor:
        """x: [B*V, C, h, w] -> the same for all prompts; keys_values: those prepared for it, or None."""
        h = fn.linear(self.proj_in, tokens(fn.group_norm(self.norm, x, silu=False)), x)
        h = self.transformer_blocks[0](h, conditions, keys_values)
        return images(fn.add(fn.linear(self.proj_out, h, x), tokens(fn.widen(x, len(h)))), x)


class Downsample(nn.Module):
    """3x3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, h, w] -> [n, C', h/2, w/2]."""
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbour by 2, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, h, w] -> [n, C, 2h, 2w]."""
        return fn.upsample_conv(self.conv, x)


def zero(module: nn.Module) -> nn.Module:
    """Starts at zero, so that the branch it closes is the identity before training."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
