"""The evaluate command end to end: an evaluator trained for a moment, a random model, a finished run, and mistakes."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference.random_model import random_model
from reference.studio import fresh_asset
from test_evaluator import render

from mvdream_fast import evaluate, train
from mvdream_fast.checkpoints.open import save_model
from mvdream_fast.core import cli
from mvdream_fast.core.errors import ModelError
from mvdream_fast.data.batches import Shards
from mvdream_fast.data.shards import write_shard
from mvdream_fast.distill.systems import mini
from mvdream_fast.evaluation import classifier, judging
from mvdream_fast.evaluation.evaluator import load_evaluator
from mvdream_fast.evaluation.independent import RealSeen
from mvdream_fast.evaluation.judging import Judge, SamplingOptions, evaluate_model, summary, turntable
from mvdream_fast.evaluation.reference import HAS_FRONT, Reference, measure
from mvdream_fast.pipeline import MVDreamPipeline

PROMPTS = ["a green chair", "a brown bulldog", "a red car"]
N_HELD_OUT = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """shards/, evaluator/ (two steps), tiny/ (a random model), run/ (an untrained volume) and prompts.txt."""
    place = tmp_path_factory.mktemp("evaluation")
    (place / "shards").mkdir()
    train_set = [render(i, orbit) for i in range(4) for orbit in range(3)]
    held_out = [render(i, orbit, "held_out") for i in range(4, 4 + N_HELD_OUT) for orbit in (0, 1, 2)]
    write_shard(place / "shards" / "train-00000.tar", train_set)
    write_shard(place / "shards" / "held_out-00000.tar", held_out)
    flags = {"stage": "evaluator", "steps": 2, "batch_size": 4, "threads": 1}
    train.main(train.Flags(data=place / "shards", output=place / "training", **flags))
    (place / "training" / "model").rename(place / "evaluator")
    save_model(random_model(), place / "tiny")
    write_run(place / "run", "a red car")
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return place


def write_run(folder: Path, prompt: str) -> None:
    folder.mkdir()
    fresh_asset(mini(), prompt).save(folder / "asset.safetensors")
    (folder / "config.json").write_text(json.dumps({"kind": "sds", "prompt": prompt}))


@pytest.fixture
def judge(place) -> Judge:
    return Judge(load_evaluator(place / "evaluator"), Reference.load(place / "evaluator"), PROMPTS)


@pytest.fixture(autouse=True)
def _small(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(judging, "SIZE", 16)


def command(*arguments: str) -> int:
    """The exit code of the command, run in this process."""
    try:
        cli.run(evaluate.main, evaluate.Flags, prog="evaluate", argv=list(arguments))
    except SystemExit as stop:
        return stop.code or 0
    return 0


ARGUMENTS = [
    "--evaluator", "evaluator", "--prompts", "prompts.txt", "--threads", "1", "--device", "cpu", "--dtype", "float32",
]  # fmt: skip


def test_models_and_runs_in_one_report(place, capsys):
    assert command("tiny", "run", *ARGUMENTS, "--steps", "1", "--json", "report.json") == 0
    out = capsys.readouterr().out
    assert "3 held-out captions" in out
    assert "of the real renders' top-1" in out
    report = json.loads((place / "report.json").read_text())
    model = report["models"]["tiny"]
    both = {"top1", "top5", "similarity", "hull_support", "colour_spread", "scenes"}
    assert model["held_out"].keys() >= both | {"frechet", "diversity", "azimuth_error_deg"}
    assert model["prompts"].keys() >= both | {"gradient", "named", "classifier_frechet", "classifier_kernel"}
    assert model["held_out"]["scenes"] == 2 * N_HELD_OUT
    assert model["prompts"]["colours_of"] == len(PROMPTS)
    assert 0 <= model["prompts"]["colours_kept"] <= 1
    assert model["real"] == report["evaluator"]["held_out"]
    (run,) = report["runs"]
    assert run["prompt"] == "a red car"
    assert run["candidates"] == 3
    assert run["colours_kept"] in (0.0, 1.0)
    assert run["janus"] is None  # nobody knows the front of a car here
    assert report["runs_mean"]["top1"] == run["top1"]
    assert "figures that owe nothing to the evaluator" in out
    assert run["named"] is not None  # a car is in ImageNet
    assert run["sharpness"] is None  # there are no views in this folder
    assert report["runs_mean"]["fog_median"] == run["fog"]
    assert report["runs_distances"].keys() == {"assets", "real renders"}
    assert command("run", *ARGUMENTS, "--json", "report.json") == 7


def test_the_same_figures_twice(judge):
    options = SamplingOptions(steps=1, seeds=1, n_captions=2, n_prompts=1)
    pipeline = MVDreamPipeline(random_model(), "cpu", "float32")
    first, second = (evaluate_model(pipeline, judge, options, lambda _: None) for _ in range(2))
    for part in ("held_out", "prompts"):
        assert first[part] == second[part]
    assert first["held_out"]["scenes"] == 2
    assert "diversity" not in first["held_out"]  # that needs a second seed
    assert "frechet" not in first["held_out"]  # and that all captions


def test_the_reference_comes_back(place, judge):
    shards, kept = (Shards(place / "shards"), Shards(place / "shards", "held_out")), judge.reference
    again = measure(judge.evaluator, *shards, classifier.load_classifier())
    assert again.captions == kept.captions == [f"a red thing{i}" for i in range(4, 4 + N_HELD_OUT)]
    assert again.scores == pytest.approx(kept.scores)
    torch.testing.assert_close(again.moments[1], kept.moments[1], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(again.seen.features, kept.seen.features, atol=1e-3, rtol=1e-3)
    assert kept.seen.features.shape == (N_HELD_OUT, 2, 4, 320)
    without = measure(judge.evaluator, *shards)
    assert without.seen is None
    assert kept.scores.keys() - without.scores.keys() == {"classifier_frechet", "classifier_kernel", "agreement"}
    assert kept.scores["frechet_other_objects"] >= 0


def test_fronts_are_known_by_caption_and_by_the_longest_noun(judge):
    fronts = {"a red thing4": 1.0, "thing4": 0.0, "chair": 1.0, "high chair": HAS_FRONT / 2}
    reference = Reference([], torch.zeros(0, 1, 2), judge.reference.moments, fronts, {})
    prompts = (
        "a red thing4",
        "a blue thing4",
        "A green chair",
        "a green high chair",
        "a rocking chair set",
        "a chairs",
    )
    assert [reference.has_front(p) for p in prompts] == [True, False, True, False, True, False]


def test_a_turntable_with_two_faces(judge, monkeypatch):
    """The head is made to read brightness as the front."""
    evaluator = judge.evaluator
    fronts = {"face": 1.0}
    reference = Reference([], judge.reference.embeddings, judge.reference.moments, fronts, {})
    pictures = torch.zeros(8, 3, 16, 16)
    azimuth = torch.arange(8) * 45.0

    def features(images):
        return images.mean((1, 2, 3))[:, None].expand(-1, evaluator.config.features)

    def azimuth_head(x):
        logits = torch.full((len(x), 24), -20.0)
        logits[:, 0], logits[:, 12] = 20 * x[:, 0], 20 * (1 - x[:, 0])
        return logits

    monkeypatch.setattr(evaluator, "features", features)
    evaluator.azimuth = torch.nn.Identity()
    monkeypatch.setattr(evaluator.azimuth, "forward", azimuth_head)

    def run(*bright):
        rgb = pictures.clone()
        rgb[list(bright)] = 1.0
        return turntable(rgb, rgb[:, 0], azimuth, "a face", Judge(evaluator, reference, PROMPTS))

    assert run(0, 1, 7)["janus"] == 0
    assert run(0, 1, 7)["shows_front"] == 1
    assert run()["shows_front"] == 0
    assert run(0, 4)["janus"] == 1
    assert run()["empty"]
    assert run(0)["turn_overlap"] == 0
    assert run(*range(8))["turn_overlap"] == 1


def test_a_prompt_is_judged_by_what_it_means(judge, monkeypatch):
    """What is asked for is sampled, what it means is looked for: the figures are those of the meaning itself."""
    views = torch.rand(1, len(PROMPTS), 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sampled = []
    monkeypatch.setattr(judging, "_sample", lambda _, texts, *rest: (sampled.append(texts), views[:, : len(texts)])[1])
    asked = replace(judge, prompts=["a divan", *PROMPTS[1:]], meanings={"a divan": PROMPTS[0]})
    found = [
        judging.evaluate_model(None, judge_, judging.SamplingOptions(), print)["prompts"] for judge_ in (judge, asked)
    ]
    assert found[0] == found[1]
    assert sampled[1::2] == [PROMPTS, ["a divan", *PROMPTS[1:]]]
    turns = [
        turntable(views[0, 0], views[0, 0, :, 0], torch.arange(4) * 90.0, prompt, judge_)
        for prompt, judge_ in ((PROMPTS[0], judge), ("a divan", asked))
    ]
    assert turns[0] == turns[1]
    assert turns[0]["candidates"] == len(PROMPTS)


def test_means_leave_out_what_does_not_apply():
    run = dict.fromkeys(judging.AVERAGED)
    run |= {"top1": 1.0, "similarity": 0.5, "turn_overlap": 1.0, "turn_colour_spread": 0.0, "fog": 0.2}
    front = {"top1": 0.0, "janus": 1.0, "shows_front": 1.0, "azimuth_error_deg": 30.0, "fog": 0.3, "named": 0.5}
    mean = summary([run, run | front, run | {"top1": 0.5, "fog": 0.7}])
    expected = {"top1": 0.5, "similarity": 0.5, "janus": 1.0, "shows_front": 1.0, "azimuth_error_deg": 30.0}
    expected |= {"turn_overlap": 1.0, "turn_colour_spread": 0.0, "named": 0.5}
    expected |= {"fog": pytest.approx(0.4), "fog_median": 0.3}
    assert mean == expected | {"runs": 3, "with_front": 1, "named_of": 1}


def test_without_the_classifier(place, capsys, monkeypatch):
    """One sentence says what to install; the other figures are there, and real renders' are those that ship."""
    monkeypatch.setattr(judging, "is_installed", lambda: False)
    assert command("run", *ARGUMENTS, "--json", "without.json") == 0
    captured = capsys.readouterr()
    assert captured.err.count("pip install 'mvdream_fast[evaluate]'; its figures are left out") == 1
    report = json.loads((place / "without.json").read_text())
    (run,) = report["runs"]
    assert run["named"] is run["agreement"] is None
    assert run["fog"] == report["runs_mean"]["fog"]
    assert report["runs_distances"] == {}


def test_damaged_views_are_named(place, tmp_path, capsys):
    write_run(tmp_path / "run", "a red car")
    (tmp_path / "run" / "views.png").write_bytes(b"no image")
    assert command(str(tmp_path / "run"), *ARGUMENTS, "--quiet") == 5
    assert "views.png cannot be read" in capsys.readouterr().err


def test_a_target_without_figures_stops_no_other(place, tmp_path, capsys):
    """What was measured is printed and written; the code is that of the first that failed."""
    unfinished, damaged, report = tmp_path / "unfinished", tmp_path / "damaged", tmp_path / "report.json"
    unfinished.mkdir()
    (unfinished / "config.json").write_text('{"kind": "sds", "prompt": "a cat"}')
    write_run(damaged, "a red car")
    (damaged / "asset.safetensors").write_bytes(b"no tensors")
    targets = (str(unfinished), "run", str(damaged), "nowhere")
    assert command(*targets, *ARGUMENTS, "--quiet", "--json", str(report)) == 5
    out, err = capsys.readouterr()
    assert "a red car" in out
    assert f"the run is not finished; go on with sds --resume {unfinished}" in err
    assert len(err.splitlines()) == 3
    found = json.loads(report.read_text())
    assert [run["run"] for run in found["runs"]] == ["run"]
    assert list(found["failed"]) == [str(unfinished), str(damaged), "nowhere"]
    assert found["models"] == {}


def test_without_any_figures_there_is_no_report(place, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"kind": "sds", "prompt": "a cat"}')
    assert command(str(tmp_path), *ARGUMENTS, "--quiet", "--json", str(tmp_path / "report.json")) == 5
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "report.json").exists()


def test_headings_say_what_was_sampled(judge, capsys):
    """All unless --quick says less, however long the list is."""
    figures = {"top1": 0.5, "size": 64}
    long = replace(judge, prompts=[f"a thing{i}" for i in range(70)])
    for flags, heads in (
        (evaluate.Flags(), ("3 held-out captions", "70 fixed prompts")),
        (evaluate.Flags(quick=True), ("3 held-out captions", "8 of 70 fixed prompts")),
    ):
        options = vars(evaluate.sampling(flags))
        result = {"held_out": figures, "prompts": figures, "seconds": 1.0, "options": options}
        evaluate._print({"models": {"m": result}, "runs": []}, long)
        out = " ".join(capsys.readouterr().out.split())
        assert all(f" {head} " in out for head in heads), flags
        assert (" 3 of" in out, " 70 of" in out) == (False, False)
    assert SamplingOptions() == evaluate.sampling(evaluate.Flags())


def test_all_prompts_of_a_long_list_are_sampled(judge, monkeypatch):
    sampled = []

    def views(_, texts, options, n_seeds, say):
        sampled.append(len(texts))
        return torch.rand(n_seeds, len(texts), 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(judging, "_sample", views)
    long = replace(judge, prompts=[f"a thing{i} chair" for i in range(61)])
    evaluate_model(None, long, SamplingOptions(seeds=1), print)
    evaluate_model(None, long, SamplingOptions(seeds=1, n_captions=2, n_prompts=5), print)
    assert sampled == [N_HELD_OUT, 61, 2, 5]


def test_the_training_needs_a_held_out_split(place, tmp_path, capsys):
    write_shard(tmp_path / "train-00000.tar", [render(0, 0)])
    arguments = ["--data", str(tmp_path), "-o", str(tmp_path / "out"), "--stage", "evaluator"]
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main, train.Flags, prog="train", argv=arguments)
    assert stop.value.code == 5
    assert "no held-out shards" in capsys.readouterr().err


def test_mistakes_are_one_sentence_and_a_code(place, capsys):
    (place / "other").mkdir()
    (place / "other" / "config.json").write_text('{"kind": "views"}')
    (place / "begun").mkdir()
    (place / "begun" / "config.json").write_text('{"kind": "sds", "prompt": "a cat"}')
    cases = (
        (("nowhere", *ARGUMENTS), 3, "there is no model at"),
        (("other",), 5, "is of kind 'views', which has no evaluation"),
        (("begun", *ARGUMENTS), 5, "the run is not finished"),
        (("tiny", "tiny"), 2, "given once"),
        (("--steps", "0"), 2, "--steps must be at least 1"),
        (("--guidance-scale", "nan"), 2, "--guidance-scale must be a finite number"),
        (("--json", "nowhere/report.json"), 7, "is not a folder"),
        (("run", "--evaluator", "run"), 3, "holds no evaluator"),
        (("run", "--evaluator", "evaluator", "--data", "nowhere"), 5, "no train shards in nowhere"),
        (("run", "--evaluator", "evaluator", "--prompts", "nowhere"), 5, "cannot read nowhere: No such file"),
    )
    for arguments, code, text in cases:
        assert command(*arguments, "--quiet") == code, arguments
        error = capsys.readouterr().err
        assert text in error, arguments
        assert len(error.strip().splitlines()) == 1, arguments


def test_a_damaged_reference_is_refused(place, tmp_path):
    for name in ("reference.safetensors", "reference.json"):
        (tmp_path / name).write_bytes((place / "evaluator" / name).read_bytes())
    Reference.load(tmp_path)
    numbers = json.loads((tmp_path / "reference.json").read_text())
    (tmp_path / "reference.json").write_text(json.dumps(numbers | {"captions": ["a thing"]}))
    with pytest.raises(ModelError, match="has 1 captions"):
        Reference.load(tmp_path)
    (tmp_path / "reference.json").write_text(json.dumps(numbers))
    Reference(**vars(Reference.load(tmp_path)) | {"seen": RealSeen(torch.zeros(1, 2, 4, 5))}).save(tmp_path)
    with pytest.raises(ModelError, match=r"seen must be of 3, got \[1, 2, 4, 5\]"):
        Reference.load(tmp_path)
    (tmp_path / "reference.json").write_text("{}")
    with pytest.raises(ModelError, match="no whole reference"):
        Reference.load(tmp_path)


def test_help_needs_no_torch():
    start = time.process_time()
    code = "import sys; sys.argv[1:] = ['--help']; import runpy\ntry: runpy.run_module('mvdream_fast.evaluate', " \
           "run_name='__main__')\nfinally: print('torch' in sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "exit codes" in done.stdout
    assert done.stdout.rstrip().endswith("False")
    assert time.process_time() - start < 0.5
