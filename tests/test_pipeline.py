"""The pipeline against the same steps written out by hand, and what its user may expect of repeated calls."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from reference.random_model import random_model

from mvdream_fast.camera import get_camera, orbit_cameras
from mvdream_fast.checkpoints.open import save_model
from mvdream_fast.core.errors import ArgumentError, DivergedError
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.sampler import ddim_sample, scheduler_sample
from mvdream_fast.models.config import SamplingGuidance
from mvdream_fast.pipeline import SUFFIX, MVDreamPipeline, TextCond, split_suffix

PROMPT = "a green chair"
FEW = {"n_steps": 4}


@pytest.fixture(scope="module")
def pipe() -> MVDreamPipeline:
    return MVDreamPipeline(random_model(), device="cpu", dtype="float32")


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@torch.no_grad()
def by_hand(pipe, prompt, n_views, n_steps, scale, negative="", elevation_deg=15.0, seed=0):
    """Text, cameras, diffusers' own DDIM, one UNet call for each half, decoding: nothing of the pipeline's."""
    model = pipe.model
    cond, uncond = (model.text(model.tokenizer.encode(text).ids) for text in (prompt + ", 3d asset", negative))
    camera = get_camera(n_views, elevation_deg)
    latents = Stream(seed, 0, "sampling").normal(n_views, 4, 8, 8)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    scheduler.set_timesteps(n_steps)
    for t in scheduler.timesteps:
        a, b = (model.unet(latents, t, text, camera, n_views) for text in (uncond, cond))
        latents = scheduler.step(a + scale * (b - a), t, latents).prev_sample
    return (model.vae.decode(latents) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("n_views", "scale", "negative"), [(4, 7.5, ""), (1, 2.0, "a red car"), (3, 0.5, "car")])
def test_equals_the_steps_written_out(pipe, n_views, scale, negative):
    views = pipe(PROMPT, n_views, n_steps=5, guidance_scale=scale, negative_prompt=negative)
    expected = by_hand(pipe, PROMPT, n_views, 5, scale, negative)
    assert expected.std() > 0.02
    close(views.tensor, expected)


def test_defaults_are_the_documented_ones(pipe):
    """50 steps, guidance 7.5, elevation 15, azimuths from 0 over 360, suffix on, negative prompt empty."""
    done = []
    views = pipe(PROMPT, callback=lambda step, total, _: done.append((step, total)))
    assert done == [(i + 1, 50) for i in range(50)]
    assert torch.equal(views.cameras, get_camera(4, 15, 0, 360))
    close(views.tensor, by_hand(pipe, PROMPT, 4, 50, 7.5), atol=1e-4)
    assert views.seed == 0


def test_views_are_images_and_a_sheet(pipe):
    views = pipe(PROMPT, 5, **FEW)
    assert views.tensor.shape == (5, 3, 16, 16)
    assert views.tensor.dtype == torch.float32
    assert 0 <= views.tensor.min() < views.tensor.max() <= 1
    assert [image.size for image in views.images] == [(16, 16)] * 5
    pixels = np.stack([np.asarray(image) for image in views.images])
    assert np.abs(pixels / 255 - views.tensor.permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 255 + 1e-6
    sheet = views.sheet()
    assert sheet.size == (64, 32)
    np.testing.assert_array_equal(np.asarray(sheet)[16:, :16], pixels[4])
    np.testing.assert_array_equal(np.asarray(sheet)[:16, 48:], pixels[3])
    assert (np.asarray(sheet)[16:, 16:] == 255).all()
    assert pipe(PROMPT, 2, **FEW).sheet().size == (32, 16)


def test_the_same_call_gives_the_same_bytes(pipe):
    one, two, other = (pipe(PROMPT, seed=seed, **FEW).tensor for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert (one - other).abs().max() > 0.05


def test_prompts_in_a_list_are_the_prompts_alone(pipe):
    prompts = [PROMPT, "a brown bulldog", "a red car"]
    together = pipe(prompts, 2, seed=5, **FEW)
    assert [views.prompt for views in together] == prompts
    assert [views.seed for views in together] == [5, 6, 7]
    for i, prompt in enumerate(prompts):
        close(together[i].tensor, pipe(prompt, 2, seed=5 + i, **FEW).tensor)
    assert isinstance(pipe([PROMPT], 2, **FEW), list)


def test_one_negative_prompt_for_all_or_one_each(pipe):
    prompts = [PROMPT, "a brown bulldog"]
    shared = pipe(prompts, 1, negative_prompt="a car", **FEW)
    each = pipe(prompts, 1, negative_prompt=["a car", "a chair"], **FEW)
    close(shared[0].tensor, each[0].tensor)
    assert (shared[1].tensor - each[1].tensor).abs().max() > 1e-3
    with pytest.raises(ArgumentError, match="one for each of the 2 prompts, got 3"):
        pipe(prompts, 1, negative_prompt=["a", "b", "c"], **FEW)


def test_poses_can_be_given(pipe):
    asked = pipe(PROMPT, 3, elevation_deg=20, azimuth_start_deg=30, **FEW)
    cameras = orbit_cameras(3, 20, 30, 360, distance=2.5)
    before = cameras.c2w.clone()
    for camera in (cameras, cameras.c2w, get_camera(3, 20, 30)):
        given = pipe(PROMPT, camera=camera, **FEW)
        close(given.tensor, asked.tensor)
        close(given.cameras, asked.cameras, atol=1e-6)
    assert torch.equal(cameras.c2w, before)
    assert (asked.tensor - pipe(PROMPT, 3, elevation_deg=20, **FEW).tensor).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"c2w must be \[V, 4, 4\] or \[V, 16\], got \[3, 3\]"):
        pipe(PROMPT, camera=torch.eye(3), **FEW)


def test_2d_images_are_independent_and_3d_views_are_not(pipe):
    alone, three = (pipe(PROMPT, n, mode="2d", **FEW) for n in (1, 3))
    assert three.cameras is None
    close(three.tensor[:1], alone.tensor)
    alone, three = (pipe(PROMPT, n, **FEW).tensor for n in (1, 3))
    assert (three[:1] - alone).abs().max() > 1e-3
    with pytest.raises(ArgumentError, match="camera must be None in 2d mode"):
        pipe(PROMPT, camera=get_camera(2), mode="2d", **FEW)


def test_2d_prompts_keep_their_own_text(pipe):
    together = pipe([PROMPT, "a red car"], 2, mode="2d", **FEW)
    close(together[1].tensor, pipe("a red car", 2, mode="2d", seed=1, **FEW).tensor)


class Counting:
    """A module whose calls and the batch sizes of their results are counted."""

    def __init__(self, module):
        self.module, self.calls = module, []

    def __call__(self, first, *rest):
        out = self.module(first, *rest)
        self.calls.append(len(out))
        return out

    def prepare_context(self, context):
        self.calls.append("prepared")
        return self.module.prepare_context(context)


@pytest.mark.parametrize(("scale", "batch"), [(7.5, 8), (1.0, 4), (0.0, 8)])
def test_text_is_encoded_once_and_guidance_is_one_batch(scale, batch):
    pipe = MVDreamPipeline(random_model(), device="cpu", dtype="float32")
    pipe.unet, pipe.text = Counting(pipe.unet), Counting(pipe.text)
    pipe(PROMPT, guidance_scale=scale, **FEW)
    assert pipe.text.calls == [2]
    assert pipe.unet.calls == ["prepared", *[batch] * 4]


@torch.no_grad()
@pytest.mark.parametrize(("n_views", "negative"), [(4, ""), (1, "a red car")])
def test_guidance_away_from_single_images(pipe, n_views, negative):
    """uncond_mode="2d": without the prompt the model is told no camera either, and each view is alone; at the border,
    where the background is, the mean of what it says is that of what it says with all."""
    model, t = pipe.model, torch.tensor(501)
    camera = get_camera(n_views, 15)
    cond, uncond = (model.text(model.tokenizer.encode(text).ids) for text in (PROMPT + ", 3d asset", negative))
    latents = Stream(0, 0, "latents").normal(n_views, 4, 8, 8)
    alone = torch.cat([model.unet(latents[i : i + 1], t, uncond) for i in range(n_views)])
    told, border = model.unet(latents, t, cond, camera, n_views), torch.ones(8, 8, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    alone += (told - alone)[:, :, border].mean(dim=(0, 2))[:, None, None]
    text = pipe.encode_prompt(PROMPT, negative)
    found = pipe.denoiser(text, camera, n_views, 3.0, "2d")(torch.cat([latents, latents]), t)
    close(found, torch.cat([alone, told]))
    two = pipe.encode_prompt([PROMPT, "a red car"], negative)  # each scene has a background of its own
    both = torch.cat([latents, -latents])
    found = pipe.denoiser(two, camera, n_views, 3.0, "2d")(torch.cat([both, both]), t)
    close(found[:n_views], alone)
    views = pipe(PROMPT, n_views, guidance_scale=3.0, uncond_mode="2d", negative_prompt=negative, **FEW)
    other = pipe(PROMPT, n_views, guidance_scale=3.0, uncond_mode="3d", negative_prompt=negative, **FEW)
    assert (views.tensor - other.tensor).abs().max() > 0.01


def test_a_model_says_how_it_is_guided():
    model = random_model()
    model.config = dataclasses.replace(model.config, guidance=SamplingGuidance(2.0, "2d"))
    pipe = MVDreamPipeline(model, device="cpu", dtype="float32")
    assert pipe.guidance() == (2.0, "2d")
    assert pipe.guidance(4.0, "3d") == (4.0, "3d")
    by_itself = pipe(PROMPT, **FEW).tensor
    assert torch.equal(by_itself, pipe(PROMPT, guidance_scale=2.0, uncond_mode="2d", **FEW).tensor)
    assert not torch.equal(by_itself, pipe(PROMPT, guidance_scale=2.0, uncond_mode="3d", **FEW).tensor)


def test_guidance_scale_one_is_the_limit(pipe):
    at, near = (pipe(PROMPT, guidance_scale=scale, **FEW).tensor for scale in (1.0, 1 + 1e-6))
    close(at, near, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_any_diffusers_scheduler_may_sample(pipe, name):
    scheduler = getattr(diffusers, name)(**pipe.scheduler_settings)
    seen = []
    one, two = (pipe(PROMPT, scheduler=scheduler, n_steps=6, seed=3).tensor for _ in range(2))
    assert torch.equal(one, two)
    other = pipe(PROMPT, scheduler=scheduler, n_steps=6, seed=4, callback=lambda *step: seen.append(step[:2])).tensor
    assert seen == [(i + 1, 6) for i in range(6)]
    assert one.std() > 0.02
    assert (one - other).abs().max() > 0.05


def test_diffusers_ddim_gives_the_same_views(pipe):
    scheduler = diffusers.DDIMScheduler(
        **pipe.scheduler_settings, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    theirs = pipe(PROMPT, scheduler=scheduler, n_steps=10).tensor
    close(pipe(PROMPT, n_steps=10).tensor, theirs, atol=1e-4)
    with pytest.raises(ArgumentError, match="prediction_type must be v_prediction"):
        pipe(PROMPT, scheduler=diffusers.DDIMScheduler(), n_steps=10)
    with pytest.raises(ArgumentError, match="clip_sample must be False for this model, got True; construct it with"):
        pipe(PROMPT, scheduler=diffusers.DDIMScheduler(**pipe.scheduler_settings), n_steps=10)
    assert "clip_sample=False" in type(pipe).scheduler_settings.__doc__


def test_step_conventions(pipe):
    done: list[int] = []
    pipe(PROMPT, 1, n_steps=30, callback=lambda step, total, _: done.append(total))
    assert done == [31] * 31
    done.clear()
    pipe(PROMPT, 1, n_steps=30, convention="diffusers", callback=lambda step, total, _: done.append(total))
    assert done == [30] * 30
    with pytest.raises(ArgumentError, match="the nearest number that works is 4"):
        pipe(PROMPT, 1, n_steps=3)


def test_a_generator_draws_the_noise(pipe):
    one, two, other = (pipe(PROMPT, generator=torch.Generator().manual_seed(s), **FEW) for s in (1, 1, 2))
    assert torch.equal(one.tensor, two.tensor)
    assert one.seed is None
    assert (one.tensor - other.tensor).abs().max() > 0.05


def test_eta_adds_reproducible_noise(pipe):
    one, two = (pipe(PROMPT, eta=1.0, **FEW).tensor for _ in range(2))
    assert torch.equal(one, two)
    assert (one - pipe(PROMPT, **FEW).tensor).abs().max() > 0.01
    drawn = [pipe(PROMPT, eta=1.0, generator=torch.Generator().manual_seed(s), **FEW).tensor for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2]).abs().max() > 0.01


@torch.no_grad()
def test_eta_draws_from_the_seed_s_own_stream(pipe):
    """As before there was one for each prompt: a call of one prompt has kept its bytes."""
    text, camera = pipe.encode_prompt(PROMPT), get_camera(2, 15)
    start, stream = Stream(3, 0, "sampling").normal(2, 4, 8, 8), Stream(3, 0, "sampling eta")
    ask = pipe.denoiser(text, camera, 2, 7.5)
    latents = ddim_sample(ask, start, pipe.schedule, 4, 7.5, eta=0.7, fresh=lambda: stream.normal(2, 4, 8, 8))
    assert torch.equal(pipe(PROMPT, 2, seed=3, eta=0.7, **FEW).tensor, pipe.decode(latents))


@pytest.mark.parametrize("how", ["eta", "EulerAncestralDiscreteScheduler", "DDPMScheduler", "DDIMScheduler"])
def test_each_prompt_of_a_batch_has_its_own_fresh_noise(pipe, how):
    options = {"eta": 1.0} if how in ("eta", "DDIMScheduler") else {}
    if how != "eta":
        clips = {"clip_sample": False} if how.startswith("DD") else {}
        options["scheduler"] = getattr(diffusers, how)(**pipe.scheduler_settings, **clips)
    prompts = [PROMPT, "a brown bulldog", "a red car"]
    together = pipe(prompts, 2, seed=5, **options, **FEW)
    for i, prompt in enumerate(prompts):
        close(together[i].tensor, pipe(prompt, 2, seed=5 + i, **options, **FEW).tensor, atol=1e-4)


@torch.no_grad()
def test_an_ancestral_scheduler_draws_as_from_one_generator(pipe):
    """A call of one prompt has kept its bytes: latents of 16 numbers or more are drawn alike one by one and at once."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**pipe.scheduler_settings)
    ask = pipe.denoiser(pipe.encode_prompt(PROMPT), get_camera(3, 15), 3, 7.5)
    start, generator = Stream(2, 0, "sampling").normal(3, 4, 8, 8), torch.Generator().manual_seed(2)
    latents = scheduler_sample(ask, start, scheduler, 4, 7.5, generator=generator)
    assert torch.equal(pipe(PROMPT, 3, seed=2, scheduler=scheduler, **FEW).tensor, pipe.decode(latents))


def test_words_that_others_stand_in_for_are_named_first():
    pipe = MVDreamPipeline.from_pretrained("embedded")
    assert pipe.unseen_words("a scarlet cello with a zyxw") == [
        "'scarlet' was not trained on: it is read as 'red'",
        "'cello' was not trained on: it is read as 'violin'",
        "the model does not know 'zyxw'",
    ]
    assert pipe.unseen_words("a grandfather clock")[0].endswith("it is read as 'clock'")
    assert pipe.unseen_words("justice") == ["the model does not know 'justice'"]
    assert not pipe.unseen_words("a brown shelf, roses, vehicles")  # tags in its captions, and plurals of other words
    read, meant = (pipe.encode_prompt(p, warn=lambda _: None).cond for p in ("a cello", "a violin"))
    assert torch.equal(read, meant)


def test_words_that_are_not_seen_are_named(pipe):
    said: list[str] = []
    prompt = "a green armchair with a red bulldog on a brown car"
    pipe.encode_prompt(prompt, warn=said.append)
    assert said == pipe.unseen_words(prompt)
    assert len(said) == 2
    # 12 tokens: start and end, four of ", 3 d asset", and six of "a green <armchair> <with> a red bulldog ..."
    assert said[0] == "the prompt has more than 10 tokens and is cut: not seen 'bulldog', 'on', 'a', 'brown', 'car'"
    assert said[1] == "the model does not know 'armchair', 'with', 'on'"
    with pytest.warns(UserWarning, match="does not know 'armchair'"):
        pipe.encode_prompt("a armchair", suffix="")


def test_suffix_is_added_once(pipe):
    assert split_suffix("a chair ") == ("a chair", ", 3d asset")
    assert split_suffix("a chair, 3D asset") == ("a chair", ", 3D asset")
    assert split_suffix("a chair", "") == ("a chair", "")
    with_suffix, bare, typed = (
        pipe.encode_prompt(text, suffix=suffix).cond
        for text, suffix in ((PROMPT, SUFFIX), (PROMPT, ""), (PROMPT + ", 3d asset", ""))
    )
    close(with_suffix, typed)
    assert (with_suffix - bare).abs().max() > 1e-3


def test_a_prompt_too_long_loses_its_own_last_words_and_never_the_suffix(pipe):
    """10 tokens fit: 4 are the suffix's (",", "3", "d", "asset"), so 6 of the prompt's 8 words stay."""
    prompt = "a green car and a red car chair"
    kept = pipe.encode_prompt("a green car and a red, 3d asset", suffix="").cond
    for text, suffix in ((prompt, SUFFIX), (prompt + ", 3d asset", SUFFIX)):  # added, or typed already
        with pytest.warns(UserWarning, match="more than 10 tokens and is cut: not seen 'car', 'chair'$"):
            assert torch.equal(pipe.encode_prompt(text, suffix=suffix).cond, kept)
    endings = [", 3d asset", ""]  # one for each
    both = pipe.encode_prompt([prompt, "a car"], suffix=endings, warn=lambda _: None).cond
    assert torch.equal(both[0], kept[0])
    close(both[1:], pipe.encode_prompt("a car", suffix="").cond)


def test_what_other_libraries_pass_is_taken(pipe):
    """None, NumPy and torch numbers, tuples and arrays of prompts, cameras of several kinds: the same views."""
    plain = pipe(PROMPT, 2, elevation_deg=20, guidance_scale=2, seed=3, **FEW)
    same = pipe(
        np.str_(PROMPT), np.int64(2), np.float32(20), negative_prompt=None, guidance_scale=torch.tensor(2.0),
        seed=np.uint8(3), n_steps=np.int32(4), camera=None, generator=None, scheduler=None, callback=None,
    )  # fmt: skip
    assert torch.equal(same.tensor, plain.tensor)
    bare = pipe(PROMPT, 2, suffix="", **FEW).tensor
    assert torch.equal(pipe(PROMPT, 2, suffix=None, **FEW).tensor, bare)
    several = [pipe(kind([PROMPT, "a car"]), 1, **FEW) for kind in (list, tuple, np.array)]
    assert [[view.prompt for view in views] for views in several] == [[PROMPT, "a car"]] * 3
    poses = get_camera(2, 20).reshape(2, 4, 4)
    for camera in (poses, poses.double(), poses.numpy(), poses.numpy().reshape(2, 16), poses.tolist(), list(poses)):
        views = pipe(PROMPT, camera=camera, guidance_scale=2, seed=3, **FEW)
        close(views.cameras, plain.cameras, 1e-6)
        close(views.tensor, plain.tensor, 1e-4)
    drawn = pipe(PROMPT, 1, seed=None, **FEW)
    assert torch.equal(drawn.tensor, pipe(PROMPT, 1, seed=drawn.seed, **FEW).tensor)
    latents = np.zeros((2, 4, 8, 8))
    assert torch.equal(pipe.decode(latents), pipe.decode(torch.zeros(2, 4, 8, 8)))


def test_devices_and_dtypes_as_objects(pipe):
    other = MVDreamPipeline(pipe.model, torch.device("cpu"), torch.float32)
    assert (other.device, other.dtype) == (torch.device("cpu"), torch.float32)
    with pytest.raises(ArgumentError, match="--device mps: the kernels are for cpu and cuda; take --device cpu"):
        MVDreamPipeline(pipe.model, "mps")
    with pytest.raises(ArgumentError, match="model must be a loaded Model, got str; MVDreamPipeline.from_pretrained"):
        MVDreamPipeline("embedded")


def test_text_cond_shapes(pipe):
    text = pipe.encode_prompt(["a car", "a chair", "a bulldog"])
    assert isinstance(text, TextCond)
    assert text.cond.shape == text.uncond.shape == (3, 12, 32)
    assert torch.equal(text.uncond[0], text.uncond[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "  \n"}, "the prompt is empty"),
        ({"prompt": []}, "there must be a prompt"),
        ({"prompt": "a\x00"}, "control character U\\+0000"),
        ({"prompt": "x" * 9000}, "at most 8192 bytes"),
        ({"n_views": 0}, "n_views must be at least 1, got 0"),
        ({"elevation_deg": float("nan")}, "elevation_deg must be from -90 to 90, got nan"),
        ({"elevation_deg": 120}, "elevation_deg must be from -90 to 90, got 120; 90 is straight above"),
        ({"azimuth_span_deg": float("inf")}, "azimuth_span_deg must be finite"),
        ({"prompt": None}, "prompt must be text or a list of texts, got None"),
        ({"prompt": 7}, "prompt must be text or a list of texts, got 7"),
        ({"prompt": b"a chair"}, "prompt must be text or a list of texts, got b'a chair'"),
        ({"prompt": [PROMPT, None]}, "prompt must be text or a list of texts"),
        ({"negative_prompt": 3}, "negative_prompt must be text or a list of texts, got 3"),
        ({"suffix": ["a", "b"]}, "suffix must be one, or one for each of the 1 prompts, got 2"),
        ({"n_views": "4"}, "n_views must be a whole number, got '4'"),
        ({"n_views": 4.0}, "n_views must be a whole number, got 4.0"),
        ({"n_views": True}, "n_views must be a whole number, got True"),
        ({"n_steps": None}, "n_steps must be a whole number, got None"),
        ({"guidance_scale": "7.5"}, "guidance_scale must be a number, got '7.5'"),
        ({"eta": "x"}, "eta must be a number, got 'x'"),
        ({"eta": 1.5}, "pipeline: eta must be from 0 to 1, got 1.5; 0 is DDIM, 1 has DDPM's variance"),
        ({"eta": -1}, "pipeline: eta must be from 0 to 1, got -1"),
        ({"eta": float("nan")}, "pipeline: eta must be from 0 to 1, got nan"),
        ({"scheduler": "ddim"}, "scheduler: it must be a diffusers scheduler with .*, got 'ddim'"),
        ({"scheduler": diffusers.DDIMScheduler}, "scheduler: it must be a diffusers scheduler"),
        (
            {"scheduler": diffusers.EDMEulerScheduler(prediction_type="v_prediction")},
            "with alphas_cumprod, got EDMEuler",
        ),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"generator": [torch.Generator()]}, "generator must be one torch.Generator, got list; or give a seed"),
        ({"generator": np.random.default_rng(0)}, "generator must be one torch.Generator, got Generator"),
        ({"callback": 3}, "callback must be a function"),
        ({"camera": "front"}, r"c2w must be numbers \[V, 4, 4\] or \[V, 16\], got 'front'"),
        ({"camera": np.eye(4)}, r"c2w must be \[V, 4, 4\] or \[V, 16\], got \[4, 4\]; one pose a view"),
        ({"camera": torch.zeros(0, 16)}, "camera must hold at least 1 pose"),
        ({"camera": torch.full((1, 16), float("nan"))}, "camera must hold finite numbers"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be finite"),
        ({"mode": "4d"}, "mode must be 3d or 2d, got '4d'"),
        ({"uncond_mode": "4d"}, "uncond_mode must be 3d or 2d, got '4d'"),
        ({"convention": "karras"}, "convention must be ldm or diffusers"),
    ],
)
def test_wrong_arguments(pipe, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        pipe(**{"prompt": PROMPT, **FEW, **arguments})


def test_wrong_latents(pipe):
    with pytest.raises(ArgumentError, match=r"decode: latents must be \[n, 4, h, w\], got \[4, 8, 8\]"):
        pipe.decode(np.zeros((4, 8, 8)))
    with pytest.raises(ArgumentError, match="decode: latents must be numbers .* got None"):
        pipe.decode(None)


def test_numbers_that_are_not_finite_are_not_drawn():
    pipe = MVDreamPipeline(random_model(), device="cpu", dtype="float32")
    with torch.no_grad():
        pipe.unet.out[2].bias[0] = float("nan")
    with pytest.raises(DivergedError, match="left the finite numbers; try --dtype float32"):
        pipe(PROMPT, **FEW)


def test_bfloat16_draws_nearly_the_same():
    exact = MVDreamPipeline(random_model(), device="cpu", dtype="float32")(PROMPT, guidance_scale=2.0, **FEW)
    pipe = MVDreamPipeline(random_model(), device="cpu", dtype="bfloat16")
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for m in (pipe.vae, pipe.text) for p in m.parameters()} == {torch.float32}
    rough = pipe(PROMPT, guidance_scale=2.0, **FEW)
    assert rough.tensor.dtype == torch.float32
    # 8 bits of mantissa through 4 guided steps; images span 0..1
    assert (rough.tensor - exact.tensor).abs().mean() < 0.02
    assert "bfloat16" in pipe.describe()


def test_the_vae_encodes_in_what_the_machine_says_and_decodes_in_float32(monkeypatch):
    asked = []
    monkeypatch.setattr("mvdream_fast.pipeline.encoder_dtype", lambda *own: asked.append(own) or torch.bfloat16)
    pipe = MVDreamPipeline.from_pretrained("embedded", "cpu", "float16")
    assert asked == [(torch.float16, torch.device("cpu"))]
    assert pipe.vae.model.encoder.conv_in.weight.dtype == torch.bfloat16
    assert pipe.vae.model.decoder.conv_in.weight.dtype == torch.float32


def test_a_model_of_noise_prediction_samples_too():
    views = MVDreamPipeline(random_model(prediction="eps"), device="cpu", dtype="float32")(PROMPT, **FEW)
    assert views.tensor.isfinite().all()


def test_a_saved_model_gives_the_same_views(pipe, tmp_path):
    save_model(pipe.model, tmp_path / "tiny")
    loaded = MVDreamPipeline.from_pretrained(str(tmp_path / "tiny"), device="cpu", dtype="float32")
    assert loaded.describe() == pipe.describe()
    close(loaded(PROMPT, **FEW).tensor, pipe(PROMPT, **FEW).tensor, atol=1e-6)


def test_parts_may_be_missing():
    model = random_model()
    model.text = model.tokenizer = None
    pipe = MVDreamPipeline(model, device="cpu")
    with pytest.raises(RuntimeError, match="must have its text tower"):
        pipe.encode_prompt(PROMPT)
