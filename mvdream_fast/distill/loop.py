"""The loop over the steps of a text-to-3D run: checkpoints, recoveries, memory that runs out; and its guidance.

What a step does is state.py's; TextTo3D (text_to_3d.py) is the way in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvdream_fast.camera import middle_cameras
from mvdream_fast.checkpoints.open import needed
from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import DivergedError, ModelError, OutOfMemoryError
from mvdream_fast.core.machine import memory_errors, repeated_shapes
from mvdream_fast.core.schema import is_tuple
from mvdream_fast.diffusion.denoiser import TextCond
from mvdream_fast.distill import run_memory
from mvdream_fast.distill.recipes import SDSConfig, check_ending, settings_of
from mvdream_fast.distill.request import check_vsd
from mvdream_fast.distill.state import MAX_SKIPPED, GrownAsset, Record, RunState
from mvdream_fast.guidance.base import Guidance
from mvdream_fast.guidance.prompts import VIEW_WORDS
from mvdream_fast.guidance.reconstruction import Reconstruction
from mvdream_fast.guidance.repaint import Painter, Repaint
from mvdream_fast.guidance.sds import SDS, ScoreDistillation, SingleViewSDS
from mvdream_fast.guidance.vsd import VSD, Learner, VariationalScore
from mvdream_fast.models.unet import MultiViewUNet
from mvdream_fast.scene.asset import Asset

if TYPE_CHECKING:
    from torch import Tensor

    from mvdream_fast.models.config import ModelConfig
    from mvdream_fast.pipeline import MVDreamPipeline


@dataclass(frozen=True)
class Progress:
    """What a callback is given after a step: what the step reports, and the growing asset (live, not a copy)."""

    record: Record
    asset: Asset


@dataclass(frozen=True)
class Loop:
    """How a run goes on and where it saves.

    checkpoints: a folder; the run saves there every `checkpoint_every` steps and goes on from what it holds. callback:
    called after every step. interrupt: when requested, the run saves and ends. model: for advice where memory runs out.
    """

    callback: Callable[[Progress], None] | None = None
    checkpoints: Path | None = None
    checkpoint_every: int = 100
    interrupt: run_folder.Interrupt | None = None
    model: "ModelConfig | None" = None

    def run(self, state: RunState) -> GrownAsset:
        """The remaining steps of `state`'s run; see `_steps` for what it raises."""
        with repeated_shapes(state.representation.device):
            return self._steps(state)

    def _steps(self, state: RunState) -> GrownAsset:
        """The remaining steps.

        Raises:
            ModelError: a checkpoint of another configuration.
            OutOfMemoryError: a step that does not fit, even with half of the samples.
            DivergedError: numbers that are not finite, or nothing to see, after one recovery.
        """
        config = state.config
        first = self._resume(state)
        if config.stage(first) < config.stage(config.steps - 1):
            self._attempt(state, first, state.rehearse)
        for step in range(first, config.steps):
            if self.interrupt is not None and self.interrupt.requested is not None:
                break
            self._report(state, self._attempt(state, step, lambda step=step: state.step(step)))
            if (step + 1) % self.checkpoint_every == 0:
                self._save(state, step + 1)
        else:
            step = config.steps
        self._report(state, state.settle())
        if first < config.steps:
            self._save(state, step)
        return state.asset

    def _report(self, state: RunState, record: Record | None) -> None:
        if record is None:  # not known yet
            return
        state.asset.records.append(record.plain())
        if state.skipped >= MAX_SKIPPED:
            self._recover(state, record.step)
        if self.callback is not None:
            self.callback(Progress(record, state.asset))

    def _attempt(self, state: RunState, step: int, work: Callable[[], Any]) -> Any:
        """`work()`; where memory runs out, once more with half of the samples, and then an end with advice."""
        for last in (state.halved, True):
            try:
                with memory_errors("half of the samples did not help"):
                    return work()
            except MemoryError as error:
                if last:
                    gpu_memory = run_memory.memory_of(state.representation.device)
                    parts = run_memory.estimate(self.model, state.config, gpu_memory=gpu_memory)
                    raise OutOfMemoryError(f"step {step}: {error}; {run_memory.advice(parts, state.config)}") from error
            state.halve()  # outside of the handler: the error's traceback holds the step's tensors
        raise AssertionError

    def _latest(self) -> tuple[int, dict[str, "Tensor"], dict[str, Any]] | None:
        return run_folder.load_latest(self.checkpoints) if self.checkpoints is not None else None

    def _resume(self, state: RunState) -> int:
        saved = self._latest()
        if saved is None:
            return 0
        step, tensors, meta = saved
        if meta.get("config") != _plain(state.config) or meta.get("seed") != state.seed:
            raise ModelError(
                f"the checkpoint in {self.checkpoints} is of another configuration or seed; start a new run"
            )
        state.restore(tensors)
        return step

    def _recover(self, state: RunState, step: int) -> None:
        """Goes back to the last checkpoint's values (without one, to the start), once; the streams go on."""
        if state.restarts:
            raise DivergedError(
                f"the last {MAX_SKIPPED} steps before step {step} gave numbers that are not finite, again after a "
                "recovery; try another --seed, or a lower --guidance-scale or --lr"
            )
        saved = self._latest()
        happened = f"{MAX_SKIPPED} steps gave numbers that are not finite"
        if saved is None:
            state.restart(f"{happened}: the volume is started again from another seed")
            return
        state.restore(saved[1])
        state.restarts, state.event = 1, f"{happened}: back to the values of step {saved[0]}"

    def _save(self, state: RunState, step: int) -> None:
        if self.checkpoints is None:
            return
        self._report(state, state.settle())
        meta = {"config": _plain(state.config), "seed": state.seed, "prompt": state.asset.prompt}
        run_folder.save_checkpoint(self.checkpoints, step, state.state(), meta)


def _plain(config: SDSConfig) -> dict[str, Any]:
    """The configuration as JSON would give it back (lists for tuples)."""
    return {name: list(v) if is_tuple(v) else v for name, v in settings_of(config).items()}


def prompt_endings(config: SDSConfig) -> list[str]:
    """What is told behind the prompt: once, or for each of VIEW_WORDS. As endings, they stay where it is too long."""
    tells_sides = config.guidance.tells_sides(config.mode)
    return [side + config.suffix for side in ([f", {words}" for words in VIEW_WORDS] if tells_sides else [""])]


def new_guidance(pipeline: "MVDreamPipeline", prompt: str, config: SDSConfig, seed: int) -> Guidance:
    """The one place where the kind of guidance is chosen: score distillation from many views or one, plain or
    variational, or, with the method "reconstruct", views that are sampled once and fitted; any but the last may end
    with repainting."""

    def silent(_: str) -> None:
        """The command has named unknown words once."""

    check_vsd(config)
    check_ending(config)
    if config.method == "reconstruct":
        views = pipeline(prompt, config.cameras.n_views, negative_prompt=config.negative_prompt, seed=seed, warn=silent)
        return Reconstruction(views.tensor, middle_cameras(config.cameras))
    endings = prompt_endings(config)
    prompts = [prompt] * len(endings)
    text = pipeline.encode_prompt(prompts, config.negative_prompt, endings, warn=silent).to(pipeline.dtype)
    model = pipeline.model
    own, sides = (None, text) if config.guidance.tells_sides(config.mode) else (text, None)
    unet, vae = needed(model.unet, "unet"), needed(model.vae, "vae")

    def n_groups(step: int) -> int:
        return config.n_groups[config.stage(step)]

    if config.guidance.kind == "vsd":
        if not isinstance(unet, MultiViewUNet):
            raise ModelError(f"VSD trains a copy of the UNet, and that of {pipeline.config.name} takes no LoRA; "
                             "name one of Stable Diffusion's or MVDream's models")  # fmt: skip
        plain = pipeline.encode_prompt(prompt, config.negative_prompt, config.suffix, warn=silent).to(pipeline.dtype)
        multi_view = config.mode == "3d"
        knows_cameras = multi_view and unet.config.camera_in != "none"
        parts, graphs = (unet, vae, pipeline.schedule, own, config.guidance), pipeline.graphs
        learner = Learner(unet, pipeline.schedule, plain.cond, config.guidance, knows_cameras, seed, graphs)
        score = VariationalScore(*parts, learner, multi_view, graphs=graphs)
        return _ending(VSD(score, config.cameras, n_groups, sides), pipeline, text, config)
    score = ScoreDistillation(unet, vae, pipeline.schedule, own, config.guidance, graphs=pipeline.graphs)
    kind = SDS if config.mode == "3d" else SingleViewSDS
    guidance = kind(score, config.cameras, n_groups, config.updates_per_guidance, config.match, sides)
    return _ending(guidance, pipeline, text, config)


def _ending(guidance: Guidance, pipeline: "MVDreamPipeline", text: TextCond, config: SDSConfig) -> Guidance:
    """The guidance, and where the run ends with it repainting. text: of the prompt, or of it with each view's words."""
    if not config.repaint.repaints:
        return guidance
    unet, vae = needed(pipeline.model.unet, "unet"), needed(pipeline.model.vae, "vae")
    single = config.mode == "2d"
    painter = Painter(unet, vae, pipeline.schedule, text, config.repaint, single, pipeline.graphs)
    return Repaint(guidance, painter, config.cameras, config.repaint, config.repaint_step, config.steps)
