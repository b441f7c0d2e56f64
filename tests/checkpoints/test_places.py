"""Where a model is found: runs, the hub's cache, folders with one checkpoint, a path with ~; what is said elsewhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import upstream
from reference.tiny_model import TINY, write_tiny

from mvdream_fast import evaluate
from mvdream_fast.checkpoints.open import load_model, open_source
from mvdream_fast.checkpoints.places import draws_single_images, find_model, stored_config
from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import ModelError
from mvdream_fast.distill import request


def make_run(folder: Path, kind: str, step: int, steps: int, model: bool = True) -> Path:
    """A run as `train` (kind "train-unet", no config.json) or `dreambooth` leaves it, with a model of no training."""
    meta = {"kind": kind, "options": {"steps": steps}}
    run_folder.save_checkpoint(folder / "checkpoints", step, {"x": torch.zeros(1)}, meta)
    if kind == "dreambooth":
        (folder / "config.json").write_text(json.dumps({"kind": "dreambooth", "settings": {}}))
    if model:
        write_tiny(folder / "model")
    return folder


@pytest.mark.parametrize("kind", ["train-unet", "train-vae", "dreambooth"])
def test_a_finished_run_is_its_model(tmp_path, kind):
    run = make_run(tmp_path / "run", kind, 5, 5)
    assert find_model(run) == run / "model"
    assert load_model(run, parts=("text",)).config == TINY
    assert find_model(run / "model") == run / "model"
    assert open_source(str(run)).path == run / "model"


@pytest.mark.parametrize("kind", ["train-unet", "dreambooth"])
@pytest.mark.parametrize("model", [True, False])
def test_a_run_that_is_not_finished_says_so(tmp_path, kind, model):
    run = make_run(tmp_path / "run", kind, 3, 5, model)
    flag = "--resume-from-checkpoint" if kind == "dreambooth" else "--resume"
    other = f", or name {run / 'model'}, the model as it was shown last" if model else ""
    sentence = f"{run} is a run that is not finished (step 3 of 5): go on with it by {flag}{other}"
    with pytest.raises(ModelError, match=f"^{re.escape(sentence)}$"):
        load_model(run)
    if model:
        assert find_model(run / "model") == run / "model"


def test_a_run_that_was_stopped_before_its_model_was_written(tmp_path):
    run = make_run(tmp_path / "run", "dreambooth", 5, 5, model=False)
    with pytest.raises(ModelError, match="is a run that is not finished: go on with it by --resume-from-checkpoint$"):
        find_model(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ModelError, match="is a run that is not finished: go on"):
        find_model(run)


def test_a_stage_of_dreambooth3d_ends_before_its_options_say(tmp_path):
    stage = make_run(tmp_path / "1-partial", "dreambooth", 3, 9)
    (stage / "config.json").unlink()
    assert find_model(stage) == stage / "model"


def test_a_text_to_3d_run_leaves_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"kind": "sds"}')
    with pytest.raises(ModelError, match="is a text-to-3D run, which leaves a 3D object and no model"):
        find_model(tmp_path)


def test_every_command_takes_a_run(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", "dreambooth", 5, 5)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/run") == run / "model"
    assert stored_config("~/run")["vae"]["image_size"] == TINY.vae.image_size
    assert evaluate.kind_of(str(run)) == evaluate.kind_of("~/run") == "model"
    assert request.resolve({"prompt": "a chair", "model": "~/run"}, None).model == str(run)
    assert open_source(run).n_bytes(torch.float16) == open_source(run / "model").n_bytes(torch.float16) > 0
    line = [sys.executable, "-m", "mvdream_fast.convert", str(run), str(tmp_path / "converted")]
    assert subprocess.run(line, capture_output=True, check=False).returncode == 0
    assert open_source(tmp_path / "converted").config == TINY


@pytest.mark.parametrize("part", ["unet", "vae", "text"])
@pytest.mark.parametrize("value", [3, None, "x", []])
def test_a_part_s_configuration_must_be_an_object(tmp_path, part, value):
    (tmp_path / "config.json").write_text(json.dumps({"kind": "model", part: value}))
    sentence = f"{tmp_path}/config.json: {part} must be an object, got {value!r}"
    for ask in (draws_single_images, lambda path: request.resolve({"prompt": "a chair", "model": str(path)}, None)):
        with pytest.raises(ModelError, match=f"^{re.escape(sentence)}$"):
            ask(tmp_path)


def in_cache(cache: Path, files: dict[str, Path], revision: str = "f" * 40) -> Path:
    """A repository in the hub's cache: links in snapshots/REVISION to blobs without suffixes, and refs/main."""
    repository = cache / "models--someone--something"
    snapshot = repository / "snapshots" / revision
    for i, (name, file) in enumerate(files.items()):
        blob = repository / "blobs" / f"{i:040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        depth = len((snapshot / name).relative_to(repository).parts) - 1
        (snapshot / name).symlink_to(Path(*[".."] * depth, "blobs", blob.name))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)
    return repository


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flat") / "21.pt"
    torch.save(upstream.flat(upstream.Size(**upstream.NARROW, text_layers=3, vocabulary=64)), path)
    return path


def test_a_snapshot_of_a_flat_file(tmp_path, flat):
    repository = in_cache(tmp_path, {"sd-v2.1-base-4view.pt": flat})
    snapshot = repository / "snapshots" / ("f" * 40)
    names = (repository, snapshot, snapshot / "sd-v2.1-base-4view.pt", (snapshot / "sd-v2.1-base-4view.pt").resolve())
    configs = [open_source(name).config for name in names]
    assert configs == [open_source(flat).config] * 4


def test_a_snapshot_of_a_folder(tmp_path):
    published = tmp_path / "published"
    upstream.write_published(published, upstream.Size(**upstream.NARROW, text_layers=3, vocabulary=64))
    files = {str(path.relative_to(published)): path for path in published.rglob("*") if path.is_file()}
    repository = in_cache(tmp_path / "hub", files)
    assert open_source(repository).config == open_source(published).config
    assert open_source(repository).path == repository / "snapshots" / ("f" * 40)


def test_snapshots_that_leave_a_choice(tmp_path, flat):
    repository = in_cache(tmp_path, {"x.pt": flat})
    in_cache(tmp_path, {"x.pt": flat}, "a" * 40)
    assert find_model(repository).parent.name == "a" * 40  # refs/main
    (repository / "refs" / "main").write_text("../../..")
    with pytest.raises(ModelError, match="must hold the snapshot of one revision, got 2; name the snapshot"):
        find_model(repository)
    shutil.rmtree(repository / "refs")
    shutil.rmtree(repository / "snapshots" / ("a" * 40))
    assert find_model(repository).parent.name == "f" * 40
    shutil.rmtree(repository / "blobs")  # cleaned, or never fetched whole
    with pytest.raises(ModelError, match="is not a model folder"):
        find_model(repository)


@pytest.mark.parametrize("name", ["sd-v2.1-base-4view.pt", "model.ckpt", "model.pth", "model.bin"])
def test_a_folder_that_holds_one_checkpoint(tmp_path, flat, name):
    shutil.copy(flat, tmp_path / name)
    for other in ("README.md", "config.yaml", ".gitattributes", ".cache.pt", "model_index.json"):
        (tmp_path / other).write_text("x")
    (tmp_path / "samples.pt").mkdir()
    assert find_model(tmp_path) == tmp_path / name
    assert open_source(tmp_path).config == open_source(flat).config
    shutil.copy(flat, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"holds several checkpoints; name one of them: .*other.safetensors"):
        find_model(tmp_path)


def test_finding_a_model_imports_no_torch(tmp_path):
    run = make_run(tmp_path / "run", "train-unet", 5, 5)
    code = "import sys; from mvdream_fast.checkpoints.places import find_model; find_model(sys.argv[1])\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(run)], check=False).returncode == 0
