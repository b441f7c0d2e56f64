"""examples/train_embedded.sh with a Python that only says what it was asked: which stages there are."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# No GPU (`-c`), and a shard of each source that is drawn.
PYTHON = """#!/bin/sh
[ "$1" != -c ] || exit 1
echo "$*" >> commands
[ "$2" != mvdream_fast.render ] || while [ $# -gt 0 ]; do
    [ "$1" != -o ] || { mkdir -p "$2"; : > "$2/train-00000.tar"; }
    shift
done
"""


def commands(place: Path, assets: list[str]) -> list[str]:
    """What the script asks of Python with these files of assets."""
    for name in assets:
        (place / "assets" / name).parent.mkdir(parents=True)
        (place / "assets" / name).touch()
    (place / "python").write_text(PYTHON)
    (place / "python").chmod(0o755)
    line = ["sh", str(ROOT / "examples/train_embedded.sh"), "assets", "work"]
    subprocess.run(line, cwd=place, env=os.environ | {"PYTHON": str(place / "python")}, capture_output=True, check=True)
    return (place / "commands").read_text().splitlines()


@pytest.mark.parametrize(
    ("assets", "drawn"),
    [
        (["mine/metadata.csv"], ["assets/mine"]),
        (["usr/share/sweethome3d/a.sh3f"], ["sweethome3d"]),
        (["usr/share/sweethome3d/a.sh3f", "mine/metadata.csv"], ["sweethome3d", "assets/mine"]),
    ],
)
def test_it_draws_the_assets_that_are_there(assets, drawn, tmp_path):
    found = commands(tmp_path, assets)
    sources = [line.split()[2] for line in found if line.startswith("-m mvdream_fast.render ")]
    assert sources == drawn * 2  # in two passes
    shards = (tmp_path / "work/shards").iterdir()
    assert sorted(path.resolve().parent.parent.name for path in shards) == ["drawn"] * 2 * len(drawn)
    stages = [line.partition("--stage ")[2].split()[:1] for line in found if line.startswith("-m mvdream_fast.train ")]
    assert stages == [["vae"], [], ["cleaner"], ["matting"], [], ["evaluator"]]
