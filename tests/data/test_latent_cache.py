"""The files of a latent cache: one for each name, made again unless they are whole, and never changed under a run."""

import errno
import fcntl
import os

import numpy as np
import pytest

from mvdream_fast.core.errors import OutputError
from mvdream_fast.data import latent_cache
from mvdream_fast.data.latent_cache import LatentCache

SHAPE = (5, 3, 4, 2, 2, 2)
ENDINGS = (".npy", ".filled.npy", ".key")


def cache(file, key="k", fill=None) -> LatentCache:
    """A cache, with this number everywhere if one is given."""
    out = LatentCache(file, key, SHAPE)
    if fill is not None:
        out.latents[:], out.filled[:] = fill, 1
    return out


def test_a_dot_in_a_name_is_part_of_it(tmp_path):
    names = ("sd2", "sd2.1", "sd2.1-pictures", "sd2.5")
    for number, name in enumerate(names):
        cache(tmp_path / name, name, number)
    assert {p.name for p in tmp_path.iterdir()} == {name + ending for name in names for ending in ENDINGS}
    for number, name in enumerate(names):
        again = cache(tmp_path / name, name)
        assert again.filled.all()
        assert (again.latents == number).all()


def test_a_cache_of_an_older_version_is_used(tmp_path, monkeypatch):
    """Its files had holes: they get their room on the disk before one is written to."""
    for ending, dtype, shape in ((".npy", np.float16, SHAPE), (".filled.npy", np.uint8, SHAPE[:2])):
        np.lib.format.open_memmap(tmp_path / f"latents{ending}", "w+", dtype, shape)[0] = 1
    (tmp_path / "latents.key").write_bytes(f"k {SHAPE}".encode())
    sizes, reserve = [], os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda file, at, n: (sizes.append((at, n)), reserve(file, at, n))[1])
    found = cache(tmp_path / "latents")
    assert found.filled.sum(1).tolist() == [3, 0, 0, 0, 0]
    assert (found.latents[0] == 1).all()
    assert sizes == [(0, (tmp_path / f"latents{ending}").stat().st_size) for ending in ENDINGS[:2]]


def _cut(path):
    os.truncate(path, path.stat().st_size // 2)


def _empty(path):
    path.write_bytes(b"")


def _longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def _other(path):
    with open(path, "wb") as file:  # np.save would append an ending to a name
        np.save(file, np.ones(SHAPE, np.float32))


def _noise(path):
    path.write_bytes(b"noise" * 100)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("damage", [os.remove, _cut, _empty, _longer, _other, _noise])
def test_a_damaged_cache_is_made_again(tmp_path, damage, ending):
    cache(tmp_path / "latents", fill=3)
    damage(tmp_path / f"latents{ending}")
    assert not cache(tmp_path / "latents").filled.any()
    again = cache(tmp_path / "latents", fill=4)
    assert (again.latents.shape, again.filled.shape) == (SHAPE, SHAPE[:2])
    assert (cache(tmp_path / "latents").latents == 4).all()


def test_a_cache_in_use_is_shared_by_its_key_alone(tmp_path):
    one = cache(tmp_path / "latents", fill=1)
    two = cache(tmp_path / "latents")
    two.latents[0] = 2
    assert (one.latents[0] == 2).all()
    message = r"the latent cache .*latents is in use by a run of another autoencoder .* name another with --latents"
    for _ in range(2):
        with pytest.raises(OutputError, match=message):
            cache(tmp_path / "latents", "another autoencoder")
    del one
    with pytest.raises(OutputError, match=message):
        cache(tmp_path / "latents", "another autoencoder")
    assert two.filled.all()
    del two
    assert not cache(tmp_path / "latents", "another autoencoder").filled.any()


def test_a_run_of_this_process_that_has_ended_is_in_nobodys_way(tmp_path):
    ended = cache(tmp_path / "latents", "one", 1)
    ended.itself = ended  # a circle, as trainers have: it stays until it is collected
    del ended
    assert not cache(tmp_path / "latents", "two").filled.any()


def test_without_locks_a_run_keeps_what_it_had(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    one = cache(tmp_path / "latents", fill=1)
    two = cache(tmp_path / "latents", "another autoencoder", fill=2)
    assert (one.latents == 1).all()
    assert (two.latents == 2).all()
    assert (cache(tmp_path / "latents", "another autoencoder").latents == 2).all()


def test_a_full_disk_is_said_before_anything_is_encoded(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OutputError, match=r"a place with 975 bytes .* No space left on device; name"):
            cache(tmp_path / "latents")
        assert [p.name for p in tmp_path.iterdir()] == ["latents.key"]
        patch.setattr(latent_cache, "NO_RESERVING", (errno.ENOSPC,))
        cache(tmp_path / "latents", fill=5)  # a file system that cannot reserve goes without
    assert (cache(tmp_path / "latents").latents == 5).all()


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "latents.npy").mkdir()
    with pytest.raises(OutputError, match="latents must be a place with"):
        cache(tmp_path / "latents")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a file is in the way"):
        cache(tmp_path / "file" / "latents")


def test_links_to_another_disk_stay_links(tmp_path):
    (tmp_path / "disk").mkdir()
    for ending in ENDINGS:
        (tmp_path / f"latents{ending}").symlink_to(tmp_path / "disk" / f"there{ending}")
    for key in "ab":
        cache(tmp_path / "latents", key, fill=1)
    assert all((tmp_path / f"latents{ending}").is_symlink() for ending in ENDINGS)
    assert {p.name for p in (tmp_path / "disk").iterdir()} == {f"there{ending}" for ending in ENDINGS}
