"""Counts of shards, and the credits of folders: what may ship, and what may not."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from test_batches import make_sample, picture

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.data.shards import write_shard
from mvdream_fast.rendering import credits as crediting
from mvdream_fast.rendering import inventory
from mvdream_fast.rendering import names as naming
from mvdream_fast.rendering.catalogue import Entry


def test_a_table_of_what_there_is(tmp_path, capsys):
    samples = [make_sample(i, split="held_out" if i == 2 else "train") for i in range(3)]
    for sample in samples:
        sample.meta.update(id=f"a{sample.meta['key'][5]}", kind="chair")
    samples[1].meta["id"] = "a0"  # another orbit of the same
    del samples[1].meta["kind"]  # as shards of earlier versions are
    samples[1].meta["noun"] = "wooden chair"
    picture_ = picture(0)
    picture_.meta.update(id="p", kind="dog", split="pictures")
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    write_shard(one / "train-00000.tar", samples[:2])
    write_shard(one / "held_out-00000.tar", samples[2:])
    write_shard(two / "pictures-00000.tar", [picture_])
    inventory.main([str(one), str(two)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| one | 2 | 1 | 3 | 3 | 48 | 1 | 0 |",
        "| two | 0 | 1 | 1 | 0 | 0 | 0 | 1 |",
        "| all | 2 | 2 | 4 | 3 | 48 | 1 | 1 |",
    ]
    with pytest.raises(InputFileError, match="no shards and no metadata.csv in"):
        inventory.main([str(tmp_path)])
    (two / "train-00000.tar").write_bytes(b"no tar")
    with pytest.raises(InputFileError, match="train-00000.tar: not a whole shard"):
        inventory.main([str(two)])


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"url": "x"}, "a record has no '(caption|noun)'"),
        (["x"], "list"),
        ({"id": "a", "noun": "car", "caption": ["red"], "variants": [], "fovy": 3}, ""),
    ],
)
@pytest.mark.parametrize("reader", [inventory.main, naming.main])
def test_shards_of_something_else_are_named(tmp_path, reader, meta, reason):
    """img2dataset and others call theirs so, too."""
    content = json.dumps(meta).encode()
    info = tarfile.TarInfo("0.json")
    info.size = len(content)
    with tarfile.open(tmp_path / "train-00000.tar", "w") as tar:
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(InputFileError, match=f"train-00000.tar: not a whole shard of renders .*{reason}"):
        reader([str(tmp_path)])


def test_sources_that_are_not_drawn_yet_are_counted_too(tmp_path, capsys):
    for name in ("a.glb", "b.glb", "c.glb"):
        (tmp_path / name).write_bytes(b"not read")
    (tmp_path / "metadata.csv").write_text(
        "file,caption,noun\na.glb,red car,car\nb.glb,blue car,car\nc.glb,old van,van\n"
    )
    inventory.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:] == [f"| {tmp_path.name} | 3 | 2 | 0 | 0 | 0 | 0 | 0 |"]


def test_credits_name_creators_and_packs():
    one = Entry("a", "house", Path("a.glb"), library="Town", creator="Ann", licence="CC0-1.0", kind="house")
    text = crediting.folder_credits([one, replace(one, id="b"), replace(one, id="c", library="Farm")])
    licence = "CC0 1.0, public domain (https://creativecommons.org/publicdomain/zero/1.0/)"
    assert text == f"Ann: 3 models. {licence}. Farm (1); Town (2).\n"


@pytest.mark.parametrize("licence", ["", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "GPL-3.0"])
def test_what_may_not_ship_is_refused(licence):
    entry = Entry("a", "house", Path("a.glb"), creator="Ann", licence=licence, kind="house")
    with pytest.raises(InputFileError, match=f"a.glb: the licence '{licence}' is none of CC0-1.0"):
        crediting.folder_credits([entry])


def test_names_of_things_and_the_other_words_of_their_captions(tmp_path, capsys):
    one, two = make_sample(0), make_sample(1)
    one.meta.update(id="a", noun="sofa", caption="a red sofa", variants=["a red couch", "a sofa, seat"])
    two.meta.update(id="b", noun="small box", kind="box", caption="a green small box", variants=["a green box"])
    shards, source = tmp_path / "shards", tmp_path / "source"
    shards.mkdir()
    source.mkdir()
    write_shard(shards / "train-00000.tar", [one, two])
    again = make_sample(2)
    again.meta.update(id="a", noun="sofa", caption="a blue sofa", variants=[])
    write_shard(shards / "train-00001.tar", [again])
    held_out = make_sample(3, split="held_out")
    held_out.meta.update(id="c", noun="lamp", caption="a red lamp")
    write_shard(shards / "held_out-00000.tar", [held_out])
    for name in ("a.glb", "b.glb"):
        (source / name).write_bytes(b"not read")
    (source / "metadata.csv").write_text("file,caption,noun,tags\na.glb,red car,car,road\nb.glb,sofa,sofa,\n")
    found = naming.names([shards, source])
    assert next(iter(found.items())) == ("sofa", 2)
    assert {name for name, count in found.items() if count == 1} == {"couch", "small box", "box", "car"}
    assert {"red", "seat", "road", "wooden", "purple"} <= {name for name, count in found.items() if not count}
    assert "lamp" not in found
    assert "settee" not in found  # another name of a sofa, but no caption says it
    naming.main([str(shards)])
    assert capsys.readouterr().out.startswith("1 sofa\n")
    with pytest.raises(InputFileError, match="no shards and no metadata.csv in"):
        naming.names([tmp_path / "none"])
