"""Recipes: what a text-to-3D run does, as functions that return one frozen value; no torch here.

A setting has one name wherever it is written by itself (a flag, a keyword, a line of a settings file), whichever part
of the recipe holds it: `replaced(config, guidance_scale=7.5)`, `settings_of(config)`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Interval

from mvdream_fast.camera_sampling import CameraSampling
from mvdream_fast.core.errors import ArgumentError, UserError
from mvdream_fast.core.schema import Checked, Share, checked
from mvdream_fast.guidance.config import GuidanceConfig, RepaintConfig
from mvdream_fast.models.config import MINI
from mvdream_fast.scene.nerf.config import NerfConfig

Momentum = Annotated[float, Interval(ge=0, lt=1)]

# MVDream-threestudio's, for the paper's recipe; the embedded model was trained with an empty one.
PAPER_NEGATIVE_PROMPT = (
    "ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and unclear, cropped, "
    "lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn face, deformed, dehydrated, "
    "bad proportions"
)


@dataclass(frozen=True)
class SDSConfig(Checked):
    """A text-to-3D run. The defaults are the paper's recipe, MVDream-threestudio's mvdream-sd21.

    Tuples with one entry a stage (`render_size`, `n_groups`) switch at `milestones`. The loss weights and the range
    of timesteps are ramps over the steps.
    """

    preset: Literal["paper", "mini", "fast"] = "paper"
    method: Literal["sds", "reconstruct"] = "sds"
    mode: Literal["3d", "2d"] = "3d"  # 2d: DreamFusion's single-view prior, for comparison: no cameras, but view words
    steps: Annotated[int, Interval(ge=1, le=10**7)] = 10_000
    cameras: CameraSampling = field(default_factory=CameraSampling)
    n_groups: tuple[Annotated[int, Interval(ge=1, le=64)], ...] = (2, 1)
    render_size: tuple[Annotated[int, Interval(ge=8, le=1024)], ...] = (64, 256)
    milestones: tuple[int, ...] = (5000,)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    repaint: RepaintConfig = field(default_factory=RepaintConfig)
    negative_prompt: str = PAPER_NEGATIVE_PROMPT
    suffix: str = ""
    # Updates towards one answer of the model; the paper makes one.
    updates_per_guidance: Annotated[int, Interval(ge=1, le=1000)] = 1
    match: Literal["latents", "pixels"] = "latents"  # where a render is compared with that answer
    representation: NerfConfig = field(default_factory=NerfConfig)
    shading: bool = False
    shading_from: int = 5000  # the step of the first lit render
    lr_decay: Annotated[float, Interval(gt=0, le=1)] = 1.0  # share of the learning rates that is left at the end
    lr_decay_from: Share = 0.0  # the share of the run after which they fall, geometrically
    weight_decay: Momentum = 0.01
    betas: tuple[Momentum, Momentum] = (0.9, 0.99)
    adam_eps: Annotated[float, Interval(gt=0, lt=1)] = 1e-15

    def asked(self, step: int) -> int:
        """The step whose cameras, resolution and answer of the model `step` uses: its own, unless they are reused."""
        return step if step >= self.repaint_step else step - step % self.updates_per_guidance

    @property
    def repaint_step(self) -> int:
        """The first step that fits repainted views; the number of steps where none does."""
        first = round(self.repaint.repaint_from * self.steps)
        return first - first % self.updates_per_guidance if self.repaint.repaints else self.steps

    def stage(self, step: int) -> int:
        """Index of the stage that `step` belongs to."""
        return sum(self.asked(step) >= milestone for milestone in self.milestones)

    def lr_share(self, step: int) -> float:
        """What is left of the learning rates at `step`."""
        past = step / self.steps - self.lr_decay_from
        return self.lr_decay ** (past / (1 - self.lr_decay_from)) if past > 0 else 1.0

    def n_rays(self) -> int:
        """Rays of a step at the largest stage."""
        return max(n * self.cameras.n_views * size**2 for n, size in zip(self.n_groups, self.render_size))


PARTS = {f.name: f.type for f in dataclasses.fields(SDSConfig) if dataclasses.is_dataclass(f.type)}
PART_OF = {f.name: part for part, cls in PARTS.items() for f in dataclasses.fields(cls)}
SETTINGS = sorted({f.name for f in dataclasses.fields(SDSConfig)} - PARTS.keys() | PART_OF.keys())


def settings_of(config: SDSConfig) -> dict[str, Any]:
    """Every setting by its own name: what config.json, checkpoints and assets hold."""
    values = {name: getattr(config, name) for name in SETTINGS if name not in PART_OF}
    return values | {name: getattr(getattr(config, part), name) for name, part in PART_OF.items()}


def replaced(config: SDSConfig, **settings: Any) -> SDSConfig:
    """`config` with single settings replaced, each by its own name. Raises ArgumentError for unknown names."""
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ArgumentError(f"unknown setting(s) {', '.join(unknown)}; known: {', '.join(SETTINGS)}")
    return dataclasses.replace(config, **_nested(settings, config))


def typed(
    settings: Mapping[str, Any], source: str, error: type[UserError], names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Settings as their types want them; source, error and names as in `checked`, and a setting's name is its own.

    Raises: `error`, naming the setting that is unknown, of another type or out of bounds.
    """
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise error(f"{source}: unknown key(s) {', '.join(unknown)}; known: {', '.join(SETTINGS)}")
    whole = checked(SDSConfig, _nested(settings), source, error, {name: name for name in SETTINGS} | dict(names or {}))
    return {name: value for name, value in settings_of(whole).items() if name in settings}


def check_ending(config: SDSConfig) -> None:
    """Raises ArgumentError for a run that can't end as it is told to."""
    without = "repaint_from must be 1 (never) with"
    if config.repaint.repaints and config.method == "reconstruct":
        raise ArgumentError(
            f"{without} method reconstruct, whose views stay as they were sampled, got "
            f"{config.repaint.repaint_from:g}; leave it out, or take the method sds"
        )
    if config.repaint.repaints and config.guidance.kind == "vsd" and config.guidance.particles > 1:
        raise ArgumentError(
            f"{without} {config.guidance.particles} particles, which it would make alike, got "
            f"{config.repaint.repaint_from:g}; leave it out, or take 1 particle"
        )


def _nested(settings: Mapping[str, Any], config: SDSConfig | None = None) -> dict[str, Any]:
    """Settings by the fields of SDSConfig: its parts as plain dicts, or, with `config`, as its parts with changes."""
    out = {name: value for name, value in settings.items() if name not in PART_OF}
    for part in PARTS:
        changes = {name: value for name, value in settings.items() if PART_OF.get(name) == part}
        if changes:
            out[part] = changes if config is None else dataclasses.replace(getattr(config, part), **changes)
    return out


@dataclass(frozen=True)
class ExportConfig(Checked):
    """What is made of the finished asset: mesh.glb always, other formats beside it."""

    mesh_resolution: Annotated[int, Interval(ge=8, le=512)] = 128
    faces: Annotated[int, Interval(ge=4)] | None = None  # at most this many triangles
    texture: Annotated[int, Interval(ge=16, le=8192)] | None = None  # pixels a side; None colours the vertices instead
    formats: tuple[Literal["glb", "obj", "ply"], ...] = ("glb",)
    up: Literal["y", "z"] = "y"  # of OBJ and PLY; GLB is always y-up


def paper() -> SDSConfig:
    """MVDream's recipe for the released models."""
    return SDSConfig()


def mini() -> SDSConfig:
    """The embedded model on a CPU."""
    return SDSConfig(
        preset="mini",
        steps=600,
        cameras=CameraSampling.mini(),
        n_groups=(1,),
        render_size=(64,),
        milestones=(),
        guidance=GuidanceConfig(
            guidance_scale=7.5, min_step=(0.0, 0.98, 0.02, 480.0), max_step=(0.0, 0.98, 0.50, 480.0)
        ),
        negative_prompt="",
        representation=NerfConfig(volume="mini", background="grey", samples_per_ray=128),
    )


def fast() -> SDSConfig:
    """Half of mini's steps, the first half of them at half the size."""
    return replaced(
        mini(),
        preset="fast",
        steps=300,
        render_size=(32, 64),
        n_groups=(1, 1),
        milestones=(150,),
        samples_per_ray=96,
        min_step=(0.0, 0.98, 0.02, 240.0),
        max_step=(0.0, 0.98, 0.50, 240.0),
    )


SDS_PRESETS = {"paper": paper(), "mini": mini(), "fast": fast()}


def preset_for(image_size: int) -> str:
    """The preset that fits a model which draws `image_size` pixels a side."""
    return "mini" if image_size <= MINI.vae.image_size else "paper"


def shaded(config: SDSConfig) -> SDSConfig:
    """The shading variant of a recipe: a point light in its second half, and an orientation loss of 10 to 1000."""
    half = config.steps // 2
    return replaced(config, shading=True, shading_from=half, lambda_orient=(0.0, 10.0, 1000.0, float(half)))


def resolve_config(base: str | SDSConfig, **overrides: Any) -> SDSConfig:
    """A preset, or a configuration, with single settings replaced. Raises ArgumentError for unknown names."""
    if isinstance(base, str) and base not in SDS_PRESETS:
        raise ArgumentError(f"preset must be one of {', '.join(SDS_PRESETS)}, got {base!r}")
    config = SDS_PRESETS[base] if isinstance(base, str) else base
    steps = overrides.get("steps", config.steps)
    if steps != config.steps:
        overrides = {**_stretched(config, steps), **overrides}
    return replaced(config, **overrides)


def _stretched(config: SDSConfig, steps: int) -> dict[str, Any]:
    """Ramps and milestones for another number of steps, keeping their place in the run."""
    factor = steps / config.steps
    out: dict[str, Any] = {}
    for name, value in settings_of(config).items():
        if name.startswith(("lambda_", "min_step", "max_step", "grad_clip")) and value is not None:
            start, first, last, end = value
            out[name] = (start * factor, first, last, end * factor)
    out["shading_from"] = round(config.shading_from * factor)
    out["milestones"] = tuple(round(m * factor) for m in config.milestones)
    return out
