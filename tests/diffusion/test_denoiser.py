"""The guided call as a graph gives the bits that it gives without, whatever has changed since it was captured.

The graphs are reference/graph_stand_in.py's: what they cannot hold, these tests would refuse.
"""

import copy
import dataclasses
import itertools

import pytest
import torch
from reference.graph_stand_in import GraphStandIn
from reference.random_model import MODELS, TINY, random_model

from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import Denoiser, TextCond, guided_call
from mvdream_fast.models import captured, lora
from mvdream_fast.models.captured import Captured
from mvdream_fast.pipeline import MVDreamPipeline

pytestmark = pytest.mark.usefixtures("capturable_without_a_word")


@pytest.fixture
def unet():
    return random_model().unet


def text_of(unet, key: int, n: int = 1) -> TextCond:
    stream = Stream(key, 0, "text")
    return TextCond(*(stream.normal(n, 5, unet.config.context_dim) for _ in range(2)))


def inputs(unet, key: int, n_images: int = 4, side: int = 8):
    """latents, t and cameras, all others for another key."""
    stream = Stream(key, 0, "inputs")
    latents = stream.normal(n_images, unet.config.in_channels, side, side)
    return latents, stream.integers(0, 1000, 1)[0], stream.normal(n_images, 16)


def agree(call: Captured, unet, text: TextCond, arguments, n_views: int = 4, guided: bool = True) -> torch.Tensor:
    """The answer with graphs, which must be that of a denoiser without, to the bit."""
    answer = Denoiser(unet, text, n_views, guided, call)(*arguments)
    assert torch.equal(answer, Denoiser(unet, text, n_views, guided)(*arguments))
    return answer


def graphs() -> int:
    return len(GraphStandIn.made)


def weights_of(*modules) -> set[int]:
    return {x.untyped_storage().data_ptr() for m in modules for x in (*m.parameters(), *m.buffers())}


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_all_latents_steps_cameras_and_prompts(name):
    unet, call = MODELS[name]().unet, guided_call()
    answers = [agree(call, unet, text_of(unet, key), inputs(unet, key)) for key in range(4)]
    assert (graphs(), GraphStandIn.replays) == (1, 3)
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(answers))
    # It reads its arguments and the weights, and nothing that was worked out before.
    (graph,) = GraphStandIn.made
    ((recorded),) = call._kinds.values()
    arguments = {x.untyped_storage().data_ptr() for x in recorded.inputs}
    assert graph.outside.keys() <= arguments | weights_of(unet)


def test_four_prompts_in_one_call(unet):
    """Without the prompt, with it, and two to be led away from: in one batch what each is alone, and one graph."""
    call = guided_call()
    for key in range(3):
        stream = Stream(key, 1, "away")
        first, second = (stream.normal(4, 5, unet.config.context_dim) for _ in range(2))
        text = text_of(unet, key, 4)
        text = TextCond(text.cond, text.uncond, torch.cat([first, second]))
        latents, t, _ = inputs(unet, key)
        answer = agree(call, unet, text, (latents, t, None), n_views=1)
        alone = [
            Denoiser(unet, TextCond(x, x), 1, guided=False)(latents, t) for x in (text.uncond, text.cond, first, second)
        ]
        torch.testing.assert_close(answer, torch.cat(alone), rtol=1e-4, atol=1e-5)
        again = text.repeat(2).to(torch.float64)
        assert torch.equal(again.away, torch.cat([first, second]).repeat_interleave(2, dim=0).double())
    assert graphs() == 1


def test_a_camera_is_worked_out_anew(unet):
    """What the prototype found: the embedding of the last camera is kept, and a graph would have kept it for ever."""
    call, text, (latents, t, camera) = guided_call(), text_of(unet, 0), inputs(unet, 0)
    denoiser = Denoiser(unet, text, 4, captured=call)
    for _ in range(3):
        denoiser(latents, t, camera)
    for key in (1, 2):
        camera = inputs(unet, key)[2]
        assert torch.equal(denoiser(latents, t, camera), Denoiser(unet, text, 4)(latents, t, camera))
    assert graphs() == 1


def test_every_form_of_call_has_a_graph_of_its_own(unet):
    """Views, scenes, sides, 2D mode, a step for each image, without guidance; each twice over, in turns."""
    call = guided_call()
    for key in range(3):
        latents, t, camera = inputs(unet, key)
        text, two = text_of(unet, key), text_of(unet, key, 2)
        agree(call, unet, text, (latents, t, camera))
        agree(call, unet, two, (latents, t, camera), n_views=2)
        agree(call, unet, text, inputs(unet, key, 3), n_views=3)
        agree(call, unet, text, inputs(unet, key, 4, 16))
        agree(call, unet, text.repeat(4), (latents, t, None), n_views=1)
        agree(call, unet, text, (latents, t.expand(4).clone(), camera))
        agree(call, unet, text, (latents, t, camera), guided=False)
        agree(call, unet, text, (latents.double(), t, camera))
    assert graphs() == 8


@pytest.mark.parametrize(("camera_in", "view_mixing"), [("text", "3d"), ("attention", "3d"), ("time", "temporal")])
def test_all_ways_of_cameras_and_views(camera_in, view_mixing):
    options = dataclasses.replace(TINY.unet, camera_in=camera_in, view_mixing=view_mixing)
    unet, call = random_model(config=dataclasses.replace(TINY, unet=options)).unet, guided_call()
    for key in range(3):
        agree(call, unet, text_of(unet, key), inputs(unet, key))
    assert graphs() == 1


def test_weights_that_are_written_are_read_by_the_same_denoiser(unet):
    """Its keys and values do not hold any more: they are worked out again, here in the graph."""
    call, text = guided_call(), text_of(unet, 0)
    denoiser = Denoiser(unet, text, 4, captured=call)
    before = copy.deepcopy(unet.state_dict())
    for _ in range(3):
        denoiser(*inputs(unet, 0))
    changes = (
        lambda: unet.load_state_dict(random_model(seed=1).unet.state_dict()),
        lambda: unet.load_state_dict(before),
        lambda: unet.load_state_dict(random_model(seed=2).unet.state_dict(), assign=True),
    )
    answers = []
    for change in changes:
        change()
        for key in range(3):
            answers.append(denoiser(*inputs(unet, key)))
            assert torch.equal(answers[-1], Denoiser(unet, text, 4)(*inputs(unet, key)))
    assert (answers[0] - answers[3]).abs().max() > 1e-3


def test_half_precision(unet):
    call = guided_call()
    unet.bfloat16()
    for key in range(3):
        text = text_of(unet, key).to(torch.bfloat16)
        assert agree(call, unet, text, inputs(unet, key)).dtype == torch.float32
    assert graphs() == 1


def test_adapters_that_are_trained_switched_and_merged(unet):
    call, text = guided_call(), text_of(unet, 0)
    agree(call, unet, text, inputs(unet, 0))
    layers = lora.add_adapters(unet, 2)
    denoiser = Denoiser(unet, text, 4, captured=call)
    answers = []

    def ask() -> None:
        for key in range(3):
            answers.append(denoiser(*inputs(unet, key)))
            assert torch.equal(answers[-1], Denoiser(unet, text, 4)(*inputs(unet, key)))

    def write() -> None:
        with torch.no_grad():
            for i, layer in enumerate(layers):
                layer.lora_B["default"].weight.copy_(Stream(0, i, "b").normal(*layer.lora_B["default"].weight.shape))

    def all_layers(work) -> None:
        for layer in layers:
            work(layer)

    write()
    ask()
    changes = (
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.merge(),
        lambda layer: layer.unmerge(),
    )
    for change in changes:
        n = graphs()
        all_layers(change)
        ask()
        assert graphs() == n + 1
    off, on, strong, merged, apart = (answers[3 * i] for i in range(1, 6))
    for a, b in ((off, on), (on, strong), (off, merged)):
        assert (a - b).abs().max() > 1e-4
    torch.testing.assert_close(strong, merged, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(strong, apart, rtol=1e-3, atol=1e-4)


def test_two_models_at_once():
    unets, calls = [random_model(seed).unet for seed in range(2)], [guided_call(), guided_call()]
    for key in range(3):
        outs = [agree(call, unet, text_of(unet, key), inputs(unet, key)) for unet, call in zip(unets, calls)]
        assert (outs[0] - outs[1]).abs().max() > 1e-3
    assert graphs() == 2


def test_a_pipeline_draws_the_same_views_with_graphs():
    """Two pipelines; prompts, numbers of views, scales, modes and eta change from call to call."""

    def calls(pipe):
        yield pipe("a red car", n_steps=5)
        yield pipe("a brown bulldog", n_steps=5, seed=3, elevation_deg=40.0)
        yield pipe("a red car", 3, n_steps=4, guidance_scale=2.0, negative_prompt="a green chair")
        yield pipe("a red car", n_steps=4, guidance_scale=1.0)
        yield pipe("a red car", n_steps=4, mode="2d")
        yield pipe("a red car", n_steps=4, eta=1.0)
        yield from pipe(["a red car", "a green chair"], 2, n_steps=4)

    made = list(calls(MVDreamPipeline(random_model(), "cpu", "float32")))
    n, replays = graphs(), GraphStandIn.replays
    assert n == 5  # four views, three, without guidance, 2D, and two scenes of two
    assert replays > n
    plain = list(calls(MVDreamPipeline(random_model(), "cpu", "float32", graphs=False)))
    assert (graphs(), GraphStandIn.replays) == (n, replays)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(made, plain, strict=True))


def test_a_pipeline_whose_model_is_replaced():
    pipe, other = (MVDreamPipeline(random_model(seed), "cpu", "float32") for seed in range(2))
    first = pipe("a red car", n_steps=4).tensor
    pipe.unet = other.unet
    assert torch.equal(pipe("a red car", n_steps=4).tensor, other("a red car", n_steps=4).tensor) is False  # own VAE
    pipe.vae = other.vae
    again = pipe("a red car", n_steps=4).tensor
    other.text = pipe.text
    assert torch.equal(again, other("a red car", n_steps=4).tensor)
    assert (first - again).abs().max() > 1e-3


def test_schedulers_that_remember_answers_have_them_to_themselves(monkeypatch):
    from diffusers import PNDMScheduler

    views = []
    for graph in (True, False):
        pipe = MVDreamPipeline(random_model(prediction="eps"), "cpu", "float32", graphs=graph)
        scheduler = PNDMScheduler(**pipe.scheduler_settings, skip_prk_steps=True)
        views.append(pipe("a red car", n_steps=8, guidance_scale=1.0, scheduler=scheduler).tensor)
    assert torch.equal(*views)
    assert graphs() == 1


def test_on_a_cpu_nothing_is_different(monkeypatch):
    monkeypatch.undo()
    assert not guided_call().is_active(torch.device("cpu"))
    assert captured.graphs_on(torch.device("cpu")) is None
