"""The layouts that published models come in: their tensor names for ours, and which configuration a file is of.

Works on names and shapes alone; files are read in open.py. Our names are LDM's for the UNet, diffusers' for the
VAE, and transformers' (without `text_model.`) for the text tower.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mvdream_fast.checkpoints.manifest import Shapes, check_config, manifest
from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import NAMED, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
OPEN_CLIP, TRANSFORMERS = TEXT + "model.", TEXT + "transformer.text_model."
BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
# Constants that some versions stored, and the second set of weights in some of Stable Diffusion's files.
_IGNORED = re.compile(r"(^|\.)(position_ids|attn_mask)$|^model_ema\.")
CAMERA = "camera_embed."


@dataclass(frozen=True)
class Slot:
    """Where a file keeps one of our tensors: a whole tensor, or one of three equal pieces of its first dimension."""

    name: str
    piece: int | None = None
    as_conv: bool = False  # stored [C, C, 1, 1], ours is [C, C]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.as_conv:
            return (*shape, 1, 1)
        return shape if self.piece is None else (3 * shape[0], *shape[1:])


@dataclass(frozen=True)
class PartLayout:
    """One part of the model in one file: the slot of each of our tensors, and all that the file must hold."""

    slots: dict[str, Slot]
    expected: Shapes

    def without(self, prefix: str) -> "PartLayout":
        """The same, but for our tensors of a prefix."""
        gone = {slot.name for name, slot in self.slots.items() if name.startswith(prefix)}
        slots = {name: slot for name, slot in self.slots.items() if slot.name not in gone}
        return PartLayout(slots, {name: shape for name, shape in self.expected.items() if name not in gone})


def _layout(ours: Shapes, slot_of: Callable[[str], Slot], unused: Shapes | None = None) -> PartLayout:
    slots = {name: slot_of(name) for name in ours}
    return PartLayout(
        slots, {slot.name: slot.stored_shape(ours[name]) for name, slot in slots.items()} | (unused or {})
    )


def own(part: str, config: ModelConfig) -> PartLayout:
    """A folder of ours."""
    return _layout(manifest(part, config), Slot)


def released(part: str, config: ModelConfig, text_names: Container[str]) -> PartLayout:
    """The flat files of MVDream's authors: UNet with the schedule's buffers, LDM's VAE, and one of two text towers.

    open_clip's (SD 2.1) has layers above the one that is used; transformers' (SD 1.5) has not.
    """
    ours = manifest(part, config)
    if part == "unet":
        return _layout(ours, lambda name: Slot(UNET + name), dict.fromkeys(BUFFERS, (config.schedule.n_timesteps,)))
    if part == "vae":
        n_levels = len(config.vae.block_out_channels)
        return _layout(ours, lambda name: _ldm_vae(name, n_levels))
    if TRANSFORMERS + "embeddings.token_embedding.weight" in text_names:
        return _layout(ours, lambda name: Slot(TRANSFORMERS + name))
    whole = manifest("text", replace(config, text=replace(config.text, skip_last=0)))
    above = _layout({name: shape for name, shape in whole.items() if name not in ours}, _open_clip)
    width = config.text.width
    head = {OPEN_CLIP + "text_projection": (width, width), OPEN_CLIP + "logit_scale": ()}
    return _layout(ours, _open_clip, above.expected | head)


def published(part: str, config: ModelConfig, names: Iterable[str]) -> PartLayout:
    """diffusers' folder: the UNet in LDM's names without prefix, AutoencoderKL, CLIPTextModel of any version."""
    ours = manifest(part, config)
    if part == "vae" and any(name.endswith("mid_block.attentions.0.query.weight") for name in names):
        return _layout(ours, lambda name: Slot(_old_attention(name)))
    prefix = "text_model." if part == "text" and any(name.startswith("text_model.") for name in names) else ""
    return _layout(ours, lambda name: Slot(prefix + name))


def as_released(found: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Shapes:
    """A published folder's shapes, by part, under the released names, as far as `recognise` looks at them."""
    shapes = {UNET + name: shape for name, shape in found["unet"].items()}
    shapes |= {_ldm_vae(name, 1).name: shape for name, shape in found["vae"].items() if not name.startswith("decoder.")}
    return shapes | {TRANSFORMERS + name.removeprefix("text_model."): shape for name, shape in found["text"].items()}


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


@dataclass(frozen=True)
class Hints:
    """What shapes cannot tell, from the JSON files of a published folder; None where a file does not say."""

    num_heads: int | None = None
    num_head_channels: int | None = None
    norm_num_groups: int | None = None
    scale_factor: float | None = None
    text_heads: int | None = None
    activation: str | None = None
    schedule: ScheduleConfig | None = None


def hints_of(source: str, unet: dict, vae: dict, text: dict, scheduler: dict) -> Hints:
    """Reads the JSON objects of a published folder; a missing file is an empty object. Raises ModelError."""

    def number(data: dict, key: str) -> int | None:
        value = data.get(key)
        return value if isinstance(value, int) and value > 0 else None  # LDM writes -1 for "not set"

    scale = vae.get("scaling_factor")
    return Hints(
        num_heads=number(unet, "num_heads"),
        num_head_channels=number(unet, "num_head_channels"),
        norm_num_groups=number(vae, "norm_num_groups"),
        scale_factor=scale if isinstance(scale, float) else None,
        text_heads=number(text, "num_attention_heads"),
        activation=text.get("hidden_act"),
        schedule=_diffusers_schedule(source, scheduler) if scheduler else None,
    )


def _diffusers_schedule(source: str, data: dict) -> ScheduleConfig:
    predictions = {"epsilon": "eps", "v_prediction": "v"}
    prediction = predictions.get(str(data.get("prediction_type", "epsilon")))
    kind = data.get("beta_schedule", "scaled_linear")
    n_steps, *ends = data.get("num_train_timesteps", 1000), data.get("beta_start", 0.00085), data.get("beta_end", 0.012)
    numbers = isinstance(n_steps, int) and all(isinstance(end, float) for end in ends)
    if prediction is None or kind != "scaled_linear" or not numbers:
        raise ModelError(f"{source}/scheduler must have a scaled_linear schedule with epsilon or v_prediction")
    return ScheduleConfig(n_steps, *ends, prediction)


def schedule_of(source: str, betas: Tensor | None) -> ScheduleConfig | None:
    """The schedule whose betas [T] a released file stores. Raises ModelError if they are no such schedule."""
    if betas is None or betas.ndim != 1 or len(betas) < 2:
        return None  # the check of names and shapes says so
    betas = betas.double()
    start, end = (float(f"{betas[i].item():.6g}") for i in (0, -1))
    schedule = ScheduleConfig(len(betas), start, end)
    if not 0 < start < end < 1 or not (betas - _scaled_linear(schedule)).abs().max() <= 1e-6:
        raise ModelError(f"{source}: betas is not a scaled-linear schedule, which is all that MVDream's models use")
    return schedule


def _scaled_linear(schedule: ScheduleConfig) -> Tensor:
    ends = schedule.linear_start**0.5, schedule.linear_end**0.5
    return torch.linspace(*ends, schedule.n_timesteps, dtype=torch.float64) ** 2


def recognise(source: str, shapes: Mapping[str, tuple[int, ...]], hints: Hints | None = None) -> ModelConfig:
    """The configuration of a model in the released names, of any width; a published folder is given with them too.

    Heads are 64 channels wide where the transformers' projections are Linear (SD 2.1), 8 in number where they are
    convolutions (SD 1.5), unless the hints say otherwise. A configuration equal to a known one takes its name.

    Raises:
        ModelError: if a tensor that tells the sizes is missing, or the sizes make no such model.
    """
    reader, hints = _Reader(source, shapes), hints or Hints()
    unet = _recognise_unet(reader, hints)
    family = NAMED["sd21-4view" if unet.use_linear_in_transformer else "sd15-4view"]
    config = ModelConfig(
        name=f"{family.name}-variant",
        unet=unet,
        vae=_recognise_vae(reader, hints),
        text=_recognise_text(reader, hints, family.text),
        schedule=hints.schedule or ScheduleConfig(),
    )
    check_config(config)
    return next((known for known in NAMED.values() if replace(config, name=known.name) == known), config)


@dataclass(frozen=True)
class _Reader:
    source: str
    shapes: Mapping[str, tuple[int, ...]]

    def shape(self, name: str, n_dims: int) -> tuple[int, ...]:
        shape = self.shapes.get(name)
        if shape is None or len(shape) != n_dims or 0 in shape:
            state = "is missing" if shape is None else f"has the shape {list(shape)}"
            raise ModelError(
                f"{self.source} is not a multi-view model in a known layout: {name} {state}. Known are the released "
                ".pt files, diffusers-layout folders, and folders that mvdream_fast.convert wrote"
            )
        return shape

    def count(self, prefix: str) -> int:
        """One more than the highest number that follows the prefix in any name."""
        pattern = re.compile(re.escape(prefix) + r"([0-9]{1,3})\.")
        matches = (pattern.match(name) for name in self.shapes)
        return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _recognise_unet(reader: _Reader, hints: Hints) -> UNetConfig:
    width, in_channels = reader.shape(UNET + "input_blocks.0.0.weight", 4)[:2]
    multiples, attention, factor = [[]], [], 1
    for i in range(1, reader.count(UNET + "input_blocks.")):
        stage = f"{UNET}input_blocks.{i}."
        if stage + "0.op.weight" in reader.shapes:
            factor *= 2
            multiples.append([])
            continue
        multiples[-1].append(reader.shape(stage + "0.in_layers.2.weight", 4)[0])
        if stage + "1.norm.weight" in reader.shapes:
            attention.append(factor)
    regular = all(len(level) == len(multiples[0]) > 0 and len(set(level)) == 1 for level in multiples)
    if not regular or any(level[0] % width for level in multiples):
        raise ModelError(f"{reader.source}: the UNet's levels must have equally many blocks, got widths {multiples}")
    middle = UNET + "middle_block.1."
    linear = len(reader.shapes.get(middle + "proj_in.weight", ())) == 2
    heads, head_channels = hints.num_heads, hints.num_head_channels
    if heads is None and head_channels is None:
        heads, head_channels = (None, 64) if linear else (8, None)
    camera = reader.shapes.get(UNET + "camera_embed.0.weight")
    return UNetConfig(
        in_channels=in_channels,
        out_channels=reader.shape(UNET + "out.2.weight", 4)[0],
        model_channels=width,
        channel_mult=tuple(level[0] // width for level in multiples),
        num_res_blocks=len(multiples[0]),
        attention_resolutions=tuple(sorted(set(attention), reverse=True)),
        num_heads=heads,
        num_head_channels=head_channels,
        context_dim=reader.shape(middle + "transformer_blocks.0.attn2.to_k.weight", 2)[1],
        use_linear_in_transformer=linear,
        camera_dim=camera[1] if camera and len(camera) == 2 else UNetConfig.camera_dim,
    )


def _recognise_vae(reader: _Reader, hints: Hints) -> VAEConfig:
    levels = [f"{VAE}encoder.down.{level}.block." for level in range(reader.count(VAE + "encoder.down."))]
    return VAEConfig(
        block_out_channels=tuple(reader.shape(level + "0.conv1.weight", 4)[0] for level in levels),
        layers_per_block=reader.count(VAE + "encoder.down.0.block."),
        latent_channels=reader.shape(VAE + "post_quant_conv.weight", 4)[0],
        norm_num_groups=hints.norm_num_groups or VAEConfig.norm_num_groups,
        mid_block_add_attention=VAE + "encoder.mid.attn_1.norm.weight" in reader.shapes,
        scale_factor=hints.scale_factor or VAEConfig.scale_factor,
    )


def _recognise_text(reader: _Reader, hints: Hints, family: TextConfig) -> TextConfig:
    if TRANSFORMERS + "embeddings.token_embedding.weight" in reader.shapes:
        rows, width = reader.shape(TRANSFORMERS + "embeddings.token_embedding.weight", 2)
        length = reader.shape(TRANSFORMERS + "embeddings.position_embedding.weight", 2)[0]
        mlp_width = reader.shape(TRANSFORMERS + "encoder.layers.0.mlp.fc1.weight", 2)[0]
        # A published text tower ends at the layer that is used.
        n_layers = reader.count(TRANSFORMERS + "encoder.layers.") + family.skip_last
    else:
        rows, width = reader.shape(OPEN_CLIP + "token_embedding.weight", 2)
        length = reader.shape(OPEN_CLIP + "positional_embedding", 2)[0]
        mlp_width = reader.shape(OPEN_CLIP + "transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
        n_layers = reader.count(OPEN_CLIP + "transformer.resblocks.")
    activation = hints.activation or family.activation
    if activation not in ("gelu", "quick_gelu"):
        raise ModelError(f"{reader.source}: the text tower's hidden_act must be gelu or quick_gelu, got {activation!r}")
    return replace(
        family,
        width=width,
        n_layers=n_layers,
        n_heads=hints.text_heads or max(1, width // 64),
        mlp_width=mlp_width,
        context_length=length,
        activation=activation,
        vocabulary_size=rows,
    )
