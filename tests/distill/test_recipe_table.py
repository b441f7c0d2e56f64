"""The table of `sds --list-recipes`: what it says, times of this machine alone, and that it needs no torch."""

import json
import os
import subprocess
import sys

import pytest

from mvdream_fast.core import machine
from mvdream_fast.distill import recipe_table
from mvdream_fast.distill.recipes import RECIPES
from mvdream_fast.distill.request import resolve


def write_run(folder, recipe="mvdream", seconds=(1.5, 2.0), age=0.0, **about):
    """A finished run as `sds` leaves it."""
    folder.mkdir(parents=True)
    record = resolve({"prompt": "a green chair", "recipe": recipe}).to_dict() | {"machine": machine.about()} | about
    (folder / "config.json").write_text(json.dumps(record))
    lines = [json.dumps({"step": i, "seconds": {"unet": x / 2, "vae": x / 2}}) for i, x in enumerate(seconds)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "asset.safetensors").touch()
    when = (folder / "config.json").stat().st_mtime - age
    os.utime(folder / "config.json", (when, when))


def test_times_are_of_the_newest_finished_run_made_here(tmp_path):
    write_run(tmp_path / "chair" / "old", seconds=(9.0,), age=100)
    write_run(tmp_path / "chair" / "new", seconds=(1.5, 2.0), age=50)
    write_run(tmp_path / "chair" / "elsewhere", seconds=(7.0,), machine=machine.about() | {"processor": "another"})
    write_run(tmp_path / "chair" / "resumed", seconds=(7.0,), resumed=[{"step": 1}])
    write_run(tmp_path / "chair" / "unfinished", seconds=(7.0,))
    (tmp_path / "chair" / "unfinished" / "asset.safetensors").unlink()
    write_run(tmp_path / "car" / "vsd", "prolificdreamer", seconds=(4.0,))
    changed = resolve({"prompt": "a cup", "steps": 5}).to_dict()
    write_run(tmp_path / "cup" / "short", seconds=(7.0,), sds=changed["sds"])
    (tmp_path / "cup" / "broken").mkdir()
    (tmp_path / "cup" / "broken" / "config.json").write_text("{")
    assert recipe_table.measured(tmp_path) == {("mvdream", "mini"): 3.5, ("prolificdreamer", "mini"): 4.0}
    assert recipe_table.measured(tmp_path / "nowhere") == {}


def test_the_table_says_all_there_is(monkeypatch, tmp_path, capsys):
    write_run(tmp_path / "chair" / "new", seconds=(60.0, 34.6))
    recipe_table.print_recipes(tmp_path)
    text = " ".join(capsys.readouterr().out.split())
    for name, recipe in RECIPES.items():
        assert name in text
        assert recipe.paper.split(",")[0] in text
    assert "2400, 1200, 60000 mini 95 s" in text
    assert text.count(" - ") == len(RECIPES) - 1


@pytest.mark.parametrize("size", ["mini", "paper"])
def test_it_is_a_row_a_recipe(size):
    table = recipe_table.table({("dreamfusion-if", size): 12.4})
    assert len(table.rows) == len(RECIPES)
    times = dict(zip(RECIPES, table.columns[-1].cells, strict=True))
    assert times == {name: f"{size} 12 s" if name == "dreamfusion-if" else "-" for name in RECIPES}


def test_it_comes_before_torch(tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv[1:] = ['--list-recipes', '--root', {str(tmp_path)!r}]\n"
        "runpy.run_module('mvdream_fast.sds', run_name='__main__')\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "prolificdreamer" in done.stdout
    assert not list(tmp_path.iterdir())
