"""DeepFloyd IF's folders, written by diffusers' own IFPipeline: what is read of them, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline
from reference import deepfloyd

from mvdream_fast import convert, dreambooth, generate, sds
from mvdream_fast.camera import sample_cameras
from mvdream_fast.checkpoints.open import Model, load_model, open_source, save_model
from mvdream_fast.checkpoints.places import stored_config
from mvdream_fast.core import cli
from mvdream_fast.core.errors import ArgumentError, ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.distill.request import resolve
from mvdream_fast.distill.systems import mini
from mvdream_fast.guidance.sds import ScoreDistillation
from mvdream_fast.models.t5 import T5Encoder
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.text_to_3d import TextTo3D
from mvdream_fast.training.prediction import pretrained

PROMPTS = ["a Brown bulldog  riding a horse", "the front view of a wooden chair, " * 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("if") / "IF-I-M"
    deepfloyd.write_folder(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def pipeline(folder) -> MVDreamPipeline:
    return MVDreamPipeline.from_pretrained(folder, "cpu", "float32")


@pytest.fixture(scope="module")
def theirs(folder) -> IFPipeline:
    made = IFPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def test_the_configuration_is_what_the_json_says(folder):
    source = open_source(folder)
    config = source.config
    assert (source.layout, config.name, config.modes) == ("DeepFloyd IF folder", "deepfloyd-if", ("2d",))
    assert (config.vae.kind, config.vae.image_size, config.latent_size) == ("pixels", 16, 16)
    assert (config.unet.channel_mult, config.unet.attention_resolutions) == ((1, 2, 3, 4), (2, 4, 8))
    assert (config.schedule.threshold, config.schedule.threshold_max, config.schedule.steps_offset) == (0.95, 1.5, 0)
    assert config.schedule.prediction == "eps"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_are_encoded_as_by_the_pipeline(pipeline, theirs, prompt):
    cond, uncond = theirs.encode_prompt(prompt, negative_prompt="a red collar")
    text = pipeline.encode_prompt(prompt, "a red collar", "", warn=lambda _: None)
    assert text.cond.shape == (1, 77, deepfloyd.WIDTH)
    torch.testing.assert_close(text.cond, cond, rtol=0, atol=1e-5)
    torch.testing.assert_close(text.uncond, uncond, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_guided_call_is_the_pipelines(pipeline, theirs):
    text = pipeline.encode_prompt("a red car", "", "")
    pixels, t = torch.randn(3, 3, 16, 16), torch.tensor(321)
    out = pipeline.denoiser(text, None, 3, 7.5)(torch.cat([pixels, pixels]), t)
    asked = torch.cat([text.uncond.expand(3, -1, -1), text.cond.expand(3, -1, -1)])
    wanted = theirs.unet(torch.cat([pixels, pixels]), t, asked).sample[:, :3]
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)


def test_images_are_the_pipelines_where_its_scheduler_samples(pipeline, theirs):
    """The same loop with DDPM, which draws noise of the variance that we drop: without it, from the same start."""
    scheduler = DDPMScheduler.from_config(theirs.scheduler.config, variance_type="fixed_small")
    theirs.scheduler = scheduler

    def draw() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    wanted = theirs("a red car", num_inference_steps=4, guidance_scale=7.0, generator=draw(), output_type="np").images
    views = pipeline(
        "a red car", 1, n_steps=4, guidance_scale=7.0, suffix="", generator=draw(), scheduler=scheduler, mode="2d"
    )
    np.testing.assert_allclose(views.tensor.permute(0, 2, 3, 1).numpy(), wanted, atol=1e-4)


def _rewrite(folder: Path, part: str, form: str) -> None:
    """The part's file in another form, as published ones come."""
    from safetensors.torch import load_file

    of_text = part == "text_encoder"
    path = folder / part / f"{'model' if of_text else 'diffusion_pytorch_model'}.safetensors"
    tensors = load_file(path)
    path.unlink()
    if form == "bin":
        torch.save(tensors, folder / part / f"{'pytorch_model' if of_text else path.stem}.bin")
        return
    if form == "both names":  # of the embedding
        tensors |= {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()} if of_text else {}
    module = deepfloyd.text_encoder() if of_text else deepfloyd.unet()
    if form == "fp16":
        module.half().save_pretrained(folder / part, variant="fp16")
    elif form == "shards":
        module.half().save_pretrained(folder / part, variant="fp16", max_shard_size="60KB" if of_text else "4MB")
        assert list((folder / part).glob("*00001-of-*"))
    else:
        from safetensors.torch import save_file

        save_file(tensors, path)


@pytest.mark.parametrize("form", ["bin", "fp16", "shards", "both names"])
def test_forms_of_the_weights(copy, folder, form):
    for part in ("unet", "text_encoder"):
        _rewrite(copy, part, form)
    found, wanted = load_model(copy), load_model(folder)
    half = form in ("fp16", "shards")
    for part in ("unet", "text"):
        states = (getattr(m, part).model.state_dict() for m in (found, wanted))
        for a, b in zip(*(s.items() for s in states), strict=True):
            assert a[0] == b[0]
            torch.testing.assert_close(a[1], b[1].half() if half else b[1], rtol=0, atol=0)
    size = open_source(folder).n_bytes(torch.float32)
    assert open_source(copy).n_bytes(torch.float32) < size if half else size


def test_the_towers_weights_stay_in_their_file(copy):
    """Memory-mapped and in the type they are stored in, until they are used."""
    _rewrite(copy, "text_encoder", "fp16")
    pipeline = MVDreamPipeline.from_pretrained(copy, "cpu", "float32")
    assert isinstance(pipeline.text, T5Encoder)
    assert {p.dtype for p in pipeline.text.parameters()} == {torch.float16}
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(copy / "text_encoder") in maps.read_text()
    assert pipeline.encode_prompt("a red car").cond.dtype == torch.float32


def test_score_distillation_of_pixels(pipeline):
    """The gradient reaches the rendered pixels at once: there is no encoder. At the model's size the latents' own."""
    config = mini()
    score = ScoreDistillation(
        pipeline.unet, pipeline.vae, pipeline.schedule, pipeline.encode_prompt("a red car", "", ""), config.guidance
    )
    rgb = torch.rand(4, 3, 16, 16, requires_grad=True)
    out = score(rgb, None, 1, 300, Stream(0, 0, "test"))
    (gradient,) = torch.autograd.grad(out.loss, rgb)
    wanted = 2 * ((rgb * 2 - 1) - out.target) / 4
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_a_run_is_in_2d_mode_and_frees_the_tower(folder):
    pipeline = MVDreamPipeline.from_pretrained(folder, "cpu", "float32")
    asset = TextTo3D(pipeline, keep=False)("a red car", steps=2, render_size=(16,), samples_per_ray=16)
    assert [record["skipped"] for record in asset.records] == [False, False]
    assert pipeline.text is None
    with pytest.raises(
        ModelError, match="needs a multi-view model, but the model deepfloyd-if is one of single images"
    ):
        TextTo3D(MVDreamPipeline.from_pretrained(folder, "cpu"))("a red car", steps=2, mode="3d")


def test_modes(pipeline, folder):
    assert pipeline("a red car", 2, n_steps=2).cameras is None
    with pytest.raises(ArgumentError, match="mode must be 2d, got 3d"):
        pipeline("a red car", mode="3d")
    assert stored_config(folder)["vae"]["image_size"] == 16
    run = {"prompt": "a red car", "model": str(folder)}
    assert (resolve(run).config.mode, resolve(run).config.preset) == ("2d", "mini")
    assert resolve(run | {"mode": "2d"}).config.mode == "2d"
    with pytest.raises(ArgumentError, match="--mode must be 2d with .*IF-I-M, which draws single images"):
        resolve(run | {"mode": "3d"})
    with pytest.raises(ArgumentError, match="--mode must be 2d"):
        resolve(run, {"sds": {"mode": "3d"}})


def _run(verb, *flags: str) -> int | None:
    """The exit code of a command."""
    try:
        cli.run(verb.main, verb.Flags, prog=verb.__name__.rpartition(".")[2], argv=list(flags))
    except SystemExit as end:
        return end.code
    return 0


def test_the_commands(folder, tmp_path, capsys):
    same = ("--model", str(folder), "--dtype", "float32", "--device", "cpu", "--threads", "1")
    assert not _run(generate, "a red car", *same, "--steps", "3", "-o", str(tmp_path / "views"))
    record = json.loads((tmp_path / "views" / "config.json").read_text())
    assert (record["mode"], record["suffix"], record["model_name"]) == ("2d", "", "deepfloyd-if")
    small = ("--mode", "2d", "--steps", "2", "--render-size", "16", "--mesh-resolution", "16")
    assert not _run(sds, "a red car", *same, *small, "-o", str(tmp_path / "run"))
    assert {"mesh.glb", "report.html", "views.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert "deepfloyd-if" in capsys.readouterr().out
    assert _run(sds, "a red car", *same, "--mode", "3d", "-o", str(tmp_path / "no")) == 2
    assert _run(convert, str(folder), str(tmp_path / "no")) == 3
    assert "model of DeepFloyd IF: it can be sampled and distilled from, but not trained" in capsys.readouterr().err
    photos = ("--instance-data-dir", str(tmp_path / "views"), "--instance-prompt", "a photo of a sks chair")
    assert _run(dreambooth, "--model", str(folder), *photos, "--output", str(tmp_path / "no")) == 3
    assert not (tmp_path / "no").exists()


def test_it_is_neither_trained_nor_saved(folder, tmp_path):
    model = load_model(folder)
    for attempt in (model.whole, model.words, lambda: save_model(model, tmp_path / "no")):
        with pytest.raises(ModelError, match="not trained, tuned or converted here"):
            attempt()
    with pytest.raises(ModelError, match="not trained, tuned or converted here"):
        pretrained(str(folder), ())
    assert not (tmp_path / "no").exists()


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


BAD = {
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "unet/config.json is missing.*hf download DeepFloyd"),
    "no tower": (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder/config.json is missing"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "it has no tokenizer.*hf download"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler/scheduler_config.json is missing"),
    "no weights": (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "must hold diffusion_pytorch"),
    "second stage": (lambda f: _edit(f / "model_index.json", _class_name="IFSuperResolutionPipeline"),
                     "IFSuperResolutionPipeline, not IF's first stage.*Accept the licence"),
    "six channels in": (lambda f: _edit(f / "unet/config.json", in_channels=6), "in_channels must be 3, got 6"),
    "no variance": (lambda f: _edit(f / "unet/config.json", out_channels=3), "out_channels must be 6, got 3"),
    "classes": (lambda f: _edit(f / "unet/config.json", class_embed_type="timestep"),
                "class_embed_type must be None, got 'timestep'"),
    "latent blocks": (lambda f: _edit(f / "unet/config.json", down_block_types=["CrossAttnDownBlock2D"] * 4),
                      "down_block_types must be"),
    "a new setting": (lambda f: _edit(f / "unet/config.json", frobnicate=1), "frobnicate must be None, got 1"),
    "text widths": (lambda f: _edit(f / "unet/config.json", encoder_hid_dim="wide"),
                    "encoder_hid_dim must be a whole number"),
    "relu": (lambda f: _edit(f / "text_encoder/config.json", feed_forward_proj="relu"),
             "feed_forward_proj must be 'gated-gelu', got 'relu'"),
    "clip": (lambda f: _edit(f / "text_encoder/config.json", model_type="clip_text_model"), "model_type must be t5"),
    "predicts v": (lambda f: _edit(f / "scheduler/scheduler_config.json", prediction_type="sample"),
                   "prediction_type must be one of epsilon"),
    "cut short": (lambda f: _cut(f / "unet/diffusion_pytorch_model.safetensors"), "no readable .safetensors"),
    "cut tower": (lambda f: _cut(f / "text_encoder/model.safetensors"), "no readable .safetensors"),
    "deeper tower": (lambda f: _edit(f / "text_encoder/config.json", num_layers=3), "9 missing .encoder.block.2"),
    "wider blocks": (lambda f: _edit(f / "unet/config.json", layers_per_block=2), "does not hold the .* missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_whole_model_of_if_is_named(copy, tmp_path, capsys, case):
    spoil, sentence = BAD[case]
    spoil(copy)
    with pytest.raises(ModelError, match=sentence):
        load_model(copy)
    assert _run(sds, "a red car", "--model", str(copy), "-o", str(tmp_path / "run")) == 3
    assert not (tmp_path / "run").exists()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_tower_of_another_width(tmp_path):
    deepfloyd.write_folder(tmp_path / "wide", width=128)
    with pytest.raises(ModelError, match="text_encoder gives states of 128 numbers and unet takes 64.*hf download"):
        load_model(tmp_path / "wide")


def test_a_number_that_is_not_finite(copy):
    from safetensors.torch import load_file, save_file

    path = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.final_layer_norm.weight"][3] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ModelError, match="encoder.final_layer_norm.weight holds NaN"):
        load_model(copy)


def test_without_an_index_the_folders_tell(copy, tmp_path):
    (copy / "model_index.json").unlink()
    assert open_source(copy).config.unet.kind == "deepfloyd"
    (copy / "vae").mkdir()
    with pytest.raises(ModelError):
        open_source(copy)


def test_a_model_of_ours_is_not_taken_for_one():
    assert load_model("embedded", parts=("text",)).config.foreign == ""
    assert isinstance(load_model("embedded", parts=("text",)), Model)


def test_cameras_of_a_step_tell_the_side_in_words(pipeline):
    """The prompt of each view is that of its side: what `SingleViewSDS` asks, with T5's tower."""
    from mvdream_fast.distill.config import replaced
    from mvdream_fast.distill.loop import new_guidance

    guidance = new_guidance(pipeline, "a red car", replaced(mini(), mode="2d"), 0)
    views = sample_cameras(mini().cameras, Stream(0, 0, "cameras"), 1)
    loss, t = guidance.score(torch.rand(len(views.c2w), 3, 16, 16), views, 0, Stream(0, 0, "score"))
    assert loss.isfinite()
    assert 0 < t < 1000
