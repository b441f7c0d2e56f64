"""The text-to-3D loop with a teacher whose wishes are known: it learns, resumes to the byte, and survives trouble."""

import dataclasses
import signal

import pytest
import torch

from mvdream_fast import run
from mvdream_fast.camera import sample_cameras
from mvdream_fast.config import SDS_PRESETS, resolve_config
from mvdream_fast.errors import ArgumentError, DivergedError, ModelError
from mvdream_fast.field.asset import Asset
from mvdream_fast.rng import Stream
from mvdream_fast.text_to_3d import EMPTY_STEPS, MAX_SKIPPED, Optimization, TextTo3D, make_optimizer

TINY = dataclasses.replace(SDS_PRESETS["mini"], steps=12, render_size=(8,), samples_per_ray=24)


class Painter:
    """Wants every pixel red, through a loss whose gradient it may spoil at chosen steps."""

    def __init__(self, spoil=(), colour=(1.0, 0.0, 0.0)):
        self.spoil, self.colour = spoil, torch.tensor(colour)[:, None, None]

    def cameras(self, step, stream):
        return sample_cameras(TINY, stream)

    def score(self, rgb, cameras, step, stream):
        loss = (rgb - self.colour).square().sum() + 0 * stream.normal(1).sum()
        return loss * (float("nan") if step in self.spoil else 1.0), 7


class Studio(TextTo3D):
    """TextTo3D with a Painter in place of a diffusion model."""

    def __init__(self, teacher=None):
        self._teacher = teacher or Painter()

    def teacher(self, prompt, config, seed):
        return self._teacher


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_what_the_teacher_wants():
    losses = []
    config = dataclasses.replace(TINY, steps=100)
    asset = Studio()("a red ball", config=config, callback=lambda record, _: losses.append(record.loss))
    assert losses[-1] < 0.85 * losses[0]
    inside = asset.renderer.volume(torch.zeros(1, 3))[1][0]
    assert inside[0] > inside[1:].max() + 0.2


def test_records_say_what_happened():
    records = []
    Studio()("x", config=TINY, callback=lambda record, _: records.append(record))
    assert [r.step for r in records] == list(range(12))
    assert all(r.t == 7 and r.n_samples > 0 and 0 < r.opacity < 1 and not r.skipped for r in records)
    assert set(records[0].seconds) == {
        "renderer", "guidance", "vae backward", "renderer backward", "optimiser", "occupancy",
    }  # fmt: skip


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_a_stopped_run_goes_on_with_the_same_bytes(tmp_path, stop_at):
    whole = Studio()("x", config=TINY, seed=3)
    with run.Interrupt() as interrupt:

        def stop(record, asset):
            if record.step + 1 == stop_at:
                signal.raise_signal(signal.SIGTERM)

        Studio()("x", config=TINY, seed=3, callback=stop, checkpoints=tmp_path, interrupt=interrupt)
    assert run.load_latest(tmp_path)[0] == stop_at
    resumed = Studio()("x", config=TINY, seed=3, checkpoints=tmp_path)
    assert same(whole.state(), resumed.state())


def test_same_seed_same_bytes_and_other_seed_other_bytes():
    first, second, other = (Studio()("x", config=TINY, seed=seed) for seed in (0, 0, 1))
    assert same(first.state(), second.state())
    assert not same(first.state(), other.state())


def test_a_step_that_is_not_finite_changes_no_parameter():
    state = Optimization(TINY, "x", 0, Painter(spoil=(1,)))
    assert not state.step(0).skipped
    before = {name: p.detach().clone() for name, p in state.asset.renderer.named_parameters()}
    assert state.step(1).skipped
    assert same(before, {name: p.detach() for name, p in state.asset.renderer.named_parameters()})
    assert not state.step(2).skipped
    assert state.skipped == 0


def test_trouble_that_lasts_ends_with_a_sentence():
    config = dataclasses.replace(TINY, steps=40)
    with pytest.raises(DivergedError, match=f"the last {MAX_SKIPPED} steps before step .* not finite"):
        Studio(Painter(spoil=range(2, 99)))("x", config=config)


def test_trouble_is_survived_once_from_a_checkpoint(tmp_path):
    config = dataclasses.replace(TINY, steps=30)
    spoil = range(6, 6 + MAX_SKIPPED)
    asset = Studio(Painter(spoil=spoil))("x", config=config, checkpoints=tmp_path, checkpoint_every=5)
    assert all(p.isfinite().all() for p in asset.renderer.parameters())
    with pytest.raises(DivergedError):
        Studio(Painter(spoil=range(6, 99)))("x", config=config, checkpoints=tmp_path / "b", checkpoint_every=5)


def test_an_empty_volume_is_started_again_once():
    state = Optimization(TINY, "x", 0, Painter())
    for _ in range(EMPTY_STEPS):
        state._watch(0.0)
    assert state.restarts == 1
    assert same(state.asset.state(), Asset(TINY, "x", 1).state())
    for _ in range(EMPTY_STEPS - 1):
        state._watch(0.0)
    with pytest.raises(DivergedError, match=r"density is empty .* again after a restart"):
        state._watch(0.0)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    Studio()("x", config=TINY, seed=0, checkpoints=tmp_path)
    with pytest.raises(ModelError, match="another configuration or seed"):
        Studio()("x", config=TINY, seed=1, checkpoints=tmp_path)
    with pytest.raises(ModelError, match="another configuration or seed"):
        Studio()("x", config=dataclasses.replace(TINY, guidance_scale=3.0), checkpoints=tmp_path)


def test_optimiser_groups_are_the_papers():
    asset = Asset(dataclasses.replace(TINY, background="learned"))
    optimizer = make_optimizer(asset, TINY)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.001, 0.001]
    assert optimizer.param_groups[0]["params"] == [asset.renderer.volume.table]
    assert {(g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups} == {((0.9, 0.99), 1e-15, 0.01)}
    covered = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert covered == {id(p) for p in asset.renderer.parameters()}


def test_regularisers_follow_their_ramps():
    quiet = Optimization(TINY, "x", 0, Painter())
    loud = Optimization(dataclasses.replace(TINY, lambda_sparsity=(0, 0.0, 1e4, 10)), "x", 0, Painter())
    cameras = sample_cameras(TINY, Stream(0, 0, "cameras"))
    totals = []
    for state, step in ((quiet, 10), (loud, 0), (loud, 5), (loud, 10)):
        rays, rendered, _ = state._render(cameras, 0)
        totals.append(state._regularizers(rays, rendered, step).item())
    assert totals[:2] == [0.0, 0.0]
    assert totals[3] == pytest.approx(2 * totals[2], rel=1e-5)
    assert totals[2] > 0


def test_shading_needs_normals_and_gives_finite_gradients():
    config = resolve_config(TINY, shading=True, lambda_orient=(0, 10.0, 10.0, 1))
    state = Optimization(config, "x", 0, Painter())
    assert not state.step(6000).skipped


def test_stretched_schedules():
    config = resolve_config("paper", steps=1000)
    assert config.milestones == (500,)
    assert config.min_step == (0, 0.98, 0.02, 800)
    assert resolve_config("paper", steps=1000, milestones=(7,)).milestones == (7,)


@pytest.mark.parametrize(("base", "overrides"), [("huge", {}), ("mini", {"stepz": 3})])
def test_unknown_names_are_refused(base, overrides):
    with pytest.raises(ArgumentError):
        resolve_config(base, **overrides)


def test_assets_round_trip(tmp_path):
    asset = Studio()("a red ball", config=TINY, seed=5)
    asset.save(tmp_path / "asset.safetensors")
    loaded = Asset.load(tmp_path / "asset.safetensors")
    assert (loaded.prompt, loaded.seed, loaded.config) == ("a red ball", 5, TINY)
    assert torch.equal(loaded.render(size=8).rgb, asset.render(size=8).rgb)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not safetensors at all, but long enough for a header"])
def test_a_file_that_is_no_asset_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="cannot read the asset"):
        Asset.load(tmp_path / "a.safetensors")


def test_an_asset_with_bad_numbers_is_refused(tmp_path):
    asset = Asset(TINY)
    asset.renderer.volume.table.data[0, 0] = float("inf")
    asset.save(tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="not finite in volume.table"):
        Asset.load(tmp_path / "a.safetensors")


def test_turntable_closes_its_loop(tmp_path):
    from PIL import Image

    asset = Asset(TINY)
    asset.renderer.volume.table.data = Stream(0, 0, "table").normal(*asset.renderer.volume.table.shape)
    asset.turntable(tmp_path / "t.webp", n_frames=6, size=16)
    asset.turntable(tmp_path / "t.mp4", n_frames=6, size=16)
    with Image.open(tmp_path / "t.webp") as image:
        assert image.n_frames == 6
        assert image.info["loop"] == 0
    assert (tmp_path / "t.mp4").stat().st_size > 500
    with pytest.raises(ArgumentError, match=r"\.webp or \.mp4"):
        asset.turntable(tmp_path / "t.gif", n_frames=2, size=8)
