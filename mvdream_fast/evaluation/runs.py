"""A finished run without our evaluator: its asset's fog and sharpness, its sampled views, its mesh beside its volume.

What a classifier sees of them is independent.py's; the turntable that the evaluator judges is judging.py's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, orbit_cameras
from mvdream_fast.core.errors import InputFileError
from mvdream_fast.evaluation import measures as ev
from mvdream_fast.evaluation.classifier import Classifier
from mvdream_fast.evaluation.independent import FOG_SIZE, SEEN_SIZE, Looked, RealSeen, distances, look
from mvdream_fast.evaluation.reference import DISTANCE, ELEVATION_DEG, FOUR_DEG, FOVY_DEG
from mvdream_fast.rendering.mesh_file import load_mesh
from mvdream_fast.rendering.software import NumpyRenderer
from mvdream_fast.scene.asset import Asset

FOG_VIEWS = 8
MESH_SIZE = 128
VIEWS, MESH = "views.png", "mesh.glb"


class Seen(NamedTuple):
    """Classifier features [4, F] of an asset's renders and of the views sampled for it; None for what there is not."""

    asset: Tensor | None
    sampled: Tensor | None


def orbit(n_views: int) -> Cameras:
    """Where the pipeline's views stand, or more of them: evenly around, the first in front."""
    return orbit_cameras(n_views, ELEVATION_DEG, 0.0, 360.0, DISTANCE, FOVY_DEG)


def figures(
    folder: Path, asset: Asset, prompt: str, classifier: Classifier | None, real: RealSeen | None
) -> tuple[dict[str, Any], Seen]:
    """What can be measured of a run folder; None for what can't. Asset and sampled views are seen from the same sides.

    Raises: InputFileError if views.png or mesh.glb is damaged.
    """
    sampled = read_views(folder / VIEWS)
    size = SEEN_SIZE if sampled is None else sampled.shape[-1]
    shown = asset.render(orbit(len(FOUR_DEG)), size).rgb.clamp(0, 1).cpu()
    gradient, of_views = ev.mean_gradient(shown), None if sampled is None else ev.mean_gradient(sampled)
    out = {
        "size": size,
        "fog": ev.fog(asset.render(orbit(FOG_VIEWS), FOG_SIZE).opacity),
        "gradient": gradient,
        "views_gradient": of_views,
        "sharpness": gradient / of_views if of_views else None,
        **mesh_against_volume(folder / MESH, asset),
    }
    mine, theirs = (_look(classifier, views, prompt) for views in (shown, sampled))
    out["named"], out["views_named"] = (x and x.named[0] for x in (mine, theirs))
    out["agreement"] = None
    if mine is not None and theirs is not None and real is not None:
        out["agreement"] = ev.agreement(mine.features[0], theirs.features[0], real.rest.mean(0))
    return out, Seen(*(x and x.features[0] for x in (mine, theirs)))


def _look(classifier: Classifier | None, views: Tensor | None, prompt: str) -> Looked | None:
    return None if classifier is None or views is None else look(classifier, views[None], [prompt])


def read_views(path: Path) -> Tensor | None:
    """The four views that a run sampled first, [4, 3, s, s] in [0, 1]; None where there is no such file.

    Raises: InputFileError for another image, or none.
    """
    from PIL import Image

    if not path.exists():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).float() / 255
    except (OSError, ValueError, SyntaxError) as error:
        raise InputFileError(f"{path} cannot be read ({error}); remove it, and its figures are left out") from None
    height, width = pixels.shape[:2]
    if width != len(FOUR_DEG) * height:
        raise InputFileError(f"{path} must be four square views side by side, got {width} x {height}; remove it")
    return pixels.permute(2, 0, 1).unflatten(2, (len(FOUR_DEG), height)).permute(2, 0, 1, 3)


def mesh_against_volume(path: Path, asset: Asset) -> dict[str, float | None]:
    """How alike a mesh file and the volume that it was taken from look, from four sides.

    mesh_overlap compares the silhouettes, mesh_psnr the unlit colours where both are: there the volume's background,
    which a mesh has not, counts only as far as the volume is fog. None for both where there is no mesh.
    Raises: InputFileError if it is damaged.
    """
    if not path.exists():
        return {"mesh_psnr": None, "mesh_overlap": None}
    cameras = orbit(len(FOUR_DEG))
    # One sample a pixel, through its middle, as the volume's rays go.
    drawn = NumpyRenderer().render(load_mesh(path), cameras.c2w.numpy(), cameras.fovy.numpy(), MESH_SIZE, 1, lit=False)
    volume, pixels = asset.render(cameras, MESH_SIZE), torch.from_numpy(drawn).float() / 255
    solid, covered = volume.opacity.cpu() > 0.5, pixels[..., 3] > 0.5
    rgb, colors = volume.rgb.clamp(0, 1).cpu(), pixels[..., :3].permute(0, 3, 1, 2)
    return {"mesh_psnr": ev.psnr(rgb, colors, solid & covered), "mesh_overlap": ev.overlap(solid, covered)}


def compared(seen: Sequence[Seen], real: RealSeen) -> dict[str, dict[str, float]]:
    """Distances to real renders of all assets' renders, of all views, and of as many other real renders."""
    assets, sampled = ([x for x in some if x is not None] for some in zip(*seen))
    named = {"assets": assets, "sampled views": sampled}
    out = {name: distances(torch.cat(features), real.rest) for name, features in named.items() if features}
    return out | ({"real renders": real.distances(len(FOUR_DEG) * len(assets))} if assets else {})
