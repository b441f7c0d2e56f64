"""Shards to batches: what is in a batch, that it depends on its key alone, and that cut files are refused."""

import json
import math
import re
import tarfile

import numpy as np
import pytest
import torch

from mvdream_fast.core.errors import ArgumentError, InputFileError
from mvdream_fast.core.processes import Ranks
from mvdream_fast.core.rng import Stream
from mvdream_fast.data import batches
from mvdream_fast.data.batches import ImageSource, LatentSource, Shards, view_group
from mvdream_fast.data.pictures import WithPictures
from mvdream_fast.data.shards import Sample, _add, encode_views, write_shard
from mvdream_fast.rendering.orbits import PRESETS, orbit

SIZE, N_VIEWS = 16, 16


def make_sample(i: int, size: int = SIZE, split: str = "train") -> Sample:
    """An orbit whose view v is filled with the opaque colour (i, v, 0)."""
    cameras = orbit(PRESETS["embedded"], np.array([0.25, 0.5, 0.5, 0.5]))
    views = np.zeros((N_VIEWS, size, size, 4), np.uint8)
    views[..., 0], views[..., 1], views[..., 3] = i, np.arange(N_VIEWS)[:, None, None], 255
    meta = {
        "key": f"thing{i}-o0",
        "caption": f"a red thing{i}",
        "variants": [f"a thing{i}"],
        "split": split,
        "size": size,
        "columns": N_VIEWS,
        "c2w": cameras.c2w.reshape(-1, 16).tolist(),
        "fovy": cameras.fovy.tolist(),
    }
    return Sample(meta, views)


def six_orbits(folder):
    """Six orbits of six shades of red, in three shards, for runs of several processes. Returns the folder."""
    for shard in range(3):
        write_shard(folder / f"train-{shard:05d}.tar", [make_sample(30 * (2 * shard + i)) for i in range(2)])
    return folder


@pytest.fixture
def folder(tmp_path):
    for shard in range(2):
        write_shard(tmp_path / f"train-{shard:05d}.tar", [make_sample(3 * shard + i) for i in range(3)])
    return tmp_path


def test_multi_view_batches_hold_orthogonal_views_of_one_orbit(folder):
    shards = Shards(folder)
    batch = ImageSource(shards).batch(Stream(0, 3, "x"), 2, 4, multi_view=True)
    assert batch.images.shape == (8, 3, SIZE, SIZE)
    assert batch.cameras.shape == (8, 16)
    assert batch.n_views == 4
    pixels = ((batch.images[:, :, 0, 0] + 1) / 2 * 255).round().long()  # opaque: the background can't show
    for scene, caption in enumerate(batch.captions):
        rows = pixels[4 * scene : 4 * scene + 4]
        assert len(set(rows[:, 0].tolist())) == 1
        assert f"thing{rows[0, 0]}" in caption
        assert [(b - a) % 16 for a, b in zip(rows[:, 1].tolist(), rows[1:, 1].tolist())] == [4, 4, 4]
    positions = batch.cameras.reshape(2, 4, 4, 4)[..., :3, 3]
    assert torch.allclose(positions.norm(dim=-1), torch.ones(2, 4))
    assert torch.allclose(positions[:, 0, :2], -positions[:, 2, :2], atol=1e-5)


def test_2d_batches_hold_single_views_of_different_orbits(folder):
    batch = ImageSource(Shards(folder)).batch(Stream(0, 3, "x"), 3, 1, multi_view=False)
    assert batch.cameras is None
    assert batch.n_views == 1
    assert len(set(batch.captions)) == 3
    assert ImageSource(Shards(folder)).batch(Stream(0, 3, "x"), 2, 4, False).images.shape[0] == 8


@pytest.mark.parametrize("cached", [False, True])
def test_half_of_the_single_views_with_a_front_are_told_their_side(tmp_path, cached):
    samples = [make_sample(i) for i in range(60)]
    for i, sample in enumerate(samples):
        sample.meta["has_front"] = i < 40
    write_shard(tmp_path / "train-00000.tar", samples)
    seen = []

    def side(c2w):
        assert c2w.shape == (30, 4, 4)
        seen.append(c2w)
        return [f"side {k}" for k in range(len(c2w))]

    source = latents(tmp_path, Encoder(), side=side) if cached else ImageSource(Shards(tmp_path), side)
    told, could = 0, 0
    for step in range(10):
        captions = source.batch(Stream(0, step, "x"), 30, 1, multi_view=False).captions
        for k, caption in enumerate(captions):
            thing, ending = re.fullmatch(r"a (?:red )?thing(\d+)(?:, 3d asset)?(, side \d+)?", caption).groups()
            assert ending in (None, f", side {k}")
            assert ending is None or int(thing) < 40  # the others have no front
            told, could = told + (ending is not None), could + (int(thing) < 40)
    assert 0.4 < told / could < 0.6
    assert len(seen) == 10
    assert "side" not in "".join(source.batch(Stream(0, 0, "x"), 2, 4, multi_view=True).captions)


def test_a_batch_is_a_function_of_its_key(folder):
    one, two = (ImageSource(Shards(folder)).batch(Stream(5, 7, "x"), 2, 4, True) for _ in range(2))
    assert torch.equal(one.images, two.images)
    assert one.captions == two.captions
    other = ImageSource(Shards(folder)).batch(Stream(5, 8, "x"), 2, 4, True)
    assert one.captions != other.captions or not torch.equal(one.images, other.images)


def named(tmp_path, *nouns):
    """Shards of one orbit of each of these nouns."""
    samples = [make_sample(i) for i in range(len(nouns))]
    for sample, noun in zip(samples, nouns):
        sample.meta.update(noun if isinstance(noun, dict) else {"kind": noun})
    write_shard(tmp_path / "train-00000.tar", samples)
    return Shards(tmp_path)


@pytest.mark.parametrize(("power", "share"), [(0.0, 27 / 30), (0.5, 27**0.5 / (27**0.5 + 3**0.5)), (1.0, 0.5)])
def test_balanced_shards_draw_rare_nouns_more_often(tmp_path, power, share):
    shards = named(tmp_path, *["chair"] * 27, *["cello"] * 3).balanced(power)
    picks = [k for step in range(200) for k in shards.pick(10, Stream(0, step, "x"))]
    counts = np.bincount(picks, minlength=30)
    assert counts[:27].sum() / 2000 == pytest.approx(share, abs=0.02)
    for same in (counts[:27], counts[27:]):
        assert same == pytest.approx(np.full(len(same), same.mean()), rel=0.35)  # those of a noun are all alike


def test_a_balanced_batch_has_what_its_chances_say_and_no_order(tmp_path):
    shards = named(tmp_path, *"abcdefgh").balanced(1.0)
    batches = [shards.pick(8, Stream(0, step, "x")) for step in range(8)]
    assert all(sorted(batch) == list(range(8)) for batch in batches)
    assert len(set(map(tuple, batches))) > 6
    assert batches[3] == shards.at(8).pick(8, Stream(0, 3, "x"))
    source = ImageSource(shards)
    assert source.batch(Stream(0, 3, "x"), 8, 4, True).captions == source.batch(Stream(0, 3, "x"), 8, 4, True).captions


def test_nouns_of_shards_without_kinds_are_their_names_heads(tmp_path):
    names = [{"name": "red house with a green roof"}, {"name": "old house"}, {"caption": "a blue house"}, "hut"]
    counts = np.bincount(
        [k for step in range(100) for k in named(tmp_path, *names).balanced(1.0).pick(4, Stream(0, step, "x"))]
    )
    assert counts[3] == pytest.approx(counts[:3].sum(), rel=0.05)


def test_views_must_divide_the_orbit():
    with pytest.raises(ArgumentError, match="must divide the 16 views"):
        view_group(16, 5, Stream(0, 0, "v"))


def test_captions_use_every_variant_and_the_suffix(folder):
    shards = Shards(folder)
    texts = {shards.caption(0, Stream(0, i, "c")) for i in range(64)}
    assert texts == {"a red thing0", "a thing0", "a red thing0, 3d asset", "a thing0, 3d asset"}
    assert {"a red thing5", "a thing5", ", 3d asset"} <= set(shards.captions())
    shards.records[0].meta.update(caption="a 3D printer", variants=[])
    assert {shards.caption(0, Stream(0, i, "c")) for i in range(16)} == {"a 3D printer"}


def test_no_shards_and_cut_shards_are_refused(folder, tmp_path):
    with pytest.raises(InputFileError, match="no train shards in"):
        Shards(tmp_path / "nowhere")
    path = folder / "train-00001.tar"
    whole = path.read_bytes()
    for size in (700, len(whole) // 2, len(whole) - 10240, 100):
        path.write_bytes(whole[:size])
        with pytest.raises(InputFileError, match="train-00001.tar: not a whole shard"):
            Shards(folder)
    path.write_bytes(b"\0" * 10240)
    assert len(Shards(folder)) == 3


def test_a_folder_in_the_place_of_a_text_is_refused(folder):
    with tarfile.open(folder / "train-00002.tar", "w") as tar:
        info = tarfile.TarInfo("a.json")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    with pytest.raises(InputFileError, match=r"train-00002.tar: not a whole shard of renders \(a.json is no file\)"):
        Shards(folder)


def test_shards_of_two_kinds_are_refused(folder):
    write_shard(folder / "train-00002.tar", [make_sample(9, size=8)])
    with pytest.raises(InputFileError, match="thing9-o0 has 16 views of 8 px, the first one has 16 of 16"):
        Shards(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"caption": ["x"]}, {"variants": [1]}, {"variants": "abc"}, {"size": "16"}, {"columns": 0},
        {"name": 5}, {"kind": ["x"]}, {"c2w": [[1.0]]}, {"c2w": [[math.nan] * 16] * N_VIEWS},
        {"c2w": [[1e39] * 16] * N_VIEWS}, {"fovy": [math.inf] * N_VIEWS}, {"fovy": ["wide"] * N_VIEWS},
    ],
)  # fmt: skip
def test_foreign_words_and_numbers_are_refused(folder, change):
    sample = make_sample(9)
    with tarfile.open(folder / "train-00002.tar", "w") as tar:
        _add(tar, "a.json", json.dumps(sample.meta | change).encode())
        _add(tar, "a.webp", encode_views(sample.views, N_VIEWS))
    with pytest.raises(InputFileError, match="train-00002.tar: not a whole shard"):
        Shards(folder)


def test_control_characters_of_a_caption_are_left_out(folder):
    sample = make_sample(9)
    sample.meta.update(caption="a \x1b[1mred\x00 thing\n", variants=["\u202ea thing"])
    write_shard(folder / "train-00002.tar", [sample])
    assert Shards(folder).captions()[-3:] == ["a [1mred thing", "a thing", ", 3d asset"]


def test_an_image_is_never_read_with_the_words_of_another(folder):
    """Either half may stand first, but beside its other half: also where a shard was packed again in another order."""
    path = folder / "train-00000.tar"
    with tarfile.open(path) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}

    def pack(*names):
        with tarfile.open(path, "w") as tar:
            for name in names:
                _add(tar, name, members[name])

    pack(*(f"thing{i}-o0.{ending}" for i in range(3) for ending in ("webp", "json")))
    shards = Shards(folder)
    assert [r.meta["key"] for r in shards.records[:3]] == [f"thing{i}-o0" for i in range(3)]
    assert [shards.views(i)[0, 0, 0, 0] for i in range(3)] == [0, 1, 2]
    for half in ("thing1-o0.json", "thing1-o0.webp"):
        pack("thing0-o0.json", "thing0-o0.webp", half, "thing2-o0.json", "thing2-o0.webp")
        with pytest.raises(InputFileError, match=rf"train-00000.tar: .* \({half} has no thing1-o0\.\w+ beside it\)"):
            Shards(folder)


def test_a_picture_that_is_damaged_is_named(folder):
    path = folder / "train-00000.tar"
    record = Shards(folder).records[1]
    content = bytearray(path.read_bytes())
    content[record.offset : record.offset + 12] = b"not a webp.."
    path.write_bytes(content)
    with pytest.raises(InputFileError, match="thing1-o0 cannot be read"):
        Shards(folder).views(1)


class Encoder:
    """A stand-in for the autoencoder that counts what it is asked for."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images):
        self.calls += 1
        return torch.nn.functional.avg_pool2d(images, 8)


def latents(folder, encoder, key="k", side=None):
    return LatentSource(Shards(folder), encoder, folder / "cache" / "latents", (3, 2, 2), key, side)


def test_latents_are_encoded_once_and_survive_a_restart(folder):
    encoder = Encoder()
    source = latents(folder, encoder)
    first = [source.batch(Stream(0, i, "x"), 2, 4, i % 2 == 0) for i in range(12)]
    calls = encoder.calls
    assert 0 < calls <= 6 * 3
    again = latents(folder, encoder)
    for i, batch in enumerate(first):
        repeat = again.batch(Stream(0, i, "x"), 2, 4, i % 2 == 0)
        assert batch.encoded
        assert torch.equal(batch.images, repeat.images)
        assert batch.captions == repeat.captions
    assert encoder.calls == calls
    plain = ImageSource(Shards(folder)).batch(Stream(0, 0, "x"), 2, 4, True)
    assert torch.allclose(first[0].images, torch.nn.functional.avg_pool2d(plain.images, 8), atol=1e-3)
    del source, again
    latents(folder, encoder, "another autoencoder").batch(Stream(0, 0, "x"), 2, 4, True)
    assert encoder.calls > calls


def picture(i: int) -> Sample:
    """A picture without a camera, all of the opaque colour (i, 255, 255)."""
    meta = {"key": f"p{i}", "caption": f"a picture{i}", "variants": [], "size": SIZE, "columns": 1}
    views = np.full((1, SIZE, SIZE, 4), 255, np.uint8)
    views[..., 0] = i
    return Sample(meta, views)


@pytest.fixture
def with_pictures(folder):
    write_shard(folder / "pictures-00000.tar", [picture(i) for i in range(8)])
    return WithPictures(ImageSource(Shards(folder)), ImageSource(Shards(folder, batches.PICTURES)))


def test_a_quarter_of_a_2d_batch_is_pictures(with_pictures):
    batch = with_pictures.batch(Stream(0, 0, "x"), 2, 4, False)
    assert [f"picture{i}" in text for text in batch.captions for i in range(8)].count(True) == 2
    shown = (batch.images[:, 1, 0, 0] == 1).tolist()  # their green
    assert shown == ["picture" in text for text in batch.captions]
    assert (batch.cameras, batch.n_views) == (None, 1)
    assert with_pictures.batch(Stream(0, 0, "x"), 1, 2, False).images.shape[0] == 2  # too few for one
    assert not any("picture" in text for text in with_pictures.batch(Stream(0, 0, "x"), 2, 4, True).captions)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("n_scenes", [4, 6])
def test_processes_share_the_batch_that_one_would_have(with_pictures, n_scenes, world):
    whole = with_pictures.batch(Stream(0, 1, "x"), n_scenes, 2, False)
    parts = [with_pictures.batch(Stream(0, 1, "x"), n_scenes, 2, False, Ranks(rank, world)) for rank in range(world)]
    assert whole.captions == [text for part in parts for text in part.captions]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


def test_pictures_stand_anywhere_in_a_batch(with_pictures):
    """A trainer deals rising noise levels to a batch: at its end they would see the noisiest alone."""
    at = torch.zeros(8)
    for step in range(200):
        at += (with_pictures.batch(Stream(0, step, "x"), 2, 4, False).images[:, 1, 0, 0] == 1).float()
    assert at.sum() == 2 * 200
    assert at.min() > 30  # 50 of 200 each, give or take three deviations
    assert at.max() < 70


def test_pictures_are_encoded_as_renders_are(with_pictures, folder, tmp_path):
    pictures = Shards(folder, batches.PICTURES)
    source = LatentSource(pictures, lambda images: images[:, :, :2, :2], tmp_path / "l", (3, 2, 2), "k")
    source.fill()
    batch = source.batch(Stream(0, 0, "x"), 4, 1, False)
    assert (batch.images[:, 1:] == 1).all()


def test_smaller_images_of_larger_renders(folder):
    shards = Shards(folder)
    small = shards.at(SIZE // 2)
    assert small.views(1).shape == (N_VIEWS, SIZE // 2, SIZE // 2, 4)
    np.testing.assert_array_equal(small.views(1)[5, 0, 0], shards.views(1)[5, 0, 0])
    assert shards.at(SIZE) is shards
    for size in (2 * SIZE, SIZE - 1):
        with pytest.raises(ArgumentError, match=f"images of {size} px, got shards of {SIZE} px"):
            shards.at(size)


def test_training_has_no_caption_that_is_held_out_beside_it(folder):
    held = make_sample(0, split="held_out")
    held.meta.update(caption="a red thing1")
    write_shard(folder / "held_out-00000.tar", [held])
    only = make_sample(7)
    only.meta.update(key="only", caption="a red thing1", variants=[])
    write_shard(folder / "train-00002.tar", [only])
    shards = Shards(folder)
    assert [r.meta["key"] for r in shards.records] == [f"thing{i}-o0" for i in range(6)]
    assert (shards.records[1].meta["caption"], shards.records[1].meta["variants"]) == ("a thing1", [])
    assert Shards(folder, "held_out").captions()[0] == "a red thing1"
