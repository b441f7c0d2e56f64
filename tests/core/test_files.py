"""Text files of every encoding and line end; several files that appear together or not at all; and who reads what."""

import ast
import codecs
import errno
import os
import re
from pathlib import Path

import pytest

from mvdream_fast.core import files
from mvdream_fast.core.errors import ArgumentError, InputFileError, ModelError, OutputError
from mvdream_fast.core.files import atomic_write, make_folder, write_together

PACKAGE = Path(files.__file__).parents[1]
TEXT = "a grün chair\n椅子\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
        codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        codecs.BOM_UTF16_BE + TEXT.replace("\n", "\r\n").encode("utf-16-be"),
    ],
)
def test_the_same_text(tmp_path, data):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert files.read_text(path) == TEXT
    assert files.read_lines(path) == ["a grün chair", "椅子"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "ok\nstühle\n".encode("latin-1"),
            r"a\.txt: line 2 is not UTF-8 \(byte 0xfc; Latin-1 or Windows-1252, perhaps",
        ),
        (b"\r\n\r\n\x80", r"line 3 is not UTF-8 \(byte 0x80"),
        ("a chair".encode("utf-16-le"), "it is no text, or UTF-16 without its mark; save it as UTF-8"),
        ("a chair".encode("utf-16-be"), "it is no text, or UTF-16 without its mark; save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"a\0b", "it begins as utf-16 and is not"),
        (codecs.BOM_UTF32_LE + b"\xff" * 4, "it begins as utf-32 and is not"),
        (codecs.BOM_UTF8 + b"\xe9", "it begins as utf-8-sig and is not"),
        (b"x" * (1 << 20) + b"y", "it has more than 1 MB"),
    ],
)
def test_other_encodings_are_refused_by_name(tmp_path, data, message):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    for error in (InputFileError, ModelError):
        with pytest.raises(error, match=message):
            files.read_text(path, error, 1 << 20)


def test_what_is_no_file(tmp_path):
    with pytest.raises(InputFileError, match=r"cannot read .*none\.txt: No such file"):
        files.read_text(tmp_path / "none.txt")
    with pytest.raises(InputFileError, match="Is a directory"):
        files.read_text(tmp_path)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", []),
        ("\n", [""]),
        ("a", ["a"]),
        ("a\n\nb\n", ["a", "", "b"]),
        ("a\r\nb\rc\nd", ["a", "b", "c", "d"]),
        ("a\u2028b\x85c\x0bd\x0ce\x1cf\u2029", ["a\u2028b\x85c\x0bd\x0ce\x1cf\u2029"]),
    ],
)
def test_lines(text, rows):
    assert files.lines(text) == rows


def test_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('{"a": "\u2028", "b": [1, {"c": null}]}'.encode("utf-16"))
    assert files.read_json(path) == {"a": "\u2028", "b": [1, {"c": None}]}
    for text, message in [
        ("{", "x is not JSON: Expecting"),
        ("[" * 100_000, "x is not JSON"),
        ('[{"a": 1, "b": 2, "a": 1}]', "x is not JSON: the key 'a' comes twice"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            files.parse_json(text, "x", ArgumentError)


ELSEWHERE = {  # what is read of the system (/proc, /sys), messages that are cut, and a lock
    "core/machine.py": {"read_text", "splitlines"},
    "core/run_folder.py": {"open"},  # the lock: a number of our own
    "core/memory.py": {"read_text", "splitlines"},
    "doctor.py": {"splitlines"},
    "jobs/owner.py": {"read_text"},
    "jobs/on_ray.py": {"splitlines"},
    "rendering/workers.py": {"read_text"},
}


def readers(source: str) -> set[str]:
    """The calls in a source that read or cut text by other rules than core.files'."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = {ast.unparse(call.func) for call in calls if isinstance(call.func, ast.Attribute)}
    found = {name for name in found if name == "json.load" or name.endswith((".read_text", ".splitlines"))}
    opened = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "open"]
    return {name.rpartition(".")[2] for name in found - {"files.read_text"}} | {
        "open" for call in opened if not re.search(r"""['"](rb|wb?|a)['"]""", call)
    }


def test_other_readers_are_found():
    source = "a.read_text(encoding='utf-8'); f().splitlines(); files.read_text(p); read_text(p); open(p, 'rb'); open(q)"
    assert readers(source) == {"read_text", "splitlines", "open"}
    assert readers("json.load(f); open(p, 'w'); tarfile.open(p)") == {"load"}


def test_every_text_file_of_the_package_goes_through_this_reader():
    """pathlib's own reader knows no mark, and splitlines cuts at U+2028."""
    for path in PACKAGE.rglob("*.py"):
        found = readers(path.read_text(encoding="utf-8"))
        assert found <= ELSEWHERE.get(path.relative_to(PACKAGE).as_posix(), set()), f"{path}: read it with core.files"


def test_a_folder_is_made_or_it_is_said_why_not(tmp_path):
    assert make_folder(tmp_path / "a" / "b") == make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(OutputError, match=f"the folder {place} cannot be made: a file is in the way; name another"):
            make_folder(place)
    with pytest.raises(OutputError, match="cannot be made: File name too long"):
        make_folder(tmp_path / ("x" * 300))


# Who makes folders in a way of its own, and says what a folder of its kind is for.
MAKERS = {"core/files.py", "core/run_folder.py", "core/sharded_checkpoint.py", "jobs/store.py", "jobs/workspace.py"}


@pytest.mark.parametrize("part", ["core", "evaluation", "jobs", "web", "distill"])
def test_folders_are_made_by_who_says_why_one_cannot_be(part):
    found = {
        path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / part).glob("*.py") if ".mkdir(" in path.read_text()
    }
    assert found - MAKERS == set()


def read_only(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


def test_why_a_file_cannot_be_written_is_said_though_nothing_can_be_cleaned_up(tmp_path, monkeypatch):
    """On a read-only file system to remove what is not there is an error of its own."""
    for name in ("write_bytes", "unlink"):
        monkeypatch.setattr(Path, name, read_only)
    with pytest.raises(OutputError, match="cannot write .*e.json .*: Read-only file system"):
        atomic_write(tmp_path / "e.json", "{}")
    with pytest.raises(OutputError, match="cannot write .*e.json .*: Read-only file system"):
        write_together({tmp_path / "e.json": b"1", tmp_path / "f.json": b"2"})


def test_names_that_are_no_utf8_are_written_as_they_are(tmp_path):
    """As a path on the command line comes."""
    atomic_write(tmp_path / "cmd.txt", os.fsdecode(b"-o caf\xe9s") + " é")
    assert (tmp_path / "cmd.txt").read_bytes() == b"-o caf\xe9s \xc3\xa9"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_that_belong_together(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    files.write_together({a: b"1", b: b"2"})
    assert contents(tmp_path) == {"a": b"1", "b": b"2"}
    files.write_together({a: b"3", b: b"4", c: b"5"})
    assert contents(tmp_path) == {"a": b"3", "b": b"4", "c": b"5"}


@pytest.mark.parametrize("there", [{}, {"a": b"old"}, {"b": b"old"}, {"a": b"old", "b": b"older"}])
def test_all_of_them_or_none(tmp_path, monkeypatch, there):
    """Each of the flushes and renames fails in turn: what there was is there, and nothing else."""
    left = []  # how many more calls go well

    def failing(real):
        def call(path, *args):
            if left and left.pop() == 0:
                raise OSError(28, "No space left on device")
            return real(path, *args)

        return call

    monkeypatch.setattr(files, "_sync", failing(files._sync))
    monkeypatch.setattr(Path, "replace", failing(Path.replace))
    for name, data in there.items():
        (tmp_path / name).write_bytes(data)
    for n_good in range(5 + len(there)):  # two flushes, the old ones away, two renames, the folder
        left[:] = range(n_good + 1)
        with pytest.raises(OutputError, match=r"cannot write .*a \(3 bytes\): No space left on device; .* is kept"):
            files.write_together({tmp_path / "a": b"1", tmp_path / "b": b"22"})
        assert contents(tmp_path) == there
    left[:] = range(5 + len(there) + 1)
    files.write_together({tmp_path / "a": b"1", tmp_path / "b": b"22"})
    assert contents(tmp_path) == {"a": b"1", "b": b"22"}


def test_the_first_file_is_never_beside_files_of_another_time(tmp_path, monkeypatch):
    """At every moment between two renames: it is absent, or all are of one time."""
    for name in "abc":
        (tmp_path / name).write_bytes(b"old")
    states = []
    real = Path.replace

    def watched(path, target):
        real(path, target)
        states.append({name: (tmp_path / name).read_bytes() for name in "abc" if (tmp_path / name).exists()})

    monkeypatch.setattr(Path, "replace", watched)
    files.write_together({tmp_path / name: b"new" for name in "abc"})
    assert len(states) == 6
    assert all("a" not in state or set(state.values()) == {b"new"} for state in states)
