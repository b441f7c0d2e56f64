"""Stable Diffusion at reduced width: its own flat file, and the same numbers saved by diffusers and transformers."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from reference import upstream
from reference.diffusers_unet import diffusers_unet, load_ldm
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from mvdream_fast.models.config import SD15, SD21, UNetConfig

SIZES = {"open_clip": upstream.NARROW21, "transformers": upstream.NARROW15}
UNET, TEXT = "model.diffusion_model.", "cond_stage_model."


def flat(kind: str = "open_clip") -> dict[str, Tensor]:
    """A file as Stable Diffusion's own: no camera layers, and a second set of weights that nothing reads."""
    tensors = {name: x for name, x in upstream.flat(SIZES[kind]).items() if "camera_embed" not in name}
    return tensors | {"model_ema.decay": torch.zeros(())}


def write_folder(folder: Path, kind: str = "open_clip", **scheduler) -> None:
    """The same numbers as `flat` in diffusers' layout, written by diffusers and transformers themselves."""
    tensors, size = flat(kind), SIZES[kind]
    _unet(tensors, size).save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64), layers_per_block=2, sample_size=768,
    )  # fmt: skip
    vae.load_state_dict(convert_ldm_vae_checkpoint(tensors, vae.config))
    vae.save_pretrained(folder / "vae")
    _text(tensors, size).save_pretrained(folder / "text_encoder")
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    settings |= {"set_alpha_to_one": False, "steps_offset": 1, **scheduler}
    DDIMScheduler(**settings).save_pretrained(folder / "scheduler")


def _unet(tensors: dict[str, Tensor], size: upstream.Size) -> torch.nn.Module:
    known = (SD21 if size.linear else SD15).unet
    config = UNetConfig(
        model_channels=size.width, channel_mult=size.mult, num_res_blocks=size.n_res, attention_resolutions=(2, 1),
        num_heads=known.num_heads, num_head_channels=known.num_head_channels, context_dim=size.context,
        use_linear_in_transformer=size.linear,
    )  # fmt: skip
    unet = diffusers_unet(config, latent_size=96)
    load_ldm(unet, {n.removeprefix(UNET): x for n, x in tensors.items() if n.startswith(UNET)}, config)
    return unet


def _text(tensors: dict[str, Tensor], size: upstream.Size) -> CLIPTextModel:
    """transformers' tower; of open_clip's without the last layer, which is how Stable Diffusion 2 is published."""
    n_layers = size.text_layers - (size.text == "open_clip")
    tower = CLIPTextModel(CLIPTextConfig(
        hidden_size=size.context, intermediate_size=size.text_mlp, num_hidden_layers=n_layers, projection_dim=512,
        num_attention_heads=1, hidden_act="gelu" if size.text == "open_clip" else "quick_gelu",
    ))  # fmt: skip
    if size.text == "transformers":
        prefix = TEXT + "transformer.text_model."
        stored = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        tower.load_state_dict({name: x for name, x in stored.items() if not name.endswith("position_ids")})
        return tower
    theirs = {n.removeprefix(TEXT + "model."): x for n, x in tensors.items() if n.startswith(TEXT)}
    state = {
        "embeddings.token_embedding.weight": theirs["token_embedding.weight"],
        "embeddings.position_embedding.weight": theirs["positional_embedding"],
        "final_layer_norm.weight": theirs["ln_final.weight"],
        "final_layer_norm.bias": theirs["ln_final.bias"],
    }
    modules = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    modules |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for i in range(n_layers):
        old, new = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for end in ("weight", "bias"):
            state |= {f"{new}.{b}.{end}": theirs[f"{old}.{a}.{end}"] for a, b in modules.items()}
            pieces = theirs[f"{old}.attn.in_proj_{end}"].chunk(3)
            state |= {f"{new}.self_attn.{letter}_proj.{end}": x for letter, x in zip("qkv", pieces)}
    tower.load_state_dict(state)
    return tower


def write_flat(path: Path, kind: str = "open_clip") -> Path:
    save_file(flat(kind), path)
    return path
