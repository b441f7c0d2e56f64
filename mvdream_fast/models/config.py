"""Configurations of models as plain dataclasses, and their JSON form; no torch here.

Unknown keys in a file are errors. Numbers of `sd21-4view` and `sd15-4view` are those of the released MVDream models.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from mvdream_fast.core.errors import ArgumentError, ModelError
from mvdream_fast.core.files import parse_json, read_text
from mvdream_fast.core.schema import Checked, checked, is_object

FORMAT_VERSION = 1
Mode = Literal["3d", "2d"]  # views of one object with their cameras, or single images without


@dataclass(frozen=True)
class UNetConfig(Checked):
    """The multi-view UNet (`models/unet.py`). `attention_resolutions` are down-sampling factors, as in LDM.

    With the kind `deepfloyd` it is DeepFloyd IF's of single images (`models/deepfloyd.py`): `context_dim` is the width
    of its text tower, and what it says of variance is not among `out_channels`.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    num_heads: int | None = None  # heads at every level; exactly one of this and num_head_channels is set
    num_head_channels: int | None = 64  # width of a head at every level
    context_dim: int = 1024
    use_linear_in_transformer: bool = True
    camera_dim: int = 16
    norm_groups: int = 32
    camera_in: Literal["time", "attention", "time+attention", "text", "none"] = "time"
    view_mixing: Literal["3d", "2d", "temporal"] = "3d"
    input_skip: bool = False  # the input, each channel times a factor that depends on the time, is added to the output
    kind: Literal["mvdream", "deepfloyd"] = "mvdream"

    @property
    def time_embed_dim(self) -> int:
        """Width of the time and camera embedding."""
        return 4 * self.model_channels

    @property
    def camera_places(self) -> tuple[str, ...]:
        """Where in the network the camera embedding goes: "time", "attention" or "text", or several of them."""
        return () if self.camera_in == "none" else tuple(self.camera_in.split("+"))


@dataclass(frozen=True)
class VAEConfig(Checked):
    """diffusers' AutoencoderKL; (sample - shift_factor) * scale_factor are the latents that the UNet sees.

    With the kind `pixels` there is none: the UNet sees squares of pixels (`models/pixels.py`), and `latent_channels` is
    3 patch_size^2, `block_out_channels` empty, what else describes an autoencoder of no meaning.
    `patch_size` squares of pixels become channels before its first convolution: cheap at small sizes; SD's is 1.
    `decoder_width` widens a decoder of one level beyond its encoder, which alone is in the loop of score distillation.
    `detail_channels` of the `latent_channels`, the last ones, are a linear autoencoder of what the others leave.
    `decoder_cleaner` is the width of a network before the decoder that takes from sampled latents what no image has.
    `decoder_matting` is the width of one behind it that tells things from their flat backgrounds (models/matting.py).
    """

    kind: Literal["kl", "pixels"] = "kl"
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    scale_factor: float = 0.18215
    shift_factor: float = 0.0
    image_size: int = 256
    patch_size: int = 1
    decoder_width: int | None = None
    decoder_cleaner: int | None = None
    decoder_matting: int | None = None
    detail_channels: int = 0

    @property
    def downsampling(self) -> int:
        """Pixels of the image per latent cell along a side."""
        return self.patch_size * 2 ** max(len(self.block_out_channels) - 1, 0)


@dataclass(frozen=True)
class TextConfig(Checked):
    """transformers' CLIPTextModel. `skip_last` layers at the top are not run (1 = penultimate layer + final norm).

    With the kind `t5` it is the encoder of a T5 version 1.1 (`models/t5.py`), whose activation is always a gated GELU,
    and whose vocabulary lies beside its weights.
    """

    kind: Literal["clip", "t5"] = "clip"
    width: int = 1024
    n_layers: int = 24
    n_heads: int = 16
    mlp_width: int = 4096
    skip_last: int = 1
    context_length: int = 77
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    vocabulary: Literal["clip", "subset"] = "clip"  # subset: only the BPE rows that were seen in training, plus unknown
    vocabulary_size: int = 49408
    pad_id: int = 0  # what fills a prompt up to its length, as in training: open_clip's 0, or the end token's 49407

    @property
    def room(self) -> int:
        """Tokens of a prompt that are seen: all but CLIP's start and end, or T5's end."""
        return self.context_length - (2 if self.kind == "clip" else 1)


@dataclass(frozen=True)
class ScheduleConfig(Checked):
    """Noise schedule, and the timesteps at which the model is sampled; the words are diffusers' where it has them.

    `linear_start` and `linear_end` are the first and the last beta of a scaled_linear schedule (evenly spaced square
    roots, LDM's "linear") or of a linear one; squaredcos_cap_v2 is the cosine schedule (Nichol & Dhariwal 2021,
    "Improved DDPM", equation 17); `trained_betas` [n_timesteps] stand in place of all.

    With a `threshold` the sampler's guesses of pixels are kept from leaving [-1, 1]: this share of an image's values is
    scaled to lie inside, by at most `threshold_max` (Saharia et al. 2022, "Imagen", section 2.3).
    """

    n_timesteps: int = 1000
    linear_start: float = 0.00085
    linear_end: float = 0.012
    prediction: Literal["eps", "v"] = "eps"
    beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    threshold: float | None = None
    threshold_max: float = 1.0

    def betas(self) -> list[float]:
        """[n_timesteps], before any rescaling to zero terminal SNR."""
        if self.trained_betas is not None:
            return list(self.trained_betas)
        if self.beta_schedule == "squaredcos_cap_v2":
            left = [_cosine(t / self.n_timesteps) for t in range(self.n_timesteps + 1)]
            return [min(1 - after / before, 0.999) for before, after in pairwise(left)]
        power = 2 if self.beta_schedule == "scaled_linear" else 1
        start, end = self.linear_start ** (1 / power), self.linear_end ** (1 / power)
        return [(start + (end - start) * t / max(self.n_timesteps - 1, 1)) ** power for t in range(self.n_timesteps)]


def _cosine(time: float) -> float:
    """What the cosine schedule leaves of an image's variance at a time from 0 to 1."""
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


@dataclass(frozen=True)
class SamplingGuidance(Checked):
    """How the model's views are best guided, where nothing else is said; the defaults are MVDream's.

    uncond_mode: how the model is asked without the prompt: 3d with the cameras; 2d without them and each view by
    itself, so that views are led to their cameras and to each other, too.
    """

    scale: float = 7.5
    uncond_mode: Mode = "3d"


@dataclass(frozen=True)
class ModelConfig(Checked):
    """A whole text-to-views model: what `config.json` of a model folder holds."""

    name: str = "sd21-4view"
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    guidance: SamplingGuidance = field(default_factory=SamplingGuidance)

    @property
    def latent_size(self) -> int:
        """Latent height and width."""
        return self.vae.image_size // self.vae.downsampling

    @property
    def modes(self) -> tuple[Mode, ...]:
        """How the model can be asked, the usual way first: 3d needs views that see each other, or a camera."""
        single = self.unet.camera_in == "none" and self.unet.view_mixing == "2d"
        return ("2d",) if single else ("3d", "2d")

    @property
    def foreign(self) -> str:
        """Whose classes the model runs in, where it is none that can be trained or saved here; empty for ours."""
        return "DeepFloyd IF" if self.unet.kind == "deepfloyd" or self.text.kind == "t5" else ""

    def to_json(self) -> str:
        """What config.json of a model folder holds."""
        return json.dumps({"kind": "model", "format": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "config.json") -> "ModelConfig":
        """Raises ModelError that names the key when the text is no model configuration of this version."""
        data = parse_json(text, source, ModelError)
        if not is_object(data) or data.pop("kind", None) != "model":
            raise ModelError(f'{source} does not describe a model: it must be an object with "kind": "model"')
        if data.pop("format", None) != FORMAT_VERSION:
            raise ModelError(f'{source} must have "format": {FORMAT_VERSION}; convert the model again')
        return checked(ModelConfig, data, source, ModelError)

    @staticmethod
    def load(path: Path) -> "ModelConfig":
        """Reads a config.json. Raises ModelError."""
        return ModelConfig.from_json(read_text(path, ModelError), str(path))


def with_settings(config: ModelConfig, settings: Iterable[str]) -> ModelConfig:
    """The configuration with single values replaced, each as `unet.view_mixing=2d`: JSON, or a bare word.

    Raises ArgumentError naming a setting that is unknown or mistyped.
    """
    data = dataclasses.asdict(config)
    for setting in settings:
        path, sign, text = setting.partition("=")
        part, _, name = path.partition(".")
        section = data.get(part)
        if not sign or not is_object(section) or name not in section:
            known = ", ".join(f"{p}.{n}" for p, values in data.items() if is_object(values) for n in values)
            raise ArgumentError(f"--set must be NAME=VALUE, got {setting!r}; the names are {known}")
        try:
            section[name] = json.loads(text)
        except ValueError:
            section[name] = text
    changed = checked(ModelConfig, data, "--set", ArgumentError)
    if changed.foreign:
        raise ArgumentError(
            f"--set must leave unet.kind and text.kind as they are: {changed.foreign} is not trained here"
        )
    return changed


SD21 = ModelConfig()
SD15 = ModelConfig(
    name="sd15-4view",
    unet=UNetConfig(num_heads=8, num_head_channels=None, context_dim=768, use_linear_in_transformer=False),
    text=TextConfig(
        width=768, n_layers=12, n_heads=12, mlp_width=3072, skip_last=0, activation="quick_gelu", pad_id=49407
    ),
)
MINI = ModelConfig(
    name="mini",
    unet=UNetConfig(
        in_channels=24,
        out_channels=24,
        model_channels=64,
        channel_mult=(2, 3),
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        context_dim=192,
        camera_in="time+attention",
    ),
    vae=VAEConfig(
        block_out_channels=(128,),
        layers_per_block=1,
        latent_channels=24,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scale_factor=1.0,
        image_size=64,
        patch_size=8,
        decoder_width=160,
    ),
    text=TextConfig(
        width=192,
        n_layers=4,
        n_heads=3,
        mlp_width=768,
        skip_last=0,
        context_length=24,
        vocabulary="subset",
        vocabulary_size=2048,
    ),
    schedule=ScheduleConfig(prediction="v"),
    guidance=SamplingGuidance(scale=3.5, uncond_mode="2d"),
)
PIXELS = replace(
    MINI,
    name="pixels",
    guidance=SamplingGuidance(),
    text=replace(MINI.text, n_layers=3),
    unet=UNetConfig(
        in_channels=48,
        out_channels=48,
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        context_dim=192,
        camera_in="none",
        view_mixing="2d",
    ),
    vae=VAEConfig(
        kind="pixels", block_out_channels=(), latent_channels=48, scale_factor=1.0, image_size=64, patch_size=4
    ),
)
NAMED = {config.name: config for config in (SD21, SD15, MINI, PIXELS)}
