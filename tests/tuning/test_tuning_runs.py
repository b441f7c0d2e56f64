"""The command `dreambooth`: an ordinary model at the end, the same bytes after a stop, a sentence and a code for each
mistake."""

import dataclasses
import errno
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from reference.random_model import random_model
from test_dreambooth import PROMPT, _in_tmp, assert_same, base, checkpoint, command, model, photos, wanted

from mvdream_fast import dreambooth
from mvdream_fast.checkpoints.open import load_model, save_model
from mvdream_fast.core import cli, memory, run_folder
from mvdream_fast.models.unet import MultiViewUNet
from mvdream_fast.tuning.dreambooth import DreamBoothTrainer
from mvdream_fast.tuning.runs import make_plan

__all__ = ["_in_tmp", "base", "model", "photos"]  # fixtures


@pytest.fixture(scope="module")
def whole(photos, model, tmp_path_factory) -> Path:
    """A finished run of six steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert command(*wanted(photos, model, "-o", folder, "--max_train_steps", 6)) == 0
    return folder


def test_a_run_leaves_an_ordinary_model(whole, model, base):
    assert {path.name for path in whole.iterdir()} == {
        ".lock", "config.json", "cmd.txt", "env.json", "log.jsonl", "photos", "samples", "checkpoints", "model",
    }  # fmt: skip
    tuned = load_model(whole / "model")
    assert json.loads((whole / "model/config.json").read_text())["kind"] == "model"
    assert tuned.tokenizer.encode(PROMPT).unknown == [["photo", "of"]]
    assert tuned.config.text.vocabulary_size == base.config.text.vocabulary_size + 1
    assert tuned.config.guidance == dataclasses.replace(base.config.guidance, uncond_mode="3d") != base.config.guidance
    moved = [not torch.equal(a, b) for a, b in zip(tuned.unet.parameters(), base.unet.parameters())]
    assert any(moved)
    assert Image.open(whole / "samples/000006.png").size == (64, 16)
    assert json.loads((whole / "config.json").read_text())["kind"] == "dreambooth"
    record = json.loads((whole / "log.jsonl").read_text().splitlines()[-1])
    assert record.keys() >= {"step", "val_photos"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_and_sds_take_the_tuned_model(whole, dtype, monkeypatch):
    from mvdream_fast import generate, sds
    from mvdream_fast.scene.asset import Asset

    monkeypatch.setattr(Asset, "turntable", lambda self, path, *_, **__: None)
    made = ["--model", str(whole), "--device", "cpu", "--threads", "1", "--dtype", dtype]
    cli.run(generate.main, generate.Flags, prog="generate", argv=[PROMPT, *made, "--steps", "1", "-o", "views"])
    assert Path("views/views.png").exists()
    small = ["--preset", "mini", "--steps", "2", "--render-size", "8", "--mesh-resolution", "24"]
    cli.run(sds.main, sds.Flags, prog="sds", argv=["--prompt", PROMPT, *made, *small])
    assert list(Path("outputs").rglob("asset.safetensors"))


def test_a_resumed_run_has_the_same_bytes(whole, photos, model, tmp_path):
    assert command(*wanted(photos, model, "-o", "half", "--max_train_steps", 3)) == 0
    assert command("--resume_from_checkpoint", "half", "--max_train_steps", 6, "--threads", 1) == 0
    assert_same(checkpoint(Path("half")), checkpoint(whole))
    for name in ("unet", "text", "vae"):
        file = f"model/{name}.safetensors"
        assert (Path("half") / file).read_bytes() == (whole / file).read_bytes()


def test_a_resume_obeys_or_refuses(photos, model, tmp_path, capsys):
    assert command(*wanted(photos, model, "-o", "run", "--max-train-steps", 1, "--fit", "crop")) == 0
    before = json.loads(Path("run/config.json").read_text())
    for flags, told in (
        (("--learning-rate", 1e-3), "got --learning-rate 0.001"),
        (("--seed", 0, "--lr-scheduler", "cosine"), "goes on with --lr-scheduler constant, as the run was begun, got"),
        (("--instance_data_dir", "elsewhere"), "got --instance-data-dir elsewhere"),
        (("--train_batch_size", 2), "--train-batch-size 4, as the run was begun, got --train-batch-size 2"),
        (("--fit", "auto"), "goes on with --fit crop, as the run was begun, got --fit auto"),
        (("--instance-token", "auto"), "goes on with --instance-token sks, as the run was begun, got"),
        (("-o", "elsewhere"), "-o must be left out, or be the folder of --resume"),
    ):
        assert command("--resume", "run", "--threads", 1, *flags) == 2
        assert told in capsys.readouterr().err
    assert json.loads(Path("run/config.json").read_text()) == before
    same = ("--instance-data-dir", photos, "--model", model, "--instance-prompt", PROMPT, "--sds-preset", "auto")
    assert command("--resume", "run", "--threads", 1, "--max-train-steps", 2, *same) == 0
    after = json.loads(Path("run/config.json").read_text())
    assert after["settings"] == before["settings"] | {"max_train_steps": 2}
    assert after["resumed"][0]["step"] == 1
    assert after["resumed"][0]["before"] == {"settings": {"max_train_steps": 1}}
    assert command("--resume", "run", "--threads", 1, "--max-train-steps", 1) == 2
    assert "--max-train-steps must be at least the 2 that are done, got 1" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "partial"), [({}, 100), ({"max_train_steps": 80}, 20), ({"max_train_steps": 3}, 1)])
def test_the_partial_tuning_is_a_quarter(base, photos, asked, partial):
    flags = dreambooth.Flags(instance_data_dir=photos, instance_prompt=PROMPT, stages="dreambooth3d", **asked)
    assert make_plan(dataclasses.asdict(flags), base.config).settings["partial_steps"] == partial


def test_adapters_through_the_command(photos, model):
    arguments = wanted(photos, model, "--lora_rank", 2, "--learning_rate", 1e-2)
    assert command(*arguments, "-o", "whole", "--max_train_steps", 2) == 0
    assert command(*arguments, "-o", "half", "--max_train_steps", 1) == 0
    assert command("--resume", "latest", "-o", "half", "--max_train_steps", 2, "--threads", 1) == 0
    assert_same(checkpoint(Path("half")), checkpoint(Path("whole")))
    assert all("lora_" in name for name in checkpoint(Path("whole")))
    plain = load_model("whole/model").unet.state_dict()
    assert plain.keys() == load_model(model).unet.state_dict().keys()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_rest_is_the_same(whole, photos, model, number, code, monkeypatch, capsys):
    train_step = DreamBoothTrainer.train_step

    def interrupted(self):
        if self.step == 2:
            signal.raise_signal(number)  # in the middle of a step: it is finished, then saved
        return train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(DreamBoothTrainer, "train_step", interrupted)
        assert command(*wanted(photos, model, "-o", "run", "--max_train_steps", 6)) == code
    assert "dreambooth: stopped; go on with --resume-from-checkpoint run" in capsys.readouterr().err
    assert not Path("run/model").exists()
    assert run_folder.load_latest(Path("run/checkpoints"))[0] == 3
    assert command("--resume", "run", "--threads", 1) == 0
    assert_same(checkpoint(Path("run")), checkpoint(whole))


def test_a_dry_run_makes_nothing(photos, model, capsys):
    assert command(*wanted(photos, model, "--dry_run", "-o", "out")) == 0
    out = capsys.readouterr().out
    assert "3 photos of 16 px; 400 steps of 4" in out
    assert "a step takes about" in out
    assert "TFLOP" in out
    assert list(Path().iterdir()) == []


def bad_photos(folder: Path) -> None:
    for name in ("empty", "many", "broken", "good"):
        (folder / name).mkdir()
    (folder / "broken/a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    for i in range(51):
        (folder / f"many/{i}.png").touch()
    Image.new("RGB", (4, 4)).save(folder / "good/a.png")
    Image.new("RGB", (4, 4)).save(folder / "file.png")
    (folder / "full").mkdir()
    (folder / "full/something").touch()


@pytest.mark.parametrize(
    ("data", "more", "code", "message"),
    [
        ("empty", (), 5, "must hold PNG, JPEG, WebP or HEIC photos, got none"),
        ("many", (), 5, "must hold 1 to 50 photos, got 51"),
        ("broken", (), 5, "a.png cannot be read as PNG, JPEG, WebP or HEIC"),
        ("file.png", (), 5, "must be a folder of photos, got a file"),
        ("nowhere", (), 5, "cannot read the folder of photos nowhere"),
        ("good", ("--instance_prompt", "a photo of a chair"), 2, "must hold the token 'sks'"),
        ("good", ("--instance_prompt", "a skske chair"), 2, "must hold the token 'sks'"),
        ("good", ("--instance_prompt", " "), 2, "the prompt is empty"),
        ("good", ("--instance_prompt", "a sks\x07"), 2, "control character"),
        ("good", ("--instance_token", "two words"), 2, "--instance-token must be one word"),
        ("good", ("--model", "nowhere"), 3, "there is no model at"),
        ("good", ("--model", "full"), 3, "is not a model folder"),
        ("good", ("-o", "full"), 7, "exists and is not empty"),
        ("good", ("-o", "file.png"), 7, "a file is in the way"),
        ("good", ("--max_train_steps", "0"), 2, "--max-train-steps must be at least 1"),
        ("good", ("--learning_rate", "0"), 2, "--learning-rate must be over 0"),
        ("good", ("--lambda_preserve", "-1"), 2, "--lambda-preserve must be from 0 to 1e+09"),
        ("good", ("--lambda_preserve", "nan"), 2, "--lambda-preserve must be from 0 to 1e+09"),
        ("good", ("--lambda_preserve", "1e300"), 2, "--lambda-preserve must be from 0 to 1e+09, got 1e+300"),
        ("good", ("--resolution", "17"), 2, "--resolution must be a multiple of 4"),
        ("good", ("--lora_rank", "2", "--train_text_encoder"), 2, "--lora-rank tunes the UNet alone"),
        ("good", ("--stages", "dreambooth3d", "--partial_steps", "9", "--max_train_steps", "5"), 2, "--partial-steps"),
        ("good", ("--sds_preset", "huge"), 2, "preset must be one of"),
        ("good", ("--resume", "nowhere"), 2, "must name a run folder"),
        ("good", ("--resume", "full", "-o", "full"), 5, "is not the configuration of a dreambooth run"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_code(data, more, code, message, model, tmp_path, capsys):
    bad_photos(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*") if path.parent.name != "many")
    last_wins = ("--instance_data_dir", data, "--instance_prompt", PROMPT, "--model", model, "--threads", 1)
    flags = dict(zip(last_wins[::2], last_wins[1::2]))
    plain = [x for x in more if x == "--train_text_encoder"]
    pairs = [x for x in more if x != "--train_text_encoder"]
    flags |= dict(zip(pairs[::2], pairs[1::2]))
    if "-o" not in flags:
        flags["-o"] = "out"
    assert command(*(x for pair in flags.items() for x in pair), *plain) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1
    assert before == sorted(path for path in tmp_path.rglob("*") if path.parent.name != "many")


def test_a_step_that_does_not_fit_is_refused(photos, model, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda _: (10 << 20, "free on this machine"))
    assert command(*wanted(photos, model, "-o", "out")) == 4
    errors = capsys.readouterr().err
    assert "a step needs about" in errors
    assert "0.01 GB is free on this machine; most goes to " in errors
    assert "--lora-rank 16 or --gradient-checkpointing or --train-batch-size 1" in errors
    assert not Path("out").exists()


def test_a_disk_without_room_is_refused_before_anything(photos, model, monkeypatch, capsys):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    assert command(*wanted(photos, model, "-o", "out")) == 7
    assert "checkpoints and the tuned model will take about" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_disk_that_fills_loses_nothing(whole, photos, model, monkeypatch, capsys):
    replace = run_folder.replace_file

    def fills(path, write, n_bytes):
        if path.name == "000004.safetensors":
            write = lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))  # noqa: E731
        replace(path, write, n_bytes)

    arguments = wanted(photos, model, "-o", "out", "--max_train_steps", 6, "--checkpointing_steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "replace_file", fills)
        assert command(*arguments) == 7
    assert "No space left on device" in capsys.readouterr().err
    assert run_folder.load_latest(Path("out/checkpoints"))[0] == 2
    assert command("--resume", "out", "--threads", 1) == 0
    assert_same(checkpoint(Path("out")), checkpoint(whole))


def test_a_checkpoint_of_another_model_is_refused(whole, photos, model, tmp_path, capsys):
    shutil.copytree(whole, "copy")
    other = random_model()
    other.config = dataclasses.replace(other.config, unet=dataclasses.replace(other.config.unet, camera_in="none"))
    with torch.device("meta"):
        other.unet = MultiViewUNet(other.config.unet)
    other.unet = other.unet.to_empty(device="cpu")
    with torch.no_grad():
        for p in other.unet.parameters():
            p.fill_(0.01)
    save_model(other, "other")
    data = json.loads(Path("copy/config.json").read_text())
    data["settings"]["model"] = str(Path("other").absolute())
    Path("copy/config.json").write_text(json.dumps(data))
    assert command("--resume", "copy", "--threads", 1) == 3
    assert "another configuration: unet.camera_in differs" in capsys.readouterr().err
