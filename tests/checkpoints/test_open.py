"""Weights from every published layout: names at full size, numbers at reduced width. Wrong ones: test_spoiled.py."""

import math
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import text as text_reference
from reference import upstream
from reference import vae as vae_reference
from reference.tiny_model import TINY, VOCABULARY
from safetensors.torch import load_file, save_file

from mvdream_fast.checkpoints import layouts, places
from mvdream_fast.checkpoints.manifest import PARTS, manifest, owner
from mvdream_fast.checkpoints.open import load_model, save_model
from mvdream_fast.checkpoints.recognise import recognise
from mvdream_fast.core.errors import ArgumentError, ModelError, OutputError
from mvdream_fast.models.config import SD15, SD21


@pytest.fixture(scope="module")
def flat15(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "15.pt"
    torch.save(upstream.flat(upstream.NARROW15), path)
    return path


# Full size: names, shapes and counts, nothing allocated.


@pytest.mark.parametrize(
    ("config", "size", "counts", "parameters"),
    [
        (SD21, upstream.SD21, (690, 248, 294), (867_572_164, 83_653_863, 354_032_641)),
        (SD15, upstream.SD15, (690, 248, 196), (861_182_404, 83_653_863, 123_060_480)),
    ],
)
def test_released_files_at_full_size(config, size, counts, parameters):
    files = upstream.flat_shapes(size)
    assert recognise("file", files) == config
    for part, prefix, n, n_parameters in zip(PARTS, (layouts.UNET, layouts.VAE, layouts.TEXT), counts, parameters):
        file = {name: shape for name, shape in files.items() if name.startswith(prefix)}
        layout = layouts.released(part, config, files)
        read = {n: shape for n, shape in file.items() if n not in layout.unused and not layouts.ignored(n)}
        assert layout.expected == read
        assert (len(file), sum(math.prod(shape) for shape in file.values())) == (n, n_parameters)


def test_the_released_file_weighs_what_the_hub_says():
    shapes = upstream.flat_shapes(upstream.SD21)
    n_bytes = 4 * (sum(math.prod(shape) for shape in shapes.values()) + 12_000)
    assert len(shapes) + 12 == 1244
    assert round(n_bytes / 1e9, 3) == 5.221


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_published_folder_at_full_size(prefix):
    text = upstream.clip_text(replace(upstream.SD21, text_layers=23))
    found = {
        "unet": upstream.unet(upstream.SD21),
        "vae": manifest("vae", SD21),
        "text": {name.replace("text_model.", prefix): shape for name, shape in text.items()},
    }
    assert recognise("folder", layouts.as_released(found)) == SD21
    for part in PARTS:
        assert layouts.published(part, SD21, found[part]).expected == found[part]


def test_every_stored_number_has_one_place():
    """Each tensor of the released file is one of ours, three of ours, or of the one layer that is not run."""
    for part, n_unused in (("unet", 0), ("vae", 0), ("text", 12)):
        layout = layouts.released(part, SD21, ())
        pieces = [(slot.name, slot.piece) for slot in layout.slots.values()]
        assert len(set(pieces)) == len(pieces)
        whole = {name for name, _ in pieces}
        assert all({p for n, p in pieces if n == name} in ({None}, {0, 1, 2}) for name in whole)
        assert len(layout.expected) == len(whole)
        assert len(layout.unused) == n_unused


# Narrow: the numbers arrive where they belong.


def test_released_sd21_file(flat21):
    file, model = torch.load(flat21, weights_only=True), load_model(flat21)
    assert model.config.text.skip_last == 1
    assert model.config == replace(
        SD21,
        name="sd21-4view-variant",
        unet=replace(SD21.unet, model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2, 1),
                     context_dim=64),
        vae=replace(SD21.vae, block_out_channels=(32, 64)),
        text=replace(SD21.text, width=64, n_layers=3, n_heads=1, mlp_width=128),
    )  # fmt: skip
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(tensor, file[layouts.UNET + name])
    assert not any(module.training for module in (model.unet, model.vae, model.text))

    vae_state = {n.removeprefix(layouts.VAE): x for n, x in file.items() if n.startswith(layouts.VAE)}
    x, noise = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        latents = model.vae.encode(x, noise)
        torch.testing.assert_close(latents, vae_reference.encode(vae_state, x, noise), rtol=1e-4, atol=1e-5)
        decoded = vae_reference.decode(vae_state, latents)
        torch.testing.assert_close(model.vae.decode(latents), decoded, rtol=1e-4, atol=1e-4)
        text_state = {n.removeprefix(layouts.OPEN_CLIP): x for n, x in file.items() if n.startswith(layouts.OPEN_CLIP)}
        ids = model.tokenizer.encode("a brown bulldog, 3d asset").ids
        expected = text_reference.encode(text_state, ids, heads=1, n_layers=2)
        torch.testing.assert_close(model.text(ids), expected, rtol=1e-4, atol=2e-5)


def test_released_sd15_file(flat15):
    file, model = torch.load(flat15, weights_only=True), load_model(flat15)
    assert (model.config.unet.num_heads, model.config.unet.num_head_channels) == (8, None)
    assert (model.config.text.activation, model.config.text.skip_last) == ("quick_gelu", 0)
    assert model.unet.state_dict()["middle_block.1.proj_in.weight"].ndim == 4
    for name, tensor in model.text.model.state_dict().items():
        assert torch.equal(tensor, file[layouts.TRANSFORMERS + name])


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_published_folder(published21, tmp_path, prefix):
    path, parts = published21
    if not prefix:
        path = shutil.copytree(path, tmp_path / "copy")
        text = {name.removeprefix("text_model."): x for name, x in parts["text_encoder"].items()}
        save_file(text, path / "text_encoder" / "model.safetensors")
    model = load_model(path)
    assert model.config.schedule == SD21.schedule
    assert (model.config.text.n_layers, model.config.text.skip_last) == (4, 1)
    for part, names in (("unet", "unet"), ("vae", "vae"), ("text", "text_encoder")):
        stored = {name.removeprefix("text_model."): x for name, x in parts[names].items()}
        loaded = owner(part, getattr(model, part)).state_dict()
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name], stored[name]) for name in stored)
        assert {x.dtype for x in loaded.values()} == {torch.float16}
    as_float = load_model(path, dtype=torch.float32, parts=("vae.encoder", "text"))
    assert as_float.vae.encode(torch.zeros(1, 3, 8, 8)).dtype == torch.float32


def test_vae_with_attention_names_of_old_diffusers(published21, tmp_path):
    path = shutil.copytree(published21[0], tmp_path / "old")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, x in load_file(path / "vae" / "diffusion_pytorch_model.safetensors").items():
        for new, was in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        tensors[name] = x
    assert any("query" in name for name in tensors)
    save_file(tensors, path / "vae" / "diffusion_pytorch_model.safetensors")
    was, now = (load_model(p, parts=("vae",)).vae.state_dict() for p in (published21[0], path))
    assert all(torch.equal(was[name], now[name]) for name in was)


def test_variant_file_names_of_a_published_folder(published21, tmp_path):
    path = shutil.copytree(published21[0], tmp_path / "fp16")
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    load_model(path, parts=("unet",))


def test_parts_and_the_encoder_alone(flat21):
    whole, part = load_model(flat21, parts=("vae",)), load_model(flat21, parts=("vae.encoder",))
    assert (part.unet, part.text, part.tokenizer) == (None, None, None)
    assert not any(name.startswith("model.decoder") for name in part.vae.state_dict())
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(whole.vae.encode(x), part.vae.encode(x))
    with pytest.raises(ArgumentError, match=r"a part must be one of unet, vae, text, vae.encoder, got 'unnet'"):
        load_model(flat21, parts=("unnet",))


def test_training_on_loaded_weights_leaves_the_file_alone(tiny):
    before = {path.name: path.read_bytes() for path in tiny.iterdir()}
    model = load_model(tiny)
    for module in (model.unet, model.vae, model.text):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
                assert parameter.requires_grad
    assert before == {path.name: path.read_bytes() for path in tiny.iterdir()}


def stable_diffusion(folder: Path) -> Path:
    """A file as Stable Diffusion's own: no camera layers, and a second set of weights that nothing reads."""
    tensors = upstream.flat(upstream.NARROW21)
    plain = {name: x for name, x in tensors.items() if "camera_embed" not in name}
    save_file(plain | {"model_ema.decay": torch.zeros(())}, folder / "v2-1.safetensors")
    return folder / "v2-1.safetensors"


def test_stable_diffusion_begins_as_the_2d_model_it_was(tmp_path):
    path = stable_diffusion(tmp_path)
    with pytest.raises(ModelError, match=r"is a model of single images, without camera layers; .* with train --init"):
        load_model(path)
    model = load_model(path, torch.float32, add_cameras=True)
    assert model.config.unet.camera_in == "time"
    x, context, camera = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 64), torch.randn(2, 16)
    with torch.no_grad():
        plain = model.unet(x, torch.tensor(500), context)
        assert torch.equal(model.unet(x, torch.tensor(500), context, camera), plain)
    model.unet(x, torch.tensor(500), context, camera).square().mean().backward()
    assert model.unet.camera_embed[2].weight.grad.any()
    again = load_model(path, torch.float32, ("unet",), add_cameras=True)
    assert torch.equal(again.unet.camera_embed[0].weight, model.unet.camera_embed[0].weight)


# Our own folder.


def test_saved_and_loaded_again_is_bit_equal(flat21, tmp_path):
    model = load_model(flat21)
    with torch.no_grad():  # a call may pack weights into common storage
        model.unet(torch.zeros(2, 4, 8, 8), torch.tensor(5), torch.zeros(1, 77, 64), torch.zeros(2, 16), 2)
    save_model(model, tmp_path / "own")
    again = load_model(tmp_path / "own")
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [
        "config.json", "text.safetensors", "unet.safetensors", "vae.safetensors"]  # fmt: skip
    assert again.config == model.config
    for part in PARTS:
        before, after = getattr(model, part).state_dict(), getattr(again, part).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_subset_vocabulary_and_added_word_travel_with_the_folder(tiny, tmp_path):
    model = load_model(tiny)
    assert model.tokenizer.vocabulary == VOCABULARY
    model.tokenizer = model.tokenizer.with_token("sks")
    model.text = model.text.with_token(torch.tensor([5]))
    model.config = replace(model.config, text=model.text.config)
    save_model(model, tmp_path / "grown")
    grown = load_model(tmp_path / "grown")
    ids = grown.tokenizer.encode("a red sks chair").ids
    assert len(VOCABULARY) in ids[0]
    assert torch.equal(grown.text(ids), model.text(ids))


def test_stand_ins_travel_with_the_folder(tiny, tmp_path):
    (tiny / "stand_ins.txt").write_text("couch red chair\n")
    model = load_model(tiny, parts=("text",))
    assert model.tokenizer.encode("a couch").replaced == [[("couch", "red chair")]]
    whole = load_model(tiny)
    save_model(whole, tmp_path / "again")
    assert (tmp_path / "again" / "stand_ins.txt").read_text() == "couch red chair\n"
    save_model(whole, tiny, overwrite=True)  # which takes the file for a model's own


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("couch\n", "line 1: it must be a word and its stand-in"),
        ("sofa chair\ncouch\n", "line 2"),
        ("couch dragon\n", "'dragon' must be a word"),
    ],
)
def test_damaged_stand_ins_are_refused(tiny, text, told):
    (tiny / "stand_ins.txt").write_text(text)
    with pytest.raises(ModelError, match=told):
        load_model(tiny, parts=("text",))


def test_saving_refuses_an_existing_folder_and_half_a_model(tiny):
    model = load_model(tiny)
    with pytest.raises(OutputError, match="exists already"):
        save_model(model, tiny)
    save_model(model, tiny, overwrite=True)
    assert load_model(tiny).config == TINY
    with pytest.raises(ValueError, match="save_model: the model must have all parts, got none for"):
        save_model(load_model(tiny, parts=("unet",)), tiny.parent / "half")
    with pytest.raises(ValueError, match="VAE decoder"):
        save_model(load_model(tiny, parts=("unet", "vae.encoder", "text")), tiny.parent / "half")
    assert [path.name for path in tiny.parent.iterdir()] == ["tiny"]


def test_loading_opens_no_socket(tiny, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    load_model(tiny)
    with pytest.raises(ModelError):
        load_model("MVDream/MVDream")


# Missing and unreadable paths.


def test_missing_path_says_where_the_weights_are(tmp_path):
    with pytest.raises(ModelError) as info:
        load_model(tmp_path / "none.pt")
    for text in (str(tmp_path / "none.pt"), "MVDream/MVDream", "sd-v2.1-base-4view.pt", "5.22 GB", "4.27 GB",
                 "ashawkey/mvdream-sd2.1-diffusers", "python -m mvdream_fast.convert", "embedded"):  # fmt: skip
        assert text in str(info.value)
    assert info.value.exit_code == 3


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-here/x", "", "/dev/null", "/dev/zero", "\ud800"])
def test_odd_paths(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        load_model(name)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(ModelError, match="for a released .pt, give the file itself"):
        load_model(tmp_path)
    for name in ("unet", "vae", "text_encoder"):
        (tmp_path / name).mkdir()
    with pytest.raises(ModelError, match=r"unet must hold diffusion_pytorch_model.safetensors, .* got nothing"):
        load_model(tmp_path)


def test_embedded_name_points_into_the_package(monkeypatch, tiny):
    monkeypatch.setattr(places, "WEIGHTS", tiny.parent)
    monkeypatch.setattr(places, "EMBEDDED", {"embedded": tiny.name, "mini": tiny.name, "pixels": "none"})
    assert load_model("embedded", parts=("text",)).config == load_model("mini", parts=()).config == TINY
    with pytest.raises(ModelError, match="the model pixels is not part of this installation"):
        load_model("pixels")
