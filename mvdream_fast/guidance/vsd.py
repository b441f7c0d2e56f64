"""Variational score distillation: the model's answer is held against that of a copy which learns the renders.

The copy is the model with low-rank adapters, told where each camera stands; guidance/sds.py has all that both methods
share.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, normalize_camera
from mvdream_fast.camera_sampling import CameraSampling
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.pinned import to_device
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import TextCond, ask
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.guidance.base import Timing, no_timing
from mvdream_fast.guidance.config import GuidanceConfig
from mvdream_fast.guidance.sds import (
    SDS,
    ScoreDistillation,
    SDSLoss,
    Wishes,
    distance,
    encoded,
    with_known_gradient,
)
from mvdream_fast.models.captured import Captured
from mvdream_fast.models.deepfloyd import UNet
from mvdream_fast.models.lora import adapted_twin
from mvdream_fast.models.pixels import Codec

BETAS, EPS = (0.9, 0.99), 1e-15  # of the adapters' AdamW, as of the asset's


class Learner:
    """The model with adapters, and what trains them: it learns to denoise the renders of this run.

    It is a twin around the same frozen weights, rather than the model itself with adapters that are switched on and
    off: what is switched at every call is never a CUDA graph, and the model's keys and values of the text would not
    hold. At first its answers are the model's: adapters and camera embedding begin as nothing.

    Args:
        words: of the prompt alone, [1, L, Dt] in the UNet's dtype.
        knows_cameras: the model is told the cameras, so the twin is told them in the same way. Otherwise it gets an
            embedding of its own for the 16 numbers of a pose, which it learns; a share of them, config.camera_dropout,
            is zeroed in training.
    """

    def __init__(
        self, unet: UNet, schedule: NoiseSchedule, words: Tensor, config: GuidanceConfig,
        knows_cameras: bool, seed: int = 0, graphs: bool = True,
    ):  # fmt: skip
        self.schedule, self.words, self.config, self.knows_cameras = schedule, words, config, knows_cameras
        self.unet = adapted_twin(unet, config.lora_rank, seed)
        if not knows_cameras:
            self.unet.learn_camera(seed)
        self.learned = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        for p in self.learned.values():
            p.data = p.data.float()  # steps of 1e-4 are lost in 16 bits
        parameters = [*self.learned.values()]
        self.optimizer = torch.optim.AdamW(parameters, lr=config.lora_lr, betas=BETAS, eps=EPS, fused=True)
        self._descent = Captured("a step of the adapters", _descend, parameters, graphs)

    def told(self, camera: Tensor) -> Tensor:
        """Cameras [B*V, 16] as the twin takes them: in the UNet's dtype, or in float32 for an embedding of its own."""
        return camera.to(self.words.dtype) if self.knows_cameras else camera

    def spread_words(self, n_groups: int) -> Tensor:
        """The prompt for each of n groups, [B, L, Dt]."""
        return self.words.expand(n_groups, -1, -1)

    def learn(self, latents: Tensor, camera: Tensor, n_views: int, stream: Stream) -> Tensor:
        """One step down the mean squared error of the twin's output on latents [B*V, C, h, w], at a timestep of each
        group from the whole schedule. A step with numbers that are not finite changes nothing.

        Returns: the error, a scalar that nobody has waited for.
        Source: Wang et al. 2023, "ProlificDreamer", algorithm 1.
        """
        n_groups, device = len(latents) // n_views, latents.device
        t = stream.integers(0, len(self.schedule.alphas_cumprod), n_groups).repeat_interleave(n_views)
        noise = stream.normal(*latents.shape, device=device)
        if not self.knows_cameras:
            kept = stream.uniform(len(camera), 1) >= self.config.camera_dropout
            camera = camera * to_device(kept.float(), device)
        loss, finite = self._descent(
            self.unet, self.schedule, n_views, latents, noise, to_device(t, device), self.told(camera),
            self.spread_words(n_groups),
        )  # fmt: skip
        # torch's fused optimisers divide by the one and skip a step by the other, unread; its stubs name neither
        self.optimizer.grad_scale = torch.full_like(loss, latents.numel())  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue] # as above
        self.optimizer.step()  # pyright: ignore[reportUnknownMemberType] # torch leaves its closure unannotated
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def state(self) -> dict[str, Tensor]:
        """What has been learned, and AdamW's moments and steps of each; live, not copies."""
        tensors = {f"learned.{name}": p.detach() for name, p in self.learned.items()}
        for name, p in self.learned.items():
            tensors |= {f"adam.{key}.{name}": value for key, value in self.optimizer.state.get(p, {}).items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the tensors of `state`. Raises ModelError for those of other adapters."""
        self.optimizer.state.clear()
        for name, p in self.learned.items():
            found = tensors.get(f"learned.{name}")
            if found is None or found.shape != p.shape:
                raise ModelError(
                    f"the checkpoint's adapters are of another configuration: {name} is "
                    f"{'missing' if found is None else list(found.shape)}, not {list(p.shape)}; start a new run"
                )
            p.copy_(found)
            moments = {key: tensors.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] |= {key: x.to(p).clone() for key, x in moments.items() if x is not None}


class VariationalScore(ScoreDistillation):
    """`ScoreDistillation` whose gradient on the latents is w(t) (eps - eps_learned): the model's noise with guidance,
    less the twin's with the prompt alone. config.loss and config.rescale are not used.

    Args: learner: of the same UNet. multi_view: the model is asked in 3D mode; otherwise the cameras are the twin's
        alone.
    Source: Wang et al. 2023, "ProlificDreamer", algorithm 1.
    """

    def __init__(
        self, unet: UNet, vae: Codec, schedule: NoiseSchedule, text: TextCond | None, config: GuidanceConfig,
        learner: Learner, multi_view: bool, sample_posterior: bool = True, graphs: bool = True,
    ):  # fmt: skip
        config = dataclasses.replace(config, loss="sds")
        super().__init__(unet, vae, schedule, text, config, sample_posterior, graphs)
        self.learner, self.multi_view = learner, multi_view
        self._step = Captured("variational score distillation", _with_gradient, enabled=graphs)
        self._seen: tuple[Tensor, Tensor, int] | None = None  # what the learner is to learn: latents, cameras, views

    def __call__(
        self,
        rgb: Tensor,
        c2w: Tensor | None,
        n_views: int,
        step: int,
        stream: Stream,
        timing: Timing = no_timing,
        text: TextCond | None = None,
        for_target: bool = False,
        away_weights: Tensor | None = None,
    ) -> SDSLoss:
        """See `ScoreDistillation`; c2w is needed in 2D mode, too. The loss has first derivatives only."""
        if c2w is None:
            raise ValueError("VariationalScore: c2w must be the views' poses, got None; the learner is told them")
        n_groups = len(rgb) // n_views
        drawn = self.timesteps(step, stream, n_groups, n_views)
        posterior, noise = self._noise(rgb, stream), self._noise(rgb, stream)
        camera = to_device(normalize_camera(c2w), rgb.device)
        denoiser = self._denoiser(n_groups, n_views, text)
        loss, target, d_rgb, latents = self._step(
            self.unet, self.learner.unet, self.vae, Wishes(self.schedule, self.config, n_views), denoiser.n_prompts,
            rgb, posterior if self.sample_posterior else None, noise, to_device(torch.tensor(drawn), rgb.device),
            self._limit(step, rgb.device), away_weights, camera.to(denoiser.dtype) if self.multi_view else None,
            self.learner.told(camera), self.learner.spread_words(n_groups), *denoiser.told(),
        )  # fmt: skip
        timing("unet")
        self._seen = latents, camera, n_views
        return SDSLoss(with_known_gradient(loss, rgb, d_rgb), round(sum(drawn) / len(drawn)), target)

    def learn(self, stream: Stream) -> Tensor | None:
        """The learner's step on the views of the last call, each of which it sees once; None where there was none."""
        if self._seen is None:
            return None
        (latents, camera, n_views), self._seen = self._seen, None
        return self.learner.learn(latents, camera, n_views, stream)


class VSD(SDS):
    """Guidance by variational score distillation, from random cameras: one step of the learner after each of the asset.

    Args: sides: as in `SDS`; the learner is told where a camera stands, but no side in words.
    Source: Wang et al. 2023, "ProlificDreamer", algorithm 1.
    """

    def __init__(
        self, score: VariationalScore, cameras: CameraSampling, n_groups: Callable[[int], int] = lambda _: 1,
        sides: TextCond | None = None,
    ):  # fmt: skip
        super().__init__(score, cameras, n_groups, sides=sides)
        self.variational = score

    def _answer(self, rgb: Tensor, views: Cameras, step: int, stream: Stream, timing: Timing) -> SDSLoss:
        n_views = self.cameras.n_views if self.variational.multi_view else 1
        return self.variational(rgb, views.c2w, n_views, step, stream, timing, *self._told(views))

    def after_step(self, step: int, stream: Stream) -> None:
        """The learner's step on the views of this one."""
        self.variational.learn(stream)

    def state(self) -> dict[str, Tensor]:
        """The learner's."""
        return self.variational.learner.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The learner's."""
        self.variational.learner.restore(tensors)


def _with_gradient(
    unet: UNet, learned: UNet, vae: Codec, wishes: Wishes, n_prompts: int, rgb: Tensor,
    posterior: Tensor | None, noise: Tensor, at: Tensor, limit: Tensor | None, away_weights: Tensor | None,
    camera: Tensor | None, learned_camera: Tensor, learned_words: Tensor, *told: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, target, the loss' gradient on rgb, and the latents: `VariationalScore` as a function of its arguments."""
    with torch.enable_grad():
        rgb = rgb.detach().requires_grad_()
        z = encoded(vae, rgb, posterior)
        z_t = wishes.schedule.add_noise(z.detach(), noise.to(z.dtype), at)
        of_renders = ask(learned, z_t, at, learned_camera, wishes.n_views, 1, learned_words)
        of_model = ask(unet, z_t, at, camera, wishes.n_views, n_prompts, *told)
        # SDS' formula, with what the learner takes for noise in the place of the noise that was added.
        own_noise = wishes.schedule.to_noise(z_t, of_renders, at)
        target = wishes.target(z, z_t, of_model, own_noise, at, limit, away_weights)
        loss = distance(z, target)
        (d_rgb,) = torch.autograd.grad(loss, rgb)
    return loss.detach(), target, d_rgb, z.detach()


def _descend(
    learned: UNet, schedule: NoiseSchedule, n_views: int, latents: Tensor, noise: Tensor, t: Tensor,
    camera: Tensor, words: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The mean squared error, and whether all is finite; leaves the gradients of the sum of squares, which are in the
    range of 16 bits."""
    with torch.enable_grad():
        z_t = schedule.add_noise(latents, noise, t)
        out = learned(z_t.to(words.dtype), t, words, camera, n_views)
        squares = (out.float() - schedule.target(latents, noise, t)).square()
        squares.sum().backward()
    gradients = [p.grad for p in learned.parameters() if p.grad is not None]
    return squares.detach().mean(), torch.nn.utils.get_total_norm(gradients).isfinite()
