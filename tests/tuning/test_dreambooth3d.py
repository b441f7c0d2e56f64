"""DreamBooth3D's stages: image to image, mixed batches, the composed guidance, and all six with a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference.random_model import random_model

from mvdream_fast import dreambooth
from mvdream_fast.camera import normalize_camera, sample_cameras
from mvdream_fast.checkpoints.open import load_model, save_model
from mvdream_fast.core import cli, machine, run_folder
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.sampler import ddim_sample
from mvdream_fast.diffusion.schedule import ddim_timesteps
from mvdream_fast.distill.recipes import resolve_config
from mvdream_fast.guidance.base import Stateless
from mvdream_fast.guidance.reconstruction import Anchored
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.asset import Asset
from mvdream_fast.tuning import dreambooth3d
from mvdream_fast.tuning.dreambooth3d import MixedSource, PseudoViews, translate
from mvdream_fast.tuning.photos import PhotoSource

MINI = resolve_config("mini")


@pytest.fixture(scope="module")
def pipeline() -> MVDreamPipeline:
    return MVDreamPipeline(random_model(), "cpu", "float32")


def views(n_groups: int = 2, size: int = 16) -> PseudoViews:
    cameras = [sample_cameras(MINI.cameras, Stream(0, g, "cameras")) for g in range(n_groups)]
    images = Stream(0, 0, "images").uniform(n_groups, 4, 3, size, size)
    return PseudoViews(images, torch.stack([c.c2w for c in cameras]), torch.stack([c.fovy for c in cameras]))


def test_sampling_can_begin_in_the_middle(pipeline):
    """From the latents that the whole way had there, the rest of the way leads to the same end."""
    text = pipeline.encode_prompt(["a red car"], suffix="")
    denoise = pipeline.denoiser(text, None, 2, 3.0)
    noise, on_the_way = Stream(0, 0, "z").normal(2, 4, 8, 8), []
    note = lambda done, total, latents: on_the_way.append(latents.clone())  # noqa: E731
    end = ddim_sample(denoise, noise, pipeline.schedule, 10, 3.0, callback=note)
    rest = ddim_sample(denoise, on_the_way[5], pipeline.schedule, 10, 3.0, skip=6)
    assert torch.equal(end, rest)


def test_translation_keeps_more_the_less_noise_it_adds(pipeline):
    cameras = sample_cameras(MINI.cameras, Stream(0, 0, "cameras"))
    images = Stream(0, 0, "images").uniform(4, 3, 16, 16)
    kept = pipeline.decode(pipeline.vae.encode(images * 2 - 1))
    errors = []
    for strength in (0.02, 0.3, 1.0):
        out = translate(pipeline, images, cameras, "a red car", strength, 2.0, Stream(0, 0, "noise"))
        assert out.shape == images.shape
        errors.append((out - kept).square().mean().item())
    assert errors[0] < 0.6 * errors[1]
    assert errors[1] < errors[2]


def test_translation_tells_the_model_the_cameras(pipeline, monkeypatch):
    cameras, seen = sample_cameras(MINI.cameras, Stream(0, 0, "cameras")), []
    whole = MVDreamPipeline.denoiser

    def spy(self, text, camera, n_views, guidance_scale):
        seen.append((camera, n_views, guidance_scale))
        return whole(self, text, camera, n_views, guidance_scale)

    monkeypatch.setattr(MVDreamPipeline, "denoiser", spy)
    translate(pipeline, torch.zeros(4, 3, 16, 16), cameras, "a red car", 0.02, 2.0, Stream(0, 0, "noise"))
    assert torch.equal(seen[0][0], normalize_camera(cameras.c2w))
    assert seen[0][1:] == (4, 2.0)
    assert len(ddim_timesteps(50)) == 50


def test_mixed_batches():
    pseudo = views()
    source = MixedSource(PhotoSource(torch.zeros(3, 3, 16, 16), "a sks chair"), pseudo.images, pseudo.c2w)
    flat = source.batch(Stream(0, 0, "x"), 4, 1, False)
    assert (flat.cameras, flat.n_views, len(flat.images)) == (None, 1, 4)
    deep = source.batch(Stream(0, 0, "x"), 4, 1, True)
    assert (deep.n_views, len(deep.images), deep.captions) == (4, 4, ["a sks chair"])
    group = next(g for g in range(2) if torch.equal(deep.images, pseudo.images[g]))
    assert torch.equal(deep.cameras, normalize_camera(pseudo.c2w[group]))
    assert len(source.batch(Stream(0, 0, "x"), 8, 1, True).images) == 8


class Flat(Stateless):
    """A guidance that wants every pixel at 0.5."""

    def views(self, step, stream):
        return sample_cameras(MINI.cameras, stream)

    def score(self, rgb, views, step, stream, timing):
        assert len(rgb) == len(views) == 4
        return (rgb - 0.5).square().sum() / len(rgb), 7


def test_the_composed_guidance_adds_the_reconstruction():
    pseudo, stream = views(size=16), Stream(0, 3, "cameras")
    guidance = Anchored(Flat(), pseudo.images, [pseudo.cameras(g) for g in range(2)], (0.0, 10.0, 10.0, 0.0))
    cameras = guidance.views(3, stream)
    assert len(cameras) == 8
    assert torch.equal(cameras.c2w[:4], Flat().views(3, Stream(0, 3, "cameras")).c2w)
    assert torch.equal(cameras.c2w[4:], pseudo.c2w[guidance._group])
    rgb = torch.cat([torch.full((4, 3, 8, 8), 0.75), torch.zeros(4, 3, 8, 8)]).requires_grad_()
    loss, t = guidance.score(rgb, cameras, 3, Stream(0, 3, "guidance"))
    small = pseudo.images[guidance._group].unflatten(-1, (8, 2)).mean(-1).unflatten(-2, (8, 2)).mean(-2)
    known = 0.25**2 * 3 * 64 + 10 * small.square().sum() / 4
    assert loss.item() == pytest.approx(known.item(), rel=1e-5)
    assert t == 7
    (d_rgb,) = torch.autograd.grad(loss, rgb)
    torch.testing.assert_close(d_rgb[4:], -2 * 10 * small / 4)


def test_pseudo_views_round_trip(tmp_path):
    whole = views()
    whole.save(tmp_path / "v.safetensors")
    for a, b in zip(whole, PseudoViews.load(tmp_path / "v.safetensors")):
        assert torch.equal(a, b)
    (tmp_path / "v.safetensors").write_bytes(b"nonsense, and long enough for a header")
    with pytest.raises(ModelError, match="cannot read the pseudo views"):
        PseudoViews.load(tmp_path / "v.safetensors")


@pytest.fixture(params=[(), ("avx512_bf16",)], ids=["float32", "bfloat16"])
def arguments(tmp_path, monkeypatch, request) -> list[str]:
    """The stages take auto's dtype: the processor's features are given, so that every machine meets both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(request.param))
    save_model(random_model(), "tiny")
    Path("photos").mkdir()
    draws = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(draws.integers(0, 255, (16, 16, 3), np.uint8)).save(f"photos/{i}.png")
    monkeypatch.setattr(Asset, "turntable", lambda self, path, **_: path.write_bytes(b""))
    small = resolve_config("mini", render_size=(8,), samples_per_ray=24)
    monkeypatch.setattr(dreambooth3d, "resolve_config", lambda preset, **more: resolve_config(small, **more))
    return [
        "--instance_data_dir", "photos", "--instance_prompt", "a sks chair", "--model", "tiny", "--threads", "1",
        "--stages", "dreambooth3d", "--partial_steps", "2", "--max_train_steps", "4", "--sds_steps", "3",
        "--pseudo_groups", "1",
    ]  # fmt: skip


def command(*arguments: str) -> int:
    try:
        cli.run(dreambooth.main, dreambooth.Flags, prog="dreambooth", argv=list(arguments))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_all_stages_and_a_stop_in_each(arguments, monkeypatch, capsys):
    """A run that is stopped before every stage ends with the bytes of one that is not stopped."""
    assert command(*arguments, "-o", "whole") == 0
    names = ("partial", "full", "last_volume")
    capsys.readouterr()
    for number, name in enumerate(names):
        with monkeypatch.context() as patch:
            patch.setattr(dreambooth3d.Stages, name, lambda self: 143)
            more = ["--resume", "parts", "--threads", "1"] if number else [*arguments, "-o", "parts"]
            assert command(*more) == 143
        errors = capsys.readouterr().err
        assert "go on with --resume-from-checkpoint" in errors
        assert "parts" in errors
    assert command("--resume", "parts", "--threads", "1") == 0
    out = capsys.readouterr().out
    assert out.count("there already") == 5
    for product in ("model/unet.safetensors", "4-pseudo/views.safetensors", "6-volume/asset.safetensors",
                    "6-volume/mesh.glb", "2-volume/asset.safetensors", "3-full/model/unet.safetensors"):  # fmt: skip
        assert (Path("parts") / product).read_bytes() == (Path("whole") / product).read_bytes(), product
    partial, full, final = (
        run_folder.load_latest(Path("whole") / f"{n}/checkpoints") for n in ("1-partial", "3-full", "5-final")
    )
    assert (partial[0], full[0], final[0]) == (2, 4, 4)
    assert not torch.equal(
        load_model("whole/model").unet.out[2].weight, load_model("whole/3-full/model").unet.out[2].weight
    )


@pytest.mark.parametrize("arguments", [()], ids=["float32"], indirect=True)
def test_another_number_of_steps_at_a_resume(arguments, monkeypatch, capsys):
    """The full tuning takes it up; what is made of that model is not made again, so it is refused then."""
    resume = ("--resume", "run", "--threads", "1")

    def stopped_at(stage: str, *words: str) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(dreambooth3d.Stages, stage, lambda self: 143)
            return command(*words)

    def refused(steps: int) -> str:
        before = Path("run/config.json").read_text()
        assert command(*resume, "--max-train-steps", str(steps)) == 2
        assert Path("run/config.json").read_text() == before
        return capsys.readouterr().err

    monkeypatch.setattr(dreambooth3d.Stages, "first_volume", lambda self: 0)
    assert stopped_at("partial", *arguments, "-o", "run") == 143
    capsys.readouterr()
    assert "--partial-steps must be at most --max-train-steps, 1, got 2" in refused(1)
    assert stopped_at("pseudo", *resume, "--max-train-steps", "5") == 143
    assert run_folder.latest_step(Path("run/3-full/checkpoints")) == 5
    capsys.readouterr()
    assert "--max-train-steps must be at least the 5 that are done, got 3" in refused(3)
    assert "--max-train-steps must stay 5, as 3-full/model is there already, got 50; leave it out" in refused(50)
    assert stopped_at("pseudo", *resume, "--max-train-steps", "5") == 143
    record = json.loads(Path("run/config.json").read_text())
    assert record["settings"]["max_train_steps"] == 5
    assert [session["step"] for session in record["resumed"]] == [0, 5]
