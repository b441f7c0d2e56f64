"""What a text-to-3D run is made of, as one frozen value, and its settings by their names; no torch here.

A run is one stage, or several: each is such a value, the first of which holds the `later` ones. A setting has one name
wherever it is written by itself (a flag, a keyword, a line of a settings file), whichever part of a stage holds it:
`replaced(config, guidance_scale=7.5)`, `settings_of(config)`. The recipes are in recipes.py.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal

from annotated_types import Interval

from mvdream_fast.camera_sampling import CameraSampling
from mvdream_fast.core.errors import ArgumentError, UserError
from mvdream_fast.core.schema import Checked, Share, checked
from mvdream_fast.guidance.config import GuidanceConfig, RepaintConfig, SampledConfig
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.shapes import RAMPS, SHAPES, ShapeConfig, changed, checked_shapes, names_of

MVDREAM = "mvdream"
RecipeName = Literal[
    "mvdream", "mvdream-solid", "mvdream-sharp", "mvdream-mesh", "dreamfusion-if", "magic3d-if-sd", "textmesh-if",
    "prolificdreamer",
]  # fmt: skip
# Settings that older runs on a disk lack; as they are by default they have no effect.
NEWER = (
    "deviation_least", "sampled_views", "sampled_scale", "sampled_uncond", "sampled_steps", "lambda_sampled",
    "sampled_hull", "sampled_between", "lambda_silhouette", "view_words_deg",
)  # fmt: skip
VSD_ALONE = ("lora_rank", "lora_lr", "camera_dropout", "particles")  # settings that plain distillation has not
Momentum = Annotated[float, Interval(ge=0, lt=1)]

# MVDream-threestudio's, for the paper's recipe; the embedded model was trained with an empty one.
PAPER_NEGATIVE_PROMPT = (
    "ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and unclear, cropped, "
    "lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn face, deformed, dehydrated, "
    "bad proportions"
)


@dataclass(frozen=True)
class SDSConfig(Checked):
    """A stage of a text-to-3D run, which most have one of. The defaults are the paper's recipe, MVDream-threestudio's
    mvdream-sd21.

    Tuples with one entry a phase (`render_size`, `n_groups`) switch at `milestones`. The loss weights and the range
    of timesteps are ramps over the steps. Steps are counted from 0 in each stage.

    later: the stages after this one, which have none themselves. Each begins with what the one before has made.
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
    sampled: SampledConfig = field(default_factory=SampledConfig)
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
    later: tuple["SDSConfig", ...] = ()

    @property
    def stages(self) -> tuple["SDSConfig", ...]:
        """Every stage by itself, in order."""
        return (dataclasses.replace(self, later=()), *self.later)

    @property
    def ends(self) -> tuple[int, ...]:
        """How many steps of the run are done at the end of each stage; the last number is that of all."""
        return tuple(accumulate(stage.steps for stage in self.stages))

    def at_work(self, done: int) -> int:
        """The index of the stage that made the last of so many steps of the run; the first one's for none."""
        return sum(done > end for end in self.ends)

    def asked(self, step: int) -> int:
        """The step whose cameras, resolution and answer of the model `step` uses: its own, unless they are reused."""
        return step if step >= self.repaint_step else step - step % self.updates_per_guidance

    @property
    def repaint_step(self) -> int:
        """The first step that fits repainted views; the number of steps where none does."""
        first = round(self.repaint.repaint_from * self.steps)
        return first - first % self.updates_per_guidance if self.repaint.repaints else self.steps

    def phase(self, step: int) -> int:
        """Index of the phase that `step` belongs to."""
        return sum(self.asked(step) >= milestone for milestone in self.milestones)

    def lr_share(self, step: int) -> float:
        """What is left of the learning rates at `step`."""
        past = step / self.steps - self.lr_decay_from
        return self.lr_decay ** (past / (1 - self.lr_decay_from)) if past > 0 else 1.0

    @property
    def n_fitted(self) -> int:
        """Sampled views that the stage fits, in place of distillation or beside it."""
        return self.cameras.n_views if self.method == "reconstruct" else self.sampled.sampled_views

    def n_rays(self) -> int:
        """Rays of a step in the largest phase."""
        known = int(self.sampled.beside)  # a group of sampled views beside those that are distilled from
        return max((n + known) * self.cameras.n_views * size**2 for n, size in zip(self.n_groups, self.render_size))


PARTS = {f.name: c for f in dataclasses.fields(SDSConfig) if dataclasses.is_dataclass(c := f.default_factory)}
_CLASSES = [*PARTS.items(), *(("representation", cls) for cls in SHAPES.values())]
PART_OF = {f.name: part for part, cls in _CLASSES for f in dataclasses.fields(cls)}
SETTINGS = sorted({f.name for f in dataclasses.fields(SDSConfig)} - PARTS.keys() - {"later"} | PART_OF.keys())


def settings_of(config: SDSConfig) -> dict[str, Any]:
    """Every setting of a stage by its own name, those of other shapes left out: what checkpoints and assets hold."""
    values = {name: getattr(config, name) for name in SETTINGS if name not in PART_OF}
    parts = [getattr(config, part) for part in PARTS]
    return values | {f.name: getattr(part, f.name) for part in parts for f in dataclasses.fields(part)}


def completed(run: list[dict[str, Any]] | dict[str, Any]) -> list[dict[str, Any]] | dict[str, Any]:
    """A run as an older version has written it, with those of NEWER that it did not know and its shapes have."""
    return [_completed(table) for table in run] if isinstance(run, list) else _completed(run)


def _completed(run: dict[str, Any]) -> dict[str, Any]:
    shape = {"shape": run["shape"]} if run.get("shape") in [*SHAPES] else {}
    defaults = settings_of(replaced(SDSConfig(), **shape))
    return {**{name: defaults[name] for name in NEWER if name in defaults}, **run}


def written(config: SDSConfig) -> dict[str, Any] | list[dict[str, Any]]:
    """A run as files hold it: the settings of its stage, or a list of each one's."""
    tables = [settings_of(stage) for stage in config.stages]
    return tables if config.later else tables[0]


def joined(stages: Iterable[SDSConfig]) -> SDSConfig:
    """The run of these stages."""
    first, *later = stages
    return dataclasses.replace(first, later=tuple(later))


def replaced(config: SDSConfig, **settings: Any) -> SDSConfig:
    """A stage with single settings replaced, each by its own name. Raises ArgumentError for unknown names."""
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ArgumentError(f"unknown setting(s) {', '.join(unknown)}; known: {', '.join(SETTINGS)}")
    return dataclasses.replace(config, **_nested(settings, config))


def has(config: SDSConfig, name: str) -> bool:
    """Whether a stage has a setting of this name, or would refuse it: those of another shape it has not."""
    return PART_OF.get(name) != "representation" or name in names_of(type(config.representation))


def restepped(config: SDSConfig, steps: int) -> SDSConfig:
    """A stage of another number of steps: ramps and milestones keep their place in it."""
    if steps == config.steps:
        return config
    factor = steps / config.steps
    moved: dict[str, Any] = {}
    for name, value in settings_of(config).items():
        if name.startswith((*RAMPS, "min_step", "max_step", "grad_clip")) and value is not None:
            start, first, last, end = value
            moved[name] = (start * factor, first, last, end * factor)
    milestones = tuple(round(m * factor) for m in config.milestones)
    shading_from = round(config.shading_from * factor)
    return replaced(config, steps=steps, shading_from=shading_from, milestones=milestones, **moved)


def shared_out(steps: int, config: SDSConfig) -> list[int]:
    """So many steps for the stages of a run, in proportion to those that they have, and at least one for each.

    Raises: ArgumentError where they are too few.
    """
    ends: list[int] = []
    total, n = config.ends[-1], len(config.ends)
    if 1 < n > steps:
        raise ArgumentError(f"steps must be at least {n}, one for each stage of {config.recipe}, got {steps}")
    for i, end in enumerate(config.ends, 1):
        ends.append(min(max(round(steps * end / total), i), steps - (n - i)))  # the last of which is steps
    return [end - before for before, end in pairwise([0, *ends])]


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
    shapes = nested.pop("representation", {})
    values = settings_of(checked(SDSConfig, nested, source, error, names))
    values |= checked_shapes(shapes, source, error, names)
    return {name: value for name, value in values.items() if name in settings}


def check_learning(config: SDSConfig, names: Mapping[str, str] | None = None) -> None:
    """Raises ArgumentError where a stage cannot learn as it is told to. names: what the user wrote for a setting."""
    _check_vsd(config, names)
    _check_ending(config)
    _check_sampled(config)


def _check_ending(config: SDSConfig) -> None:
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


def _check_sampled(config: SDSConfig) -> None:
    """Raises ArgumentError for sampled views that can't be fitted beside distillation."""
    n, each = config.sampled.sampled_views, config.cameras.n_views
    known = n or config.method == "reconstruct"
    if n and config.method == "reconstruct":
        raise ArgumentError(f"sampled_views must be 0 with method reconstruct, which fits n_views of them, got {n}")
    if config.sampled.sampled_hull and (not known or config.representation.shape != "tets"):
        raise ArgumentError(
            "sampled_hull must be false but for the shape tets with sampled views, got true for the shape "
            f"{config.representation.shape} with {n} of them; give sampled_views, or leave it out"
        )
    if config.sampled.sampled_between and not config.sampled.sampled_hull:
        raise ArgumentError("sampled_between must be false without sampled_hull, which those views carve, got true")
    if config.sampled.sampled_hull and config.guidance.particles > 1:
        raise ArgumentError(
            "particles must be 1 with sampled_hull, which all of them would begin as, got "
            f"{config.guidance.particles}; leave it out, or give sampled_hull = false"
        )
    if n and config.mode == "2d":
        raise ArgumentError(f"sampled_views must be 0 with mode 2d, whose model draws one view at a time, got {n}")
    if n % each:
        raise ArgumentError(f"sampled_views must be a multiple of n_views, {each}, got {n}")


def _check_vsd(config: SDSConfig, names: Mapping[str, str] | None = None) -> None:
    """Raises ArgumentError where variational score distillation cannot be had as it is asked for; names as above."""
    names, guidance = names or {}, config.guidance
    if guidance.kind != "vsd":
        given = [names[name] for name in VSD_ALONE if name in names]
        if given or guidance.particles > 1:
            raise ArgumentError(
                f"{given[0] if given else 'particles'} is a setting of VSD, and the guidance is {guidance.kind}; add "
                "--guidance vsd, or leave it out"
            )
        return
    vsd = names.get("kind", "guidance") + " vsd"
    if config.method == "reconstruct":
        raise ArgumentError(f"{vsd} asks the model at every step, and --method reconstruct never; leave one out")
    if config.updates_per_guidance > 1:
        raise ArgumentError(
            f"updates_per_guidance must be 1 with {vsd}, whose learner follows each update, got "
            f"{config.updates_per_guidance}"
        )
    if config.match != "latents":
        raise ArgumentError(f"match must be latents with {vsd}, whose gradient is one on latents, got {config.match}")
    if find_spec("peft") is None:
        raise ArgumentError(f"{vsd} learns with peft; install mvdream_fast[train], or take --guidance sds")


def check_stages(config: SDSConfig, given: bool = False) -> None:
    """Raises ArgumentError for stages that can't follow one another. given: the first one is handed something, too."""
    for number, stage in enumerate(config.stages, 1):
        shape = stage.representation.shape
        if number == 1 and not given and shape == "textured-mesh":
            raise ArgumentError(
                "shape must be volume, surface or tets where a run begins, got textured-mesh, which needs a mesh; take "
                "the recipe prolificdreamer, which makes one first, or TextTo3D(...)(..., representation=...)"
            )
        if number > 1 and shape not in ("tets", "textured-mesh"):
            raise ArgumentError(
                f"shape must be tets or textured-mesh in stage {number}, which is handed a mesh, got {shape}"
            )
        if config.later and stage.guidance.particles > 1:
            raise ArgumentError(
                f"particles must be 1 in a run of several stages, which hand one shape over, got "
                f"{stage.guidance.particles}; leave it out, or take a recipe of one stage"
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
    faces: Literal[0] | Annotated[int, Interval(ge=4)] = NerfConfig.usual_faces  # at most; 0: as many as there are
    # Pixels a side; 0 colours the vertices instead, None does what is usual for the shape.
    texture: Literal[0] | Annotated[int, Interval(ge=16, le=8192)] | None = None
    formats: tuple[Literal["glb", "obj", "ply"], ...] = ("glb",)
    up: Literal["y", "z"] = "y"  # of OBJ and PLY; GLB is always y-up
