"""Text to 3D as a library: `TextTo3D(pipeline)(prompt) -> Asset`.

The loop is distill/loop.py, what a step does distill/state.py, what it learns from guidance/; files, progress lines and
reports are the command's (sds.py).
"""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mvdream_fast.core import run_folder
from mvdream_fast.core.arguments import is_a, user_path, whole
from mvdream_fast.core.errors import ArgumentError, DivergedError
from mvdream_fast.distill.checks import check_config
from mvdream_fast.distill.config import SETTINGS, SDSConfig, typed, written
from mvdream_fast.distill.loop import Loop, Progress, new_guidance
from mvdream_fast.distill.recipes import RECIPES, preset_for, resolve_config, sampled_as, usual_recipe
from mvdream_fast.distill.sampled import Sampler
from mvdream_fast.distill.state import GrownAsset, RunState
from mvdream_fast.guidance.base import Guidance
from mvdream_fast.guidance.reconstruction import Anchored, Reconstruction
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.base import Representation
from mvdream_fast.scene.kinds import begun, handed_over, new_representation
from mvdream_fast.scene.mesh.hull import Hull

__all__ = ["Asset", "GrownAsset", "Progress", "TextTo3D"]


class TextTo3D:
    """Turns prompts into assets with one model, or with a guidance of your own (then the pipeline may be None)."""

    def __init__(
        self, pipeline: MVDreamPipeline | None, keep: bool = True, guidance: Guidance | None = None,
        refine: Callable[[], MVDreamPipeline] | None = None, sampler: Sampler | None = None,
    ):  # fmt: skip
        """keep: False frees what a run does not need: the text tower and the VAE's decoder once its last stage has
        begun, the whole model where later stages ask another; the pipeline makes one asset then and no more views.
        guidance: replaces the one that each stage would make. refine: loads the model of later stages where a recipe
        has another one for them; by default the package's own. sampler: the pipeline's, with views that it has sampled
        before; runs that fit the same ones don't sample them again."""
        if isinstance(pipeline, (str, Path)) or (pipeline is None and guidance is None):
            raise ArgumentError(
                f"TextTo3D: pipeline must be an MVDreamPipeline, got {pipeline!r}; "
                "MVDreamPipeline.from_pretrained makes one of a path or a name"
            )
        self.pipeline, self.keep, self.guidance, self.refine = pipeline, keep, guidance, refine
        self.sampler = sampler

    def __call__(
        self,
        prompt: str,
        preset: str | None = "auto",
        *,
        seed: int | None = 0,
        callback: Callable[[Progress], None] | None = None,
        config: SDSConfig | None = None,
        checkpoints: Path | str | None = None,
        checkpoint_every: int = 100,
        interrupt: run_folder.Interrupt | None = None,
        representation: Representation | None = None,
        **overrides: Any,
    ) -> GrownAsset:
        """Optimises a 3D representation of `prompt`.

        Args:
            seed: None draws one, which the asset names.
            preset: a key of SDS_PRESETS, or "auto" for the one that fits the model; `config` replaces it, `overrides`
                replace single settings (steps=300, ...), in every stage that has them, and, beside a preset, the recipe
                (recipe="dreamfusion-if"), which is otherwise the usual one of the preset (recipes.usual_recipe).
            callback: called after every step with a Progress.
            checkpoints: a folder; the run saves there every `checkpoint_every` steps and goes on from what it holds.
            interrupt: when requested, the run saves and returns the asset as it is.
            representation: what to optimise, in the first stage; by default a fresh one of the recipe's.

        Returns:
            GrownAsset: an Asset, of the last stage, that also knows the records of this call's steps.

        Raises:
            ArgumentError: unknown preset, setting or an unusable prompt; settings that no run can use together.
            ModelError: a checkpoint of another configuration, seed or prompt, or a model of another kind than the
                recipe needs.
            OutOfMemoryError: a step that does not fit, even with half of the samples.
            DivergedError: numbers that are not finite, or nothing to see, after one recovery.
        """
        if not is_a(prompt, str):
            raise ArgumentError(f"TextTo3D: prompt must be one text, got {type(prompt).__name__}; call once for each")
        if callback is not None and not callable(callback):
            raise ArgumentError(f"TextTo3D: callback must be a function of a Progress, got {type(callback).__name__}")
        seed = secrets.randbelow(2**31) if seed is None else whole("TextTo3D", "seed", seed, "0 is the default", 0)
        checkpoint_every = whole("TextTo3D", "checkpoint_every", checkpoint_every, "100 is the default")
        checkpoints = None if checkpoints is None else user_path(checkpoints)
        config = self._config(preset, config, overrides, representation is None)
        check_config(config, given=representation is not None)
        begin = _Stages(self, config, prompt, seed, representation)
        return Loop(callback, checkpoints, checkpoint_every, interrupt).run(config, seed, begin, prompt)

    @property
    def device(self) -> torch.device:
        """Where runs take place: the pipeline's device."""
        return self.pipeline.device if self.pipeline else torch.device("cpu")

    def _config(
        self, preset: str | None, config: SDSConfig | None, overrides: dict[str, Any], fresh: bool
    ) -> SDSConfig:
        """The run's settings; NumPy's numbers and arrays are taken for Python's. fresh: nothing is handed to it."""
        if config is not None and not is_a(config, SDSConfig):
            raise ArgumentError(
                f"TextTo3D: config must be an SDSConfig, got {type(config).__name__}; single settings are arguments of "
                "their own, as steps=300"
            )
        if overrides.get("negative_prompt", "") is None:  # diffusers' own default
            overrides = overrides | {"negative_prompt": ""}
        plain = {name: x.tolist() if hasattr(x, "tolist") else x for name, x in overrides.items()}
        plain |= typed({name: x for name, x in plain.items() if name in SETTINGS}, "TextTo3D", ArgumentError)
        if preset in (None, "auto"):
            preset = preset_for(self.pipeline.config.vae.image_size) if self.pipeline else "mini"
        if self.pipeline and config is None and "3d" not in self.pipeline.config.modes:
            plain = {"mode": "2d", **plain}
        if config is None and self.guidance is None and fresh:
            plain = {"recipe": usual_recipe(str(preset), plain), **plain}
        found = resolve_config(config or str(preset), **plain)
        return sampled_as(found, self.pipeline.config.guidance, plain) if self.pipeline and config is None else found


class _Stages:
    """How each stage of a run begins: with its model's guidance, and with what the stage before has made.

    Args: first: what the first stage optimises, None for a fresh one of its own.
    """

    def __init__(self, maker: TextTo3D, config: SDSConfig, prompt: str, seed: int, first: Representation | None):
        self.maker, self.config, self.prompt, self.seed, self.first = maker, config, prompt, seed, first
        self.recipe, self.pipeline, self.of_refine = RECIPES[config.recipe], maker.pipeline, False
        self.sampler = maker.sampler  # of the model at work

    def __call__(self, number: int, made: Representation | None) -> RunState:
        """The stage of this index, with what the one before has made, or to be restored."""
        stage, maker = self.config.stages[number], self.maker
        guidance = maker.guidance or self._guidance(number, stage)
        representation, is_begun = self.first if number == 0 else None, made is not None
        if made is not None:
            representation = handed_over(stage.representation, made, self.seed)
        elif number:
            representation = new_representation(stage.representation, self.seed)
        elif representation is None and stage.sampled.sampled_hull:
            representation, is_begun = self._hull(stage, guidance), True
        before = self.config.ends[number] - stage.steps
        model = self.pipeline.config if self.pipeline else None
        args = self.prompt, self.seed, guidance, maker.device, representation, before, is_begun, model
        state = RunState(stage, *args)
        if self.config.later:
            state.asset.settings["stages"] = written(self.config)
        return state

    def _hull(self, stage: SDSConfig, guidance: Guidance) -> Representation:
        """What the views that the run fits leave of space; where that is nothing, a fresh representation."""
        if not isinstance(guidance, Anchored | Reconstruction):
            return new_representation(stage.representation, self.seed)
        try:
            hull = Hull(*guidance.known(), stage.representation.radius, guidance.between)
            return begun(stage.representation, hull, self.seed)
        except DivergedError:
            return new_representation(stage.representation, self.seed)

    def _guidance(self, number: int, stage: SDSConfig) -> Guidance:
        prior, pipeline = self.recipe.prior_of(number), self._pipeline(number)
        prior.check(self.config.recipe, stage.mode, pipeline.config.name, pipeline.config)
        self.sampler = self.sampler or Sampler(pipeline)
        guidance = new_guidance(pipeline, self.prompt, stage, self.seed, self.sampler)
        if not self.maker.keep and number == len(self.config.later):
            _release(pipeline, stage)
        return guidance

    def _pipeline(self, number: int) -> MVDreamPipeline:
        """The stage's model; where it is not the first one's, that is let go of before it is loaded."""
        pipeline = self.pipeline
        if pipeline is None:
            raise AssertionError  # TextTo3D refuses to have neither
        if self.recipe.refine is None or not number or self.of_refine:
            return pipeline
        if not self.maker.keep:
            pipeline.drop()
        device, dtype, graphs, name = pipeline.device, pipeline.dtype, pipeline.graphs, self.recipe.refine.embedded
        load = self.maker.refine or (lambda: MVDreamPipeline.from_pretrained(name, device, dtype, graphs))
        self.pipeline, self.of_refine, self.sampler = load(), True, None
        return self.pipeline


def _release(pipeline: MVDreamPipeline, config: SDSConfig) -> None:
    pipeline.text = pipeline.model.text = None
    decodes = config.match == "pixels" or config.repaint.repaints
    if not decodes and pipeline.vae is not None:
        pipeline.vae.drop_decoder()
