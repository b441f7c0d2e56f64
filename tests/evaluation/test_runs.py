"""What is measured of a run folder without our evaluator: a ball whose renders, views and mesh are known."""

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from test_independent import MeanColor

from mvdream_fast.camera import generate_rays
from mvdream_fast.core.errors import InputFileError
from mvdream_fast.core.images import to_image
from mvdream_fast.evaluation import runs
from mvdream_fast.evaluation.independent import RealSeen, distances
from mvdream_fast.scene.asset import RenderedViews
from mvdream_fast.scene.mesh.export import save_mesh
from mvdream_fast.scene.mesh.mesh import Mesh

COLOR = torch.tensor([0.8, 0.2, 0.0])
RADIUS = 0.6


class Ball:
    """An asset that is a flat-coloured ball of one opacity, on grey."""

    def __init__(self, opacity=1.0):
        self.opacity = opacity

    def render(self, cameras, size):
        rays = generate_rays(cameras, size, size)
        nearest = torch.linalg.cross(rays.rays_o, rays.rays_d).norm(dim=-1)
        opacity = (nearest < RADIUS).float().view(len(cameras), size, size) * self.opacity
        rgb = opacity[:, None] * COLOR[:, None, None] + (1 - opacity[:, None]) * 0.5
        return RenderedViews(rgb, opacity, opacity)


def write_mesh(path, radius=RADIUS, color=COLOR):
    ball = trimesh.creation.icosphere(4, radius)
    colors = color.numpy()[None].repeat(len(ball.vertices), 0)
    save_mesh(Mesh(ball.vertices.astype(np.float32), ball.faces.astype(np.int32), colors), path)


def sheet(views):
    """Four images side by side."""
    return to_image(torch.cat(list(views), dim=-1))


def test_views_come_back_in_order(tmp_path):
    views = torch.zeros(4, 3, 8, 8)
    for k in range(4):
        views[k, k % 3, k] = 1.0
    sheet(views).save(tmp_path / "views.png")
    assert torch.equal(runs.read_views(tmp_path / "views.png"), views)
    assert runs.read_views(tmp_path / "none.png") is None


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"no image", "cannot be read"), ((24, 8), "four square views side by side, got 24 x 8"), ((64, 8), "got 64 x 8")],
)
def test_views_that_are_none(tmp_path, content, text):
    path = tmp_path / "views.png"
    path.write_bytes(content) if isinstance(content, bytes) else Image.new("RGB", content).save(path)
    with pytest.raises(InputFileError, match=text):
        runs.read_views(path)


def test_a_mesh_beside_its_volume(tmp_path):
    path = tmp_path / "mesh.glb"
    assert runs.mesh_against_volume(path, Ball()) == {"mesh_psnr": None, "mesh_overlap": None}
    write_mesh(path)
    same = runs.mesh_against_volume(path, Ball())
    assert same["mesh_overlap"] > 0.98
    assert same["mesh_psnr"] > 45  # colours are rounded to bytes
    fog = runs.mesh_against_volume(path, Ball(0.75))
    difference = 0.25 * (COLOR - 0.5)
    assert fog["mesh_psnr"] == pytest.approx(-10 * torch.log10(difference.square().mean()).item(), abs=0.2)
    write_mesh(path, RADIUS / 2)
    small = runs.mesh_against_volume(path, Ball())
    # A ball seen from 3 units away: the disc's radius is r / sqrt(9 - r^2).
    expected = (9 / RADIUS**2 - 1) / (36 / RADIUS**2 - 1)
    assert small["mesh_overlap"] == pytest.approx(expected, abs=0.01)
    path.write_bytes(b"glTF")
    with pytest.raises(InputFileError, match=r"mesh\.glb"):
        runs.mesh_against_volume(path, Ball())


def test_the_figures_of_a_folder(tmp_path):
    ball, real = Ball(), RealSeen(torch.zeros(2, 2, 4, 3))
    shown = ball.render(runs.orbit(4), 32).rgb
    sheet(shown).save(tmp_path / "views.png")
    figures, seen = runs.figures(tmp_path, ball, "a red teapot", MeanColor(), real)
    assert figures["size"] == 32
    assert figures["fog"] == 0
    assert figures["sharpness"] == pytest.approx(1, abs=0.02)  # views.png has bytes
    assert figures["named"] == figures["views_named"] == 1
    assert figures["agreement"] == pytest.approx(1, abs=1e-4)
    assert seen.asset.shape == seen.sampled.shape == (4, 3)
    foggy, _ = runs.figures(tmp_path, Ball(0.5), "a red tulip", MeanColor(), real)
    assert foggy["fog"] == 1
    assert foggy["sharpness"] == pytest.approx(0.5, abs=0.02)
    assert foggy["named"] is None


def test_a_folder_of_little_and_no_classifier(tmp_path):
    figures, seen = runs.figures(tmp_path, Ball(), "a red teapot", None, None)
    absent = {name for name, value in figures.items() if value is None}
    expected = {"views_gradient", "sharpness", "mesh_psnr", "mesh_overlap", "named", "views_named", "agreement"}
    assert absent == expected
    assert figures["size"] == 64
    assert seen == (None, None)
    assert runs.compared([seen], RealSeen(torch.zeros(2, 2, 4, 3))) == {}


def test_all_runs_are_compared_at_once():
    """Beside as many views of real renders; a run without views counts among the assets alone."""
    torch.manual_seed(0)
    a, b, c, features = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 5), torch.randn(6, 2, 4, 5)
    real = RealSeen(features)
    found = runs.compared([runs.Seen(a, b), runs.Seen(c, None)], real)
    assert found["assets"] == distances(torch.cat([a, c]), real.rest)
    assert found["sampled views"] == distances(b, real.rest)
    assert found["real renders"] == distances(features[:2, 0].flatten(0, 1), real.rest)
