"""The guided call: one UNet asked with a prompt and without it in one batch. Sampling, guidance and training use it.

The order of the parts is decided here and nowhere else: the negative prompt first, [uncond; cond; away].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mvdream_fast.models.captured import Captured
from mvdream_fast.models.config import Mode
from mvdream_fast.models.deepfloyd import UNet
from mvdream_fast.models.unet import TextContext

ModelFn = Callable[[Tensor, Tensor], Tensor]  # latents [n or 2n, C, h, w], t scalar -> output, the latents' shape


@dataclass(frozen=True)
class TextCond:
    """What the UNet is told in words, of B prompts: cond and uncond [B, L, Dt], in the UNet's dtype.

    away: [K*B, L, Dt], K slowest, K more prompts for each: what guidance shall lead away from (Perp-Neg).
    """

    cond: Tensor
    uncond: Tensor
    away: Tensor | None = None

    def to(self, place: torch.device | torch.dtype) -> "TextCond":
        """On a device, or in a dtype."""
        return self._each(lambda x: x.to(place))

    def repeat(self, n: int) -> "TextCond":
        """Each prompt n times, its copies next to each other."""
        return self._each(lambda x: x.repeat_interleave(n, dim=0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TextCond":
        return TextCond(change(self.cond), change(self.uncond), None if self.away is None else change(self.away))


class Denoiser:
    """A UNet with fixed prompts, whose keys and values are computed once.

    Args:
        text: of B scenes, or of B*V views. n_views: V, the views that see each other; 1 in 2D mode, where a view is a
            scene of its own.
        guided: False asks with the prompts alone.
        captured: `guided_call()`, where calls are to be CUDA graphs; all denoisers of a UNet share it.
    """

    def __init__(self, unet: UNet, text: TextCond, n_views: int, guided: bool = True, captured: Captured | None = None):
        parts = [text.uncond, text.cond] if guided else [text.cond]
        if guided and text.away is not None:
            parts.append(text.away)
        context = torch.cat(parts) if guided else text.cond
        self.unet, self.n_views, self.dtype = unet, n_views, text.cond.dtype
        self.n_prompts = len(context) // len(text.cond)
        self._context = unet.prepare_context(context)
        self._captured = captured

    @torch.no_grad()
    def __call__(self, latents: Tensor, t: Tensor, camera: Tensor | None = None) -> Tensor:
        """The UNet's raw output, without a graph.

        Args: latents [B*V, C, h, w], views fastest; t timesteps, scalar or [B*V]; camera [B*V, 16], None in 2D mode.
        Returns: [G*B*V, C, h, w], first without the prompts, then with them, then with those to be led away from, if
            there are any; or [B*V, ...] of the prompts alone; in the dtype of the latents.
        """
        camera = camera if camera is None else camera.to(self.dtype)
        if self._captured is not None and self._captured.is_active(latents.device):
            return self._captured(self.unet, latents, t, camera, self.n_views, self.n_prompts, *self.told())[0]
        out = self.unet(latents.to(self.dtype), t, self._context, camera, self.n_views, self.n_prompts)
        return out.to(latents.dtype)

    def told(self) -> list[Tensor]:
        """What the UNet is told in words, as tensors: the embedding [G*B, L, Dt], then the keys and values of every
        text attention in turn, while they hold."""
        return [self._context.context, *(x for pair in self.unet.holding(self._context) for x in pair)]

    def for_sampler(self, camera: Tensor | None = None) -> ModelFn:
        """A function of (latents, t) for the samplers, whose latents are [2*B*V, C, h, w] where `guided`.

        Both halves are the same latents: given once, what comes before the first text attention is done once.
        """
        return lambda latents, t: self(latents[: len(latents) // self.n_prompts], t, camera)


def model_fn(
    unet: UNet, text: TextCond, camera: Tensor | None, n_views: int, guided: bool = True, uncond_mode: Mode = "3d",
    captured: Captured | None = None,
) -> ModelFn:  # fmt: skip
    """The UNet as the samplers call it; the keys and values of the text are computed here, once.

    Args: camera: [B*V, 16], or None for 2D mode, where the views are independent. uncond_mode: "2d" asks without the
        prompt as in 2D mode, whatever the cameras. guided and captured as of a Denoiser.
    """
    if camera is None:
        return Denoiser(unet, text.repeat(n_views), 1, guided, captured).for_sampler()
    if guided and uncond_mode == "2d":
        alone = TextCond(text.uncond, text.uncond).repeat(n_views)
        without = Denoiser(unet, alone, 1, False, captured).for_sampler()
        told = Denoiser(unet, text, n_views, False, captured).for_sampler(camera)
        return apart(without, told, n_views)
    return Denoiser(unet, text, n_views, guided, captured).for_sampler(camera)


def apart(without: ModelFn, told: ModelFn, n_views: int) -> ModelFn:
    """One function for the samplers of two: what answers without the prompt, and what answers with it.

    What the n_views of a scene know of each other before all else is their background's colour. So that it is not
    amplified, the first answer has the second one's mean along the images' borders.
    """

    def both(latents: Tensor, t: Tensor) -> Tensor:
        half = latents[: len(latents) // 2]
        alone, guided = without(half, t), told(half, t)
        away = (guided - alone).reshape(-1, n_views, *alone.shape[1:])  # [B, V, C, h, w]
        border = torch.cat([away[..., 0, :], away[..., -1, :], away[..., 1:-1, 0], away[..., 1:-1, -1]], dim=-1)
        behind = border.mean(dim=(1, 3))[:, None, :, None, None]  # [B, 1, C, 1, 1]
        return torch.cat([alone + behind.expand_as(away).flatten(0, 1), guided])

    return both


def beside_known(model: ModelFn, known: Callable[[Tensor], Tensor], n_new: int) -> ModelFn:
    """A function for the samplers of n_new views alone, which the model sees together with known ones.

    Args: model: of the latents of all, the known ones first; once or, where guided, twice. known: latents [n, C, h, w]
        of the known ones with the noise of a timestep.
    Source: Lugmayr et al. 2022, "RePaint", of images that are known in part.
    """

    def new(latents: Tensor, t: Tensor) -> Tensor:
        all_views = torch.cat([known(t), latents[:n_new]])
        answers = model(all_views.repeat(len(latents) // n_new, 1, 1, 1), t)
        of_new = answers.view(-1, *all_views.shape)[:, -n_new:]
        return of_new.reshape(-1, *latents.shape[1:])

    return new


def guided_call(graphs: bool = True) -> Captured:
    """The call of a UNet as CUDA graphs, whatever its prompts, cameras and steps."""
    return Captured("the guided UNet call", lambda *arguments: (ask(*arguments),), enabled=graphs)


@torch.no_grad()
def ask(
    unet: UNet, latents: Tensor, t: Tensor, camera: Tensor | None, n_views: int, n_prompts: int,
    context: Tensor, *keys_values: Tensor,
) -> Tensor:  # fmt: skip
    """A denoiser's call as a function of nothing but its arguments, for a graph; the last ones as from `told`."""
    pairs = tuple(zip(keys_values[::2], keys_values[1::2], strict=True))
    text = TextContext(context, pairs) if pairs else context
    out = unet(latents.to(context.dtype), t, text, camera, n_views, n_prompts)
    return out.to(latents.dtype)
