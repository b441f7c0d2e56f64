"""The text-to-3D loop with a guidance whose wishes are known: it learns, resumes to the byte, and survives trouble."""

import json
import signal

import numpy as np
import pytest
import torch
from reference.studio import TINY, Painter, Studio, fresh_asset, same

from mvdream_fast.camera import Cameras, sample_cameras
from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import ArgumentError, DivergedError, ModelError, OutOfMemoryError
from mvdream_fast.core.rng import Stream
from mvdream_fast.distill.config import replaced
from mvdream_fast.distill.recipes import resolve_config
from mvdream_fast.distill.state import EMPTY_STEPS, MAX_SKIPPED, Record, RunState, make_optimizer
from mvdream_fast.guidance.base import no_timing
from mvdream_fast.scene.asset import Asset
from mvdream_fast.text_to_3d import TextTo3D


def test_it_learns_what_the_guidance_wants():
    losses = []
    config = replaced(TINY, steps=100)
    asset = Studio()("a red ball", config=config, callback=lambda progress: losses.append(progress.record.loss))
    assert losses[-1] < 0.85 * losses[0]
    inside = asset.representation.volume(torch.zeros(1, 3))[1][0]
    assert inside[0] > inside[1:].max() + 0.2


def test_records_say_what_happened():
    records = []
    Studio()("x", config=TINY, callback=lambda progress: records.append(progress.record))
    assert [r.step for r in records] == list(range(12))
    assert all(r.t == 7 and r.statistics["n_samples"] > 0 and 0 < r.opacity < 1 and not r.skipped for r in records)
    assert all(set(r.seconds) == {"renderer", "vae", "optimiser", "occupancy", "rest"} for r in records)


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_a_stopped_run_goes_on_with_the_same_bytes(tmp_path, stop_at):
    whole = Studio()("x", config=TINY, seed=3)
    with run_folder.Interrupt() as interrupt:

        def stop(progress):
            if progress.record.step + 1 == stop_at:
                signal.raise_signal(signal.SIGTERM)

        Studio()("x", config=TINY, seed=3, callback=stop, checkpoints=tmp_path, interrupt=interrupt)
    assert run_folder.load_latest(tmp_path)[0] == stop_at
    resumed = Studio()("x", config=TINY, seed=3, checkpoints=tmp_path)
    assert same(whole.state(), resumed.state())


def test_same_seed_same_bytes_and_other_seed_other_bytes():
    first, second, other = (Studio()("x", config=TINY, seed=seed) for seed in (0, 0, 1))
    assert same(first.state(), second.state())
    assert not same(first.state(), other.state())


def test_a_step_that_is_not_finite_changes_no_parameter():
    state = RunState(TINY, "x", 0, Painter(spoil=(1,)))
    assert not state.step(0).skipped
    before = {name: p.detach().clone() for name, p in state.asset.representation.named_parameters()}
    assert state.step(1).skipped
    assert same(before, {name: p.detach() for name, p in state.asset.representation.named_parameters()})
    assert not state.step(2).skipped
    assert state.skipped == 0


def test_trouble_that_lasts_ends_with_a_sentence():
    config = replaced(TINY, steps=40)
    with pytest.raises(DivergedError, match=f"the last {MAX_SKIPPED} steps before step .* not finite"):
        Studio(Painter(spoil=range(2, 99)))("x", config=config)


def test_trouble_is_survived_once_from_a_checkpoint(tmp_path):
    config = replaced(TINY, steps=30)
    spoil = range(6, 6 + MAX_SKIPPED)
    asset = Studio(Painter(spoil=spoil))("x", config=config, checkpoints=tmp_path, checkpoint_every=5)
    assert all(p.isfinite().all() for p in asset.representation.parameters())
    with pytest.raises(DivergedError):
        Studio(Painter(spoil=range(6, 99)))("x", config=config, checkpoints=tmp_path / "b", checkpoint_every=5)


def test_an_empty_volume_is_started_again_once():
    state = RunState(TINY, "x", 0, Painter())
    empty = Record(0, loss=0.0, t=0, opacity=0.0, statistics={"occupancy": 0.25}, seconds={})
    for _ in range(EMPTY_STEPS):
        state._watch(empty)
    assert state.restarts == 1
    assert same(state.asset.state(), fresh_asset(TINY, "x", 1).state())
    for _ in range(EMPTY_STEPS - 1):
        state._watch(empty)
    with pytest.raises(DivergedError, match=r"density is empty .* again after a restart: occupancy 0.25;"):
        state._watch(empty)


def test_without_a_checkpoint_trouble_means_another_start():
    events = []
    config = replaced(TINY, steps=14)
    asset = Studio(Painter(spoil=range(MAX_SKIPPED)))(
        "x", config=config, callback=lambda progress: events.append(progress.record.event)
    )
    assert [i for i, event in enumerate(events) if event] == [MAX_SKIPPED]
    assert "started again from another seed" in events[MAX_SKIPPED]
    assert all(p.isfinite().all() for p in asset.representation.parameters())


PLACES = ("rgb", "opacity", "loss", "d_views", "gradient", "density", "camera")


class Saboteur(Painter):
    """A Painter that puts NaN or infinity into one chosen tensor of one chosen step."""

    def __init__(self, step, place, value, index):
        super().__init__()
        self.step, self.place, self.value, self.index = step, place, value, index

    def views(self, step, stream):
        cameras = super().views(step, stream)
        if (step, self.place) == (self.step, "camera"):
            cameras.c2w.view(-1)[self.index % cameras.c2w.numel()] = self.value
        return cameras

    def score(self, rgb, views, step, stream, timing=no_timing):
        if step == self.step and self.place in ("rgb", "loss"):
            poison = torch.zeros(rgb.numel())
            poison[self.index % rgb.numel()] = self.value
            rgb = rgb + poison.reshape(rgb.shape)
            if self.place == "loss":
                return rgb.sum() * self.value, 7
        if (step, self.place) == (self.step, "d_views"):
            rgb.register_hook(lambda grad: grad + self.value)
        return super().score(rgb, views, step, stream)


def sabotage(state, step, place, value, index):
    """What a guidance can't reach: the field's own outputs and gradients, at one step."""
    if place == "gradient":
        parameters = [p for p in state.asset.representation.parameters() if p.requires_grad]
        chosen = parameters[index % len(parameters)]
        handle = chosen.register_hook(lambda grad: torch.full_like(grad, value))
        return handle.remove
    renderer = state.asset.representation
    if place == "density":
        plain = renderer.density
        renderer.density = lambda positions: plain(positions) * value
        return lambda: delattr(renderer, "density")
    if place == "opacity":
        plain = renderer.regularizers
        renderer.regularizers = lambda *arguments: plain(*arguments) + value
        return lambda: delattr(renderer, "regularizers")
    return lambda: None


def inject(draw: Stream) -> None:
    """One random (step, tensor) point: whatever comes, the parameters stay finite and the run gets to its end."""
    config = replaced(TINY, steps=5, lambda_sparsity=(0, 0.1, 0.1, 1))
    step, place = int(draw.integers(0, 5)), PLACES[int(draw.integers(0, len(PLACES)))]
    value = (float("nan"), float("inf"), -float("inf"))[int(draw.integers(0, 3))]
    index = int(draw.integers(0, 1000))
    state = RunState(config, "x", 0, Saboteur(step, place, value, index))
    for i in range(config.steps):
        undo = sabotage(state, i, place, value, index) if i == step else lambda: None
        record = state.step(i)
        undo()
        assert all(p.isfinite().all() for p in state.asset.representation.parameters()), (step, place, value, index)
        json.dumps(record.plain(), allow_nan=False)
    assert not record.skipped or step == config.steps - 1, (step, place, value, index)


def test_numbers_that_are_not_finite_never_reach_a_parameter():
    for i in range(40):
        inject(Stream(i, 0, "injection"))


@pytest.mark.slow
def test_two_hundred_injections():
    for i in range(40, 240):
        inject(Stream(i, 0, "injection"))


class Hungry(Painter):
    """Runs out of memory at chosen calls."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def score(self, rgb, views, step, stream, timing=no_timing):
        self.calls += 1
        if self.calls - 1 in self.at:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: 9 GB")
        return super().score(rgb, views, step, stream)


def test_out_of_memory_halves_the_samples_once_and_the_run_goes_on():
    events = []
    asset = Studio(Hungry({3}))("x", config=TINY, callback=lambda progress: events.append(progress.record.event))
    assert [i for i, event in enumerate(events) if event] == [3]
    assert "half of the samples" in events[3]
    assert asset.representation.max_samples == 4 * 8 * 8 * TINY.representation.samples_per_ray // 2
    assert len(events) == TINY.steps


@pytest.mark.parametrize("at", [{3, 4}, {3, 9}])
def test_out_of_memory_twice_ends_with_advice(at):
    with pytest.raises(
        OutOfMemoryError, match=r"step \d: out of memory: .*can't allocate memory.* most goes to .*try --"
    ):
        Studio(Hungry(at))("x", config=TINY)


def test_a_run_that_grows_tries_its_largest_step_first():
    sizes = []

    class Noting(Painter):
        def score(self, rgb, views, step, stream, timing=no_timing):
            sizes.append(rgb.shape[-1])
            return super().score(rgb, views, step, stream)

    config = replaced(TINY, steps=4, render_size=(8, 16), n_groups=(1, 1), milestones=(2,))
    grown = Studio(Noting())("x", config=config)
    assert sizes == [16, 8, 8, 16, 16]
    state = RunState(config, "x", 0, Painter())
    for step in range(4):
        state.step(step)
    assert same(grown.state(), state.asset.state())  # the rehearsal has changed nothing


def test_an_asset_reports_about_itself(tmp_path):
    asset = Studio()("a red ball", config=TINY)
    page = asset.report(tmp_path / "report.html").read_text()
    assert "a red ball" in page
    assert page.count("<iframe") == 1
    assert "data:image/webp" in page
    assert "data:image/svg+xml" in page
    assert [r["step"] for r in asset.records] == list(range(12))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    Studio()("x", config=TINY, seed=0, checkpoints=tmp_path)
    with pytest.raises(ModelError, match="another configuration or seed"):
        Studio()("x", config=TINY, seed=1, checkpoints=tmp_path)
    with pytest.raises(ModelError, match="another configuration or seed"):
        Studio()("x", config=replaced(TINY, guidance_scale=3.0), checkpoints=tmp_path)
    with pytest.raises(ModelError, match="is of another prompt, 'x'; start a new run in a folder of its own"):
        Studio()("a red car", config=TINY, checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"milestones": (2,)}, r"render_size must have one entry more than milestones \(2,\), got \(8,\)"),
        ({"render_size": ()}, r"render_size must have one entry more than milestones \(\), got \(\)"),
        ({"lambda_orient": (0, 1.0, 1.0, 0)}, "lambda_orient must be 0 throughout without shading"),
        ({"fovy_range_deg": (50.0, 30.0)}, "fovy_range_deg must be low, then high, got 50.0 and 30.0"),
    ],
)
def test_the_library_refuses_what_the_command_refuses(settings, message):
    with pytest.raises(ArgumentError, match=message):
        Studio()("x", config=replaced(TINY, steps=1, **settings))
    with pytest.raises(ArgumentError, match=message):
        Studio()("x", "mini", **{"render_size": (8,), "steps": 1} | settings)


def test_optimiser_groups_are_the_papers():
    asset = fresh_asset(replaced(TINY, background="learned"))
    optimizer = make_optimizer(asset.representation, TINY)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.001, 0.001]
    assert optimizer.param_groups[0]["params"] == [asset.representation.volume.table]
    assert {(g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups} == {((0.9, 0.99), 1e-15, 0.01)}
    covered = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert covered == {id(p) for p in asset.representation.parameters()}


def test_regularisers_follow_their_ramps():
    quiet = RunState(TINY, "x", 0, Painter())
    loud = RunState(replaced(TINY, lambda_sparsity=(0, 0.0, 1e4, 10)), "x", 0, Painter())
    cameras = sample_cameras(TINY.cameras, Stream(0, 0, "cameras"))
    totals = []
    for state, step in ((quiet, 10), (loud, 0), (loud, 5), (loud, 10)):
        rays, rendered, _ = state._render(cameras, 0)
        totals.append(state.representation.regularizers(rendered, rays, step).item())
    assert totals[:2] == [0.0, 0.0]
    assert totals[3] == pytest.approx(2 * totals[2], rel=1e-5)
    assert totals[2] > 0


def test_shading_needs_normals_and_gives_finite_gradients():
    config = resolve_config(TINY, shading=True, lambda_orient=(0, 10.0, 10.0, 1))
    state = RunState(config, "x", 0, Painter())
    assert not state.step(6000).skipped


def test_stretched_schedules():
    config = resolve_config("paper", steps=1000)
    assert config.milestones == (500,)
    assert config.guidance.min_step == (0, 0.98, 0.02, 800)
    assert resolve_config("paper", steps=1000, milestones=(7,)).milestones == (7,)


@pytest.mark.parametrize(("base", "overrides"), [("huge", {}), ("mini", {"stepz": 3})])
def test_unknown_names_are_refused(base, overrides):
    with pytest.raises(ArgumentError):
        resolve_config(base, **overrides)


def test_assets_round_trip(tmp_path):
    asset = Studio()("a red ball", config=TINY, seed=5)
    asset.save(tmp_path / "asset.safetensors")
    loaded = Asset.load(tmp_path / "asset.safetensors")
    assert (loaded.prompt, loaded.seed) == ("a red ball", 5)
    assert loaded.representation.config == TINY.representation
    assert torch.equal(loaded.render(size=8).rgb, asset.render(size=8).rgb)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not safetensors at all, but long enough for a header"])
def test_a_file_that_is_no_asset_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="cannot read the asset"):
        Asset.load(tmp_path / "a.safetensors")


def test_an_asset_with_bad_numbers_is_refused(tmp_path):
    asset = fresh_asset(TINY)
    asset.representation.volume.table.data[0, 0] = float("inf")
    asset.save(tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="not finite in volume.table"):
        Asset.load(tmp_path / "a.safetensors")


def test_turntable_closes_its_loop(tmp_path):
    from PIL import Image

    asset = fresh_asset(TINY)
    asset.representation.volume.table.data = Stream(0, 0, "table").normal(*asset.representation.volume.table.shape)
    asset.turntable(tmp_path / "t.webp", n_frames=6, size=16)
    asset.turntable(tmp_path / "t.mp4", n_frames=6, size=16)
    with Image.open(tmp_path / "t.webp") as image:
        assert image.n_frames == 6
        assert image.info["loop"] == 0
    assert (tmp_path / "t.mp4").stat().st_size > 500
    with pytest.raises(ArgumentError, match=r"\.webp or \.mp4"):
        asset.turntable(tmp_path / "t.gif", n_frames=2, size=8)


def test_what_other_libraries_pass_is_taken(tmp_path, monkeypatch):
    """NumPy's numbers, None, text and ~ for paths: the same bytes as of plain calls."""
    monkeypatch.setenv("HOME", str(tmp_path))
    plain = Studio()("x", config=TINY, seed=3, steps=4)
    same_run = Studio()(
        np.str_("x"), None, config=TINY, seed=np.int64(3), steps=np.int32(4), checkpoints="~/ckpt",
        checkpoint_every=np.int64(2), callback=None, interrupt=None, negative_prompt=None,
    )  # fmt: skip
    assert same(plain.state(), same_run.state())
    assert run_folder.load_latest(tmp_path / "ckpt")[0] == 4
    drawn = Studio()("x", config=TINY, seed=None, steps=1)
    assert same(Studio()("x", config=TINY, seed=drawn.seed, steps=1).state(), drawn.state())
    plain.save("~/a.safetensors")
    loaded = Asset.load("~/a.safetensors")
    assert same(Asset.load(tmp_path / "a.safetensors").state(), loaded.state())
    poses = loaded.orbit(np.int64(1), np.float32(10))
    image = loaded.render(Cameras(poses.c2w.numpy(), poses.fovy.tolist()), np.int32(4)).rgb
    assert torch.equal(image, loaded.render(loaded.orbit(1, 10), 4).rgb)
    loaded.turntable("~/turn.webp", n_frames=np.int64(2), size=np.int64(4))
    assert (tmp_path / "turn.webp").exists()
    assert loaded.to(torch.device("cpu")).device == torch.device("cpu")
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TextTo3D("embedded"), "pipeline must be an MVDreamPipeline, got 'embedded'; MVDreamPipeline.from_pre"),
        (lambda: TextTo3D(None), "pipeline must be an MVDreamPipeline, got None"),
        (lambda: Studio()(["x", "y"], config=TINY), "prompt must be one text, got list; call once for each"),
        (lambda: Studio()(None, config=TINY), "prompt must be one text, got NoneType"),
        (lambda: Studio()("x", config=TINY, seed=1.5), "seed must be a whole number, got 1.5"),
        (lambda: Studio()("x", config=TINY, callback=3), "callback must be a function of a Progress, got int"),
        (lambda: Studio()("x", config=TINY, checkpoint_every=0), "checkpoint_every must be at least 1, got 0"),
        (lambda: Studio()("x", config=TINY, checkpoints=7), "a path must be text or a pathlib.Path, got 7"),
        (lambda: Studio()("x", config={"steps": 3}), "config must be an SDSConfig, got dict; single settings"),
        (lambda: Studio()("x", config=TINY, steps="300"), "steps must be .*, got '300'"),
        (lambda: Studio()("x", config=TINY, steps=0), "steps must be .*, got 0"),
        (lambda: Studio()("x", 5), "preset must be one of paper, mini, fast, got '5'"),
        (lambda: fresh_asset().render(np.eye(4)), "Asset.render: cameras must be Cameras, got ndarray"),
        (lambda: fresh_asset().render(size=4.0), "size must be a whole number, got 4.0"),
        (lambda: fresh_asset().render(size=0), "size must be at least 1, got 0"),
        (lambda: fresh_asset().mesh("64"), "resolution must be a whole number, got '64'"),
        (lambda: fresh_asset().mesh(4), "resolution must be from 8 to 512, got 4"),
        (lambda: fresh_asset().mesh(max_faces=3), "max_faces must be at least 4, got 3; 0 keeps them all"),
        (lambda: fresh_asset().mesh(texture=True), "texture must be a whole number, got True"),
        (lambda: fresh_asset().orbit(4, 120), "elevation_deg must be from -90 to 90, got 120"),
        (lambda: fresh_asset().save_glb(None), "a path must be text or a pathlib.Path, got None"),
        (lambda: fresh_asset().turntable(3), "a path must be text or a pathlib.Path, got 3"),
        (lambda: Asset.load(None), "a path must be text or a pathlib.Path, got None"),
        (lambda: fresh_asset().to("mps"), "--device mps: the kernels are for cpu and cuda"),
    ],
)
def test_foreign_arguments_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
