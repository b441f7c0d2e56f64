"""diffusers' UNet2DConditionModel with the numbers of an LDM-named UNet, and the processor that regroups its views.

The second oracle of the multi-view UNet, and the yardstick of its benchmark. Takes a UNetConfig for the topology.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

_RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}


def diffusers_unet(config, latent_size: int = 32) -> UNet2DConditionModel:
    """The same topology, randomly initialised; diffusers' `attention_head_dim` is a number of heads, one per level."""
    widths = [config.model_channels * m for m in config.channel_mult]
    attends = [2**level in config.attention_resolutions for level in range(len(widths))]
    heads = [config.num_heads or width // config.num_head_channels for width in widths]
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        attention_head_dim=heads,
        cross_attention_dim=config.context_dim,
        use_linear_projection=config.use_linear_in_transformer,
        norm_num_groups=config.norm_groups,
        time_embedding_dim=4 * config.model_channels,
    )
    if widths[0] != config.model_channels:
        _narrow_stem(unet, config, widths[0])
    return unet


def _narrow_stem(unet: UNet2DConditionModel, config, width: int) -> None:
    """The first layer as wide as `model_channels`: diffusers knows only stems of the first level's width."""
    stem, emb = config.model_channels, 4 * config.model_channels
    unet.conv_in = nn.Conv2d(config.in_channels, stem, 3, padding=1)
    unet.time_proj.num_channels = stem
    unet.time_embedding.linear_1 = nn.Linear(stem, emb)
    for block, i, channels in ((unet.down_blocks[0], 0, stem), (unet.up_blocks[-1], -1, width + stem)):
        block.resnets[i] = ResnetBlock2D(
            in_channels=channels, out_channels=width, temb_channels=emb, groups=config.norm_groups, eps=1e-5
        )


def to_diffusers(names, config) -> dict[str, str]:
    """LDM name -> diffusers name of every parameter but the camera's, which diffusers does not have."""
    stages = _stage_names(config)
    return {name: _translate(name, stages) for name in names if not name.startswith("camera_")}


def load_ldm(unet: UNet2DConditionModel, state: dict[str, torch.Tensor], config) -> None:
    """Copies an LDM-named state into diffusers' UNet; every parameter of it must be there."""
    names = to_diffusers(state, config)
    unet.load_state_dict({new: state[old] for old, new in names.items()}, strict=True)


def _stage_names(config) -> dict[str, str]:
    """Prefixes of the layers of both arms, LDM to diffusers."""
    stages, levels, n = {}, len(config.channel_mult), 0
    for level in range(levels):
        for i in range(config.num_res_blocks):
            n += 1
            stages[f"input_blocks.{n}.0"] = f"down_blocks.{level}.resnets.{i}"
            stages[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{i}"
        if level + 1 < levels:
            n += 1
            stages[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    n = -1
    for level in range(levels):
        for i in range(config.num_res_blocks + 1):
            n += 1
            stages[f"output_blocks.{n}.0"] = f"up_blocks.{level}.resnets.{i}"
            stages[f"output_blocks.{n}.1"] = f"up_blocks.{level}.attentions.{i}"
        for position in (1, 2):
            stages[f"output_blocks.{n}.{position}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return stages


def _translate(name: str, stages: dict[str, str]) -> str:
    prefixes = {**stages, **_ENDS}
    prefix = max((p for p in prefixes if name.startswith(p + ".")), key=len)
    rest = name[len(prefix) + 1 :]
    for old, new in _RES.items():
        if rest.startswith(old + "."):
            rest = new + rest[len(old) :]
    return f"{prefixes[prefix]}.{rest}"


class RegroupProcessor:
    """Self-attention over the tokens of all views of a scene, text attention as ever; views fastest in the batch."""

    def __init__(self, n_views: int):
        self.n_views = n_views

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, *args, **kwargs
    ):
        x = hidden_states
        batch, tokens, channels = x.shape
        if encoder_hidden_states is None:
            x = x.reshape(batch // self.n_views, self.n_views * tokens, channels)
            context = x
        else:
            context = encoder_hidden_states
        q, k, v = (f(y).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                   for f, y in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context)))  # fmt: skip
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, channels)
        return attn.to_out[1](attn.to_out[0](out))


def add_camera(unet: UNet2DConditionModel, embedding: torch.Tensor | None) -> None:
    """Adds `embedding` [B*V, E] to the time embedding of every later call, as the multi-view model does; or None."""
    hook = getattr(unet, "_camera_hook", None)
    if hook is not None:
        hook.remove()
    unet._camera_hook = None
    if embedding is not None:
        unet._camera_hook = unet.time_embedding.register_forward_hook(lambda _m, _i, out: out + embedding)
