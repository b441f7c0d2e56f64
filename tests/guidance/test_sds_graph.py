"""Score distillation as one graph, from the rendered images to their gradient: the bits that it gives without, whatever
has changed since it was captured. The graphs are reference/graph_stand_in.py's, which refuses what CUDA would.
"""

import dataclasses
import itertools

import pytest
import torch
from reference.graph_stand_in import GraphStandIn
from reference.random_model import MODELS, ONE_LEVEL, random_model

from mvdream_fast.camera import sample_cameras
from mvdream_fast.camera_sampling import CameraSampling
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import TextCond
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.distill.config import replaced
from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.state import RunState
from mvdream_fast.distill.systems import mini
from mvdream_fast.guidance.config import GuidanceConfig
from mvdream_fast.guidance.sds import ScoreDistillation, SDSLoss
from mvdream_fast.models import lora
from mvdream_fast.models.config import ScheduleConfig, UNetConfig, VAEConfig
from mvdream_fast.models.deepfloyd import DeepFloydUNet
from mvdream_fast.models.pixels import Pixels
from mvdream_fast.pipeline import MVDreamPipeline

pytestmark = pytest.mark.usefixtures("capturable_without_a_word")


@pytest.fixture
def pipe() -> MVDreamPipeline:
    return MVDreamPipeline(random_model(config=ONE_LEVEL), "cpu", "float32")


def distillations(pipe, text: TextCond | None, **options) -> tuple[ScoreDistillation, ...]:
    """With graphs and without."""
    parts = (pipe.unet, pipe.vae, pipe.schedule, text, GuidanceConfig())
    return tuple(ScoreDistillation(*parts, graphs=graphs, **options) for graphs in (True, False))


def asked(score: ScoreDistillation, key: int, n_groups: int = 1, n_views: int = 4, side: int = 20, **options):
    """Loss, gradient on the images and target of images, cameras, noises and a timestep that the key tells."""
    cameras = sample_cameras(CameraSampling(n_views=n_views), Stream(key, 0, "cameras"), n_groups)
    rgb = Stream(key, 0, "rgb").uniform(n_groups * n_views, 3, side, side).requires_grad_()
    c2w = None if n_views == 1 else cameras.c2w
    out: SDSLoss = score(rgb, c2w, n_views, 2000 * key, Stream(key, 0, "guidance"), **options)
    return out.loss.detach(), torch.autograd.grad(out.loss, rgb)[0], out.target


def agree(pair: tuple[ScoreDistillation, ...], key: int, **options):
    ours, eager = (asked(score, key, **options) for score in pair)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    return ours


def graphs() -> int:
    return len(GraphStandIn.made)


def memory(*tensors) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_all_images_noises_steps_and_cameras(name):
    model = MODELS[name]()
    pipe = MVDreamPipeline(model, "cpu", "float32")
    pair = distillations(pipe, pipe.encode_prompt("a red car", warn=lambda _: None))
    losses = [agree(pair, key)[0] for key in range(4)]
    assert (graphs(), GraphStandIn.replays) == (1, 3)
    assert len({*map(float, losses)}) == 4
    # It reads its arguments, the weights and the schedule, and nothing that was worked out before.
    (graph,), ((recorded),) = GraphStandIn.made, pair[0]._whole._kinds.values()
    schedule = (pipe.schedule.alphas, pipe.schedule.sigmas, pipe.schedule.alphas_cumprod)
    known = memory(*recorded.inputs, *schedule)
    for module in (pipe.unet, pipe.vae):
        known |= memory(*module.parameters(), *module.buffers())
    assert graph.outside.keys() <= known


def test_a_model_of_diffusers_and_of_pixels_is_one_graph_too():
    unet = DeepFloydUNet(
        UNetConfig(
            kind="deepfloyd", in_channels=3, out_channels=3, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
            attention_resolutions=(2,), num_head_channels=16, context_dim=64, camera_in="none", view_mixing="2d",
        )
    ).requires_grad_(False)  # fmt: skip
    pixels = Pixels(VAEConfig(kind="pixels", block_out_channels=(), latent_channels=3, scale_factor=1, image_size=16))
    schedule = NoiseSchedule.from_config(ScheduleConfig(beta_schedule="squaredcos_cap_v2"))
    text = TextCond(*Stream(0, 0, "text").normal(2, 1, 9, 64).unbind())
    pair = [ScoreDistillation(unet, pixels, schedule, text, GuidanceConfig(), graphs=on) for on in (True, False)]
    losses = [agree((pair[0], pair[1]), key, n_groups=2, n_views=1)[0] for key in range(3)]
    assert (graphs(), GraphStandIn.replays) == (1, 2)
    assert len({*map(float, losses)}) == 3


def test_prompts_of_each_call_groups_views_and_sizes(pipe):
    """Each twice over, in turns. Without cameras every view brings its own prompt."""
    pair, own = distillations(pipe, pipe.encode_prompt("a red car")), distillations(pipe, None)
    sides = pipe.encode_prompt(["a red car", "a green chair", "a brown bulldog"])
    for key in range(3):
        agree(pair, key)
        agree(pair, key, n_groups=2)
        agree(pair, key, n_views=3)
        agree(pair, key, side=16)
        agree(pair, key, side=64)
        rows = torch.tensor([key, (key + 1) % 3])
        agree(own, key, n_groups=2, n_views=1, text=TextCond(sides.cond[rows], sides.uncond[rows]))
    assert graphs() == 6


@pytest.mark.parametrize(
    "change", [{"guidance_scale": 7.0}, {"rescale": 0.0}, {"loss": "sds"}, {"max_step": (0.0, 0.5, 0.5, 1.0)}]
)
def test_another_setting_is_seen(pipe, change):
    pair = distillations(pipe, pipe.encode_prompt("a red car"))
    before = [agree(pair, key) for key in range(3)][-1]
    for score in pair:
        score.config = dataclasses.replace(score.config, **change)
    after = [agree(pair, key) for key in range(3)][-1]
    assert not torch.equal(before[1], after[1])


def test_the_posterior_s_mean_and_other_parts_are_seen(pipe):
    pair = distillations(pipe, pipe.encode_prompt("a red car"))
    answers = [[agree(pair, key) for key in range(3)][-1]]
    other = MVDreamPipeline(random_model(1, "eps", ONE_LEVEL), "cpu", "float32")
    text = other.encode_prompt("a green chair")
    for change in (
        {"sample_posterior": False}, {"schedule": other.schedule}, {"vae": other.vae}, {"unet": other.unet},
        {"text": text},
    ):  # fmt: skip
        for score in pair:
            vars(score).update(change)
        answers.append([agree(pair, key) for key in range(3)][-1])
    assert all(not torch.equal(a[1], b[1]) for a, b in itertools.pairwise(answers))


def test_weights_that_are_written_replaced_or_adapted_are_seen(pipe):
    pair = distillations(pipe, pipe.encode_prompt("a red car"))
    other = random_model(seed=1, config=ONE_LEVEL)
    answers = [[agree(pair, key) for key in range(3)][-1]]

    def write(layer, value: float) -> None:
        with torch.no_grad():
            layer.lora_B["default"].weight.fill_(value)

    for change in (
        lambda: pipe.unet.load_state_dict(other.unet.state_dict()),
        lambda: pipe.vae.load_state_dict(other.vae.state_dict()),
        lambda: pipe.unet.load_state_dict(random_model(seed=2, config=ONE_LEVEL).unet.state_dict(), assign=True),
        lambda: lora.add_adapters(pipe.unet, 2),
        lambda: [write(layer, 0.1) for layer in lora.adapted(pipe.unet)],
        lambda: [layer.merge() for layer in lora.adapted(pipe.unet)],
    ):
        change()
        answers.append([agree(pair, key) for key in range(3)][-1])
    pairs = [(a[1], b[1]) for a, b in itertools.pairwise(answers)]
    same = [bool((a - b).abs().max() < 1e-3 * a.abs().max()) for a, b in pairs]
    assert same == [False, False, False, True, False, True]  # adapters begin as nothing, and merging changes nothing


def test_answers_are_kept_from_the_next_one(pipe):
    score = distillations(pipe, pipe.encode_prompt("a red car"))[0]
    kept = [asked(score, key) for key in range(4)]
    again = [asked(score, key) for key in range(4)]
    for a, b in zip(kept, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_scaled_loss_scales_the_gradient_and_an_unasked_one_has_none(pipe):
    score = distillations(pipe, pipe.encode_prompt("a red car"))[0]
    asked(score, 0)
    gradients = []
    for factor in (1.0, -2.0):
        rgb = Stream(1, 0, "rgb").uniform(4, 3, 16, 16).requires_grad_()
        loss = score(rgb, torch.eye(4).expand(4, 4, 4) + 0.5, 4, 0, Stream(1, 0, "g")).loss
        gradients.append(torch.autograd.grad(factor * loss, rgb)[0])
    torch.testing.assert_close(gradients[1], -2 * gradients[0])
    assert not score(rgb.detach(), torch.eye(4).expand(4, 4, 4) + 0.5, 4, 0, Stream(1, 0, "g")).loss.requires_grad


@pytest.mark.parametrize(
    "options",
    [{}, {"updates_per_guidance": 2}, {"match": "pixels", "updates_per_guidance": 2}, {"mode": "2d"}],
    ids=["plain", "every other step", "pixels", "2d"],
)
def test_a_run_has_the_same_bytes_with_graphs(options):
    sizes = {"milestones": (4,), "render_size": (8, 12), "n_groups": (1, 1), "samples_per_ray": 16}
    config = replaced(mini(), **sizes | {"steps": 8} | options)
    states, records = [], []
    for graphs_wanted in (True, False):
        pipe = MVDreamPipeline(random_model(config=ONE_LEVEL), "cpu", "float32", graphs=graphs_wanted)
        state = RunState(config, "a red car", 0, new_guidance(pipe, "a red car", config, 0))
        steps = [state.step(step) for step in range(config.steps)]
        records.append([(r.loss, r.t, r.opacity) for r in steps])
        states.append(state.state())
    assert records[0] == records[1]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert graphs() == (1 if options.get("match") == "pixels" else 2)  # of the UNet alone, or one for each size
