"""The multi-view UNet in plain PyTorch, written for reading: the oracle of models.unet, sharing none of its code.

Scores and softmax are explicit and in float32, views are regrouped with einops, every layer runs by itself.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn


class ReferenceUNet(nn.Module):
    """`forward(latents [B*V, C, h, w], t [B*V], context [B*V, L, Dt], camera [B*V, 16] or None, n_views)`."""

    def __init__(self, config):
        super().__init__()
        self.config, c, mc = config, config, config.model_channels
        emb = 4 * mc
        self.time_embed = nn.Sequential(nn.Linear(mc, emb), nn.SiLU(), nn.Linear(emb, emb))
        if c.camera_in != "none":
            self.camera_embed = nn.Sequential(nn.Linear(c.camera_dim, emb), nn.SiLU(), nn.Linear(emb, emb))
        if c.camera_in == "text":
            self.camera_token = nn.Linear(emb, c.context_dim)

        widths = [mc * m for m in c.channel_mult]
        attends = [2**level in c.attention_resolutions for level in range(len(widths))]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(c.in_channels, mc, 3, padding=1))])
        outputs = [mc]
        for level, width in enumerate(widths):
            for _ in range(c.num_res_blocks):
                extra = [Transformer(c, width)] if attends[level] else []
                self.input_blocks.append(Stage(Res(c, outputs[-1], width), *extra))
                outputs.append(width)
            if level + 1 < len(widths):
                self.input_blocks.append(Stage(Down(width)))
                outputs.append(width)
        top = widths[-1]
        self.middle_block = Stage(Res(c, top, top), Transformer(c, top), Res(c, top, top))
        self.output_blocks = nn.ModuleList()
        previous = top
        for level in range(len(widths) - 1, -1, -1):
            for i in range(c.num_res_blocks + 1):
                extra = [Transformer(c, widths[level])] if attends[level] else []
                extra += [Up(widths[level])] if level > 0 and i == c.num_res_blocks else []
                self.output_blocks.append(Stage(Res(c, previous + outputs.pop(), widths[level]), *extra))
                previous = widths[level]
        norm = nn.GroupNorm(c.norm_groups, widths[0])
        self.out = nn.Sequential(norm, nn.SiLU(), nn.Conv2d(widths[0], c.out_channels, 3, padding=1))

    def forward(self, latents, t, context, camera=None, n_views=1):
        half = self.config.model_channels // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
        angles = t[:, None] * frequencies[None]
        emb = self.time_embed(torch.cat([torch.cos(angles), torch.sin(angles)], dim=1))
        cam = None
        if camera is not None and self.config.camera_in != "none":
            cam = self.camera_embed(camera)
            if "time" in self.config.camera_in:
                emb = emb + cam
            elif self.config.camera_in == "text":
                context = torch.cat([context, self.camera_token(cam)[:, None]], dim=1)
        skips, x = [], latents
        for stage in self.input_blocks:
            x = stage(x, emb, context, cam, n_views)
            skips.append(x)
        x = self.middle_block(x, emb, context, cam, n_views)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb, context, cam, n_views)
        return self.out(x)


class Stage(nn.Sequential):
    def forward(self, x, emb, context, cam, n_views):
        for layer in self:
            if isinstance(layer, Res):
                x = layer(x, emb)
            elif isinstance(layer, Transformer):
                x = layer(x, context, cam, n_views)
            else:
                x = layer(x)
        return x


class Res(nn.Module):
    def __init__(self, c, width, out):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(c.norm_groups, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * c.model_channels, out))
        norm, conv = nn.GroupNorm(c.norm_groups, out), nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(norm, nn.SiLU(), nn.Identity(), conv)
        self.skip_connection = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(repeat(x, "b c h w -> b c (h i) (w j)", i=2, j=2))


class Transformer(nn.Module):
    def __init__(self, c, width):
        super().__init__()
        heads = c.num_heads if c.num_heads else width // c.num_head_channels
        self.norm = nn.GroupNorm(c.norm_groups, width, eps=1e-6)
        self.conv_projections = not c.use_linear_in_transformer
        projection = (
            (lambda: nn.Conv2d(width, width, 1)) if self.conv_projections else (lambda: nn.Linear(width, width))
        )
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList([Block(c, width, heads)])
        self.proj_out = projection()

    def forward(self, x, context, cam, n_views):
        h = self.norm(x)
        if self.conv_projections:
            h = rearrange(self.proj_in(h), "b c h w -> b (h w) c")
        else:
            h = self.proj_in(rearrange(h, "b c h w -> b (h w) c"))
        h = self.transformer_blocks[0](h, context, cam, n_views)
        if self.conv_projections:
            return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))
        return x + rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=x.shape[2])


class Block(nn.Module):
    def __init__(self, c, width, heads):
        super().__init__()
        self.mixing = c.view_mixing
        self.attn1, self.attn2 = Attention(width, width, heads), Attention(width, c.context_dim, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.ff = nn.Module()
        gate = nn.Module()
        gate.proj = nn.Linear(width, 8 * width)
        self.ff.net = nn.ModuleList([gate, nn.Identity(), nn.Linear(4 * width, width)])
        if c.view_mixing == "temporal":
            self.norm_views, self.attn_views = nn.LayerNorm(width), Attention(width, width, heads)
        if "attention" in c.camera_in:
            self.camera_vectors = nn.Linear(4 * c.model_channels, 3 * width)

    def forward(self, x, context, cam, n_views):
        y = self.norm1(x)
        vectors = None
        if hasattr(self, "camera_vectors") and cam is not None:
            vectors = repeat(self.camera_vectors(cam), "b c -> b n c", n=x.shape[1])
        if self.mixing == "3d":
            y = rearrange(y, "(b v) n c -> b (v n) c", v=n_views)
            if vectors is not None:
                vectors = rearrange(vectors, "(b v) n c -> b (v n) c", v=n_views)
            x = x + rearrange(self.attn1(y, y, vectors), "b (v n) c -> (b v) n c", v=n_views)
        else:
            x = x + self.attn1(y, y, vectors)
        if self.mixing == "temporal":
            y = rearrange(self.norm_views(x), "(b v) n c -> (b n) v c", v=n_views)
            x = x + rearrange(self.attn_views(y, y), "(b n) v c -> (b v) n c", n=x.shape[1])
        x = x + self.attn2(self.norm2(x), context)
        value, gate = self.ff.net[0].proj(self.norm3(x)).chunk(2, dim=-1)
        return x + self.ff.net[2](value * F.gelu(gate))


class Attention(nn.Module):
    def __init__(self, width, context_width, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Identity())

    def forward(self, x, context, vectors=None):
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        if vectors is not None:
            q, k, v = (y + z for y, z in zip((q, k, v), vectors.chunk(3, dim=-1), strict=True))
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (q, k, v))
        scores = torch.einsum("bhid,bhjd->bhij", q.float(), k.float()) / math.sqrt(q.shape[-1])
        y = torch.einsum("bhij,bhjd->bhid", torch.softmax(scores, dim=-1).to(v.dtype), v)
        return self.to_out(rearrange(y, "b h n d -> b n (h d)"))
