"""From entries to shards on disk: survey, plan, draw; in several processes, resumable at every finished shard."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvdream_fast.data.assets import MeshError
from mvdream_fast.data.catalogue import Entry
from mvdream_fast.data.orbits import PRESETS, orbit
from mvdream_fast.data.plan import AssetPlan
from mvdream_fast.data.shards import Sample, columns_for, write_shard
from mvdream_fast.data.survey import Survey, survey

SAMPLES = 4  # a side, per pixel, up to 128 px; 2 above

_renderer = None


def make_renderer(kind: str = "auto"):
    """ "gl" through EGL, "numpy" without OpenGL; "auto" takes the first that works. One per process."""
    os.environ.setdefault("LP_NUM_THREADS", "0")  # llvmpipe's own threads would fight with our processes
    from mvdream_fast.data.render_gl import GLRenderer

    return GLRenderer()


def _process_renderer(kind: str):
    global _renderer
    if _renderer is None:
        _renderer = make_renderer(kind)
    return _renderer


def survey_entry(entry: Entry, kind: str) -> Survey | str:
    """The survey of an entry, or the sentence that says why its mesh is bad."""
    try:
        return survey(entry.load().normalised(), _process_renderer(kind))
    except MeshError as error:
        return str(error)


@dataclass(frozen=True)
class Job:
    """One shard: its file and its assets."""

    path: Path
    assets: tuple[AssetPlan, ...]
    preset: str
    size: int
    renderer: str


def draw_shard(job: Job) -> int:
    """Renders and writes one shard; returns its number of views. Raises OutputError."""
    samples = [sample for asset in job.assets for sample in draw_asset(asset, job)]
    write_shard(job.path, samples)
    return sum(len(sample.views) for sample in samples)


def draw_asset(asset: AssetPlan, job: Job) -> Iterator[Sample]:
    """All orbits of one asset as samples."""
    preset = PRESETS[job.preset]
    renderer = _process_renderer(job.renderer)
    mesh = asset.entry.load().normalised(preset.fit)
    for number, item in enumerate(asset.orbits):
        cameras = orbit(preset, np.asarray(item.camera))
        paint = [i for i in item.paint if mesh.parts[i].opacity >= 0.6]
        drawn = mesh.recoloured(paint, item.target) if paint else mesh
        views = renderer.render(drawn, cameras.c2w, cameras.fovy, job.size, SAMPLES if job.size <= 128 else 2)
        meta = _meta(asset, number, item) | {
            "size": job.size,
            "columns": columns_for(preset.n_views, job.size),
            "c2w": [[round(float(x), 7) for x in pose.reshape(-1)] for pose in cameras.c2w],
            "fovy": [round(float(x), 7) for x in cameras.fovy],
            "azimuth_deg": [round(float(x), 4) for x in cameras.azimuth_deg],
            "elevation_deg": cameras.elevation_deg,
            "distance": cameras.distance,
        }
        yield Sample(meta, views)


def _meta(asset: AssetPlan, number: int, item) -> dict:
    entry = asset.entry
    return {
        "key": f"{entry.id}-o{number}",
        "id": entry.id,
        "split": asset.split,
        "caption": item.caption,
        "variants": list(item.variants),
        "colours": list(item.colours),
        "painted": bool(item.paint),
        "name": entry.name,
        "category": entry.category,
        "tags": list(entry.tags),
        "creator": entry.creator,
        "library": entry.library,
        "licence": entry.licence,
    }
