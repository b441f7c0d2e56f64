"""From a file of prompts to jobs: a line is checked as `sds` checks it, a subject on photos is tuned first"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mvdream_fast.core.errors import ArgumentError, InputFileError
from mvdream_fast.core.files import lines, parse_json, read_text
from mvdream_fast.core.schema import Checked, checked, is_object
from mvdream_fast.distill import request, settings_file
from mvdream_fast.distill.request import Request
from mvdream_fast.distill.settings_file import MAX_FILE
from mvdream_fast.jobs.job import Job
from mvdream_fast.models.tokenizer import check_prompt

OF_JOB = "job:"  # begins the model of a request that another job tunes: "job:<id>"


@dataclasses.dataclass(frozen=True)
class Subject(Checked):
    """What a line may say beside what `sds --prompts-file` knows, to teach the model a subject first.

    photos: their folder, from the file's own on. instance_prompt: what they show, by default the line's prompt; it and
    the prompt hold the instance_token. tuning_steps: of the tuning, else as many as `dreambooth` takes.
    """

    photos: str = ""
    instance_prompt: str = ""
    instance_token: str = "sks"
    tuning_steps: int | None = None


SUBJECT = {field.name for field in dataclasses.fields(Subject)}


def sds_job(wanted: Request, retries: int = 0, priority: int = 0, needs: tuple[str, ...] = ()) -> Job:
    """The job that makes an asset."""
    return Job("sds", wanted.to_dict(), priority, retries, needs=needs)


def read_jobs(path: Path, flags: dict[str, Any], file: dict[str, Any] | None, retries: int = 0) -> list[Job]:
    """The jobs of a JSONL file of prompts, those of subjects' tunings before what needs them.

    Args: flags, file: as `request.resolve` takes them.
    Raises: InputFileError for a file that cannot be read or holds no prompt, or a folder without photos; ArgumentError
        for a line that cannot be used, by its number.
    """
    jobs: dict[str, Job] = {}
    for number, text in enumerate(lines(read_text(path, limit=MAX_FILE)), 1):
        if text.strip():
            try:
                made = _of_line(text, path.parent, flags, file, retries)
            except ArgumentError as error:
                raise ArgumentError(f"{path}, line {number}: {error}; nothing was run") from error
            jobs |= {job.id: job for job in made}
    if not jobs:
        raise InputFileError(f'{path} holds no prompt; a line is {{"prompt": "a red chair", "seed": 1}}')
    return [*jobs.values()]


def _of_line(text: str, root: Path, flags: dict[str, Any], file: dict[str, Any] | None, retries: int) -> Iterable[Job]:
    data = parse_json(text, "it", ArgumentError)
    about = {key: value for key, value in data.items() if key in SUBJECT} if is_object(data) else {}
    if about:
        text = json.dumps({key: value for key, value in data.items() if key not in SUBJECT})
    asked = {**flags, **settings_file.read_line(text)}
    if {**(file or {}), **asked}.get("seed") == "random":  # drawn anew, it would make every call's job another one
        raise ArgumentError('seed must be a number, got "random"; name one, so that the same command goes on with it')
    wanted = request.resolve(asked, file)
    if not about:
        return [sds_job(wanted, retries)]
    tuning = _tuning(checked(Subject, about, "", ArgumentError), wanted, root, retries)
    asset = dataclasses.replace(wanted, model=f"{OF_JOB}{tuning.id}")
    return [tuning, sds_job(asset, retries, needs=(tuning.id,))]


def _tuning(subject: Subject, wanted: Request, root: Path, retries: int) -> Job:
    from mvdream_fast.tuning.photos import list_photos

    if not subject.photos:
        raise ArgumentError(f"photos must name the folder of the subject's photos, with {', '.join(sorted(SUBJECT))}")
    folder = (root / subject.photos).resolve()
    list_photos(folder)
    prompt = subject.instance_prompt or wanted.prompt
    word = check_prompt(subject.instance_token)
    for name, sentence in (("instance_prompt", prompt), ("prompt", wanted.prompt)):
        if word not in "".join(c if c.isalnum() else " " for c in check_prompt(sentence)).split():
            raise ArgumentError(f"{name} must hold the instance_token {word!r}, got {sentence!r}")
    flags: dict[str, Any] = {"instance_data_dir": str(folder), "instance_token": subject.instance_token}
    flags |= {"model": wanted.model, "seed": wanted.seed}
    if subject.tuning_steps is not None:
        if subject.tuning_steps < 1:
            raise ArgumentError(f"tuning_steps must be at least 1, got {subject.tuning_steps}")
        flags["max_train_steps"] = subject.tuning_steps
    return Job("dreambooth", {"prompt": prompt, **flags}, retries=retries)
