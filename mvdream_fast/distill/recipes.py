"""The table of recipes, and what can be made and said of any: settings replaced, views counted; no torch here.

Each has three sizes, named as the presets: the paper's own for full models, and two for the small models that ship with
the package. At one of those all recipes ask the model about as many views (`guided_views`), so that they compare.
"""

import dataclasses
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.diffusion.schedule import skipped
from mvdream_fast.distill.config import (
    MVDREAM,
    SDSConfig,
    has,
    joined,
    replaced,
    restepped,
    settings_of,
    shared_out,
)
from mvdream_fast.distill.recipe import Prior, Recipe
from mvdream_fast.distill.systems import (
    SDS_PRESETS,
    SOLID_STEPS,
    dreamfusion_if,
    few_shot,
    magic3d_if_sd,
    mvdream,
    mvdream_mesh,
    mvdream_sharp,
    mvdream_solid,
    prolificdreamer,
    textmesh_if,
)
from mvdream_fast.models.config import MINI, SamplingGuidance
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.shapes import names_of, reshaped
from mvdream_fast.scene.tets.config import TetsConfig


def preset_for(image_size: int) -> str:
    """The preset that fits a model which draws `image_size` pixels a side."""
    return "mini" if image_size <= MINI.vae.image_size else "paper"


# Settings that say which kind of run is wanted: who names one, but no recipe, means score distillation of a volume. So
# do those that only a volume has.
OF_MVDREAM = {
    "method", "mode", "kind", "loss", "particles", "view_words", "perp_neg", "n_views", "n_groups", "milestones",
    "match", "updates_per_guidance", "repaint_from", "shading", "shape", "volume", "sampled_views",
} | (names_of(NerfConfig) - names_of(TetsConfig))  # fmt: skip


def usual_recipe(preset: str, given: Iterable[str] = (), multi_view: bool = True) -> str:
    """The recipe where none is named: mvdream-solid for the small models, of which mvdream alone leaves fog; mvdream at
    `paper`, for models of single images, and where one of the settings `given` is of OF_MVDREAM."""
    small = preset in SOLID_STEPS and multi_view and OF_MVDREAM.isdisjoint(given)
    return "mvdream-solid" if small else MVDREAM


def shaded(config: SDSConfig) -> SDSConfig:
    """The shading variant of a recipe: a point light in the second half of each stage; where it has the weight,
    orientation loss. Stages that are lit already, and those that show normals, stay as they are."""
    return joined(_shaded(stage) for stage in config.stages)


def _shaded(stage: SDSConfig) -> SDSConfig:
    if stage.shading or settings_of(stage).get("shows") == "normals":
        return stage
    half = stage.steps // 2
    losses = {"lambda_orient": (0.0, 10.0, 1000.0, float(half))} if "lambda_orient" in settings_of(stage) else {}
    return replaced(stage, shading=True, shading_from=half, **losses)


def resolve_config(base: str | SDSConfig, **overrides: Any) -> SDSConfig:
    """A recipe (`recipe=`, by default mvdream) at a preset, or a configuration, with single settings replaced.

    Of several stages a setting holds for all that have it; `steps` are those of the whole run, which they share in
    proportion, and `shape` is that of the first stage: the others are handed theirs.
    Raises ArgumentError for unknown names, and for another recipe than the configuration's.
    """
    if isinstance(base, str):
        recipe = overrides.get("recipe", MVDREAM)
        for name, found, known in (("preset", base, SDS_PRESETS), ("recipe", recipe, RECIPES)):
            if found not in known:
                raise ArgumentError(f"{name} must be one of {', '.join(known)}, got {found!r}")
        config = RECIPES[recipe].at(base)
        if overrides.get("method") == "reconstruct" and base in SOLID_STEPS and not config.later:
            if recipe != MVDREAM:
                raise ArgumentError(
                    f"method must be sds with the recipe {recipe}, got 'reconstruct', which is a method of {MVDREAM}; "
                    "leave the recipe out"
                )
            config = few_shot(base)
    else:
        config = base
    if overrides.get("recipe", config.recipe) != config.recipe:
        raise ArgumentError(
            f"recipe must be {config.recipe!r}, as the configuration's, got {overrides['recipe']!r}; name it beside a "
            "preset, in place of one"
        )
    steps, shape = overrides.pop("steps", config.ends[-1]), overrides.pop("shape", None)
    representation = reshaped(config.representation, shape, config.steps / SDSConfig.steps)
    config = dataclasses.replace(config, representation=representation)
    if representation.shape != "tets" and config.sampled.sampled_hull:  # which only those begin with
        config = replaced(config, sampled_hull=False, sampled_between=False)
    stages = config.stages
    own = [{name: x for name, x in overrides.items() if not config.later or has(stage, name)} for stage in stages]
    foreign = overrides.keys() - {name for settings in own for name in settings}
    if foreign:  # of shapes that none of them has
        replaced(stages[0], **{name: overrides[name] for name in foreign})
    parts = zip(stages, shared_out(steps, config), own, strict=True)
    return joined(replaced(restepped(stage, n), **settings) for stage, n, settings in parts)


def sampled_as(config: SDSConfig, guidance: SamplingGuidance, given: Iterable[str] = ()) -> SDSConfig:
    """A recipe whose views are sampled as its model is best guided, but for the settings that were given."""
    wanted = {"sampled_scale": guidance.scale, "sampled_uncond": guidance.uncond_mode}
    wanted = {name: value for name, value in wanted.items() if name not in given}
    return joined(replaced(stage, **wanted) if stage.n_fitted else stage for stage in config.stages)


def guided_views(config: SDSConfig) -> int:
    """Views that the models are asked about in a run, each with and without the prompt; a redrawn or sampled
    view once for every step of its sampler, those half-way together with the ones that they are between. Stages that
    want the same sampled views have them together."""
    known = {
        (stage.n_fitted, how.sampled_between, how.sampled_steps, how.sampled_scale, how.sampled_uncond)
        for stage, how in ((stage, stage.sampled) for stage in config.stages)
    }
    sampled = sum(views * (3 if between else 1) * steps for views, between, steps, *_ in known)
    return sum(_guided_views(stage) for stage in config.stages if stage.method == "sds") + sampled


def _guided_views(stage: SDSConfig) -> int:
    every, first = stage.updates_per_guidance, stage.repaint_step
    ends = (0, *(min(milestone, first) for milestone in stage.milestones), first)
    asked = [-(-end // every) - -(-start // every) for start, end in pairwise(ends)]  # steps that ask, by phase
    groups = sum(n * groups for n, groups in zip(asked, stage.n_groups, strict=True))
    return stage.cameras.n_views * (groups + _sampler_steps(stage))


def _sampler_steps(config: SDSConfig) -> int:
    """Of all groups that a stage redraws together."""
    first, n, most, total = config.repaint_step, config.repaint.repaint_steps, config.repaint.repaint_groups, 0
    for step in range(first, config.steps):
        if step - first < most or (step - first) % config.repaint.repaint_every == 0:
            strength = config.repaint.strength(step, first, config.steps)
            total += n - skipped(n, strength) if strength else 0
    return total


_GET_MVDREAM = "fetch MVDream/MVDream's sd-v2.1-base-4view.pt from the Hugging Face hub and name the file by --model"
_GET_IF = (
    "accept the licence of DeepFloyd/IF-I-XL-v1.0 on the Hugging Face hub, fetch the folder and name it by --model"
)
_GET_SD = "fetch the folder stabilityai/stable-diffusion-2-1-base from the Hugging Face hub and name it by"
_MULTI_VIEW = Prior("a multi-view model", "embedded", None, _GET_MVDREAM)
_PIXELS = Prior("a model of pixels", "pixels", True, _GET_IF)
_LATENTS = Prior("a model of latents", "embedded", False, f"{_GET_SD} --model")
_REFINES = Prior("a model of latents for its second stage", "embedded", False, f"{_GET_SD} --refine-model")
RECIPES = {
    "mvdream": Recipe(
        mvdream, "MVDream, Shi et al. 2023", "score distillation of four views at once, a density volume", _MULTI_VIEW
    ),
    "mvdream-solid": Recipe(
        mvdream_solid, "MVDream, Shi et al. 2023, with Magic3D's refinement; views beside it are this project's",
        "the mesh stage of mvdream-mesh, begun as the visual hull of sampled views, which are fitted beside it",
        _MULTI_VIEW,
    ),
    "mvdream-sharp": Recipe(
        mvdream_sharp, "MVDream, Shi et al. 2023; repainting is this project's",
        "mvdream; in the last three tenths the volume is fitted to redrawn views", _MULTI_VIEW,
    ),
    "mvdream-mesh": Recipe(
        mvdream_mesh, "MVDream, Shi et al. 2023, with Magic3D's refinement",
        "mvdream; then the volume's mesh, on tetrahedra, by the same model", _MULTI_VIEW,
    ),
    "dreamfusion-if": Recipe(
        dreamfusion_if, "DreamFusion, Poole et al. 2022, with DeepFloyd IF in place of Imagen",
        "score distillation of single views, a density volume, lit from a fifth of the steps on", _PIXELS,
    ),
    "magic3d-if-sd": Recipe(
        magic3d_if_sd, "Magic3D, Lin et al. 2022, with DeepFloyd IF and Stable Diffusion in place of eDiff-I",
        "dreamfusion-if with softer light; then the volume's mesh, on tetrahedra, by a model of latents", _PIXELS,
        _REFINES,
    ),
    "textmesh-if": Recipe(
        textmesh_if, "TextMesh, Tsalicoglou et al. 2023, with DeepFloyd IF in place of Imagen",
        "dreamfusion-if of a surface, a signed distance", _PIXELS,
    ),
    "prolificdreamer": Recipe(
        prolificdreamer, "ProlificDreamer, Wang et al. 2023",
        "variational score distillation of single views, a density volume; its mesh's normals, on tetrahedra; the "
        "colours of that mesh, variational again", _LATENTS,
    ),
}  # fmt: skip
