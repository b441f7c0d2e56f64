"""The surface as a representation: what a sphere looks like, its mesh, its losses and state, and runs that have one."""

import math
import signal

import numpy as np
import pytest
import torch
from reference.random_model import random_model
from reference.studio import TINY, Studio, same

from mvdream_fast.camera import Rays, evaluation_cameras, generate_rays
from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import ArgumentError, DivergedError, InputFileError, ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.distill.config import replaced, settings_of, typed
from mvdream_fast.distill.recipes import resolve_config
from mvdream_fast.distill.systems import mini
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.base import Lighting
from mvdream_fast.scene.kinds import config_from_dict, new_representation
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.shading import Shading
from mvdream_fast.scene.surface.config import SurfaceConfig
from mvdream_fast.scene.surface.surface import EIKONAL_ANYWHERE, EIKONAL_NODES, Surface
from mvdream_fast.text_to_3d import TextTo3D

SMALL = SurfaceConfig(volume="mini", background="grey", samples_per_ray=96, cos_anneal=(0.0, 1.0, 1.0, 0.0))
RUN = replaced(
    TINY, shape="surface", sdf_levels=(4.0, 4.0, 8.0, 8.0), cos_anneal=(0.0, 0.0, 1.0, 12.0),
    lambda_eikonal=(0.0, 0.1, 1.0, 6.0),
)  # fmt: skip


def sphere(sharpness=200.0, lit=False, **settings):
    """A fresh surface, opaque within about 1 / sharpness of its sphere of radius 0.5."""
    config = SurfaceConfig(**{**vars(SMALL), **settings})
    surface = Surface(config, normals=config.sdf_normals if lit else "none")
    surface.volume.deviation.data.fill_(math.log(sharpness) / 10)
    surface.after_step(0, Stream(0, 0, "occupancy"))
    return surface


def parallel_rays(offsets):
    """Rays along +y at these distances from the axis, from y = -2 on."""
    rays_o = torch.stack([torch.tensor(offsets), torch.full((len(offsets),), -2.0), torch.zeros(len(offsets))], -1)
    return Rays(rays_o, torch.tensor([[0.0, 1.0, 0.0]]).expand(len(offsets), 3).contiguous())


@pytest.mark.parametrize("kind", ["neus", "volsdf"])
@pytest.mark.parametrize("training", [False, True])
def test_a_sphere_hides_what_is_behind_it_and_nothing_else(kind, training):
    surface, rays = sphere(sdf_opacity=kind), parallel_rays([0.0, 0.2, 0.4, -0.3, 0.6, -0.55, 0.9])
    out = surface.render(rays, Stream(0, 0, "render") if training else None, training)
    torch.testing.assert_close(out.opacity[:4], torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.opacity[4:], torch.zeros(3), atol=1e-3, rtol=0)
    front = 2 - torch.tensor([0.5, math.sqrt(0.21), 0.3, 0.4])
    torch.testing.assert_close(out.depth[:4], front, atol=0.02, rtol=0)
    torch.testing.assert_close(out.rgb[4:], torch.full((3, 3), 0.5), atol=1e-3, rtol=0)
    assert out.rgb.requires_grad == training


def test_its_silhouette_is_no_wider_before_the_annealing_ends():
    # Rays that pass by just outside: a surface seen from its side is partly there early on, and not at the end.
    rays = parallel_rays([0.503, 0.505])
    early, late = (sphere(cos_anneal=(0.0, r, r, 0.0)).render(rays).opacity for r in (0.0, 1.0))
    assert bool((early > 0.9).all())
    assert bool((late < early - 0.3).all())


def test_the_occupied_cells_hold_the_whole_surface():
    # However thin: a random point of a cell hits a shell of a thousandth of it next to never, and is rarely as far as
    # half of a diagonal from what there is of it in the cell.
    surface = sphere(1e4)
    for step in range(0, 160, 16):
        surface.after_step(step, Stream(0, step, "occupancy"))
    x = torch.nn.functional.normalize(Stream(0, 0, "x").normal(20_000, 3), dim=-1) * 0.5
    cells = ((x / 2 + 0.5) * 32).long()
    assert bool(surface.occupancy.occupied[(cells[:, 0] * 32 + cells[:, 1]) * 32 + cells[:, 2]].all())
    middle = 16 * (32 * 32 + 32 + 1)
    assert not surface.occupancy.occupied[middle]  # so deep that no ray comes there
    assert not surface.occupancy.occupied[0]
    assert surface.occupancy.fraction < 0.25


def test_gradients_reach_everything_that_is_learned():
    surface = sphere(30.0, background="learned", background_aug_prob=0.0)
    surface.volume.density_weights[-1].data.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    rays = generate_rays(evaluation_cameras(1), 12, 12)
    out = surface.render(rays, Stream(0, 1, "render"), True)
    (out.rgb.square().sum() + out.opacity.sum() + surface.regularizers(out, rays, 1)).backward()
    grouped = [p for group in surface.parameter_groups() for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in surface.parameters()}
    assert len(grouped) == len({id(p) for p in grouped})
    for name, parameter in surface.named_parameters():
        assert parameter.grad is not None, name
        assert 0 < parameter.grad.abs().max() < math.inf, name


def test_the_deviations_gradient_is_a_finite_difference():
    surface, rays = sphere(20.0), parallel_rays([0.1, 0.45, 0.5])
    surface.alpha_thre = surface.early_stop_eps = 0.0

    def opacity(v):
        surface.volume.deviation.data.fill_(v)
        return surface.render(rays, Stream(0, 0, "render"), True).depth.double().sum()

    opacity(0.3).backward()
    slope = (opacity(0.301) - opacity(0.299)).item() / 0.002
    assert surface.volume.deviation.grad.item() == pytest.approx(slope, rel=1e-3)


def test_nothing_in_sight_is_background_with_zero_gradients():
    surface, rays = sphere(), parallel_rays([0.9, -0.8])
    surface.occupancy.bits.zero_()
    for training in (False, True):
        out = surface.render(rays, Stream(0, 0, "render"), training)
        assert out.n_samples == 0
        torch.testing.assert_close(out.rgb, torch.full((2, 3), 0.5))
    (out.rgb.sum() + out.z_variance.sum() + surface.regularizers(out, rays, 0)).backward()
    assert out.points.shape == (EIKONAL_ANYWHERE, 3)
    assert surface.volume.deviation.grad.abs().max() == 0
    assert surface.render(Rays(torch.zeros(0, 3), torch.zeros(0, 3))).rgb.shape == (0, 3)


def test_the_deviation_stays_below_its_bound():
    """A ramp of v from 0.2 to 0.4: half-way exp(-3). What is narrower by itself stays so."""
    surface, unbounded = sphere(deviation_least=(0.0, 0.2, 0.4, 10.0)), sphere()
    v = surface.volume.deviation
    for step, before, after in ((0, 0.1, 0.2), (5, 0.2, 0.3), (10, 0.3, 0.4), (20, 0.7, 0.7)):
        v.data.fill_(before)
        surface.after_step(step, Stream(0, step, "after"))
        assert v.item() == pytest.approx(after)
    unbounded.volume.deviation.data.fill_(-0.9)
    unbounded.after_step(0, Stream(0, 0, "after"))
    assert unbounded.volume.deviation.item() == pytest.approx(-0.9)


def test_the_eikonal_loss_is_looked_at_on_rays_and_in_the_whole_box():
    surface, rays = sphere(lambda_eikonal=(0.0, 2.0, 4.0, 10.0)), generate_rays(evaluation_cameras(1), 12, 12)
    out = surface.render(rays, Stream(0, 1, "render"), True)
    on_rays, anywhere = out.points.split([EIKONAL_NODES, EIKONAL_ANYWHERE])
    assert bool((on_rays[:, None] == out.positions[None]).all(-1).any(-1).all())
    assert anywhere.abs().max() > 0.99
    slopes = surface.volume.gradients(out.points).norm(dim=-1)
    wanted = 3 * (slopes - 1).square().mean()
    torch.testing.assert_close(surface.regularizers(out, rays, 5), wanted)
    numbers = {name: x() if callable(x) else x for name, x in surface.statistics().items()}
    assert numbers["slope"] == pytest.approx(slopes.mean().item(), rel=1e-6)
    assert numbers["deviation"] == pytest.approx(1 / 200, rel=1e-5)
    assert numbers["levels"] == 8
    with pytest.raises(TypeError, match="rendered must be a training render"):
        surface.regularizers(surface.render(rays), rays, 5)


@pytest.mark.parametrize("normals", ["finite_difference", "analytic"])
def test_light_from_the_front(normals):
    surface, rays = sphere(lit=True, sdf_normals=normals), parallel_rays([0.0, 0.3, 0.4])
    light = Lighting(Shading(1.0, 0.0, textureless=True), torch.tensor([[0.0, -1e4, 0.0]]).expand(3, 3))
    out = surface.render(rays, Stream(0, 0, "render"), True, light)
    # White, and as bright as the cosine of the light's angle with the normal, which is sqrt(1 - (x / 0.5)^2).
    torch.testing.assert_close(out.rgb[:, 0], torch.tensor([1.0, 0.8, 0.6]), atol=0.02, rtol=0)
    outwards = torch.nn.functional.normalize(out.samples.positions(rays.rays_o, rays.rays_d), dim=-1)
    assert bool(((out.normals * outwards).sum(-1) > 0.99).all())
    out.rgb.sum().backward()
    assert surface.volume.density_weights[-1].grad.abs().max() > 0


def euler_number(faces):
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    edges, uses = np.unique(edges, axis=0, return_counts=True)
    assert (uses == 2).all()  # closed
    return len(np.unique(faces)) - len(edges) + len(faces)


def test_its_mesh_is_the_sphere():
    mesh = sphere().mesh(64)
    assert euler_number(mesh.faces) == 2
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), 0.5, atol=1e-3)
    a, b, c = (mesh.vertices[mesh.faces[:, k]].astype(np.float64) for k in range(3))
    area, volume = np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2, (a * np.cross(b, c)).sum() / 6
    assert area == pytest.approx(np.pi, rel=0.01)
    assert volume == pytest.approx(np.pi / 6, rel=0.01)  # positive: the faces look outwards
    assert mesh.colors.shape == mesh.vertices.shape
    assert sphere().mesh(24, texture=32).texture.shape == (32, 32, 3)


def test_no_zero_level_no_mesh():
    surface = sphere(sphere_radius=50.0)
    with pytest.raises(DivergedError, match="no surface at 0"):
        surface.mesh(16)


def test_levels_and_annealing_follow_the_steps():
    surface = Surface(SurfaceConfig(volume="mini", sdf_levels=(2000.0, 4.0, 16.0, 8000.0)))
    found = {}
    for step in (0, 1999, 2000, 2499, 2500, 2999, 3000, 6000, 9000):
        surface._set_step(step)
        found[step] = surface.volume.n_active
    assert found == {0: 4, 1999: 4, 2000: 4, 2499: 4, 2500: 5, 2999: 5, 3000: 6, 6000: 12, 9000: 12}
    surface._set_step(2500)
    assert surface.cos_ratio == 0.25
    surface.restart(1)
    assert (surface.volume.n_active, surface.cos_ratio, surface.steps_done.item()) == (5, 0.25, 2500)


def test_restored_it_is_at_the_step_where_it_was(tmp_path):
    surface = Surface(SMALL)
    surface.after_step(2999, Stream(0, 0, "occupancy"))
    asset = Asset(surface, "a ball", 3, settings_of(replaced(mini(), **vars(SMALL))))
    asset.save(tmp_path / "asset.safetensors")
    loaded = Asset.load(tmp_path / "asset.safetensors")
    assert isinstance(loaded.representation, Surface)
    assert loaded.representation.config == SMALL
    assert loaded.representation.volume.n_active == surface.volume.n_active == 10
    assert same(loaded.state(), asset.state())
    rays = generate_rays(evaluation_cameras(1), 8, 8)
    assert torch.equal(loaded.representation.render(rays).rgb, surface.render(rays).rgb)
    tensors = asset.state() | {"volume.deviation": torch.tensor([math.nan])}
    with pytest.raises(ModelError, match="not finite in volume.deviation"):
        loaded.representation.restore(tensors)
    del tensors["volume.deviation"]
    with pytest.raises(ModelError, match="of another configuration"):
        loaded.representation.restore(tensors)


def test_after_memory_ran_out_it_takes_half_of_the_samples():
    surface, rays = sphere(20.0), generate_rays(evaluation_cameras(1), 16, 16)
    before = surface.render(rays, Stream(0, 0, "render"), True)
    surface.save_memory(2)
    after = surface.render(rays, Stream(0, 0, "render"), True)
    assert after.samples.n_samples <= 96 < before.samples.n_samples
    assert after.step_scale > 1


def test_a_run_learns_and_goes_on_with_the_same_bytes(tmp_path):
    losses = []
    whole = Studio()("x", config=RUN, callback=lambda p: losses.append(p.record.loss))
    assert losses[-1] < losses[0]
    assert isinstance(whole.representation, Surface)
    assert whole.representation.volume.n_active == 8
    assert not whole.representation.volume.density_weights[-1].eq(0).all()

    with run_folder.Interrupt() as interrupt:

        def stop(progress):
            if progress.record.step + 1 == 7:
                signal.raise_signal(signal.SIGTERM)

        Studio()("x", config=RUN, callback=stop, checkpoints=tmp_path, interrupt=interrupt)
    assert run_folder.load_latest(tmp_path)[0] == 7
    resumed = Studio()("x", config=RUN, checkpoints=tmp_path)
    assert same(whole.state(), resumed.state())


def test_a_run_of_a_diffusion_model(tmp_path):
    pipeline = MVDreamPipeline(random_model(), "cpu", "float32")
    config = replaced(RUN, steps=2, shading=True, shading_from=0)
    records = []
    asset = TextTo3D(pipeline)("a red car", config=config, callback=lambda p: records.append(p.record))
    assert [r.skipped for r in records] == [False, False]
    assert all(0 < r.statistics["deviation"] < 1 and r.statistics["slope"] > 0 for r in records)
    asset.save_glb(tmp_path / "mesh.glb", resolution=16)
    assert (tmp_path / "mesh.glb").stat().st_size > 1000


def test_settings_of_a_surface():
    config = replaced(mini(), shape="surface", sphere_radius=0.3, lambda_sparsity=(0.0, 1.0, 1.0, 0.0))
    shape = config.representation
    assert isinstance(shape, SurfaceConfig)
    assert (shape.sphere_radius, shape.samples_per_ray, shape.volume, shape.background) == (0.3, 128, "mini", "grey")
    assert replaced(config, radius=2.0).representation.sphere_radius == 0.3
    back = replaced(config, shape="volume", normals="finite_difference").representation  # which a surface has not
    assert back == replaced(mini(), lambda_sparsity=(0.0, 1.0, 1.0, 0.0)).representation
    settings = settings_of(config)
    assert settings["shape"] == "surface"
    assert replaced(mini(), **settings) == config
    assert replaced(mini(), **typed(settings, "", InputFileError)) == config
    assert "sphere_radius" not in settings_of(mini())
    assert typed({"sphere_radius": 0.2}, "f", InputFileError) == {"sphere_radius": 0.2}
    assert config_from_dict(settings, "x") == shape
    assert config_from_dict(settings_of(mini()), "x") == mini().representation
    assert isinstance(new_representation(shape), Surface)
    # Switched to in a run of 600 steps it has a surface's schedules at their place in the run, and the run's its own.
    switched = resolve_config("mini", shape="surface", steps=1200).representation
    assert (switched.sdf_levels, switched.cos_anneal) == ((240.0, 8.0, 16.0, 720.0), (0.0, 0.0, 1.0, 1200.0))
    longer = resolve_config(config, steps=1200).representation
    assert longer.sdf_levels == (4000.0, 8.0, 16.0, 12000.0)
    assert longer.cos_anneal[3] == 20_000


def test_settings_that_cannot_be():
    with pytest.raises(
        ArgumentError, match=r"sphere_radius must be left out for the shape volume; it is .* of surface"
    ):
        replaced(mini(), sphere_radius=0.3)
    with pytest.raises(ArgumentError, match="shape must be one of volume, surface, tets, textured-mesh, got 'cube'"):
        resolve_config("mini", shape="cube")
    for settings, words in (
        ({"sphere_radius": 0}, "sphere_radius must be greater than 0"),
        ({"shape": "cube"}, "f: shape must be one of volume, surface, tets, textured-mesh, got 'cube'"),
        ({"shape": ["surface"]}, "f: shape must be one of volume, surface, tets, textured-mesh"),
        ({"shape": "surface", "sdf_opacity": "nerf"}, "sdf_opacity must be 'neus' or 'volsdf'"),
        ({"shape": "volume", "sdf_levels": [0, 1, 1, 0]}, "unknown key"),
        ({"sdf_levels": [0, 0, 1, 0]}, r"sdf_levels\[1\] must be at least 1"),
    ):
        with pytest.raises(InputFileError, match=words):
            typed(settings, "f", InputFileError)
    with pytest.raises(
        TypeError, match="must be one of NerfConfig, SurfaceConfig, TetsConfig, TexturedMeshConfig, got int"
    ):
        new_representation(3)


def test_memory_grows_with_what_a_sample_takes():
    surface, volume = (cls(volume="mini", samples_per_ray=128).memory(1 << 14) for cls in (SurfaceConfig, NerfConfig))
    assert surface.keys() == volume.keys()
    assert surface["the renderer's samples"] > volume["the renderer's samples"]
    assert surface["the volume and its optimiser"] == volume["the volume and its optimiser"]
