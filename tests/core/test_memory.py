"""How much memory there is, and the sentence that refuses what does not fit; what a run takes: test_run_memory.py."""

import subprocess
import sys
import textwrap

import pytest

from mvdream_fast.core import memory
from mvdream_fast.core.errors import OutOfMemoryError


def test_the_address_spaces_limit_is_seen():
    code = textwrap.dedent(f"""
        import resource
        from mvdream_fast.core import memory
        resource.setrlimit(resource.RLIMIT_AS, ({1 << 30}, {1 << 30}))
        size, name = memory.available()
        print(size < {1 << 30}, name)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True left of the address space's limit, ulimit -v\n"


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: (3 << 30, f"free on {device}"))
    memory.check("it", 3 << 30, "cpu", "use less")
    sentence = r"^it needs about 3\.50 GB more than is in use, and 3\.00 GB is free on cpu; use less$"
    with pytest.raises(OutOfMemoryError, match=sentence):
        memory.check("it", 7 << 29, "cpu", "use less")
    monkeypatch.setattr(memory, "available", lambda device: (None, ""))
    memory.check("it", 1 << 60, "cpu", "use less")


def test_the_program_is_nothing_to_save_at():
    parts = {"a": 1 << 29, memory.PROGRAM: 1 << 40, "b": 1 << 31, "c": 1 << 30}
    assert memory.advice(parts, "try less") == "most goes to b (2.00 GB) and c (1.00 GB); try less"
