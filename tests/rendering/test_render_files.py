"""`render` of a folder of files like Khronos' samples, to the pixel; and what a second run looks at again."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from gltf_builder import LINEAR, SQUARE_UV, Builder, encoded
from threads import by_threads

from mvdream_fast import render
from mvdream_fast.core.errors import InputFileError, OutputError
from mvdream_fast.data.batches import Shards
from mvdream_fast.data.shards import find_shards, list_shards, read_shard, write_shard
from mvdream_fast.rendering import dataset, sources
from mvdream_fast.rendering.catalogue import read_folder
from mvdream_fast.rendering.plan import random_held_out
from mvdream_fast.rendering.sheet import write_sheet

CORNERS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
# The six sides of a cube, seen from outside counter-clockwise.
SIDES = [(1, 5, 7, 3), (5, 4, 6, 7), (4, 0, 2, 6), (0, 1, 3, 2), (3, 7, 6, 2), (0, 4, 5, 1)]
UNLIT = {"KHR_materials_unlit": {}}


def cube(builder: Builder, stretch: tuple[float, float, float] = (1, 1, 1), **attributes) -> dict:
    """A closed box as a primitive; what is given for a square's corners is repeated for each side."""
    positions = CORNERS[np.array(SIDES)].reshape(-1, 3) * stretch
    given = {"TEXCOORD_0": SQUARE_UV} | attributes
    return {
        "attributes": {"POSITION": builder.accessor(positions)}
        | {k: v if isinstance(v, int) else builder.accessor(list(v) * 6) for k, v in given.items()},
        "indices": builder.accessor([4 * s + i for s in range(6) for i in (0, 1, 2, 0, 2, 3)], "u2"),
    }


def unlit(builder: Builder, base: dict, **more) -> int:
    return builder.material(base, extensions=UNLIT | more.pop("extensions", {}), **more)


def flat(*rgb) -> np.ndarray:
    return np.full((4, 4, len(rgb)), rgb, np.uint8)


def factor() -> Builder:
    """A linear factor alone: sRGB 128, 64, 192."""
    builder = Builder()
    material = unlit(builder, {"baseColorFactor": [LINEAR[128], LINEAR[64], LINEAR[192], 1]})
    return builder.show(cube(builder) | {"material": material})


def product() -> Builder:
    """0.5 x 0.5 x (0.2159, 1, 0) of light: 65.7, 137 and 0."""
    builder = Builder()
    base = {"baseColorFactor": [0.5, 0.5, 0.5, 1], "baseColorTexture": builder.texture(flat(128, 255, 0))}
    box = cube(builder, (1, 0.9, 1), COLOR_0=[[0.5] * 3] * 4)
    return builder.show(box | {"material": unlit(builder, base)})


def bytes_of_color() -> Builder:
    """Normalised bytes of linear light, alpha ignored: 188, 255, 137."""
    builder = Builder()
    colors = builder.accessor([(128, 255, 64, 0)] * 24, "u1", normalized=True)
    return builder.show(cube(builder, (1, 0.8, 1), COLOR_0=colors) | {"material": unlit(builder, {})})


def second_set() -> Builder:
    """A texture whose second set of coordinates, transformed, shows only its last texel."""
    builder = Builder()
    pixels = flat(255, 0, 0)
    pixels[3, 3] = (20, 200, 120)
    info = builder.texture(pixels, {"magFilter": 9728}) | {
        "texCoord": 0,
        "extensions": {"KHR_texture_transform": {"texCoord": 1, "offset": [0.8, 0.8], "scale": [0.15, 0.15]}},
    }
    box = cube(builder, (1, 0.7, 1), TEXCOORD_1=SQUARE_UV)
    return builder.show(box | {"material": unlit(builder, {"baseColorTexture": info})})


def gloss() -> Builder:
    builder = Builder(extensionsUsed=["KHR_materials_pbrSpecularGlossiness"])
    diffuse = {"diffuseFactor": [1, LINEAR[64], LINEAR[64], 1]}
    extensions = {"KHR_materials_pbrSpecularGlossiness": diffuse}
    return builder.show(cube(builder, (0.8, 1, 1)) | {"material": unlit(builder, {}, extensions=extensions)})


def morphed_skin() -> Builder:
    """A thin bar that a morph target makes wide, in a scene that is not the first."""
    builder = Builder()
    box = cube(builder, (0.01, 1, 1))
    wider = CORNERS[np.array(SIDES)].reshape(-1, 3) * (0.99, 0, 0)
    base = {"baseColorFactor": [0, LINEAR[192], LINEAR[192], 1]}
    material = unlit(builder, base)
    builder.show(box | {"material": material, "targets": [{"POSITION": builder.accessor(wider)}]}, weights=[0.6])
    builder.tree |= {"scenes": [{"nodes": []}, {"nodes": [0]}], "scene": 1}
    return builder


def mirrored_pair() -> Builder:
    """Two halves, one through a node that is mirrored and turned: single-sided, so a wrong winding would show."""
    builder = Builder()
    half = cube(builder, (0.5, 0.6, 0.6)) | {"material": unlit(builder, {"baseColorFactor": [1, 1, LINEAR[128], 1]})}
    builder.show(half, translation=[-0.5, 0, 0])
    turned = {"mesh": 0, "translation": [0.5, 0, 0], "scale": [-1, 1, 1], "rotation": [0, 0, 1, 0]}
    builder.tree["nodes"].append(turned)
    builder.tree["scenes"][0]["nodes"].append(1)
    return builder


GLTF = {
    factor: (128, 64, 192),
    product: (66, 137, 0),
    bytes_of_color: (188, 255, 137),
    second_set: (20, 200, 120),
    gloss: (255, 64, 64),
    morphed_skin: (0, 192, 192),
    mirrored_pair: (255, 255, 128),
}


@pytest.fixture(scope="module")
def khronos_like(tmp_path_factory):
    """A file for each of GLTF, as GLB or as glTF with its data beside it, and files that cannot be rendered."""
    folder = tmp_path_factory.mktemp("files")
    for i, build in enumerate(GLTF):
        builder = build()
        if i % 2:
            (folder / f"{build.__name__} data.bin").write_bytes(builder.blob)
            (folder / f"{build.__name__}.gltf").write_bytes(builder.json(f"{build.__name__}%20data.bin"))
        else:
            (folder / f"{build.__name__}.glb").write_bytes(builder.glb())
    builder = Builder(extensionsRequired=["KHR_draco_mesh_compression"])
    (folder / "packed.glb").write_bytes(builder.show(cube(builder)).glb())
    builder = Builder()
    (folder / "wires.glb").write_bytes(builder.show(cube(builder) | {"mode": 1}).glb())
    (folder / "._factor.glb").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    return folder


def flags(source, out, **more) -> render.Flags:
    given = {"source": str(source), "out": out, "workers": 1, "orbits": 1, "recolours": 0, "sheet": False}
    return render.Flags(**given | {"renderer": "auto", "held_out": 0.0} | more)


def views(out) -> dict[str, np.ndarray]:
    return {s.meta["id"]: s.views for path in list_shards(out) for s in read_shard(path)}


@pytest.mark.parametrize("kind", ["numpy", "auto"])
def test_a_folder_of_khronos_like_files_to_the_pixel(khronos_like, tmp_path, capsys, kind):
    """Every solid pixel of all 16 views has the colour that was worked out by hand."""
    render.main(flags(khronos_like, tmp_path, renderer=kind))
    text = capsys.readouterr().out
    assert "packed.glb: needs KHR_draco_mesh_compression, which cannot be read; export it without" in text
    assert "wires.glb: the mesh has no triangles; lines have no surface and are not drawn" in text
    drawn = views(tmp_path)
    names = {name.__name__: rgb for name, rgb in GLTF.items()}
    assert len(drawn) == len(names)
    for entry_id, pictures in drawn.items():
        expected = names[entry_id.rpartition("-")[0].replace("-", "_")]
        solid = pictures[pictures[..., 3] == 255][:, :3]
        assert len(solid) > 16 * 500, entry_id
        assert np.unique(solid, axis=0).tolist() == [list(expected)], entry_id


def test_companions_of_macos_are_passed_over(khronos_like, tmp_path):
    assert all(not entry.archive.name.startswith(".") for entry in read_folder(khronos_like))
    shutil.copy(khronos_like / "._factor.glb", tmp_path / "._box.glb")
    with pytest.raises(InputFileError, match="no meshes in"):
        read_folder(tmp_path)


# What a second run looks at again


def write_obj(folder, color: str, name: str = "box") -> None:
    lines = [f"v {x} {y} {z}" for x, y, z in CORNERS.tolist()]
    lines += ["vt 0 0"] + ["f " + " ".join(f"{i + 1}/1" for i in side) for side in SIDES]
    (folder / f"{name}.obj").write_text("\n".join([f"mtllib {name}.mtl", "usemtl m", *lines, ""]))
    (folder / f"{name}.mtl").write_text(f"newmtl m\n{color}\n")


@pytest.fixture
def meshes(tmp_path):
    folder = tmp_path / "meshes"
    folder.mkdir()
    write_obj(folder, "Kd 1 0 0", "box")
    builder = Builder()
    (folder / "wall.glb").write_bytes(builder.show(cube(builder, (0.3, 1, 1))).glb())
    return folder


def captions(out) -> dict[str, str]:
    return {s.meta["id"]: s.meta["caption"] for path in list_shards(out) for s in read_shard(path)}


@pytest.fixture
def looked_at(monkeypatch):
    """The names of the entries that are surveyed; workers are replaced by this process."""
    seen = []

    class Here:
        def __init__(self, workers, begin, limits, stop):
            begin()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, function, items):
            while items:
                item = items.popleft()
                if function is dataset.survey_entry:
                    seen.append(item.name)
                yield item, function(item)

    monkeypatch.setattr(dataset, "Workers", Here)
    return seen


def test_an_unchanged_folder_is_not_looked_at_again(meshes, tmp_path, looked_at):
    out = tmp_path / "out"
    render.main(flags(meshes, out))
    assert sorted(looked_at) == ["box", "wall"]
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    looked_at.clear()
    os.utime(meshes / "wall.glb")  # touched, or copied: the content is the same
    render.main(flags(meshes, out))
    assert looked_at == []
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")} == times


@pytest.mark.parametrize("what", ["mesh", "material", "same size and another time"])
def test_a_changed_mesh_is_looked_at_and_drawn_again(meshes, tmp_path, looked_at, what):
    out = tmp_path / "out"
    render.main(flags(meshes, out))
    assert captions(out)["box-obj"] == "a red box"
    looked_at.clear()
    if what == "mesh":
        (meshes / "box.obj").write_text((meshes / "box.obj").read_text().replace("usemtl m", "usemtl n"))
    else:
        (meshes / "box.mtl").write_text("newmtl m\nKd 0 0 1\n" + ("# blue" if what == "material" else ""))
    render.main(flags(meshes, out))
    assert looked_at == ["box"]
    assert captions(out)["box-obj"] == ("a white box" if what == "mesh" else "a blue box")


def test_a_texture_that_appears_is_drawn(meshes, tmp_path, looked_at, capsys):
    write_obj(meshes, "Kd 1 1 1\nmap_Kd paint.png", "box")
    out = tmp_path / "out"
    render.main(flags(meshes, out))
    assert "note on box-obj: the texture paint.png is not there and is not drawn" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["drawn_without"] == {
        "box-obj": ["the texture paint.png is not there and is not drawn"]
    }
    (meshes / "paint.png").write_bytes(encoded(flat(0, 128, 0)))
    looked_at.clear()
    render.main(flags(meshes, out))
    assert looked_at == ["box"]
    assert captions(out)["box-obj"] == "a green box"


def test_a_repaired_mesh_joins_and_a_broken_one_leaves(meshes, tmp_path, looked_at, capsys):
    good = (meshes / "wall.glb").read_bytes()
    (meshes / "wall.glb").write_bytes(good[:-40])
    out = tmp_path / "out"
    render.main(flags(meshes, out))
    assert set(views(out)) == {"box-obj"}
    (meshes / "wall.glb").write_bytes(good)
    looked_at.clear()
    render.main(flags(meshes, out))
    assert looked_at == ["wall"]
    assert set(views(out)) == {"box-obj", "wall-glb"}
    (meshes / "box.mtl").unlink()
    (meshes / "box.obj").write_text("nothing")
    capsys.readouterr()
    render.main(flags(meshes, out))
    assert set(views(out)) == {"wall-glb"}
    assert "skipped box-obj: box.obj: the mesh has no triangles" in capsys.readouterr().out


def test_another_source_of_the_same_names_is_looked_at_and_drawn(tmp_path, looked_at):
    """v2/meshes/box.obj is not v1/meshes/box.obj, though ids, names and settings are all the same."""
    out = tmp_path / "out"
    for version, color in (("v1", "Kd 1 0 0"), ("v2", "Kd 0 0 1")):
        folder = tmp_path / version / "meshes"
        folder.mkdir(parents=True)
        write_obj(folder, color)
        looked_at.clear()
        render.main(flags(folder, out))
        assert looked_at == ["box"]
        assert captions(out) == {"box-obj": "a red box" if version == "v1" else "a blue box"}
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    moved = (tmp_path / "v2").rename(tmp_path / "v3")
    render.main(flags(moved / "meshes", out))
    assert looked_at == ["box", "box"]
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")} == times  # the files are the same


def test_links_to_one_mesh_are_told_apart_by_their_folders(tmp_path, looked_at):
    """Two snapshots of the hub's cache: the same mesh beside another material."""
    store, out = tmp_path / "blobs", tmp_path / "out"
    store.mkdir()
    write_obj(store, "Kd 1 0 0")
    for version, color in (("v1", "red"), ("v2", "blue")):
        folder = tmp_path / version / "meshes"
        folder.mkdir(parents=True)
        write_obj(folder, "Kd 1 0 0" if color == "red" else "Kd 0 0 1")
        (folder / "box.obj").unlink()
        (folder / "box.obj").symlink_to("../../blobs/box.obj")
        render.main(flags(folder, out))
        assert captions(out) == {"box-obj": f"a {color} box"}
    looked_at.clear()
    (tmp_path / "link").symlink_to(tmp_path / "v2")
    render.main(flags(tmp_path / "link" / "meshes", out))  # the same folder by another name
    assert looked_at == []


HOLD = """
import sys, time
from pathlib import Path
from mvdream_fast.core import run_folder
with run_folder.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_leaves_the_shard_that_is_being_written(meshes, tmp_path):
    """Its writer may be on another machine, whose processes are unknown here: only the lock tells."""
    out = tmp_path / "out"
    render.main(flags(meshes, out))
    first = subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        half = out / "train-00001.tar.tmp-999999999"
        half.write_bytes(b"half a shard")
        with pytest.raises(OutputError, match=f"is in use by process {first.pid}"):
            render.main(flags(meshes, out))
        assert half.read_bytes() == b"half a shard"
    finally:
        first.kill()
        first.communicate()
    render.main(flags(meshes, out))
    assert not half.exists()


# Which are held out, and the sheet


def test_a_part_of_held_out_assets_alone_has_a_sheet_of_them(meshes, tmp_path, capsys):
    held = random_held_out(read_folder(meshes), 0.5)
    (i,) = (k + 1 for k, entry in enumerate(read_folder(meshes)) if entry.id in held)
    for k in (i, 3 - i):
        render.main(flags(meshes, tmp_path / "out", shard=f"{k}/2", held_out=0.5, sheet=True))
        place = tmp_path / "out" / f"shard-0000{k}-of-00002" / "sheet.png"
        assert f"sheet: {place}" in capsys.readouterr().out
        assert place.stat().st_size > 1000
    assert [len(find_shards(tmp_path / "out", split)) for split in ("train", "held_out")] == [1, 1]


def test_shards_of_nothing_have_no_sheet(tmp_path):
    write_shard(tmp_path / "held_out-00000.tar", [])
    assert write_sheet(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["held_out-00000.tar"]


@pytest.mark.parametrize(("own", "held"), [([], 0), (["a wall"], 1)])
def test_captions_of_several_are_not_held_out(meshes, tmp_path, capsys, own, held):
    """Nothing that says a held-out caption is trained on: of 'a box' four would be lost."""
    for k in range(3):
        shutil.copy(meshes / "wall.glb", meshes / f"wall{k}.glb")
    words = {path.name: "a box" for path in meshes.iterdir() if path.suffix in (".glb", ".obj")}
    words |= {"wall.glb": own[0]} if own else {}
    (meshes / "captions.json").write_text(json.dumps(words))
    render.main(flags(meshes, tmp_path / "out", held_out=0.4, shard="1/1"))
    line = "nothing is held out of training: each asset has a caption that another has, too\n"
    assert capsys.readouterr().out.count(line) == 1 - held
    place = tmp_path / "out" / "shard-00001-of-00001"
    assert len(find_shards(place, "held_out")) == held
    assert len(Shards(place)) == 5 - held


def test_stamps(tmp_path):
    path, gone = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"12")
    stored = json.loads(json.dumps(sources.stamps([str(path), str(gone)])))
    assert stored[str(gone)] is None
    assert sources.unchanged(stored) == stored
    os.utime(path, ns=(5, 5))
    later = sources.unchanged(stored)
    assert later[str(path)][1] == 5
    assert later[str(path)][2] == stored[str(path)][2]
    path.write_bytes(b"13")
    assert sources.unchanged(stored) is None
    path.write_bytes(b"12")
    gone.write_bytes(b"")
    assert sources.unchanged(stored) is None
    gone.unlink()
    path.unlink()
    assert sources.unchanged(stored) is None


def test_a_process_that_draws_without_opengl_has_one_thread(monkeypatch):
    """Whatever it began with: others like it run beside it, on the same cores."""
    monkeypatch.setattr(dataset, "_renderer", None)

    def begun() -> int:
        dataset._begin("numpy")
        return torch.get_num_threads()

    assert by_threads(begun) == [1, 1, 1]
