"""Training runs from their flags: both stages, published files, settings, output folders, and the command's errors."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import stable_diffusion, upstream
from test_batches import make_sample, picture
from test_train import TINY, data, flags, pictures, tiny

from mvdream_fast.checkpoints.open import load_model
from mvdream_fast.core import cli
from mvdream_fast.core.errors import ArgumentError, DivergedError, ModelError, OutputError
from mvdream_fast.data.batches import Shards
from mvdream_fast.data.shards import write_shard
from mvdream_fast.models.config import NAMED, with_settings
from mvdream_fast.models.tokenizer import build_subset_vocabulary
from mvdream_fast.train import Flags, main
from mvdream_fast.training import request, runs
from mvdream_fast.training.initial_model import adjusted, initial_model, new_model

__all__ = ["data", "tiny"]  # fixtures


def test_decoder_only_leaves_the_latents(data, vae_model, tmp_path):
    main(flags(data, tmp_path, stage="vae", init=str(vae_model), decoder_only=True, steps=3, batch_size=4))
    before, after = load_model(vae_model), load_model(tmp_path / "model")
    images = pictures(2)
    assert before.config == after.config
    assert torch.equal(before.vae.float().encode(images), after.vae.float().encode(images))
    z = torch.ones(1, 4, 4, 4)
    assert not torch.equal(before.vae.decode(z), after.vae.decode(z))


@pytest.fixture(scope="module")
def vae_model(data, tmp_path_factory):
    """The first stage's output, through the command's main."""
    folder = tmp_path_factory.mktemp("vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NAMED, "mini", TINY)
        main(flags(data, folder, stage="vae", steps=3, batch_size=4))
    return folder / "model"


def test_both_stages_make_a_model_that_loads(data, vae_model, tmp_path):
    first = load_model(vae_model)
    assert first.config.vae.scale_factor != 1.0
    assert first.tokenizer.encode("a red thing").unknown == [[]]
    main(flags(data, tmp_path, vae=str(vae_model), cache_latents=True, sheet_prompts=("a red thing",)))
    model = load_model(tmp_path / "model")
    assert model.unet.out[2].weight.dtype == torch.float16
    assert model.config == first.config
    sheet = Image.open(tmp_path / "samples" / "000002.png")
    assert sheet.size == (4 * 16, 16)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 2
    assert records[-1].keys() >= {"val_multi_view", "val_2d"}
    more = {"dtype": "bf16", "gradient_checkpointing": True, "accumulate": 2}
    main(flags(data, tmp_path, vae=str(vae_model), cache_latents=True, resume=True, steps=3, **more))
    assert (tmp_path / "checkpoints" / "LATEST").read_text().strip() == "000003.safetensors"
    assert load_model(tmp_path, parts=()).config == first.config


@pytest.mark.parametrize("kind", ["released", "stable diffusion", "stable diffusion folder"])
def test_training_goes_on_from_published_files(data, tmp_path, kind, capsys):
    """Narrow files, at the size of the data; a multi-view step teaches the new camera layers."""
    if kind == "released":
        torch.save(upstream.flat(upstream.NARROW21), tmp_path / "model.pt")
    elif kind == "stable diffusion":
        stable_diffusion.write_flat(tmp_path / "model.pt")
    else:
        stable_diffusion.write_folder(tmp_path / "model.pt")
    more = {"init": str(tmp_path / "model.pt"), "settings": ("vae.image_size=16",), "freeze_text": True}
    main(flags(data, tmp_path / "out", n_views=2, steps=1, multi_view_share=1.0, **more))
    model = load_model(tmp_path / "out" / "model")
    assert model.config.unet.camera_in == "time"
    assert model.config.vae.image_size == 16
    assert model.unet.camera_embed[2].weight.any()
    assert ("does not say what its UNet predicts" in capsys.readouterr().out) == (kind == "stable diffusion")
    with pytest.raises(ArgumentError, match=r"--set must leave the widths and depths of --init as they are, got vae.l"):
        main(flags(data, tmp_path / "no", **more | {"settings": ("vae.layers_per_block=1",)}))


@pytest.mark.parametrize("where", ["time", "attention", "time+attention", "none"])
@pytest.mark.parametrize("mixing", ["3d", "temporal"])
def test_a_2d_model_gets_cameras_and_views(where, mixing):
    """As the paper starts from Stable Diffusion: what it could stays, to the bit; layers that are added learn."""
    rows = build_subset_vocabulary(["a red chair"])
    old = new_model("mini", rows, seed=0, settings=("unet.camera_in=none",))
    g = torch.Generator().manual_seed(1)
    for parameter in old.unet.parameters():  # none of the layers that close a branch may be zero
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=g)
    latents, camera = torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 16, generator=g)
    context, t = torch.randn(2, 5, old.config.unet.context_dim, generator=g), torch.tensor([3, 3, 500, 500])
    both = context.repeat_interleave(2, 0)
    with torch.no_grad():
        alone, together = old.unet(latents, t, both), old.unet(latents, t, context, n_views=2)
    assert not torch.allclose(alone, together, atol=1e-3)
    settings = (f"unet.camera_in={where}", f"unet.view_mixing={mixing}")
    new = adjusted(old, settings, seed=0)
    assert new.config.unet == with_settings(new.config, settings).unet
    with torch.no_grad():
        torch.testing.assert_close(new.unet(latents, t, both), alone, rtol=0, atol=0)
        mixed = new.unet(latents, t, context, camera, n_views=2)
    torch.testing.assert_close(mixed, together if mixing == "3d" else alone, rtol=1e-5, atol=1e-5)
    new.unet(latents, t, context, camera, n_views=2).square().mean().backward()
    for layers, there in (("camera_", where != "none"), ("attn_views.", mixing == "temporal")):
        learning = [name for name, p in new.unet.named_parameters() if layers in name and p.grad.any()]
        assert bool(learning) == there


@pytest.mark.parametrize(
    "setting", ["unet.view_mixing=2d", "unet.view_mixing=temporal", "unet.camera_in=text", "unet.camera_in=attention"]
)
def test_a_new_model_with_settings_and_a_trained_text_tower(data, vae_model, tmp_path, setting):
    out = tmp_path / "out"
    shared = {"vae": str(vae_model), "text": str(vae_model), "freeze_text": True}
    main(flags(data, out, steps=1, settings=(setting,), cache_latents=True, latents=tmp_path / "latents", **shared))
    before, after = load_model(vae_model), load_model(out / "model")
    assert after.config.unet == with_settings(TINY, [setting]).unet
    for name, weight in before.text.state_dict().items():
        assert torch.equal(weight.half(), after.text.state_dict()[name])
    assert {p.name for p in tmp_path.iterdir()} == {"out", "latents.npy", "latents.filled.npy", "latents.key"}


def test_output_folders(data, vae_model, tmp_path):
    with pytest.raises(ArgumentError, match="--resume must find a checkpoint"):
        main(flags(data, tmp_path, vae=str(vae_model), resume=True))
    main(flags(data, tmp_path, vae=str(vae_model), steps=1))
    with pytest.raises(OutputError, match="holds a training run already"):
        main(flags(data, tmp_path, vae=str(vae_model)))
    with pytest.raises(ArgumentError, match="goes on with --stage unet, as the run was begun, got --stage vae"):
        main(flags(data, tmp_path, stage="vae", resume=True))
    (tmp_path / "config.json").unlink()  # a run from before there was a record
    with pytest.raises(ModelError, match="is of train-unet, not of train-vae"):
        main(flags(data, tmp_path, stage="vae", resume=True))
    assert not (tmp_path / "config.json").exists()


def test_a_resume_keeps_what_is_not_given_and_says_what_changed(data, vae_model, tmp_path):
    begun = {"vae": str(vae_model), "lr": 1e-3, "caption_dropout": 0.5, "sheet_prompts": ("a red thing",)}
    main(flags(data, tmp_path, steps=1, seed=4, **begun))
    first = json.loads((tmp_path / "config.json").read_text())
    assert first["kind"] == "training"
    assert (first["settings"]["lr"], first["settings"]["seed"], first["settings"]["steps"]) == (1e-3, 4, 1)
    assert (first["machine"]["device"], first["machine"]["processes"]) == ("cpu", 1)
    for changed, told in (
        ({"vocabulary": tmp_path / "words.txt"}, "got --vocabulary"),
        ({"seed": 5}, "--seed 4, as the run was begun, got --seed 5"),
        ({"init": "embedded"}, "--init None, as the run was begun, got --init embedded"),
    ):
        with pytest.raises(ArgumentError, match=told):
            main(flags(data, tmp_path, resume=True, steps=2, **changed))
    main(flags(data, tmp_path, resume=True, steps=2, lr=1e-4))
    last = json.loads((tmp_path / "config.json").read_text())
    assert last["settings"] == first["settings"] | {"steps": 2, "lr": 1e-4}
    assert last["resumed"][0]["step"] == 1
    assert last["resumed"][0]["before"] == {"settings": {"steps": 1, "lr": 1e-3}}
    assert (tmp_path / "samples" / "prompts.txt").read_text() == "a red thing\n"


def test_a_resumed_run_keeps_its_vocabulary(vae_model, tmp_path, capsys):
    shards, words = tmp_path / "shards", tmp_path / "words.txt"
    shards.mkdir()
    write_shard(shards / "train-00000.tar", [make_sample(i) for i in range(2)])
    words.write_text("a turquoise thing\n")
    out = tmp_path / "out"
    main(flags(shards, out, vae=str(vae_model), vocabulary=words, steps=1, sheet_minutes=0.0))
    assert load_model(out / "model", parts=("text",)).tokenizer.encode("turquoise dragon").unknown == [["dragon"]]
    dragon = make_sample(2)
    dragon.meta.update(caption="a turquoise dragon", variants=[])
    write_shard(shards / "train-00001.tar", [dragon])
    main(flags(shards, out, vae=str(vae_model), resume=True, steps=2, sheet_minutes=0.0))
    assert "1 words of the captions are outside the vocabulary: dragon" in capsys.readouterr().out
    assert load_model(out / "model", parts=("text",)).tokenizer.encode("turquoise").unknown == [[]]


def test_stand_ins_are_kept_but_for_words_of_the_captions(vae_model, data, tmp_path):
    words = tmp_path / "stand_ins.txt"
    # "thing0" is a word of a caption, "scarlet thing0" is not.
    words.write_text("scarlet red\nthing0 red\nred_thing0 red\nscarlet_thing0 red\n")
    main(flags(data, tmp_path / "out", vae=str(vae_model), stand_ins=words, steps=1))
    tokenizer = load_model(tmp_path / "out" / "model", parts=("text",)).tokenizer
    assert tokenizer.stand_ins == {"scarlet": "red", "scarlet_thing0": "red"}
    assert tokenizer.encode("a scarlet red").replaced == [[("scarlet", "red")]]


def test_nothing_stands_in_for_a_word_before_a_comma(vae_model, data, tmp_path):
    words = tmp_path / "stand_ins.txt"
    words.write_text("box red\n")
    args = flags(data, tmp_path / "out", vae=str(vae_model), stand_ins=words)
    assert initial_model(args, tmp_path, ["a red box, old"]).tokenizer.stand_ins == {}


@pytest.mark.parametrize(("size", "near"), [(8, 8), (16, 16), (24, 24), (32, 16)])
def test_the_evaluator_takes_shards_of_any_size(size, near, tmp_path):
    write_shard(tmp_path / "train-00000.tar", [make_sample(0, size)])
    assert runs._near(Shards(tmp_path), 16).size == near


def test_a_list_of_stand_ins_that_is_not_there_is_refused(vae_model, data, tmp_path):
    with pytest.raises(ModelError, match="wrong.txt"):
        main(flags(data, tmp_path / "out", vae=str(vae_model), stand_ins=tmp_path / "wrong.txt", steps=1))


def command(*arguments):
    return [sys.executable, "-m", "mvdream_fast.train", *map(str, arguments)]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--data", "nowhere", "-o", "out"), 5, "no train shards in nowhere"),
        (("--data", ".", "-o", "out", "--config", "big"), 2, "--config must be one of"),
        (("--data", ".", "-o", "out", "--timestep-shift", "0"), 2, "--timestep-shift must be over 0 and at most 100"),
        (("--data", ".", "-o", "out", "--multi-view-share", "1.5"), 2, "--multi-view-share must be from 0 to 1"),
        (("--data", ".", "-o", "out", "--wide-share", "-0.5"), 2, "--wide-share must be from 0 to 1"),
        (("--data", ".", "-o", "out", "--balance", "1.5"), 2, "--balance must be from 0 to 1"),
        (("--data", ".", "-o", "out", "--balance", "1", "--stage", "vae"), 2, "--balance must come with --stage unet"),
        (("--data", ".", "-o", "out", "--balance", "1", "--data-order", "epochs"), 2, "--data-order random"),
        (("--data", ".", "-o", "out", "--steps", "0"), 2, "--steps must be at least 1"),
        (("--data", ".", "-o", "out", "--set", "unet.views=2d"), 2, "--set must be NAME=VALUE, got 'unet.views=2d'"),
        (("--data", ".", "-o", "out", "--steps", "9", "--decay", "10"), 2, "--decay must be from 0 to --steps"),
        (("--data", ".", "-o", "out", "--stage", "vae", "--decoder-only"), 2, "--decoder-only must come with"),
        (("--data", ".", "-o", "out", "--lr", "inf"), 2, "--lr must be over 0 and finite, got inf"),
        (
            ("--data", ".", "-o", "out", "--stage", "cleaner", "--set", "x=1"),
            2,
            "--set must be left out with --stage cl",
        ),
        (("--data", ".", "-o", "out", "--stage", "vae", "--dtype", "bf16"), 2, "--dtype must be left out with --stage"),
        (
            ("--data", ".", "-o", "out", "--stage", "evaluator", "--init", "x"),
            2,
            "--init must be left out with --stage",
        ),
        (("--data", ".", "-o", "out", "--init", "x", "--text", "y"), 2, "--text must be left out with --init"),
        (("--data", ".", "-o", "out", "--sheet-prompts", "a \x07"), 2, "--sheet-prompts must be prompts: the prompt h"),
        (("--data", ".", "-o", "out", "--stage", "cleaner"), 2, "--stage cleaner must come with --init"),
    ],
)
def test_mistakes_are_one_sentence(in_tmp, arguments, code, text, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(main, Flags, prog="train", argv=[*arguments, "--threads", "1"])
    said = capsys.readouterr().err
    assert stop.value.code == code
    assert text in said
    assert len(said.strip().splitlines()) == 1
    assert not Path("out").exists()


def test_sigterm_saves_and_says_143(data, vae_model, tmp_path):
    process = subprocess.Popen(
        command("--data", data, "-o", tmp_path, "--init", vae_model, "--steps", 10**6, "--batch-size", 1,
                "--threads", 1, "--sheet-minutes", 0),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.readline()  # the first log line: training runs
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert (tmp_path / "checkpoints" / "LATEST").exists()
    assert (tmp_path / "model" / "config.json").exists()
    with pytest.raises(
        ModelError, match=r"is a run that is not finished \(step \d+ of 1000000\): go on with it by --res"
    ):
        load_model(tmp_path)


def test_smaller_images_and_pictures_beside_the_renders(vae_model, tmp_path):
    """Renders of twice the model's size, and pictures: both are encoded, and their words are in the vocabulary."""
    shards, out = tmp_path / "shards", tmp_path / "out"
    write_shard(shards_file(shards, "train"), [make_sample(30 * i, size=32) for i in range(4)])
    write_shard(shards_file(shards, "held_out"), [make_sample(200, size=32)])
    write_shard(shards_file(shards, "pictures"), [picture(i) for i in range(8)])
    share = {"multi_view_share": 0.0, "cache_latents": True, "steps": 1}
    main(flags(shards, out, vae=str(vae_model), **share))
    files = sorted(path.name for path in out.glob("latents*.npy"))
    assert files == ["latents-pictures.filled.npy", "latents-pictures.npy", "latents.filled.npy", "latents.npy"]
    assert np.load(out / "latents-pictures.npy").shape == (8, 3, 1, 4, 4, 4)
    assert np.load(out / "latents.npy").shape == (4, 3, 16, 4, 4, 4)
    assert load_model(out / "model").tokenizer.encode("a picture3").unknown == [[]]
    write_shard(shards_file(shards, "train"), [make_sample(0, size=24)])
    with pytest.raises(ArgumentError, match="the model must be given images of 16 px, got shards of 24 px"):
        main(flags(shards, tmp_path / "other", vae=str(vae_model), **share))


def shards_file(folder, split):
    folder.mkdir(exist_ok=True)
    return folder / f"{split}-00000.tar"


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"batch_size": 4, "data_order": "epochs"}])
def test_wide_steps_need_pairs_of_scenes_at_random(data, tmp_path, change):
    with pytest.raises(ArgumentError, match="--wide-share must come with an even --batch-size"):
        main(flags(data, tmp_path / "out", wide_share=0.5, **change))


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_stays_as_it_is(data, tmp_path, resume):
    record, out = tmp_path / "out" / "config.json", tmp_path / "out"
    out.mkdir()
    for kind, told in (({"kind": "dreambooth"}, "of dreambooth"), ({}, "of something else")):
        record.write_text(json.dumps(kind))
        with pytest.raises(OutputError, match=f"must be new or a training run's, its config.json is {told}"):
            main(flags(data, out, resume=resume))
        assert json.loads(record.read_text()) == kind
    record.unlink()
    (out / "log.jsonl").write_text("somebody's\n")
    if not resume:
        with pytest.raises(OutputError, match="holds log.jsonl already, which a new run would replace"):
            main(flags(data, out))
    assert [path.read_text() for path in out.iterdir()] == ["somebody's\n"]


def test_a_run_begun_anew_keeps_nothing_of_one_that_left_no_checkpoint(data, vae_model, tmp_path, monkeypatch):
    def died(*_):
        (tmp_path / "log.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
        (tmp_path / "samples").mkdir()
        (tmp_path / "samples" / "000010.png").touch()
        raise DivergedError("that will do")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "initial_model", died)
        with pytest.raises(DivergedError):
            main(flags(data, tmp_path, vae=str(vae_model), lr=1e-3))
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1e-5"])
    main(flags(data, tmp_path, vae=str(vae_model), lr=1e-5, steps=1))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1]
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"000001.png", "prompts.txt"}
    assert (tmp_path / "cmd.txt").read_text() == "python -m mvdream_fast.train --lr 1e-5\n"
    record = json.loads((tmp_path / "config.json").read_text())
    assert (record["settings"]["lr"], "resumed" in record) == (1e-5, False)
    (tmp_path / "checkpoints" / "LATEST").unlink()
    with pytest.raises(OutputError, match="holds model already, which a new run would replace"):
        main(flags(data, tmp_path, vae=str(vae_model)))


@pytest.mark.parametrize(
    ("begun", "given", "told"),
    [
        ({"steps": 30000}, {"decay": 25000}, None),
        ({"steps": 3}, {"decay": 1000}, "--decay must be from 0 to --steps, got 1000"),
        ({"data_order": "epochs"}, {"balance": 0.5}, "--balance must come with --stage unet and --data-order random"),
        ({"steps": 9}, {"steps": 2}, "--steps must be at least the 3 that are done, got 2"),
        ({"steps": 9, "decay": 5}, {"steps": 4}, "--decay must be from 0 to --steps, got 5"),
        ({"steps": 9}, {"steps": 3}, None),
        ({"steps": 9}, {"steps": 10}, None),
        ({"stage": "vae"}, {"dtype": "bf16"}, "--dtype must be left out with --stage vae"),
    ],
)
def test_flags_of_a_resume_are_checked_with_those_it_was_begun_with(begun, given, told, tmp_path):
    """A relation between two flags, one of which is on record, and the step that is done."""
    record = {"kind": "training", "settings": begun}
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "LATEST").write_text("000003.safetensors\n")
    asked = Flags(data=tmp_path, output=tmp_path, resume=True, **given)
    if told is None:
        args = request.settled(asked)
        assert all(getattr(args, name) == value for name, value in (begun | given).items())
    else:
        with pytest.raises(ArgumentError, match=told):
            request.settled(asked)


def test_an_autoencoder_is_made_as_set(data, tmp_path):
    sizes = ("vae.layers_per_block=2", "vae.latent_channels=8")
    main(flags(data, tmp_path / "out", stage="vae", steps=1, settings=sizes))
    config = load_model(tmp_path / "out" / "model", parts=("vae",)).config.vae
    assert (config.layers_per_block, config.latent_channels) == (2, 8)
    smaller = ("vae.layers_per_block=1",)
    with pytest.raises(ArgumentError, match="--set must leave the widths and depths of --init as they are"):
        main(flags(data, tmp_path / "no", stage="vae", init=str(tmp_path / "out" / "model"), settings=smaller))
    with pytest.raises(ArgumentError, match="--set must leave the autoencoder room to begin"):
        main(flags(data, tmp_path / "no", stage="vae", settings=("vae.latent_channels=40",)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_views": 3}, "--n-views must divide the 16 views of a rendered orbit, got 3"),
        (
            {"n_views": 16, "wide_share": 0.1},
            "--wide-share must come with an --n-views whose double divides the 16 views",
        ),
        ({"n_views": 3, "stage": "cleaner", "init": "embedded"}, "--n-views must divide the 16 views"),
    ],
)
def test_views_that_orbits_do_not_have_are_refused_at_once(data, tmp_path, change, told):
    with pytest.raises(ArgumentError, match=told):
        main(flags(data, tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_weights_that_half_precision_cannot_hold_are_not_exported(data, vae_model, tmp_path):
    """At this rate fp32 holds the weights, and the model's fp16 does not; or the validation's loss is no number."""
    wanted = r"(beyond half precision's 65504|val_\w+ is (nan|inf) at step 1); begin again in another folder"
    with pytest.raises(DivergedError, match=wanted):
        main(flags(data, tmp_path, vae=str(vae_model), steps=1, lr=1e5, warmup=0))
    assert not (tmp_path / "model").exists()
    model = new_model("mini", build_subset_vocabulary(["a chair"]), seed=0)
    model.unet.out[2].weight.data.fill_(1e5)
    with pytest.raises(DivergedError, match=r"out\.2\.weight of the unet is beyond half precision's 65504"):
        runs._export(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
