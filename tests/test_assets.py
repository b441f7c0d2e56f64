"""The scripts of examples/assets on small files made here: containers, meshes, people, pictures, and a watchdog."""

import csv
import gzip
import importlib.util
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvdream_fast.data.batches import PICTURES, Shards
from mvdream_fast.rendering.catalogue import read_folder

ASSETS = Path(__file__).parents[1] / "examples" / "assets"


def load(name):
    spec = importlib.util.spec_from_file_location(name, ASSETS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def openclonk():
    return load("openclonk_objects")


def c4group(files: dict) -> bytes:
    """A C4Group as the game writes it: nested dicts are groups."""
    entries, body = b"", b""
    for name, content in files.items():
        is_group = isinstance(content, dict)
        inside = c4group(content) if is_group else content
        numbers = struct.pack("<5i", 1, is_group, len(inside), 0, len(body))
        entries += name.encode().ljust(260, b"\0") + numbers + bytes(36)
        body += inside
    head = bytearray(b"RedWolf Design GrpFolder".ljust(36, b"\0") + struct.pack("<i", len(files)))
    head = head.ljust(204, b"\0")
    for k in range(0, len(head) - 2, 3):
        head[k], head[k + 2] = head[k + 2], head[k]
    return bytes(byte ^ 237 for byte in head) + entries + body


def packed(files: dict) -> bytes:
    return b"\x1e\x8c" + gzip.compress(c4group(files))[2:]


def chunk(kind: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack("<HI", kind, 6 + len(body)) + body


def ogre(material: str = "Wood", shared: bool = False) -> bytes:
    """A square in the plane z = 0.5 of two triangles, with texture coordinates."""
    rows = [(-1, -1, 0.5, 0, 1), (1, -1, 0.5, 1, 1), (1, 1, 0.5, 1, 0), (-1, 1, 0.5, 0, 0)]
    elements = [(0, 2, 1, 0, 0), (0, 1, 7, 12, 0)]  # buffer, type, meaning, offset, index
    geometry = chunk(
        0x5000,
        struct.pack("<I", 4),
        chunk(0x5100, *(chunk(0x5110, struct.pack("<5H", *element)) for element in elements)),
        chunk(0x5200, struct.pack("<2H", 0, 20), chunk(0x5210, *(struct.pack("<5f", *row) for row in rows))),
    )
    faces = struct.pack("<6H", 0, 1, 2, 0, 2, 3)
    submesh = chunk(
        0x4000, f"{material}\n".encode(), struct.pack("<BIB", shared, 6, 0), faces, b"" if shared else geometry
    )
    parts = (geometry, submesh) if shared else (submesh,)
    skeleton = struct.pack("<HI", 0x6000, 0)  # a length that cannot be
    return struct.pack("<H", 0x1000) + b"[MeshSerializer_v1.8]\n" + chunk(0x3000, b"\0", *parts, skeleton)


MATERIAL = """
material Wood
{ technique { pass { diffuse 1 0.5 0 1
 texture_unit {
  texture bark.png
 } texture_unit {
  texture bark_overlay.png
 } texture_unit {
  texture bark_normal.png
 } } } }
material Child : Wood
{ }
material Leaf { technique { pass { alpha_rejection greater 128
 texture_unit {
  texture leaf.png
 } } } }
"""


def png(color) -> bytes:
    from io import BytesIO

    out = BytesIO()
    Image.new("RGBA", (4, 4), color).save(out, "PNG")
    return out.getvalue()


def test_a_container_of_the_game(openclonk):
    files = {"Animals.ocd": {"Bat.ocd": {"Graphics.mesh": b"12", "Title.txt": b"US:Bat"}}, "a.txt": b"x"}
    assert dict(openclonk.unpacked(packed(files))) == {
        "Animals/Bat/Graphics.mesh": b"12", "Animals/Bat/Title.txt": b"US:Bat", "a.txt": b"x",
    }  # fmt: skip
    with pytest.raises(ValueError, match="the file is no C4Group"):
        list(openclonk.unpacked(b"\x1e\x8c" + gzip.compress(bytes(300))[2:]))
    with pytest.raises(zlib.error):
        list(openclonk.unpacked(b"not a group"))


@pytest.mark.parametrize("shared", [False, True])
def test_a_mesh_of_two_triangles(openclonk, shared):
    ((material, faces, data),) = openclonk.submeshes(ogre(shared=shared))
    assert material == "Wood"
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3]]
    assert data[openclonk.POSITION].tolist() == [[-1, -1, 0.5], [1, -1, 0.5], [1, 1, 0.5], [-1, 1, 0.5]]
    assert data[openclonk.UV].tolist() == [[0, 1], [1, 1], [1, 0], [0, 0]]
    with pytest.raises(ValueError, match="no Ogre mesh"):
        openclonk.submeshes(b"\0\0mesh\n")
    with pytest.raises((ValueError, struct.error)):
        openclonk.submeshes(ogre()[:80])


def test_materials_of_scripts(openclonk):
    found = openclonk.materials(MATERIAL)
    assert found["Wood"] == ((1.0, 0.5, 0.0), "bark.png", None, False)
    assert found["Child"] == ((1.0, 1.0, 1.0), None, "Wood", False)
    assert found["Leaf"] == ((1.0, 1.0, 1.0), "leaf.png", None, True)


def test_the_game_s_objects_as_a_folder(openclonk, tmp_path, monkeypatch, capsys):
    bat = {"Graphics.mesh": ogre("Child"), "Scene.material": MATERIAL.encode(), "bark.png": png((200, 0, 0, 9))}
    (tmp_path / "Objects.ocd").write_bytes(packed({"Animals.ocd": {"Bat.ocd": bat}}))
    (tmp_path / "Decoration.ocd").write_bytes(packed({"Village.ocd": {"Bag.ocd": {"Graphics.mesh": ogre("None")}}}))
    rows = {"Animals/Bat": ("bat", "bat", "animal", "yes", 90), "Village/Bag": ("sack", "sack", "container", "no", 0)}
    monkeypatch.setattr(openclonk, "OBJECTS", rows | {"Gone": ("x", "x", "x", "no", 0)})
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), str(tmp_path / "out")])
    openclonk.main()
    assert "left out Gone: KeyError" in capsys.readouterr().out
    bat, bag = read_folder(tmp_path / "out")
    assert (bat.noun, bat.has_front, bat.licence) == ("bat", True, "CC-BY-3.0")
    assert (bag.noun, bag.has_front, bag.licence, bag.creator) == ("sack", False, "ISC", "Dustin Ness (Dragonclonk)")
    (part,) = bat.load().parts
    assert part.texture.pixels[0, 0].tolist() == [200, 0, 0, 255]  # alpha is a player's colour
    assert np.allclose(part.positions[:, 0], 0.5)  # a quarter turn: +Z of the file has come to +X
    (tmp_path / "Objects.ocd").write_bytes(b"junk")
    with pytest.raises(SystemExit, match="Objects.ocd cannot be unpacked"):
        openclonk.main()


def makehuman(folder: Path) -> None:
    """A body that is a square of four vertices, as is each helper, and joints at heights of their own."""
    heights = {"body": 0, "helper-tights": 0, "helper-skirt": 0, "helper-hair": 9, "helper-l-eye": 9, "helper-r-eye": 9}
    joints = {
        "pelvis": 5,
        "l-knee": 2,
        "neck": 8,
        "head": 9,
        "l-hand": 7,
        "l-elbow": 7,
        "l-shoulder": 7,
        "r-shoulder": 7,
    }
    lines, n = [], 0
    for name, low in [*heights.items(), *((f"joint-{k}", v) for k, v in joints.items())]:
        side = 3.0 if "hand" in name else 2.0 if "elbow" in name else 1.0 if "l-sh" in name else -1.0
        high = low if name.startswith("joint") else 10
        left, right = (side, side) if name.startswith("joint") else (-4.0, 4.0)
        lines += [f"g {name}", *(f"v {x} {y} 0" for x, y in [(left, low), (right, low), (right, high), (left, high)])]
        lines.append(f"f {n + 1}/1 {n + 2}/1 {n + 3}/1 {n + 4}/1")
        n += 4
    (folder / "3dobjs").mkdir(parents=True)
    (folder / "3dobjs" / "base.obj").write_text("\n".join(lines))
    (folder / "rigs" / "standard").mkdir(parents=True)
    weights = {"upperarm01.L": [[1, 0.5]], "wrist.L": [[1, 0.5]], "spine": [[0, 1.0]]}
    (folder / "rigs" / "standard" / "weights.default.json").write_text(json.dumps({"weights": weights}))
    shapes = folder / "targets" / "macrodetails"
    shapes.mkdir(parents=True)
    module = load("people_objects")
    for sex in ("female", "male"):
        for age in ("baby", "child", "young", "old"):
            for race in module.SKIN:
                with gzip.open(shapes / f"{race}-{sex}-{age}.target.gz", "wt") as file:
                    file.write("# a shape\n0 0 0 1\n")
            for build in module.BUILDS.values():
                with gzip.open(shapes / f"universal-{sex}-{age}-{build}.target.gz", "wt") as file:
                    file.write("# average\n")


def test_people(tmp_path, monkeypatch):
    people = load("people_objects")
    makehuman(tmp_path / "mpfb2")
    body = people.Body(tmp_path / "mpfb2")
    assert body.arms["L"][1] == 1
    assert body.arms["R"].sum() == 0
    assert body.shape("asian-male-old").tolist()[0] == [-4, 0, 1]
    moved = body.lowered(body.positions)
    assert moved[1] != pytest.approx(body.positions[1])
    np.testing.assert_array_equal(np.delete(moved, 1, 0), np.delete(body.positions, 1, 0))
    lengths = [np.linalg.norm(p[1] - body.joint(body.positions, "l-shoulder")) for p in (moved, body.positions)]
    assert lengths[0] == pytest.approx(lengths[1])
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "mpfb2"), str(tmp_path / "out"), "--count", "15"])
    people.main()
    entries = read_folder(tmp_path / "out")
    assert len(entries) == 15
    assert {e.category for e in entries} == {"person"}
    assert {e.kind for e in entries} == {"man", "woman", "boy", "girl", "toddler"}
    assert all(" in a" in e.name and e.licence == "CC0-1.0" for e in entries)
    again = [people.dealt(3, np.random.default_rng((0, 3)))[-1] for _ in range(2)]
    assert again[0] == again[1] == next(e.name for e in entries if e.archive.name == "person_0003.ply")
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"no 3dobjs/base.obj in .*; name the folder"):
        people.main()


def test_pictures(tmp_path, monkeypatch, capsys):
    emoji = load("emoji_pictures")
    (tmp_path / "art").mkdir()
    pixels = np.zeros((256, 264, 4), np.uint8)
    pixels[64:192, 68:196] = (204, 23, 26, 255)
    Image.fromarray(pixels).save(tmp_path / "art" / "1f4ba.webp", lossless=True)
    names = {
        "\U0001f4ba": {"name": "seat", "group": "Travel & Places"},
        "\U0001f550": {"name": "one o\u2019clock", "group": "Objects"},
    }
    names["\U0001f600"] = {"name": "grin", "group": "Smileys & Emotion"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    argv = ["x", str(tmp_path / "art"), str(tmp_path / "names.json"), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    emoji.main()
    assert "1 pictures" in capsys.readouterr().out
    shards = Shards(tmp_path / "out", PICTURES)
    assert [(r.meta["caption"], r.n_views) for r in shards.records] == [("a red seat", 1)]
    view = shards.views(0)[0]
    assert view[64, 64].tolist() == [204, 23, 26, 255]
    assert (view[..., 3] > 0).sum() == 64 * 64
    (tmp_path / "names.json").write_text("{}")
    with pytest.raises(SystemExit, match="none of the pictures is in"):
        emoji.main()
    (tmp_path / "names.json").write_text("[1")
    with pytest.raises(SystemExit, match="see the help"):
        emoji.main()


WORKER = """
import json, sys
noun, *seeds = json.loads(sys.argv[sys.argv.index("--worker") + 1])
for seed in seeds:
    if seed == 2:
        while True:
            pass
    if seed == 4:
        sys.exit(3)
    print("chatter")
    print("RESULT made" if seed != 3 else "RESULT KeyError: x", flush=True)
    if seed == 3:
        break
"""


def test_what_hangs_is_ended_from_outside(tmp_path, monkeypatch):
    pytest.importorskip("psutil", reason="the watchdog reads CPU times through it")
    infinigen = load("infinigen_objects")
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(infinigen, "__file__", str(tmp_path / "worker.py"))
    monkeypatch.setattr(infinigen, "LOADING", 0.5)
    left, log = [0, 1, 2, 3, 4, 5], tmp_path / "log.jsonl"
    for rest in ([3, 4, 5], [4, 5], [5], []):
        left = infinigen.watched(tmp_path, "cup", left, 0.5, log)
        assert left == rest
    results = [json.loads(line)[1:] for line in log.read_text().splitlines()]
    assert results == [
        [0, "made"], [1, "made"], [2, "took too long"], [3, "KeyError: x"], [4, "crashed"], [5, "made"],
    ]  # fmt: skip


def test_infinigen_s_metadata(tmp_path, monkeypatch):
    pytest.importorskip("psutil", reason="the watchdog reads CPU times through it")
    infinigen = load("infinigen_objects")
    for name in ("desk-lamp_0.ply", "desk-lamp_12.ply", "other.ply"):
        (tmp_path / name).write_bytes(b"")
    infinigen.write_metadata(tmp_path)
    rows = list(csv.DictReader((tmp_path / "metadata.csv").open()))
    assert [(r["file"], r["noun"], r["has_front"], r["licence"]) for r in rows] == [
        ("desk-lamp_0.ply", "desk lamp", "no", "BSD-3-Clause"), ("desk-lamp_12.ply", "desk lamp", "no", "BSD-3-Clause"),
    ]  # fmt: skip
