"""The doctor tells what is there and why not, and never fails over what it finds."""

import builtins
import importlib
import json
import sys

import pytest
import torch
from reference.random_model import random_model

from mvdream_fast import doctor
from mvdream_fast.checkpoints import places
from mvdream_fast.checkpoints.open import save_model
from mvdream_fast.core import cli


def report(capsys) -> dict:
    cli.run(doctor.main, doctor.Flags, prog="doctor", argv=["--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def without(monkeypatch):
    """Makes the import of some modules fail, as if they were not installed."""

    def hide(*names: str):
        find = importlib.import_module

        def missing(name, *rest):
            if name in names:
                raise ImportError(f"No module named {name!r}")
            return find(name, *rest)

        monkeypatch.setattr(importlib, "import_module", missing)
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)  # what `import` takes for missing

    return hide


def test_the_report_is_whole(capsys):
    found = report(capsys)
    assert set(found) == {"mvdream_fast", "machine", "backends", "libraries", "optional", "embedded model"}
    assert found["machine"]["cores"]["usable"] == cli.available_cores()
    assert found["libraries"]["torch"] == {"installed": True, "version": torch.__version__, "for": "tensors"}
    assert all(library["installed"] for library in found["libraries"].values()), "a dependency is missing"
    assert found["backends"]["native extension"]["built"]
    assert found["backends"]["auto means"]["device"] in ("cpu", "cuda")
    assert set(found["optional"]) >= {"xformers", "nerfacc", "tinycudann", "moderngl", "viser", "av", "triton"}


def test_the_same_for_people(capsys):
    doctor.main(doctor.Flags())
    lines = capsys.readouterr().out.splitlines()
    assert f"  torch                yes, {torch.__version__}, tensors" in lines
    assert next(line for line in lines if "native extension" in line).split()[2].startswith("yes")
    for heading in ("machine", "backends", "libraries", "optional", "embedded model"):
        assert heading in lines
    assert max(map(len, lines)) < 200


def test_what_is_missing_is_told_with_its_reason(capsys, without):
    without("mvdream_fast._C", "triton", "moderngl")
    backends = report(capsys)["backends"]
    assert backends["native extension"] == {
        "built": False,
        "why": f"No module named 'mvdream_fast._C'; {doctor.NATIVE_REMEDY}",
    }
    assert backends["Triton"]["why"].startswith("No module named 'triton'")
    assert "libegl1" in backends["EGL"]["why"]
    assert not any(backends[name]["usable"] for name in ("Triton", "EGL"))


def test_libraries_that_are_not_installed():
    assert doctor._library("no-such-thing", "no_such_thing", "x") == {"installed": False, "version": None, "for": "x"}


def test_a_backend_that_breaks_is_a_finding(capsys, monkeypatch):
    def broken():
        raise builtins.OSError("libcuda.so.1: wrong ELF class")

    monkeypatch.setitem(doctor.BACKENDS, "CUDA", broken)
    assert report(capsys)["backends"]["CUDA"] == {"usable": False, "why": "OSError: libcuda.so.1: wrong ELF class"}


def test_a_cpu_build_of_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor._cuda() == {"usable": False, "why": f"torch {torch.__version__} is built without CUDA"}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "the driver shows no device" in doctor._cuda()["why"]


def test_the_embedded_model_present_absent_and_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(places, "WEIGHTS", tmp_path)
    assert not doctor._embedded()["present"]
    save_model(random_model(), tmp_path / "mini")
    found = doctor._embedded()
    assert (found["present"], found["name"]) == (True, "tiny")
    assert found["mib"] > 1
    (tmp_path / "mini" / "config.json").write_text("{")
    assert "is not JSON" in doctor._embedded()["why"]
