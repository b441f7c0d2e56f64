"""Variational score distillation: its formula, a learner that learns and changes nothing else, runs that go on."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from reference.graph_stand_in import GraphStandIn
from reference.random_model import ONE_LEVEL, TINY, random_model
from torch import Tensor

from mvdream_fast.camera import normalize_camera, sample_cameras
from mvdream_fast.camera_sampling import CameraSampling
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import TextCond
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.distill.config import replaced
from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.state import RunState
from mvdream_fast.distill.systems import mini
from mvdream_fast.guidance.config import GuidanceConfig
from mvdream_fast.guidance.vsd import Learner, VariationalScore
from mvdream_fast.models.config import ScheduleConfig, VAEConfig
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.text_to_3d import TextTo3D

PIXELS = dataclasses.replace(
    ONE_LEVEL,
    unet=dataclasses.replace(ONE_LEVEL.unet, in_channels=12, out_channels=12, camera_in="none", view_mixing="2d"),
    vae=VAEConfig("pixels", (), latent_channels=12, patch_size=2, image_size=16, scale_factor=1.0),
)  # of single images
SMALL = replaced(
    mini(), steps=6, render_size=(8,), samples_per_ray=16, kind="vsd", lora_lr=1e-2, elevation_range_deg=(0.0, 30.0)
)
MODES = ("3d", "2d")


class Says(torch.nn.Module):
    """A UNet that says one number for each prompt, whatever it is shown, and notes what it is told."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_context(self, context):
        return SimpleNamespace(context=context)

    def holding(self, prepared):
        return ()

    def forward(self, z_t, t, context, camera=None, n_views=1, n_prompts=1):
        self.calls.append((z_t, t, context, camera, n_views, n_prompts, torch.is_grad_enabled()))
        said = context.mean(dim=(1, 2)).repeat_interleave(n_views)
        return said[:, None, None, None].expand(-1, *z_t.shape[1:])


class Pools:
    """A VAE whose latents are the means of 2 x 2 pixels."""

    config = VAEConfig(block_out_channels=(1, 1), latent_channels=3, image_size=8)

    def encode(self, images, noise=None):
        return torch.nn.functional.avg_pool2d(images, 2)


def says(number: float) -> Tensor:
    return torch.full((1, 2, 4), number)


def constant_schedule(prediction: str) -> NoiseSchedule:
    """abar = 0.64 at each of ten timesteps: alpha 0.8, sigma 0.6."""
    tables = (torch.full((10,), x) for x in (0.64, 0.8, 0.6))
    return NoiseSchedule(*tables, ScheduleConfig(prediction=prediction))


def stubbed(prediction: str, cond: float, uncond: float, learned: float, scale: float = 7.5, multi_view: bool = True):
    """The score of stubs that say these numbers."""
    words = says(learned)
    learner = SimpleNamespace(
        unet=Says(), told=lambda camera: camera, spread_words=lambda n: words.expand(n, -1, -1), learn=lambda *x: x
    )
    return VariationalScore(
        Says(), Pools(), constant_schedule(prediction), TextCond(says(cond), says(uncond)),
        GuidanceConfig(guidance_scale=scale), learner, multi_view,
    )  # fmt: skip


def images(n: int = 8, side: int = 8) -> Tensor:
    return Stream(0, 0, "images").uniform(n, 3, side, side).requires_grad_()


def poses(n: int = 8) -> Tensor:
    return sample_cameras(CameraSampling(n_views=n), Stream(0, 0, "cameras")).c2w


@pytest.mark.parametrize(("prediction", "on_latents"), [("eps", 0.9), ("v", 0.72)])
def test_the_gradient_is_the_published_one_on_worked_numbers(prediction, on_latents):
    """With guidance -0.2 + 7.5 (0.3 + 0.2) = 3.55, the learner 1.05: 2.5 apart. w = 1 - 0.64 = 0.36 makes 0.9 of
    noises; of v-predictions, whose noises are 0.8 v + 0.6 z_t, 0.36 * 0.8 * 2.5. Latents are 2 rgb - 1, each of four
    pixels, and the loss is a mean over eight images."""
    score, rgb = stubbed(prediction, cond=0.3, uncond=-0.2, learned=1.05), images()
    (d_rgb,) = torch.autograd.grad(score(rgb, poses(), 4, 0, Stream(0, 0, "g")).loss, rgb)
    torch.testing.assert_close(d_rgb, torch.full_like(rgb, on_latents / 8 * 2 / 4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("loss", ["x0", "sds"])
def test_a_learner_that_says_the_same_leaves_no_gradient(prediction, loss):
    score, rgb = stubbed(prediction, cond=0.25, uncond=0.25, learned=0.25, scale=1.0), images()
    out = score(rgb, poses(), 4, 0, Stream(0, 0, "g"))
    (d_rgb,) = torch.autograd.grad(out.loss, rgb)
    assert (float(out.loss.detach()), float(d_rgb.abs().max())) == (0.0, 0.0)


@pytest.mark.parametrize("multi_view", [True, False])
def test_who_is_told_what(multi_view):
    score, n_views = stubbed("eps", 0.3, -0.2, 1.05, multi_view=multi_view), 4 if multi_view else 1
    c2w = poses()
    out = score(
        images(),
        c2w,
        n_views,
        0,
        Stream(0, 0, "g"),
        text=None if multi_view else TextCond(says(2.0), says(1.0)).repeat(8),
    )
    ((z_t, t, words, camera, views, n_prompts, graph),) = score.unet.calls
    ((own_z_t, own_t, own_words, own_camera, own_views, own_prompts, own_graph),) = score.learner.unet.calls
    assert torch.equal(z_t, own_z_t)
    assert (int(t), int(own_t)) == (out.t, out.t)
    assert (views, n_prompts, own_views, own_prompts, graph, own_graph) == (n_views, 2, n_views, 1, False, False)
    assert torch.equal(own_camera, normalize_camera(c2w))
    assert (camera is None) == (not multi_view)
    assert words[0, 0, 0] == (-0.2 if multi_view else 1.0)  # without the prompt first
    assert own_words.unique().tolist() == pytest.approx([1.05])


def pipeline(config=TINY, dtype: str = "float32", graphs: bool = True, **options) -> MVDreamPipeline:
    return MVDreamPipeline(random_model(config=config, **options), "cpu", dtype, graphs)


def learner_of(pipe: MVDreamPipeline, knows_cameras: bool = True, **options) -> Learner:
    settings = GuidanceConfig(**{"kind": "vsd", "lora_lr": 1e-2} | options)
    words = pipe.encode_prompt("a red car", warn=lambda _: None).to(pipe.dtype).cond
    return Learner(pipe.unet, pipe.schedule, words, settings, knows_cameras)


def fixed(pipe: MVDreamPipeline, n: int = 8) -> tuple[Tensor, Tensor]:
    """Latents and cameras."""
    latents = Stream(1, 0, "latents").normal(n, pipe.config.unet.in_channels, *(pipe.config.latent_size,) * 2)
    return latents, normalize_camera(poses(n))


@pytest.mark.parametrize("knows_cameras", [True, False])
def test_at_first_the_learner_is_the_model(knows_cameras):
    """So that the first gradient is that of the guidance alone, w (s - 1) (eps_c - eps_u)."""
    pipe = pipeline()
    learner, (z, camera) = learner_of(pipe, knows_cameras), fixed(pipe)
    n_views, t = (4, torch.tensor(500)) if knows_cameras else (1, torch.tensor(500))
    words = learner.spread_words(8 // n_views)
    with torch.no_grad():
        own = learner.unet(z, t, words, camera, n_views)
        theirs = pipe.unet(z, t, words, camera if knows_cameras else None, n_views)
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("knows_cameras", [True, False])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_learner_learns_and_the_frozen_weights_keep_their_bytes(prediction, knows_cameras):
    pipe = pipeline(prediction=prediction)
    learner, (z, camera) = learner_of(pipe, knows_cameras, camera_dropout=0.0, lora_lr=2e-2), fixed(pipe)
    before = {name: x.clone() for name, x in pipe.unet.state_dict().items()}
    n_views = 4 if knows_cameras else 1
    with torch.no_grad():
        said = pipe.unet(z, torch.tensor(300), learner.spread_words(8 // n_views), None, n_views)
    losses = [float(learner.learn(z, camera, n_views, Stream(0, 0, "the same"))) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(x, before[name]) for name, x in pipe.unet.state_dict().items())
    with torch.no_grad():
        assert torch.equal(said, pipe.unet(z, torch.tensor(300), learner.spread_words(8 // n_views), None, n_views))
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_the_loss_is_the_error_of_the_models_own_prediction():
    """Drawn again by hand: one timestep for each group of views from the whole schedule, noise, the target in v."""
    pipe = pipeline()
    learner, (z, camera) = learner_of(pipe), fixed(pipe)
    loss = learner.learn(z, camera, 4, Stream(3, 0, "g"))
    stream = Stream(3, 0, "g")
    t = stream.integers(0, 1000, 2)
    noise = stream.normal(*z.shape)
    abar = pipe.schedule.alphas_cumprod[t.repeat_interleave(4)].double()[:, None, None, None]
    z_t, v = abar.sqrt() * z + (1 - abar).sqrt() * noise, abar.sqrt() * noise - (1 - abar).sqrt() * z
    with torch.no_grad():
        out = pipe.unet(z_t.float(), t.repeat_interleave(4), learner.spread_words(2), camera, 4)
    assert float(loss) == pytest.approx(float((out - v).square().mean()), rel=1e-4)


def test_the_first_step_is_adamw_of_that_loss():
    """Adam's first step is the learning rate against the gradient's sign, whatever the scale of the loss; an adapter's
    B begins at zero, which decay leaves there."""
    pipe = pipeline()
    learner, (z, camera) = learner_of(pipe), fixed(pipe)
    learner.learn(z, camera, 4, Stream(3, 0, "g"))
    steps = [p.detach().abs() for name, p in learner.learned.items() if ".lora_B." in name]
    assert steps
    for step in steps:
        torch.testing.assert_close(step[step > 0], torch.full_like(step[step > 0], 1e-2), rtol=1e-4, atol=0)


def test_a_camera_of_its_own_is_learned_and_dropped_as_often_as_asked(monkeypatch):
    pipe = pipeline(ONE_LEVEL)
    learner, (z, camera) = learner_of(pipe, knows_cameras=False), fixed(pipe)
    with torch.no_grad():
        first, other = (
            learner.unet(z, torch.tensor(9), learner.spread_words(8), c, 1) for c in (camera, camera.flip(0))
        )
    assert torch.equal(first, other)
    for step in range(3):
        learner.learn(z, camera, 1, Stream(0, step, "g"))
    with torch.no_grad():
        first, other = (
            learner.unet(z, torch.tensor(9), learner.spread_words(8), c, 1) for c in (camera, camera.flip(0))
        )
    assert not torch.allclose(first, other, atol=1e-4)
    told = []

    def descent(unet, schedule, n_views, latents, noise, t, camera, words):
        told.append(camera)
        return torch.zeros(()), torch.tensor(False)

    monkeypatch.setattr(learner, "_descent", descent)
    for step in range(500):
        learner.learn(z, camera, 1, Stream(0, step, "g"))
    gone = torch.cat([(c == 0).all(1) for c in told])
    kept = torch.cat([(c == camera).all(1) for c in told])
    assert bool((gone ^ kept).all())
    assert 0.08 < float(gone.float().mean()) < 0.12  # of 4000, four standard deviations of 0.1 are 0.019


def test_cameras_that_the_model_knows_are_never_dropped(monkeypatch):
    learner = learner_of(pipe := pipeline(ONE_LEVEL), camera_dropout=1.0)
    z, camera = fixed(pipe)
    told = []
    monkeypatch.setattr(
        learner, "_descent", lambda *x: (told.append(x[6]), (torch.zeros(()), torch.tensor(False)))[1]
    )  # fmt: skip
    learner.learn(z, camera, 4, Stream(0, 0, "g"))
    assert torch.equal(told[0], camera)


def test_numbers_that_are_not_finite_teach_nothing():
    learner = learner_of(pipe := pipeline(ONE_LEVEL))
    z, camera = fixed(pipe)
    learner.learn(z, camera, 4, Stream(0, 0, "g"))
    before = {name: x.clone() for name, x in learner.state().items()}
    assert not learner.learn(z.index_fill(0, torch.tensor([3]), float("nan")), camera, 4, Stream(0, 1, "g")).isfinite()
    assert all(torch.equal(x, before[name]) for name, x in learner.state().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("knows_cameras", [True, False])
def test_beside_weights_of_16_bits_what_is_learned_has_32(dtype, knows_cameras):
    pipe = pipeline(ONE_LEVEL, dtype)
    learner, (z, camera) = learner_of(pipe, knows_cameras, camera_dropout=0.0), fixed(pipe)
    losses = [float(learner.learn(z, camera, 4 if knows_cameras else 1, Stream(0, 0, "g"))) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in learner.learned.values()} == {torch.float32}
    assert {p.dtype for name, p in learner.unet.named_parameters() if name not in learner.learned} == {pipe.dtype}


def test_a_learners_state_goes_on_with_the_same_bytes_and_another_ones_is_refused():
    pipe = pipeline(ONE_LEVEL)
    z, camera = fixed(pipe)
    one, other = learner_of(pipe), learner_of(pipe)
    for step in range(3):
        one.learn(z, camera, 4, Stream(0, step, "g"))
    other.restore({name: x.clone() for name, x in one.state().items()})
    for learner in (one, other):
        learner.learn(z, camera, 4, Stream(0, 3, "g"))
    states = one.state(), other.state()
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) == 4 * len(one.learned)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    with pytest.raises(ModelError, match=r"lora_A\S* is \[4, 32\], not \[2, 32\]; start a new run"):
        learner_of(pipe, lora_rank=2).restore(one.state())
    with pytest.raises(ModelError, match="camera_embed.0.weight is missing"):
        learner_of(pipe, knows_cameras=False).restore(one.state())


def run(pipe, config, **options):
    return TextTo3D(pipe)("a red car", config=config, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("particles", [1, 2])
def test_a_stopped_run_goes_on_with_the_same_bytes(tmp_path, mode, particles):
    pipe, config = pipeline(ONE_LEVEL), replaced(SMALL, mode=mode, particles=particles)
    whole = run(pipe, config, checkpoints=tmp_path / "whole", checkpoint_every=1)
    stop = SimpleNamespace(requested=None, exit_code=130)

    def callback(progress):
        stop.requested = 2 if progress.record.step + 1 == 3 else None

    run(pipe, config, checkpoints=tmp_path / "cut", callback=callback, interrupt=stop)
    resumed = run(pipe, config, checkpoints=tmp_path / "cut")
    assert all(torch.equal(x, resumed.state()[name]) for name, x in whole.state().items())
    ends = [(tmp_path / name / "000006.safetensors").read_bytes() for name in ("whole", "cut")]
    assert ends[0] == ends[1]  # the learner's weights and moments among them


@pytest.mark.parametrize("mode", MODES)
def test_a_run_with_the_embedded_model(mode):
    """The asset moves, and so does the learner; the model that both go by does not."""
    pipe = MVDreamPipeline.from_pretrained("embedded", "cpu", "float32")
    config = replaced(mini(), steps=3, render_size=(16,), kind="vsd", mode=mode)
    guidance = new_guidance(pipe, "a green chair", config, 0)
    before = {name: x.clone() for name, x in guidance.state().items()}
    state = RunState(config, "a green chair", 0, guidance)
    start = {name: x.clone() for name, x in state.representation.state().items()}
    records = [state.step(step) for step in range(3)]
    assert all(0 < record.loss < 1e4 and record.t and not record.skipped for record in records)
    moved = [name for name, x in state.representation.state().items() if not torch.equal(x, start[name])]
    assert "volume.table" in moved
    learned = [name for name, x in guidance.state().items() if name in before and not torch.equal(x, before[name])]
    assert len(learned) == len(before)
    assert ("learned.camera_embed.0.weight" in before) == (mode == "2d")


@pytest.mark.usefixtures("capturable_without_a_word")
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (ONE_LEVEL, {}),
        (ONE_LEVEL, {"view_words": True, "timesteps": "each", "weighting": "fantasia3d"}),
        (PIXELS, {"mode": "2d", "perp_neg": True, "timesteps": "each", "grad_clip": (0.0, 2.0, 0.1, 8.0)}),
    ],
    ids=["plain", "3d", "2d"],
)
def test_a_run_has_the_same_bytes_with_graphs(model, settings):
    sizes = {"milestones": (4,), "render_size": (8, 12), "n_groups": (1, 1)}
    config, ends = replaced(SMALL, **sizes, steps=8, **settings), []
    for graphs in (True, False):
        state = RunState(config, "a red car", 0, new_guidance(pipeline(model, graphs=graphs), "a red car", config, 0))
        records = [state.step(step) for step in range(config.steps)]
        ends.append(([(r.loss, r.t) for r in records], state.state()))
    (ours, own), (plain, other) = ends
    assert ours == plain
    assert all(torch.equal(own[name], other[name]) for name in other)
    assert own.keys() == other.keys()
    assert len(GraphStandIn.made) == 3  # the guidance at both sizes, and the learner's step


def test_the_twin_is_the_models_own_weights():
    pipe = pipeline()
    learner = learner_of(pipe)
    frozen = {
        name.replace(".base_layer.", "."): p for name, p in learner.unet.named_parameters() if not p.requires_grad
    }
    ours = dict(pipe.unet.named_parameters())
    assert frozen.keys() == ours.keys()
    assert all(frozen[name] is p for name, p in ours.items())
    pipe.unet.load_state_dict(random_model(seed=1).unet.state_dict())
    z, camera = fixed(pipe)
    with torch.no_grad():
        pair = [unet(z, torch.tensor(5), learner.spread_words(2), camera, 4) for unet in (learner.unet, pipe.unet)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_cameras_in_the_attention_are_left_out_where_the_model_is_asked_in_2d():
    """A learner's camera is told by its own embedding alone."""
    config = dataclasses.replace(ONE_LEVEL, unet=dataclasses.replace(ONE_LEVEL.unet, camera_in="attention"))
    pipe = pipeline(config)
    learner, (z, camera) = learner_of(pipe, knows_cameras=False), fixed(pipe)
    with torch.no_grad():
        learner.unet.camera_embed[2].bias.fill_(0.3)
        learner.unet.camera_embed[2].weight.zero_()
        told = learner.unet(z, torch.tensor(5), learner.spread_words(8), camera, 1)
        pipe.unet.time_embed[2].bias.add_(0.3)
        shifted = pipe.unet(z, torch.tensor(5), learner.spread_words(8), None, 1)
        pipe.unet.time_embed[2].bias.sub_(0.3)
    torch.testing.assert_close(told, shifted, rtol=1e-4, atol=1e-5)
