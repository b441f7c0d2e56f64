"""One job as the page shows it: its words, how far it is, and the images and files that lie in its folder."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mvdream_fast.core.run_folder import slugify
from mvdream_fast.jobs.job import Job, State, Status

GENERATE, SDS, SUBJECT = "generate", "sds", "dreambooth"
KINDS = {GENERATE: "views", SDS: "asset", SUBJECT: "subject"}
NUMBERED = {"preview": 6, "samples": 6, "photos": 2}  # folders of images, and the digits of their names
EMBEDDED = "the built-in model"


@dataclass(frozen=True)
class Kept:
    """A file that a job leaves. label: as something to be saved; ending: of the name that it is saved under."""

    media_type: str
    label: str
    is_shown: bool = False


FILES = {
    "mesh.glb": Kept("model/gltf-binary", "3D mesh, GLB"),
    "turntable.webp": Kept("image/webp", "Turntable, WebP", is_shown=True),
    "turntable.mp4": Kept("video/mp4", "Turntable, MP4"),
    "views.png": Kept("image/png", "Four views, PNG", is_shown=True),
    "report.html": Kept("text/html", "Report, HTML"),
}


@dataclass(frozen=True)
class Thing:
    """What the page knows of a job. Addresses are relative to the page's, and change when the file does.

    views, thumb: images whose first part is the front. ahead: jobs that will be begun before it. can: names of buttons.
    """

    id: str
    kind: str
    title: str
    about: list[str]
    state: str
    when: float
    ahead: int = 0
    can: list[str] = field(default_factory=list)
    seed: int = 0
    subject: str = ""
    negative_prompt: str = ""
    done: int = 0
    total: int = 0
    left_s: float | None = None
    note: str = ""
    error: str = ""
    views: str | None = None
    thumb: str | None = None
    mesh: str | None = None
    turntable: str | None = None
    previews: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def negative_of(job: Job) -> str:
    """What the prompt of a job is not to make."""
    settings = job.request.get("sds", {})
    settings = settings[0] if isinstance(settings, list) else settings
    return str(job.request.get("negative_prompt", settings.get("negative_prompt", "")))


def views_key(job: Job) -> tuple[Any, ...]:
    """What four views depend on: an asset's own and those that were drawn before it was begun have the same."""
    return job.request.get("prompt"), job.request.get("seed", 0), job.request.get("model"), negative_of(job)


def thing(
    job: Job, status: Status, folder: Path, *, model: str, negative: str, drawn: tuple[str, Path] | None = None,
    ahead: int = 0, subject: str = "",
) -> Thing:  # fmt: skip
    """A job as the page shows it.

    Args: folder, of its files. model, in words. negative, what a person asked not to see. drawn, of an asset: the id
    and the folder of the views that were drawn before it was begun. ahead, how many are. subject, whose model it asks.
    """
    progress, running = status.progress, status.state == State.RUNNING
    left = status.seconds / progress.done * (progress.total - progress.done) if running and progress.done else None
    urls = {name: url for name in FILES if (url := _url(job.id, name, folder))}
    previews = [(step, url) for step, url in _numbered(job.id, "preview", folder)]
    views = _views(job, folder, drawn)
    return Thing(
        job.id, KINDS[job.kind], job.title, list(_about(job, model, negative)), str(status.state), job.created, ahead,
        list(_can(job, status)), int(job.request.get("seed") or 0), subject, negative,
        done=progress.done if running else 0, total=progress.total if running else 0, left_s=left,
        note=progress.message if running else "", error=status.message, views=views,
        thumb=_thumb(job, folder, previews, views), mesh=urls.get("mesh.glb"), turntable=urls.get("turntable.webp"),
        previews=[{"step": step, "url": url} for step, url in previews],
        files=[
            {"label": kept.label, "url": urls[name], "name": saved_name(job, name), "bytes": _size(folder / name)}
            for name, kept in FILES.items() if name in urls
        ],
    )  # fmt: skip


def saved_name(job: Job, name: str) -> str:
    """What a file is called where a person saves it: a-green-armchair-mesh.glb."""
    return f"{slugify(job.title)[:-9]}-{name}"


def _about(job: Job, model: str, negative: str) -> Iterator[str]:
    if "seed" in job.request:
        yield f"seed {job.request['seed']}"
    yield model
    if negative:
        yield f"without {negative}"


def _can(job: Job, status: Status) -> Iterator[str]:
    """The buttons of a thing."""
    if status.state in (State.QUEUED, State.RUNNING):
        yield "cancel"
    if status.state in (State.FAILED, State.CANCELLED):
        yield "retry"
    if status.state == State.DONE:
        yield from {GENERATE: ("grow", "another"), SDS: ("another",), SUBJECT: ("use",)}[job.kind]


def _views(job: Job, folder: Path, drawn: tuple[str, Path] | None) -> str | None:
    """Four views, one row: the job's own, those that were drawn before, or a learned subject's."""
    if job.kind == SUBJECT:
        return next((url for _, url in reversed(_numbered(job.id, "samples", folder))), None)
    own = _url(job.id, "views.png", folder)
    return own or (_url(drawn[0], "views.png", drawn[1]) if drawn else None)


def _thumb(job: Job, folder: Path, previews: list[tuple[int, str]], views: str | None) -> str | None:
    if job.kind == SUBJECT:
        return next((url for _, url in _numbered(job.id, "photos", folder)), None)
    return previews[-1][1] if previews else views


def _numbered(job_id: str, kind: str, folder: Path) -> list[tuple[int, str]]:
    """The images of a folder by their numbers."""
    paths = sorted(path for path in (folder / kind).glob("*.png") if path.stem.isdigit())
    found = ((int(path.stem), _url(job_id, f"{kind}/{path.name}", folder)) for path in paths)
    return [(number, url) for number, url in found if url]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _url(job_id: str, name: str, folder: Path) -> str | None:
    """The address of a file, None where it is not there. A browser may keep what it has: a new file has a new one."""
    try:
        changed = (folder / name).stat().st_mtime_ns
    except OSError:
        return None
    return f"files/{job_id}/{name}?v={changed:x}"
