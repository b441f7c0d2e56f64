"""From entries to shards on disk: survey, plan, draw; in several processes, resumable at every finished shard.

Everything is a function of the sources and the options; a second run of the same call finds its shards and goes on.
What was learned from a file, or drawn of it, is kept as long as the file and those that it names are the same.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mvdream_fast.core.errors import ArgumentError, OutOfMemoryError, OutputError
from mvdream_fast.core.files import atomic_write, remove_stale
from mvdream_fast.core.run_folder import locked
from mvdream_fast.data import captions
from mvdream_fast.data.shards import Sample, columns_for, write_shard
from mvdream_fast.rendering import sources
from mvdream_fast.rendering.catalogue import Entry
from mvdream_fast.rendering.mesh import MeshError
from mvdream_fast.rendering.orbits import PRESETS, orbit
from mvdream_fast.rendering.plan import SHARD_ASSETS, AssetPlan, Selection, plan, select
from mvdream_fast.rendering.survey import Survey, survey

SETTINGS, SURVEYS, DRAWN, SUMMARY = "render.json", "surveys.json", "drawn.json", "summary.json"
VERSION = 4  # of the images and captions: a folder begun by another version is not continued

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
) -> Result | None:
    """Renders `entries` into shards in `folder`; finished shards of the same options and files are kept as they are.

    `report(stage, done, total, views)` is called after every asset surveyed and every shard written. Once `stop()` is
    true the processes are ended and None is returned: the same call goes on from there.
    Raises: OutputError when the folder holds another data set or the disk is full: finished shards stay.
    """
    _claim(folder, entries, options, held_out)
    with contextlib.suppress(_Stopped), locked(folder), _pool(workers, options.renderer, stop) as pool:
        surveys, contents, bad = _surveys(entries, folder, pool, report)
        selection = select(entries, surveys)
        assets = plan(selection.kept, surveys, held_out, options.seed, options.n_plain, options.n_painted)
        jobs = make_jobs(assets, folder, options)
        plans = {job.path.name: _digest(job, contents) for job in jobs}
        drawn = _keep_drawn(folder, plans)
        missing = [job for job in jobs if job.path.name not in drawn]
        n_views = 0
        for done, (job, n) in enumerate(pool.map(draw_shard, missing), 1):
            n_views += n
            drawn[job.path.name] = plans[job.path.name]
            atomic_write(folder / DRAWN, json.dumps(drawn))
            report("views", len(jobs) - len(missing) + done, len(jobs), n_views)
        texts = {item.caption for asset in assets for item in asset.orbits}
        notes = {id_: look.notes for id_, look in surveys.items() if look.notes}
        return Result(selection, bad, notes, n_views, [job.path for job in jobs], texts)
    return None


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


def _claim(folder: Path, entries: list[Entry], options: Options, held_out: set[str]) -> None:
    """Makes the folder, or checks that what is in it was begun with the same settings."""
    settings = {
        "version": VERSION,
        **dataclasses.asdict(options),
        "held_out": sorted(held_out),
        "entries": [[e.id, e.caption] for e in entries],
    }
    settings = json.loads(json.dumps(settings))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = json.loads((folder / SETTINGS).read_bytes()) if (folder / SETTINGS).exists() else None
    except OSError as error:
        raise OutputError(f"{folder} cannot be used ({error.strerror}); name another with -o") from None
    except ValueError:
        found = {}
    if found is None and any(folder.glob("*.tar")):
        raise OutputError(f"{folder} holds shards of something else; name another folder with -o")
    if found is not None and found != settings:
        different = sorted(k for k in settings if found.get(k) != settings[k])
        raise OutputError(f"{folder} was begun with another {', '.join(different)}; name another folder with -o")
    remove_stale(folder)
    if found is None:
        atomic_write(folder / SETTINGS, json.dumps(settings))


def _surveys(entries, folder, pool, report) -> tuple[dict[str, Survey], dict[str, list], dict[str, str]]:
    """The survey of every readable entry, the hashes of its files, and the reason for every other entry.

    Surveys are stored beside the shards; only those of new or changed files are made, and refused files are read again.
    """
    stored = _read_json(folder / SURVEYS)
    known = {}
    for entry in entries:
        files = sources.unchanged(stored[entry.id]["files"]) if entry.id in stored else None
        if files is not None:
            known[entry.id] = stored[entry.id] | {"files": files}
    unknown, bad = [entry for entry in entries if entry.id not in known], {}
    try:
        for done, (entry, look) in enumerate(pool.map(survey_entry, unknown), 1):
            if isinstance(look, str):
                bad[entry.id] = look
            else:
                known[entry.id] = look
            report("assets", done, len(unknown), 0)
    finally:  # whoever is stopped goes on from here
        if known != stored:
            atomic_write(folder / SURVEYS, json.dumps(known))
    hashes = {k: [stamp and stamp[2] for stamp in record["files"].values()] for k, record in known.items()}
    return {k: Survey(**record["survey"]) for k, record in known.items()}, hashes, bad


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


def survey_entry(entry: Entry) -> dict | str:
    """The survey of an entry with the stamps of its files, or the sentence that says why its mesh is bad."""
    try:
        mesh = entry.load().normalised()
        files = sources.stamps([str(entry.archive.resolve()), *mesh.sources])
        return {"survey": dataclasses.asdict(survey(mesh, _renderer)), "files": files}
    except MeshError as error:
        return str(error)
    except MemoryError:
        return f"{entry.name}: reading the mesh takes more memory than there is"


def draw_shard(job: Job) -> int:
    """Renders and writes one shard; returns its number of views. Raises OutputError."""
    samples = [sample for asset in job.assets for sample in draw_asset(asset, job.options, _renderer)]
    write_shard(job.path, samples)
    return sum(len(sample.views) for sample in samples)


def draw_asset(asset: AssetPlan, options: Options, renderer) -> Iterator[Sample]:
    """All orbits of one asset as samples."""
    preset = PRESETS[options.preset]
    mesh = asset.entry.load().normalised(preset.fit)
    per_side = 4 if options.size <= 128 else 2
    for number, item in enumerate(asset.orbits):
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


class _Stopped(Exception):
    """Somebody asked for the end."""


class _pool:
    """Processes with a renderer each; results come in the order of completion, together with their argument."""

    def __init__(self, workers: int, kind: str, stop: Callable[[], object]):
        self.workers, self.kind, self.stop = max(1, workers), kind, stop

    def __enter__(self) -> "_pool":
        # Not forked: neither an OpenGL context nor torch's threads survive one.
        context = multiprocessing.get_context("spawn")
        self.executor = ProcessPoolExecutor(self.workers, context, initializer=_start, initargs=(self.kind,))
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            # An error or an interrupt: what is being drawn is not waited for.
            for process in list((getattr(self.executor, "_processes", None) or {}).values()):
                process.terminate()
        self.executor.shutdown(wait=kind is None, cancel_futures=True)

    def map(self, function: Callable, items: Iterable) -> Iterator[tuple]:
        """(item, function(item)) for every item; at most a few wait in the queue, so an error ends the rest soon."""
        rest, running = iter(items), {}
        try:
            while True:
                for item in itertools.islice(rest, 2 * self.workers + 1 - len(running)):
                    running[self.executor.submit(function, item)] = item
                if not running:
                    return
                for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
                if self.stop():
                    raise _Stopped
        except BrokenProcessPool:
            message = "a rendering process was killed, perhaps for its memory; run again with fewer --workers"
            raise OutOfMemoryError(message) from None


def _start(kind: str) -> None:
    global _renderer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _renderer = make_renderer(kind)
    if _renderer.name == "numpy":
        import torch

        # The processes share the cores already: with a thread for each core in every process they wait for each other.
        torch.set_num_threads(1)


def _leave_with_parent() -> None:
    """A parent that was killed cannot end its processes, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
