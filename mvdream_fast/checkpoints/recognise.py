"""Which configuration a file of weights is of, from its tensors' shapes and the schedule that it stores."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mvdream_fast.checkpoints.foreign_config import Hints
from mvdream_fast.checkpoints.layouts import CAMERA, OPEN_CLIP, TRANSFORMERS, UNET, VAE, count
from mvdream_fast.checkpoints.manifest import check_config
from mvdream_fast.checkpoints.tensor_file import TensorFile
from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import NAMED, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig


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
    channels, wanted = (unet.in_channels, unet.out_channels), config.vae.latent_channels
    if channels != (wanted, wanted):
        raise ModelError(
            f"{source} is not a text-to-image model: its UNet takes {channels[0]} channels and gives {channels[1]}, "
            f"its autoencoder's latents have {wanted}; inpainting, depth and upscaling models are other networks"
        )
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
                ".pt files, diffusers-layout folders, and folders that mvdream_fast.convert wrote; where a model is in "
                "parts, name its folder"
            )
        return shape

    def count(self, prefix: str) -> int:
        return count(self.shapes, prefix)


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
    heads, head_channels = _recognise_heads(reader, hints, [level[0] for level in multiples], linear)
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
        norm_groups=hints.norm_groups or UNetConfig.norm_groups,
    )


def _recognise_heads(reader: _Reader, hints: Hints, widths: list[int], linear: bool) -> tuple[int | None, int | None]:
    """The number of heads of every level, or their width. Raises ModelError where levels differ in both."""
    if hints.num_heads is None and hints.num_head_channels is None:
        return (None, 64) if linear else (8, None)
    if not isinstance(hints.num_heads, tuple):
        return hints.num_heads, hints.num_head_channels
    if len(set(hints.num_heads)) == 1:
        return hints.num_heads[0], None
    channels = {width / heads for width, heads in zip(widths, hints.num_heads)}
    if len(hints.num_heads) != len(widths) or len(channels) > 1:
        raise ModelError(
            f"{reader.source}/unet/config.json: attention_head_dim must give heads of one width in levels of {widths} "
            f"channels, got {list(hints.num_heads)}"
        )
    return None, int(channels.pop())


def _recognise_vae(reader: _Reader, hints: Hints) -> VAEConfig:
    levels = [f"{VAE}encoder.down.{level}.block." for level in range(reader.count(VAE + "encoder.down."))]
    # A model without cameras is yet to become one of views; Stable Diffusion's size says nothing about these.
    size = hints.latent_size if UNET + CAMERA + "0.weight" in reader.shapes else None
    return VAEConfig(
        block_out_channels=tuple(reader.shape(level + "0.conv1.weight", 4)[0] for level in levels),
        layers_per_block=reader.count(VAE + "encoder.down.0.block."),
        latent_channels=reader.shape(VAE + "post_quant_conv.weight", 4)[0],
        norm_num_groups=hints.vae_groups or VAEConfig.norm_num_groups,
        mid_block_add_attention=VAE + "encoder.mid.attn_1.norm.weight" in reader.shapes,
        scale_factor=VAEConfig.scale_factor if hints.scale_factor is None else hints.scale_factor,
        shift_factor=hints.shift_factor or 0.0,
        image_size=size * 2 ** (len(levels) - 1) if size else VAEConfig.image_size,
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
        if (width, n_layers) == (1024, 23):
            n_layers = 24  # ViT-H without the last layer, which is not run
    return replace(
        family,
        width=width,
        n_layers=n_layers,
        n_heads=hints.text_heads or max(1, width // 64),
        mlp_width=mlp_width,
        context_length=length,
        activation=hints.activation or family.activation,
        pad_id=family.pad_id if hints.pad_id is None else hints.pad_id,
        vocabulary_size=rows,
    )


def stored_hints(source: str, file: TensorFile) -> tuple[Hints, bool]:
    """What a released file stores beside its weights: the schedule and the scale of the latents.

    Returns: the hints, and whether anything tells what the UNet predicts. Without a stored schedule it is MVDream's,
        which is Stable Diffusion's.
    Raises: ModelError if what is stored cannot be a schedule or a scale.
    """
    schedule = _stored_schedule(source, file)
    said = {"epsilon": "eps", "v": "v", "v_prediction": "v"}.get(file.metadata.get("modelspec.prediction_type", ""))
    if "v_pred" in file.shapes or schedule.betas()[-1] == 1:  # a marker of some trainers; all noise says it too
        said = "v"
    schedule = replace(schedule, prediction=said or "eps", rescale_betas_zero_snr="ztsnr" in file.shapes)
    scale = None
    if "scale_factor" in file.shapes:
        if math.prod(file.shapes["scale_factor"]) != 1:
            raise ModelError(f"{source}: scale_factor must be one number, got {list(file.shapes['scale_factor'])}")
        scale = float(file.read("scale_factor"))
    return Hints(schedule=schedule, scale_factor=scale), said is not None


def _stored_schedule(source: str, file: TensorFile) -> ScheduleConfig:
    name = next((name for name in ("betas", "alphas_cumprod") if name in file.shapes), None)
    if name is None:
        return ScheduleConfig()
    stored = file.read(name)
    exact = stored.double()
    if stored.ndim != 1 or len(stored) < 2 or not stored.is_floating_point() or not exact.isfinite().all():
        raise ModelError(f"{source}: {name} must be the noise schedule, one finite number for each timestep")
    before = torch.cat([exact.new_ones(1), exact[:-1]])
    betas = exact if name == "betas" else 1 - exact / before
    found = _evenly_spaced(betas, exact, name == "betas", stored.dtype)
    if found is None and stored.dtype in (torch.float16, torch.bfloat16):
        raise ModelError(f"{source}: {name} is no evenly spaced schedule, and {stored.dtype} is too coarse for another")
    if found is None and not bool(((betas > 0) & (betas <= 1)).all()):
        raise ModelError(f"{source}: {name} is no noise schedule: betas must be over 0 and at most 1")
    return found or ScheduleConfig(len(betas), trained_betas=tuple(betas.tolist()))


def _evenly_spaced(betas: Tensor, stored: Tensor, are_betas: bool, dtype: torch.dtype) -> ScheduleConfig | None:
    """The schedule with the fewest digits whose betas (or products) [T] are the stored ones, to their precision."""
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 0.51 * torch.finfo(dtype).eps
    tolerance *= 1 if are_betas else 5  # a thousand products
    ends = [(ScheduleConfig.linear_start, ScheduleConfig.linear_end)]
    ends += [tuple(float(f"{betas[i].item():.{digits}g}") for i in (0, -1)) for digits in range(1, 7)]
    for start, end in ends:
        for kind in ("scaled_linear", "linear") if 0 < start < end < 1 else ():
            schedule = ScheduleConfig(len(betas), start, end, beta_schedule=kind)
            made = torch.tensor(schedule.betas(), dtype=torch.float64)
            made = made if are_betas else torch.cumprod(1 - made, 0)
            if ((made - stored).abs() <= tolerance * stored.abs()).all():
                return schedule
    return None
