"""Views half-way between others: which cameras, what is held, and what a run makes of them."""

import pytest
import torch
from reference.random_model import random_model
from test_cutouts import FIT, MATTED

from mvdream_fast.camera import get_camera, orbit_cameras, turned
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import beside_known
from mvdream_fast.diffusion.views import half_way
from mvdream_fast.distill.config import check_learning, replaced
from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.recipes import guided_views
from mvdream_fast.guidance.reconstruction import shown
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.mesh.hull import Hull

FEW = {"n_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe() -> MVDreamPipeline:
    return MVDreamPipeline(random_model(), "cpu", "float32")


def test_cameras_turn_around_the_upright_axis():
    for n, elevation, start in ((4, 15.0, 0.0), (3, 40.0, 20.0)):
        wanted = get_camera(n, elevation, start + 33.0)
        torch.testing.assert_close(turned(get_camera(n, elevation, start), 33.0), wanted, rtol=0, atol=1e-6)


def test_the_model_sees_known_views_first_and_answers_for_the_new_ones():
    known, asked = torch.arange(2.0).view(2, 1, 1, 1), []

    def model(latents, t):
        asked.append((latents.flatten().tolist(), t))
        return latents + 0.5

    new = beside_known(model, lambda t: known + t, 3)
    latents = torch.tensor([7.0, 8.0, 9.0]).view(3, 1, 1, 1)
    assert new(latents, 10).flatten().tolist() == [7.5, 8.5, 9.5]
    assert new(latents.repeat(2, 1, 1, 1), 20).flatten().tolist() == [7.5, 8.5, 9.5] * 2
    assert asked == [([10, 11, 7, 8, 9], 10), ([20, 21, 7, 8, 9] * 2, 20)]


@pytest.mark.parametrize("uncond_mode", ["3d", "2d"])
def test_they_are_the_steps_written_out(pipe, uncond_mode):
    views = pipe("a red car", 3, elevation_deg=20.0, **FEW)
    found = pipe.between(views, seed=5, uncond_mode=uncond_mode, **FEW)
    torch.testing.assert_close(found.cameras, get_camera(3, 20.0, 60.0), rtol=0, atol=1e-6)
    with torch.no_grad():
        exact = pipe.vae.encode(views.tensor * 2 - 1)
        latents, held = (Stream(5, 0, f"sampling between{end}").normal(*exact.shape) for end in ("", "/known"))
        poses = torch.cat([views.cameras, found.cameras])
        text = pipe.encode_prompt("a red car")
        guided = pipe.denoiser(text, poses, 6, 3.0, uncond_mode)
        abar, times = pipe.schedule.alphas_cumprod, pipe.schedule.timesteps(4)
        for t, after in zip(times, [*times[1:], None], strict=True):
            noised = abar[t].sqrt() * exact + (1 - abar[t]).sqrt() * held
            both = torch.cat([noised, latents])
            u, c = guided(torch.cat([both, both]), torch.tensor(t)).chunk(2)
            v = (u + 3.0 * (c - u))[3:]
            x0, noise = (
                abar[t].sqrt() * latents - (1 - abar[t]).sqrt() * v,
                abar[t].sqrt() * v + (1 - abar[t]).sqrt() * latents,
            )
            last = abar[0] if after is None else abar[after]
            latents = last.sqrt() * x0 + (1 - last).sqrt() * noise
        wanted = (pipe.vae.decode(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found.tensor, wanted, rtol=0, atol=1e-4)
    assert wanted.std() > 0.02


def test_the_seed_decides_and_so_do_the_known_views(pipe):
    views = pipe("a red car", 2, **FEW)
    first = pipe.between(views, seed=1, **FEW)
    assert torch.equal(first.tensor, pipe.between(views, seed=1, **FEW).tensor)
    assert not torch.equal(first.tensor, pipe.between(views, seed=2, **FEW).tensor)
    others = pipe.between(pipe("a red car", 2, seed=9, **FEW), seed=1, **FEW)
    assert not torch.equal(first.tensor, others.tensor)
    assert (first.seed, first.prompt) == (1, "a red car")


def test_without_guidance_it_asks_once(pipe):
    views = pipe("a red car", 2, **FEW)
    found = pipe.between(views, n_steps=4, guidance_scale=1.0)
    near = pipe.between(views, n_steps=4, guidance_scale=1.0001)
    torch.testing.assert_close(found.tensor, near.tensor, rtol=0, atol=1e-3)


def test_images_without_cameras_are_refused(pipe):
    with pytest.raises(ArgumentError, match="between: views must have cameras, got images of 2D mode"):
        pipe.between(pipe("a red car", 2, mode="2d", **FEW))


@pytest.mark.parametrize(
    ("n", "span", "wanted"),
    [(4, 360.0, [45, 135, 225, 315]), (4, 90.0, [11.25, 33.75, 56.25, 78.75]), (3, -90.0, [-15, -45, -75]),
     (2, 360.0, [90, 270]), (2, -360.0, [90, 270]), (1, 360.0, [180]), (5, -360.0, [-36, -108, -180, -252, -324])],
)  # fmt: skip
@pytest.mark.parametrize("elevation", [15.0, 90.0])
def test_half_the_step_of_the_given_cameras(n, span, wanted, elevation):
    found = half_way(get_camera(n, elevation, 20.0, span))
    expected = torch.cat([get_camera(1, elevation, 20.0 + azimuth) for azimuth in wanted])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if span == 360:  # to the bit
        assert torch.equal(found, turned(get_camera(n, elevation, 20.0), 180 / n))


def test_views_of_a_part_of_the_way_have_no_copies_among_those_between(pipe):
    views = pipe("a red car", 4, azimuth_span_deg=90.0, **FEW)
    found = pipe.between(views, **FEW)
    torch.testing.assert_close(found.cameras, get_camera(4, 15.0, 11.25, 90.0), rtol=0, atol=1e-5)
    apart = torch.cdist(views.cameras, found.cameras)
    assert apart.min() > 0.1


@pytest.mark.parametrize("span", [0.0, None])
def test_cameras_at_unequal_steps_are_refused(pipe, span):
    cameras = get_camera(3, 15.0, 0.0, 0.0) if span == 0 else torch.cat([get_camera(2), get_camera(1, 15.0, 220.0)])
    views = pipe("a red car", camera=cameras, **FEW)
    with pytest.raises(ArgumentError, match=r"between: views must have equal steps of azimuth .*, got steps of"):
        pipe.between(views, **FEW)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"uncond_mode": "foo"}, "uncond_mode must be 3d or 2d, got 'foo'"),
        ({"n_steps": 2.0}, "n_steps must be a whole number, got 2.0"),
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": "1"}, "seed must be a whole number, got '1'"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be finite"),
        ({"views": torch.zeros(2, 3, 16, 16)}, "between: views must be Views, got Tensor; a call returns them"),
    ],
)
def test_wrong_arguments(pipe, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        pipe.between(**{"views": pipe("a red car", 2, **FEW), **FEW, **arguments})


def test_a_seed_that_is_not_given_is_drawn_and_named(pipe):
    views = pipe("a red car", 2, **FEW)
    found = pipe.between(views, seed=None, **FEW)
    assert isinstance(found.seed, int)
    assert torch.equal(found.tensor, pipe.between(views, seed=found.seed, **FEW).tensor)


@pytest.mark.parametrize("matted", [False, True])
@pytest.mark.parametrize("method", ["sds", "reconstruct"])
def test_a_run_knows_their_silhouettes(pipe, matted, method):
    pipe = MVDreamPipeline(random_model(config=MATTED), "cpu", "float32") if matted else pipe
    config = FIT if method == "sds" else replaced(FIT, method="reconstruct", sampled_views=0)
    silhouettes, cameras = new_guidance(pipe, "a red car", config, seed=5).between
    how = {"n_steps": 2, "guidance_scale": 3.0, "uncond_mode": config.sampled.sampled_uncond, "seed": 5}
    how |= {"negative_prompt": config.negative_prompt, "warn": lambda _: None}
    more = pipe.between(pipe("a red car", 4, **how), **how)
    assert torch.equal(silhouettes, more.cutout[:, 3:] if matted else shown(more.tensor))
    fovy, distance = torch.rad2deg(cameras.fovy[0]).item(), cameras.c2w[0, :3, 3].norm().item()
    torch.testing.assert_close(cameras.c2w, orbit_cameras(4, 15.0, 45.0, 360.0, distance, fovy).c2w)
    plain = new_guidance(pipe, "a red car", replaced(config, sampled_between=False), seed=5)
    assert plain.between is None


def test_they_are_counted_with_those_that_they_are_between():
    plain = replaced(FIT, sampled_between=False)
    assert guided_views(FIT) == guided_views(plain) + (4 + 4) * 2


def test_they_need_a_hull_to_carve():
    with pytest.raises(ArgumentError, match="sampled_between must be false without sampled_hull"):
        check_learning(replaced(FIT, sampled_hull=False))


def square(n: int, half: int) -> torch.Tensor:
    """Silhouettes [n, 1, 64, 64] of something so many pixels to either side of the middle, and half as many up."""
    maps = torch.zeros(n, 1, 64, 64)
    maps[:, :, 32 - half // 2 : 32 + half // 2, 32 - half : 32 + half] = 1
    return maps


def test_what_two_opposite_ones_do_not_see_is_carved_off():
    """Four views of a square pillar see none of its round: eight do; one of two opposite ones alone carves nothing."""
    images, around, half_way = torch.zeros(4, 3, 64, 64), orbit_cameras(4, 0.0), orbit_cameras(4, 0.0, 45.0)
    plain = Hull(images, square(4, 12), around)
    corner = torch.tensor([[0.0, 0.0, 0.0]])
    while plain.occupancy(corner + 0.01) > 0.9:
        corner = corner + torch.tensor([[0.01, 0.01, 0.0]])
    round_ones = square(4, 12)
    assert plain.occupancy(corner) > 0.9
    assert Hull(images, square(4, 12), around, between=(round_ones, half_way)).occupancy(corner) < 0.1
    middle = torch.zeros(1, 3)
    assert Hull(images, square(4, 12), around, between=(round_ones, half_way)).occupancy(middle) > 0.9
    two_wide = torch.cat([square(2, 12), square(2, 24)])
    assert Hull(images, square(4, 12), around, between=(two_wide, half_way)).occupancy(corner) > 0.9
    assert Hull(images, square(4, 12), around, between=(square(3, 12), orbit_cameras(3, 0.0, 45.0))).occupancy(middle)
