"""The generate command end to end with a tiny model: files, exit codes, and nothing left behind when it fails."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reference.random_model import random_model

from mvdream_fast import generate
from mvdream_fast.checkpoints.open import save_model
from mvdream_fast.core import cli, memory
from mvdream_fast.pipeline import MVDreamPipeline

ARGUMENTS = ["--steps", "2", "--device", "cpu", "--threads", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(random_model(), folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(*arguments: str) -> int:
    """The exit code of the command, run in this process."""
    try:
        cli.run(generate.main, generate.Flags, prog="generate", argv=list(arguments))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def everything(folder: Path = Path()) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_symlink()}


@pytest.mark.parametrize(("flags", "graphs"), [([], True), (["--no-graphs"], False)])
def test_graphs_are_made_unless_they_are_switched_off(flags, graphs, model, monkeypatch):
    made, plain = [], MVDreamPipeline.from_pretrained

    def from_pretrained(*arguments):
        made.append(plain(*arguments))
        return made[-1]

    monkeypatch.setattr(MVDreamPipeline, "from_pretrained", from_pretrained)
    assert command("a green chair", "--model", model, "-o", "out", "--n-views", "1", *flags, *ARGUMENTS) == 0
    (pipeline,) = made
    assert (pipeline.graphs, pipeline._guided_call.enabled) == (graphs, graphs)
    assert "graphs" not in json.loads(Path("out/config.json").read_text())  # the views are the same


def test_views_sheet_and_config(model, capsys):
    assert command("a green chair", "--model", model, "-o", "out", "--n-views", "3", "--seed", "7", *ARGUMENTS) == 0
    assert everything(Path("out")) == {"view_0.png", "view_1.png", "view_2.png", "views.png", "config.json"}
    config = json.loads(Path("out/config.json").read_text())
    asked = {
        "prompt": "a green chair", "seed": 7, "n_views": 3, "steps": 2, "guidance_scale": 7.5, "elevation_deg": 15,
        "suffix": ", 3d asset", "negative_prompt": "", "mode": "3d", "model": model, "timesteps": [501, 1],
    }  # fmt: skip
    assert {key: config[key] for key in asked} == asked
    assert np.array(config["cameras"]).shape == (3, 16)
    views = MVDreamPipeline.from_pretrained(model, "cpu", "float32")("a green chair", 3, seed=7, n_steps=2)
    for i, image in enumerate(views.images):
        drawn = np.asarray(Image.open(f"out/view_{i}.png"))
        # one more thread or another order of a sum may turn a rounding
        assert np.abs(drawn.astype(int) - np.asarray(image)).max() <= 1
        np.testing.assert_array_equal(np.asarray(Image.open("out/views.png"))[:, 16 * i : 16 * i + 16], drawn)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"--model {model}, tiny (1.1 M) on cpu in float32, 1 threads, seed 7"
    assert lines[-1] == "wrote 3 views to out/ (all of them in views.png)"
    assert "step 2/2" in lines[-2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["3d", "2d"])
def test_every_precision_on_every_machine(model, dtype, mode, capsys):
    """What auto means depends on the processor, so each is asked for by name; the views differ by roundings only."""
    arguments = ["a green chair", "--model", model, "--seed", "7", "--mode", mode, *ARGUMENTS]
    assert command(*arguments, "-o", "exact") == 0
    assert command(*arguments, "-o", "out", "--dtype", dtype) == 0
    assert f" on cpu in {dtype}," in capsys.readouterr().out
    exact, drawn = (np.asarray(Image.open(f"{name}/views.png")).astype(int) for name in ("exact", "out"))
    # 8 bits of mantissa through 2 guided steps; of 255
    assert np.abs(drawn - exact).mean() < 5


def test_a_prompt_that_begins_with_a_dash_and_a_home_in_quotes(model, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert command("--model", model, "-o", "~/x", *ARGUMENTS, "--", "-a green chair") == 0
    config = json.loads((tmp_path / "home/x/config.json").read_text())
    assert config["prompt"] == "-a green chair"
    assert not Path("~").exists()


def test_a_long_prompt_keeps_the_suffix_and_its_lost_words_are_named(model, capsys):
    """10 tokens fit: the suffix's 4, and the first 6 words."""
    assert command("a green car and a red car chair", "--model", model, "-o", "long", *ARGUMENTS) == 0
    assert "and is cut: not seen 'car', 'chair';" in capsys.readouterr().out.splitlines()[0]
    assert command("a green car and a red", "--model", model, "-o", "short", *ARGUMENTS) == 0
    assert Path("long/views.png").read_bytes() == Path("short/views.png").read_bytes()


def test_the_root_of_named_folders(model):
    assert command("a car", "--model", model, "--root", "all", *ARGUMENTS) == 0
    assert Path("all/latest/views.png").exists()


def test_default_folder_is_named_after_the_prompt_and_never_by_it(model):
    assert command("--prompt", "../../A Green\tChair! " + "very " * 30, "--model", model, *ARGUMENTS) == 0
    assert set(os.listdir()) == {"outputs"}
    (run,) = [path for path in Path("outputs").glob("*/*") if not path.is_symlink() and "latest" not in path.parts]
    assert run.parent.name.startswith("a-green-chair-very-very")
    assert len(run.parent.name) <= 60
    assert run.name.endswith("-s0")
    assert (run / "config.json").is_file()
    assert Path("outputs/latest").resolve() == run.resolve()


def test_the_first_line_names_words_that_are_not_seen(model, capsys):
    arguments = ["a green armchair and a car that is as big as a house", "--model", model, *ARGUMENTS]
    assert command(*arguments, "-o", "a") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "is cut: not seen" in first
    assert "'house'" in first
    assert "does not know 'armchair'" in first
    assert command(*arguments, "-o", "b", "--quiet") == 0
    out, err = capsys.readouterr()
    assert out == "b\n"
    assert "does not know 'armchair'" in err


def test_the_same_seed_writes_the_same_bytes(model):
    for name, seed in (("one", "3"), ("two", "3"), ("other", "4")):
        assert command("a car", "--model", model, "-o", name, "--seed", seed, *ARGUMENTS) == 0
    one, two, other = (Path(name, "views.png").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other


def test_a_random_seed_is_told(model, capsys):
    assert command("a car", "--model", model, "-o", "out", "--seed", "random", *ARGUMENTS) == 0
    seed = json.loads(Path("out/config.json").read_text())["seed"]
    assert f"seed {seed}" in capsys.readouterr().out.splitlines()[0]


def test_2d_mode_and_no_suffix(model):
    assert command("a car", "--model", model, "-o", "out", "--mode", "2d", "--no-suffix", *ARGUMENTS) == 0
    config = json.loads(Path("out/config.json").read_text())
    assert (config["cameras"], config["suffix"], config["mode"]) == (None, "", "2d")


def test_a_terminal_gets_a_bar(model, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for terminal, bar in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", terminal)
        assert command("a car", "--model", model, "-o", terminal, *ARGUMENTS) == 0
        out = capsys.readouterr().out
        assert ("sampling" in out, "step 2/2" in out) == (bar, not bar)


def test_an_empty_output_folder_is_filled(model):
    Path("out").mkdir()
    assert command("a car", "--model", model, "-o", "out", *ARGUMENTS) == 0
    assert "config.json" in everything(Path("out"))


def test_an_output_that_exists_is_refused_before_the_model_is_loaded(capsys):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    Path("file").write_text("keep")
    for output in ("out", "file", "file/below"):
        assert command("a car", "--model", "no-such-model", "-o", output) == 7
        assert "the output folder" in capsys.readouterr().err
    Path("outputs").write_text("a file in the way")
    assert command("a car", "--model", "no-such-model") == 7
    assert everything() == {"out", "out/mine.txt", "file", "outputs"}


def test_an_output_that_cannot_be_made_after_all_is_exit_7(model, capsys):
    assert command("a car", "--model", model, "-o", "/proc/nothing", *ARGUMENTS) == 7
    assert "/proc/nothing cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "truncated", "not-json", "foreign-key", "pickle"])
def test_a_model_that_cannot_be_read_is_exit_3_and_leaves_nothing(damage, model, tmp_path, capsys):
    folder = tmp_path / "broken"
    if damage != "missing":
        save_model(random_model(), folder)
    if damage == "truncated":
        weights = folder / "unet.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "not-json":
        (folder / "config.json").write_text("{")
    elif damage == "foreign-key":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "colour": 1}))
    elif damage == "pickle":
        folder = tmp_path / "evil.pt"
        folder.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    before = everything()
    assert command("a car", "--model", str(folder), *ARGUMENTS) == 3
    err = capsys.readouterr().err
    assert err.startswith("generate: ")
    assert "Traceback" not in err
    assert everything() == before


def test_more_views_than_there_is_memory_for_are_refused_before_they_are_drawn(model, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda device: (1 << 20, "free on this machine"))
    assert command("x", "--model", model, "--n-views", "1024", "-o", "out") == 4
    error = capsys.readouterr().err
    assert "drawing 1024 views at once needs about" in error
    assert "take a smaller --n-views" in error
    assert not Path("out").exists()


def test_a_full_disk_leaves_nothing(model, monkeypatch, capsys):
    write = Path.write_bytes

    def full(path, data):
        if path.name == "view_2.png":
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert command("a car", "--model", model, "-o", "out", *ARGUMENTS) == 7
    assert "cannot write into out: No space left on device; nothing was kept" in capsys.readouterr().err
    assert everything() == set()


def test_an_interrupt_leaves_nothing(model, monkeypatch):
    def interrupted(*_, callback, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(MVDreamPipeline, "__call__", interrupted)
    assert command("a car", "--model", model, "-o", "out", *ARGUMENTS) == 130
    assert everything() == set()


def test_foreign_devices_are_refused(model, capsys):
    assert command("a car", "--model", model, "--device", "toaster", "--steps", "2") == 2
    assert "--device must be auto, cpu, cuda or cuda:N, got 'toaster'" in capsys.readouterr().err


def test_no_steps_are_refused_by_the_flag(capsys):
    assert command("a car", "--steps", "0") == 2
    assert "generate: --steps must be at least 1, got 0" in capsys.readouterr().err
