"""Whole models so small that a test can sample them, with random weights."""

from collections.abc import Callable
from dataclasses import replace

import torch

from mvdream_fast.checkpoints.manifest import PARTS, build
from mvdream_fast.checkpoints.open import Model, load_model
from mvdream_fast.models.config import PIXELS, SD21, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from mvdream_fast.models.tokenizer import Tokenizer, build_subset_vocabulary

CAPTIONS = ["a green chair, 3d asset", "a brown bulldog", "a red car"]
VOCABULARY = build_subset_vocabulary(CAPTIONS)
TINY = ModelConfig(
    name="tiny",
    unet=UNetConfig(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2),
        num_head_channels=16, context_dim=32, norm_groups=8,
    ),
    vae=VAEConfig(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
        image_size=16,
    ),
    text=TextConfig(
        width=32, n_layers=2, n_heads=2, mlp_width=64, skip_last=0, context_length=12, vocabulary="subset",
        vocabulary_size=len(VOCABULARY),
    ),
)  # fmt: skip
TINY_PIXELS = replace(
    TINY,
    unet=replace(TINY.unet, in_channels=48, out_channels=48, camera_in="none", view_mixing="2d"),
    vae=replace(PIXELS.vae, image_size=16),
)
ONE_LEVEL = replace(
    TINY,
    unet=replace(TINY.unet, channel_mult=(1,), attention_resolutions=(1,)),
    text=replace(TINY.text, n_layers=1),
)
# Stable Diffusion 2.1's layout, every layer of it, at a tenth of its widths.
NARROW_SD21 = replace(
    SD21,
    unet=replace(SD21.unet, model_channels=32, num_head_channels=16, context_dim=32, norm_groups=8),
    vae=replace(SD21.vae, block_out_channels=(8, 16, 32, 32), norm_num_groups=4, image_size=64),
    text=replace(TINY.text, n_layers=3, skip_last=1),
)


def random_model(seed: int = 0, prediction: str = "v", config: ModelConfig = TINY) -> Model:
    """Random weights in every layer, those that training would start from zero included."""
    config = replace(config, schedule=ScheduleConfig(prediction=prediction))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {part: build(part, config) for part in PARTS}
        with torch.no_grad():
            for parameter in (p for module in parts.values() for p in module.parameters() if not p.any()):
                parameter.normal_(std=0.05)
    return Model(config, **parts, tokenizer=Tokenizer(config.text, VOCABULARY))


MODELS: dict[str, Callable[[], Model]] = {  # what graphs are tested with
    "tiny": random_model,
    "narrow sd21": lambda: random_model(prediction="eps", config=NARROW_SD21),
    "embedded": lambda: load_model("embedded", torch.float32),
}
