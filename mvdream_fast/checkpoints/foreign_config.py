"""The JSON files of a folder in diffusers' layout: every setting is applied, is what our model does, or is refused.

`hints_of` takes those that shapes cannot tell; `check_settings` compares all others with the recognised model. What
changes no number is in NO_EFFECT. Names are diffusers', transformers' and, for some ports' UNets, LDM's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvdream_fast.checkpoints.folder import read_json
from mvdream_fast.checkpoints.manifest import printable
from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from mvdream_fast.models.tokenizer import CLIP_ROWS

FILES = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    "special_tokens": "tokenizer/special_tokens_map.json",
    "camera": "camera_proj/config.json",
}
APPLIED = {
    "unet": {"num_heads", "num_head_channels", "attention_head_dim", "num_attention_heads", "norm_num_groups",
             "sample_size", "image_size"},
    "vae": {"norm_num_groups", "scaling_factor", "shift_factor"},
    "text": {"num_attention_heads", "hidden_act"},
    "scheduler": {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
                  "rescale_betas_zero_snr", "timestep_spacing", "steps_offset", "set_alpha_to_one"},
    "tokenizer": {"pad_token"},
    "special_tokens": {"pad_token"},
    "camera": set(),
}  # fmt: skip
_STORAGE = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version"}
# Training only, storage and memory only, an output that nobody asks for, what the tensors' names say, or an option of a
# solver: ours is DDIM.
NO_EFFECT = {
    "unet": {"dropout", "upcast_attention", "addition_embed_type_num_heads", "use_checkpoint", "use_fp16", "use_bf16",
             "legacy", "ip_weight", "num_frames", "attention_resolutions"},
    "vae": {"sample_size", "force_upcast"},
    "text": _STORAGE | {"attention_dropout", "dropout", "initializer_range", "initializer_factor", "projection_dim",
                        "pad_token_id", "bos_token_id", "eos_token_id", "output_hidden_states", "output_attentions",
                        "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"},
    "scheduler": {"skip_prk_steps", "variance_type", "solver_order", "algorithm_type", "solver_type",
                  "lower_order_final", "euler_at_final", "use_karras_sigmas", "use_exponential_sigmas",
                  "use_beta_sigmas", "use_lu_lambdas", "final_sigmas_type", "lambda_min_clipped", "interpolation_type",
                  "predict_x0", "disable_corrector", "solver_p", "dynamic_thresholding_ratio", "sample_max_value",
                  "clip_sample_range", "flow_shift", "time_shift_type", "noise_sampler_seed"},
    "tokenizer": {"tokenizer_class", "processor_class", "name_or_path", "special_tokens_map_file", "unk_token",
                  "clean_up_tokenization_spaces", "added_tokens_decoder", "backend", "is_local", "vocab", "merges"},
    "special_tokens": {"unk_token"},
    "camera": set(),
}  # fmt: skip
START, END = "<|startoftext|>", "<|endoftext|>"
SCHEDULES, SPACINGS = ("scaled_linear", "linear", "squaredcos_cap_v2"), ("leading", "linspace", "trailing")


@dataclass(frozen=True)
class Hints:
    """What shapes cannot tell, from the JSON files of a published folder; None where a file does not say."""

    num_heads: int | tuple[int, ...] | None = None  # of all levels of the UNet, or of each
    num_head_channels: int | None = None
    norm_groups: int | None = None
    latent_size: int | None = None
    vae_groups: int | None = None
    scale_factor: float | None = None
    shift_factor: float | None = None
    text_heads: int | None = None
    activation: str | None = None
    pad_id: int | None = None
    schedule: ScheduleConfig | None = None


@dataclass(frozen=True)
class Settings:
    """The JSON objects of a published folder by the keys of FILES; a missing file is an empty object."""

    source: Path
    objects: dict[str, dict] = field(default_factory=dict)

    @staticmethod
    def read(source: Path) -> "Settings":
        """Raises ModelError where a file is no JSON object."""
        return Settings(source, {kind: read_json(source / name) for kind, name in FILES.items()})

    def __getitem__(self, kind: str) -> dict:
        return self.objects[kind]

    def number(self, kind: str, name: str, default: float | None = None, whole: bool = False) -> Any:
        """A number, or the default where there is none."""
        value = self[kind].get(name)
        if value is not None and type(value) not in ((int,) if whole else (int, float)):
            raise self.refusal(kind, name, "a whole number" if whole else "a number")
        return default if value is None else value if whole else float(value)

    def word(self, kind: str, name: str, known: Mapping[str, Any], default: str | None = None) -> Any:
        """What a word means, or the default's meaning where there is none."""
        value = self[kind].get(name)
        value = default if value is None else value
        if value is not None and (not isinstance(value, str) or value not in known):
            raise self.refusal(kind, name, f"one of {', '.join(known)}")
        return None if value is None else known.get(value)

    def flag(self, kind: str, name: str, default: bool) -> bool:
        """A setting that is true or false."""
        value = self[kind].get(name, default)
        if not isinstance(value, bool):
            raise self.refusal(kind, name, "true or false")
        return value

    def refusal(self, kind: str, name: str, wanted: str) -> ModelError:
        """The error that names a setting, its file and what it would have to be."""
        got = printable(repr(self[kind].get(name)), 60)
        return ModelError(f"{self.source}/{FILES[kind]}: {name} must be {wanted}, got {got}; no other is supported")


def hints_of(settings: Settings) -> Hints:
    """Reads what shapes cannot tell. Raises ModelError."""
    heads, channels = _heads(settings)
    for name in ("use_quant_conv", "use_post_quant_conv"):  # said here, before their tensors are missed
        if settings["vae"].get(name) is False:
            raise settings.refusal("vae", name, "True")
    # transformers leaves out of a file what is the default of the class.
    text_heads, activation = (8, "quick_gelu") if settings["text"] else (None, None)
    return Hints(
        num_heads=heads,
        num_head_channels=channels,
        norm_groups=settings.number("unet", "norm_num_groups", whole=True),
        latent_size=_latent_size(settings),
        vae_groups=settings.number("vae", "norm_num_groups", whole=True),
        scale_factor=settings.number("vae", "scaling_factor"),
        shift_factor=settings.number("vae", "shift_factor"),
        text_heads=settings.number("text", "num_attention_heads", text_heads, whole=True),
        activation=settings.word("text", "hidden_act", {"gelu": "gelu", "quick_gelu": "quick_gelu"}, activation),
        pad_id=_pad_id(settings),
        schedule=schedule_of(settings) if settings["scheduler"] else None,
    )


def _heads(settings: Settings) -> tuple[int | tuple[int, ...] | None, int | None]:
    """Number of heads, and their width. diffusers calls the number attention_head_dim."""
    unet, names = settings["unet"], ("num_attention_heads", "attention_head_dim")
    name = next((name for name in names if unet.get(name) is not None), None)
    if name is None and unet.get("_class_name") == "UNet2DConditionModel":
        return 8, None
    if name is None:  # LDM's words; it writes -1 for "not set"
        found = (settings.number("unet", name, whole=True) for name in ("num_heads", "num_head_channels"))
        heads, width = (value if value and value > 0 else None for value in found)
        return heads, width
    if not isinstance(unet[name], list):
        return settings.number("unet", name, whole=True), None
    if not unet[name] or not all(type(n) is int and n > 0 for n in unet[name]):
        raise settings.refusal("unet", name, "a whole number, or one for each level")
    return tuple(unet[name]), None


def _latent_size(settings: Settings) -> int | None:
    sizes = (settings["unet"].get(name) for name in ("sample_size", "image_size"))
    size = next((size for size in sizes if size is not None), None)
    if size is not None and (type(size) is not int or size < 1):
        raise settings.refusal("unet", "sample_size" if "sample_size" in settings["unet"] else "image_size",
                               "a whole number over 0")  # fmt: skip
    return size


def _pad_id(settings: Settings) -> int | None:
    """What fills a prompt. SD 2.1's two files disagree; special_tokens_map.json says what it was trained with."""
    kind = "special_tokens" if "pad_token" in settings["special_tokens"] else "tokenizer"
    token = settings[kind].get("pad_token")
    if isinstance(token, dict):  # as transformers writes a token with its options
        settings = Settings(settings.source, {kind: {"pad_token": token.get("content")}})
    return settings.word(kind, "pad_token", {"!": 0, START: CLIP_ROWS - 2, END: CLIP_ROWS - 1})


def schedule_of(settings: Settings) -> ScheduleConfig:
    """What DDIMScheduler.from_config would make of any scheduler's settings.

    Where an old file does not say, the offset is 1 and nothing is clipped, as the pipelines of diffusers see to.
    """
    data = settings["scheduler"]
    kind, betas = str(data.get("_class_name", "DDIMScheduler")), data.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and all(type(beta) in (int, float) for beta in betas)):
        raise settings.refusal("scheduler", "trained_betas", "a list of numbers")
    of_sd = kind.startswith(("Heun", "KDPM2", "DPMSolverSDE"))  # their default betas are Stable Diffusion's
    leading = kind in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverSinglestepScheduler")
    predictions = {"epsilon": "eps", "v_prediction": "v"}
    schedules, spacings = ({word: word for word in words} for words in (SCHEDULES, SPACINGS))
    return ScheduleConfig(
        n_timesteps=settings.number("scheduler", "num_train_timesteps", 1000, whole=True),
        linear_start=settings.number("scheduler", "beta_start", 0.00085 if of_sd else 0.0001),
        linear_end=settings.number("scheduler", "beta_end", 0.012 if of_sd else 0.02),
        prediction=settings.word("scheduler", "prediction_type", predictions, "epsilon"),
        beta_schedule="linear" if betas else settings.word("scheduler", "beta_schedule", schedules, "linear"),
        trained_betas=None if betas is None else tuple(map(float, betas)),
        rescale_betas_zero_snr=settings.flag("scheduler", "rescale_betas_zero_snr", False),
        timestep_spacing=settings.word("scheduler", "timestep_spacing", spacings, SPACINGS[not leading]),
        steps_offset=settings.number("scheduler", "steps_offset", 1, whole=True),
        set_alpha_to_one=settings.flag("scheduler", "set_alpha_to_one", kind != "PNDMScheduler"),
    )


def check_settings(settings: Settings, config: ModelConfig) -> None:
    """Raises ModelError for the first setting that is neither applied nor what the recognised model computes anyway.

    A setting that the model has no word for must be unset: null, false, zero or empty.
    """
    wanted = implied(config)
    for kind in FILES:
        for name, value in settings[kind].items():
            if name.startswith("_") or name in APPLIED[kind] | NO_EFFECT[kind] or value is None:
                continue
            if name in wanted[kind]:
                if not _same(value, wanted[kind][name]):
                    raise settings.refusal(kind, name, printable(repr(wanted[kind][name])))
            elif value and value != -1:  # LDM's "not set"
                raise settings.refusal(kind, name, "unset or false")


def _same(value: Any, wanted: Any) -> bool:
    """Equal, or a list that says the same number for each level; a token may come with its options."""
    if isinstance(value, dict):
        value = value.get("content")
    if isinstance(value, list) and not isinstance(wanted, list):
        return bool(value) and all(_same(item, wanted) for item in value)
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def implied(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """By the keys of FILES, what settings must be where they are set and a model of ours leaves no choice."""
    text = config.text
    tokens = {"bos_token": START, "eos_token": END}
    return {
        "unet": _implied_unet(config.unet),
        "vae": _implied_vae(config.vae),
        "text": {
            "vocab_size": text.vocabulary_size,
            "hidden_size": text.width,
            "intermediate_size": text.mlp_width,
            "num_hidden_layers": text.n_layers - text.skip_last,
            "max_position_embeddings": text.context_length,
            "layer_norm_eps": 1e-5,
        },
        "scheduler": {"timestep_type": "discrete"},
        "tokenizer": {**tokens, "model_max_length": text.context_length, "do_lower_case": True, "errors": "replace",
                      "padding_side": "right", "truncation_side": "right"},
        "special_tokens": tokens,
        "camera": {"in_channels": config.unet.camera_dim, "camera_embed_dim": config.unet.time_embed_dim,
                   "out_dim": config.unet.time_embed_dim, "act_fn": "silu"},
    }  # fmt: skip


def _implied_unet(unet: UNetConfig) -> dict[str, Any]:
    attends = [2**level in unet.attention_resolutions for level in range(len(unet.channel_mult))]
    diffusers = {
        "block_out_channels": [unet.model_channels * m for m in unet.channel_mult],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "layers_per_block": unet.num_res_blocks,
        "cross_attention_dim": unet.context_dim,
        "use_linear_projection": unet.use_linear_in_transformer,
        "transformer_layers_per_block": 1,
        "time_embedding_dim": unet.time_embed_dim,
        "time_embedding_type": "positional",
        "flip_sin_to_cos": True,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "default",
        "resnet_out_scale_factor": 1,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
    }
    ldm = {
        "model_channels": unet.model_channels,
        "channel_mult": list(unet.channel_mult),
        "num_res_blocks": unet.num_res_blocks,
        "context_dim": unet.context_dim,
        "camera_dim": unet.camera_dim,
        "use_linear_in_transformer": unet.use_linear_in_transformer,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "conv_resample": True,
        "dims": 2,
        "num_heads_upsample": unet.num_heads or -1,
    }
    return {"in_channels": unet.in_channels, "out_channels": unet.out_channels, **diffusers, **ldm}


def _implied_vae(vae: VAEConfig) -> dict[str, Any]:
    n_levels = len(vae.block_out_channels)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * n_levels,
        "up_block_types": ["UpDecoderBlock2D"] * n_levels,
        "block_out_channels": list(vae.block_out_channels),
        "layers_per_block": vae.layers_per_block,
        "latent_channels": vae.latent_channels,
        "mid_block_add_attention": vae.mid_block_add_attention,
        "act_fn": "silu",
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }
