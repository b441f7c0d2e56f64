"""The image autoencoder: diffusers' AutoencoderKL with the latent scale of the diffusion model.

Checkpoints in LDM's names are renamed in checkpoints/layouts.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvdream_fast.core.machine import in_format
from mvdream_fast.models.blocks import zero
from mvdream_fast.models.config import VAEConfig
from mvdream_fast.models.functional import fused_group_norm
from mvdream_fast.models.matting import Matte, Matting

LOGVAR_RANGE = (-30.0, 20.0)


class VAE(nn.Module):
    """Images in [-1, 1] to scaled latents and back, in channels_last; differentiable both ways.

    Args:
        config: sizes, and what makes latents of a posterior sample, see `scaled`.
        decoder: False leaves the decoder out (59 % of the weights), for score distillation.
    """

    def __init__(self, config: VAEConfig, decoder: bool = True):
        super().__init__()
        # The submodule: the package's top level would import every model class.
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        self.config = config
        n_levels = len(config.block_out_channels)
        levels: dict[str, Any] = {  # tuples of any length, which diffusers annotates as tuples of one
            "down_block_types": ("DownEncoderBlock2D",) * n_levels,
            "up_block_types": ("UpDecoderBlock2D",) * n_levels,
            "block_out_channels": config.block_out_channels,
        }
        self.model = AutoencoderKL(
            **levels,
            in_channels=3 * config.patch_size**2,
            out_channels=3 * config.patch_size**2,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels - config.detail_channels,
            norm_num_groups=config.norm_num_groups,
            sample_size=config.image_size,
            scaling_factor=config.scale_factor,
            mid_block_add_attention=config.mid_block_add_attention,
        )
        if config.decoder_width is not None:
            self._widen_decoder(config.decoder_width)
        if config.detail_channels:
            self._add_detail()
        if config.decoder_cleaner is not None:
            self.model.decoder.add_module("cleaner", _Cleaner(config.decoder_cleaner, config))
        if config.decoder_matting is not None:
            self.model.decoder.add_module("matting", Matting(config.decoder_matting, config))
        if not decoder:
            self.drop_decoder()
        _fuse_norms(self.model)
        in_format(self, torch.channels_last)

    def _widen_decoder(self, width: int) -> None:
        from diffusers.models.autoencoders.vae import Decoder

        config = self.config
        if len(config.block_out_channels) != 1:
            raise ValueError(
                f"VAE: decoder_width must be None with {len(config.block_out_channels)} levels, got {width}"
            )
        self.model.decoder = Decoder(
            in_channels=config.latent_channels,
            out_channels=3 * config.patch_size**2,
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(width,),
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=config.mid_block_add_attention,
        )

    def _add_detail(self) -> None:
        """Linear layers around the network: a cell's pixels and its other latents to the detail, and all to pixels."""
        config = self.config
        if len(config.block_out_channels) != 1 or config.decoder_width is None:
            raise ValueError("VAE: detail_channels must come with one level and a decoder_width")
        pixels, n = 3 * config.patch_size**2, config.detail_channels
        self.model.encoder.add_module("detail", nn.Conv2d(pixels + config.latent_channels - n, n, 1))
        self.model.decoder.add_module("detail", nn.Conv2d(config.latent_channels, pixels, 1))

    @property
    def has_decoder(self) -> bool:
        """Whether `decode` works."""
        return self.model.decoder is not None

    def drop_decoder(self) -> None:
        """Frees the decoder's weights; `decode` raises from then on."""
        self.model.register_module("decoder", None)
        self.model.register_module("post_quant_conv", None)

    def encode_in(self, dtype: torch.dtype) -> None:
        """From now on the encoder works in this dtype, whatever that of the images. What comes after its middle block
        (norm, moments) stays as it is, and so do the decoder, the statistics of norms and the softmax of attention:
        docs/gpu.md has what that changes."""
        encoder = self.model.encoder
        for module in (encoder.conv_in, encoder.down_blocks, encoder.mid_block):
            module.to(dtype)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, clamped to [-30, 20], before scaling. The detail's is the smallest.

        Args:
            images: [B, 3, Hp, Wp] in [-1, 1]; Hp and Wp must be multiples of the down-sampling factor.

        Returns:
            Two tensors [B, latent_channels, h, w].

        Raises:
            ValueError: if the images have another shape.
        """
        factor = self.config.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"VAE.encode: images must be [B, 3, Hp, Wp] with sides that are multiples of {factor}, "
                f"got {tuple(images.shape)}"
            )
        pixels, dtype = F.pixel_unshuffle(images, self.config.patch_size), self.model.encoder.conv_in.weight.dtype
        moments = self.model.encoder(pixels.to(dtype).contiguous(memory_format=torch.channels_last))
        mean, logvar = _through(self.model.quant_conv, moments).chunk(2, dim=1)
        if self.config.detail_channels:
            detail = self.model.encoder.get_submodule("detail")(torch.cat([pixels.to(mean.dtype), mean], dim=1))
            mean = torch.cat([mean, detail], dim=1)
            logvar = torch.cat([logvar, torch.full_like(detail, LOGVAR_RANGE[0])], dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents: of the posterior's mean, or of the sample mean + std * noise.

        Args:
            images: [B, 3, Hp, Wp] in [-1, 1].
            noise: standard normal [B, latent_channels, h, w], or None for the mean.

        Returns:
            [B, latent_channels, h, w].

        Raises:
            ValueError: if the images or the noise have another shape.
        """
        mean, logvar = self.posterior(images)
        if noise is None:
            return self.scaled(mean)
        if noise.shape != mean.shape:
            raise ValueError(f"VAE.encode: noise must be {tuple(mean.shape)}, got {tuple(noise.shape)}")
        return self.scaled(mean + torch.exp(0.5 * logvar) * noise)

    def scaled(self, sample: Tensor) -> Tensor:
        """The latents of a posterior sample, (sample - shift_factor) * scale_factor; the shape stays."""
        return (sample - self.config.shift_factor) * self.config.scale_factor

    @property
    def cleaner(self) -> nn.Module | None:
        """What cleans latents before they are decoded, where the autoencoder has it."""
        return None if self.config.decoder_cleaner is None else self.model.decoder.get_submodule("cleaner")

    def cleaned(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, latent_channels, h, w] as they are decoded: without what a sampler leaves in them."""
        cleaner = self.cleaner
        return latents if cleaner is None else cleaner(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Images, about [-1, 1] but not clamped, of scaled latents; before flat backgrounds where it has `matting`.

        Args:
            latents: [B, latent_channels, h, w].

        Returns:
            [B, 3, Hp, Wp].

        Raises:
            ValueError: if the latents have another number of channels.
            RuntimeError: if the decoder was left out.
        """
        matte = self.matte(latents)
        return self.plain(latents) if matte is None else matte.image

    def matte(self, latents: Tensor) -> Matte | None:
        """What `decode` would show, thing and background apart; None of an autoencoder that can't tell them apart."""
        if not self.has_decoder or self.config.decoder_matting is None:
            return None
        return self.apart(self.plain(latents), latents)

    def apart(self, decoded: Tensor, latents: Tensor) -> Matte:
        """The matte of images [B, 3, Hp, Wp] that `plain` has decoded from latents."""
        return self.model.decoder.get_submodule("matting")(decoded, latents)

    def plain(self, latents: Tensor) -> Tensor:
        """`decode` without `matting`."""
        if not self.has_decoder:
            raise RuntimeError("VAE.decode: this VAE was loaded without its decoder; load the part 'vae' instead")
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"VAE.decode: latents must be [B, {self.config.latent_channels}, h, w], got {tuple(latents.shape)}"
            )
        z = self.cleaned(latents) / self.config.scale_factor + self.config.shift_factor
        z = z.contiguous(memory_format=torch.channels_last)
        return F.pixel_shuffle(self._patches(z), self.config.patch_size)

    def _patches(self, z: Tensor) -> Tensor:
        """What is decoded, [B, 3 patch_size^2, h', w'], before patches become squares of pixels."""
        decoder, n = self.model.decoder, self.config.detail_channels
        if not n:
            return decoder(_through(self.model.post_quant_conv, z))
        base = _through(self.model.post_quant_conv, z[:, :-n])
        return decoder(torch.cat([base, z[:, -n:]], dim=1)) + decoder.get_submodule("detail")(z)


class _Cleaner(nn.Module):
    """Adds to scaled latents what makes them those of an image; nothing, before it is trained.

    Flaws of a tenth of the latents' deviation are to be told from structure ten times as large. For that it sees how
    far each cell is from the median of its image, the background as a rule, at three scales: as it is, and through
    tanh twice.
    """

    SLOPES = (2.5, 8.0)

    def __init__(self, width: int, config: VAEConfig):
        from diffusers.models.resnet import ResnetBlock2D

        super().__init__()
        shared: dict[str, Any] = {"temb_channels": None, "groups": config.norm_num_groups}  # no time; annotated as int
        n, channels = config.layers_per_block + 1, config.latent_channels
        self.conv_in = nn.Conv2d((1 + len(self.SLOPES)) * channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResnetBlock2D(in_channels=width, out_channels=width, **shared) for _ in range(n)))
        self.norm_out, self.act = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6), nn.SiLU()
        self.conv_out = zero(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        """[B, latent_channels, h, w], and so is what it returns."""
        away = latents - latents.flatten(2).median(2).values[..., None, None]
        seen = torch.cat([latents, *(torch.tanh(slope * away) for slope in self.SLOPES)], dim=1)
        x = self.conv_in(seen.contiguous(memory_format=torch.channels_last))
        for block in self.blocks.children():
            x = block(x, None)
        return latents + self.conv_out(self.act(self.norm_out(x)))


class _Norm(nn.GroupNorm):
    """A GroupNorm of diffusers' layers that does the SiLU after it, too, in one kernel where there is one. It works in
    the dtype of its parameters, whatever comes in, unless autocast chooses."""

    silu = False

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, h, w], or tokens [B, C, N], whose memory is pixel after pixel, as that of channels_last images."""
        if input.dtype != self.weight.dtype and not torch.is_autocast_enabled(input.device.type):
            input = input.to(self.weight.dtype)
        if not fuses(input):
            return super().forward(input)
        images = input if input.ndim == 4 else input[..., None]
        return fused_group_norm(self, images, silu=self.silu).reshape(input.shape)


class _SiLUOfNorm(nn.SiLU):
    """The SiLU after a norm, where the norm has not done it."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return input if fuses(input) else super().forward(input)


def fuses(x: Tensor) -> bool:
    """Whether norms run as our own kernel with the SiLU in it. On a CPU diffusers' layers stay as they are: there the
    norms are a small part, and results would change in their last bits."""
    return x.is_cuda


def _fuse_norms(model: nn.Module) -> None:
    """Every norm of diffusers' blocks as a `_Norm` of the same parameters' names, every SiLU behind one aware of it."""
    for block in model.modules():
        follows = [name for name, child in block.named_children() if type(child) is nn.SiLU]
        for name, child in list(block.named_children()):
            if type(child) is nn.GroupNorm:
                norm = _Norm(child.num_groups, child.num_channels, child.eps)
                norm.silu = bool(follows)
                block.register_module(name, norm)
        for name in follows:
            block.register_module(name, _SiLUOfNorm())


def _through(layer: nn.Module | None, x: Tensor) -> Tensor:
    """layer(x), or x where diffusers' configuration leaves the layer out."""
    return x if layer is None else layer(x)
