"""The ablations' scripts with a budget of nothing: every variant trains, is measured and drawn, and is resumed."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_batches import make_sample
from test_train import TINY

from mvdream_fast.checkpoints.open import load_model, save_model
from mvdream_fast.data.batches import Shards
from mvdream_fast.data.shards import write_shard
from mvdream_fast.models.config import NAMED, with_settings
from mvdream_fast.models.tokenizer import build_subset_vocabulary
from mvdream_fast.training.initial_model import new_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ablations(monkeypatch):
    module = load("ablations")
    monkeypatch.setitem(NAMED, "mini", TINY)
    monkeypatch.setattr(module, "VALIDATION_BATCH", 2)
    monkeypatch.setattr(module.evaluate, "main", judge)
    return module


def judge(flags) -> None:
    """Stands in for the evaluator, which looks at images of 64 px."""
    (target,) = flags.targets
    assert load_model(target).config.vae.image_size == TINY.vae.image_size
    assert flags.prompts.read_text() == "a thing0\n"
    held_out = {"azimuth_error_deg": 90.0, "top1": 0.025}
    found = {"held_out": held_out, "prompts": {}, "real": {"azimuth_error_deg": 26.0, "top1": 0.7}}
    flags.json.write_text(json.dumps({"kind": "evaluation", "models": {target: found}, "runs": []}))


@pytest.fixture
def flags(tmp_path, ablations):
    """Shards of six orbits and two held out, and a base model, both tiny."""
    data = tmp_path / "data"
    data.mkdir()
    write_shard(data / "train-00000.tar", [make_sample(30 * i) for i in range(6)])
    write_shard(data / "held_out-00000.tar", [make_sample(30 * i, split="held_out") for i in range(2)])
    model = new_model("mini", build_subset_vocabulary(Shards(data).captions()), seed=0)
    save_model(model, tmp_path / "base")
    return ["--data", str(data), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "out"), "--steps", "1",
            "--steps-2d", "1", "--batch-size", "2", "--threads", "1", "--prompts", "a thing0",
            "--sampling-steps", "2"]  # fmt: skip


def test_every_variant_on_one_table(ablations, flags, tmp_path):
    ablations.main(flags)
    out = tmp_path / "out"
    page = (out / "ablations.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[1] for row in rows] == [*(v.label for v in ablations.VARIANTS.values()), "real renders"]
    assert rows.pop().split(" | ")[4:8:3] == ["26", "0.7"]
    losses = [row.split(" | ")[2] for row in rows]
    assert all(0 < float(loss) < 10 for loss in losses)
    assert {row.split(" | ")[4] for row in rows} == {"90"}
    assert {row.split(" | ")[7] for row in rows} == {"0.025"}
    assert "From one 2D model of 8 images: 1 steps of 8 images each (8 images; " in page
    size = TINY.vae.image_size
    assert Image.open(out / "ablations.png").size == (4 * size, len(ablations.VARIANTS) * (size + 14))
    for name, variant in ablations.VARIANTS.items():
        config = load_model(out / name / "model", parts=()).config
        assert config == with_settings(load_model(tmp_path / "base", parts=()).config, variant.settings)
    assert not (out / "mvdream" / "latents.npy").exists()


def test_it_goes_on_where_it_was(ablations, flags, tmp_path, monkeypatch):
    trained = []
    train = ablations.train.main
    monkeypatch.setattr(ablations.train, "main", lambda args: trained.append(args.output.name) or train(args))
    flags = [*flags, "--no-evaluator"]
    ablations.main([*flags, "--only", "mvdream", "no-2d"])
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "ablations.md").write_text(f"# Mine\n{ablations.BEGIN}\nold\n{ablations.END}\nThe end.\n")
    ablations.main([*flags, "--only", "mvdream", "no-2d", "--docs", str(docs)])
    assert trained == ["base", "mvdream", "no-2d"]
    page = (docs / "ablations.md").read_text()
    assert page.startswith("# Mine\n")
    assert page.endswith("The end.\n")
    assert "old" not in page
    for other in ("--steps", "--steps-2d", "--lr", "--batch-size"):
        with pytest.raises(SystemExit, match="was begun with another budget; name another folder with -o"):
            ablations.main([*flags, "--only", "no-2d", other, "3"])
    assert trained == ["base", "mvdream", "no-2d"]
    (docs / "ablations.md").write_text("# No marks\n")
    with pytest.raises(SystemExit, match="must hold the lines"):
        ablations.main([*flags, "--only", "mvdream", "--docs", str(docs)])


def test_they_start_from_a_2d_model_that_is_there(ablations, flags, tmp_path):
    args = ablations.parse_arguments([*flags, "--batch-size", "4"])
    start = ablations.train_2d(args)
    other = [*flags, "--no-evaluator", "--only", "camera-none", "--start", str(start), "-o", str(tmp_path / "other")]
    ablations.main(other)
    assert not (tmp_path / "other" / "base").exists()
    assert "From one 2D model: 1 steps of 8 images each" in (tmp_path / "other" / "ablations.md").read_text()


def test_variants_side_by_side(flags, tmp_path):
    command = [sys.executable, str(EXAMPLES / "ablations.py"), *flags, "--start", str(tmp_path / "base"), "--jobs", "2"]
    subprocess.run([*command, "--no-evaluator", "--only", "mvdream", "camera-none"], check=True)
    page = (tmp_path / "out" / "ablations.md").read_text()
    assert [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")][2:] == [
        "| as published",
        "| where the camera goes",
        "| ",
    ]
    assert "minutes a variant, 2 at once)" in page
    assert (tmp_path / "out" / "latents.npy").exists()
    assert load_model(tmp_path / "out" / "camera-none" / "model", parts=()).config.unet.camera_in == "none"


def test_prompts_of_the_figure_are_the_first_captions(ablations, flags):
    at = flags.index("--prompts")
    assert ablations.parse_arguments(flags[:at] + flags[at + 2 :]).prompts == ["a red thing0", "a red thing30"]


def thing(name, orbit, with_front, caption=None):
    """An orbit of full images, red before and green behind, or red all over; from the fourth on, painted."""
    sample = make_sample(0)
    v, half = len(sample.views), len(sample.views) // 2
    sample.views[:] = (255, 0, 0, 255)
    if with_front:
        sample.views[half:] = (0, 255, 0, 255)
    words = {"id": name, "key": f"{name}-o{orbit}", "caption": caption or f"a {name}", "painted": orbit > 2}
    azimuths = [360 * i / v for i in range(v)]
    return replace(sample, meta=sample.meta | words | {"azimuth_deg": azimuths, "elevation_deg": 15.0})


def test_the_data_are_objects_with_a_front_and_some_orbits_held_out(tmp_path, capsys):
    samples = [thing("ball", orbit, False) for orbit in range(5)]
    samples += [thing("duck", orbit, True) for orbit in range(5)]
    samples += [thing("twin", orbit, True, "a duck") for orbit in range(5)]
    samples += [thing("seldom", orbit, True) for orbit in range(2)]
    samples += [thing("goose", orbit, True) for orbit in range(4)]
    write_shard(tmp_path / "train-00000.tar", samples)
    data = load("ablations_data")
    data.main([str(tmp_path), "-o", str(tmp_path / "out"), "--objects", "2"])
    keys = {split: [r.meta["key"] for r in Shards(tmp_path / "out", split).records] for split in ("train", "held_out")}
    assert keys == {
        "train": ["duck-o0", "duck-o3", "duck-o4", "goose-o0", "goose-o3"],
        "held_out": ["duck-o1", "duck-o2", "goose-o1", "goose-o2"],
    }
    assert capsys.readouterr().out == "train: 5 orbits of 2 objects\nheld_out: 4 orbits of 2 objects\n"
    assert {r.meta["split"] for r in Shards(tmp_path / "out", "held_out").records} == {"held_out"}
    with pytest.raises(SystemExit, match="2 objects of the shards have a front and a caption of their own"):
        data.main([str(tmp_path), "-o", str(tmp_path / "more"), "--objects", "3"])
    assert not (tmp_path / "more").exists()
