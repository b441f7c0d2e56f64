"""A model of ours of 0.2 MB, untrained, as a folder: for tests of files."""

from pathlib import Path

import torch

from mvdream_fast.checkpoints.manifest import PARTS, build
from mvdream_fast.checkpoints.open import Model, save_model
from mvdream_fast.models.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from mvdream_fast.models.tokenizer import Tokenizer, build_subset_vocabulary

VOCABULARY = build_subset_vocabulary(["a red chair"])
TINY = ModelConfig(
    name="tiny",
    unet=UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,),
                    num_head_channels=32, context_dim=32),
    vae=VAEConfig(block_out_channels=(32,), layers_per_block=1, mid_block_add_attention=False),
    text=TextConfig(width=32, n_layers=1, n_heads=1, mlp_width=32, skip_last=0, context_length=8,
                    vocabulary="subset", vocabulary_size=len(VOCABULARY)),
)  # fmt: skip


def write_tiny(folder: Path) -> Path:
    """Always the same numbers. Returns the folder."""
    torch.manual_seed(0)
    modules = {part: build(part, TINY) for part in PARTS}
    save_model(Model(TINY, tokenizer=Tokenizer(TINY.text, VOCABULARY), **modules), folder)
    return folder
