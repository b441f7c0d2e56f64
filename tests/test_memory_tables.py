"""What docs/training.md and docs/dreambooth.md say that a full-size step takes is what their commands print. They count
on the meta device, so that no machine matters."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvdream_fast import dreambooth
from mvdream_fast.core import cli
from mvdream_fast.training import sharded_estimate, step_estimate

DOCS = Path(__file__).parents[1] / "docs"


def test_what_a_process_of_a_sharded_training_needs(capsys):
    page = (DOCS / "training.md").read_text()
    (words,) = re.findall(r"-m mvdream_fast\.training\.sharded_estimate ([\d ]+)\n", page)
    cli.run(sharded_estimate.main, sharded_estimate.Flags, prog="training.sharded_estimate", argv=words.split())
    assert f"\n\n{capsys.readouterr().out}\n" in page


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        Image.fromarray(np.full((256, 256, 3), 50 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


ROWS = re.findall(
    r"^\| (float32|`--.*`) \| (.+) \| (.+) \| (.+) \|$", (DOCS / "dreambooth.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_what_a_full_size_step_of_dreambooth_takes(row, photos, monkeypatch, capsys):
    monkeypatch.setattr(step_estimate, "measured_rate", lambda *_: 1e12)
    flags = row[0].strip("`").split() if row[0] != "float32" else []
    line = [
        "--dry-run",
        "--model",
        "sd21-4view",
        "--instance-data-dir",
        str(photos),
        "--instance-prompt",
        "a sks chair",
    ]
    cli.run(dreambooth.main, dreambooth.Flags, prog="dreambooth", argv=[*line, "--device", "cpu", *flags])
    said = capsys.readouterr().out
    tera, total, kept = (
        re.search(p, said)[1] for p in (r"([\d.]+) TFLOP", r"about ([\d.]+) GB", r"activations ([\d.]+)")
    )
    assert row[1:] == (f"{float(tera):.1f}", total, kept)


def test_the_table_of_dreambooth_has_its_rows():
    assert len(ROWS) == 4
