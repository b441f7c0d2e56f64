"""Checkpoints as people hand them over: each layout gives the same tensors as the plain one, or is refused by name."""

import json
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import stable_diffusion, upstream
from safetensors.torch import load_file, save_file

from mvdream_fast.checkpoints.manifest import PARTS
from mvdream_fast.checkpoints.open import Source, load_model, open_source
from mvdream_fast.checkpoints.recognise import recognise
from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import SD21, ScheduleConfig

SMALL21 = replace(upstream.NARROW21, vocabulary=64)  # enough where no prompt is read
LAST_LAYER = "cond_stage_model.model.transformer.resblocks.2."


def tensors_of(source: Source) -> dict[str, torch.Tensor]:
    """Every part through all checks."""
    out = {}
    for part in PARTS:
        source.check(part)
        out |= {f"{part}.{name}": tensor for name, tensor in source.tensors(part).items()}
    return out


def assert_same(source: Source, expected: Source) -> None:
    ours, theirs = tensors_of(source), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return dict(upstream.flat(SMALL21))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tensors) -> Source:
    path = tmp_path_factory.mktemp("plain") / "21.pt"
    torch.save(tensors, path)
    return open_source(path)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    upstream.write_published(folder, SMALL21)
    return folder


# Flat files.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_file_saved_whole_in_another_type(tmp_path, tensors, dtype):
    torch.save({name: x.to(dtype) for name, x in tensors.items()}, tmp_path / "x.pt")
    if dtype == torch.float64:
        with pytest.raises(ModelError, match=r"of a wrong type \(.* is float64"):
            tensors_of(open_source(tmp_path / "x.pt"))
        return
    source = open_source(tmp_path / "x.pt")
    assert source.config.schedule == ScheduleConfig()
    assert {x.dtype for x in tensors_of(source).values()} == {dtype}


UNUSED = [
    ["cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale"],
    [name for name in upstream.schedule() if name != "betas"],
    [name for name in upstream.schedule() if name != "alphas_cumprod"],
    list(upstream.schedule()),
    [LAST_LAYER + "ln_1.weight", LAST_LAYER + "attn.in_proj_bias"],
]


@pytest.mark.parametrize("gone", UNUSED, ids=lambda names: names[0])
def test_what_is_never_used_may_be_missing(tmp_path, tensors, plain, gone):
    torch.save({name: x for name, x in tensors.items() if name not in gone}, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    assert source.config == plain.config
    assert_same(source, plain)


def test_vit_h_without_its_last_layer_keeps_its_depth():
    shapes = upstream.flat_shapes(replace(upstream.SD21, text_layers=23))
    assert recognise("file", shapes) == SD21


def test_extra_buffers_and_losses_are_passed_over(tmp_path, tensors, plain):
    extra = {
        "ddim_sigmas": torch.zeros(50), "ddim_alphas": torch.zeros(50), "ddim_alphas_prev": torch.zeros(50),
        "ddim_sqrt_one_minus_alphas": torch.zeros(50), "logvar": torch.zeros(1000), "lvlb_weights": torch.zeros(1000),
        "first_stage_model.loss.logvar": torch.zeros(()), "model_ema.num_updates": torch.tensor(3),
        "cond_stage_model.model.attn_mask": torch.zeros(77, 77),
    }  # fmt: skip
    torch.save(tensors | extra, tmp_path / "x.pt")
    assert_same(open_source(tmp_path / "x.pt"), plain)


def test_a_stored_scale_factor_is_applied(tmp_path, tensors):
    torch.save(tensors | {"scale_factor": torch.tensor(0.25)}, tmp_path / "x.pt")
    assert open_source(tmp_path / "x.pt").config.vae.scale_factor == 0.25
    torch.save(tensors | {"scale_factor": torch.ones(4)}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"scale_factor must be one number, got \[4\]"):
        open_source(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {"state_dict": t, "epoch": 3, "global_step": 9, "callbacks": {}, "optimizer_states": [{"a": 1}],
                   "lr_schedulers": [], "pytorch-lightning_version": "2.4.0", "hyper_parameters": {"lr": 1e-4}},
        lambda t: {"model": t, "step": 5},
        lambda t: {"state_dict": OrderedDict(t), "ema": {"x": torch.zeros(1)}},
        lambda t: {f"module.{name}": x for name, x in t.items()},
        lambda t: {"state_dict": {f"_orig_mod.module.{name}": x for name, x in t.items()}},
        lambda t: {n: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for n, x in t.items()},
    ],
    ids=["lightning", "model", "two sets", "ddp", "compiled ddp", "channels_last"],
)  # fmt: skip
def test_weights_one_level_down_or_under_a_prefix(tmp_path, tensors, plain, wrap):
    torch.save(wrap(tensors), tmp_path / "x.ckpt")
    assert_same(open_source(tmp_path / "x.ckpt"), plain)


def test_stored_schedules(tmp_path, tensors):
    def schedule_of(extra: dict, **metadata: str) -> ScheduleConfig:
        kept = {name: x for name, x in tensors.items() if name not in upstream.schedule()}
        save_file(kept | extra, tmp_path / "x.safetensors", metadata=metadata or None)
        return open_source(tmp_path / "x.safetensors").config.schedule

    ldm = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    odd = torch.rand(1000, generator=torch.Generator().manual_seed(0)) / 2 + 0.1
    assert schedule_of({"betas": ldm.float()}) == ScheduleConfig(1000, 0.0015, 0.0195)
    assert schedule_of({"betas": ldm.bfloat16()}) == ScheduleConfig(1000, 0.0015, 0.0195)
    assert schedule_of({"alphas_cumprod": (1 - ldm).cumprod(0).float()}) == ScheduleConfig(1000, 0.0015, 0.0195)
    linear = ScheduleConfig(500, 0.0001, 0.02, beta_schedule="linear")
    assert schedule_of({"betas": torch.linspace(1e-4, 0.02, 500)}) == linear
    assert schedule_of({"betas": odd}).betas() == odd.double().tolist()
    whole = schedule_of({"betas": torch.cat([odd, torch.ones(1)])})
    assert (whole.n_timesteps, whole.prediction) == (1001, "v")  # all noise: nothing else can be predicted there
    assert schedule_of({}) == ScheduleConfig()
    assert schedule_of({"v_pred": torch.zeros(0)}).prediction == "v"
    both = schedule_of({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    assert both == ScheduleConfig(prediction="v", rescale_betas_zero_snr=True)
    assert schedule_of({}, **{"modelspec.prediction_type": "v"}).prediction == "v"
    assert schedule_of({}, **{"modelspec.prediction_type": "epsilon", "format": "pt"}).prediction == "eps"
    with pytest.raises(ModelError, match="prediction must be v where the last timestep is all noise"):
        schedule_of({"ztsnr": torch.zeros(0)})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS .* `git lfs pull`"),
        (b"GGUF\x03\0\0\0", "is in GGUF, whose weights are quantised"),
        (b"<!DOCTYPE html><html>", "is a web page and not the weights"),
        (b"", "no readable .safetensors or .pt file"),
    ],
)
def test_files_that_are_no_weights_are_named(tmp_path, content, sentence):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=sentence):
        open_source(tmp_path / "x.safetensors")


def test_the_old_format_of_torch_is_named(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match="in torch.save's format before 1.6"):
        open_source(tmp_path / "x.bin")


def test_networks_of_another_kind_are_named(tmp_path, tensors):
    stem = "model.diffusion_model.input_blocks.0.0.weight"
    torch.save(tensors | {stem: torch.zeros(64, 9, 3, 3)}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match="its UNet takes 9 channels and gives 4, .* inpainting, depth and upscaling"):
        open_source(tmp_path / "x.pt")


def test_sd15_without_text_model_in_its_names(tmp_path):
    tensors = upstream.flat(upstream.NARROW15)
    torch.save(tensors, tmp_path / "long.pt")
    torch.save({n.replace(".text_model.", "."): x for n, x in tensors.items()}, tmp_path / "short.pt")
    assert_same(open_source(tmp_path / "short.pt"), open_source(tmp_path / "long.pt"))
    ids = load_model(tmp_path / "long.pt", parts=("text",)).tokenizer.encode("a cat").ids[0].tolist()
    assert ids == [49406, 320, 2368, *[49407] * 74]  # transformers' CLIPTokenizer fills up with the end token


# Folders in diffusers' layout.


def part_file(folder: Path, part: str) -> Path:
    return folder / part / ("model" if part == "text_encoder" else "diffusion_pytorch_model")


def shard(folder: Path, part: str, kind: str = "safetensors", variant: str = "") -> None:
    """Cuts a part's file in three and writes the index, under the names that save_pretrained gives them."""
    stem = part_file(folder, part)
    tensors = load_file(f"{stem}.safetensors")
    stem.with_suffix(".safetensors").unlink()
    base = "pytorch_model" if (part, kind) == ("text_encoder", "bin") else stem.name
    places = {name: f"{base}-{i % 3 + 1:05d}-of-00003{variant}.{kind}" for i, name in enumerate(tensors)}
    for place in set(places.values()):
        content = {name: tensors[name] for name in tensors if places[name] == place}
        save_file(content, stem.with_name(place)) if kind == "safetensors" else torch.save(
            content, stem.with_name(place)
        )
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    stem.with_name(f"{base}.{kind}.index{variant}.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda f, p: shard(f, p),
        lambda f, p: shard(f, p, variant=".fp16"),
        lambda f, p: shard(f, p, kind="bin"),
        *(
            lambda f, p, v=v: part_file(f, p).with_suffix(".safetensors").rename(f"{part_file(f, p)}.{v}.safetensors")
            for v in ("fp16", "bf16", "non_ema", "mine")
        ),
        lambda f, p: as_bin(f, p),
        lambda f, p: shutil.copy(f"{part_file(f, p)}.safetensors", f"{part_file(f, p)}.fp16.safetensors"),
    ],
    ids=["shards", "fp16 shards", "bin shards", "fp16", "bf16", "non_ema", "unheard of", "bin", "two"],
)
def test_forms_of_a_part(published, tmp_path, change):
    folder = shutil.copytree(published, tmp_path / "x")
    for part in ("unet", "vae", "text_encoder"):
        change(folder, part)
    assert_same(open_source(folder), open_source(published))


def as_bin(folder: Path, part: str) -> None:
    file = part_file(folder, part).with_suffix(".safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(file), file.with_name(name))
    file.unlink()


def test_damaged_shards_are_named(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "x")
    shard(folder, "unet")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    data = json.loads(index.read_text())
    first, place = next(iter(data["weight_map"].items()))
    for value, sentence in (
        ("../../vae/x.safetensors", r"must name .safetensors or .bin files beside it, got ../../vae"),
        (index.name, "must name .safetensors or .bin files beside it"),
        ("none.safetensors", "cannot read .*none.safetensors: No such file"),
        (next(p for p in data["weight_map"].values() if p != place), f"says that {first} is in .*; it is not"),
    ):
        index.write_text(json.dumps({"weight_map": data["weight_map"] | {first: value}}))
        with pytest.raises(ModelError, match=sentence):
            open_source(folder)
    index.write_text("{}")
    with pytest.raises(ModelError, match="must say in weight_map"):
        open_source(folder)
    index.unlink()
    with pytest.raises(ModelError, match="its shards with their index, .* got config.json, diffusion_pytorch_model-0"):
        open_source(folder)


def test_a_port_with_its_unet_under_a_wrapper(published, tmp_path):
    """KokeCacao's: names under `unet.`, and a config.json that says nothing."""
    folder = shutil.copytree(published, tmp_path / "x")
    file = part_file(folder, "unet").with_suffix(".safetensors")
    save_file({f"unet.{name}": x for name, x in load_file(file).items()}, file)
    (folder / "unet" / "config.json").write_text('{"_class_name": "MultiViewUNetWrapperModel"}')
    assert_same(open_source(folder), open_source(published))


def test_a_port_with_its_cameras_in_a_folder_of_their_own(tmp_path):
    """lizhiqi49's: diffusers' own UNet and `camera_proj`; the numbers are those of the flat file."""
    folder, flat = tmp_path / "folder", dict(upstream.flat(upstream.NARROW21))
    stable_diffusion.write_folder(folder)
    torch.save(flat, tmp_path / "flat.pt")
    (folder / "camera_proj").mkdir()
    camera = {
        f"linear_{n}.{end}": flat[f"model.diffusion_model.camera_embed.{i}.{end}"]
        for n, i in ((1, 0), (2, 2)) for end in ("weight", "bias")
    }  # fmt: skip
    save_file(camera, folder / "camera_proj" / "diffusion_pytorch_model.safetensors")
    about = {"_class_name": "CameraMatrixEmbedding", "in_channels": 16, "camera_embed_dim": 256, "act_fn": "silu"}
    (folder / "camera_proj" / "config.json").write_text(json.dumps(about | {"out_dim": None, "post_act_fn": None}))
    source = open_source(folder)
    assert_same(source, open_source(tmp_path / "flat.pt"))
    assert source.config.vae.image_size == 192  # 96 latent cells of two pixels
    (folder / "camera_proj" / "config.json").write_text(json.dumps(about | {"post_act_fn": "silu"}))
    with pytest.raises(ModelError, match="camera_proj/config.json: post_act_fn must be unset or false, got 'silu'"):
        open_source(folder)


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_stable_diffusion_in_both_layouts_is_one_model(tmp_path, kind):
    flat = stable_diffusion.write_flat(tmp_path / "flat.safetensors", kind)
    stable_diffusion.write_folder(tmp_path / "folder", kind)
    source, expected = open_source(tmp_path / "folder", True), open_source(flat, True)
    assert source.config == expected.config
    assert_same(source, expected)
    assert (source.says_prediction, expected.says_prediction) == (True, False)
    with pytest.raises(ModelError, match="is a model of single images, without camera layers"):
        open_source(tmp_path / "folder").check("unet")
    stem = part_file(tmp_path / "folder", "unet").with_suffix(".safetensors")
    tensors = load_file(stem)
    tensors.pop("up_blocks.1.resnets.1.conv2.bias")
    save_file(tensors, stem)
    with pytest.raises(ModelError, match=r"1 missing \(up_blocks.1.resnets.1.conv2.bias\)"):
        open_source(tmp_path / "folder", True).check("unet")


def test_stable_diffusion_that_predicts_v(tmp_path):
    stable_diffusion.write_folder(tmp_path / "x", prediction_type="v_prediction", timestep_spacing="trailing",
                                  rescale_betas_zero_snr=True)  # fmt: skip
    schedule = open_source(tmp_path / "x", True).config.schedule
    assert schedule == ScheduleConfig(prediction="v", rescale_betas_zero_snr=True, timestep_spacing="trailing")
