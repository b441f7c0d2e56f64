"""A trained model with more latent channels, which hold what its autoencoder leaves: detail.

    python examples/widen_latents.py MODEL SHARDS -o OUT [--channels 40]

The new channels are linear: the principal components of what the other channels don't tell of a cell's pixels.
Everything is found in closed form, and what the model knows stays: its UNet says of the old channels what it
said, and of the new ones what is best where nothing is known but their variance (a multiple of the noisy input, which
depends on the time). `train --init OUT` teaches it the detail; what tells things from backgrounds (`train --stage
matting`) was trained on another decoder's images, and wants to be trained again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.camera import get_camera
from mvdream_fast.checkpoints.manifest import build, owner
from mvdream_fast.checkpoints.open import Model, load_model, save_model
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import ImageSource, Shards
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.models.unet import MultiViewUNet
from mvdream_fast.models.vae import VAE
from mvdream_fast.ops import camera_embedding
from mvdream_fast.ops.time_camera_embedding import MLP, sinusoid
from mvdream_fast.training.vae import Linear, reconstruction

N_FIT, N_CHECK = 2048, 256  # images that the components are of, and others


def rows_of(images: Tensor) -> Tensor:
    """[B, C, h, w] -> [B h w, C], in double precision."""
    return images.movedim(1, -1).flatten(0, 2).double()


def regression(known: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix [wanted, known] and the offset [wanted] of the least squared error; rows are samples."""
    middle, target = known.mean(0), wanted.mean(0)
    matrix = torch.linalg.lstsq(known - middle, wanted - target, rcond=1e-5, driver="gelsd").solution.T
    return matrix, target - matrix @ middle


def widened(name: str, old: Tensor, shape: torch.Size) -> Tensor:
    """A weight of the old model in its new shape: zero for the new channels, which come last."""
    new = old.new_zeros(shape)
    if name == "decoder.cleaner.conv_in.weight":  # three times the channels, each behind the other
        for mine, other in zip(new.chunk(3, dim=1), old.chunk(3, dim=1)):
            mine[:, : other.shape[1]] = other
    else:
        new[tuple(slice(0, n) for n in old.shape)] = old
    return new


def with_channels(model: Model, n: int) -> Model:
    """The model with n more latent channels that are nothing as yet."""
    unet, vae = model.config.unet, model.config.vae
    channels = vae.latent_channels + n
    config = replace(
        model.config,
        vae=replace(vae, latent_channels=channels, detail_channels=vae.detail_channels + n),
        unet=replace(unet, in_channels=channels, out_channels=channels, input_skip=True),
    )
    out = replace(model, config=config)
    for part in ("unet", "vae"):
        old, module = owner(part, getattr(model, part)).state_dict(), build(part, config)
        new = owner(part, module).state_dict()
        known = {name: widened(name, weight, new[name].shape) for name, weight in old.items()}
        owner(part, module).load_state_dict(known, strict=False)
        setattr(out, part, module.eval())
    return out


@torch.no_grad()
def fit_detail(vae: VAE, images: Tensor) -> None:
    """The detail's layers: principal components of what the other channels don't tell of the pixels of a cell, and of
    them what the pixels show, in place of what the decoder guessed."""
    n, decoder = vae.config.detail_channels, vae.model.decoder
    base = rows_of(torch.cat([vae.posterior(x)[0][:, :-n] for x in images.split(64)]))
    pixels = rows_of(F.pixel_unshuffle(images, vae.config.patch_size))
    told, mean = regression(base, pixels)
    kept = torch.linalg.eigh(torch.cov((pixels - base @ told.T).T)).eigenvectors[:, -n:].flip(1)
    encoder = vae.model.encoder.detail
    encoder.weight.copy_(torch.cat([kept.T, -kept.T @ told], dim=1)[:, :, None, None])
    encoder.bias.copy_(-kept.T @ mean)
    decoder.detail.weight.copy_(torch.cat([kept @ kept.T @ told, kept], dim=1)[:, :, None, None])
    decoder.detail.bias.copy_(kept @ kept.T @ mean)
    others = (torch.eye(len(kept)) - kept @ kept.T).float()
    decoder.conv_out.weight.copy_(torch.einsum("oi,ichw->ochw", others, decoder.conv_out.weight))
    decoder.conv_out.bias.copy_(others @ decoder.conv_out.bias)


@torch.no_grad()
def fit_skip(unet: MultiViewUNet, schedule: NoiseSchedule, std: Tensor) -> float:
    """Sets the factors of the last channels' inputs to the best ones for normal latents of deviations `std` [n], at all
    times and from many cameras; returns how far they are off, as a root mean square."""
    n = len(std)
    alpha, sigma = (x.double()[:, None] for x in (schedule.alphas_cumprod.sqrt(), (1 - schedule.alphas_cumprod).sqrt()))
    signal, noise = (-sigma, alpha) if schedule.prediction == "v" else (0 * sigma, torch.ones_like(sigma))
    variance = std.double() ** 2
    wanted = (signal * alpha * variance + noise * sigma) / (alpha**2 * variance + sigma**2)
    time = unet.time_embed(sinusoid(torch.arange(len(wanted)), unet.config.model_channels))
    cameras = torch.cat([get_camera(8, elevation_deg=e) for e in (0, 15, 30)])
    first, last = unet.camera_embed[0], unet.camera_embed[2]
    told = camera_embedding(cameras, MLP(first.weight, first.bias, last.weight, last.bias))
    told = torch.cat([torch.zeros_like(told[:1]), told])
    features = F.silu(time[:, None] + told).double().flatten(0, 1)
    known = wanted[:, None].expand(-1, len(told), -1).flatten(0, 1)
    matrix, bias = regression(features, known)
    unet.skip_scale.weight[-n:], unet.skip_scale.bias[-n:] = matrix.float(), bias.float()
    return (features @ matrix.T + bias - known).square().mean().sqrt().item()


def main(argv: list[str] | None = None) -> None:
    """Reads the model and the renders, and writes the wider model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("shards", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=40)
    args = parser.parse_args(argv)
    model = load_model(args.model, torch.float32)
    if not isinstance(model.vae, VAE) or not model.config.unet.camera_places or model.config.vae.detail_channels:
        parser.error(f"{args.model} must have an autoencoder without detail channels, and a UNet that knows cameras")
    source = ImageSource(Shards(args.shards).at(model.config.vae.image_size))
    fit, check = (source.images(Stream(0, i, "widen"), n) for i, n in enumerate((N_FIT, N_CHECK)))
    before = reconstruction(model.vae, check)
    wide = with_channels(model, args.channels)
    fit_detail(wide.vae, fit)
    std = torch.cat([wide.vae.encode(x)[:, -args.channels :] for x in fit.split(64)]).std((0, 2, 3))
    print("deviations of the new channels:", " ".join(f"{x:.3f}" for x in std.tolist()))
    error = fit_skip(wide.unet, NoiseSchedule.from_config(wide.config.schedule), std)
    after, channels = reconstruction(wide.vae, check), wide.config.vae.latent_channels
    best = Linear.fit(fit, wide.config.vae.patch_size).bound(check, channels)
    print(f"{before:.2f} dB became {after:.2f} dB (the best linear autoencoder of {channels} channels: {best:.2f} dB)")
    print(f"the factors of the noisy input are off by {error:.3f}")
    for part in ("unet", "text", "vae"):
        getattr(wide, part).half()
    save_model(wide, args.out)


if __name__ == "__main__":
    main()
