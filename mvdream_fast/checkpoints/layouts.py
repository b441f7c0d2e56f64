"""The layouts that published models come in: their tensor names for ours.

Works on names and shapes alone; recognise.py tells which configuration a file is of, open.py reads files. Our names are
LDM's for the UNet, diffusers' for the VAE, and transformers' (without `text_model.`) for the text tower.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace

from mvdream_fast.checkpoints.manifest import Shapes, manifest
from mvdream_fast.models.config import ModelConfig

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
OPEN_CLIP, TRANSFORMERS = TEXT + "model.", TEXT + "transformer.text_model."
BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
# What carries no weights of the model: the schedule's buffers and a sampler's, constants that some versions stored, the
# second set of weights in some of Stable Diffusion's files, losses, and what only CLIP's score of an image needs.
_IGNORED = re.compile(
    rf"(^|\.)(position_ids|attn_mask|text_projection(\.weight)?|logit_scale)$|^(model_ema|first_stage_model\.loss)\.|"
    rf"^({'|'.join(BUFFERS)}|ddim_\w+|logvar|lvlb_weights|scale_factor|v_pred|ztsnr)$"
)
CAMERA = "camera_embed."
CAMERA_FOLDER = "camera_proj"  # a part of its own in one of the ports to diffusers


@dataclass(frozen=True)
class Slot:
    """Where a file keeps one of our tensors: a whole tensor, or one of three equal pieces of its first dimension."""

    name: str
    piece: int | None = None
    as_conv: bool = False  # stored [C, C, 1, 1], ours is [C, C]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape as the file holds it."""
        if self.as_conv:
            return (*shape, 1, 1)
        return shape if self.piece is None else (3 * shape[0], *shape[1:])


@dataclass(frozen=True)
class PartLayout:
    """One part of the model in one file: the slot of each of our tensors, all that the file must hold, and what it may.

    `unused` names are of layers that the model has and does not run.
    """

    slots: dict[str, Slot]
    expected: Shapes
    unused: frozenset[str] = frozenset()

    def without(self, prefix: str) -> "PartLayout":
        """The same, but for our tensors of a prefix."""
        gone = {slot.name for name, slot in self.slots.items() if name.startswith(prefix)}
        slots = {name: slot for name, slot in self.slots.items() if slot.name not in gone}
        expected = {name: shape for name, shape in self.expected.items() if name not in gone}
        return PartLayout(slots, expected, self.unused)


def layout(ours: Shapes, slot_of: Callable[[str], Slot], unused: Iterable[str] = ()) -> PartLayout:
    """The layout of a file that keeps each of our tensors where `slot_of` says."""
    slots = {name: slot_of(name) for name in ours}
    expected = {slot.name: slot.stored_shape(ours[name]) for name, slot in slots.items()}
    return PartLayout(slots, expected, frozenset(unused))


def own(part: str, config: ModelConfig) -> PartLayout:
    """A folder of ours."""
    return layout(manifest(part, config), Slot)


def released(part: str, config: ModelConfig, text_names: Container[str]) -> PartLayout:
    """The flat files of MVDream's authors: LDM's UNet and VAE, and one of two text towers.

    open_clip's (SD 2.1) has layers above the one that is used; transformers' (SD 1.5) has not.
    """
    ours = manifest(part, config)
    if part == "unet":
        return layout(ours, lambda name: Slot(UNET + name))
    if part == "vae":
        n_levels = len(config.vae.block_out_channels)
        return layout(ours, lambda name: _ldm_vae(name, n_levels))
    if TRANSFORMERS + "embeddings.token_embedding.weight" in text_names:
        return layout(ours, lambda name: Slot(TRANSFORMERS + name))
    whole = manifest("text", replace(config, text=replace(config.text, skip_last=0)))
    return layout(ours, _open_clip, (_open_clip(name).name for name in whole.keys() - ours.keys()))


def published(part: str, config: ModelConfig, names: Iterable[str]) -> PartLayout:
    """diffusers' folder: the UNet in LDM's names without prefix or in diffusers', AutoencoderKL, CLIPTextModel."""
    ours = manifest(part, config)
    if part == "unet" and is_diffusers_unet(names):
        n_blocks = config.unet.num_res_blocks
        return layout(ours, lambda name: Slot(_diffusers_unet(name, n_blocks)))
    if part == "vae" and any(name.endswith("mid_block.attentions.0.query.weight") for name in names):
        return layout(ours, lambda name: Slot(_old_attention(name)))
    prefix = "text_model." if part == "text" and any(name.startswith("text_model.") for name in names) else ""
    return layout(ours, lambda name: Slot(prefix + name))


def as_released(found: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Shapes:
    """A published folder's shapes, by part, under the released names, as far as `recognise` looks at them."""
    unet = found["unet"]
    if is_diffusers_unet(unet):
        n_levels, n_blocks = (count(unet, prefix) for prefix in ("down_blocks.", "down_blocks.0.resnets."))
        ours = (name for n in range(n_levels * (n_blocks + 1)) for name in _stage_names(n, n_blocks))
        stored = {name: _diffusers_unet(name, n_blocks) for name in (*ours, *_TELLING)}
        unet = {name: unet[theirs] for name, theirs in stored.items() if theirs in unet}
    shapes = {UNET + name: shape for name, shape in unet.items()}
    shapes |= {_ldm_vae(name, 1).name: shape for name, shape in found["vae"].items() if not name.startswith("decoder.")}
    return shapes | {TRANSFORMERS + name.removeprefix("text_model."): shape for name, shape in found["text"].items()}


def count(names: Iterable[str], prefix: str) -> int:
    """One more than the highest number that follows the prefix in any name."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,3})\.")
    matches = (pattern.match(name) for name in names)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def ignored(name: str) -> bool:
    """Whether a foreign tensor is a constant that carries no weights."""
    return _IGNORED.search(name) is not None


_LDM_BLOCKS = (
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"mid_block\.block\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"conv_norm_out\.", "norm_out."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"attn_1\.group_norm\.", "attn_1.norm."),
    (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
)


def _ldm_vae(name: str, n_levels: int) -> Slot:
    ldm = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
    # LDM counts the decoder's levels from the full resolution, diffusers in the order they run.
    ldm = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{n_levels - 1 - int(m[1])}.", ldm)
    for pattern, text in _LDM_BLOCKS:
        ldm = re.sub(pattern, text, ldm)
    return Slot(VAE + ldm, as_conv=re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", ldm) is not None)


def _old_attention(name: str) -> str:
    """diffusers' names of the VAE's attention before 0.14."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "encoder.layers.": "transformer.resblocks.",
}


def _open_clip(name: str) -> Slot:
    projection = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
    if projection:
        layer, letter, kind = projection.groups()
        return Slot(f"{OPEN_CLIP}transformer.resblocks.{layer}.attn.in_proj_{kind}", piece="qkv".index(letter))
    for ours, theirs in _OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return Slot(OPEN_CLIP + name)


def is_diffusers_unet(names: Iterable[str]) -> bool:
    """Whether a UNet has the names of diffusers' UNet2DConditionModel."""
    return any(name.startswith("down_blocks.") for name in names)


# What `recognise` looks at besides the stages of the descending arm.
_MIDDLE = "middle_block.1."
_TELLING = (
    "out.2.weight", _MIDDLE + "proj_in.weight", _MIDDLE + "transformer_blocks.0.attn2.to_k.weight",
    CAMERA + "0.weight",
)  # fmt: skip


def _stage_names(n: int, n_blocks: int) -> tuple[str, ...]:
    """What `recognise` looks at of stage n of the descending arm: the first convolution, a re-sampling or a block."""
    ends = ("0.in_layers.2.weight", "1.norm.weight") if n % (n_blocks + 1) else ("0.op.weight",)
    return tuple(f"input_blocks.{n}.{end}" for end in (ends if n else ("0.weight",)))


_DIFFUSERS_ENDS = {
    "input_blocks.0.0.": "conv_in.",
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "camera_embed.0.": CAMERA_FOLDER + ".linear_1.",
    "camera_embed.2.": CAMERA_FOLDER + ".linear_2.",
    "middle_block.0.": "mid_block.resnets.0.",
    "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}
_DIFFUSERS_RESNET = {
    ".in_layers.0.": ".norm1.",
    ".in_layers.2.": ".conv1.",
    ".emb_layers.1.": ".time_emb_proj.",
    ".out_layers.0.": ".norm2.",
    ".out_layers.3.": ".conv2.",
    ".skip_connection.": ".conv_shortcut.",
}


def _diffusers_unet(name: str, n_blocks: int) -> str:
    """UNet2DConditionModel's name of one of our tensors, in a UNet with `n_blocks` blocks a level on the way down.

    LDM counts the stages of an arm through, the re-sampling ones among them; diffusers counts levels and their blocks.
    """
    for ours, theirs in _DIFFUSERS_ENDS.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    stage = re.fullmatch(r"(in|out)put_blocks\.(\d+)\.(\d)\.(.+)", name)
    if stage:
        side, kind, rest = ("down" if stage[1] == "in" else "up"), ("resnets", "attentions")[stage[3] != "0"], stage[4]
        level, block = divmod(int(stage[2]) - (side == "down"), n_blocks + 1)
        if rest.startswith(("op.", "conv.")):  # the convolution of a re-sampling
            kind, block, rest = f"{side}samplers", 0, "conv." + rest.partition(".")[2]
        name = f"{side}_blocks.{level}.{kind}.{block}.{rest}"
    for ours, theirs in _DIFFUSERS_RESNET.items():
        name = name.replace(ours, theirs)
    return name
