"""From a sentence to views of the object: MVDreamPipeline, the text it is asked with, and the views it returns.

The sampler, the cameras and the models live in their own modules; this one puts them in order.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, get_camera, normalize_camera
from mvdream_fast.checkpoints.open import Model, load_model
from mvdream_fast.core.errors import ArgumentError, DivergedError
from mvdream_fast.core.machine import choose_device, choose_dtype, memory_errors
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import Denoiser, TextCond
from mvdream_fast.diffusion.sampler import (
    Callback,
    ModelFn,
    check_scheduler,
    ddim_sample,
    diffusers_settings,
    scheduler_sample,
)
from mvdream_fast.diffusion.schedule import Convention, NoiseSchedule
from mvdream_fast.models.tokenizer import Encoded, check_prompt

if TYPE_CHECKING:
    import PIL.Image
SUFFIX = ", 3d asset"  # ended every caption of the multi-view training data
DECODE_BATCH = 8  # images that the VAE decodes at a time
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Views:
    """Views of one object, on the CPU."""

    tensor: Tensor  # [V, 3, Hp, Wp] float32 in [0, 1]
    cameras: Tensor | None  # [V, 16], what the UNet was told (unit distance); None in 2D mode
    prompt: str  # without the suffix
    seed: int | None  # None when a generator was given

    @property
    def images(self) -> list["PIL.Image.Image"]:
        from PIL import Image

        return [Image.fromarray(view.numpy()) for view in _to_bytes(self.tensor)]

    def sheet(self, n_columns: int = 4) -> "PIL.Image.Image":
        """All views in one image, row by row; empty places are white."""
        from PIL import Image

        n_views, _, height, width = self.tensor.shape
        n_columns = min(n_columns, n_views)
        sheet = Image.new("RGB", (n_columns * width, -(-n_views // n_columns) * height), "white")
        for i, image in enumerate(self.images):
            sheet.paste(image, (i % n_columns * width, i // n_columns * height))
        return sheet


class MVDreamPipeline:
    """Text to views with a multi-view diffusion model.

        views = MVDreamPipeline.from_pretrained("embedded")("a brown bulldog", seed=0).images

    Holds the model's modules on `device`; the UNet in `dtype`, text tower and VAE in float32 (they run once a call).
    """

    def __init__(self, model: Model, device: str = "auto", dtype: str = "auto"):
        """Args: model, from `models.checkpoint.load_model`; its modules are moved, not copied; parts may be None."""
        self.model, self.config = model, model.config
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        for module, dtype in ((model.unet, self.dtype), (model.vae, torch.float32), (model.text, torch.float32)):
            if module is not None:
                with memory_errors("take --device cpu or --dtype float16"):
                    module.to(self.device, dtype).eval()
        self.unet, self.vae, self.text = model.unet, model.vae, model.text
        self.tokenizer = model.tokenizer
        self.schedule = NoiseSchedule.from_config(model.config.schedule, self.device)

    @staticmethod
    def from_pretrained(path: str = "embedded", device: str = "auto", dtype: str = "auto") -> "MVDreamPipeline":
        """A model folder, a released file, or "embedded" for the small model that ships with the package. No network.

        Raises: ModelError when it is missing, unreadable or of another configuration.
        """
        return MVDreamPipeline(load_model(path), device, dtype)

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """Keyword arguments for a diffusers scheduler that fits this model (`scheduler=`)."""
        return diffusers_settings(self.config.schedule)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        n_views: int = 4,
        elevation_deg: float = 15.0,
        azimuth_start_deg: float = 0.0,
        azimuth_span_deg: float = 360.0,
        n_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] = "",
        suffix: str = SUFFIX,
        *,
        seed: int = 0,
        generator: torch.Generator | None = None,
        scheduler: Any = None,
        callback: Callback | None = None,
        camera: Cameras | Tensor | None = None,
        mode: Literal["3d", "2d"] = "3d",
        convention: Convention = "ldm",
        eta: float = 0.0,
        warn: Warn | None = None,
    ) -> Views | list[Views]:
        """Samples `n_views` views of what the prompt says.

        Several prompts are sampled in one batch; prompt b then gets the noise of seed + b. The same call gives the
        same views. `n_steps` counts as upstream's DDIM does (30 makes 31) unless `convention` is "diffusers".

        Args:
            generator: draws the noise instead of `seed`.
            scheduler: a diffusers scheduler that samples in place of DDIM; see `scheduler_settings`.
            callback: called after each step with (steps done, steps in all, latents [B*V, C, h, w]).
            camera: other poses, Cameras or [V, 4, 4] or [V, 16]; then the number of views and the angles don't count.
            mode: "2d" leaves the cameras out: independent images, as the 2D half of the training data.
            warn: called with a sentence for words that the model won't see; by default a Python warning.

        Returns:
            Views, or a list of them for a list of prompts.

        Raises:
            ArgumentError: a prompt that is empty, a number of steps or views that cannot be, a foreign scheduler.
            DivergedError: the latents left the finite numbers.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check(mode, camera, n_views, guidance_scale)
        angles_deg = (elevation_deg, azimuth_start_deg, azimuth_span_deg)
        poses = None if mode == "2d" else _poses(camera, n_views, *angles_deg)  # [V, 16]
        n_views = n_views if poses is None else len(poses)
        seeds = None if generator is not None else [seed + b for b in range(len(prompts))]
        with memory_errors("take fewer views or prompts, or --dtype float16"):
            model_fn = self.denoiser(
                self.encode_prompt(prompts, negative_prompt, suffix, warn), poses, n_views, guidance_scale
            )
            noise = self._noise(len(prompts), n_views, seeds, generator)
            if scheduler is None:
                draws = {"eta": eta, "stream": Stream(seed, 0, "sampling eta")}
                rest = (n_steps, guidance_scale, convention, callback)
                latents = ddim_sample(model_fn, noise, self.schedule, *rest, **draws)
            else:
                check_scheduler(scheduler, self.schedule)
                draws = {"generator": generator or torch.Generator(self.device).manual_seed(seed)}
                latents = scheduler_sample(model_fn, noise, scheduler, n_steps, guidance_scale, callback, **draws)
            images = self.decode(latents).cpu().unflatten(0, (len(prompts), n_views))
        views = [Views(images[b], poses, text, seeds[b] if seeds else None) for b, text in enumerate(prompts)]
        return views[0] if isinstance(prompt, str) else views

    @torch.no_grad()
    def encode_prompt(
        self,
        prompts: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        suffix: str = SUFFIX,
        warn: Warn | None = None,
    ) -> TextCond:
        """The prompts, each with the suffix, and the negative prompt (one for all, or one for each) as the UNet's text.

        Returns: TextCond of B = number of prompts.
        Raises: ArgumentError if a prompt is empty, has control characters or is over 8 KB, or a count doesn't fit;
            RuntimeError if the model was loaded without its text tower.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = self._tokens(prompts, negative_prompt, suffix)
        for sentence in _complaints(encoded, self.config.text.context_length):
            (warn or _python_warning)(sentence)
        states = self.text(encoded.ids.to(self.device))
        cond, uncond = states[: len(prompts)], states[len(prompts) :]
        return TextCond(cond, uncond.expand(len(prompts), -1, -1))

    def unseen_words(
        self, prompts: str | Sequence[str], negative_prompt: str | Sequence[str] = "", suffix: str = SUFFIX
    ) -> list[str]:
        """What `encode_prompt` would warn of, one sentence each for words that are cut and words that are unknown."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return _complaints(self._tokens(prompts, negative_prompt, suffix), self.config.text.context_length)

    def _tokens(self, prompts: list[str], negative_prompt: str | Sequence[str], suffix: str) -> Encoded:
        """Token ids of the prompts with their suffix, then of the negative prompts."""
        negative = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
        if not prompts or len(negative) not in (1, len(prompts)):
            raise ArgumentError(
                f"encode_prompt: negative_prompt must be one, or one for each of the {len(prompts)} prompts, "
                f"got {len(negative)}; there must be a prompt"
            )
        if self.text is None or self.tokenizer is None:
            raise RuntimeError("encode_prompt: the model must have its text tower; load it with the part 'text'")
        for prompt in prompts:
            check_prompt(prompt)
        return self.tokenizer.encode([add_suffix(prompt, suffix) for prompt in prompts] + negative)

    def denoiser(self, text: TextCond, camera: Tensor | None, n_views: int, guidance_scale: float) -> ModelFn:
        """The UNet as the samplers call it; the keys and values of the text are computed here, once.

        Args: camera [V, 16] for the views of every prompt, or None for 2D mode, where the views are independent.
        Returns: a function of (latents [2*B*V, C, h, w], t), [uncond; cond]; of B*V latents for a guidance scale of 1.
        """
        guided, text = guidance_scale != 1, text.to(self.dtype)
        if camera is None:
            ask = Denoiser(self.unet, text.repeat(n_views), 1, guided)
        else:
            ask, camera = Denoiser(self.unet, text, n_views, guided), camera.to(self.device).repeat(len(text.cond), 1)

        def denoise(latents: Tensor, t: Tensor) -> Tensor:
            # Both halves are the same latents: given once, what comes before the first text attention is done once.
            return ask(latents[: len(latents) // ask.n_prompts], t, camera)

        return denoise

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, C, h, w] to images [n, 3, Hp, Wp], float32 in [0, 1].

        Raises: DivergedError if a number isn't finite.
        """
        if not latents.isfinite().all():
            raise DivergedError("sampling left the finite numbers; try --dtype float32 or a lower guidance scale")
        images = [self.vae.decode(part.float()) for part in latents.split(DECODE_BATCH)]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1).contiguous()

    def describe(self) -> str:
        """Name, size, device and dtype, for a first line of output."""
        n_parameters = sum(p.numel() for p in self.unet.parameters())
        return f"{self.config.name} ({n_parameters / 1e6:.1f} M) on {self.device} in {str(self.dtype)[6:]}"

    def _noise(
        self, n_prompts: int, n_views: int, seeds: list[int] | None, generator: torch.Generator | None
    ) -> Tensor:
        """Standard normal latents [B*V, C, h, w], float32 whatever the UNet's dtype; one stream a prompt."""
        size = (self.config.unet.in_channels, self.config.latent_size, self.config.latent_size)
        if seeds is None:
            noise = torch.randn(n_prompts * n_views, *size, generator=generator, device=generator.device)
            return noise.to(self.device)
        noise = [Stream(seed, 0, "sampling").normal(n_views, *size) for seed in seeds]
        return torch.cat(noise).to(self.device)


def add_suffix(prompt: str, suffix: str = SUFFIX) -> str:
    """The prompt with the suffix at its end, once."""
    prompt = prompt.strip()
    return prompt if prompt.lower().endswith(suffix.strip().lower()) else prompt + suffix


def _poses(camera: Cameras | Tensor | None, n_views: int, *angles_deg: float) -> Tensor:
    """What the UNet is told of the cameras, [V, 16] on the CPU."""
    if camera is not None:
        return normalize_camera(camera.c2w if isinstance(camera, Cameras) else camera).float().cpu()
    try:
        return get_camera(n_views, *angles_deg)
    except ValueError as error:
        raise ArgumentError(str(error)) from error


def _check(mode: str, camera: object, n_views: int, guidance_scale: float) -> None:
    if mode not in ("3d", "2d"):
        raise ArgumentError(f"pipeline: mode must be 3d or 2d, got {mode!r}; 3d gives views of one object")
    if mode == "2d" and camera is not None:
        raise ArgumentError("pipeline: camera must be None in 2d mode, got poses; leave them out or take 3d")
    if n_views < 1:
        raise ArgumentError(
            f"pipeline: n_views must be at least 1, got {n_views}; 4 is what the models were trained with"
        )
    if not abs(guidance_scale) < float("inf"):
        raise ArgumentError(f"pipeline: guidance_scale must be finite, got {guidance_scale}; 7.5 is the default")


def _complaints(encoded: Encoded, length: int) -> list[str]:
    """One sentence for each kind of word that the model won't see; of several prompts together."""
    kinds = (
        (encoded.cut, f"the prompt has more than {length - 2} tokens and is cut: not seen"),
        (encoded.unknown, "the model does not know"),
    )
    named = ((list(dict.fromkeys(word for words in lists for word in words)), what) for lists, what in kinds)
    return [f"{what} {', '.join(repr(word) for word in words)}" for words, what in named if words]


def _python_warning(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)


def _to_bytes(images: Tensor) -> Tensor:
    """[n, 3, Hp, Wp] in [0, 1] to uint8 [n, Hp, Wp, 3]."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
