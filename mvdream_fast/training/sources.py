"""What the steps of a run draw their batches from: images or cached latents of renders, and pictures beside them."""

import hashlib
from pathlib import Path

from torch import Tensor

from mvdream_fast.data.batches import ImageSource, LatentSource, Shards, Source, WithPictures
from mvdream_fast.models.config import ModelConfig
from mvdream_fast.models.vae import VAE
from mvdream_fast.training.unet import Parts


def mixed_source(cache: Path | None, parts: Parts, shards: Shards, pictures: Shards | None, workers: int) -> Source:
    """What the steps draw: renders, and pictures for some of the 2D ones."""

    def of(name: str, kind: Shards) -> Source:
        source = source_of(cache and Path(f"{cache}{name}"), parts.config, parts.vae, kind)
        if workers and isinstance(source, LatentSource):
            source.fill(workers)  # what draws batches cannot encode on a GPU
        return source

    return of("", shards) if pictures is None else WithPictures(of("", shards), of("-pictures", pictures))


def source_of(cache: Path | None, config: ModelConfig, autoencoder: VAE, shards: Shards) -> Source:
    """Latents from a cache, or where there is none images that the trainer encodes."""
    vae = config.vae
    shards = shards.at(vae.image_size)
    if cache is None:
        return ImageSource(shards)
    device = next(autoencoder.parameters()).device
    digest = hashlib.blake2b(digest_size=16)
    for tensor in autoencoder.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    for record in shards.records:
        digest.update(f"{record.meta['key']} {record.size}".encode())

    def encode(images: Tensor) -> Tensor:
        return autoencoder.encode(images.to(device))

    size = config.latent_size
    return LatentSource(shards, encode, cache, (vae.latent_channels, size, size), digest.hexdigest())
