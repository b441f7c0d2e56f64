"""From a sentence to views of the object: MVDreamPipeline, and the text it is asked with.

The sampler, the cameras and the models live in their own modules; this one puts them in order.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from mvdream_fast.camera import Cameras
from mvdream_fast.checkpoints.open import Model, load_model, needed
from mvdream_fast.core.arguments import array, finite, is_a, texts, whole
from mvdream_fast.core.errors import ArgumentError, DivergedError
from mvdream_fast.core.machine import choose_device, choose_dtype, encoder_dtype, memory_errors, repeated_shapes
from mvdream_fast.core.pinned import to_device
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import TextCond, beside_known, guided_call, model_fn
from mvdream_fast.diffusion.request import check_call, n_steps_and_seed, poses_of
from mvdream_fast.diffusion.sampler import (
    Callback,
    ModelFn,
    check_eta,
    check_scheduler,
    ddim_sample,
    diffusers_settings,
    scheduler_sample,
)
from mvdream_fast.diffusion.schedule import Convention, NoiseSchedule
from mvdream_fast.diffusion.views import Views, half_way
from mvdream_fast.models.config import Mode
from mvdream_fast.models.tokenizer import Encoded, check_prompt

SUFFIX = ", 3d asset"  # ended every caption of the multi-view training data
DECODE_BATCH = 8  # images that the VAE decodes at a time
Warn = Callable[[str], None]
Texts = str | Sequence[str] | None  # one for all, or one for each prompt; None is empty


class MVDreamPipeline:
    """Text to views with a multi-view diffusion model.

        views = MVDreamPipeline.from_pretrained("embedded")("a brown bulldog", seed=0).images

    Holds the model's modules on `device`; the UNet in `dtype`, text tower and VAE in float32 (they run once a call).
    The VAE's encoder alone, which score distillation runs at every step, has bfloat16 on a GPU whose UNet has 16 bits.
    """

    def __init__(
        self, model: Model, device: str | torch.device | None = "auto", dtype: str | torch.dtype | None = "auto",
        graphs: bool = True,
    ):  # fmt: skip
        """Args: model, from `checkpoints.open.load_model`; its modules are moved, not copied; parts may be None.
        graphs: False makes no CUDA graphs."""
        if not is_a(model, Model):
            raise ArgumentError(
                f"MVDreamPipeline: model must be a loaded Model, got {type(model).__name__}; "
                "MVDreamPipeline.from_pretrained takes a path or a name"
            )
        self.model, self.config = model, model.config
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.graphs, self._guided_call = graphs, guided_call(graphs)
        # T5 computes in float32 whatever it is stored in, and would be 19 GB as such.
        of_text = None if self.config.text.kind == "t5" else torch.float32
        for module, own in ((model.unet, self.dtype), (model.vae, torch.float32), (model.text, of_text)):
            if module is not None:
                with memory_errors("take --device cpu or --dtype float16"):
                    module.to(self.device, own).eval()
        if model.vae is not None:
            model.vae.encode_in(encoder_dtype(self.dtype, self.device))
        self.unet, self.vae, self.text = model.unet, model.vae, model.text
        self.tokenizer = model.tokenizer
        self.schedule = NoiseSchedule.from_config(model.config.schedule, self.device)

    @staticmethod
    def from_pretrained(
        path: str | Path | None = "embedded",
        device: str | torch.device | None = "auto",
        dtype: str | torch.dtype | None = "auto",
        graphs: bool = True,
    ) -> "MVDreamPipeline":
        """A model folder, a released file, or "embedded" for the small model that ships with the package. No network.

        Args: graphs: False makes no CUDA graphs: a step is then launched kernel by kernel.
        Raises: ModelError when it is missing, unreadable or of another configuration.
        """
        return MVDreamPipeline(load_model("embedded" if path is None else path), device, dtype, graphs)

    def drop(self) -> None:
        """Lets go of the model: it draws nothing from now on, and its memory is free once nothing else holds it."""
        self.unet = self.vae = self.text = self.model.unet = self.model.vae = self.model.text = None
        self._guided_call = guided_call(self.graphs)

    @property
    def suffix(self) -> str:
        """What ended the captions that the model was trained on."""
        return "" if self.config.foreign else SUFFIX

    @property
    def tells_things_apart(self) -> bool:
        """Whether views come with what stands before their backgrounds (`Views.cutout`)."""
        return self.config.vae.decoder_matting is not None and needed(self.vae, "vae").has_decoder

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """Keyword arguments for a diffusers scheduler that fits this model (`scheduler=`).

        DDIM and DDPM need `clip_sample=False` besides: they clip latents otherwise, and are refused.
        """
        return diffusers_settings(self.config.schedule)

    @overload
    def __call__(
        self, prompt: str, n_views: int = 4, elevation_deg: float = 15.0,
        azimuth_start_deg: float = 0.0, azimuth_span_deg: float = 360.0, n_steps: int = 50,
        guidance_scale: float | None = None, negative_prompt: Texts = "", suffix: Texts = SUFFIX, *,
        seed: int | None = 0, generator: torch.Generator | None = None, scheduler: Any = None,
        callback: Callback | None = None,
        camera: Cameras | Tensor | None = None, mode: Mode | None = None, convention: Convention = "ldm",
        eta: float = 0.0, warn: Warn | None = None, uncond_mode: Mode | None = None,
    ) -> Views: ...  # fmt: skip

    @overload
    def __call__(
        self, prompt: list[str] | tuple[str, ...], n_views: int = 4, elevation_deg: float = 15.0,
        azimuth_start_deg: float = 0.0, azimuth_span_deg: float = 360.0, n_steps: int = 50,
        guidance_scale: float | None = None, negative_prompt: Texts = "", suffix: Texts = SUFFIX, *,
        seed: int | None = 0, generator: torch.Generator | None = None, scheduler: Any = None,
        callback: Callback | None = None,
        camera: Cameras | Tensor | None = None, mode: Mode | None = None, convention: Convention = "ldm",
        eta: float = 0.0, warn: Warn | None = None, uncond_mode: Mode | None = None,
    ) -> list[Views]: ...  # fmt: skip

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str], n_views: int = 4, elevation_deg: float = 15.0,
        azimuth_start_deg: float = 0.0, azimuth_span_deg: float = 360.0, n_steps: int = 50,
        guidance_scale: float | None = None, negative_prompt: Texts = "", suffix: Texts = SUFFIX, *,
        seed: int | None = 0, generator: torch.Generator | None = None, scheduler: Any = None,
        callback: Callback | None = None,
        camera: Cameras | Tensor | None = None, mode: Mode | None = None, convention: Convention = "ldm",
        eta: float = 0.0, warn: Warn | None = None, uncond_mode: Mode | None = None,
    ) -> Views | list[Views]:  # fmt: skip
        """Samples `n_views` views of what the prompt says.

        Several prompts are sampled in one batch; prompt b then gets the noise of seed + b. The same call gives the
        same views. `n_steps` counts as upstream's DDIM does (30 makes 31) unless `convention` is "diffusers".

        Args:
            seed: None draws one, which the Views name.
            generator: draws all noise instead of `seed`.
            scheduler: a diffusers scheduler that samples in place of DDIM; see `scheduler_settings`. One that adds
                noise gives each prompt its own, too.
            callback: called after each step with (steps done, steps in all, latents [B*V, C, h, w]).
            camera: other poses, Cameras or an array [V, 4, 4] or [V, 16]; then n_views and the angles don't count.
            mode: "2d" leaves the cameras out: independent images, as the 2D half of the training data. None is "3d",
                but for a model that draws only single images.
            eta: how much of each step's noise is drawn anew: 0 is DDIM, 1 has DDPM's variance. Of a `scheduler` that
                knows it.
            warn: called with a sentence for words that the model won't see; by default a Python warning.
            uncond_mode: how guidance asks without the prompt: "3d" with the cameras, as MVDream does; "2d" without them
                and each view by itself, so that views are led to their cameras and to each other, too. None is what
                suits the model, as for guidance_scale (ModelConfig.guidance).

        Returns:
            Views, or a list of them for a list of prompts.

        Raises:
            ArgumentError: a prompt that is empty, a number of steps or views that cannot be, a foreign scheduler, or
                an argument of another kind.
            DivergedError: the latents left the finite numbers.
        """
        prompts = texts("pipeline", "prompt", prompt, 'describe an object, for example "a brown bulldog"')
        mode = self.config.modes[0] if mode is None else mode
        check_call(mode, self.config, camera, generator, callback)
        n_views = whole("pipeline", "n_views", n_views, "4 is what the models were trained with")
        n_steps, seed = n_steps_and_seed(n_steps, seed)
        guidance_scale, uncond_mode = self.guidance(guidance_scale, uncond_mode)
        eta = check_eta("pipeline", eta)
        if scheduler is not None:
            check_scheduler(scheduler, self.schedule, eta)
        angles_deg = (elevation_deg, azimuth_start_deg, azimuth_span_deg)
        poses = None if mode == "2d" else poses_of(camera, n_views, angles_deg)  # [V, 16]
        n_views = n_views if poses is None else len(poses)
        seeds = None if generator is not None else [seed + b for b in range(len(prompts))]
        with memory_errors("take fewer views or prompts, or --dtype float16"), repeated_shapes(self.device):
            ask = self.denoiser(
                self.encode_prompt(prompts, negative_prompt, suffix, warn), poses, n_views, guidance_scale, uncond_mode
            )
            noise, fresh = (
                self._draws(purpose, len(prompts), n_views, seeds, generator)
                for purpose in ("sampling", "sampling eta")
            )
            if scheduler is None:
                settings = (self.schedule, n_steps, guidance_scale, convention, callback)
                latents = ddim_sample(ask, noise(), *settings, eta=eta, fresh=fresh)
            else:
                of_prompts = [torch.Generator(self.device).manual_seed(s) for s in seeds or ()]
                own = [one for one in of_prompts for _ in range(n_views)]  # an image's, whatever else is in the batch
                settings = (scheduler, n_steps, guidance_scale, callback)
                latents = scheduler_sample(ask, noise(), *settings, generator=generator or own, eta=eta)
            views = self._views(latents, poses, prompts, seeds)
        return views[0] if isinstance(prompt, str) else views

    @torch.no_grad()
    def between(
        self, views: Views, n_steps: int = 50, guidance_scale: float | None = None, negative_prompt: str = "",
        suffix: str = SUFFIX, *, seed: int | None = 0, warn: Warn | None = None, uncond_mode: Mode | None = None,
    ) -> Views:  # fmt: skip
        """As many more views of what `views` show, half-way between them around the upright axis (`half_way`).

        They are sampled with the given views in sight: those get the noise of every step anew and are asked about, too.
        The arguments are those of a call.

        Raises: ArgumentError for views without cameras, or at steps of several sizes; else as a call.
        """
        if not is_a(views, Views):
            raise ArgumentError(f"between: views must be Views, got {type(views).__name__}; a call returns them")
        if views.cameras is None:
            raise ArgumentError("between: views must have cameras, got images of 2D mode; sample them in 3D mode")
        n_steps, seed = n_steps_and_seed(n_steps, seed)
        n_views, (scale, uncond_mode) = len(views.tensor), self.guidance(guidance_scale, uncond_mode)
        poses = torch.cat([views.cameras, half_way(views.cameras)])
        with memory_errors("take fewer views, or --dtype float16"), repeated_shapes(self.device):
            text = self.encode_prompt(views.prompt, negative_prompt, suffix, warn)
            exact = needed(self.vae, "vae").encode(to_device(views.tensor, self.device) * 2 - 1)
            noise, held = (
                to_device(Stream(seed, 0, name).normal(*exact.shape), self.device)
                for name in ("sampling between", "sampling between/known")
            )
            both = self.denoiser(text, poses, 2 * n_views, scale, uncond_mode)
            ask = beside_known(both, lambda t: self.schedule.add_noise(exact, held, t), n_views)
            latents = ddim_sample(ask, noise, self.schedule, n_steps, scale)
            return self._views(latents, poses[n_views:], [views.prompt], [seed])[0]

    def guidance(self, scale: float | None = None, uncond_mode: Mode | None = None) -> tuple[float, Mode]:
        """Both as they are given, or as they suit the model. Raises ArgumentError for a scale that is not finite, or
        another mode."""
        usual = self.config.guidance
        if uncond_mode not in (None, "3d", "2d"):
            raise ArgumentError(f"pipeline: uncond_mode must be 3d or 2d, got {uncond_mode!r}; 3d is MVDream's")
        scale = usual.scale if scale is None else scale
        scale = finite("pipeline", "guidance_scale", scale, f"{usual.scale} is the default")
        return scale, usual.uncond_mode if uncond_mode is None else uncond_mode

    @torch.no_grad()
    def encode_prompt(
        self,
        prompts: str | Sequence[str],
        negative_prompt: Texts = "",
        suffix: Texts = SUFFIX,
        warn: Warn | None = None,
    ) -> TextCond:
        """The prompts and the negative prompt as the UNet's text.

        Args: negative_prompt and suffix, one for all or one for each; None is empty. Of a prompt that is too long its
            own last words are cut, never the suffix.
        Returns: TextCond of B = number of prompts.
        Raises: ArgumentError if a prompt is empty, has control characters or is over 8 KB, or a count doesn't fit;
            RuntimeError if the model was loaded without its text tower.
        """
        encoded, n_prompts = self._tokens(prompts, negative_prompt, suffix)
        for sentence in _complaints(encoded, self.config.text.room):
            (warn or _python_warning)(sentence)
        states = needed(self.text, "text")(to_device(encoded.ids, self.device))
        return TextCond(states[:n_prompts], states[n_prompts:].expand(n_prompts, -1, -1))

    def unseen_words(
        self,
        prompts: str | Sequence[str],
        negative_prompt: Texts = "",
        suffix: Texts = SUFFIX,
    ) -> list[str]:
        """What `encode_prompt` would warn of, one sentence each for words that are cut and words that are unknown."""
        return _complaints(self._tokens(prompts, negative_prompt, suffix)[0], self.config.text.room)

    def _tokens(
        self, prompts: str | Sequence[str], negative_prompt: Texts,
        suffix: Texts,
    ) -> tuple[Encoded, int]:  # fmt: skip
        """Token ids of the prompts with their suffix, then of the negative prompts; and the number of prompts."""
        prompts = texts("encode_prompt", "prompts", prompts, 'describe an object, for example "a brown bulldog"')
        given = {"negative_prompt": negative_prompt, "suffix": suffix}
        negative, suffixes = (
            texts("encode_prompt", name, "" if x is None else x, "None is empty") for name, x in given.items()
        )
        for name, found in zip(given, (negative, suffixes), strict=True):
            if not prompts or len(found) not in (1, len(prompts)):
                raise ArgumentError(
                    f"encode_prompt: {name} must be one, or one for each of the {len(prompts)} prompts, "
                    f"got {len(found)}; there must be a prompt"
                )
        if self.text is None or self.tokenizer is None:
            raise RuntimeError("encode_prompt: the model must have its text tower; load it with the part 'text'")
        for prompt in prompts:
            check_prompt(prompt)
        pairs = [split_suffix(p, s) for p, s in zip(prompts, suffixes * (len(prompts) // len(suffixes)), strict=True)]
        heads, endings = zip(*pairs, strict=True)
        return self.tokenizer.encode([*heads, *negative], [*endings, *[""] * len(negative)]), len(prompts)

    def denoiser(
        self, text: TextCond, camera: Tensor | None, n_views: int, guidance_scale: float, uncond_mode: Mode = "3d"
    ) -> ModelFn:
        """`model_fn` of its UNet.

        Args: camera: [V, 16] for the views of every prompt, or None for 2D mode.
        Returns: a function of (latents [2*B*V, C, h, w], t), [uncond; cond]; of B*V latents for a guidance scale of 1.
        """
        unet, guided, text = needed(self.unet, "unet"), guidance_scale != 1, text.to(self.dtype)
        if camera is not None:
            camera = array("denoiser", "camera", camera, "numbers [V, 16]")
            camera = to_device(camera, self.device).repeat(len(text.cond), 1)
        return model_fn(unet, text, camera, n_views, guided, uncond_mode, self._guided_call)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, C, h, w] to images [n, 3, Hp, Wp], float32 in [0, 1].

        Raises: DivergedError if a number isn't finite, ArgumentError for another shape.
        """
        return self._decoded(latents)[0]

    def _views(
        self, latents: Tensor, poses: Tensor | None, prompts: Sequence[str], seeds: list[int] | None
    ) -> list[Views]:
        """Of each prompt, from the latents of all, prompts slowest; on the CPU."""
        images, cutouts = self._decoded(latents)
        images, cutouts = images.cpu(), None if cutouts is None else cutouts.cpu()
        n_views = len(images) // len(prompts)
        out: list[Views] = []
        for b, prompt in enumerate(prompts):
            rows = slice(b * n_views, (b + 1) * n_views)
            cutout = None if cutouts is None else cutouts[rows]
            out.append(Views(images[rows], poses, prompt, seeds[b] if seeds else None, cutout))
        return out

    def _decoded(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """`decode`, and the same as straight colours and alpha, [n, 4, Hp, Wp], where the model tells them apart."""
        latents, channels = array("decode", "latents", latents, "numbers [n, C, h, w]"), self.config.unet.in_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ArgumentError(
                f"decode: latents must be [n, {channels}, h, w], got {list(latents.shape)}; flatten prompts and views"
            )
        latents = latents.to(self.device)
        if not latents.isfinite().all():
            raise DivergedError("sampling left the finite numbers; try --dtype float32 or a lower guidance scale")
        vae = needed(self.vae, "vae")
        batches = [latents[i : i + DECODE_BATCH].float() for i in range(0, max(len(latents), 1), DECODE_BATCH)]
        mattes = [vae.matte(batch) for batch in batches]
        images = [vae.decode(x) if matte is None else matte.image for x, matte in zip(batches, mattes, strict=True)]
        apart = [torch.cat([matte.foreground / 2 + 0.5, matte.alpha], dim=1) for matte in mattes if matte is not None]
        cutouts = torch.cat(apart).clamp(0, 1).contiguous() if apart else None
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1).contiguous(), cutouts

    def describe(self) -> str:
        """Name, size, device and dtype, for a first line of output."""
        n_parameters = sum(p.numel() for p in needed(self.unet, "unet").parameters())
        return f"{self.config.name} ({n_parameters / 1e6:.1f} M) on {self.device} in {str(self.dtype)[6:]}"

    def _draws(
        self, purpose: str, n_prompts: int, n_views: int, seeds: list[int] | None, generator: torch.Generator | None
    ) -> Callable[[], Tensor]:
        """What draws standard normal latents [B*V, C, h, w], float32 whatever the UNet's dtype; one stream a prompt."""
        size = (self.config.unet.in_channels, self.config.latent_size, self.config.latent_size)
        if generator is not None:
            shape, device = (n_prompts * n_views, *size), generator.device
            return lambda: to_device(torch.randn(shape, generator=generator, device=device), self.device)
        streams = [Stream(seed, 0, purpose) for seed in seeds or ()]
        return lambda: to_device(torch.cat([stream.normal(n_views, *size) for stream in streams]), self.device)


def split_suffix(prompt: str, suffix: str = SUFFIX) -> tuple[str, str]:
    """The prompt and what it ends in: the suffix, once, also where the prompt has it already."""
    prompt, n = prompt.strip(), len(suffix.strip())
    if n and prompt.lower().endswith(suffix.strip().lower()):
        return prompt[:-n], prompt[-n:]
    return prompt, suffix


def _complaints(encoded: Encoded, room: int) -> list[str]:
    """One sentence for each kind of word that the model won't see; of several prompts together."""
    kinds = (
        (encoded.cut, f"the prompt has more than {room} tokens and is cut: not seen"),
        (encoded.unknown, "the model does not know"),
    )
    named = ((list(dict.fromkeys(word for words in lists for word in words)), what) for lists, what in kinds)
    replaced = dict(pair for pairs in encoded.replaced for pair in pairs)
    instead = [f"{word!r} was not trained on: it is read as {stand_in!r}" for word, stand_in in replaced.items()]
    return instead + [f"{what} {', '.join(repr(word) for word in words)}" for words, what in named if words]


def _python_warning(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)
