"""DeepFloyd IF's first stage at reduced width: folders that diffusers and transformers write themselves."""

import json
from functools import cache
from io import BytesIO
from pathlib import Path

import sentencepiece
import torch
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

WIDTH = 64  # of the text tower, whose 64 heads of pooling then have one channel each
CAPTIONS = [
    "a green armchair", "a brown bulldog with a red collar", "an astronaut riding a horse", "a photo of a hamburger",
    "the front view of a wooden chair, 3d asset", "a DSLR photograph of a peacock on a surfboard, side view",
]  # fmt: skip
LARGEST = {  # of the real config.json's settings; see unet_settings
    "sample_size": 64, "in_channels": 3, "out_channels": 6, "block_out_channels": [704, 1408, 2112, 2816],
    "cross_attention_dim": 2816, "layers_per_block": 3, "attention_head_dim": 64, "encoder_hid_dim": 4096,
}  # fmt: skip


def unet(**changes) -> UNet2DConditionModel:
    """Four levels like the real one's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = UNet2DConditionModel(**{
            "sample_size": 16, "in_channels": 3, "out_channels": 6, "block_out_channels": (32, 64, 96, 128),
            "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
            "layers_per_block": 1, "cross_attention_dim": 128, "encoder_hid_dim": WIDTH, "attention_head_dim": 16,
            "addition_embed_type": "text", "cross_attention_norm": "group_norm", "act_fn": "gelu",
            "resnet_time_scale_shift": "scale_shift",
        } | changes)  # fmt: skip
    return made.eval()


def text_encoder(width: int = WIDTH) -> T5EncoderModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = T5Config(
            vocab_size=320, d_model=width, d_kv=16, d_ff=96, num_layers=2, num_heads=width // 16,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False,
        )  # fmt: skip
        return T5EncoderModel(config).eval()


@cache
def spiece() -> bytes:
    """A small vocabulary with T5's settings."""
    made = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([c.lower() for c in CAPTIONS] * 20), model_writer=made, vocab_size=80, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, model_type="unigram", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


def write_tokenizer(folder: Path) -> T5Tokenizer:
    """The files of the real repository: no tokenizer.json."""
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(spiece())
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**tokens, "extra_ids": 100, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"})
    )
    return T5Tokenizer.from_pretrained(folder)


def write_folder(folder: Path, width: int = WIDTH, **save) -> IFPipeline:
    """A folder as `IFPipeline.save_pretrained` leaves it, and the pipeline."""
    scheduler = DDPMScheduler(
        variance_type="learned_range", beta_schedule="squaredcos_cap_v2", prediction_type="epsilon",
        thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5,
    )  # fmt: skip
    pipeline = IFPipeline(
        tokenizer=write_tokenizer(folder / "tokenizer"), text_encoder=text_encoder(width), unet=unet(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, watermarker=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, **save)
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer" / "spiece.model").write_bytes(spiece())
    return pipeline
