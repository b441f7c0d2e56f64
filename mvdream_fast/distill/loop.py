"""The loop over the stages of a text-to-3D run and their steps: checkpoints, recoveries, memory that runs out; and the
guidance of a stage.

What a step does is state.py's; TextTo3D (text_to_3d.py) is the way in.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mvdream_fast.camera import Cameras
from mvdream_fast.checkpoints.open import needed
from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import DivergedError, ModelError, OutOfMemoryError
from mvdream_fast.core.machine import memory_errors, repeated_shapes
from mvdream_fast.core.ramp import is_ever_on
from mvdream_fast.diffusion.denoiser import TextCond
from mvdream_fast.distill import run_memory
from mvdream_fast.distill.config import SDSConfig, check_learning, completed, written
from mvdream_fast.distill.sampled import Sampler, silent
from mvdream_fast.distill.state import MAX_SKIPPED, GrownAsset, Record, RunState, is_skipping
from mvdream_fast.guidance.base import Guidance
from mvdream_fast.guidance.prompts import VIEW_WORDS
from mvdream_fast.guidance.reconstruction import Anchored, Reconstruction
from mvdream_fast.guidance.repaint import Painter, Repaint
from mvdream_fast.guidance.sds import SDS, ScoreDistillation, SingleViewSDS
from mvdream_fast.guidance.vsd import VSD, Learner, VariationalScore
from mvdream_fast.models.unet import MultiViewUNet
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.base import Representation

if TYPE_CHECKING:
    from mvdream_fast.pipeline import MVDreamPipeline

# Begins the stage of an index, with what the one before has made: nothing for the first stage, and for one whose state
# is about to be restored.
Begin = Callable[[int, Representation | None], RunState]


@dataclass(frozen=True)
class Progress:
    """What a callback is given after a step: what the step reports, and the growing asset (live, not a copy)."""

    record: Record
    asset: Asset


@dataclass(frozen=True)
class Loop:
    """How a run goes on and where it saves.

    checkpoints: a folder; the run saves there every `checkpoint_every` steps and goes on from what it holds. callback:
    called after every step. interrupt: when requested, the run saves and ends.
    """

    callback: Callable[[Progress], None] | None = None
    checkpoints: Path | None = None
    checkpoint_every: int = 100
    interrupt: run_folder.Interrupt | None = None

    def run(self, config: SDSConfig, seed: int, begin: Begin, prompt: str | None = None) -> GrownAsset:
        """The remaining steps of all stages, each of which `begin` begins. prompt: that a checkpoint must be of; None:
        any.

        A stage that has ended is saved before the next one begins, so that a run that is killed in between hands over
        once more. What it held, its guidance and model too, is let go of by then.

        Raises:
            ModelError: a checkpoint of another configuration, seed or prompt.
            OutOfMemoryError: a step that does not fit, even with half of the samples.
            DivergedError: numbers that are not finite, or nothing to see, after one recovery; nothing to hand over.
        """
        done, tensors = self._resume(config, seed, prompt)
        number = config.at_work(done)
        state = begin(number, None)
        if tensors is not None:
            state.restore(tensors)
            del tensors
        while True:
            with repeated_shapes(state.representation.device):
                self._steps(state, max(done - state.before, 0), _about(config, seed, state.asset.prompt))
            if self._is_stopped or number == len(config.later):
                return state.asset
            made, number = state.asset, number + 1
            del state  # before the next stage's model is loaded
            state = begin(number, made.representation)
            state.asset.records = made.records
            del made

    def _steps(self, state: RunState, first: int, about: dict[str, Any]) -> None:
        """A stage's steps from `first` on. about: it is what checkpoints say of the run."""
        config = state.config
        if config.phase(first) < config.phase(config.steps - 1):
            self._attempt(state, first, state.rehearse)
        for step in range(first, config.steps):
            if self._is_stopped:
                break
            self._report(state, self._attempt(state, step, lambda step=step: state.step(step)))
            if (state.before + step + 1) % self.checkpoint_every == 0:
                self._report(state, state.settle())
                if not state.skipped:  # what a recovery goes back to must be good
                    self._save(state, step + 1, about)
        else:
            step = config.steps
        self._report(state, state.settle())
        if step > first:  # else the stage has nothing of its own yet, and its step would be the end of the one before
            self._save(state, step, about)

    @property
    def _is_stopped(self) -> bool:
        return self.interrupt is not None and self.interrupt.requested is not None

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
                    parts = run_memory.estimate(state.model, state.config, gpu_memory=gpu_memory)
                    advice = run_memory.advice(parts, state.config)
                    raise OutOfMemoryError(f"step {state.before + step}: {error}; {advice}") from error
            state.halve()  # outside of the handler: the error's traceback holds the step's tensors
        raise AssertionError

    def _latest(self) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        return run_folder.load_latest(self.checkpoints) if self.checkpoints is not None else None

    def _resume(self, config: SDSConfig, seed: int, prompt: str | None) -> tuple[int, dict[str, torch.Tensor] | None]:
        """How many of the run's steps are done, and the state of the stage at work."""
        saved = self._latest()
        if saved is None:
            return 0, None
        step, tensors, meta = saved
        about = _about(config, seed, "")
        of_run = json.loads(json.dumps(completed(meta["config"]))) if "config" in meta else None
        if of_run != about["config"] or meta.get("seed") != about["seed"]:
            raise ModelError(
                f"the checkpoint in {self.checkpoints} is of another configuration or seed; start a new run"
            )
        if prompt is not None and meta.get("prompt", prompt) != prompt:
            raise ModelError(
                f"the checkpoint in {self.checkpoints} is of another prompt, {meta['prompt']!r:.60}; start a new run "
                "in a folder of its own"
            )
        return step, tensors

    def _recover(self, state: RunState, step: int) -> None:
        """Goes back to the values of the stage's last checkpoint (without one, to its start), once; the streams go
        on."""
        if state.restarts:
            raise DivergedError(
                f"the last {MAX_SKIPPED} steps before step {step} gave numbers that are not finite, again after a "
                "recovery; try another --seed, or a lower --guidance-scale or --lr"
            )
        saved = self._latest()
        happened = f"{MAX_SKIPPED} steps gave numbers that are not finite"
        if saved is None or saved[0] <= state.before or is_skipping(saved[1]):  # of the stage before, or stopped in it
            state.restart(happened)
            return
        state.restore(saved[1])
        state.skipped, state.empty, state.restarts = 0, 0, 1
        state.event = f"{happened}: back to the values of step {saved[0]}"

    def _save(self, state: RunState, step: int, about: dict[str, Any]) -> None:
        """Of a state that is settled."""
        if self.checkpoints is not None:
            run_folder.save_checkpoint(self.checkpoints, state.before + step, state.state(), about)


def _about(config: SDSConfig, seed: int, prompt: str) -> dict[str, Any]:
    """What checkpoints say of a run, as JSON would give it back (lists for tuples)."""
    return json.loads(json.dumps({"config": written(config), "seed": seed, "prompt": prompt}))


def prompt_endings(config: SDSConfig) -> list[str]:
    """What is told behind the prompt: once, or for each of VIEW_WORDS. As endings, they stay where it is too long."""
    tells_sides = config.guidance.tells_sides(config.mode)
    return [side + config.suffix for side in ([f", {words}" for words in VIEW_WORDS] if tells_sides else [""])]


def new_guidance(
    pipeline: "MVDreamPipeline", prompt: str, config: SDSConfig, seed: int, sampler: Sampler | None = None
) -> Guidance:
    """The one place where the kind of guidance is chosen: score distillation from many views or one, plain or
    variational, which may end with repainting and have views beside it that are sampled once and fitted; or, with the
    method "reconstruct", such views alone.

    sampler: of the same model, with views that the run has sampled already; those of this stage are added.
    """
    check_learning(config)
    sampler, known = sampler or Sampler(pipeline), config.sampled
    outlined = is_ever_on(known.lambda_silhouette)
    if config.method == "reconstruct":
        views = sampler.sampled(prompt, config, seed)
        images, cameras, there = views.fitted(outlined)
        return Reconstruction(images, cameras, known.lambda_silhouette, there, views.between)
    guidance = _distillation(pipeline, prompt, config, seed)
    if not known.beside:
        return guidance
    views = sampler.sampled(prompt, config, seed)
    images, cameras, there = views.fitted(outlined)
    groups = torch.arange(len(images)).view(config.cameras.n_views, -1).T  # each of them all around
    around = [Cameras(cameras.c2w[group], cameras.fovy[group]) for group in groups]
    there = None if there is None else there[groups]
    weights = known.lambda_sampled, known.lambda_silhouette
    return Anchored(guidance, images[groups], around, *weights, there, views.between)


def _distillation(pipeline: "MVDreamPipeline", prompt: str, config: SDSConfig, seed: int) -> Guidance:
    """Score distillation, and where the run ends with it, repainting."""
    endings = prompt_endings(config)
    prompts = [prompt] * len(endings)
    text = pipeline.encode_prompt(prompts, config.negative_prompt, endings, warn=silent).to(pipeline.dtype)
    model = pipeline.model
    own, sides = (None, text) if config.guidance.tells_sides(config.mode) else (text, None)
    unet, vae = needed(model.unet, "unet"), needed(model.vae, "vae")

    def n_groups(step: int) -> int:
        return config.n_groups[config.phase(step)]

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
    how = config.repaint, single, pipeline.graphs, config.guidance.view_words_deg
    painter = Painter(unet, vae, pipeline.schedule, text, *how)
    return Repaint(guidance, painter, config.cameras, config.repaint, config.repaint_step, config.steps)
