"""What the steps of a run draw their batches from: images or cached latents of renders, and pictures beside them."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from mvdream_fast.data.batches import ImageSource, LatentSource, Shards, Side, Source
from mvdream_fast.data.pictures import WithPictures
from mvdream_fast.guidance.prompts import VIEW_WORDS, view_words
from mvdream_fast.models.config import ModelConfig
from mvdream_fast.models.pixels import Codec
from mvdream_fast.training.unet import Parts


def side_words(c2w: Tensor) -> list[str]:
    """Of each camera [n, 4, 4], the words that a prompt has for it."""
    return [VIEW_WORDS[row] for row in view_words(c2w).tolist()]


def mixed_source(
    cache: Path | None, parts: Parts, shards: Shards, pictures: Shards | None, workers: int, sides: bool = False
) -> Source:
    """What the steps draw: renders, and pictures for some of the 2D ones. sides: tell single views theirs."""
    device = next(parts.unet.parameters()).device

    def of(name: str, kind: Shards, side: Side | None) -> Source:
        source = source_of(cache and Path(f"{cache}{name}"), parts.config, parts.vae, kind, device, side)
        if workers and isinstance(source, LatentSource):
            source.fill(workers)  # what draws batches cannot encode on a GPU
        return source

    renders = of("", shards, side_words if sides else None)
    return renders if pictures is None else WithPictures(renders, of("-pictures", pictures, None))


def source_of(
    cache: Path | None, config: ModelConfig, autoencoder: Codec, shards: Shards, device: torch.device,
    side: Side | None = None,
) -> Source:  # fmt: skip
    """Latents from a cache, or where there is none images that the trainer encodes. side: as `ImageSource`'s."""
    vae = config.vae
    shards = shards.at(vae.image_size)
    if cache is None:
        return ImageSource(shards, side)
    digest = hashlib.blake2b(digest_size=16)
    for tensor in autoencoder.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    for record in shards.records:
        digest.update(f"{record.meta['key']} {record.size}".encode())

    def encode(images: Tensor) -> Tensor:
        return autoencoder.encode(images.to(device))

    size = config.latent_size
    return LatentSource(shards, encode, cache, (vae.latent_channels, size, size), digest.hexdigest(), side)
