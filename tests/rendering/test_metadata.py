"""metadata.csv: what it says of meshes, and what of it is refused by its line."""

import pytest
import trimesh

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.rendering.catalogue import read_folder
from mvdream_fast.rendering.metadata import Metadata, read_metadata

HEAD = "file,caption,noun,category,has_front,pack,creator,licence,faces\n"
MESHES = ["a/house.glb", "tree.glb"]


def read(folder, text, meshes=MESHES):
    (folder / "metadata.csv").write_text(text)
    said = []
    return read_metadata(folder, meshes, said.append), said


def test_all_columns(tmp_path):
    rows = 'a/house.glb,"Small red house, closed",house,building,yes,My pack,Me,CC0-1.0,12\n\ntree.glb,tree,,,,,,,\n'
    known, said = read(tmp_path, HEAD + rows)
    assert known == {
        "a/house.glb": Metadata("small red house, closed", "house", "building", (), True, "My pack", "Me", "CC0-1.0"),
        "tree.glb": Metadata("tree", "tree"),
    }
    assert said == []


def test_any_order_tags_and_windows_paths(tmp_path):
    known, _ = read(tmp_path, "Tags,has_front,Caption,File\nold; big,NO,house with a door,.\\a\\house.glb\n")
    assert known == {"a/house.glb": Metadata("house with a door", "house", tags=("old", "big"), has_front=False)}


def test_no_file_is_nothing_to_talk_about(tmp_path):
    said = []
    assert read_metadata(tmp_path, MESHES, said.append) == {}
    assert said == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name the columns file and caption, file is not"),
        ("file,noun\n", "must name the columns file and caption, caption is not"),
        ("file,caption\ntree.glb,a,b\n", "line 2: it has 3 cells for 2 columns"),
        ("file,caption\ntree.glb,tree\ntree.glb,oak\n", "line 3: 'tree.glb' has a line already"),
        ("file,caption\ntree.glb,\n", "line 2: the caption is empty"),
        ("file,caption\ntree.glb,\x1b\x00\n", "line 2: the caption is empty"),
        ("file,caption,has_front\ntree.glb,tree,maybe\n", "has_front must be yes, no or empty, got 'maybe'"),
        ('file,caption\ntree.glb,"tree\n', "metadata.csv, line 2: unexpected end of data"),
        ("file,caption\n../../etc/passwd,x\n", "none of its 1 files is in .*passwd"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(InputFileError, match=message):
        read(tmp_path, text)


def test_what_is_not_there_is_said(tmp_path):
    known, said = read(tmp_path, "file,caption\ntree.glb,tree\ngone.glb,thing\n")
    assert list(known) == ["tree.glb"]
    assert said == ["metadata.csv: 1 of 2 files are not there, the first is 'gone.glb'"]


def test_entries_of_a_folder_with_metadata(tmp_path):
    for name in ("house.glb", "cat_02.glb"):
        trimesh.creation.box().export(tmp_path / name)
    (tmp_path / "captions.csv").write_text("house.glb,a villa\ncat_02.glb,a cat\n")
    (tmp_path / "metadata.csv").write_text(
        HEAD + "house.glb,house with a red roof,house,building,no,Pack,Me,CC0-1.0,1\n"
    )
    house, cat = sorted(read_folder(tmp_path), key=lambda e: e.id, reverse=True)
    assert (house.name, house.noun, house.kind, house.has_front) == ("house with a red roof", "house", "house", False)
    assert (house.caption, house.category, house.library, house.licence) == (None, "building", "Pack", "CC0-1.0")
    assert (cat.name, cat.caption, cat.kind, cat.has_front) == ("cat 02", None, "", None)
