"""Tensor names and shapes of the published MVDream files, written out from the architecture, and files full of random
numbers in those layouts. Knows nothing of the code under test.
"""

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# scheduler_config.json of the ports; Stable Diffusion 2.1's says the same in other words.
SCHEDULER = {
    "_class_name": "DDIMScheduler", "_diffusers_version": "0.19.3", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": False, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0, "set_alpha_to_one": False, "steps_offset": 1, "thresholding": False,
    "timestep_spacing": "leading", "trained_betas": None,
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """The defaults are the released sd-v2.1-base-4view.pt."""

    width: int = 320
    mult: tuple[int, ...] = (1, 2, 4, 4)
    n_res: int = 2
    n_attention_levels: int = 3
    context: int = 1024
    linear: bool = True
    vae_width: int = 128
    vae_mult: tuple[int, ...] = (1, 2, 4, 4)
    text_layers: int = 24
    text_mlp: int = 4096
    vocabulary: int = 49408
    text: str = "open_clip"


SD21 = Size()
SD15 = Size(context=768, linear=False, text_layers=12, text_mlp=3072, text="transformers")
NARROW = {"width": 64, "mult": (1, 2), "n_res": 1, "n_attention_levels": 2, "context": 64, "vae_width": 32}
NARROW |= {"vae_mult": (1, 2), "text_mlp": 128}
NARROW21 = Size(**NARROW, text_layers=3)
NARROW15 = Size(**NARROW, text_layers=2, linear=False, text="transformers")


def _norm(name: str, c: int) -> Shapes:
    return {f"{name}.weight": (c,), f"{name}.bias": (c,)}


def _linear(name: str, i: int, o: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (o, i)} | ({f"{name}.bias": (o,)} if bias else {})


def _conv(name: str, i: int, o: int, k: int) -> Shapes:
    return {f"{name}.weight": (o, i, k, k), f"{name}.bias": (o,)}


def unet(size: Size) -> Shapes:
    """Without the prefix model.diffusion_model."""
    emb = 4 * size.width

    def res(name: str, i: int, o: int) -> Shapes:
        shapes = _norm(f"{name}.in_layers.0", i) | _conv(f"{name}.in_layers.2", i, o, 3)
        shapes |= _linear(f"{name}.emb_layers.1", emb, o)
        shapes |= _norm(f"{name}.out_layers.0", o) | _conv(f"{name}.out_layers.3", o, o, 3)
        return shapes | (_conv(f"{name}.skip_connection", i, o, 1) if i != o else {})

    def transformer(name: str, c: int) -> Shapes:
        def project(end: str) -> Shapes:
            return _linear(f"{name}.{end}", c, c) if size.linear else _conv(f"{name}.{end}", c, c, 1)

        block = f"{name}.transformer_blocks.0"
        shapes = _norm(f"{name}.norm", c) | project("proj_in") | project("proj_out")
        for attention, width in (("attn1", c), ("attn2", size.context)):
            shapes |= _linear(f"{block}.{attention}.to_q", c, c, False)
            shapes |= _linear(f"{block}.{attention}.to_k", width, c, False)
            shapes |= _linear(f"{block}.{attention}.to_v", width, c, False)
            shapes |= _linear(f"{block}.{attention}.to_out.0", c, c)
        shapes |= _linear(f"{block}.ff.net.0.proj", c, 8 * c) | _linear(f"{block}.ff.net.2", 4 * c, c)
        return shapes | _norm(f"{block}.norm1", c) | _norm(f"{block}.norm2", c) | _norm(f"{block}.norm3", c)

    shapes = _linear("time_embed.0", size.width, emb) | _linear("time_embed.2", emb, emb)
    shapes |= _linear("camera_embed.0", 16, emb) | _linear("camera_embed.2", emb, emb)
    shapes |= _conv("input_blocks.0.0", 4, size.width, 3)
    c, skips, i = size.width, [size.width], 1
    for level, m in enumerate(size.mult):
        for _ in range(size.n_res):
            shapes |= res(f"input_blocks.{i}.0", c, m * size.width)
            c = m * size.width
            if level < size.n_attention_levels:
                shapes |= transformer(f"input_blocks.{i}.1", c)
            skips.append(c)
            i += 1
        if level < len(size.mult) - 1:
            shapes |= _conv(f"input_blocks.{i}.0.op", c, c, 3)
            skips.append(c)
            i += 1
    shapes |= res("middle_block.0", c, c) | transformer("middle_block.1", c) | res("middle_block.2", c, c)
    i = 0
    for level, m in reversed(list(enumerate(size.mult))):
        for j in range(size.n_res + 1):
            shapes |= res(f"output_blocks.{i}.0", c + skips.pop(), m * size.width)
            c = m * size.width
            if level < size.n_attention_levels:
                shapes |= transformer(f"output_blocks.{i}.1", c)
            if level > 0 and j == size.n_res:
                place = 2 if level < size.n_attention_levels else 1
                shapes |= _conv(f"output_blocks.{i}.{place}.conv", c, c, 3)
            i += 1
    return shapes | _norm("out.0", c) | _conv("out.2", c, 4, 3)


def vae(size: Size) -> Shapes:
    """LDM's AutoencoderKL, without the prefix first_stage_model."""
    levels = [size.vae_width * m for m in size.vae_mult]

    def res(name: str, i: int, o: int) -> Shapes:
        shapes = _norm(f"{name}.norm1", i) | _conv(f"{name}.conv1", i, o, 3)
        shapes |= _norm(f"{name}.norm2", o) | _conv(f"{name}.conv2", o, o, 3)
        return shapes | (_conv(f"{name}.nin_shortcut", i, o, 1) if i != o else {})

    def middle(name: str, c: int) -> Shapes:
        shapes = res(f"{name}.block_1", c, c) | res(f"{name}.block_2", c, c) | _norm(f"{name}.attn_1.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            shapes |= _conv(f"{name}.attn_1.{part}", c, c, 1)
        return shapes

    shapes, c = _conv("encoder.conv_in", 3, levels[0], 3), levels[0]
    for level, width in enumerate(levels):
        for block in range(2):
            shapes |= res(f"encoder.down.{level}.block.{block}", c, width)
            c = width
        if level < len(levels) - 1:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", c, c, 3)
    shapes |= middle("encoder.mid", c) | _norm("encoder.norm_out", c) | _conv("encoder.conv_out", c, 8, 3)
    shapes |= _conv("quant_conv", 8, 8, 1) | _conv("post_quant_conv", 4, 4, 1)
    shapes |= _conv("decoder.conv_in", 4, c, 3) | middle("decoder.mid", c)
    for level, width in reversed(list(enumerate(levels))):
        for block in range(3):
            shapes |= res(f"decoder.up.{level}.block.{block}", c, width)
            c = width
        if level > 0:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv", c, c, 3)
    return shapes | _norm("decoder.norm_out", c) | _conv("decoder.conv_out", c, 3, 3)


def open_clip(size: Size) -> Shapes:
    """open_clip's text transformer, without the prefix cond_stage_model.model."""
    c = size.context
    shapes: Shapes = {"token_embedding.weight": (size.vocabulary, c), "positional_embedding": (77, c)}
    for i in range(size.text_layers):
        block = f"transformer.resblocks.{i}"
        shapes |= _norm(f"{block}.ln_1", c) | _norm(f"{block}.ln_2", c)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * c, c), f"{block}.attn.in_proj_bias": (3 * c,)}
        shapes |= _linear(f"{block}.attn.out_proj", c, c)
        shapes |= _linear(f"{block}.mlp.c_fc", c, size.text_mlp) | _linear(f"{block}.mlp.c_proj", size.text_mlp, c)
    return shapes | _norm("ln_final", c) | {"text_projection": (c, c), "logit_scale": ()}


def clip_text(size: Size) -> Shapes:
    """transformers' CLIPTextModel as published, with its text_model. prefix."""
    c = size.context
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (size.vocabulary, c),
        "embeddings.position_embedding.weight": (77, c),
    }
    for i in range(size.text_layers):
        layer = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{part}", c, c)
        shapes |= _norm(f"{layer}.layer_norm1", c) | _norm(f"{layer}.layer_norm2", c)
        shapes |= _linear(f"{layer}.mlp.fc1", c, size.text_mlp) | _linear(f"{layer}.mlp.fc2", size.text_mlp, c)
    return {f"text_model.{name}": shape for name, shape in (shapes | _norm("final_layer_norm", c)).items()}


def schedule(n: int = 1000) -> dict[str, Tensor]:
    """The twelve buffers of LDM's DDPM, computed in float64 and stored in float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, n, dtype=torch.float64) ** 2
    bar = (1 - betas).cumprod(0)
    prev = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    variance = betas * (1 - prev) / (1 - bar)
    buffers = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": prev,
        "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * prev.sqrt() / (1 - bar),
        "posterior_mean_coef2": (1 - prev) * (1 - betas).sqrt() / (1 - bar),
    }
    return {name: value.float() for name, value in buffers.items()}


def flat_shapes(size: Size) -> Shapes:
    """Every name of a released .pt but the schedule's."""
    text, prefix = (open_clip, "model.") if size.text == "open_clip" else (clip_text, "transformer.")
    return {
        **{f"model.diffusion_model.{name}": shape for name, shape in unet(size).items()},
        **{f"first_stage_model.{name}": shape for name, shape in vae(size).items()},
        **{f"cond_stage_model.{prefix}{name}": shape for name, shape in text(size).items()},
    }


def random(shapes: Shapes, seed: int = 0) -> "OrderedDict[str, Tensor]":
    """Numbers that keep activations of order one: scaled by fan-in, norms about one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = OrderedDict()
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        fan_in = x[0].numel() if x.ndim > 1 else 1
        if name.endswith("bias"):
            x = 0.1 * x
        elif x.ndim <= 1:
            x = 1 + 0.1 * x
        else:
            x = x * (0.1 if "embedding" in name else fan_in**-0.5)
        tensors[name] = x
    return tensors


def flat(size: Size, seed: int = 0) -> "OrderedDict[str, Tensor]":
    """The dictionary of a released .pt; SD 1.5's older ones also carry position ids."""
    tensors = random(flat_shapes(size), seed)
    if size.text == "transformers":
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return OrderedDict(**schedule(), **tensors)


def write_published(
    folder: Path, size: Size, dtype: torch.dtype = torch.float16, text_prefix: str = "text_model."
) -> dict:
    """A diffusers-layout folder; UNet and text tower in the published names, the VAE written by diffusers itself.

    Returns the tensors of the three parts by the names in the files.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from safetensors.torch import load_file, save_file

    levels = tuple(size.vae_width * m for m in size.vae_mult)
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * len(levels),
        block_out_channels=levels,
        layers_per_block=2,
        sample_size=256,
    ).to(dtype).save_pretrained(folder / "vae")
    parts = {"vae": load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")}
    parts["unet"] = {name: x.to(dtype) for name, x in random(unet(size)).items()}
    text = {name.replace("text_model.", text_prefix, 1): x.to(dtype) for name, x in random(clip_text(size)).items()}
    parts["text_encoder"] = text
    configs = {
        "unet": {"_class_name": "MultiViewUNetModel", "num_heads": -1, "num_head_channels": 64},
        "text_encoder": {"hidden_act": "gelu", "num_attention_heads": 1},
        "scheduler": SCHEDULER,
    }
    for name, config in configs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(config))
    save_file(parts["unet"], folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(parts["text_encoder"], folder / "text_encoder" / "model.safetensors")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "MVDreamPipeline"}))
    return parts
