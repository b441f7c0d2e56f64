"""What a person sees of a queue and of the folders that its jobs fill, and what they may ask of it.

A thing on the page is one job: four views, a 3D asset (which has taken the place of its views), or a learned subject.
All of it is read from the queue and from the folders, so that a server that starts again shows the same.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from mvdream_fast.core.errors import ArgumentError, UserError
from mvdream_fast.core.schema import Checked, checked
from mvdream_fast.distill import request
from mvdream_fast.jobs.job import Job, State, Status
from mvdream_fast.jobs.plan import OF_JOB
from mvdream_fast.jobs.queue import Queue
from mvdream_fast.jobs.store import LocalStore
from mvdream_fast.jobs.workspace import WORK, asset_folder
from mvdream_fast.models.tokenizer import check_prompt
from mvdream_fast.web.things import (
    EMBEDDED,
    FILES,
    GENERATE,
    KINDS,
    NUMBERED,
    SDS,
    SUBJECT,
    Kept,
    negative_of,
    saved_name,
    thing,
    views_key,
)
from mvdream_fast.web.uploads import Uploads

MAX_WAITING = 200
FRESH_S = 0.4  # all pages share one look at the queue
MOST = 1000  # things on one page
SOON = 10  # the priority of what takes seconds
TOKEN = "sks"
VIEW_STEPS = 25  # as many as a run takes for the views that it shows first

Pair = tuple[Job, Status]


class Unknown(UserError):
    """What is asked for is not here."""


class Busy(UserError):
    """More waits than is sensible."""


@dataclass(frozen=True)
class Ask(Checked):
    """Four views of a prompt, by the model as it comes or by a learned subject's."""

    prompt: str
    seed: Annotated[int, Interval(ge=0, le=2**53 - 1)] = 0  # what a page's numbers hold
    subject: str = ""
    negative_prompt: str = ""


@dataclass(frozen=True)
class Grow(Checked):
    """How the asset of some views is made."""

    pace: Literal["auto", "fast"] = "auto"


@dataclass(frozen=True)
class Teach(Checked):
    """Photos of one thing, by the names that uploads have given them, and the word for it."""

    noun: str
    photos: list[str]


@dataclass(frozen=True)
class File:
    """A file to be sent, and how. saved_as: the name that it is saved under."""

    path: Path
    kept: Kept
    saved_as: str


class Board:
    """The page's view of a queue. Any number of threads may ask.

    Args: folder, of the queue. model, for who names no subject.
    """

    def __init__(self, folder: Path, model: str = "embedded"):
        self.folder, self.model = folder, model
        self._queue = Queue(LocalStore(folder))
        self.uploads = Uploads(folder / "uploads")
        self._usual_negative = request.resolve({"prompt": "a chair", "model": model}).config.negative_prompt
        self._lock = threading.RLock()
        self._known: list[Pair] = []
        self._looked = -FRESH_S

    def state(self, find: str = "", limit: int = 48, chosen: str = "") -> dict[str, Any]:
        """Everything that a page shows, as JSON. chosen: the id of the thing that is looked at."""
        look = _Look(self._jobs(), self.folder, self.model, self._usual_negative)
        words = find.casefold().split()
        found = [pair for pair in look.shelf() if all(word in pair[0].title.casefold() for word in words)]
        shown = found[: max(1, min(limit, MOST))]
        states = [status.state for _, status in look.active]
        return {
            "place": str(self.folder),
            "model": look.model_name(self.model),
            "running": states.count(State.RUNNING),
            "waiting": states.count(State.QUEUED),
            "queue": [look.thing(pair) for pair in look.active[:MOST]],
            "shelf": [look.thing(pair) for pair in shown],
            "more": len(found) > len(shown),
            "subjects": [{"id": job.id, "title": job.title} for job in look.subjects],
            "chosen": look.chosen(chosen),
        }

    def views(self, asked: dict[str, Any]) -> str:
        """Asks for four views. Returns the job's id. Raises ArgumentError, Busy."""
        ask = checked(Ask, asked, "", ArgumentError)
        check_prompt(ask.prompt)
        check_prompt(ask.negative_prompt, allow_empty=True)
        what = {"prompt": ask.prompt.strip(), "seed": ask.seed, "model": self._model(ask.subject)}
        what |= {"negative_prompt": ask.negative_prompt.strip() or self._usual_negative, "n_steps": VIEW_STEPS}
        return self._add(GENERATE, what, SOON)

    def grow(self, job_id: str, asked: dict[str, Any]) -> str:
        """Asks for the asset of some views. Returns its job's id. Raises ArgumentError, Unknown, Busy."""
        how, (job, _) = checked(Grow, asked, "", ArgumentError), self._job(job_id)
        if job.kind != GENERATE:
            raise ArgumentError("only four views can be grown; draw them first")
        names = ("prompt", "seed", "model", "negative_prompt")  # which a job that another program made need not have
        flags = {name: job.request[name] for name in names if name in job.request}
        wanted = request.resolve(flags)
        if how.pace == "fast":
            small = wanted.config.preset == "mini"  # which has a preset of half the work
            wanted = request.resolve(flags | ({"preset": "fast"} if small else {"steps": wanted.config.ends[-1] // 2}))
        return self._add(SDS, wanted.to_dict())

    def teach(self, asked: dict[str, Any]) -> str:
        """Asks for a subject to be learned. Returns its job's id. Raises ArgumentError, Busy."""
        teach = checked(Teach, asked, "", ArgumentError)
        noun = " ".join(check_prompt(teach.noun).split())
        if TOKEN in noun.split():
            raise ArgumentError(f"{TOKEN!r} is the name that it will get; say what kind of thing it is, such as chair")
        folder = self.uploads.collect(teach.photos)
        what = {"prompt": f"a photo of a {TOKEN} {noun}", "instance_data_dir": str(folder), "instance_token": TOKEN}
        return self._add(SUBJECT, what | {"model": self.model})

    def cancel(self, job_id: str) -> str:
        """Stops a job that waits or runs; one that has ended stays as it is. Raises Unknown."""
        return self._tell(job_id, self._queue.cancel)

    def retry(self, job_id: str) -> str:
        """Goes on with a job that has failed or was cancelled; any other stays as it is. Raises Unknown."""
        return self._tell(job_id, self._queue.retry)

    def file(self, job_id: str, name: str) -> File:
        """A file of a job, by one of the names that are known. Raises Unknown."""
        job, status = self._job(job_id)
        if name not in FILES:
            raise Unknown("there is no such file")
        return File(_there(folder_of(self.folder, job, status) / name), FILES[name], saved_name(job, name))

    def image(self, job_id: str, kind: str, number: int) -> Path:
        """A numbered image of a job. Raises Unknown."""
        job, status = self._job(job_id)
        if kind not in NUMBERED or not 0 <= number < 10**9:
            raise Unknown("there is no such image")
        return _there(folder_of(self.folder, job, status) / kind / f"{number:0{NUMBERED[kind]}d}.png")

    def _jobs(self) -> list[Pair]:
        """The jobs that a page knows, the first to be begun at first."""
        with self._lock:
            if time.monotonic() - self._looked > FRESH_S:
                self._known = [pair for pair in self._queue.jobs() if pair[0].kind in KINDS]
                self._looked = time.monotonic()
            return self._known

    def _job(self, job_id: str) -> Pair:
        found = next((pair for pair in self._jobs() if pair[0].id == job_id), None)
        if found is None:
            raise Unknown("there is no such thing here (any more)")
        return found

    def _model(self, subject: str) -> str:
        """The model that draws: this server's, or the one that has learned a subject."""
        if not subject:
            return self.model
        job, status = self._job(subject)
        if job.kind != SUBJECT or status.state != State.DONE:
            raise ArgumentError("the subject is not learned yet; wait until it is, or choose another")
        return str(folder_of(self.folder, job, status) / "model")

    def _add(self, kind: str, what: dict[str, Any], priority: int = 0) -> str:
        """Puts a job into the queue. One that is there already is looked at, and begun again where it was cancelled."""
        job = Job(kind, what, priority)
        with self._lock:
            status = next((status for known, status in self._jobs() if known.id == job.id), None)
            if status is None:
                if sum(s.state == State.QUEUED for _, s in self._jobs()) >= MAX_WAITING:
                    raise Busy(f"{MAX_WAITING} things wait already; cancel some, or come back when they are done")
                self._queue.add(job)
            elif status.state in (State.FAILED, State.CANCELLED):
                self._queue.retry(job.id)
            self._looked = -FRESH_S
        return job.id

    def _tell(self, job_id: str, tell: Callable[[str], bool]) -> str:
        self._job(job_id)
        with self._lock:
            tell(job_id)
            self._looked = -FRESH_S
        return job_id


def folder_of(root: Path, job: Job, status: Status) -> Path:
    """Where a job's files lie now: among the assets once it is done, before that where its last attempt works."""
    published = root / asset_folder(job)
    attempts = (root / WORK / f"{job.name}.{number}" for number in range(status.attempt, 0, -1))
    return next((folder for folder in (published, *attempts) if folder.is_dir()), published)


def _there(path: Path) -> Path:
    if not path.is_file():
        raise Unknown("it is not there yet")
    return path


class _Look:
    """The queue as it was at one moment."""

    def __init__(self, jobs: list[Pair], folder: Path, model: str, usual_negative: str):
        self._jobs, self._folder, self._model, self._usual_negative = jobs, folder, model, usual_negative
        self.active = [pair for pair in jobs if pair[1].state in (State.RUNNING, State.QUEUED)]
        self.active.sort(key=lambda pair: pair[1].state == State.QUEUED)
        waiting = [job.id for job, status in self.active if status.state == State.QUEUED]
        self._ahead = {job_id: place for place, job_id in enumerate(waiting)}
        self.subjects = [job for job, status in jobs if job.kind == SUBJECT and status.state == State.DONE]
        self._drawn = {views_key(job): pair for pair in jobs if (job := pair[0]).kind == GENERATE}
        self._grown = {views_key(job): pair for pair in jobs if (job := pair[0]).kind == SDS}

    def shelf(self) -> list[Pair]:
        """What was made or is being made, the newest first; views that were grown are seen with their asset."""
        begun = (pair for pair in self._jobs if pair[1].state != State.QUEUED)
        shown = [pair for pair in begun if self._asset_of(pair[0]) is None]
        return sorted(shown, key=lambda pair: -pair[0].created)

    def _asset_of(self, job: Job) -> Pair | None:
        return self._grown.get(views_key(job)) if job.kind == GENERATE else None

    def chosen(self, job_id: str) -> dict[str, Any] | None:
        """The thing of this id; of views that were grown the asset; None for an id that is not known."""
        found = next((pair for pair in self._jobs if pair[0].id == job_id), None)
        return None if found is None else self.thing(self._asset_of(found[0]) or found)

    def _subject_of(self, model: str) -> Job | None:
        """The subject whose model this is; the folder may have been moved since, or be named by the job."""
        names = (Path(model).parent.name, model.removeprefix(OF_JOB))
        return next((job for job in self.subjects if job.name == names[0] or job.id == names[1]), None)

    def model_name(self, model: str) -> str:
        """A model for people: a subject's, the one that ships with the package, or a file's or folder's last name."""
        if subject := self._subject_of(model):
            return f"the model of “{subject.title}”"
        return EMBEDDED if model == "embedded" else Path(model).name

    def thing(self, pair: Pair) -> dict[str, Any]:
        """A job as the page's JSON has it."""
        job, status = pair
        model, negative = str(job.request.get("model", self._model)), negative_of(job)
        subject = self._subject_of(model)
        before = self._drawn.get(views_key(job)) if job.kind == SDS else None
        return thing(
            job, status, folder_of(self._folder, *pair), model=self.model_name(model),
            negative="" if negative == self._usual_negative else negative, ahead=self._ahead.get(job.id, 0),
            drawn=(before[0].id, folder_of(self._folder, *before)) if before else None,
            subject=subject.id if subject else "",
        ).plain()  # fmt: skip
