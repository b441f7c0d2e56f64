"""Hostile and damaged files: no pickle's code ever runs, and each file is refused in one clear sentence."""

import bz2
import functools
import gzip
import io
import json
import lzma
import os
import pickle
import random
import runpy
import shutil
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.tiny_model import TINY

from mvdream_fast.checkpoints.manifest import manifest
from mvdream_fast.checkpoints.open import load_model, open_source
from mvdream_fast.checkpoints.tensor_file import open_tensors
from mvdream_fast.core.errors import ModelError


class Call:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function: Callable, *args: object):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def calls(marker: Path) -> dict[str, Call]:
    """Objects that, unpickled, leave something at `marker`."""
    code = f"open({str(marker)!r}, 'w').close()"
    script = marker.with_name("script.py")
    script.write_text(code)
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "subprocess.run": Call(subprocess.run, ["touch", str(marker)]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(marker), "w"),
        "FileIO": Call(io.FileIO, str(marker), "w"),
        "Path.touch": Call(Path.touch, marker),
        "os.mkdir": Call(os.mkdir, str(marker)),
        "os.symlink": Call(os.symlink, str(script), str(marker)),
        "shutil.copy": Call(shutil.copy, str(script), str(marker)),
        "torch.save": Call(torch.save, 1, str(marker)),
        "run_path": Call(runpy.run_path, str(script)),
        "partial": Call(functools.partial(eval, code)),
        "lazy map": Call(list, map(eval, [code])),
        "numpy file": Call(np.save, str(marker) + ".npy", 1),
    }


def opcodes(marker: Path) -> dict[str, bytes]:
    """The same in opcodes that pickle.dumps does not write."""
    shell = f"touch {marker}".encode()
    return {
        "global": b"cos\nsystem\n(S'%b'\ntR." % shell,
        "instance": b"(S'%b'\nios\nsystem\n." % shell,
        "object": b"(cos\nsystem\nS'%b'\no." % shell,
        "pop": b"(dp0\ncos\nsystem\n(S'%b'\ntR0." % shell,
        "getattr": b"\x80\x02cbuiltins\ngetattr\nc__builtin__\n__import__\nU\x02os\x85RU\x06system\x86RU%b%b\x85R."
        % (bytes([len(shell)]), shell),
    }


def archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)


def like_torch(pickled: bytes) -> dict[str, bytes]:
    return {"archive/data.pkl": pickled, "archive/byteorder": b"little", "archive/version": b"3\n"}


def containers(path: Path, evil: bytes, call: Call) -> dict[str, Callable[[], None]]:
    """Writers of one payload in the wrappings that loaders have been known to open."""
    good = pickle.dumps(OrderedDict())

    def tar() -> None:
        with tarfile.open(path, "w") as file:
            for name in ("sys_info", "pickle", "tensors", "storages"):
                member = tarfile.TarInfo(name)
                member.size = len(evil)
                file.addfile(member, io.BytesIO(evil))

    def nested() -> None:
        inner = io.BytesIO()
        archive(inner, like_torch(evil))
        archive(path, {**like_torch(evil), "archive/data/0": inner.getvalue()})

    def twice() -> None:
        archive(path, like_torch(good))
        with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("archive/data.pkl", evil)

    def polyglot() -> None:
        archive(path, like_torch(evil))
        path.write_bytes(evil + path.read_bytes())

    def numpy_archive() -> None:
        with path.open("wb") as file:
            np.savez(file, a=np.array([call], dtype=object))

    script = {"archive/constants.pkl": evil, "archive/code/__torch__.py": b"", "archive/version": b"3\n"}
    return {
        "zip": lambda: archive(path, like_torch(evil)),
        "deflated": lambda: archive(path, like_torch(evil), zipfile.ZIP_DEFLATED),
        "bzip2 entries": lambda: archive(path, like_torch(evil), zipfile.ZIP_BZIP2),
        "zip in zip": nested,
        "two pickles": twice,
        "pickle before zip": polyglot,
        "torchscript": lambda: archive(path, {**like_torch(evil), **script}),
        "bare pickle": lambda: path.write_bytes(evil),
        "legacy torch": lambda: torch.save(call, path, _use_new_zipfile_serialization=False),
        "legacy tar": tar,
        "gzip": lambda: path.write_bytes(gzip.compress(evil)),
        "bz2": lambda: path.write_bytes(bz2.compress(evil)),
        "xz": lambda: path.write_bytes(lzma.compress(evil)),
        "npz": numpy_archive,
        "among tensors": lambda: torch.save(OrderedDict(a=torch.zeros(3), b=call), path),
        "as a key": lambda: torch.save([(torch.zeros(1), call)], path),
    }


def assert_refused(path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The switch with which a user can weaken torch.load must not reach us.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ModelError) as info:
        load_model(path)
    assert info.value.exit_code == 3
    assert str(info.value).isprintable()
    assert not any(found.name.startswith(marker.name) for found in marker.parent.iterdir())


def remove(marker: Path) -> bool:
    """Whether a payload ran; cleans up after it."""
    found = [path for path in marker.parent.iterdir() if path.name.startswith(marker.name)]
    for path in found:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return bool(found)


@pytest.mark.parametrize("name", list(calls(Path("/tmp/unused"))))
def test_no_call_in_a_pickle_runs(tmp_path, monkeypatch, name):
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    call = calls(marker)[name]
    pickle.loads(pickle.dumps(call))
    assert remove(marker), "the payload must work, or its refusal proves nothing"
    torch.save(call, path)
    assert_refused(path, marker, monkeypatch)
    archive(path, like_torch(pickle.dumps(call, protocol=0)))
    assert_refused(path, marker, monkeypatch)


@pytest.mark.parametrize("name", list(opcodes(Path("/tmp/unused"))))
def test_no_opcode_runs(tmp_path, monkeypatch, name):
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    evil = opcodes(marker)[name]
    try:
        pickle.loads(evil)
    except Exception as error:  # some fail after the payload has run
        print(error)
    assert remove(marker)
    archive(path, like_torch(evil))
    assert_refused(path, marker, monkeypatch)


@pytest.mark.parametrize("name", list(containers(Path("unused"), b"", Call(print))))
def test_no_container_is_opened_unsafely(tmp_path, monkeypatch, name):
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    call = calls(marker)["os.system"]
    containers(path, pickle.dumps(call), call)[name]()
    assert_refused(path, marker, monkeypatch)
    as_safetensors = path.rename(tmp_path / "evil.safetensors")
    assert_refused(as_safetensors, marker, monkeypatch)


def test_zip_bomb_is_refused_before_it_is_read(tmp_path):
    archive(tmp_path / "bomb.pt", like_torch(b"\0" * 50_000_000), zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelError, match=r"was not written by torch.save: archive/data.pkl is compressed or too large"):
        open_tensors(tmp_path / "bomb.pt")
    archive(tmp_path / "huge.pt", like_torch(b"\0" * 20_000_000))
    with pytest.raises(ModelError, match="too large"):
        open_tensors(tmp_path / "huge.pt")


def test_file_of_the_first_zip_format(tmp_path):
    """Without the entries that later versions of torch added."""
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as new:
        entries = {name: new.read(name) for name in new.namelist() if name.endswith(("data.pkl", "/0", "/version"))}
    archive(tmp_path / "old.pt", entries)
    assert len(entries) == 3
    assert torch.equal(open_tensors(tmp_path / "old.pt").read("a"), torch.ones(3))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([torch.zeros(1)], "flat dictionary of tensors, got a list"),
        (torch.zeros(3), "flat dictionary of tensors, got a Tensor"),
        ({"state_dict": {"a": torch.zeros(1)}}, "input_blocks.0.0.weight is missing"),
        ({"state_dict": {"a": [1.0]}}, "state_dict is a dict with the keys a"),
        ({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.zeros(1)}}, "one set of weights, got .* keys model, ema"),
        ({1: torch.zeros(1)}, "flat dictionary of tensors, got a dict with the keys 1"),
        ({}, "input_blocks.0.0.weight is missing"),
        (OrderedDict(a=torch.zeros(1)), "input_blocks.0.0.weight is missing"),
        (7, "flat dictionary of tensors, got a int"),
    ],
)
def test_pickles_of_other_things(tmp_path, value, sentence):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=sentence):
        load_model(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "name", ["archive/code/x.py", "archive/constants.pkl", "data.pkl", "archive/data/../x", "a/b/data.pkl"]
)
def test_zip_entries_that_torch_does_not_write(tmp_path, name):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    open_tensors(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as file:
        file.writestr(name, b"")
    with pytest.raises(ModelError, match=f"was not written by torch.save: {name} does not belong there"):
        open_tensors(tmp_path / "x.pt")


def test_tensors_of_both_formats_open_alike(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4).half(), "c": torch.tensor(5)}
    torch.save(tensors, tmp_path / "x.pt")
    save_file(tensors, tmp_path / "x.safetensors")
    for file in (open_tensors(tmp_path / "x.pt"), open_tensors(tmp_path / "x.safetensors")):
        assert file.shapes == {"a": (2, 3), "b": (4,), "c": ()}
        assert file.dtypes["a"] == "float32"
        assert file.dtypes["b"] == "float16"
        assert all(torch.equal(file.read(name), tensors[name]) for name in tensors)
        assert list(file.under("a").shapes) == ["a"]
        assert list(file.without("a".__eq__).shapes) == ["b", "c"]


# Damage.


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The VAE of a folder, through all checks."""
    source = open_source(folder)
    source.check("vae")
    return source.tensors("vae")


@pytest.mark.parametrize("fraction", [0.0, 1e-4, 0.01, 0.5, 0.99, 0.99999])
def test_truncated_files(tiny, tmp_path, fraction):
    torch.save(OrderedDict(a=torch.randn(100, 1000)), tmp_path / "x.pt")
    for path in (tmp_path / "x.pt", tiny / "unet.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * fraction)])
        with pytest.raises(ModelError, match=f"{path.name}.*(download|Download)"):
            open_tensors(path)


def test_duplicate_and_path_like_names_in_a_header(tiny):
    path = tiny / "vae.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode()
    names = [name for name in json.loads(header) if name != "__metadata__"]

    def write(text: str) -> None:
        raw = text.encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + size :])

    write(header)
    assert read(tiny).keys() == set(names)
    write(header.replace(f'"{names[0]}"', '"../../etc/x"'))
    with pytest.raises(ModelError, match=r"1 missing \(.*1 unexpected \(../../etc/x\)"):
        read(tiny)
    write(header.replace(f'"{names[-1]}"', f'"{names[0]}"'))
    with pytest.raises(ModelError):
        read(tiny)


def change_bytes(tiny: Path, n: int, seed: int) -> dict[str, int]:
    """Loads `n` copies of a file with one to four bytes changed; half of the changes are in the header."""
    rng = random.Random(seed)
    path = tiny / "vae.safetensors"
    good, wanted = path.read_bytes(), manifest("vae", TINY)
    header = 8 + int.from_bytes(good[:8], "little")
    outcomes = {"refused": 0, "loaded": 0}
    for _ in range(n):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(header if rng.random() < 0.5 else len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            tensors = read(tiny)
        except ModelError:
            outcomes["refused"] += 1
        else:
            assert {name: tuple(x.shape) for name, x in tensors.items()} == wanted
            assert all(x.isfinite().all() for x in tensors.values())
            outcomes["loaded"] += 1
    return outcomes


def test_changed_bytes(tiny):
    assert min(change_bytes(tiny, 300, 0).values()) > 20


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_changed_bytes_campaign(tiny):
    assert min(change_bytes(tiny, 20_000, 1).values()) > 1000
