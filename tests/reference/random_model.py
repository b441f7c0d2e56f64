"""A whole model so small that a test can sample it: 1 M random parameters, 16 x 16 pixels, two levels."""

import torch

from mvdream_fast.checkpoints.manifest import PARTS, build
from mvdream_fast.checkpoints.open import Model
from mvdream_fast.models.config import ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from mvdream_fast.models.tokenizer import Tokenizer, build_subset_vocabulary

CAPTIONS = ["a green chair, 3d asset", "a brown bulldog", "a red car"]


def random_model(seed: int = 0, prediction: str = "v") -> Model:
    """Random weights in every layer, those that training would start from zero included."""
    vocabulary = build_subset_vocabulary(CAPTIONS)
    config = ModelConfig(
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
            vocabulary_size=len(vocabulary),
        ),
        schedule=ScheduleConfig(prediction=prediction),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {part: build(part, config) for part in PARTS}
        with torch.no_grad():
            for parameter in (p for module in parts.values() for p in module.parameters() if not p.any()):
                parameter.normal_(std=0.05)
    return Model(config, **parts, tokenizer=Tokenizer(config.text, vocabulary))
