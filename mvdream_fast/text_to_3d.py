"""Text to 3D as a library: `TextTo3D(pipeline)(prompt) -> Asset`.

The loop is distill/loop.py, what a step does distill/state.py, what it learns from guidance/; files, progress lines and
reports are the command's (sds.py).
"""

from collections.abc import Callable
from pathlib import Path

import torch

from mvdream_fast.core import run_folder
from mvdream_fast.distill.loop import Loop, Progress, new_guidance
from mvdream_fast.distill.recipes import SDSConfig, preset_for, resolve_config
from mvdream_fast.distill.state import GrownAsset, RunState
from mvdream_fast.guidance.base import Guidance
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.base import Representation

__all__ = ["Asset", "GrownAsset", "Progress", "TextTo3D"]


class TextTo3D:
    """Turns prompts into assets with one model, or with a guidance of your own (then the pipeline may be None)."""

    def __init__(self, pipeline: MVDreamPipeline | None, keep: bool = True, guidance: Guidance | None = None):
        """keep: False frees what a run does not need, the text tower and the VAE's decoder, once it has begun; the
        pipeline makes one asset then and no more views. guidance: replaces the one that the recipe would make."""
        self.pipeline, self.keep, self.guidance = pipeline, keep, guidance

    def __call__(
        self,
        prompt: str,
        preset: str = "auto",
        *,
        seed: int = 0,
        callback: Callable[[Progress], None] | None = None,
        config: SDSConfig | None = None,
        checkpoints: Path | None = None,
        checkpoint_every: int = 100,
        interrupt: run_folder.Interrupt | None = None,
        representation: Representation | None = None,
        **overrides,
    ) -> GrownAsset:
        """Optimises a 3D representation of `prompt`.

        Args:
            preset: a key of SDS_PRESETS, or "auto" for the one that fits the model; `config` replaces it, `overrides`
                replace single settings (steps=300, ...).
            callback: called after every step with a Progress.
            checkpoints: a folder; the run saves there every `checkpoint_every` steps and goes on from what it holds.
            interrupt: when requested, the run saves and returns the asset as it is.
            representation: what to optimise; by default a fresh one of the recipe's.

        Returns:
            GrownAsset: an Asset that also knows the records of this call's steps.

        Raises:
            ArgumentError: unknown preset, setting or an unusable prompt.
            ModelError: a checkpoint of another configuration.
            OutOfMemoryError: a step that does not fit, even with half of the samples.
            DivergedError: numbers that are not finite, or nothing to see, after one recovery.
        """
        if config is None and preset == "auto":
            preset = preset_for(self.pipeline.config.vae.image_size) if self.pipeline else "mini"
        config = resolve_config(config or preset, **overrides)
        guidance = self.guidance or new_guidance(self.pipeline, prompt, config, seed)
        if not self.keep:
            self._release(config)
        state = RunState(config, prompt, seed, guidance, self.device, representation)
        model = self.pipeline.config if self.pipeline else None
        return Loop(callback, checkpoints, checkpoint_every, interrupt, model).run(state)

    @property
    def device(self) -> torch.device:
        return self.pipeline.device if self.pipeline else torch.device("cpu")

    def _release(self, config: SDSConfig) -> None:
        self.pipeline.text = self.pipeline.model.text = None
        if config.match == "latents":
            self.pipeline.vae.drop_decoder()
