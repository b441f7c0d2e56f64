"""Text to 3D as a library: a short loop that renders views, asks the diffusion model, and updates a volume.

`TextTo3D(pipeline)(prompt) -> Asset`. What a step does is in optimization.py, what it learns from in teachers.py;
files, progress lines and reports are the command's (`sds.py`, `watch.py`, `report.py`).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import DivergedError, ModelError, OutOfMemoryError
from mvdream_fast.core.machine import memory_errors
from mvdream_fast.distill import memory
from mvdream_fast.distill.recipes import SDSConfig, preset_for, resolve_config
from mvdream_fast.distill.state import (
    EMPTY_STEPS,
    MAX_SKIPPED,
    GrownAsset,
    Optimization,
    Record,
    make_optimizer,
)
from mvdream_fast.guidance.teachers import Distillation, Reconstruction, SingleViewDistillation, Teacher
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.asset import Asset

__all__ = [
    "EMPTY_STEPS",
    "MAX_SKIPPED",
    "Asset",
    "Distillation",
    "GrownAsset",
    "Optimization",
    "Progress",
    "Reconstruction",
    "Record",
    "SingleViewDistillation",
    "Teacher",
    "TextTo3D",
    "make_optimizer",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a callback is given after a step: what the step reports, and the growing asset (live, not a copy)."""

    record: Record
    asset: Asset


class TextTo3D:
    """Turns prompts into assets with one model; see `Optimization` for the loop's state."""

    def __init__(self, pipeline: MVDreamPipeline, keep: bool = True):
        """keep: False frees what a run does not need, the text tower and the VAE's decoder, once it has begun; the
        pipeline makes one asset then and no more views."""
        self.pipeline, self.keep = pipeline, keep

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
        **overrides,
    ) -> GrownAsset:
        """Optimises a volume for `prompt`.

        Args:
            preset: a key of SDS_PRESETS, or "auto" for the one that fits the model; `config` replaces it, `overrides`
                replace single fields (steps=300, ...).
            callback: called after every step with a Progress.
            checkpoints: a folder; the run saves there every `checkpoint_every` steps and goes on from what it holds.
            interrupt: when requested, the run saves and returns the asset as it is.

        Returns:
            GrownAsset: an Asset that also knows the records of this call's steps.

        Raises:
            ArgumentError: unknown preset, field or an unusable prompt.
            ModelError: a checkpoint of another configuration.
            OutOfMemoryError: a step that does not fit, even with half of the samples.
            DivergedError: numbers that are not finite, or an empty volume, after one recovery.
        """
        if config is None and preset == "auto":
            preset = preset_for(self.pipeline.config.vae.image_size)
        config = resolve_config(config or preset, **overrides)
        teacher = self.teacher(prompt, config, seed)
        if not self.keep:
            self._release(config)
        state = Optimization(config, prompt, seed, teacher, self.device)
        first = self._resume(state, checkpoints)
        if config.stage(first) < config.stage(config.steps - 1):
            self._attempt(state, first, state.rehearse)
        for step in range(first, config.steps):
            if interrupt is not None and interrupt.requested is not None:
                break
            record = self._attempt(state, step, lambda step=step: state.step(step))
            state.asset.records.append(record.plain())
            if state.skipped >= MAX_SKIPPED:
                self._recover(state, checkpoints, step)
            if callback is not None:
                callback(Progress(record, state.asset))
            if checkpoints is not None and (step + 1) % checkpoint_every == 0:
                self._save(state, checkpoints, step + 1)
        else:
            step = config.steps
        if checkpoints is not None and first < config.steps:
            self._save(state, checkpoints, step)
        return state.asset

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    def teacher(self, prompt: str, config: SDSConfig, seed: int) -> Teacher:
        """What scores the views: score distillation, or, with method "reconstruct", sampled views to be fitted."""
        if config.method == "reconstruct":
            return Reconstruction(self.pipeline, prompt, config, seed)
        kind = Distillation if config.mode == "3d" else SingleViewDistillation
        return kind(self.pipeline, prompt, config)

    def _release(self, config: SDSConfig) -> None:
        self.pipeline.text = self.pipeline.model.text = None
        if config.match == "latents":
            self.pipeline.vae.drop_decoder()

    def _attempt(self, state: Optimization, step: int, work: Callable[[], Any]) -> Any:
        """`work()`; where memory runs out, once more with half of the samples, and then an end with advice."""
        for last in (state.halved, True):
            try:
                with memory_errors("half of the samples did not help"):
                    return work()
            except MemoryError as error:
                if last:
                    parts = memory.estimate(getattr(self.pipeline, "config", None), state.config)
                    raise OutOfMemoryError(f"step {step}: {error}; {memory.advice(parts, state.config)}") from error
            state.halve()  # outside of the handler: the error's traceback holds the step's tensors
        raise AssertionError

    def _resume(self, state: Optimization, folder: Path | None) -> int:
        saved = run_folder.load_latest(folder) if folder is not None else None
        if saved is None:
            return 0
        step, tensors, meta = saved
        if meta.get("config") != _plain(state.config) or meta.get("seed") != state.seed:
            raise ModelError(f"the checkpoint in {folder} is of another configuration or seed; start a new run")
        state.restore(tensors)
        return step

    def _recover(self, state: Optimization, folder: Path | None, step: int) -> None:
        """Goes back to the last checkpoint's values (without one, to the start), once; the streams go on."""
        if state.restarts:
            raise DivergedError(
                f"the last {MAX_SKIPPED} steps before step {step} gave numbers that are not finite, again after a "
                "recovery; try another --seed, or a lower --guidance-scale or --lr"
            )
        saved = run_folder.load_latest(folder) if folder is not None else None
        happened = f"{MAX_SKIPPED} steps gave numbers that are not finite"
        if saved is None:
            state.restart(f"{happened}: the volume is started again from another seed")
            return
        state.restore(saved[1])
        state.restarts, state.event = 1, f"{happened}: back to the values of step {saved[0]}"

    def _save(self, state: Optimization, folder: Path, step: int) -> None:
        meta = {"config": _plain(state.config), "seed": state.seed, "prompt": state.asset.prompt}
        run_folder.save_checkpoint(folder, step, state.state(), meta)


def _plain(config: SDSConfig) -> dict:
    """The configuration as JSON would give it back (lists for tuples)."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
