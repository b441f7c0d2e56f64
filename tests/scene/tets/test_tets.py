"""Tetrahedra as what is optimised: outlines pull them, runs resume to the byte, their mesh is the one that is shown."""

import math

import pytest
import torch

from mvdream_fast.camera import Cameras, evaluation_cameras, generate_rays, orbit_cameras
from mvdream_fast.core.errors import DivergedError, ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.distill.config import replaced
from mvdream_fast.distill.run_memory import FLAGS
from mvdream_fast.distill.systems import mini
from mvdream_fast.guidance.base import Stateless, no_timing
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.base import Lighting, Rendered
from mvdream_fast.scene.kinds import new_representation
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.shading import Shading
from mvdream_fast.scene.tets.config import TetsConfig, TexturedMeshConfig
from mvdream_fast.scene.tets.tets import Tets
from mvdream_fast.text_to_3d import TextTo3D

NO_WEIGHT = (0.0, 0.0, 0.0, 0.0)
SMALL = TetsConfig(
    volume="mini", background="grey", tets_resolution=32, lambda_normal_consistency=NO_WEIGHT, lr_mlp=0.01
)


def torus(points):
    return torch.hypot(points[:, :2].norm(dim=1) - 0.5, points[:, 2]) - 0.2


def iou(a, b):
    a, b = a > 0.5, b > 0.5
    return ((a & b).sum() / (a | b).sum()).item()


def trained(tets, rays, goal, steps, rate=0.01):
    optimizer = torch.optim.Adam([{"params": [tets.sdf, tets.deformation], "lr": rate}])
    for step in range(steps):
        rendered = tets.render(rays, Stream(0, step, "render"), True)
        loss = (rendered.opacity - goal).square().mean() + tets.regularizers(rendered, rays, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("shape", "start", "after"),
    [(torus, 0.5, 0.8), (lambda p: (p - torch.tensor([0.1, 0.1, 0.0])).norm(dim=1) - 0.6, 0.7, 0.92)],
)
def test_silhouettes_pull_a_wrong_sphere_to_them(shape, start, after):
    config = TetsConfig(
        volume="mini", background="grey", tets_resolution=32, sphere_radius=0.45,
        lambda_normal_consistency=(0.0, 1e-3, 1e-3, 0.0), lambda_laplacian=(0.0, 1e-3, 1e-3, 0.0),
    )  # fmt: skip
    rays = generate_rays(orbit_cameras(4, elevation_deg=40.0), 64, 64)
    goal = Tets.from_sdf(config, shape).render(rays).opacity
    tets = Tets(config)
    assert iou(tets.render(rays).opacity, goal) < start
    trained(tets, rays, goal, 50)
    assert iou(tets.render(rays).opacity, goal) > after
    assert tets.statistics()["n_open_edges"]() == 0


def test_a_fresh_one_is_a_sphere_before_its_background():
    tets = Tets(SMALL)
    out = tets.render(generate_rays(evaluation_cameras(1), 32, 32))
    assert out.rgb[0].tolist() == [0.5] * 3
    assert out.opacity.sum().item() == pytest.approx(173.5, rel=0.03)  # pi (16 tan(asin(0.5 / 3)) / tan(20 deg))^2
    assert not out.rgb.requires_grad
    vertices = torch.from_numpy(tets.mesh().vertices)
    assert (vertices.norm(dim=1) - 0.5).abs().max() < 0.005


def turned(degrees):
    a = math.radians(degrees)
    return torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])


@pytest.mark.parametrize(("degrees", "most"), [(90, 1e-3), (33, 0.02)])
def test_turning_shape_and_cameras_changes_nothing(degrees, most):
    """To a quarter turn the lattice answers with itself, but for the quadrilaterals' diagonals."""
    turn = turned(degrees)

    def egg(points):
        return (points * torch.tensor([1.0, 1.6, 2.2])).norm(dim=1) - 0.7 + 0.2 * points[:, 0]

    cameras = orbit_cameras(3, 20.0)
    c2w = cameras.c2w.clone()
    c2w[:, :3] = turn @ c2w[:, :3]
    config = TetsConfig(volume="mini", background="grey", tets_resolution=64, shows="normals")
    images = []
    for sdf, views in ((egg, cameras), (lambda p: egg(p @ turn), Cameras(c2w, cameras.fovy))):
        out = Tets.from_sdf(config, sdf).render(generate_rays(views, 48, 48))
        images.append((out.opacity, out.depth, out.rgb))
    (opacity, depth, rgb), (opacity_2, depth_2, rgb_2) = images
    assert (opacity - opacity_2).abs().mean() < most
    assert (depth - depth_2).abs().mean() < 3 * most
    solid = (opacity == 1) & (opacity_2 == 1)
    assert ((2 * rgb[solid] - 1) @ turn.T - (2 * rgb_2[solid] - 1)).abs().mean() < 10 * most


def test_normals_are_shown_as_colours_before_black():
    config = TetsConfig(volume="mini", tets_resolution=32, shows="normals")
    out = Tets(config).render(generate_rays(evaluation_cameras(1, 0.0), 33, 33))
    middle = out.rgb.view(33, 33, 3)[16, 16]
    torch.testing.assert_close(middle, torch.tensor([0.5, 0.0, 0.5]), atol=0.05, rtol=0)  # towards -y
    assert out.rgb[0].tolist() == [0.0] * 3


def test_normals_are_not_lit():
    tets = Tets(TetsConfig(volume="mini", tets_resolution=32, shows="normals"))
    rays = generate_rays(evaluation_cameras(1, 0.0), 9, 9)
    light = Lighting(Shading(0.9, 0.1, textureless=True), rays.rays_o)
    lit, plain = (tets.render(rays, Stream(0, 0, "render"), True, lighting).rgb for lighting in (light, None))
    assert torch.equal(lit, plain)


def test_losses_have_their_weights():
    rays = generate_rays(evaluation_cameras(1), 16, 16)
    values = {}
    for name in ("lambda_normal_consistency", "lambda_laplacian"):
        for weight in (0.0, 1.0, 3.0):
            ramps = {"lambda_normal_consistency": NO_WEIGHT} | {name: (5.0, 0.0, weight, 5.0)}
            tets = Tets(TetsConfig(volume="mini", background="grey", tets_resolution=32, **ramps))
            rendered = tets.render(rays, Stream(0, 0, "render"), True)
            assert tets.regularizers(rendered, rays, 4) == 0
            values[name, weight] = tets.regularizers(rendered, rays, 5).item()
        assert values[name, 0.0] == 0
        assert values[name, 3.0] == pytest.approx(3 * values[name, 1.0])
        assert values[name, 1.0] > 0
    with pytest.raises(TypeError, match="must be a render of this mesh"):
        tets.regularizers(Rendered(*[torch.zeros(1)] * 3), rays, 0)


def test_every_parameter_is_in_one_group_and_learns():
    config = TetsConfig(volume="mini", background="learned", background_aug_prob=0.0, tets_resolution=32)
    tets = new_representation(config)
    groups = tets.parameter_groups()
    listed = [p for group in groups for p in group["params"]]
    assert {*map(id, listed)} == {id(p) for p in tets.parameters() if p.requires_grad}
    rays = generate_rays(evaluation_cameras(2), 32, 32)
    out = tets.render(rays, Stream(0, 0, "render"), True)
    (out.rgb.square().sum() + out.depth.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in listed)


class Outlines(Stateless):
    """A guidance: the renders' mean should be dark, from drawn cameras."""

    def views(self, step, stream):
        return orbit_cameras(2, azimuth_start_deg=360 * stream.uniform(1).item())

    def score(self, rgb, views, step, stream, timing=no_timing):
        return rgb.square().mean() + 0 * stream.normal(1).sum(), 0


def test_a_run_is_resumed_to_the_byte(tmp_path):
    config = replaced(mini(), steps=8, render_size=(16,))

    class Stop:
        requested, exit_code = None, 130

    stop = Stop()

    def callback(progress):
        stop.requested = 2 if progress.record.step + 1 == 3 else None

    def run(**options):
        return TextTo3D(None, guidance=Outlines())("x", config=config, representation=Tets(SMALL), **options)

    whole = run().state()
    run(checkpoints=tmp_path, callback=callback, interrupt=stop)
    resumed = run(checkpoints=tmp_path)
    assert [record["step"] for record in resumed.records] == [*range(3, 8)]
    assert all(torch.equal(whole[name], value) for name, value in resumed.state().items())
    assert not torch.equal(whole["sdf"], Tets(SMALL).sdf)
    assert set(resumed.records[-1]) >= {"n_faces", "n_vertices", "n_open_edges"}


def test_an_asset_is_saved_and_loaded(tmp_path):
    tets = Tets.from_sdf(SMALL, torus)
    settings = {"shape": "tets", "volume": "mini", "background": "grey", "tets_resolution": 32, "steps": 8}
    Asset(tets, "a ring", 3, settings).save(tmp_path / "asset.safetensors")
    loaded = Asset.load(tmp_path / "asset.safetensors")
    assert torch.equal(loaded.render(size=24).rgb, Asset(tets).render(size=24).rgb)
    mesh = loaded.save_glb(tmp_path / "ring.glb", texture=64)
    assert mesh.texture is not None
    assert (tmp_path / "ring.glb").stat().st_size > 1000


def test_the_mesh_is_the_one_that_is_rendered():
    tets = Tets.from_sdf(SMALL, torus)
    tets.render(generate_rays(evaluation_cameras(1), 8, 8))
    body, mesh = tets.body(), tets.mesh(resolution=8)
    assert torch.equal(torch.from_numpy(mesh.vertices), body.vertices.detach())
    assert torch.equal(torch.from_numpy(mesh.faces), body.faces)
    counted = {name: value() if callable(value) else value for name, value in tets.statistics().items()}
    assert counted == {"n_faces": len(mesh.faces), "n_vertices": len(mesh.vertices), "n_open_edges": 0}
    assert len(tets.mesh(max_faces=200).faces) <= 200


def test_an_optimised_mesh_of_many_triangles_is_exported_as_it_is():
    asset = Asset(Tets.from_sdf(TetsConfig(volume="mini", background="grey"), torus))
    mesh = asset.mesh()
    assert len(mesh.faces) > 30_000
    assert torch.equal(torch.from_numpy(mesh.faces), asset.representation.body().faces)
    assert len(asset.mesh(max_faces=30_000).faces) <= 30_000


def test_started_from_a_representation_it_shows_its_shape_and_colours():
    source = Tets.from_sdf(SMALL, torus, seed=5)
    finer = Tets.from_representation(TetsConfig(volume="mini", background="grey", tets_resolution=64), source)
    rays = generate_rays(evaluation_cameras(2), 48, 48)
    a, b = source.render(rays), finer.render(rays)
    assert iou(a.opacity, b.opacity) > 0.97
    solid = (a.opacity == 1) & (b.opacity == 1)
    assert (a.rgb - b.rgb)[solid].abs().mean() < 0.01
    assert (a.rgb - Tets.from_sdf(SMALL, torus, seed=6).render(rays).rgb)[solid].abs().max() > 0


def test_started_from_a_volume_it_has_its_silhouette():
    volume = new_representation(NerfConfig(volume="mini", background="grey", samples_per_ray=64))
    tets = Tets.from_representation(SMALL, volume)
    assert torch.equal(tets.volume.table, volume.volume.table)
    rays = generate_rays(evaluation_cameras(2), 48, 48)
    assert iou(tets.render(rays).opacity, volume.render(rays).opacity) > 0.9


def test_a_restart_is_a_fresh_sphere():
    tets = Tets.from_sdf(SMALL, torus, seed=1)
    tets.restart(2)
    fresh = new_representation(SMALL, 2).state()
    assert all(torch.equal(value, fresh[name]) for name, value in tets.state().items())


def test_what_is_no_state_of_it_is_refused():
    tets = Tets(SMALL)
    state = {name: value.clone() for name, value in tets.state().items()}
    with pytest.raises(ModelError, match=r"another configuration: sdf"):
        Tets(TetsConfig(volume="mini", background="grey", tets_resolution=64)).restore(
            {name: value for name, value in state.items() if name != "deformation"}
            | {"deformation": torch.zeros(68705, 3)}
        )
    state["sdf"][7] = math.nan
    with pytest.raises(ModelError, match="not finite in sdf"):
        tets.restore(state)


def test_distances_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="sdf must give finite numbers"):
        Tets.from_sdf(SMALL, lambda p: p[:, 0] / 0)


def test_nothing_inside_is_no_mesh():
    empty = Tets.from_sdf(SMALL, lambda p: 1 + 0 * p[:, 0])
    rays = generate_rays(evaluation_cameras(1), 8, 8)
    out = empty.render(rays, Stream(0, 0, "render"), True)
    assert not out.opacity.any()
    (out.rgb.sum() + empty.regularizers(out, rays, 0)).backward()
    with pytest.raises(DivergedError, match="no surface"):
        empty.mesh()


def test_memory_is_estimated_by_part():
    parts = TetsConfig(tets_resolution=128).memory(512 * 512)
    assert parts["the renderer's images"] > 4 * 5 * 512**2
    assert parts["the tetrahedra and their optimiser"] > 16 * 4 * 128**3 / 4
    assert sum(TetsConfig(volume="mini").memory(4 * 256**2).values()) < 1.5e9
    textured = TexturedMeshConfig(mesh_colors="texture").memory(512 * 512)
    assert textured["the texture and its optimiser"] > 4 * 4 * 3 * 1024**2
    assert {*parts, *textured} <= FLAGS.keys()  # what to do where one of them does not fit
