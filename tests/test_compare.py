"""The compare command end to end with a tiny model: its files, what it makes again and what not, failures, signals."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reference.browser import CHROMIUM, Browser
from reference.random_model import random_model

from mvdream_fast import compare
from mvdream_fast.checkpoints.open import save_model
from mvdream_fast.core import cli
from mvdream_fast.distill import child_run
from mvdream_fast.distill.child_run import Result, result_of
from mvdream_fast.distill.request import resolve
from mvdream_fast.evaluation.comparison import Compared, markdown, means
from mvdream_fast.evaluation.comparison_page import grid, page

CHAIR = "a green chair"
SETTINGS = "[sds]\nrender_size = [8]\nsamples_per_ray = 24\n[export]\nmesh_resolution = 24\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """tiny/, a random model; run.toml; nothing/, which holds no model."""
    place = tmp_path_factory.mktemp("comparison")
    save_model(random_model(), place / "tiny")
    (place / "run.toml").write_text(SETTINGS)
    (place / "nothing").mkdir()
    return place


def arguments(place: Path, *more: str, second: str = "tiny") -> list[str]:
    models = [f"mvdream={place / 'tiny'}", f"mvdream-sharp={place / second}"]
    return [
        CHAIR, "--recipes", "mvdream", "mvdream-sharp", "--models", *models, "--config", str(place / "run.toml"),
        "--steps", "2", "--device", "cpu", "--threads", "1", *more,
    ]  # fmt: skip


def command(*argv: str) -> int:
    """The exit code of the command, run in this process."""
    try:
        cli.run(compare.main, compare.Flags, prog="compare", argv=list(argv))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def run_folder(out: Path, recipe: str) -> Path:
    (folder,) = (out / "runs").glob(f"a-green-chair-*/{recipe}")
    return folder


def test_a_failing_recipe_stops_no_other_and_only_what_is_missing_is_made(place, tmp_path, capfd):
    """One broken model at first; once it is mended the same command makes that run alone."""
    out = tmp_path / "out"
    assert command(*arguments(place, "-o", str(out), second="nothing")) == 3
    said = capfd.readouterr()
    assert "compare: 'a green chair', mvdream-sharp failed (3); the others go on" in said.err
    assert "| mvdream-sharp | 0 of 1 | - |" in said.out
    first = json.loads((out / "compare.json").read_text())["runs"]
    assert [run["exit_code"] for run in first] == [0, 3]
    assert "the recipe mvdream-sharp needs a multi-view model: fetch MVDream" in first[1]["message"]
    assert first[0]["seconds"] > 0.1
    assert 0.1 < first[0]["memory_gb"] < 4
    assert first[0]["guided_views"] == 2 * 4
    assert first[0]["run"] == str(run_folder(out, "mvdream").relative_to(out))
    assert {path.name for path in out.iterdir()} == {"runs", *(f"compare.{x}" for x in ("html", "json", "md", "png"))}

    asset = run_folder(out, "mvdream") / "asset.safetensors"
    made = asset.stat().st_mtime_ns
    assert command(*arguments(place, "-o", str(out))) == 0
    assert "'a green chair', mvdream: finished already" in capfd.readouterr().out
    assert asset.stat().st_mtime_ns == made
    again = json.loads((out / "compare.json").read_text())["runs"]
    assert again[0] == first[0]
    assert (again[1]["exit_code"], again[1]["message"]) == (0, "")
    assert again[1]["seconds"] > first[1]["seconds"]  # those of the failure count
    with Image.open(out / "compare.png") as image:
        assert image.size == (2 * 2 * 160, 22 + 22 + 160)
    html = (out / "compare.html").read_text()
    assert html.count("data:image/webp;base64,") == 2
    assert "<td>guided_from</td>" not in html  # the same in both
    assert "<td>guidance_scale</td>" not in html
    assert "<td>recipe</td><td>&quot;mvdream&quot;</td><td>&quot;mvdream-sharp&quot;</td>" in html

    assert command(*arguments(place, "-o", str(out), "--seed", "1")) == 2
    assert "holds a run with seed 0, but asked for is 1; name another by -o" in capfd.readouterr().err


def test_a_signal_stops_the_run_in_time_and_the_same_command_goes_on(place, tmp_path):
    out = tmp_path / "out"
    line = [sys.executable, "-m", "mvdream_fast.compare", CHAIR, "--recipes", "mvdream", "-o", str(out), "--quiet"]
    line += ["--models", f"mvdream={place / 'tiny'}", "--config", str(place / "run.toml"), "--steps", "80"]
    line += ["--device", "cpu", "--threads", "1"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any(log.read_text().count("\n") > 2 for log in out.glob("runs/*/*/log.jsonl")))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "compare: stopped; the same command goes on" in errors
    folder = run_folder(out, "mvdream")
    first = result_of(folder)
    assert first.exit_code == 143
    assert not (out / "compare.html").exists()
    n_logged = (folder / "log.jsonl").read_text().count("\n")
    assert 2 < n_logged < 80
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("| recipe | finished | R-precision |")
    assert result_of(folder).seconds > first.seconds
    (session,) = json.loads((folder / "config.json").read_text())["resumed"]
    assert session["step"] == n_logged
    assert (folder / "log.jsonl").read_text().count("\n") == 80


def wait_for(holds, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["-o", "x"], 2, "give one prompt, or several with --prompts-file"),
        (["a chair", "--prompts-file", "y", "-o", "x"], 2, "give one prompt, or several with --prompts-file"),
        (["a chair"], 2, "-o must name the folder of the comparison"),
        (["a chair", "-o", "x", "--recipes", "mvdream", "mvdream"], 2, "each once, got mvdream mvdream"),
        (["a chair", "-o", "x", "--recipes", "magic"], 2, ""),
        (["a chair", "-o", "x", "--first", "3"], 2, "--first counts the prompts of --prompts-file"),
        (["a chair", "-o", "x", "--steps", "0"], 2, "--steps must be at least 1, got 0"),
        (["a chair", "-o", "x", "--seed", "-1"], 2, "--seed must be at least 0, got -1"),
        (["a chair", "-o", "x", "--models", "tiny"], 2, "--models must be RECIPE=MODEL or RECIPE=MODEL,MODEL"),
        (
            ["a chair", "-o", "x", "--models", "mvdream=a,b,c"],
            2,
            "RECIPE=MODEL,MODEL, each for one of --recipes, got",
        ),
        (
            ["a chair", "-o", "x", "--models", "mvdream=a,b"],
            2,
            "--refine-model must be left out with the recipe",
        ),
        (["a chair", "-o", "x", "--models", "mvdream-sharp=y"], 2, "each for one of --recipes, got 'mvdream-sharp=y'"),
        (["", "-o", "x"], 2, "prompt is empty"),
        (["--prompts-file", "none.txt", "-o", "x"], 5, "cannot read none.txt"),
        (["--prompts-file", "empty.txt", "-o", "x"], 5, "empty.txt must hold at least one prompt, each once"),
        (["--prompts-file", "twice.txt", "-o", "x"], 5, "twice.txt must hold at least one prompt, each once"),
        (["a chair", "--config", "none.toml", "-o", "x"], 5, "cannot read none.toml"),
    ],
)
def test_wrong_use_is_one_sentence_and_makes_nothing(argv, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("# nothing\n\n")
    Path("twice.txt").write_text("a chair\na chair\n")
    assert command(*argv) == code
    assert message in capsys.readouterr().err
    assert not Path("x").exists()


def test_every_prompt_of_a_file_gets_every_recipe(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# a comment\na red car\n\na blue boat\na pink cup\n")
    flags = compare.Flags(prompts_file=file, first=2, output=tmp_path / "out", size="fast", seed=7)
    jobs = compare.plan(flags)
    assert [(job.request.prompt, job.request.config.recipe) for job in jobs] == [
        (prompt, recipe)
        for prompt in ("a red car", "a blue boat")
        for recipe in ("mvdream", "dreamfusion-if", "magic3d-if-sd", "textmesh-if", "prolificdreamer")
    ]
    assert {(job.request.seed, job.request.config.preset) for job in jobs} == {(7, "fast")}
    models = [["embedded"], ["pixels"], ["pixels", "embedded"], ["pixels"], ["embedded"]]
    assert [job.request.models() for job in jobs[:5]] == models
    assert len({job.folder for job in jobs}) == 10
    named = dataclasses.replace(flags, models=("magic3d-if-sd=x,~/y", "mvdream=z"))
    home = str(Path("~/y").expanduser())
    assert [job.request.models() for job in compare.plan(named)[:3]] == [["z"], ["pixels"], ["x", home]]
    assert compare.plan(named)[2].begin[-2:] == ["--model=x", f"--refine-model={home}"]
    assert jobs[1].begin == ["--prompt=a red car", "--recipe=dreamfusion-if", "--preset=fast", "--seed=7"]


def planned(*argv: str) -> list[compare.Job]:
    """The runs that a command line asks for."""
    plans = []
    cli.run(lambda flags: plans.append(compare.plan(flags)), compare.Flags, prog="compare", argv=[CHAIR, *argv])
    return plans[0]


@pytest.mark.parametrize(
    ("settings", "more", "preset", "seed", "begin"),
    [
        ('preset = "fast"\nseed = 3', [], "fast", 3, []),
        ('[sds]\npreset = "fast"', [], "fast", 0, []),
        ('preset = "auto"\nseed = 3', ["--seed", "0"], "mini", 0, ["--preset=mini", "--seed=0"]),
        ('preset = "fast"\nseed = "random"', ["--seed", "4"], "fast", 4, ["--seed=4"]),
        ('preset = "fast"', ["--size", "fast"], "fast", 0, ["--preset=fast"]),
    ],
)
def test_the_settings_file_holds_where_no_flag_was_given(settings, more, preset, seed, begin, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(settings)
    (job,) = planned("--recipes", "mvdream", "-o", str(tmp_path / "out"), "--config", str(file), *more)
    assert (job.request.config.preset, job.request.seed) == (preset, seed)
    assert job.begin == [f"--prompt={CHAIR}", "--recipe=mvdream", *begin, f"--config={file}"]


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ('preset = "fast"', ["--size", "mini"], "--size mini contradicts the file of --config, which is for fast"),
        ('seed = "random"', [], "must be a number, so that the same command goes on with its runs, got random; give"),
        ('recipe = "textmesh-if"', ["--recipes", "mvdream"], "--recipes must be textmesh-if with this file"),
    ],
)
def test_flags_that_contradict_the_settings_file_are_named(settings, more, message, tmp_path, capsys):
    (tmp_path / "settings.toml").write_text(settings)
    assert command(CHAIR, "-o", str(tmp_path / "out"), "--config", str(tmp_path / "settings.toml"), *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_child_counts_its_own_memory(tmp_path, monkeypatch):
    """300 MiB that a child touches are in its peak, and a signal that kills it is its exit code."""
    code = "import os, sys; x = b'x' * (300 << 20); print('out of paper', file=sys.stderr); os.kill(os.getpid(), 9)"
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    script.chmod(0o755)
    monkeypatch.setattr(child_run.sys, "executable", str(script))
    result = child_run.run(tmp_path / "run", [], [], True, child_run.run_folder.Interrupt())
    assert result.exit_code == 128 + signal.SIGKILL
    assert result.message == "out of paper"
    assert result.peak_bytes > 300 << 20
    assert result_of(tmp_path / "run") == result


REQUEST = resolve({"prompt": CHAIR, "recipe": "mvdream"})
SCORES = {
    "top1": 1.0, "similarity": 0.5, "janus": 0.0, "shows_front": 1.0, "azimuth_error_deg": 30.0, "turn_overlap": 0.5,
    "turn_colour_spread": 0.1, "colours_kept": 1.0, "fog": 0.2, "gradient": 0.1, "views_gradient": 0.2,
    "sharpness": 0.5, "named": None, "views_named": None, "agreement": None, "mesh_psnr": None, "mesh_overlap": 0.9,
}  # fmt: skip


def compared(recipe: str, prompt: str = CHAIR, color=(255, 0, 0), **scores) -> Compared:
    """A finished run whose asset is a bar of one colour, at the left in the front frame and further right in others."""
    frames = np.full((36, 160, 160, 3), 128, np.uint8)
    for i, frame in enumerate(frames):
        frame[:, 4 * i : 4 * i + 16] = color
    request = dataclasses.replace(resolve({"prompt": prompt, "recipe": recipe}), why="")
    return Compared(request, Path("runs"), Result(0, 60.0, 1 << 30), SCORES | scores, frames)


def test_means_are_of_what_finished():
    failed = Compared(REQUEST, Path("runs"), Result(6, 1.0, 5 << 30, "no <surface>"))
    runs = [compared("mvdream"), compared("mvdream", "a red car", top1=0.0, janus=None), failed]
    runs[1] = dataclasses.replace(runs[1], result=Result(0, 30.0, 3 << 29))
    found = means(runs)
    assert (found["finished"], found["runs"]) == (2, 3)
    assert (found["top1"], found["janus"], found["seconds"], found["memory_gb"]) == (0.5, 0.0, 45.0, 1.5)
    assert markdown(runs).splitlines() == [
        "| recipe | finished | R-precision | azimuth error (deg) | front seen | Janus | sharpness | fog | time (s) | "
        "memory (GB) | guided views |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| mvdream | 2 of 3 | 0.50 | 30 | 1.00 | 0.00 | 0.50 | 0.20 | 45 | 1.50 | 2400 |",
    ]


def test_the_grid_has_fronts_and_backs():
    failed = Compared(resolve({"prompt": "a red car", "recipe": "prolificdreamer"}), Path("runs"), Result(3))
    image = np.asarray(
        grid([compared("mvdream"), compared("prolificdreamer"), compared("mvdream", "a red car"), failed])
    )
    assert image.shape == (22 + 2 * (22 + 160), 4 * 160, 3)
    y = 22 + 22 + 80
    assert [tuple(image[y, x]) for x in (8, 160 + 8, 160 + 4 * 18 + 8)] == [(255, 0, 0), (128,) * 3, (255, 0, 0)]
    assert tuple(image[y, 320 + 8]) == (255, 0, 0)
    assert tuple(image[y + 22 + 160, 320 + 150]) == (221, 221, 221)


def test_what_people_wrote_is_text_on_the_page():
    failed = Compared(REQUEST, Path("runs"), Result(6, 1.0, 1 << 30, "no <surface>"))
    text = page([compared("mvdream", "<b>bold</b>"), failed])
    assert "<b>" not in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    assert "mvdream failed with exit code 6: no &lt;surface&gt;" in text


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (Debian: chromium)")
def test_all_assets_turn_together_by_mouse_and_by_keys(tmp_path):
    path = tmp_path / "compare.html"
    path.write_text(page([compared("mvdream"), compared("prolificdreamer", color=(0, 0, 255))]))
    with Browser() as browser:
        browser.requested.clear()
        browser.open(path.as_uri())
        browser.wait_for(lambda shot: red(shot).any())
        browser.call("Runtime.evaluate", expression="stop(); show(10)")
        y, x = np.argwhere(red(browser.wait_for(lambda shot: red(shot).any()))).mean(0).astype(int).tolist()
        before = columns(browser)
        for kind, at in (("mousePressed", x), ("mouseMoved", x - 80), ("mouseReleased", x - 80)):
            browser.call("Input.dispatchMouseEvent", type=kind, x=at, y=y, button="left", buttons=1, clickCount=1)
        dragged = columns(browser)
        # Ten frames of four pixels, both assets; WebP blurs an edge by a pixel.
        assert [b - a for a, b in zip(before, dragged)] == pytest.approx([40, 40], abs=1)
        for kind in ("rawKeyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight")
        assert [b - a for a, b in zip(dragged, columns(browser))] == pytest.approx([4, 4], abs=1)
        assert {url.partition(":")[0] for url in browser.requested} <= {"file", "data"}
        assert not browser.complaints


def red(shot: np.ndarray) -> np.ndarray:
    return (shot[..., 0] > 200) & (shot[..., 1] < 60) & (shot[..., 2] < 60)


def blue(shot: np.ndarray) -> np.ndarray:
    return (shot[..., 2] > 200) & (shot[..., 0] < 60) & (shot[..., 1] < 60)


def columns(browser: Browser) -> list[int]:
    """Where the bars of both assets begin, in pixels from the left of the page."""
    shot = browser.screenshot()
    rows = slice(*np.flatnonzero(red(shot).sum(1) > 8)[[0, -1]])
    return [int(np.flatnonzero(found[rows].any(0))[0]) for found in (red(shot), blue(shot))]
