"""What a model must consist of: tensor names and shapes derived from its configuration, and the check against them.

Names here are those of our own folders; foreign names are in layouts.py, files in open.py.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig

if TYPE_CHECKING:
    from torch import nn

Shapes = dict[str, tuple[int, ...]]
PARTS = ("unet", "vae", "text")
WEIGHT_DTYPES = ("float32", "float16", "bfloat16")

_MAX_SIZE = 1 << 20  # of any width or count in a configuration; the largest real one is the vocabulary's 49,408
_MAX_DEPTH = 256  # of any number of layers


def build(part: str, config: ModelConfig) -> "nn.Module":
    """A part of the model with untrained weights, on torch's default device.

    Raises:
        ModelError: if the configuration is out of bounds or contradicts itself.
    """
    from mvdream_fast.models.deepfloyd import DeepFloydUNet
    from mvdream_fast.models.pixels import Pixels
    from mvdream_fast.models.t5 import T5Encoder
    from mvdream_fast.models.text import TextEncoder
    from mvdream_fast.models.unet import MultiViewUNet
    from mvdream_fast.models.vae import VAE

    check_config(config)
    unet = DeepFloydUNet if config.unet.kind == "deepfloyd" else MultiViewUNet
    codec = Pixels if config.vae.kind == "pixels" else VAE
    text = T5Encoder if config.text.kind == "t5" else TextEncoder
    makers = {"unet": (unet, config.unet), "vae": (codec, config.vae), "text": (text, config.text)}
    make, part_config = makers[part]
    try:
        return make(part_config)
    except ValueError as error:
        raise ModelError(f"the configuration of the {part} cannot be built: {error}") from error


def owner(part: str, module: "nn.Module") -> "nn.Module":
    """The module whose state dict has the names of the manifest: what a wrapper of a part wraps, or the part."""
    return getattr(module, "model", module)


@lru_cache(maxsize=16)
def manifest(part: str, config: ModelConfig) -> Shapes:
    """Every tensor of a part with its shape; nothing is allocated. Not to be changed: it is kept."""
    import torch

    with torch.device("meta"):
        module = owner(part, build(part, config))
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def check_config(config: ModelConfig) -> None:
    """Raises ModelError for sizes out of bounds, or that do not divide into heads and groups."""
    for section in (config.unet, config.vae, config.text, config.schedule):
        for name, value in vars(section).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and not isinstance(number, bool):
                    low = 0 if name in ("skip_last", "steps_offset", "pad_id", "detail_channels") else 1
                    _require(low <= number <= _MAX_SIZE, name, number, f"from {low} to {_MAX_SIZE}")
    _check_unet(config.unet)
    _check_vae(config.vae)
    _check_text(config.text)
    _check_schedule(config.schedule)


def _check_schedule(schedule: ScheduleConfig) -> None:
    ends = schedule.linear_start, schedule.linear_end
    _require(0 < ends[0] < ends[1] < 1, "linear_end", ends[1], "over linear_start")
    betas = schedule.trained_betas
    if betas is not None:
        _require(len(betas) == schedule.n_timesteps, "trained_betas", f"{len(betas)} numbers", "one for each timestep")
        _require(all(0 < beta <= 1 for beta in betas), "trained_betas", "others", "over 0 and at most 1")
    last_is_noise = schedule.rescale_betas_zero_snr or (betas is not None and 1 in betas)
    _require(not last_is_noise or schedule.prediction == "v", "prediction", schedule.prediction,
             "v where the last timestep is all noise (rescale_betas_zero_snr, or a beta of 1)")  # fmt: skip
    share, most = schedule.threshold, schedule.threshold_max
    _require(share is None or 0 < share <= 1, "threshold", share, "null, or over 0 and at most 1")
    _require(1 <= most < 1e6, "threshold_max", most, "at least 1")
    _require(schedule.steps_offset < schedule.n_timesteps, "steps_offset", schedule.steps_offset, "under n_timesteps")


def _check_unet(unet: UNetConfig) -> None:
    _require(0 < len(unet.channel_mult) <= 8, "channel_mult", unet.channel_mult, "1 to 8 levels")
    _require(unet.num_res_blocks <= 16, "num_res_blocks", unet.num_res_blocks, "at most 16")
    _require((unet.num_heads is None) != (unet.num_head_channels is None), "num_heads", unet.num_heads,
             "set where num_head_channels is null, and null where it is set")  # fmt: skip
    pooled = unet.kind == "mvdream" or unet.context_dim % 64 == 0
    _require(pooled, "context_dim", unet.context_dim, "a multiple of IF's 64 heads of pooling")
    even = not unet.input_skip or unet.in_channels == unet.out_channels
    _require(even, "out_channels", unet.out_channels, f"{unet.in_channels}, as the input that is added to it")
    for multiple in unet.channel_mult:
        channels = multiple * unet.model_channels
        _require(channels % unet.norm_groups == 0, "norm_groups", unet.norm_groups, f"a divisor of {channels} channels")
        heads = unet.num_heads or unet.num_head_channels or 1
        _require(channels % heads == 0, "num_heads or num_head_channels", heads, f"a divisor of {channels} channels")


def _check_vae(vae: VAEConfig) -> None:
    _require(0 < vae.scale_factor < 1e6, "scale_factor", vae.scale_factor, "a positive number")
    _require(abs(vae.shift_factor) < 1e6, "shift_factor", vae.shift_factor, "a finite number")
    if vae.kind == "pixels":
        wanted = 3 * vae.patch_size**2
        _require(vae.latent_channels == wanted, "latent_channels", vae.latent_channels, f"{wanted}, all of a square's")
        _require(not vae.block_out_channels, "block_out_channels", vae.block_out_channels, "empty where there is none")
        return
    _require(0 < len(vae.block_out_channels) <= 8, "block_out_channels", vae.block_out_channels, "1 to 8 levels")
    _require(vae.layers_per_block <= 16, "layers_per_block", vae.layers_per_block, "at most 16")
    wide = vae.decoder_width
    one_level = len(vae.block_out_channels) == 1
    _require(
        wide is None or (one_level and 0 < wide <= 4096), "decoder_width", wide, "null, or 1 to 4096 with one level"
    )
    detail, most = vae.detail_channels, vae.latent_channels - 1 if one_level and wide else 0
    _require(detail <= most, "detail_channels", detail, f"from 0 to {most} beside this decoder_width")
    widths = (wide, vae.decoder_cleaner, vae.decoder_matting)
    for channels in (*vae.block_out_channels, *(width for width in widths if width)):
        divides = channels % vae.norm_num_groups == 0
        _require(divides, "norm_num_groups", vae.norm_num_groups, f"a divisor of {channels} channels")


def _check_text(text: TextConfig) -> None:
    _require(text.n_layers <= _MAX_DEPTH, "n_layers", text.n_layers, f"at most {_MAX_DEPTH}")
    _require(0 <= text.skip_last < text.n_layers, "skip_last", text.skip_last, f"from 0 to {text.n_layers - 1}")
    _require(text.width % text.n_heads == 0, "n_heads", text.n_heads, f"a divisor of the width {text.width}")
    _require(text.context_length >= 3, "context_length", text.context_length, "at least 3")
    _require(text.pad_id < text.vocabulary_size, "pad_id", text.pad_id, f"under {text.vocabulary_size}, the rows")


def _require(holds: bool, name: str, value: object, requirement: str) -> None:
    if not holds:
        raise ModelError(f"the model's configuration: {name} must be {requirement}, got {value}")


def check_shapes(
    source: str, expected: Shapes, found: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> None:
    """Compares a file with what it must hold; names in both are the file's own.

    Raises:
        ModelError: with a few names and the number of those that are missing, unexpected, misshapen or no floats.
    """
    problems = [
        _some("missing", expected.keys() - found.keys()),
        _some("unexpected", found.keys() - expected.keys()),
        _some("misshapen", (f"{name} is {list(found[name])} and must be {list(shape)}"
                            for name, shape in expected.items() if found.get(name, shape) != shape)),
        _some("of a wrong type", (f"{name} is {dtypes[name]}" for name in expected.keys() & found.keys()
                                  if dtypes[name] not in WEIGHT_DTYPES)),
    ]  # fmt: skip
    problems = [problem for problem in problems if problem]
    if problems:
        raise ModelError(
            f"{source} does not hold the {len(expected)} tensors of the model it should be: {'; '.join(problems)}. "
            "Download or convert it again; if it is another model on purpose, it needs a configuration that fits it"
        )


def _some(what: str, names: Iterable[str], limit: int = 3) -> str:
    names = sorted(printable(name) for name in names)
    more = ", ..." if len(names) > limit else ""
    return f"{len(names)} {what} ({', '.join(names[:limit])}{more})" if names else ""


def printable(name: str, limit: int = 120) -> str:
    """A name from a foreign file, fit for a line of a terminal."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= limit else text[:limit] + "..."
