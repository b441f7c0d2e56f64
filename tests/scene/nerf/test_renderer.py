"""The Renderer: training and evaluation agree, pruning changes little, gradients flow, shading and losses by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from mvdream_fast.core import memory, reads
from mvdream_fast.core.rng import Stream
from mvdream_fast.scene import losses
from mvdream_fast.scene.background import EnvironmentMap, FixedBackground
from mvdream_fast.scene.kinds import new_representation
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.nerf.nerf import Nerf
from mvdream_fast.scene.nerf.occupancy import OccupancyGrid
from mvdream_fast.scene.nerf.renderer import Renderer
from mvdream_fast.scene.shading import (
    ALBEDO,
    Shading,
    analytic_normals,
    draw_light_positions,
    draw_shading,
    finite_difference_normals,
    shade,
)


class Ball(torch.nn.Module):
    """A ball of soft edge with one colour, both learnable."""

    def __init__(self, sharpness=10.0):
        super().__init__()
        self.sharpness = torch.nn.Parameter(torch.tensor(sharpness))
        self.color = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.0]))

    def forward(self, positions):
        return self.density(positions), torch.sigmoid(self.color).expand(positions.shape[0], 3)

    def density(self, positions):
        return torch.nn.functional.softplus(self.sharpness * (1 - positions.norm(dim=-1) / 0.5))


def rays_around(n_rays, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rays_o = torch.nn.functional.normalize(torch.randn(n_rays, 3, generator=generator), dim=-1) * 2
    target = 0.3 * torch.randn(n_rays, 3, generator=generator)
    return SimpleNamespace(rays_o=rays_o, rays_d=torch.nn.functional.normalize(target - rays_o, dim=-1))


def make(volume=None, background=None, **options):
    volume, grid = volume or Ball(), OccupancyGrid()
    grid.update(0, volume.density, Stream(0, 0, "occupancy"))
    return Renderer(volume, grid, background or FixedBackground((0.2, 0.5, 0.8)), **options)


def train(renderer, rays, step=0, **options):
    return renderer(rays, Stream(0, step, "render"), training=True, **options)


def test_step_of_the_paper():
    assert make().step_size == pytest.approx(0.006765625)


def test_training_and_evaluation_agree():
    renderer, rays = make(), rays_around(300)
    a, b = train(renderer, rays), renderer(rays)
    # They differ by the jitter, at most a step of optical depth.
    torch.testing.assert_close(a.rgb, b.rgb, atol=0.02, rtol=0)
    torch.testing.assert_close(a.opacity, b.opacity, atol=0.02, rtol=0)
    torch.testing.assert_close(a.depth, b.depth, atol=0.05, rtol=0)
    assert not b.rgb.requires_grad
    assert a.n_samples <= a.n_marched
    assert b.weights is None
    assert b.n_samples > 0


def test_pruning_changes_little_and_saves_samples():
    rays = rays_around(300)
    opaque = Ball(200.0)
    kept = train(make(opaque), rays)
    everything = train(make(opaque, alpha_thre=0.0, early_stop_eps=0.0), rays)
    assert kept.n_samples < 0.7 * everything.n_samples
    assert everything.n_samples == everything.n_marched
    torch.testing.assert_close(kept.rgb, everything.rgb, atol=0.02, rtol=0)


def test_gradients_reach_volume_and_background():
    renderer, rays = make(background=EnvironmentMap(augment_prob=0.0)), rays_around(100)
    train(renderer, rays).rgb.square().sum().backward()
    for parameter in renderer.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0


def test_gradient_equals_a_finite_difference():
    rays, eps = rays_around(100), 1e-2
    renderer = make(alpha_thre=0.0, early_stop_eps=0.0)

    def opacity(sharpness):
        with torch.no_grad():
            renderer.volume.sharpness.fill_(sharpness)
        return train(renderer, rays).opacity.double().sum()

    opacity(10.0).backward()
    slope = (opacity(10 + eps) - opacity(10 - eps)).item() / (2 * eps)
    assert renderer.volume.sharpness.grad.item() == pytest.approx(slope, rel=2e-3)


def test_the_same_stream_gives_the_same_bytes():
    renderer, rays = make(background=EnvironmentMap()), rays_around(50)
    a, b, c = (train(renderer, rays, step) for step in (3, 3, 4))
    assert torch.equal(a.rgb, b.rgb)
    assert not torch.equal(a.rgb, c.rgb)


def test_blocks_of_rays_change_nothing(monkeypatch):
    import mvdream_fast.scene.nerf.renderer as module

    renderer, rays = make(), rays_around(100)
    wanted = train(renderer, rays)
    monkeypatch.setattr(module, "_RAYS_PER_PRUNE", 7)
    got = train(renderer, rays)
    assert torch.equal(got.rgb, wanted.rgb)
    assert torch.equal(got.samples.packed_info, wanted.samples.packed_info)
    assert got.n_marched == wanted.n_marched


def blocks_on_a_gpu(monkeypatch, memory_gb, renderer):
    """How many rays at once a GPU of so many GB marches."""
    monkeypatch.setattr(memory, "total", lambda device: int(memory_gb * 1e9))
    monkeypatch.setattr(reads, "reads_wait", lambda device: True)
    return renderer._rays_per_prune(torch.device("cuda"))


@pytest.mark.parametrize(("memory_gb", "in_one_block"), [(8, False), (16, True), (24, True), (80, True)])
def test_a_gpu_takes_the_papers_second_stage_in_one_block(monkeypatch, memory_gb, in_one_block):
    renderer = Nerf(NerfConfig(volume="mini", samples_per_ray=512))
    assert (blocks_on_a_gpu(monkeypatch, memory_gb, renderer) >= 4 * 256 * 256) == in_one_block


def test_after_memory_ran_out_a_gpu_takes_half_of_the_rays_at_once(monkeypatch):
    renderer = Nerf(NerfConfig(volume="mini", samples_per_ray=512))
    renderer.save_memory(4 * 256 * 256)
    assert blocks_on_a_gpu(monkeypatch, 80, renderer) == 2 * 256 * 256
    renderer.save_memory(100)
    assert blocks_on_a_gpu(monkeypatch, 80, renderer) == 8192  # a CPU's block: fewer would not spare much


@pytest.mark.parametrize("cap", [2000, 50])
def test_cap_on_samples(cap):
    rays = rays_around(100)
    free = make(alpha_thre=0.0)
    wanted = train(free, rays)
    assert (wanted.n_samples > 2000, wanted.step_scale, free.n_capped) == (True, 1, 0)
    capped = make(alpha_thre=0.0, max_samples=cap)
    out = train(capped, rays)
    assert out.n_samples <= cap
    assert out.step_scale > 1
    assert capped.n_capped == 1
    if cap == 2000:
        torch.testing.assert_close(out.opacity, wanted.opacity, atol=0.25, rtol=0)


def test_nothing_in_sight_is_background_with_zero_gradients():
    renderer, rays = make(background=EnvironmentMap(augment_prob=0.0)), rays_around(10)
    renderer.occupancy.bits.zero_()
    out = train(renderer, rays)
    assert out.n_samples == 0
    torch.testing.assert_close(out.rgb, renderer.background(rays.rays_d))
    (out.rgb.sum() + out.z_variance.sum()).backward()
    assert float(renderer.volume.color.grad.abs().max()) == 0
    evaluated = renderer(rays)
    torch.testing.assert_close(evaluated.rgb, out.rgb)
    empty = SimpleNamespace(rays_o=torch.zeros(0, 3), rays_d=torch.zeros(0, 3))
    assert train(renderer, empty).rgb.shape == (0, 3)
    assert renderer(empty).rgb.shape == (0, 3)


def test_a_plain_callable_serves_as_volume():
    class Fog(torch.nn.Module):
        def forward(self, positions):
            return torch.full(positions.shape[:1], 0.5), torch.ones_like(positions)

    renderer = Renderer(Fog(), OccupancyGrid(), FixedBackground(), alpha_thre=0.0)
    rays = SimpleNamespace(rays_o=torch.tensor([[-2.0, 0, 0]]), rays_d=torch.tensor([[1.0, 0, 0]]))
    for out in (train(renderer, rays), renderer(rays)):
        torch.testing.assert_close(out.opacity, torch.tensor([1 - math.exp(-1.0)]), atol=0.005, rtol=0)


QUARTER = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
GENERAL = torch.linalg.matrix_exp(torch.tensor([[0.0, -0.7, 0.4], [0.7, 0, -1.1], [-0.4, 1.1, 0]]))


@pytest.mark.parametrize(
    ("turn", "sharpness", "options"),
    [
        (QUARTER, 10.0, {}),
        # The cells and the box don't turn along: all cells full, nothing dense at the box's faces, and no thresholds.
        (GENERAL, 60.0, {"alpha_thre": 0.0, "early_stop_eps": 0.0}),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_rotating_cameras_and_field_together_changes_nothing(turn, sharpness, options, training):
    class Blob(Ball):
        def __init__(self, turn):
            super().__init__(sharpness)
            self.turn = turn

        def forward(self, positions):
            return self.density(positions), torch.sigmoid(3 * positions @ self.turn)

        def density(self, positions):
            return super().density((positions @ self.turn) * torch.tensor([1.0, 1.3, 0.8]))

    rays = rays_around(200)
    turned = SimpleNamespace(rays_o=rays.rays_o @ turn.T, rays_d=rays.rays_d @ turn.T)
    plain, rotated = (
        Renderer(Blob(turn), OccupancyGrid(), FixedBackground(), **options)(
            rays, Stream(0, 0, "render") if training else None, training=training
        )
        for turn, rays in ((torch.eye(3), rays), (turn, turned))
    )
    tolerance = 1e-6 * sharpness  # of positions that rotation rounds
    torch.testing.assert_close(plain.rgb, rotated.rgb, atol=tolerance, rtol=0)
    torch.testing.assert_close(plain.depth, rotated.depth, atol=2 * tolerance, rtol=0)
    assert plain.opacity.max() > 0.9


@pytest.mark.parametrize("normals", ["analytic", "finite_difference"])
def test_normals_of_a_ball_point_outwards(normals):
    out = train(make(normals=normals), rays_around(50))
    outwards = torch.nn.functional.normalize(out.positions, dim=-1)
    assert bool(((out.normals * outwards).sum(-1) > 0.999).all())


def test_a_volume_makes_its_normals_as_its_settings_say():
    ways = {}
    for normals in ("analytic", "finite_difference"):
        nerf = new_representation(NerfConfig(volume="mini", samples_per_ray=32, normals=normals), lit=True)
        out = nerf.render(rays_around(50), Stream(0, 0, "render"), training=True)
        ways[normals] = out.normals.detach()
        assert new_representation(nerf.config).render(rays_around(9), Stream(0, 0, "r"), training=True).normals is None
    cosines = (ways["analytic"] * ways["finite_difference"]).sum(-1)
    assert 0.99 < cosines.mean() < 1


def test_normals_can_be_differentiated():
    volume, x = Ball(), torch.tensor([[0.3, 0.1, -0.2], [0.1, 0.0, 0.0]], requires_grad=True)
    still = torch.tensor([[1.0], [0.0]])  # the second density does not depend on its position
    normals = analytic_normals(volume.density(x) * still[:, 0], x)
    assert normals[1].tolist() == [0.0, 0.0, 0.0]
    shaded = shade(torch.ones(2, 3), normals, x.detach(), torch.tensor([[0.0, 0, 2], [0, 0, 2]]), Shading(0.7, 0.3))
    shaded.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(volume.sharpness.grad)
    flat = finite_difference_normals(lambda p: torch.ones(p.shape[0]), torch.zeros(4, 3))
    assert flat.tolist() == [[0.0] * 3] * 4
    assert finite_difference_normals(volume.density, torch.zeros(0, 3)).shape == (0, 3)


def test_shade_by_hand():
    albedo, positions = torch.tensor([[0.5, 1.0, 0.0]]).expand(3, 3), torch.zeros(3, 3)
    normals = torch.tensor([[0.0, 0, 1], [0, 0, -1], [0.6, 0, 0.8]])
    lights = torch.tensor([[0.0, 0, 4]]).expand(3, 3)
    lit = shade(albedo, normals, positions, lights, Shading(0.75, 0.25))
    torch.testing.assert_close(lit, albedo * torch.tensor([[1.0], [0.25], [0.85]]))
    white = shade(albedo, normals, positions, lights, Shading(0.75, 0.25, textureless=True))
    torch.testing.assert_close(white, torch.tensor([[1.0], [0.25], [0.85]]).expand(3, 3))


def test_shading_is_drawn_as_the_recipe_says():
    early = [draw_shading(Stream(0, step, "shading"), step) for step in range(100)]
    assert early == [ALBEDO] * 100
    late = [draw_shading(Stream(0, step, "shading"), step) for step in range(5000, 6600)]
    lit = [s for s in late if s is not ALBEDO]
    # Of 1600: a quarter plain, 37.5 % textureless, 37.5 % shaded; four deviations are about 78.
    assert abs(len(lit) - 1200) < 78
    assert abs(sum(s.textureless for s in lit) - 600) < 78
    assert all(s.diffuse + s.ambient == pytest.approx(1) for s in lit)
    assert abs(sum(s.diffuse for s in lit) / len(lit) - 0.5) < 0.05
    hard = {s.diffuse for s in (draw_shading(Stream(0, t, "s"), t, soft=False) for t in range(5000, 5050))}
    assert hard == {0.0, 0.9}


def test_lights_stand_near_their_cameras():
    cameras = torch.nn.functional.normalize(torch.randn(8, 3), dim=-1) * 3
    lights = draw_light_positions(Stream(0, 0, "light"), cameras, n_views=4)
    distance = lights.norm(dim=-1)
    assert bool(((distance >= 0.8) & (distance <= 1.5)).all())
    torch.testing.assert_close(distance.reshape(2, 4), distance.reshape(2, 4)[:, :1].expand(2, 4))
    on_axis = draw_light_positions(Stream(0, 0, "light"), cameras, n_views=4, perturb=0.0)
    torch.testing.assert_close(on_axis / on_axis.norm(dim=-1, keepdim=True), cameras / 3)
    # The last group need not be whole.
    assert torch.equal(draw_light_positions(Stream(0, 0, "light"), cameras[:6], n_views=4), lights[:6])
    assert draw_light_positions(Stream(0, 0, "light"), cameras[:1], n_views=4).shape == (1, 3)


def test_shaded_training_and_its_refusals():
    rays, lit = rays_around(50), Shading(1.0, 0.0)
    renderer = make(normals="analytic")
    out = train(renderer, rays, shading=lit, lights=rays.rays_o)
    plain = train(renderer, rays)
    assert bool((out.rgb <= plain.rgb + 1e-6).all())
    assert not torch.allclose(out.rgb, plain.rgb, atol=1e-2)
    out.rgb.sum().backward()
    assert torch.isfinite(renderer.volume.sharpness.grad)
    as_it_is = torch.arange(50) >= 20
    mixed = train(renderer, rays, shading=lit, lights=rays.rays_o, plain=as_it_is)
    assert torch.equal(mixed.rgb, torch.where(as_it_is[:, None], plain.rgb, out.rgb))
    dark = train(renderer, rays, shading=Shading(0.0, 1.0, textureless=True))
    torch.testing.assert_close(
        dark.rgb, dark.opacity[:, None] + (1 - dark.opacity[:, None]) * torch.tensor([0.2, 0.5, 0.8])
    )
    with pytest.raises(ValueError, match="Renderer: shading must be plain albedo without normals or lights"):
        train(make(), rays, shading=lit, lights=rays.rays_o)
    with pytest.raises(ValueError, match="Renderer: normals must be one of none, analytic, finite_difference"):
        make(normals="smooth")
    with pytest.raises(ValueError, match="Renderer: stream must be a Stream in training, got None"):
        make()(rays, training=True)


def test_losses_by_hand():
    opacity = torch.tensor([0.0, 0.6, 1.0])
    normals, down = torch.tensor([[0.0, 0, 1], [0, 0, -1]]), torch.tensor([[0.0, 0, -1]]).expand(2, 3)
    weights = torch.tensor([0.3, 0.5], requires_grad=True)
    # Only the second faces away: 0.5 * 1^2 over two rays that hit.
    loss = losses.orientation_loss(weights, normals.requires_grad_(), down, opacity)
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    assert weights.grad is None
    assert normals.grad[1].tolist() == [0.0, 0.0, -0.5]
    wanted = (0.1 + math.sqrt(0.37) + math.sqrt(1.01)) / 3
    assert losses.sparsity_loss(opacity).item() == pytest.approx(wanted)
    edge = -(1e-3 * math.log(1e-3) + 0.999 * math.log(0.999))
    middle = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    assert losses.opaque_loss(opacity).item() == pytest.approx((2 * edge + middle) / 3, rel=1e-5)
    assert losses.z_variance_loss(torch.tensor([9.0, 1.0, 2.0]), opacity).item() == pytest.approx(1.5)


def test_losses_of_nothing_are_zero():
    none, flat = torch.zeros(0, requires_grad=True), torch.zeros(0, 3)
    total = losses.orientation_loss(none, flat, flat, none) + losses.sparsity_loss(none) + losses.opaque_loss(none)
    total = total + losses.z_variance_loss(none, none)
    assert total.item() == 0
    total.backward()
    assert losses.z_variance_loss(torch.ones(2), torch.zeros(2)).item() == 0
