"""Shards: what goes in comes out; what is broken is named; held-out words stay held out."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvdream_fast.core.errors import InputFileError, OutputError
from mvdream_fast.data import shards
from mvdream_fast.data.shards import (
    Sample,
    columns_for,
    decode_views,
    encode_views,
    list_shards,
    read_shard,
    write_shard,
)
from mvdream_fast.rendering import plan as planning
from mvdream_fast.rendering import survey
from mvdream_fast.rendering.catalogue import Entry


def views(n=16, size=8, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 4), dtype=np.uint8)


def sample(key="a-o0", n=16, size=8, columns=16) -> Sample:
    meta = {
        "key": key,
        "caption": "a chair",
        "size": size,
        "columns": columns,
        "c2w": [list(range(16))] * n,
        "fovy": [0.7] * n,
    }
    pixels = views(n, size)
    pixels[..., 3] = 255
    return Sample(meta, pixels)


@pytest.mark.parametrize(("n", "size", "columns"), [(16, 8, 16), (5, 7, 3), (1, 64, 1), (32, 4, 31)])
def test_lossless_strips(n, size, columns):
    pixels = views(n, size)
    pixels[..., 3] = np.where(pixels[..., 3] < 128, 0, pixels[..., 3])
    back = decode_views(encode_views(pixels, columns), n, columns, size)
    np.testing.assert_array_equal(back[..., 3], pixels[..., 3])
    np.testing.assert_array_equal(back[pixels[..., 3] > 0], pixels[pixels[..., 3] > 0])


def test_a_strip_never_exceeds_what_webp_can_hold():
    assert columns_for(16, 64) == 16
    assert columns_for(32, 512) == 31
    assert Image.open(io.BytesIO(encode_views(np.zeros((32, 512, 512, 4), np.uint8), columns_for(32, 512)))).size == (
        31 * 512,
        2 * 512,
    )


def test_write_and_read(tmp_path):
    samples = [sample("a-o0"), sample("a-o1", n=4, size=5, columns=4)]
    write_shard(tmp_path / "train-00000.tar", samples)
    assert [p.name for p in tmp_path.iterdir()] == ["train-00000.tar"]
    back = list(read_shard(tmp_path / "train-00000.tar"))
    for ours, theirs in zip(samples, back, strict=True):
        assert theirs.meta == ours.meta
        np.testing.assert_array_equal(theirs.views, ours.views)
    assert back[0].c2w.shape == (16, 4, 4)
    assert back[0].c2w[0, 1, 0] == 4
    assert back[1].fovy.shape == (4,)


def test_webdataset_reads_them(tmp_path):
    import webdataset

    write_shard(tmp_path / "train-00000.tar", [sample("a-o0"), sample("b-o0")])
    rows = list(webdataset.WebDataset(str(tmp_path / "train-00000.tar"), shardshuffle=False).decode("rgba8"))
    assert [row["__key__"] for row in rows] == ["a-o0", "b-o0"]
    assert rows[0]["json"]["caption"] == "a chair"
    assert rows[0]["webp"].shape == (8, 128, 4)


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("one.tar", "two.tar"):
        write_shard(tmp_path / name, [sample()])
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


@pytest.mark.parametrize("keep", [100, 700, 1500, 5000])
def test_a_truncated_shard_is_named(tmp_path, keep):
    path = tmp_path / "train-00003.tar"
    write_shard(path, [sample("a-o0"), sample("a-o1")])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputFileError, match=r"train-00003.tar: not a whole shard of renders .*render it again"):
        list(read_shard(path))


def make_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_member_names_are_never_paths(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    content = encode_views(views(1, 4), 1)
    meta = b'{"fovy": [1], "columns": 1, "size": 4}'
    make_tar(inner / "x.tar", {"../../escape.json": meta, "../../escape.webp": content, "/etc/thing.txt": b"no"})
    assert len(list(read_shard(inner / "x.tar"))) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["inner"]


@pytest.mark.parametrize("meta", [b"{", b"[]", b'{"fovy": [1]}', b'{"fovy": [1], "columns": 1, "size": 5}'])
def test_foreign_contents_are_named(tmp_path, meta):
    make_tar(tmp_path / "x.tar", {"a.json": meta, "a.webp": encode_views(views(1, 4), 1)})
    with pytest.raises(InputFileError, match="x.tar: not a whole shard"):
        list(read_shard(tmp_path / "x.tar"))


PAIR = {
    "a.json": b'{"fovy": [1], "columns": 1, "size": 4}',
    "a.webp": encode_views(np.zeros((1, 4, 4, 4), np.uint8), 1),
}


@pytest.mark.parametrize(
    ("members", "missing"),
    [
        (PAIR | {"b.json": PAIR["a.json"]}, "b.json has no b.webp"),
        (PAIR | {"b.webp": PAIR["a.webp"]}, "b.webp has no b.json"),
        ({"b.json": PAIR["a.json"]} | PAIR, "b.json has no b.webp"),
        ({"b.json": PAIR["a.json"], "a.webp": PAIR["a.webp"]}, "b.json has no b.webp"),
        ({"a.webp": PAIR["a.webp"], "b.json": PAIR["a.json"]}, "a.webp has no a.json"),
    ],
)
def test_a_half_of_a_record_is_named(tmp_path, members, missing):
    make_tar(tmp_path / "x.tar", members)
    with pytest.raises(InputFileError, match=rf"x.tar: not a whole shard of renders \({missing} beside it\)"):
        list(read_shard(tmp_path / "x.tar"))
    make_tar(tmp_path / "x.tar", {"a.webp": PAIR["a.webp"], "a.json": PAIR["a.json"], "a.txt": b""})
    assert len(list(read_shard(tmp_path / "x.tar"))) == 1


def test_means_of_pixels_are_those_behind_any_background():
    rng = np.random.default_rng(0)
    views = rng.integers(0, 256, (2, 8, 8, 4), np.uint8)
    small = shards.shrunk(views, 4)
    assert small.shape == (2, 2, 2, 4)
    for grey in (0, 128, 255):

        def flat(rgba, grey=grey):
            alpha = rgba[..., 3:] / 255
            return rgba[..., :3] * alpha + grey * (1 - alpha)

        tiles = flat(views).reshape(2, 2, 4, 2, 4, 3).mean((2, 4))
        assert np.abs(flat(small) - tiles).max() < 1.0  # both are rounded
    clear = np.zeros((1, 2, 2, 4), np.uint8)
    clear[..., :3] = 200
    assert shards.shrunk(clear, 2)[0, 0, 0, 3] == 0


def test_a_picture_is_one_view_without_a_camera(tmp_path):
    picture = sample()
    meta = {k: v for k, v in picture.meta.items() if k not in ("c2w", "fovy")} | {"columns": 1}
    write_shard(tmp_path / "pictures-00000.tar", [shards.Sample(meta, picture.views[:1])])
    (back,) = read_shard(tmp_path / "pictures-00000.tar")
    np.testing.assert_array_equal(back.views, picture.views[:1])
    assert list(shards.read_metas(tmp_path / "pictures-00000.tar")) == [meta]


def test_no_shards(tmp_path):
    with pytest.raises(InputFileError, match=r"no train shards in .*mvdream_fast.render"):
        list_shards(tmp_path)


def test_a_full_disk_leaves_the_finished_shards(tmp_path, monkeypatch):
    write_shard(tmp_path / "train-00000.tar", [sample()])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_add", full)
    with pytest.raises(OutputError, match=r"train-00001.tar.*No space left") as caught:
        write_shard(tmp_path / "train-00001.tar", [sample()])
    assert caught.value.exit_code == 7
    assert [p.name for p in tmp_path.iterdir()] == ["train-00000.tar"]
    assert len(list(read_shard(tmp_path / "train-00000.tar"))) == 1


def look(colors, n_parts=2, seed=0, coverage=0.3, extent=(1.0, 1.0, 1.0)) -> survey.Survey:
    thumbnail = np.random.default_rng(seed).integers(0, 256, 3072).tolist()
    names = list(colors)
    return survey.Survey(
        coverage, colors, [1 / n_parts] * n_parts, (names * n_parts)[:n_parts], [], None, thumbnail, [], list(extent)
    )


def catalogue(tmp_path):
    names = ["Chair"] * 6 + ["Table"] * 6 + ["Piano"] + ["Female"] * 4
    entries = [Entry(f"e{k:02d}", name, tmp_path, category="AB"[k % 2]) for k, name in enumerate(names)]
    palettes = [{"red": 0.6, "white": 0.4}, {"brown": 1.0}, {"blue": 0.7, "gray": 0.3}]
    return entries, {e.id: look(palettes[k % 3], seed=k) for k, e in enumerate(entries)}


def test_selection_drops_slivers_and_near_duplicates(tmp_path):
    entries, surveys = catalogue(tmp_path)
    surveys["e01"] = look({"red": 1.0}, coverage=0.02)
    surveys["e05"] = surveys["e04"]
    del surveys["e07"]
    chosen = planning.select(entries, surveys)
    assert [e.id for e in chosen.empty] == ["e01"]
    assert [e.id for e in chosen.duplicates] == ["e05"]
    assert len(chosen.kept) == len(entries) - 3


def test_near_duplicates_are_judged_by_their_distance():
    base = np.full(3072, 100, np.uint8)
    drop = survey.near_duplicates(np.stack([base, base + 4, base + 6, base + 10]))
    assert drop.tolist() == [False, True, False, True]  # 5.1 of 255 is 0.02


def test_held_out_captions_are_never_trained_on(tmp_path):
    entries, surveys = catalogue(tmp_path)
    held = {"e00", "e07"}
    assets = planning.plan(entries, surveys, held, seed=0, n_plain=2, n_painted=5)
    withheld = {o.caption for a in assets if a.split == "held_out" for o in a.orbits}
    trained = {t for a in assets if a.split == "train" for o in a.orbits for t in (o.caption, *o.variants)}
    assert {a.entry.id for a in assets if a.split == "held_out"} == held
    assert len(withheld) > 6
    assert not withheld & trained


def test_plans_repeat_by_seed_and_asset(tmp_path):
    entries, surveys = catalogue(tmp_path)
    whole = planning.plan(entries, surveys, set(), 3, 2, 3)
    alone = planning.plan(entries[4:5], surveys, set(), 3, 2, 3)
    assert alone[0] == whole[4]
    assert planning.plan(entries, surveys, set(), 4, 2, 3) != whole


def test_painted_orbits_are_called_by_their_color(tmp_path):
    entries, surveys = catalogue(tmp_path)
    orbits = planning.plan(entries[:1], surveys, set(), 0, 1, 8)[0].orbits
    assert orbits[0].caption == "a red and white chair"
    assert orbits[0].target is None
    for orbit in orbits[1:]:
        assert orbit.colors[0] != "red"
        assert orbit.caption.split()[1] == orbit.colors[0]
        assert orbit.target is not None
    parts_only = [o for o in orbits[1:] if len(o.paint) == 1]
    assert {o.colors[1:] for o in parts_only} <= {("white",), ()}
    assert parts_only


def test_glass_keeps_its_color_unless_all_is_glass():
    window = survey.Survey(
        0.3, {"white": 0.8, "blue": 0.2}, [0.8, 0.2], ["white", "blue"], [1], None, [], [], [1, 1, 1]
    )
    tumbler = survey.Survey(0.3, {"blue": 1.0}, [1.0], ["blue"], [0], None, [], [], [1, 1, 1])
    from mvdream_fast.core.rng import Stream

    assert all(paint == (0,) for paint, _, _ in planning._repaints(window, Stream(0, 0, "x"), 4))
    assert all(paint == (0,) for paint, _, _ in planning._repaints(tumbler, Stream(0, 0, "x"), 4))


def test_the_users_own_captions_are_kept_and_nothing_is_repainted(tmp_path):
    entry = Entry("e", "thing", tmp_path, caption="my grandmother's clock")
    (asset,) = planning.plan([entry], {"e": look({"red": 1.0})}, set(), 0, 2, 3)
    assert [o.caption for o in asset.orbits] == ["my grandmother's clock"] * 2


def described(entry_id, phrase, kind, **more) -> Entry:
    """An entry as metadata.csv makes it."""
    return Entry(entry_id, phrase, Path("x.glb"), kind=kind, **more)


def test_a_source_s_own_phrase_is_said_until_the_thing_is_painted():
    entry = described("e", "small white house with a red roof", "house", category="building")
    (asset,) = planning.plan([entry], {"e": look({"white": 0.7, "red": 0.3}, 1)}, set(), 0, 1, 1)
    own, painted = asset.orbits
    assert own.caption == "a small white house with a red roof"
    texts = {"a small white and red house", "a small house", "a house", "a small white and red house, building"}
    assert texts <= set(own.variants)
    assert painted.caption == f"a small {painted.colors[0]} house"
    assert not any("roof" in text for text in painted.variants)


def test_people_keep_their_colors():
    entry = described("e", "young man in a red shirt", "man", category="person")
    (asset,) = planning.plan([entry], {"e": look({"red": 1.0}, 1)}, set(), 0, 2, 3)
    assert [o.caption for o in asset.orbits] == ["a young man in a red shirt"] * 2


def test_shapes_are_said_of_what_is_unlike_its_kind():
    entries = [described(f"e{k}", "lamp", "lamp") for k in range(5)]
    extents = [(1, 1, 1), (1, 1, 1), (0.5, 0.5, 1.5), (1, 1, 0.4), (2, 0.7, 2)]
    surveys = {e.id: look({"red": 1.0}, extent=x) for e, x in zip(entries, extents)}
    assert planning.shape_words(entries, surveys) == {"e2": "tall", "e3": "low", "e4": "long"}
    assert planning.shape_words(entries[:3], surveys) == {}, "three are no kind to compare with"
    men = [described(e.id, "man", "man", category="person") for e in entries]
    assert planning.shape_words(men, surveys) == {}
    texts = planning.plan(entries, surveys, set(), 0, 1, 0)[2].orbits[0].variants
    assert {"a tall red lamp", "a tall lamp", "a red light"} <= set(texts)


def test_two_of_a_kind_stay_in_training():
    entries = [described(f"e{k}", "lamp", "lamp") for k in range(6)] + [described("f", "harp", "harp")]
    held = planning.random_held_out(entries, 0.99)
    assert len(held) == 4
    assert "f" not in held
    plain = [Entry(f"e{k}", f"thing {k}", Path("x.glb")) for k in range(10)]
    assert len(planning.random_held_out(plain, 0.3)) == 3


def test_captions_of_several_are_never_held_out():
    """And where each is its own asset's alone, the choice is the one that it was before that was asked."""
    entries = [Entry(f"e{k}", f"thing {k}", Path("x.glb"), caption=f"a thing {k}") for k in range(40)]
    before = ["e11", "e22", "e23", "e26"]
    assert sorted(planning.random_held_out(entries, 0.1), key=lambda e: int(e[1:])) == before
    assert planning.random_held_out([replace(e, caption=None) for e in entries], 0.1) == set(before)
    said = [replace(e, caption="a thing") if int(e.id[1:]) < 37 else e for e in entries]
    assert planning.random_held_out(said, 0.1) == {"e37", "e38", "e39"}
    assert planning.own_captions(said) == {"e37", "e38", "e39"}
    assert planning.random_held_out(said[:37], 0.1) == set()


def test_choosing_what_is_held_out(tmp_path):
    entries, surveys = catalogue(tmp_path)
    chosen = planning.choose_held_out(entries, surveys, n=4)
    names = [e.name for e in entries if e not in chosen]
    assert all(names.count(e.name) >= 2 for e in chosen)
    assert "Piano" not in [e.name for e in chosen]


def test_the_held_out_list_of_sweethome3d():
    ids = planning.held_out_ids()
    assert 35 <= len(ids) <= 45
    assert all(i == i.lower() and " " not in i for i in ids)
