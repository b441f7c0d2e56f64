"""Recipes: what a text-to-3D run does, as plain frozen values; no torch here."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.models.config import MINI

Ramp = tuple[float, float, float, float]  # (start step, value there, value at the end, end step), linear and clamped

# MVDream-threestudio's, for the paper's recipe; the embedded model was trained with an empty one.
PAPER_NEGATIVE_PROMPT = (
    "ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and unclear, cropped, "
    "lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn face, deformed, dehydrated, "
    "bad proportions"
)


@dataclass(frozen=True)
class SDSConfig:
    """A text-to-3D run (`text_to_3d.py`). The defaults are the paper's recipe, MVDream-threestudio's mvdream-sd21.

    Tuples with one entry a stage (`render_size`, `n_groups`) switch at `milestones`. The loss weights and the range
    of timesteps are ramps over the steps.
    """

    preset: Literal["paper", "mini", "fast"] = "paper"
    method: Literal["sds", "reconstruct"] = "sds"
    mode: Literal["3d", "2d"] = "3d"  # 2d: DreamFusion's single-view prior, for comparison: no cameras, but view words
    steps: int = 10_000
    n_views: int = 4
    n_groups: tuple[int, ...] = (2, 1)
    render_size: tuple[int, ...] = (64, 256)
    milestones: tuple[int, ...] = (5000,)
    samples_per_ray: int = 512
    elevation_range_deg: tuple[float, float] = (0.0, 30.0)
    fovy_range_deg: tuple[float, float] = (15.0, 60.0)
    distance_range: tuple[float, float] = (0.8, 1.0)
    relative_distance: Literal["tan", "sin", "none"] = "tan"
    elevations: Literal["uniform", "upstream"] = "uniform"
    loss: Literal["x0", "sds"] = "x0"
    guidance_scale: float = 50.0
    rescale: float = 0.5
    min_step: Ramp = (0.0, 0.98, 0.02, 8000.0)
    max_step: Ramp = (0.0, 0.98, 0.50, 8000.0)
    negative_prompt: str = PAPER_NEGATIVE_PROMPT
    suffix: str = ""
    volume: Literal["paper", "mini"] = "paper"
    background: Literal["learned", "grey", "white"] = "learned"
    background_aug_prob: float = 0.5
    shading: bool = False
    shading_from: int = 5000  # the step of the first lit picture
    lambda_orient: Ramp = (0.0, 0.0, 0.0, 0.0)
    lambda_sparsity: Ramp = (0.0, 0.0, 0.0, 0.0)
    lambda_opaque: Ramp = (0.0, 0.0, 0.0, 0.0)
    lambda_z_variance: Ramp = (0.0, 0.0, 0.0, 0.0)
    lr_encoding: float = 0.01
    lr_mlp: float = 0.001
    lr_background: float = 0.001
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    adam_eps: float = 1e-15
    max_samples: int = 1 << 23

    updates_per_guidance: int = 1  # updates of the volume towards one answer of the model; the paper makes one
    match: Literal["latents", "pixels"] = "latents"  # where a render is compared with that answer

    def asked(self, step: int) -> int:
        """The step whose cameras, resolution and answer of the model `step` uses: its own, unless they are reused."""
        return step - step % self.updates_per_guidance

    def stage(self, step: int) -> int:
        """Index of the stage that `step` belongs to."""
        return sum(self.asked(step) >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class ExportConfig:
    """What is made of the finished volume: mesh.glb always, other formats beside it."""

    mesh_resolution: int = 128
    faces: int | None = None  # at most this many triangles
    texture: int | None = None  # pixels a side of a baked texture; None colours the vertices
    formats: tuple[Literal["glb", "obj", "ply"], ...] = ("glb",)
    up: Literal["y", "z"] = "y"  # of OBJ and PLY; GLB is always y-up


SDS_PRESETS = {
    "paper": SDSConfig(),
    "mini": SDSConfig(
        preset="mini",
        steps=600,
        n_groups=(1,),
        render_size=(64,),
        milestones=(),
        samples_per_ray=128,
        fovy_range_deg=(30.0, 50.0),
        distance_range=(1.0, 1.05),
        relative_distance="sin",
        guidance_scale=7.5,
        min_step=(0.0, 0.98, 0.02, 480.0),
        max_step=(0.0, 0.98, 0.50, 480.0),
        negative_prompt="",
        volume="mini",
        background="grey",
    ),
}
SDS_PRESETS["fast"] = dataclasses.replace(
    SDS_PRESETS["mini"],
    preset="fast",
    steps=300,
    render_size=(32, 64),
    n_groups=(1, 1),
    milestones=(150,),
    samples_per_ray=96,
    min_step=(0.0, 0.98, 0.02, 240.0),
    max_step=(0.0, 0.98, 0.50, 240.0),
)


def preset_for(image_size: int) -> str:
    """The preset that fits a model which draws `image_size` pixels a side."""
    return "mini" if image_size <= MINI.vae.image_size else "paper"


def shaded(config: SDSConfig) -> SDSConfig:
    """The shading variant of a recipe: a point light in its second half, and an orientation loss of 10 to 1000."""
    half = config.steps // 2
    return dataclasses.replace(config, shading=True, shading_from=half, lambda_orient=(0.0, 10.0, 1000.0, float(half)))


def resolve_config(base: str | SDSConfig, **overrides) -> SDSConfig:
    """A preset, or a configuration, with single fields replaced. Raises ArgumentError for unknown names."""
    if isinstance(base, str) and base not in SDS_PRESETS:
        raise ArgumentError(f"preset must be one of {', '.join(SDS_PRESETS)}, got {base!r}")
    config = SDS_PRESETS[base] if isinstance(base, str) else base
    known = {f.name for f in dataclasses.fields(config)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ArgumentError(f"unknown setting(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    steps = overrides.get("steps", config.steps)
    if steps != config.steps:
        overrides = {**_stretched(config, steps), **overrides}
    return dataclasses.replace(config, **overrides)


def _stretched(config: SDSConfig, steps: int) -> dict:
    """Ramps and milestones for another number of steps, keeping their place in the run."""
    factor = steps / config.steps
    ramps = [f.name for f in dataclasses.fields(config) if f.name.startswith(("lambda_", "min_step", "max_step"))]
    out: dict = {}
    for name in ramps:
        start, first, last, end = getattr(config, name)
        out[name] = (start * factor, first, last, end * factor)
    out["shading_from"] = round(config.shading_from * factor)
    out["milestones"] = tuple(round(m * factor) for m in config.milestones)
    return out
