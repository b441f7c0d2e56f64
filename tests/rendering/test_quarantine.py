"""Meshes that end the process that reads or draws them: each is left out and written down, and the rest is drawn."""

import json
import os
from dataclasses import fields

import numpy as np
import pytest
import trimesh
from bad_work import BadEntry

from mvdream_fast import render
from mvdream_fast.core.errors import ArgumentError, InputFileError
from mvdream_fast.data.shards import list_shards, read_shard
from mvdream_fast.rendering import dataset
from mvdream_fast.rendering.catalogue import Entry, read_folder
from mvdream_fast.rendering.quarantine import Quarantine
from mvdream_fast.rendering.workers import Limits

RENDERER = "numpy" if dataset.make_renderer("auto").name == "numpy" else "gl"  # which starts sooner
OPTIONS = dataset.Options(n_plain=1, n_painted=0, renderer=RENDERER)
LIMITS = Limits(seconds=20.0, memory=4 << 30)


@pytest.fixture
def meshes(tmp_path):
    """Six good meshes, and one that is cut short."""
    folder = tmp_path / "meshes"
    folder.mkdir()
    make = trimesh.creation
    shapes = [
        make.box(),
        make.icosphere(1),
        make.cone(1, 2),
        make.box((1, 1, 5)),
        make.torus(1, 0.4),
        make.box((5, 5, 1)),
    ]
    for k, shape in enumerate(shapes):
        shape.export(folder / f"box{k}.ply")
    whole = trimesh.creation.torus(1, 0.4).export(file_type="glb")
    (folder / "cut.glb").write_bytes(whole[: len(whole) // 2])
    return folder


def spoiled(entries, log, **words):
    """The entries, some of which are bad: id -> what happens, and how often it does not before."""
    plain = [{f.name: getattr(entry, f.name) for f in fields(Entry)} for entry in entries]
    return [
        BadEntry(**entry, word=words[key][0], good=words[key][1], log=str(log)) if (key := entry["id"][:4]) in words
        else Entry(**entry) for entry in plain
    ]  # fmt: skip


def drawn(folder):
    return {s.meta["id"]: s.views for path in list_shards(folder) for s in read_shard(path)}


def run(entries, folder, **more):
    return dataset.render_dataset(entries, folder, OPTIONS, set(), 2, limits=LIMITS, **more)


def test_bad_files_cost_themselves_and_are_written_down(meshes, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD_ASSETS", 3)
    log, out = tmp_path / "log.txt", tmp_path / "out"
    bad = {"box0": ("abort", 0), "box1": ("abort", 1), "box2": ("raise", 1), "box5": ("sleep", 0)}
    entries = spoiled(read_folder(meshes), log, **bad)
    result = run(entries, out)
    assert set(drawn(out)) == {"box3-ply", "box4-ply"}
    records = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    kinds = {record["id"]: record["kind"] for record in records}
    assert kinds == {
        "box0-ply": "died", "box1-ply": "died", "box2-ply": "failed", "box5-ply": "hung", "cut-glb": "refused"
    }  # fmt: skip
    first = records[0]
    assert first["path"] == str(meshes / "box0.ply")
    assert first["source"] == "meshes"
    assert first["reason"] == "box0: its process was ended by SIGABRT"
    assert first["when"].startswith("20")
    assert result.bad == {record["id"]: record["reason"] for record in records}
    assert log.read_text().split().count("box0-ply") == dataset.TRIES
    assert log.read_text().split().count("box1-ply") == 1 + dataset.TRIES

    # Another run leaves them alone, and what is drawn as it is.
    before, n = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}, len(log.read_text())
    assert run(entries, out).bad == result.bad
    assert {p: p.stat().st_mtime_ns for p in out.glob("*.tar")} == before
    assert len(log.read_text()) == n

    # With `retry` all are tried again, and good ones are in no list any more.
    assert set(run(spoiled(read_folder(meshes), log), out, retry=True).bad) == {"cut-glb"}
    assert set(drawn(out)) == {f"box{k}-ply" for k in range(6)}
    assert list(Quarantine(out).records) == ["cut-glb"]


def test_a_file_that_has_changed_is_free(meshes, tmp_path):
    first, second, *_ = read_folder(meshes)
    quarantine = Quarantine(tmp_path)
    quarantine.add(first, "died", "its process was ended by SIGSEGV")
    quarantine.add(second, "refused", "not readable")
    again = Quarantine(tmp_path)
    assert again.holds(first)
    assert not again.holds(second)
    os.utime(first.archive, ns=(0, 0))
    assert not again.holds(first)
    assert again.reasons().keys() == {first.id, second.id}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 3 of .*quarantine.jsonl is not JSON: "),
        ("[]", r"line 3 of .*quarantine.jsonl is no record of an asset, with id, kind, reason, size, mtime_ns; delete"),
        ('{"id": "a"}', r"line 3 of .*quarantine.jsonl is no record of an asset"),
    ],
)
def test_a_line_that_is_no_record_is_named(meshes, tmp_path, line, message):
    first, *_ = read_folder(meshes)
    Quarantine(tmp_path).add(first, "died", "its process was ended by SIGSEGV")
    path = tmp_path / "quarantine.jsonl"
    path.write_text(f"\n{path.read_text()}{line}\n")
    with pytest.raises(InputFileError, match=message):
        Quarantine(tmp_path)
    assert not Quarantine(tmp_path, retry=True).records
    Quarantine(tmp_path).add(first, "died", "its process was ended by SIGSEGV")
    path.write_text(f"\n{path.read_text()}\n  \n")
    assert Quarantine(tmp_path).holds(first)


def flags(source, out, **more):
    base = {"source": str(source), "out": out, "workers": 1, "orbits": 1, "recolours": 1, "renderer": RENDERER}
    return render.Flags(**base | {"sheet": False, "held_out": 0.2} | more)


def members(out):
    """Everything that is drawn of each asset, by key; an asset is in one part only."""
    found = {}
    for split in ("train", "held_out"):
        for sample in (s for path in list_shards(out, split) for s in read_shard(path)):
            assert sample.meta["key"] not in found
            found[sample.meta["key"]] = sample.meta, sample.views
    return found


def test_parts_together_are_the_whole(meshes, tmp_path, capsys):
    """The same images and words for 1 part and for 3, whatever else is in the part; files of parts never meet."""
    render.main(flags(meshes, tmp_path / "one", shard="1/1"))
    for i in (3, 1, 2):
        render.main(flags(meshes, tmp_path / "three", shard=f"{i}/3"))
    one, three = members(tmp_path / "one"), members(tmp_path / "three")
    assert one.keys() == three.keys()
    assert len({meta["id"] for meta, _ in one.values()}) == 6
    for key, (meta, views) in one.items():
        assert json.dumps(meta) == json.dumps(three[key][0])
        np.testing.assert_array_equal(views, three[key][1])
    assert sorted(p.name for p in (tmp_path / "three").iterdir()) == [f"shard-0000{i}-of-00003" for i in range(1, 4)]
    quarantined = [p.parent.name for p in (tmp_path / "three").glob("*/quarantine.jsonl")]
    assert quarantined == ["shard-00001-of-00003"]

    capsys.readouterr()
    render.main(flags(meshes, tmp_path / "three", shard="2/3"))
    assert " 0 new views" in capsys.readouterr().out
    render.main(flags(meshes, tmp_path / "many", shard="9/9"))
    assert "0 assets in 0 shards" in capsys.readouterr().out
    for out, more, message in (
        ("three", {"shard": "1/5"}, "holds shard-00001-of-00003, a part of another number"),
        ("three", {"shard": "1/3", "seed": 1}, "was begun with another seed"),
        ("three", {}, "holds shards of something else"),
    ):
        with pytest.raises(OSError, match=message) as caught:
            render.main(flags(meshes, tmp_path / out, **more))
        assert caught.value.exit_code == 7


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "-1/2", "1/0", "1/2/3", ""])
def test_a_shard_that_is_none(tmp_path, text):
    with pytest.raises(ArgumentError, match=r"--shard must be i/n with i from 1 to n, as 3/100, got") as caught:
        render.main(flags(tmp_path, tmp_path / "out", shard=text))
    assert caught.value.exit_code == 2
