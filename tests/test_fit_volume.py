"""examples/fit_volume.py: what it measures, by shapes that are formulas; which meshes it takes; a whole run."""

import dataclasses
import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from mvdream_fast.rendering.mesh_file import load_mesh
from mvdream_fast.scene.mesh.mesh import Mesh

PATH = Path(__file__).parents[1] / "examples" / "fit_volume.py"


@pytest.fixture
def fit_volume(monkeypatch):
    spec = importlib.util.spec_from_file_location("fit_volume", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fit_volume", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "set_threads", lambda n: n)
    return module


def ball(radius, color=0.5):
    body = trimesh.creation.icosphere(4, radius)
    vertices = np.asarray(body.vertices, np.float32)
    return Mesh(vertices, np.asarray(body.faces, np.int32), np.full_like(vertices, color))


def write_box(path, sides=(0.6, 0.8, 1.0)):
    path.parent.mkdir(exist_ok=True)
    body = trimesh.creation.box(sides)
    body.visual = trimesh.visual.ColorVisuals(body, vertex_colors=np.full((8, 4), (200, 60, 40, 255), np.uint8))
    path.write_bytes(body.export(file_type="glb"))
    return path


def test_scores_of_balls_are_formulas(fit_volume, tmp_path):
    """Two balls around one centre are as far apart as their radii; their silhouettes are discs."""
    views = fit_volume.draw(load_mesh(write_box(tmp_path / "a.glb")).normalised("sphere"), 96)
    assert fit_volume.chamfer(ball(0.5), ball(0.6), views.cameras) == pytest.approx(0.1, abs=2e-3)
    covered = fit_volume.seen(ball(0.6), views.cameras, 96)[1].float()
    of_disc = fit_volume.Views(views.cameras, covered[..., None].expand(-1, -1, -1, 4))
    assert fit_volume.silhouette_iou(ball(0.6), of_disc) == 1
    distance = 1.02 / math.sin(math.radians(20))
    discs = [r**2 / (distance**2 - r**2) for r in (0.5, 0.6)]  # the squared tangents of the cones around them
    assert fit_volume.silhouette_iou(ball(0.5), of_disc) == pytest.approx(discs[0] / discs[1], rel=0.01)
    image = fit_volume.picture(ball(0.5, 0.25), views.some([0]))
    assert image.shape == (96, 96, 3)
    assert image[48, 48].tolist() == pytest.approx([0.25] * 3)
    assert image[0, 0].tolist() == [1, 1, 1]


def test_a_mesh_that_is_drawn_is_the_one_that_is_compared(fit_volume, tmp_path):
    target = load_mesh(write_box(tmp_path / "a.glb")).normalised("sphere")
    views = fit_volume.draw(target, 64)
    assert fit_volume.silhouette_iou(fit_volume.whole(target), views) > 0.97
    assert fit_volume.chamfer(fit_volume.whole(target), fit_volume.whole(target), views.cameras) < 1e-5


def test_the_first_of_each_noun_is_taken(fit_volume, tmp_path):
    for name in ("b/red-chair", "a/yellow-chair", "a/table", "a/armchair"):
        write_box(tmp_path / f"{name}.glb")
    rows = [
        "b/red-chair.glb,red chair,chair",
        "a/yellow-chair.glb,yellow chair,chair",
        "a/armchair.glb,armchair,armchair",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(["file,caption,noun", *rows, "a/table.glb,table,table"]))
    entries = fit_volume.read_folder(tmp_path)
    found = [fit_volume.first_of(entries, name).name for name in ("chair", "table", "red ch")]
    assert found == ["yellow chair", "table", "red chair"]
    with pytest.raises(SystemExit, match="no asset of the folder is named 'horse'"):
        fit_volume.first_of(entries, "horse")


def test_every_shape_is_fitted_scored_and_drawn_once(fit_volume, tmp_path, monkeypatch, capsys):
    small = {"MESH_RESOLUTION": 32, "LARGE": 48, "N_POINTS": 500, "SPACING": 0.1, "RAYS_PER_STEP": 512}
    for kind in ("VOLUME", "SURFACE"):
        small[kind] = dataclasses.replace(getattr(fit_volume, kind), max_samples=1 << 13)
    small["TETS"] = dataclasses.replace(fit_volume.TETS, tets_resolution=32)
    for name, value in small.items():
        monkeypatch.setattr(fit_volume, name, value)
    clock = itertools.count()  # a step takes a second
    monkeypatch.setattr(fit_volume.time, "process_time", lambda: next(clock))
    out = tmp_path / "out"
    box = write_box(tmp_path / "box.glb")
    monkeypatch.setattr(sys, "argv", ["fit_volume.py", str(box), "--seconds", "150", "--size", "24", "--out", str(out)])
    fit_volume.main()
    scores = json.loads((out / "fit.json").read_text())
    assert [score["kind"] for score in scores] == ["volume", "surface", "tets"]
    for score in scores:
        assert score["psnr"] > 12, score  # a white picture has 7
        assert score["iou"] > 0.7, score
        assert score["chamfer"] < 0.1, score
        assert 150 <= score["seconds"] < 160, score
        assert 140 <= score["steps"] <= 150, score
    with Image.open(out / "fit.png") as picture:
        assert picture.size == (24, 4 * 24)
    table = (out / "table.md").read_text().splitlines()
    assert len(table) == 2 + 3 + 3
    assert [line.split(" | ")[:2] for line in table[2:]] == [
        [f"| {name}", kind] for name in ("box", "mean of 1") for kind in ("volume", "surface", "tets")
    ]
    before = (out / "fit.json").read_bytes()
    capsys.readouterr()
    fit_volume.main()  # there is nothing left to do
    assert (out / "fit.json").read_bytes() == before
