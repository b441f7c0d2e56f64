"""The ablations' script with a budget of nothing: every variant trains, is measured and drawn, and is resumed."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image
from test_batches import make_sample
from test_train import TINY

from mvdream_fast import training_runs
from mvdream_fast.data.batches import Shards
from mvdream_fast.data.shards import write_shard
from mvdream_fast.models.checkpoint import load_model, save_model
from mvdream_fast.models.tokenizer import build_subset_vocabulary

PATH = Path(__file__).parents[1] / "examples" / "ablations.py"


@pytest.fixture
def ablations(monkeypatch):
    spec = importlib.util.spec_from_file_location("ablations", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(training_runs.NAMED, "mini", TINY)
    monkeypatch.setattr(module, "VALIDATION_BATCH", 2)
    monkeypatch.setattr(module.evaluate, "main", judge)
    return module


def judge(flags) -> None:
    """Stands in for the evaluator, which looks at pictures of 64 px."""
    (target,) = flags.targets
    assert load_model(target).config.vae.image_size == TINY.vae.image_size
    found = {"held_out": {"azimuth_error_deg": 90.0, "top1": 0.025}, "prompts": {}}
    flags.json.write_text(json.dumps({"kind": "evaluation", "models": {target: found}, "runs": []}))


@pytest.fixture
def flags(tmp_path, ablations):
    """Shards of six orbits, and a base model, both tiny."""
    data = tmp_path / "data"
    data.mkdir()
    write_shard(data / "train-00000.tar", [make_sample(30 * i) for i in range(6)])
    model = training_runs.new_model("mini", build_subset_vocabulary(Shards(data).captions()), seed=0)
    save_model(model, tmp_path / "base")
    return ["--data", str(data), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "out"), "--steps", "1",
            "--steps-2d", "1", "--batch-size", "2", "--threads", "1", "--prompts", "a thing0",
            "--sampling-steps", "2"]  # fmt: skip


def test_every_variant_on_one_table(ablations, flags, tmp_path):
    ablations.main(flags)
    out = tmp_path / "out"
    page = (out / "ablations.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[1] for row in rows] == [v.label for v in ablations.VARIANTS.values()]
    losses = [row.split(" | ")[2] for row in rows]
    assert all(0 < float(loss) < 10 for loss in losses)
    assert {row.split(" | ")[4] for row in rows} == {"90"}
    assert {row.split(" | ")[6] for row in rows} == {"0.025"}
    assert "From one 2D model of 8 pictures: 1 steps of 8 pictures each (8 pictures; " in page
    size = TINY.vae.image_size
    assert Image.open(out / "ablations.png").size == (4 * size, len(ablations.VARIANTS) * (size + 14))
    for name, variant in ablations.VARIANTS.items():
        config = load_model(out / name / "model", parts=()).config
        assert config == training_runs.with_settings(load_model(tmp_path / "base", parts=()).config, variant.settings)
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
