"""Training of the small autoencoder: losses, the linear start, the linear bound it is measured against, its scale.

The loop around it (checkpoints, log, signals) is loop.py; the diffusion model's own trainer is unet.py.
"""

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvdream_fast.core import reads
from mvdream_fast.core.errors import DivergedError
from mvdream_fast.core.pinned import to_device
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.ahead import Ahead
from mvdream_fast.models.captured import Captured
from mvdream_fast.models.config import ModelConfig
from mvdream_fast.models.vae import LOGVAR_RANGE, VAE
from mvdream_fast.training.update import BaseTrainer

if TYPE_CHECKING:
    from mvdream_fast.data.batches import ImageSource


@dataclass(frozen=True)
class VAEOptions:
    """What shapes the numbers of a run. The learning rate falls to zero over `steps`."""

    steps: int = 3000
    batch_size: int = 16  # images
    lr: float = 1e-3
    warmup: int = 50
    ema: float = 0.995
    l1: float = 0.05
    edges: float = 0.05
    kl: float = 1e-6
    clip: float = 1.0
    decoder_only: bool = False  # the latents stay as they are, so that a diffusion model trained on them still fits
    seed: int = 0


class VAETrainer(BaseTrainer):
    """One optimisation of the autoencoder. `workers` more processes draw the coming batches; forward and backward are a
    CUDA graph unless `graphs` is False."""

    options: VAEOptions

    def __init__(
        self, config: ModelConfig, vae: VAE, source: "ImageSource", options: VAEOptions, workers: int = 0,
        graphs: bool = True,
    ):  # fmt: skip
        self.config, self.vae, self.source = config, vae.float(), source  # a pipeline's may have an encoder in bfloat16
        if options.decoder_only:
            for module in (vae.model.encoder, vae.model.quant_conv):
                if module is not None:
                    module.requires_grad_(False)
        trained = [p for p in vae.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        sizes = json.loads(config.to_json())["vae"]
        super().__init__(vae, optimizer, options, {"kind": "train-vae", "config": {"vae": sizes}})
        self._descent = Captured("a training step of the autoencoder", _descend, self.parameters, graphs)
        self.ahead = Ahead(self.draw, workers, pin=self.device.type == "cuda")

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """The images [n, 3, Hp, Wp] of an update, and the posterior's noise, [n, C, h, w]; on the CPU."""
        options, vae = self.options, self.config.vae
        stream = Stream(options.seed, step, "vae")
        images = self.source.images(stream, options.batch_size)
        side = images.shape[-1] // vae.downsampling
        return images, stream.normal(len(images), vae.latent_channels, side, side)

    def train_step(self) -> dict[str, float]:
        """One update; raises DivergedError before a weight is touched."""
        images, noise = (to_device(x, self.device) for x in self.ahead(self.step))
        loss, mse, kl = reads.read(torch.stack(self._descent(self.vae, self.options, self.scale(), images, noise)))
        self.check_finite(loss)
        return {"loss": loss, "psnr": psnr(mse), "kl": kl, "grad_norm": self.update()}


def _descend(vae: VAE, options: VAEOptions, scale: Tensor, images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """Adds the gradients of `scale` times the loss; returns it, the squared error and the divergence."""
    mean, logvar = vae.posterior(images)
    out = vae.decode(vae.scaled(mean + torch.exp(0.5 * logvar) * noise))
    mse = F.mse_loss(out, images)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
    loss = mse + options.l1 * F.l1_loss(out, images) + options.edges * edge_loss(out, images) + options.kl * kl
    (loss * scale).backward()
    return loss.detach(), mse.detach(), kl.detach()


def edge_loss(out: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of horizontal and vertical differences: what keeps silhouettes sharp."""
    error = out - images
    return (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2


def psnr(mse: float) -> float:
    """Decibels for images in [-1, 1]."""
    return 10 * math.log10(4 / max(mse, 1e-12))


@torch.no_grad()
def reconstruction(vae: VAE, images: Tensor) -> float:
    """PSNR in dB over all pixels of the posterior mean's reconstruction, clamped to the image range."""
    total = sum(F.mse_loss(vae.decode(vae.encode(x)).clamp(-1, 1), x, reduction="sum").item() for x in images.split(32))
    return psnr(total / images.numel())


@torch.no_grad()
def measure_scale(vae: VAE, images: Tensor) -> float:
    """One factor for all latent components that gives them unit variance together; their spectrum stays natural.

    Raises DivergedError where the latents are not finite, or all one number.
    """
    latents = torch.cat([vae.encode(x) for x in images.split(32)]) / vae.config.scale_factor
    scale = float(1 / latents.std())
    if not math.isfinite(scale):
        raise DivergedError("the latents are all one number, or not finite; begin again with a smaller --lr")
    return scale


@torch.no_grad()
def settle(vae: VAE) -> None:
    """Sets the posterior's variance to its lower clamp, so that its sample is its mean.

    The noise makes the decoder forgiving while it is trained. Afterwards it would only be in the way: a small
    autoencoder's is a third of its latents, and the diffusion model is trained on the means that are cached.
    """
    weight, bias = _convolution(vae.model.quant_conv)
    n = len(bias) // 2
    weight[n:] = 0
    bias[n:] = LOGVAR_RANGE[0]


def _convolution(layer: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Weight and bias; our autoencoders have both in every place."""
    if not isinstance(layer, nn.Conv2d) or layer.bias is None:
        raise TypeError(f"the autoencoder must have a convolution with a bias here, got {type(layer).__name__}")
    return layer.weight, layer.bias


@dataclass(frozen=True)
class Linear:
    """The principal components of patches: mean [d], directions [d, d] and standard deviations [d], largest first.

    Patches are in pixel_unshuffle's order: channel, row, column.
    """

    patch: int
    mean: Tensor
    directions: Tensor
    std: Tensor

    @staticmethod
    def fit(images: Tensor, patch: int) -> "Linear":
        """From images [n, 3, Hp, Wp]."""
        rows = _patches(images, patch).double()
        mean = rows.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov((rows - mean).T))
        return Linear(patch, mean.float(), directions.flip(1).float(), variances.flip(0).clamp_min(0).sqrt().float())

    def bound(self, images: Tensor, n_components: int) -> float:
        """PSNR in dB that the best linear autoencoder with so many numbers a patch reaches on `images`."""
        rows = _patches(images, self.patch) - self.mean
        kept = self.directions[:, :n_components]
        return psnr(F.mse_loss(rows @ kept @ kept.T, rows).item())


def _patches(images: Tensor, patch: int) -> Tensor:
    return F.pixel_unshuffle(images, patch).permute(0, 2, 3, 1).flatten(0, 2)


CONSTANT = 3.0  # in units of the first component's standard deviation; its square dwarfs what it shares a group with


@torch.no_grad()
def linear_start(vae: VAE, linear: Linear) -> None:
    """Sets an autoencoder of one level to the linear one, but for what normalisation costs; training begins there.

    Each component travels as a pair of channels x and -x, because silu(x) - silu(-x) = x, and each group of the last
    normalisation holds two large constants, so that it divides by nearly the same number everywhere. Residual
    branches begin at zero.

    Raises: ValueError if the autoencoder has several levels or too few channels.
    """
    model, detail = vae.model, vae.config.detail_channels
    n = vae.config.latent_channels - detail
    if len(vae.config.block_out_channels) != 1 or linear.patch != vae.config.patch_size:
        raise ValueError(f"linear_start: the autoencoder must have one level of patches of {linear.patch} pixels")
    for block in (m for m in model.modules() if type(m).__name__ == "ResnetBlock2D"):
        for parameter in block.get_submodule("conv2").parameters():
            parameter.zero_()
    for conv in (model.quant_conv, model.post_quant_conv):
        weight, bias = _convolution(conv)
        weight.copy_(torch.eye(len(weight))[:, :, None, None])
        bias.zero_()
    first, kept = linear.std[0], linear.directions[:, :n]
    spread = linear.std[:n].square().mean().sqrt()  # latents of about unit variance: scale_factor stays near 1
    eye, none = torch.eye(n), torch.zeros(n)
    _carry(model.encoder.conv_in, kept.T / first, -(kept.T @ linear.mean) / first, vae.config.norm_num_groups)
    _read(model.encoder.conv_norm_out, model.encoder.conv_out, eye * first / spread, none)
    _convolution(model.encoder.conv_out)[1][n:] = -6.0
    carried = torch.eye(n, n + detail) * spread / first
    _carry(model.decoder.conv_in, carried, none, vae.config.norm_num_groups)
    _read(model.decoder.conv_norm_out, model.decoder.conv_out, kept * first, linear.mean)
    if detail:
        rest = linear.directions[:, n : n + detail] / spread
        (told, offset), (drawn, none) = (
            _convolution(m.get_submodule("detail")) for m in (model.encoder, model.decoder)
        )
        told.copy_(F.pad(rest.T, (0, n))[..., None, None])
        offset.copy_(-(rest.T @ linear.mean))
        drawn.copy_(F.pad(rest * spread**2, (n, 0))[..., None, None])
        none.zero_()


def _pairs(channels: int, groups: int, n: int) -> list[int]:
    """The first channel of each component's pair, spread over the groups behind their two constants."""
    width = channels // groups
    places = [g * width + j for j in range(2, width - 1, 2) for g in range(groups)]
    if len(places) < n:
        raise ValueError(f"linear_start: {channels} channels in {groups} groups must carry {n} components")
    return places[:n]


def _carry(conv: nn.Conv2d, matrix: Tensor, bias: Tensor, groups: int) -> None:
    """Makes a convolution's output hold matrix @ input + bias in pairs, and the constants."""
    weights, biases = _convolution(conv)
    weights.mul_(0.1)
    biases.zero_()
    for row, p in enumerate(_pairs(conv.out_channels, groups, len(matrix))):
        for channel, sign in ((p, 1), (p + 1, -1)):
            weights[channel] = 0
            weights[channel, :, 1, 1] = sign * matrix[row]
            biases[channel] = sign * bias[row]
    for p in range(0, conv.out_channels, conv.out_channels // groups):
        weights[p : p + 2] = 0
        biases[p], biases[p + 1] = CONSTANT, -CONSTANT


def _read(norm: nn.Module, conv: nn.Conv2d, matrix: Tensor, bias: Tensor) -> None:
    """Makes norm, silu and convolution compute matrix @ components + bias from what `_carry` wrote."""
    if not isinstance(norm, nn.GroupNorm):
        raise TypeError(f"linear_start: the autoencoder must have a GroupNorm here, got {type(norm).__name__}")
    weights, biases = _convolution(conv)
    norm.weight.fill_(CONSTANT * math.sqrt(2 * norm.num_groups / norm.num_channels))
    norm.bias.zero_()
    weights.zero_()
    biases.zero_()
    for column, p in enumerate(_pairs(norm.num_channels, norm.num_groups, matrix.shape[1])):
        weights[: len(matrix), p, 1, 1] = matrix[:, column]
        weights[: len(matrix), p + 1, 1, 1] = -matrix[:, column]
    biases[: len(bias)] = bias
