"""What the queue stands on: files that appear whole, and `create` of which one of several callers gets True."""

import errno
import os
import threading
import uuid

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mvdream_fast.core.errors import OutputError
from mvdream_fast.jobs import store as stores
from mvdream_fast.jobs.store import lacks_space, open_store


@pytest.fixture(params=["folder", "file://", "memory://"])
def store(request, tmp_path):
    if request.param == "memory://":
        return open_store(f"memory://{uuid.uuid4().hex}/deep")
    return open_store(tmp_path / "new" if request.param == "folder" else f"file://{tmp_path}/new")


def test_read_write_create_list_delete(store):
    assert store.read("a/one") is None
    assert store.names("a") == []
    assert store.create("a/one", b"1")
    assert not store.create("a/one", b"2")
    assert store.read("a/one") == b"1"
    store.write("a/one", b"3")
    store.write("a/two", b"")
    assert store.read_many(["a/one", "a/two", "a/three"]) == {"a/one": b"3", "a/two": b""}
    assert sorted(store.names("a")) == ["one", "two"]
    store.mark("b/deep/three")
    store.mark("b/deep/three")
    assert store.read("b/deep/three") == b""
    assert sorted(store.names("")) == ["a", "b"]
    store.delete("b")
    store.delete("a/two")
    store.delete("a/two")
    assert store.names("a") == ["one"]
    store.delete("a")
    assert store.names("a") == []


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_create_at_once_one_does(tmp_path, monkeypatch, links):
    """With hard links, and where the filesystem has none."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    store = open_store(tmp_path)
    for round_ in range(20):
        start, got = threading.Barrier(8), []

        def attempt(i, start=start, got=got, name=f"x/{round_}"):
            start.wait()
            got.append((store.create(name, str(i).encode()), i))

        threads = [threading.Thread(target=attempt, args=(i,)) for i in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        (winner,) = [i for done, i in got if done]
        assert store.read(f"x/{round_}") == str(winner).encode()
    assert len(store.names("x")) == 20
    assert len(list((tmp_path / "x").iterdir())) == 20, "temporary files are left"


def _no_links(*_):
    raise OSError(errno.EPERM, "no hard links here")


def test_a_filesystem_that_replaces_what_it_was_to_create_is_refused(monkeypatch):
    plain = MemoryFileSystem.pipe_file
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, data, mode="": plain(self, path, data))
    with pytest.raises(OutputError, match="cannot be shared by workers: its filesystem .MemoryFileSystem. replaces"):
        open_store("memory://somewhere")


def test_an_unknown_filesystem_is_named():
    with pytest.raises(OutputError, match="cannot use nosuch://x"):
        open_store("nosuch://x")


def test_a_full_disk_is_told_from_other_errors(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.write("a", b"old")
    monkeypatch.setattr(stores.os, "fsync", _full)
    with pytest.raises(OutputError, match="No space left on device") as raised:
        store.write("a", b"new")
    assert lacks_space(raised.value)
    assert store.read("a") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not lacks_space(OutputError("cannot write x: Permission denied"))


def _full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
