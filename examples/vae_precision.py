"""How exact a VAE's encoder is in 16 bits: errors of its latents and of the gradient that reaches the image.

    python examples/vae_precision.py [--model embedded | sd] [--size 64]

Runs on a CPU in a minute: all is computed in float32, and what a GPU would keep in 16 bits is rounded to them, forwards
and backwards: weights, inputs and outputs of convolutions and linear layers, outputs of SiLU, sums of a block. Norms'
statistics, softmax and the sums inside of a product are float32 there, and here. The table is in docs/gpu.md.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from mvdream_fast.checkpoints.open import load_model, needed
from mvdream_fast.models.config import SD21
from mvdream_fast.models.vae import VAE

ISLANDS = ("none", "moments", "stream", "stream and moments")  # what stays float32
COTANGENTS = (0.25, 2.5e-3, 2.5e-5)  # (z - target) / (B V): an early step, a late one, one that has nearly arrived


class Round(torch.autograd.Function):
    """To the nearest number of a dtype, and the gradient, too."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).float()

    @staticmethod
    def backward(ctx, *d: Tensor):
        return d[0].to(ctx.dtype).float(), None


@contextmanager
def rounded(vae: VAE, dtype: torch.dtype, islands: str) -> Iterator[None]:
    """The encoder as it computes in a dtype, but for its islands: the residual stream, or the last two convolutions."""
    model, encoder, stream = vae.model, vae.model.encoder, "stream" in islands
    exact = {encoder.conv_out, model.quant_conv, encoder.conv_act} if "moments" in islands else set()
    own = {name: x.clone() for name, x in model.state_dict().items()}

    def inputs(_: nn.Module, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return Round.apply(x[0], dtype), *x[1:]

    def output(_: nn.Module, __: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return Round.apply(x, dtype)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            adds = name.endswith(("conv_in", "conv_shortcut", "downsamplers.0.conv"))  # writes into the stream itself
            layer = isinstance(module, nn.Conv2d | nn.Linear)
            if module in exact:
                continue
            if layer:
                module.weight.data = module.weight.data.to(dtype).float()
                hooks.callback(module.register_forward_pre_hook(inputs).remove)
            sums = isinstance(module, ResnetBlock2D | Attention) and not stream
            if sums or isinstance(module, nn.SiLU) or (layer and not (stream and adds)):
                hooks.callback(module.register_forward_hook(output).remove)
        yield
    model.load_state_dict(own)


def measure(vae: VAE, images: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Mean latents, and the gradient on the images."""
    images = images.clone().requires_grad_()
    mean, _ = vae.posterior(images)
    (gradient,) = torch.autograd.grad(mean, images, cotangent)
    return mean.detach(), gradient


def error(found: Tensor, wanted: Tensor) -> float:
    """Root of the mean square, relative."""
    return ((found - wanted).square().mean() / wanted.square().mean()).sqrt().item()


def main(say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd", help="sd: Stable Diffusion's sizes with random weights")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    args = parser.parse_args()
    torch.manual_seed(0)
    known = VAE(SD21.vae, decoder=False) if args.model == "sd" else needed(load_model(args.model).vae, "vae")
    vae = known.float().requires_grad_(False).eval()
    images = F.interpolate(torch.rand(1, 3, 8, 8) * 2 - 1, (args.size, args.size), mode="bicubic").clamp(-1, 1)
    cotangent = torch.randn_like(vae.posterior(images)[0])
    say("| dtype | kept in float32 | latents | gradient at " + " | at ".join(map(str, COTANGENTS)) + " |")
    for dtype in (torch.bfloat16, torch.float16):
        for islands in ISLANDS:
            errors = []
            for scale in COTANGENTS:
                wanted = measure(vae, images, scale * cotangent)
                with rounded(vae, dtype, islands):
                    found = measure(vae, images, scale * cotangent)
                errors += [error(x, y) for x, y in zip(found, wanted, strict=True)]
            kept = [errors[0], *errors[1::2]]
            say(f"| {str(dtype)[6:]} | {islands} | " + " | ".join(f"{x:.2%}" for x in kept) + " |")


if __name__ == "__main__":
    main()
