"""The seams: the loop drives any representation and any guidance, shown with one of each that fits on a screen."""

import numpy as np
import pytest
import torch

from mvdream_fast.camera import orbit_cameras
from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import ModelError
from mvdream_fast.distill.config import NEWER, replaced
from mvdream_fast.distill.systems import mini
from mvdream_fast.scene.base import Rendered
from mvdream_fast.scene.mesh.mesh import Mesh
from mvdream_fast.text_to_3d import TextTo3D

SMALL = replaced(mini(), steps=30, render_size=(8,))


class Fog:
    """A representation: the whole space has one colour and one opacity, before black."""

    radius, device = 1.0, torch.device("cpu")

    def __init__(self):
        self.color, self.logit = (torch.nn.Parameter(torch.zeros(n)) for n in (3, 1))
        self.steps_seen = []

    def to(self, device):
        return self

    def render(self, rays, stream=None, training=False, lighting=None):
        opacity = torch.sigmoid(self.logit).expand(len(rays.rays_o))
        return Rendered(opacity[:, None] * torch.sigmoid(self.color), opacity, torch.ones_like(opacity))

    def parameter_groups(self):
        return [{"params": [self.color, self.logit], "lr": 0.1}]

    def regularizers(self, rendered, rays, step):
        return 0 * rendered.opacity.sum()

    def after_step(self, step, stream):
        self.steps_seen.append(step)

    def statistics(self):
        return {"thickness": torch.sigmoid(self.logit).item()}

    def restart(self, seed):
        self.color.data.zero_()

    usual_texture, usual_faces = None, 0

    def save_memory(self, n_rays): ...

    def mesh(self, resolution=128, max_faces=None, texture=None):
        corners = np.eye(3, dtype=np.float32)
        return Mesh(corners, np.array([[0, 1, 2]], np.int32), np.tile(self.color.detach().sigmoid().numpy(), (3, 1)))

    def state(self):
        return {"color": self.color.data, "logit": self.logit.data}

    def restore(self, tensors):
        self.color.data, self.logit.data = tensors["color"].clone(), tensors["logit"].clone()


class Green:
    """A guidance: every pixel should be green, seen from four sides; it counts its steps."""

    def __init__(self):
        self.n_done = 0

    def views(self, step, stream):
        return orbit_cameras(4, azimuth_start_deg=90 * stream.uniform(1).item())

    def score(self, rgb, views, step, stream, timing=lambda _: None):
        assert len(rgb) == len(views)
        return (rgb - torch.tensor([0.0, 1.0, 0.0])[:, None, None]).square().mean(), 0

    def after_step(self, step, stream):
        self.n_done += 1

    def state(self):
        return {"n_done": torch.tensor(self.n_done)}

    def restore(self, tensors):
        self.n_done = int(tensors["n_done"])


def test_a_run_without_a_pipeline_has_nothing_to_release():
    asset = TextTo3D(None, keep=False, guidance=Green())("fog", config=replaced(SMALL, steps=2), representation=Fog())
    assert [record["step"] for record in asset.records] == [0, 1]


def test_the_loop_knows_only_the_two_protocols(tmp_path):
    fog, green, records = Fog(), Green(), []
    asset = TextTo3D(None, guidance=green)(
        "fog", config=SMALL, representation=fog, callback=lambda progress: records.append(progress.record)
    )
    assert records[-1].loss < 0.5 * records[0].loss
    assert asset.render(size=4).rgb[:, 1].mean() > 2 * asset.render(size=4).rgb[:, 0].mean()
    assert fog.steps_seen == list(range(30))
    assert green.n_done == 30
    assert set(asset.records[-1]) >= {"step", "loss", "opacity", "thickness"}
    assert asset.save_glb(tmp_path / "fog.glb").colors[0, 1] > 0.5
    assert (tmp_path / "fog.glb").stat().st_size > 100


def test_a_run_of_theirs_is_resumed_to_the_byte(tmp_path):
    whole = TextTo3D(None, guidance=Green())("fog", config=SMALL, representation=Fog()).state()

    class Stop:
        requested, exit_code = None, 130

    stop = Stop()

    def callback(progress):
        stop.requested = 2 if progress.record.step + 1 == 12 else None

    TextTo3D(None, guidance=Green())(
        "fog", config=SMALL, representation=Fog(), checkpoints=tmp_path, callback=callback, interrupt=stop
    )
    green, fog = Green(), Fog()
    resumed = TextTo3D(None, guidance=green)("fog", config=SMALL, representation=fog, checkpoints=tmp_path).state()
    assert green.n_done == 30
    assert fog.steps_seen == list(range(12, 30))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(ModelError, match="another configuration or seed"):
        TextTo3D(None, guidance=Green())("fog", config=SMALL, seed=1, representation=Fog(), checkpoints=tmp_path)


def test_a_checkpoint_of_an_older_version_is_resumed(tmp_path):
    """What it says of its run lacks the settings that came later."""
    config = replaced(SMALL, steps=4)
    TextTo3D(None, guidance=Green())("fog", config=config, representation=Fog(), checkpoints=tmp_path)
    step, tensors, about = run_folder.load_latest(tmp_path)
    older = {name: value for name, value in about["config"].items() if name not in NEWER}
    assert len(older) < len(about["config"])
    run_folder.save_checkpoint(tmp_path, step, tensors, about | {"config": older})
    green = Green()
    TextTo3D(None, guidance=green)("fog", config=config, representation=Fog(), checkpoints=tmp_path)
    assert green.n_done == 4
    changed = replaced(config, guidance_scale=3.0)
    with pytest.raises(ModelError, match="another configuration or seed"):
        TextTo3D(None, guidance=Green())("fog", config=changed, representation=Fog(), checkpoints=tmp_path)
