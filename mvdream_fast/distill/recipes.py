"""Recipes: what a text-to-3D run does, as functions that return one frozen value; no torch here.

RECIPES is the table of them. Each has three sizes, named as the presets: the paper's own for full models, and two for
the small models that ship with the package. At one of those all recipes ask the model about as many views
(`guided_views`), so that they compare.

A setting has one name wherever it is written by itself (a flag, a keyword, a line of a settings file), whichever part
of the recipe holds it: `replaced(config, guidance_scale=7.5)`, `settings_of(config)`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal

from annotated_types import Interval

from mvdream_fast.camera_sampling import CameraSampling
from mvdream_fast.core.errors import ArgumentError, UserError
from mvdream_fast.core.ramp import WeightRamp
from mvdream_fast.core.schema import Checked, Share, checked
from mvdream_fast.distill.recipe import Recipe
from mvdream_fast.guidance.config import GuidanceConfig, RepaintConfig
from mvdream_fast.models.config import MINI
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.shapes import RAMPS, SHAPES, ShapeConfig, changed, checked_shape, reshaped

MVDREAM = "mvdream"
RecipeName = Literal["mvdream", "mvdream-sharp", "dreamfusion-if", "prolificdreamer"]
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

    recipe: RecipeName = "mvdream"
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
    representation: ShapeConfig = field(default_factory=NerfConfig)
    shading: bool = False
    shading_from: int = 5000  # the step of the first lit render
    soft_shading: bool = True  # the share of diffuse light is drawn each time; else it is 0.9
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


PARTS = {f.name: c for f in dataclasses.fields(SDSConfig) if dataclasses.is_dataclass(c := f.default_factory)}
_CLASSES = [*PARTS.items(), *(("representation", cls) for cls in SHAPES.values())]
PART_OF = {f.name: part for part, cls in _CLASSES for f in dataclasses.fields(cls)}
SETTINGS = sorted({f.name for f in dataclasses.fields(SDSConfig)} - PARTS.keys() | PART_OF.keys())


def settings_of(config: SDSConfig) -> dict[str, Any]:
    """Every setting by its own name, those of other shapes left out: what config.json, checkpoints and assets hold."""
    values = {name: getattr(config, name) for name in SETTINGS if name not in PART_OF}
    parts = [getattr(config, part) for part in PARTS]
    return values | {f.name: getattr(part, f.name) for part in parts for f in dataclasses.fields(part)}


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
    names, nested = {name: name for name in SETTINGS} | dict(names or {}), _nested(settings)
    shape = checked_shape(nested.pop("representation", {}), source, error, names)
    whole = dataclasses.replace(checked(SDSConfig, nested, source, error, names), representation=shape)
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
        replace = changed if part == "representation" else dataclasses.replace
        if changes:
            out[part] = changes if config is None else replace(getattr(config, part), **changes)
    return out


@dataclass(frozen=True)
class ExportConfig(Checked):
    """What is made of the finished asset: mesh.glb always, other formats beside it."""

    mesh_resolution: Annotated[int, Interval(ge=8, le=512)] = 128
    faces: Annotated[int, Interval(ge=4)] | None = None  # at most this many triangles
    # Pixels a side; 0, or None in files of older runs, colours the vertices instead.
    texture: Literal[0] | Annotated[int, Interval(ge=16, le=8192)] | None = 1024
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
        representation=NerfConfig(volume="mini", background="grey", samples_per_ray=128, normals="finite_difference"),
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
    """The shading variant of a recipe: a point light in its second half; where it has the weight, orientation loss."""
    half = config.steps // 2
    losses = {"lambda_orient": (0.0, 10.0, 1000.0, float(half))} if "lambda_orient" in settings_of(config) else {}
    return replaced(config, shading=True, shading_from=half, **losses)


def resolve_config(base: str | SDSConfig, **overrides: Any) -> SDSConfig:
    """A recipe (`recipe=`, by default mvdream) at a preset, or a configuration, with single settings replaced.

    Raises ArgumentError for unknown names, and for another recipe than the configuration's.
    """
    if isinstance(base, str):
        recipe = overrides.get("recipe", MVDREAM)
        for name, found, known in (("preset", base, SDS_PRESETS), ("recipe", recipe, RECIPES)):
            if found not in known:
                raise ArgumentError(f"{name} must be one of {', '.join(known)}, got {found!r}")
        config = RECIPES[recipe].at(base)
    else:
        config = base
    if overrides.get("recipe", config.recipe) != config.recipe:
        raise ArgumentError(
            f"recipe must be {config.recipe!r}, as the configuration's, got {overrides['recipe']!r}; name it beside a "
            "preset, in place of one"
        )
    shape = reshaped(config.representation, overrides.get("shape"), config.steps / SDSConfig.steps)
    config = dataclasses.replace(config, representation=shape)
    steps = overrides.get("steps", config.steps)
    if steps != config.steps:
        overrides = {**_stretched(config, steps), **overrides}
    return replaced(config, **overrides)


def _stretched(config: SDSConfig, steps: int) -> dict[str, Any]:
    """Ramps and milestones for another number of steps, keeping their place in the run."""
    factor = steps / config.steps
    out: dict[str, Any] = {}
    for name, value in settings_of(config).items():
        if name.startswith((*RAMPS, "min_step", "max_step", "grad_clip")) and value is not None:
            start, first, last, end = value
            out[name] = (start * factor, first, last, end * factor)
    milestones = tuple(round(m * factor) for m in config.milestones)
    return out | {"shading_from": round(config.shading_from * factor), "milestones": milestones}


def constant(weight: float) -> WeightRamp:
    """A weight, or a share, that stays the same."""
    return (0.0, weight, weight, 0.0)


def repaint(config: SDSConfig, share: float = 0.3, opaque: float = 300.0) -> SDSConfig:
    """The recipe with its last `share` of steps fitted to views that the model has redrawn, and with a loss of that
    weight on opacities between 0 and 1, whole half-way to the end, where it has none of its own."""
    first, last = (1 - share) * config.steps, config.steps
    own = settings_of(config).get("lambda_opaque")  # None: a mesh is opaque
    losses = {} if own is None or any(own[1:3]) else {"lambda_opaque": (first, 0.0, opaque, (first + last) / 2)}
    return replaced(config, repaint_from=1 - share, **losses)


def guided_views(config: SDSConfig) -> int:
    """Views that the model is asked about in a run, each with and without the prompt; a redrawn view once for every
    step of its sampler."""
    every, first = config.updates_per_guidance, config.repaint_step
    ends = (0, *(min(milestone, first) for milestone in config.milestones), first)
    asked = [-(-end // every) - -(-start // every) for start, end in pairwise(ends)]  # steps that ask, by stage
    groups = sum(n * groups for n, groups in zip(asked, config.n_groups, strict=True))
    return config.cameras.n_views * (groups + _sampler_steps(config))


def _sampler_steps(config: SDSConfig) -> int:
    """Of all groups that a run redraws together."""
    first, n, most, total = config.repaint_step, config.repaint.repaint_steps, config.repaint.repaint_groups, 0
    for step in range(first, config.steps):
        if step - first < most or (step - first) % config.repaint.repaint_every == 0:
            strength = config.repaint.strength(step, first, config.steps)
            total += n - min(round((1 - strength) * n), n - 1) if strength else 0
    return total


def mvdream(size: str = "paper") -> SDSConfig:
    """Score distillation from four views at once, of a model that knows their cameras."""
    return SDS_PRESETS[size]


def mvdream_sharp(size: str = "paper") -> SDSConfig:
    """mvdream, whose end is fitted to redrawn views; at the small sizes as long as it asks about as many as mvdream."""
    config = replaced(repaint(mvdream(size)), recipe="mvdream-sharp")
    return resolve_config(config, steps=SHARP_STEPS.get(size, config.steps))


SHARP_STEPS = {"mini": 706, "fast": 343}


def dreamfusion_if(size: str = "paper") -> SDSConfig:
    """Score distillation from single views in a space of pixels, as threestudio's dreamfusion-if."""
    paper = SDSConfig(
        recipe="dreamfusion-if",
        mode="2d",
        steps=10_000,
        cameras=CameraSampling(
            n_views=1, elevation_range_deg=(-10.0, 90.0), fovy_range_deg=(40.0, 70.0), distance_range=(1.5, 2.0),
            relative_distance="none", perturb=(0.1, 0.2, 0.02),
        ),
        n_groups=(1,),
        render_size=(64,),
        milestones=(),
        guidance=GuidanceConfig(
            loss="sds", guidance_scale=20.0, guided_from="cond", rescale=0.0, min_step=constant(0.02),
            max_step=constant(0.98), timesteps="each", weighting="sds", view_words=True,
        ),
        negative_prompt="",
        representation=NerfConfig(
            radius=2.0, background_aug_prob=0.0, lambda_orient=(0.0, 10.0, 1000.0, 5000.0),
            lambda_sparsity=constant(1.0), lr_encoding=0.01, lr_mlp=0.01, lr_background=0.001,
        ),
        shading=True,
        shading_from=2001,
        soft_shading=False,
        weight_decay=0.0,  # Adam
    )  # fmt: skip
    return paper if size == "paper" else _embedded(paper, size)


def prolificdreamer(size: str = "paper") -> SDSConfig:
    """Variational score distillation from single views of a latent model: the first of ProlificDreamer's stages, as
    threestudio's prolificdreamer."""
    paper = SDSConfig(
        recipe="prolificdreamer",
        mode="2d",
        steps=25_000,
        cameras=CameraSampling(
            n_views=1, elevation_range_deg=(-10.0, 45.0), fovy_range_deg=(40.0, 70.0), distance_range=(1.0, 1.5),
            relative_distance="none",
        ),
        n_groups=(1, 1),
        render_size=(64, 512),
        milestones=(5000,),
        guidance=GuidanceConfig(
            kind="vsd", loss="sds", guidance_scale=7.5, rescale=0.0, min_step=constant(0.02),
            max_step=(5000.0, 0.98, 0.50, 5001.0), timesteps="each", weighting="sds", view_words=True, lora_lr=1e-4,
        ),
        negative_prompt="",
        representation=NerfConfig(lambda_sparsity=constant(10.0), lambda_opaque=(10_000.0, 0.0, 1000.0, 10_001.0)),
    )  # fmt: skip
    return paper if size == "paper" else _embedded(paper, size, LATENTS_SHARE)


# Numbers in the embedded model's latents over those in Stable Diffusion's at 512 pixels: guidance sums over them.
LATENTS_SHARE = MINI.vae.latent_channels * MINI.latent_size**2 / (4 * 64**2)


def _embedded(paper: SDSConfig, size: str, weight: float = 1.0) -> SDSConfig:
    """A recipe of single views for an embedded model: guidance, rates, losses and shading are the paper's, their
    schedules stretched; steps, cameras, images and volume are mvdream's of this size, its V views V scenes of one.

    weight: of the losses beside guidance, for a model whose images have fewer numbers than the paper's.
    """
    like = SDS_PRESETS[size]
    config = resolve_config(paper, steps=like.steps)
    of_model = ("volume", "normals", "radius", "background", "background_aug_prob", "samples_per_ray")
    nerf = {name: getattr(like.representation, name) for name in of_model}
    weights = {
        name: (ramp[0], ramp[1] * weight, ramp[2] * weight, ramp[3])
        for name, ramp in dataclasses.asdict(config.representation).items()
        if name.startswith("lambda_")
    }
    return dataclasses.replace(
        config,
        preset=like.preset,
        cameras=dataclasses.replace(like.cameras, n_views=1),
        n_groups=tuple(n * like.cameras.n_views for n in like.n_groups),
        render_size=like.render_size,
        milestones=like.milestones,
        representation=dataclasses.replace(config.representation, **nerf, **weights),
    )


_MULTI_VIEW = "a multi-view model"
_GET_MVDREAM = "fetch MVDream/MVDream's sd-v2.1-base-4view.pt from the Hugging Face hub and name the file by --model"
RECIPES = {
    "mvdream": Recipe(
        mvdream, "MVDream, Shi et al. 2023", "score distillation of four views at once, a density volume", _MULTI_VIEW,
        "embedded", None, _GET_MVDREAM,
    ),
    "mvdream-sharp": Recipe(
        mvdream_sharp, "MVDream, Shi et al. 2023; repainting is this project's",
        "mvdream; in the last three tenths the volume is fitted to redrawn views", _MULTI_VIEW, "embedded", None,
        _GET_MVDREAM,
    ),
    "dreamfusion-if": Recipe(
        dreamfusion_if, "DreamFusion, Poole et al. 2022, with DeepFloyd IF in place of Imagen",
        "score distillation of single views, a density volume, lit from a fifth of the steps on", "a model of pixels",
        "pixels", True,
        "accept the licence of DeepFloyd/IF-I-XL-v1.0 on the Hugging Face hub, fetch the folder and name it by --model",
    ),
    "prolificdreamer": Recipe(
        prolificdreamer, "ProlificDreamer, Wang et al. 2023",
        "variational score distillation of single views, a density volume: the first of three stages",
        "a model of latents", "embedded", False,
        "fetch the folder stabilityai/stable-diffusion-2-1-base from the Hugging Face hub and name it by --model",
    ),
}  # fmt: skip
