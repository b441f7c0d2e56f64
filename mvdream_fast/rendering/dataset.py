"""From entries to shards on disk: survey, plan, draw; in several processes, resumable at every finished shard.

Everything is a function of the sources and the options; a second run of the same call finds its shards and goes on.
What was learned from a file, or drawn of it, is kept as long as the file and those that it names are the same. Files
that cannot be read or drawn, whatever they do to the process that tries, are left out and written down (quarantine.py).
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mvdream_fast.core.errors import ArgumentError, OutputError, UserError
from mvdream_fast.core.files import atomic_write, remove_stale
from mvdream_fast.core.run_folder import locked
from mvdream_fast.data import captions
from mvdream_fast.data.shards import Sample, columns_for, write_shard
from mvdream_fast.rendering import sources
from mvdream_fast.rendering.catalogue import Entry
from mvdream_fast.rendering.mesh import MeshError
from mvdream_fast.rendering.orbits import PRESETS, orbit
from mvdream_fast.rendering.parts import Part
from mvdream_fast.rendering.plan import SHARD_ASSETS, AssetPlan, Selection, plan, select
from mvdream_fast.rendering.quarantine import REFUSED, Quarantine
from mvdream_fast.rendering.survey import Survey, survey
from mvdream_fast.rendering.workers import Limits, Lost, Stopped, Workers, half_the_memory, tell

SETTINGS, SURVEYS, DRAWN, SUMMARY = "render.json", "surveys.json", "drawn.json", "summary.json"
VERSION = 4  # of the images and captions: a folder begun by another version is not continued
SECONDS = 600.0  # that a process may spend on reading a file, or on an orbit of it
SAVE_EVERY = 512  # surveys between two writes of all of them
TRIES = 2  # where a process dies over an asset: it may have been a neighbour that took the memory

_renderer = None


@dataclass(frozen=True)
class Options:
    """What decides the pixels and the words of a data set."""

    preset: str = "embedded"
    size: int = 64
    n_plain: int = 2  # orbits in an asset's own colours
    n_painted: int = 3  # orbits in other colours
    seed: int = 0
    renderer: str = "gl"


@dataclass
class Result:
    """What became of every entry."""

    selection: Selection
    bad: dict[str, str] = field(default_factory=dict)  # id -> sentence
    notes: dict[str, list[str]] = field(default_factory=dict)  # id -> what of the file is not drawn
    n_views: int = 0
    shards: list[Path] = field(default_factory=list)
    captions: set[str] = field(default_factory=set)


def make_renderer(kind: str):
    """ "gl" through EGL, "numpy" without OpenGL, "auto" the first that works. Raises ArgumentError where "gl" fails."""
    from mvdream_fast.rendering.opengl import GLRenderer
    from mvdream_fast.rendering.software import NumpyRenderer

    if kind == "numpy":
        return NumpyRenderer()
    try:
        return GLRenderer()
    except Exception as error:  # moderngl and its loader raise plain Exception, ImportError and OSError
        if kind == "auto":
            return NumpyRenderer()
        raise ArgumentError(
            f"no OpenGL context through EGL ({error}); install moderngl and Debian's libegl1 and "
            "libgl1-mesa-dri, or pass --renderer numpy"
        ) from None


def render_dataset(
    entries: list[Entry],
    folder: Path,
    options: Options,
    held_out: set[str],
    workers: int = 1,
    report: Callable[[str, int, int, int], None] = lambda stage, done, total, views: None,
    stop: Callable[[], object] = lambda: False,
    part: Part | None = None,
    limits: Limits | None = None,
    retry: bool = False,
) -> Result | None:
    """Renders `entries` into shards in `folder`; finished shards of the same options and files are kept as they are.

    `report(stage, done, total, views)` is called after every asset surveyed and every shard written. Once `stop()` is
    true the processes are ended and None is returned: the same call goes on from there.

    Args: part, which of many renderings this is, of whose assets `entries` are. An asset is then drawn by itself: its
        images and words do not depend on those of others, near-duplicates stay, and no word compares it with its kind.
        limits, of a process. retry, whether assets in quarantine are tried again.
    Raises: OutputError when the folder holds another data set or the disk is full: finished shards stay.
    """
    _claim(folder, entries, options, held_out, part)
    limits = limits or Limits(SECONDS, half_the_memory())
    begin = functools.partial(_begin, options.renderer)
    with contextlib.suppress(Stopped), locked(folder), Workers(workers, begin, limits, stop) as pool:
        remove_stale(folder)  # in the lock: before, they may be of a run on another machine
        quarantine = Quarantine(folder, retry)
        surveys, contents = _surveys(entries, folder, pool, quarantine, report)
        selection = select(entries, surveys, part is None)
        assets = plan(
            selection.kept, surveys, held_out, options.seed, options.n_plain, options.n_painted, part is not None
        )
        held = {asset.entry.id for asset in assets if quarantine.holds(asset.entry)}
        jobs = [job.without(held) for job in make_jobs(assets, folder, options)]
        jobs, n_views = _draw(jobs, folder, contents, pool, quarantine, report)
        texts = {item.caption for asset in assets for item in asset.orbits}
        notes = {id_: look.notes for id_, look in surveys.items() if look.notes}
        return Result(selection, quarantine.reasons(), notes, n_views, [job.path for job in jobs], texts)
    return None


def _draw(
    jobs: list["Job"], folder: Path, contents: dict[str, list], pool: Workers, quarantine: Quarantine, report: Callable
) -> tuple[list["Job"], int]:
    """Draws the shards that are not there; returns all of them as they were drawn in the end, and how many views."""
    jobs = [job for job in jobs if job.assets]
    plans = {job.path.name: _digest(job, contents) for job in jobs}
    drawn = _keep_drawn(folder, plans)
    made = {job.path.name: job for job in jobs}
    missing, blame, n_views = deque(job for job in jobs if job.path.name not in drawn), _Blame(quarantine), 0
    for job, answer in pool.map(draw_shard, missing):
        name = job.path.name
        if isinstance(answer, Lost):
            if blame.put(next(asset.entry for asset in job.assets if asset.entry.id == answer.at), answer):
                made[name] = job = job.without({answer.at})
            if job.assets:
                missing.append(job)
            continue
        n_views += answer
        drawn[name] = _digest(job, contents)
        atomic_write(folder / DRAWN, json.dumps(drawn))
        report("views", len(drawn), len(jobs), n_views)
    return [job for job in made.values() if job.assets], n_views


class _Blame:
    """Says which assets are not tried again: those whose process died, after TRIES of it; others at once."""

    def __init__(self, quarantine: Quarantine):
        self.quarantine, self.deaths = quarantine, Counter[str]()

    def put(self, entry: Entry, lost: Lost) -> bool:
        """Whether that was it for the asset."""
        self.deaths[entry.id] += lost.kind == "died"
        if lost.kind == "died" and self.deaths[entry.id] < TRIES:
            return False
        self.quarantine.add(entry, lost.kind, lost.reason if lost.kind == REFUSED else f"{entry.name}: {lost.reason}")
        return True


def write_summary(folder: Path, result: Result) -> None:
    """summary.json: what was kept and left out, by name, and the words that were used."""
    words = sorted({word for text in result.captions for word in text.replace(",", "").split()})
    summary = {
        "kept": len(result.selection.kept),
        "unreadable": result.bad,
        "drawn_without": result.notes,
        "too_thin": {e.id: e.name for e in result.selection.empty},
        "near_duplicates": {e.id: e.name for e in result.selection.duplicates},
        "shards": len(result.shards),
        "captions": len(result.captions),
        "words": words,
    }
    atomic_write(folder / SUMMARY, json.dumps(summary, indent=1))


def _claim(folder: Path, entries: list[Entry], options: Options, held_out: set[str], part: Part | None) -> None:
    """Makes the folder, or checks that what is in it was begun with the same settings."""
    if part is not None:
        part.check(folder.parent, dataclasses.asdict(options), SETTINGS)
    settings = {
        "version": VERSION,
        **dataclasses.asdict(options),
        "held_out": sorted(held_out),
        "entries": [[e.id, e.caption] for e in entries],
    }
    settings |= {} if part is None else {"part": [part.i, part.n]}
    settings = json.loads(json.dumps(settings))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = json.loads((folder / SETTINGS).read_bytes()) if (folder / SETTINGS).exists() else None
    except OSError as error:
        raise OutputError(f"{folder} cannot be used ({error.strerror}); name another with -o") from None
    except ValueError:
        found = {}
    if found is None and (any(folder.glob("*.tar")) or any(folder.glob("shard-*-of-*"))):
        raise OutputError(f"{folder} holds shards of something else; name another folder with -o")
    if found is not None and found != settings:
        different = sorted(k for k in settings | found if found.get(k) != settings.get(k))
        raise OutputError(f"{folder} was begun with another {', '.join(different)}; name another folder with -o")
    if found is None:
        atomic_write(folder / SETTINGS, json.dumps(settings))


def _surveys(
    entries: list[Entry], folder: Path, pool: Workers, quarantine: Quarantine, report: Callable
) -> tuple[dict[str, Survey], dict[str, list]]:
    """The survey of every readable entry, and the hashes of its files; the others are in quarantine then.

    Surveys are stored beside the shards; only those of new or changed files are made, and refused files are read again.
    """
    stored, known = _read_json(folder / SURVEYS), {}
    for entry in entries:
        files = stored[entry.id]["files"] if entry.id in stored else {}
        # Another source may call a file of its own the same.
        files = sources.unchanged(files) if str(sources.place(entry.archive)) in files else None
        if files is not None:
            known[entry.id] = stored[entry.id] | {"files": files}
    unknown = deque(entry for entry in entries if entry.id not in known and not quarantine.holds(entry))
    done, total, blame = 0, len(unknown), _Blame(quarantine)
    quarantine.keep({e.id for e in entries if quarantine.holds(e)})
    try:
        for entry, look in pool.map(survey_entry, unknown):
            if isinstance(look, Lost) and not blame.put(entry, look):
                unknown.append(entry)
                continue
            if not isinstance(look, Lost):
                known[entry.id] = look
            done += 1
            report("assets", done, total, 0)
            if done % SAVE_EVERY == 0:
                atomic_write(folder / SURVEYS, json.dumps(known))
    finally:  # whoever is stopped goes on from here
        if known != stored:
            atomic_write(folder / SURVEYS, json.dumps(known))
    hashes = {k: [stamp and stamp[2] for stamp in record["files"].values()] for k, record in known.items()}
    return {k: Survey(**record["survey"]) for k, record in known.items()}, hashes


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _digest(job: "Job", contents: dict[str, list]) -> str:
    """A hash of all that decides a shard beside the options: its assets, their orbits and words, their files."""
    plans = [
        [dataclasses.asdict(dataclasses.replace(asset.entry, archive=None)), asset.split, asset.orbits]
        for asset in job.assets
    ]
    plans += [contents[asset.entry.id] for asset in job.assets]
    return hashlib.sha256(json.dumps(plans, default=dataclasses.asdict).encode()).hexdigest()


def _keep_drawn(folder: Path, plans: dict[str, str]) -> dict[str, str]:
    """The finished shards that are still as planned; the others are removed."""
    drawn = _read_json(folder / DRAWN)
    kept = {name: plan for name, plan in plans.items() if drawn.get(name) == plan and (folder / name).exists()}
    for path in [*folder.glob("train-*.tar"), *folder.glob("held_out-*.tar")]:
        if path.name not in kept:
            path.unlink()
    return kept


@dataclass(frozen=True)
class Job:
    """One shard: its file and its assets."""

    path: Path
    assets: tuple[AssetPlan, ...]
    options: Options

    def without(self, ids: set[str]) -> "Job":
        """The same without some assets; the other shards stay as they are."""
        return dataclasses.replace(self, assets=tuple(a for a in self.assets if a.entry.id not in ids))


def make_jobs(assets: list[AssetPlan], folder: Path, options: Options) -> list[Job]:
    """Shards of SHARD_ASSETS assets in a shuffled order, so that any few of them are a fair sample."""
    from mvdream_fast.core.rng import Stream

    jobs = []
    for split in ("held_out", "train"):
        chosen = [asset for asset in assets if asset.split == split]
        order = Stream(options.seed, 0, f"shuffle/{split}").permutation(len(chosen)).tolist()
        for start in range(0, len(chosen), SHARD_ASSETS):
            group = tuple(chosen[i] for i in order[start : start + SHARD_ASSETS])
            jobs.append(Job(folder / f"{split}-{start // SHARD_ASSETS:05d}.tar", group, options))
    return jobs


def survey_entry(entry: Entry) -> dict | Lost:
    """The survey of an entry with the stamps of its files, or why there is none."""

    def look() -> dict:
        mesh = entry.load().normalised()
        files = sources.stamps([str(sources.place(entry.archive)), *mesh.sources])
        return {"survey": dataclasses.asdict(survey(mesh, _renderer)), "files": files}

    return _tried(entry, look)


def draw_shard(job: Job) -> int | Lost:
    """Renders and writes one shard; returns its number of views, or which of its assets cannot be drawn.

    Raises: OutputError.
    """
    samples: list[Sample] = []
    for asset in job.assets:
        drawn = _tried(asset.entry, lambda asset=asset: list(draw_asset(asset, job.options, _renderer)), "failed")
        if isinstance(drawn, Lost):
            return drawn
        samples += drawn
    tell("")  # from here on it is no asset's fault
    write_shard(job.path, samples)
    return sum(len(sample.views) for sample in samples)


def _tried(entry: Entry, do: Callable[[], Any], refused: str = REFUSED) -> Any:
    """What `do` returns; a Lost instead of an error, as a damaged file reaches a zoo of them."""
    tell(entry.id)
    try:
        return do()
    except MeshError as error:
        return Lost(entry.id, refused, str(error))
    except UserError:
        raise
    except MemoryError:
        return Lost(entry.id, "memory", "reading the mesh takes more memory than there is")
    except Exception as error:
        return Lost(entry.id, "failed", f"{type(error).__name__}: {error}")


def draw_asset(asset: AssetPlan, options: Options, renderer) -> Iterator[Sample]:
    """All orbits of one asset as samples."""
    preset = PRESETS[options.preset]
    mesh = asset.entry.load().normalised(preset.fit)
    per_side = 4 if options.size <= 128 else 2
    for number, item in enumerate(asset.orbits):
        tell(asset.entry.id)
        cameras = orbit(preset, np.asarray(item.camera))
        drawn = mesh if item.target is None or not item.paint else mesh.recolored(list(item.paint), item.target)
        views = renderer.render(drawn, cameras.c2w, cameras.fovy, options.size, per_side)
        meta = _words(asset, number, item) | {
            "size": options.size,
            "columns": columns_for(preset.n_views, options.size),
            "c2w": [[round(float(x), 7) for x in pose.reshape(-1)] for pose in cameras.c2w],
            "fovy": [round(float(x), 7) for x in cameras.fovy],
            "azimuth_deg": [round(float(x), 4) for x in cameras.azimuth_deg],
            "elevation_deg": round(cameras.elevation_deg, 4),
            "distance": round(cameras.distance, 6),
        }
        yield Sample(meta, views)


def _words(asset: AssetPlan, number: int, item) -> dict:
    entry = asset.entry
    return {
        "key": f"{entry.id}-o{number}",
        "id": entry.id,
        "split": asset.split,
        "caption": item.caption,
        "variants": list(item.variants),
        "colours": list(item.colors),
        "painted": bool(item.paint),
        "name": entry.name,
        "noun": entry.noun,
        "kind": entry.kind or captions.head_noun(entry.noun),
        "has_front": entry.has_front,
        "category": entry.category,
        "tags": list(entry.tags),
        "creator": entry.creator,
        "library": entry.library,
        "licence": entry.licence,
    }


def _begin(kind: str) -> None:
    global _renderer
    _renderer = make_renderer(kind)
    if _renderer.name == "numpy":
        import torch

        # The processes share the cores already: with a thread for each core in every process they wait for each other.
        torch.set_num_threads(1)
