"""A step of score distillation, ours and the same of the same maths in plain torch and diffusers; random weights.

`plain` takes the ops' references for the renderer and diffusers' UNet under a regrouping processor; the autoencoder is
diffusers' own in both. Everything here may run in a contestant's own process.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import unets
from torch import Tensor

from mvdream_fast import ops
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import TextCond
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.distill.config import SDSConfig, replaced
from mvdream_fast.distill.state import RunState
from mvdream_fast.distill.systems import SDS_PRESETS
from mvdream_fast.guidance import sds
from mvdream_fast.models.config import MINI, SD21, ModelConfig, UNetConfig, VAEConfig
from mvdream_fast.scene.nerf import occupancy, renderer, volume
from mvdream_fast.scene.surface import distance, surface

PROMPT = "a green armchair"


def configurations(size: str) -> tuple[ModelConfig, SDSConfig]:
    """`tiny`, `mini` (the embedded model), or `paper`: its volume and recipe with a narrower model."""
    if size == "tiny":
        from reference.random_model import TINY

        return TINY, replaced(SDS_PRESETS["mini"], render_size=(16,), samples_per_ray=16)
    if size == "mini":
        return MINI, SDS_PRESETS["mini"]
    narrow = dataclasses.replace(
        SD21,
        unet=UNetConfig(model_channels=64, context_dim=256),
        vae=VAEConfig(block_out_channels=(32, 64, 128, 128)),
        text=dataclasses.replace(SD21.text, width=256),
    )
    # The references keep kilobytes a sample: the cap, the same for both, is what they have room for.
    first_stage = {"n_groups": (1,), "render_size": (64,), "milestones": (), "max_samples": 1 << 17}
    return narrow, replaced(SDS_PRESETS["paper"], samples_per_ray=128, **first_stage)


class PlainUNet:
    """diffusers' UNet as guidance calls ours."""

    def __init__(self, model: ModelConfig):
        from reference.diffusers_unet import RegroupProcessor, diffusers_unet, to_diffusers

        shapes = unets.shapes_of(model.unet)
        with torch.device("meta"):
            self.unet = diffusers_unet(model.unet, model.latent_size).eval()
        unets.fill(self.unet, to_diffusers(shapes, model.unet), shapes)
        self.camera = ops.MLP(*(unets.numbers(k, s) for k, s in shapes.items() if k.startswith("camera_embed.")))
        self.processor = RegroupProcessor(1)
        self.unet.set_attn_processor(self.processor)

    def prepare_context(self, context: Tensor) -> Tensor:
        return context

    def __call__(self, z_t, times, context, camera, n_views, n_prompts) -> Tensor:
        from reference.diffusers_unet import add_camera

        self.processor.n_views = n_views
        add_camera(self.unet, ops.camera_embedding(camera.repeat(n_prompts, 1), self.camera))
        context = context.repeat_interleave(n_views, 0)
        times = times.expand(len(z_t)).repeat(n_prompts)
        return self.unet(z_t.repeat(n_prompts, 1, 1, 1), times, context, return_dict=False)[0]


def our_unet(model: ModelConfig) -> torch.nn.Module:
    from mvdream_fast.models.unet import MultiViewUNet

    with torch.device("meta"):
        unet = MultiViewUNet(model.unet).eval()
    shapes = unets.shapes_of(model.unet)
    unets.fill(unet, {key: key for key in shapes}, shapes)
    return unet


@contextlib.contextmanager
def references() -> Iterator[None]:
    """The renderer of volumes and surfaces, the occupancy grid and the guidance in plain torch, meanwhile."""

    def composite(sigmas, rgb, samples, background):
        return ops.composite_ref(sigmas, rgb, samples.t_starts, samples.t_ends, samples.packed_info, background)

    field = SimpleNamespace(field=ops.field_ref, field_density=ops.field_density_ref)
    plain = (
        (renderer, "march_rays", ops.march_rays_ref),
        (renderer, "prune_samples", ops.prune_samples_ref),
        (renderer, "composite_samples", composite),
        (renderer, "render", ops.render_ref),
        (surface, "composite_samples", composite),
        (volume, "ops", field),
        (distance, "ops", field),
        (occupancy, "run_update", ops.update_occupancy_ref),
        (sds, "sds_target", ops.sds_target_ref),
    )
    before = [(module, name, getattr(module, name)) for module, name, _ in plain]
    try:
        for module, name, reference in plain:
            setattr(module, name, reference)
        yield
    finally:
        for module, name, ours in before:
            setattr(module, name, ours)


def guidance(model: ModelConfig, config: SDSConfig, unet: Any) -> sds.SDS:
    from mvdream_fast.models.vae import VAE

    torch.manual_seed(0)
    vae = VAE(model.vae, decoder=False).eval().requires_grad_(False)
    text = Stream(0, 0, "text").normal(2, model.text.context_length, model.unet.context_dim)
    schedule = NoiseSchedule.from_config(model.schedule)
    score = sds.ScoreDistillation(unet, vae, schedule, TextCond(text[:1], text[1:]), config.guidance)
    return sds.SDS(score, config.cameras)


def stepping(state: RunState) -> Callable[[], Tensor]:
    """A call that is the next step of a run; its loss."""
    steps = itertools.count()

    def call() -> Tensor:
        record = state.step(next(steps)) or state.settle()
        return torch.tensor(record.loss if record else float("nan"))

    return call


def in_plain_torch(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """A call that is made, and runs, with `references`."""
    with references():
        made = make()

    def call() -> Any:
        with references():
            return made()

    return call


def plain_step(size: str) -> Callable[[], Tensor]:
    model, config = configurations(size)
    return in_plain_torch(
        lambda: stepping(RunState(config, "a benchmark", 0, guidance(model, config, PlainUNet(model))))
    )


def our_step(size: str) -> Callable[[], Tensor]:
    model, config = configurations(size)
    return stepping(RunState(config, "a benchmark", 0, guidance(model, config, our_unet(model))))


def refining_step(size: str, side: int, resolution: int) -> Callable[[], Tensor]:
    """A step that refines tetrahedra at `side` x `side`, of a lattice of that resolution."""
    from mvdream_fast.scene.tets.config import TetsConfig
    from mvdream_fast.scene.tets.tets import Tets

    model, config = configurations(size)
    config = replaced(config, render_size=(side,))
    tets = Tets(TetsConfig(volume="mini", background="grey", tets_resolution=resolution))
    score = guidance(model, config, our_unet(model))
    return stepping(RunState(config, "a benchmark", 0, score, representation=tets))


def pipeline_step(kind: str, mode: str, model: str) -> Callable[[], Tensor]:
    """A step of a run of a saved model, by `sds` or by `vsd`; any but the embedded one is taken for a test's."""
    from mvdream_fast.distill.loop import new_guidance
    from mvdream_fast.pipeline import MVDreamPipeline

    small = {} if model == "embedded" else {"render_size": (16,), "samples_per_ray": 16}
    pipeline = MVDreamPipeline.from_pretrained(model, "cpu", "float32")
    config = replaced(SDS_PRESETS["mini"], loss="sds", kind=kind, mode=mode, **small)
    return stepping(RunState(config, PROMPT, 0, new_guidance(pipeline, PROMPT, config, 0)))


def whole_run(model: str, preset: str, **settings: Any) -> Callable[[], int]:
    """A call that is a whole run of a saved model, from the prompt to the asset, without files; its steps."""
    from mvdream_fast.distill.recipes import resolve_config
    from mvdream_fast.pipeline import MVDreamPipeline
    from mvdream_fast.text_to_3d import TextTo3D

    pipeline = MVDreamPipeline.from_pretrained(model, "cpu")
    config = resolve_config(preset, **settings)

    def call() -> int:
        TextTo3D(pipeline)(PROMPT, config=config)
        return config.steps

    return call
