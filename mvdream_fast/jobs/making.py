"""What a worker makes of a job, by its kind: an asset ("sds"), four views ("generate"), a tuned model ("dreambooth").

Models stay loaded from job to job. How a worker comes to its jobs is worker.py's.
"""

import dataclasses
import json
from functools import partial
from typing import Any

from mvdream_fast.checkpoints.open import load_model, open_source
from mvdream_fast.core import cli, run_folder
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.files import atomic_write
from mvdream_fast.core.images import png_bytes
from mvdream_fast.core.machine import memory_errors
from mvdream_fast.core.schema import Checked, checked
from mvdream_fast.distill.loop import Progress
from mvdream_fast.distill.request import Request, run_of
from mvdream_fast.distill.sampled import Sampler
from mvdream_fast.jobs.asset import Device, Way, optimise, sample_views
from mvdream_fast.jobs.child import as_flag, run_child
from mvdream_fast.jobs.plan import OF_JOB
from mvdream_fast.jobs.setup import Setup
from mvdream_fast.jobs.worker import Runner, Task
from mvdream_fast.pipeline import MVDreamPipeline


@dataclasses.dataclass(frozen=True)
class ViewsRequest(Checked):
    """What a job of the kind "generate" asks for."""

    prompt: str
    seed: int = 0
    model: str = "embedded"
    negative_prompt: str = ""
    n_steps: int = 50


def runners(setup: Setup) -> dict[str, Runner]:
    """A function for each kind of job, as a worker of this set-up needs them."""
    cli.set_threads(setup.threads)
    maker = Maker(Device(setup.device, setup.dtype, setup.graphs), setup.threads, setup.checkpoint_every)
    return {"sds": maker.asset, "generate": maker.views, "dreambooth": maker.tuned}


class Maker:
    """Makes what jobs ask for, on one device.

    checkpoint_every: steps. threads: of the processes that tune.
    """

    def __init__(self, device: Device, threads: int | None = None, checkpoint_every: int = 100):
        self.device, self.threads, self.checkpoint_every = device, threads, checkpoint_every
        self._models: dict[tuple[str, bool], MVDreamPipeline] = {}

    def asset(self, task: Task) -> dict[str, Any] | None:
        """A text-to-3D run, as `sds` leaves it in its folder; goes on from what lies there."""
        request = self._with_made_models(run_of(task.job.request, task.job.title), task)
        config = request.config
        total, done = config.ends[-1], run_folder.latest_step(task.folder / "ckpt")
        task.report(done, total, "loading the model")
        sampler = Sampler(self._model(request))
        self.device.write_record(request, task.folder, ["--config", "config.json"])
        if not (task.folder / "views.png").exists():
            task.report(done, total, "first views")
            sample_views(sampler, request, task.folder)
            task.save()

        def watch(progress: Progress) -> None:
            step = progress.record.step
            task.report(step + 1, total, "writing mesh and report" if step + 1 == total else "")
            if step and step % self.checkpoint_every == 0:  # by now the checkpoint of so many steps is written
                task.save()

        silent = lambda _: None  # noqa: E731
        refine = partial(self._model, request, 1)
        way = Way(True, refine, silent, checkpoint_every=self.checkpoint_every, watch=watch)
        with memory_errors("take fewer workers, or a smaller --preset"):
            return {} if optimise(sampler, request, task.folder, way, task.stop) else None

    def views(self, task: Task) -> dict[str, Any] | None:
        """views.png: four views of the prompt."""
        data = {name: value for name, value in task.job.request.items() if name != "kind"}
        asked = checked(ViewsRequest, data, task.job.title, ArgumentError)
        pipeline = self._views_model(asked.model)

        def told(done: int, total: int, _: object) -> None:
            task.report(done, total, "first views")

        views = pipeline(
            asked.prompt, seed=asked.seed, n_steps=asked.n_steps, negative_prompt=asked.negative_prompt,
            suffix=pipeline.suffix, callback=told, warn=lambda _: None,
        )  # fmt: skip
        atomic_write(task.folder / "config.json", json.dumps({"kind": "generate", **data}, indent=2) + "\n")
        atomic_write(task.folder / "views.png", png_bytes(views.sheet()))
        return {}

    def tuned(self, task: Task) -> dict[str, Any] | None:
        """A DreamBooth run as `dreambooth` makes it, in a process of its own: it has another model, an optimiser's
        state beside it, and a memory that is free again afterwards. The model is the folder's model/."""
        folder = task.folder
        for model in self._models.values():
            model.drop()
        self._models = {}
        if (folder / run_folder.RECORD).exists():
            flags = {"resume": folder}
        else:
            for left in [path for path in folder.iterdir() if path.is_file()]:
                left.unlink()
            flags = {name: value for name, value in task.job.request.items() if name not in ("kind", "prompt")}
            flags |= {"instance_prompt": task.job.request["prompt"], "output": folder}
        flags |= {"device": self.device.device, **({"threads": self.threads} if self.threads else {})}
        log, total = run_folder.JsonlLog(folder / "log.jsonl"), task.job.request.get("max_train_steps") or 0

        def tell() -> None:
            task.report(max((r.get("step", 0) for r in log.read()[-1:]), default=0), total, "tuning")

        ended = run_child("dreambooth", [as_flag(*flag) for flag in flags.items()], task, tell)
        return {"model": "model"} if ended else None

    def _with_made_models(self, request: Request, task: Task) -> Request:
        """The request with the folders of models that other jobs have tuned."""
        if not request.model.startswith(OF_JOB):
            return request
        return dataclasses.replace(request, model=str(task.made(request.model.removeprefix(OF_JOB)) / "model"))

    def _model(self, request: Request, stage: int = 0) -> MVDreamPipeline:
        """The model of a run's stage: the one that the job before had, where it is the same."""
        keys = [(request.model_of(i), part.mode == "2d") for i, part in enumerate(request.config.stages)]
        if keys[stage] not in self._models:
            self._keep(*keys)
            self.device.refuse_what_does_not_fit([request])
            self._models[keys[stage]] = self.device.load(request, stage)
        return self._models[keys[stage]]

    def _views_model(self, name: str) -> MVDreamPipeline:
        if (name, False) not in self._models:
            self._keep()
            model, device = load_model(open_source(name)), self.device
            self._models[name, False] = MVDreamPipeline(model, device.device, device.dtype, device.graphs)
        return self._models[name, False]

    def _keep(self, *keys: tuple[str, bool]) -> None:
        """Lets go of all other models."""
        for key in self._models.keys() - set(keys):
            self._models.pop(key).drop()
