"""Training: bit-exact resume, accumulation, averaged weights, losses, linear start. Runs: test_training_runs.py."""

import dataclasses
import json

import pytest
import torch
from test_batches import make_sample

from mvdream_fast.checkpoints.manifest import build
from mvdream_fast.core.errors import DivergedError, ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import Batch, ImageSource, Shards
from mvdream_fast.data.shards import write_shard
from mvdream_fast.models.config import NAMED, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from mvdream_fast.models.tokenizer import build_subset_vocabulary
from mvdream_fast.train import Flags
from mvdream_fast.training import runs
from mvdream_fast.training.initial_model import new_model
from mvdream_fast.training.learning_rate import rate
from mvdream_fast.training.loop import Loop, LoopOptions
from mvdream_fast.training.unet import Parts, Trainer, TrainOptions, spread_timesteps
from mvdream_fast.training.vae import (
    Linear,
    VAEOptions,
    VAETrainer,
    linear_start,
    measure_scale,
    psnr,
    reconstruction,
    settle,
)

TINY = ModelConfig(
    name="tiny",
    unet=UNetConfig(
        in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(1, 2), num_head_channels=16, context_dim=32, norm_groups=8,
    ),
    vae=VAEConfig(
        block_out_channels=(32,), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        mid_block_add_attention=False, scale_factor=1.0, image_size=16, patch_size=4,
    ),
    text=TextConfig(
        width=32, n_layers=1, n_heads=2, mlp_width=64, skip_last=0, context_length=16, vocabulary="subset",
        vocabulary_size=64,
    ),
    schedule=ScheduleConfig(prediction="v"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(NAMED, "mini", TINY)  # the flags' default


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "train-00000.tar", [make_sample(30 * i) for i in range(6)])
    write_shard(folder / "held_out-00000.tar", [make_sample(200)])
    return folder


def make_trainer(data, **options) -> Trainer:
    shards = Shards(data)
    model = new_model("mini", build_subset_vocabulary(shards.captions()), seed=0)
    parts = Parts(model.config, model.unet, model.text, model.vae, model.tokenizer)
    return Trainer(parts, ImageSource(shards), TrainOptions(**{"batch_size": 2, "warmup": 2, "lr": 1e-3} | options))


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.state().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def flags(data, output, **values) -> Flags:
    return Flags(data=data, output=output, **{"batch_size": 2, "steps": 2, "threads": 1} | values)


def test_a_resumed_run_has_the_same_bytes(data, tmp_path):
    straight = make_trainer(data)
    losses = [straight.train_step()["loss"] for _ in range(5)]
    first = make_trainer(data)
    loop = Loop(first, tmp_path, LoopOptions(steps=2))
    assert loop.run() == 0
    assert first.step == 2
    second = make_trainer(data)
    assert Loop(second, tmp_path, LoopOptions(steps=5)).resume()
    assert second.step == 2
    assert [second.train_step()["loss"] for _ in range(3)] == losses[2:]
    assert_same(weights(straight), weights(second))


def test_validation_and_sampling_leave_no_trace(data):
    one, two = make_trainer(data), make_trainer(data)
    for trainer in (one, two):
        trainer.train_step()
    figures = one.validate(one.source)
    images = one.sample(["a red thing0", "a thing30"], 4, guidance_scale=2.0)
    assert set(figures) == {"val_multi_view", "val_2d"}
    assert figures == one.validate(one.source)
    assert images.shape == (2, 4, 3, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1
    for trainer in (one, two):
        trainer.train_step()
    assert_same(weights(one), weights(two))


def test_accumulated_gradients_are_those_of_one_large_batch(data):
    """Two micro-batches against their union, with the same noise and steps; one plain update each, so no Adam noise."""
    trainer = make_trainer(data, caption_dropout=0.0)
    source = trainer.source
    halves = [source.batch(Stream(0, i, "half"), 2, 4, True) for i in range(2)]
    whole = Batch(
        torch.cat([b.images for b in halves]), torch.cat([b.cameras for b in halves]),
        halves[0].captions + halves[1].captions, 4, False,
    )  # fmt: skip
    fixed = torch.tensor([100, 300, 500, 700])
    latents = torch.cat([trainer.parts.vae.encode(b.images) for b in halves])
    noise = Stream(0, 0, "noise").normal(*latents.shape)

    class Fixed:
        """Hands out one part of the fixed noise."""

        def __init__(self, part):
            self.part = part

        def normal(self, *shape, device="cpu"):
            return noise[self.part]

        def integers(self, low, high, n):
            return torch.zeros(n, dtype=torch.int64)

        def uniform(self, n):
            return torch.ones(n)

    def gradients(batch, part, t):
        encoded = dataclasses.replace(batch, images=latents[part], encoded=True)
        trainer.optimizer.zero_grad()
        trainer.loss(encoded, Fixed(part), 0.0, t).backward()
        return [p.grad.clone() for p in trainer.parameters if p.grad is not None]

    a, b = gradients(halves[0], slice(0, 8), fixed[:2]), gradients(halves[1], slice(8, 16), fixed[2:])
    both = gradients(whole, slice(0, 16), fixed)
    for x, y, z in zip(a, b, both):
        torch.testing.assert_close((x + y) / 2, z, rtol=1e-4, atol=1e-6)


def test_accumulation_is_part_of_the_key(data):
    once, twice = make_trainer(data), make_trainer(data, accumulate=2)
    one, two = once.train_step(), twice.train_step()
    assert one["multi_view"] == two["multi_view"]
    assert one["loss"] != two["loss"]
    assert twice.step == 1


def test_the_modes_share(data):
    trainer = make_trainer(data, multi_view_share=0.7)
    modes = []
    for trainer.step in range(400):
        modes.append(trainer._multi_view(trainer.step))
    assert 0.62 < sum(modes) / 400 < 0.78


def test_wide_steps_see_twice_as_many_views_of_half_the_scenes(data):
    trainer = make_trainer(data, multi_view_share=0.7, wide_share=0.4, batch_size=4, n_views=2)
    narrow, seen = make_trainer(data, multi_view_share=0.7, batch_size=4, n_views=2), []
    for step in range(60):
        (drawn,), (usual,) = trainer.draw(step), narrow.draw(step)
        assert len(drawn.images) == len(usual.images) == 8
        assert (drawn.cameras is None) == (usual.cameras is None)
        seen.append((drawn.n_views, len(drawn.ids)))
        assert (drawn.cameras is None) == (seen[-1] == (1, 8))
    wide, multi_view = seen.count((4, 2)), len(seen) - seen.count((1, 8))
    assert wide + seen.count((2, 4)) == multi_view
    assert 0.2 < wide / multi_view < 0.6
    trainer.train_step()


def test_a_2d_step_trains_no_camera(data):
    trainer = make_trainer(data, multi_view_share=0.0)
    before = weights(trainer)
    assert trainer.train_step()["multi_view"] == 0
    after = weights(trainer)
    moved = {name for name in before if name.startswith("model.") and not torch.equal(before[name], after[name])}
    assert moved
    assert not any("camera_embed" in name for name in moved)


def test_the_average_warms_up(data):
    trainer = make_trainer(data, ema=0.9)
    start = [p.detach().clone() for p in trainer.parameters]
    trainer.train_step()
    for average, was, now in zip(trainer.ema, start, trainer.parameters):
        torch.testing.assert_close(average, was + (1 - 1 / 11) * (now.detach() - was))


def test_min_snr_weights(data):
    trainer = make_trainer(data, weighting="min-snr")
    t = torch.tensor([0, 999])
    abar = trainer.schedule.alphas_cumprod[t].double()
    snr = abar / (1 - abar)
    expected = torch.stack([5 / (snr[0] + 1), snr[1] / (snr[1] + 1)])
    torch.testing.assert_close(trainer._weights(t).double(), expected, rtol=1e-5, atol=0)


def test_gradient_checkpointing_changes_no_number(data):
    plain, saving = make_trainer(data), make_trainer(data)
    saving.parts.unet.gradient_checkpointing = True
    assert plain.train_step() == saving.train_step()
    assert_same(weights(plain), weights(saving))


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_half_precision_is_for_the_arithmetic_alone(data, kind):
    """The loss is about that of fp32; weights, average and moments are fp32; a resumed run has the same bytes."""
    exact, half, again = make_trainer(data), make_trainer(data, autocast=kind), make_trainer(data, autocast=kind)
    first = half.train_step()["loss"]
    assert first == pytest.approx(exact.train_step()["loss"], rel=0.02)
    assert {tensor.dtype for tensor in half.state().values()} == {torch.float32}
    again.restore(half.step, weights(half), json.loads(json.dumps(half.meta())))
    assert again.train_step() == half.train_step()
    assert_same(weights(half), weights(again))
    assert again.scaler.get_scale() == (65536.0 if kind == "fp16" else 1.0)


def test_a_loss_that_is_not_finite_stops_before_the_weights(data):
    trainer = make_trainer(data)
    with torch.no_grad():
        trainer.parameters[0].fill_(float("nan"))
    before = weights(trainer)
    with pytest.raises(DivergedError, match="at step 0"):
        trainer.train_step()
    assert all(torch.equal(x, y) or x.isnan().all() for x, y in zip(before.values(), weights(trainer).values()))


def test_checkpoints_of_another_configuration_are_refused(data, tmp_path):
    trainer = make_trainer(data)
    Loop(trainer, tmp_path, LoopOptions(steps=1)).run()
    other = make_trainer(data)
    other.about["config"]["unet"]["camera_in"] = "none"
    with pytest.raises(ModelError, match="another configuration: unet.camera_in differs"):
        Loop(other, tmp_path, LoopOptions(steps=2)).resume()


def test_a_checkpoint_of_a_version_that_knew_fewer_settings_is_gone_on_from(data, tmp_path):
    trainer, other = make_trainer(data), make_trainer(data)
    del trainer.about["config"]["vae"]["decoder_cleaner"]
    Loop(trainer, tmp_path, LoopOptions(steps=1)).run()
    assert Loop(other, tmp_path, LoopOptions(steps=2)).resume()
    assert_same(weights(trainer), weights(other))


@pytest.mark.parametrize(("stage", "name"), [("unet", "Trainer"), ("vae", "VAETrainer")])
@pytest.mark.parametrize("graphs", [True, False])
def test_graphs_are_made_unless_they_are_switched_off(stage, name, graphs, data, tmp_path, monkeypatch):
    made, plain = [], getattr(runs, name)

    class Noted(plain):
        def train_step(self):
            made.append(self)
            raise DivergedError("that will do")

    monkeypatch.setattr(runs, name, Noted)
    monkeypatch.setattr(runs, "initial_model", lambda *_: new_model("mini", build_subset_vocabulary([]), seed=0))
    with pytest.raises(DivergedError):
        runs.run_stage(flags(data, tmp_path / "run", stage=stage, graphs=graphs))
    assert made[0]._descent.enabled == graphs


def vae_trainer(data, steps=4):
    shards = Shards(data)
    vae = new_model("mini", build_subset_vocabulary(shards.captions()), seed=0).vae
    return VAETrainer(TINY, vae, ImageSource(shards), VAEOptions(steps=steps, batch_size=4, warmup=1))


def test_an_encoder_in_16_bits_is_trained_in_float32(data):
    shards = Shards(data)
    vae = build("vae", TINY)
    vae.encode_in(torch.bfloat16)  # as a pipeline leaves it on a GPU
    trainer = VAETrainer(TINY, vae, ImageSource(shards), VAEOptions(steps=1, batch_size=4, warmup=1))
    trainer.train_step()
    assert {p.dtype for p in trainer.parameters} == {torch.float32}


def test_the_autoencoder_resumes_with_the_same_bytes(data, tmp_path):
    straight, first, second = (vae_trainer(data) for _ in range(3))
    losses = [straight.train_step()["loss"] for _ in range(4)]
    Loop(first, tmp_path, LoopOptions(steps=2)).run()
    Loop(second, tmp_path, LoopOptions(steps=4)).resume()
    assert [second.train_step()["loss"] for _ in range(2)] == losses[2:]
    assert_same(weights(straight), weights(second))


def pictures(n=64):
    """Smooth random pictures, [n, 3, 16, 16]."""
    coarse = Stream(0, 0, "pictures").normal(n, 3, 4, 4)
    return torch.tanh(torch.nn.functional.interpolate(coarse, size=16, mode="bilinear"))


def test_the_linear_start_is_the_best_linear_autoencoder():
    torch.manual_seed(0)
    images = pictures()
    linear = Linear.fit(images, 4)
    bound = linear.bound(images, 4)
    vae = build("vae", TINY)
    linear_start(vae, linear)
    assert bound - 1.0 < reconstruction(vae, images) < bound + 0.5
    torch.testing.assert_close(measure_scale(vae, images), 1.0, rtol=0.1, atol=0)


def test_the_linear_bound_against_svd():
    images = pictures()
    rows = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2).reshape(-1, 48).double()
    u, s, v = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert Linear.fit(images, 4).bound(images, 5) == pytest.approx(
        psnr((s[5:] ** 2).sum().item() / rows.numel()), abs=1e-3
    )


def test_the_latent_scale_makes_unit_variance():
    vae, images = build("vae", TINY), pictures()
    scale = measure_scale(vae, images)
    assert (vae.encode(images) * scale).std().item() == pytest.approx(1, rel=1e-4)
    next(vae.parameters()).data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="the latents are all one number, or not finite; begin again"):
        measure_scale(vae, images)


def test_a_settled_posterior_is_its_mean():
    vae, images = build("vae", TINY), pictures(2)
    mean, noise = vae.encode(images), torch.ones(2, 4, 4, 4)
    settle(vae)
    assert torch.equal(vae.encode(images), mean)
    torch.testing.assert_close(vae.encode(images, noise), mean, rtol=0, atol=1e-6)


def test_the_learning_rate_rises_and_falls():
    assert [round(rate(s, 4, 100, 100, "cosine"), 6) for s in (0, 3, 50, 100)] == [
        0.25,
        pytest.approx(0.997781),
        0.5,
        0.0,
    ]


def test_the_plateau_ends_where_it_is_told():
    assert [rate(s, 4, 100, 0) for s in (0, 1, 3, 4, 500)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert [rate(s, 4, 100, 20) for s in (0, 50, 80, 90, 99, 100)] == [0.25, 1.0, 1.0, 0.5, 0.05, 0.0]


def test_a_resumed_run_can_be_ended(data, tmp_path):
    trainer = make_trainer(data)
    Loop(trainer, tmp_path, LoopOptions(steps=2)).run()
    ending = make_trainer(data, steps=4, decay=2)
    loop = Loop(ending, tmp_path, LoopOptions(steps=4))
    assert loop.resume()
    assert loop.run() == 0
    assert ending.step == 4
    assert ending.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3)  # the last update's


def test_timesteps_of_a_batch_are_spread():
    draws = torch.stack([spread_timesteps(Stream(0, i, "t"), 8, 1000) for i in range(500)])  # [500, 8]
    assert torch.equal(draws // 125, torch.arange(8).expand(500, 8))  # one in each eighth of the schedule
    counts = torch.histc(draws.float(), 10, 0, 1000)  # and together uniform: 400 each, deviation under 20
    assert (counts - 400).abs().max() < 90
    assert spread_timesteps(Stream(0, 0, "t"), 1, 1000).shape == (1,)


@pytest.mark.parametrize(("shift", "quartiles"), [(3.0, (500, 750, 900)), (0.5, (143, 333, 600))])
def test_shifted_timesteps_by_hand(shift, quartiles):
    draws = torch.cat([spread_timesteps(Stream(0, i, "t"), 8, 1000, shift) for i in range(2000)]).double()
    found = draws.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert torch.allclose(found, torch.tensor(quartiles).double(), atol=6)
    assert draws.min() >= 0
    assert draws.max() <= 999
