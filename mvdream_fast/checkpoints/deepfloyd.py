"""DeepFloyd IF's folders in diffusers' layout: what their JSON files say, as a configuration, and their tensors' names.

Their networks are diffusers' and transformers' own, so every setting is either one that our configuration has a word
for, or must be what all three sizes have in common.
"""

import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mvdream_fast.checkpoints.foreign_config import FILES, Settings, schedule_of
from mvdream_fast.checkpoints.layouts import PartLayout, Slot, layout
from mvdream_fast.checkpoints.manifest import manifest, printable
from mvdream_fast.checkpoints.places import WHERE_IF
from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from mvdream_fast.models.deepfloyd import unet_settings
from mvdream_fast.models.t5 import t5_settings

SIZES = {704: "IF-I-XL", 320: "IF-I-L", 192: "IF-I-M"}  # by the width of the first level
LENGTH = 77  # tokens of a prompt that IF was trained with
# Training only, memory only, or of no meaning to a network of these blocks.
_NO_EFFECT = {"dropout", "upcast_attention", "sample_size", "downsample_padding", "attention_type"}


def configuration(folder: Path) -> ModelConfig:
    """What a folder's JSON files describe.

    Raises: ModelError for a file that is missing, a setting that IF's first stage has not, and parts that do not fit
        each other.
    """
    settings = Settings.read(folder)
    for kind in ("unet", "text", "scheduler"):
        if not settings[kind]:
            raise ModelError(f"{folder} is no whole DeepFloyd IF model: {FILES[kind]} is missing. {WHERE_IF}")
    unet, text = _unet(folder, settings), _text(folder, settings)
    if unet.context_dim != text.width:
        raise ModelError(
            f"{folder}: text_encoder gives states of {text.width} numbers and unet takes {unet.context_dim} "
            f"(encoder_hid_dim); they are of different models. {WHERE_IF}"
        )
    size = settings.number("unet", "sample_size", 64, whole=True)
    return ModelConfig(
        name=SIZES.get(unet.model_channels, "deepfloyd-if"),
        unet=unet,
        vae=VAEConfig(kind="pixels", block_out_channels=(), latent_channels=3, scale_factor=1.0, image_size=size),
        text=text,
        schedule=_schedule(settings),
    )


def _schedule(settings: Settings) -> ScheduleConfig:
    """With the threshold that keeps a sampler's guesses in range; one without is a threshold of 1 for all values."""
    dynamic = settings.flag("scheduler", "thresholding", False)
    clips = dynamic or settings.flag("scheduler", "clip_sample", True)
    share = settings.number("scheduler", "dynamic_thresholding_ratio", 0.995) if dynamic else 1.0
    return replace(
        schedule_of(settings),
        steps_offset=settings.number("scheduler", "steps_offset", 0, whole=True),
        threshold=share if clips else None,
        threshold_max=settings.number("scheduler", "sample_max_value", 1.0) if dynamic else 1.0,
    )


def _unet(folder: Path, settings: Settings) -> UNetConfig:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    name, parameters = f"{folder}/{FILES['unet']}", inspect.signature(UNet2DConditionModel.__init__).parameters
    usual = {n: p.default for n, p in parameters.items() if n != "self"}
    said = usual | {n: v for n, v in settings["unet"].items() if v is not None and not n.startswith("_")}
    if said["encoder_hid_dim_type"] is None:  # as in files from before diffusers 0.18
        said["encoder_hid_dim_type"] = "text_proj"
    widths, kinds = said["block_out_channels"], said["down_block_types"]
    for n in ("layers_per_block", "attention_head_dim", "norm_num_groups", "encoder_hid_dim"):
        if type(said[n]) is not int:
            raise _refusal(name, n, "a whole number", said[n])
    if not (isinstance(widths, list) and widths and isinstance(kinds, list) and len(kinds) == len(widths)):
        raise _refusal(name, "block_out_channels", "a list as long as down_block_types", widths)
    if not all(type(w) is int and w > 0 and w % widths[0] == 0 for w in widths):
        raise _refusal(name, "block_out_channels", "whole numbers, multiples of the first", widths)
    config = UNetConfig(
        kind="deepfloyd",
        in_channels=3,
        out_channels=3,
        model_channels=widths[0],
        channel_mult=tuple(w // widths[0] for w in widths),
        num_res_blocks=said["layers_per_block"],
        attention_resolutions=tuple(2**i for i, kind in enumerate(kinds) if kind == "SimpleCrossAttnDownBlock2D"),
        num_head_channels=said["attention_head_dim"],
        context_dim=said["encoder_hid_dim"],
        camera_in="none",
        view_mixing="2d",
        norm_groups=said["norm_num_groups"],
    )
    _compare(name, said, usual | unet_settings(config))
    return config


def _text(folder: Path, settings: Settings) -> TextConfig:
    from transformers.models.t5.configuration_t5 import T5Config

    name = f"{folder}/{FILES['text']}"
    theirs = {"vocabulary_size": "vocab_size", "width": "d_model", "mlp_width": "d_ff", "n_layers": "num_layers",
              "n_heads": "num_heads"}  # fmt: skip
    said: dict[str, Any] = {f.name: f.default for f in fields(T5Config)} | settings["text"]
    if said.get("model_type") != "t5":
        raise ModelError(f"{name}: model_type must be t5, got {said.get('model_type')!r}. {WHERE_IF}")
    sizes = {ours: said[setting] for ours, setting in theirs.items()}
    for ours, size in sizes.items():
        if type(size) is not int or size < 1:
            raise _refusal(name, theirs[ours], "a whole number over 0", size)
    config = TextConfig(kind="t5", skip_last=0, context_length=LENGTH, **sizes)
    wanted = t5_settings(config)
    _compare(name, {n: said[n] for n in wanted}, wanted)
    return config


def _compare(name: str, said: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ModelError for the first setting that is not what our network computes."""
    for setting, value in said.items():
        expected, given = (list(x) if isinstance(x, tuple) else x for x in (wanted.get(setting), value))
        if setting not in _NO_EFFECT and given != expected:
            raise _refusal(name, setting, repr(expected), value)


def _refusal(name: str, setting: str, wanted: str, got: object) -> ModelError:
    return ModelError(
        f"{name}: {setting} must be {wanted}, got {printable(repr(got), 60)}; only IF's first stage is supported"
    )


def part_layout(part: str, config: ModelConfig) -> PartLayout:
    """A folder's tensors: diffusers' and transformers' own names, of which ours are the inner part."""
    ours = manifest(part, config)
    if part != "text":
        return layout(ours, Slot)
    # The embedding lies there under its own name, and in some files under the encoder's, too.
    table, twin = "embed_tokens.weight", "encoder.embed_tokens.weight"
    return layout(ours, lambda name: Slot("shared.weight" if name == table else f"encoder.{name}"), (twin,))
