"""The sds command on a run that was begun before: what it may change, what it refuses, and a disk that was full."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trimesh
from reference.sds_command import QUICK, SETTLED, command, digest, latest, uninterrupted

from mvdream_fast import sds
from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import OutputError

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.fixture
def begun(tiny_model) -> Path:
    """A run that is done to the last of its two steps."""
    assert command("a red car", "--model", tiny_model, "--steps", "2", "--seed", "5", *SETTLED) == 0
    return latest()


def test_a_resume_obeys_what_it_can_and_says_so(begun):
    """The mesh is made as asked, config.json has it, and where and from what it was changed."""
    before = json.loads((begun / "config.json").read_text())
    assert before["export"]["texture"] is None
    assert b"baseColorTexture" not in (begun / "mesh.glb").read_bytes()
    assert (before["machine"]["device"], before["machine"]["dtype"]) == ("cpu", "float32")
    again = ["--steps", "2", "--seed", "5", "--preset", "mini", "--lr", "0.01"]  # as it is: no contradiction
    assert command("--resume", "latest", *QUICK, "--texture", "32", "--formats", "obj", *again) == 0
    after = json.loads((begun / "config.json").read_text())
    assert (after["export"]["texture"], after["export"]["formats"]) == (32, ["obj"])
    assert (begun / "mesh.obj").exists()
    assert trimesh.load(begun / "mesh.glb", force="mesh").visual.material.baseColorTexture.size == (32, 32)
    assert after["sds"] == before["sds"]
    (session,) = after["resumed"]
    assert (session["step"], session["machine"]["dtype"]) == (2, "float32")
    assert session["before"] == {"export": {"texture": None, "formats": ["glb"]}}


def test_a_resume_refuses_what_would_be_another_run(begun, capsys):
    """The issue's example, and every other flag that says what a run is; nothing is touched."""
    config = (begun / "config.json").read_bytes()
    for flags, told in (
        (["--steps", "20", "--guidance-scale", "3"],
         "--steps 2 --guidance-scale 7.5, as the run was begun, got --steps 20 --guidance-scale 3.0"),
        (["--seed", "0"], "--seed 5, as the run was begun, got --seed 0"),  # the default, but asked for
        (["--seed", "random"], "got --seed random"),
        (["--preset", "fast"], "--preset mini, as the run was begun, got --preset fast"),
        (["--model", "embedded"], "got --model embedded"),
        (["--method", "reconstruct"], "--method sds, as the run was begun, got --method reconstruct"),
        (["--mode", "2d"], "got --mode 2d"),
        (["--n-views", "8"], "--n-views 4, as the run was begun, got --n-views 8"),
        (["--render-size", "16"], "--render-size 8, as the run was begun, got --render-size 16"),
        (["--negative-prompt", "ugly"], "--negative-prompt '', as the run was begun, got --negative-prompt ugly"),
        (["--rescale", "0.1"], "got --rescale 0.1"),
        (["--lr", "0.5"], "--lr 0.01, as the run was begun, got --lr 0.5"),
        (["--elevation-range-deg", "0", "10"], "got --elevation-range-deg 0.0 10.0"),
        (["--fovy-range-deg", "20", "30"], "got --fovy-range-deg 20.0 30.0"),
        (["--shading"], "--shading False, as the run was begun, got --shading True"),
        (["--recipe", "prolificdreamer"], "got --recipe prolificdreamer"),
        (["--refine-model", "x"], "--refine-model '', as the run was begun, got --refine-model x"),
        (["--guidance", "vsd"], "--guidance sds, as the run was begun, got --guidance vsd"),
        (["--loss", "sds"], "--loss x0, as the run was begun, got --loss sds"),
        (["--guided-from", "cond"], "--guided-from uncond, as the run was begun, got --guided-from cond"),
        (["--timesteps", "each"], "--timesteps shared, as the run was begun, got --timesteps each"),
        (["--view-words"], "got --view-words True"),
        (["--lora-rank", "8"], "--lora-rank 4, as the run was begun, got --lora-rank 8"),
        (["--lora-lr", "0.1"], "got --lora-lr 0.1"),
        (["--particles", "2"], "--particles 1, as the run was begun, got --particles 2"),
        (["--weighting", "uniform"], "--weighting sds, as the run was begun, got --weighting uniform"),
        (["--perp-neg"], "--perp-neg False, as the run was begun, got --perp-neg True"),
        (["-o", "elsewhere"], "-o must be left out, or be the folder of --resume"),
    ):  # fmt: skip
        assert command("--resume", str(begun), *flags) == 2
        assert told in capsys.readouterr().err
    known = {name for flags, _ in [(sds.Flags(), "")] for name in vars(flags)}
    assert known - set(sds.HOW) - {"given", "prompt", "faces", "mesh_resolution", "texture", "formats", "up"} == {
        "steps",
        "guidance_scale",
        "seed",
        "preset",
        "model",
        "method",
        "mode",
        "n_views",
        "render_size",
        "negative_prompt",
        "rescale",
        "lr",
        "elevation_range_deg",
        "fovy_range_deg",
        "shading",
        "recipe",
        "refine_model",
        "guidance",
        "loss",
        "guided_from",
        "timesteps",
        "view_words",
        "lora_rank",
        "lora_lr",
        "particles",
        "weighting",
        "perp_neg",
    }  # fmt: skip (a new flag needs a line above)
    assert (begun / "config.json").read_bytes() == config


def test_a_run_that_is_in_use_is_not_resumed(begun, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path; from mvdream_fast.core import run_folder\n"
         "with run_folder.locked(Path(sys.argv[1])): print(1, flush=True); time.sleep(600)", begun],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout.readline() == b"1\n"
    config = (begun / "config.json").read_bytes()
    assert command("--resume", "latest", *QUICK) == 7
    assert f"is in use by process {holder.pid}; wait until it is done, or stop it first" in capsys.readouterr().err
    assert (begun / "config.json").read_bytes() == config
    holder.kill()
    holder.communicate()
    assert command("--resume", "latest", *QUICK) == 0


def test_a_full_disk_is_7_and_keeps_the_last_checkpoint(tiny_model, capsys, monkeypatch):
    plain, saved = run_folder.save_checkpoint, []

    def save(folder, step, *rest, **options):
        if saved:
            raise OutputError(f"cannot write {folder}: No space left on device")
        saved.append(step)
        return plain(folder, step, *rest, **options)

    arguments = ["a red car", "--model", tiny_model, "--steps", "6", *SETTLED, "--checkpoint-every", "2"]
    with monkeypatch.context() as full:
        full.setattr(run_folder, "save_checkpoint", save)
        assert command(*arguments) == 7
    assert "No space left on device" in capsys.readouterr().err
    assert run_folder.load_latest(latest() / "ckpt")[0] == 2
    whole = uninterrupted(arguments)
    assert command("--resume", "latest", *QUICK) == 0
    assert digest(latest()) == whole
