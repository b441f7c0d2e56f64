"""`python -m mvdream_fast.convert`: bit-equal, complete or absent, frugal with memory, and its exit codes."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from reference import upstream
from reference.tiny_model import TINY, VOCABULARY, write_tiny
from safetensors.torch import load_file

from mvdream_fast.checkpoints.folder import new_folder
from mvdream_fast.checkpoints.manifest import PARTS
from mvdream_fast.checkpoints.open import load_model, open_source, save_model
from mvdream_fast.convert import Flags, main
from mvdream_fast.core import cli
from mvdream_fast.core.errors import ModelError, OutputError


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flat") / "sd.pt"
    torch.save(upstream.flat(upstream.NARROW21), path)
    return path


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_tiny(tmp_path / "tiny")


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_bit_equal(one: Path, other: Path) -> None:
    for part in PARTS:
        before, after = open_source(one).tensors(part), open_source(other).tensors(part)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert {x.dtype for x in before.values()} == {x.dtype for x in after.values()}


def test_released_file_to_our_folder_is_bit_equal(flat, tmp_path, capsys):
    main(Flags(flat, tmp_path / "own"))
    assert_bit_equal(flat, tmp_path / "own")
    assert open_source(flat).config == open_source(tmp_path / "own").config
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "own").iterdir()} == {0o666 & ~umask()}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{flat}: released flat file, sd21-4view-variant"
    assert lines[1].split() == ["unet", "290", "tensors", "4,263,044", "parameters", "float32", "0.017", "GB"]
    assert lines[-1] == f"wrote {tmp_path / 'own'}, 0.033 GB"


def test_published_folder_to_our_folder(tmp_path):
    upstream.write_published(tmp_path / "hub", upstream.NARROW21)
    main(Flags(tmp_path / "hub", tmp_path / "own"))
    assert_bit_equal(tmp_path / "hub", tmp_path / "own")
    assert load_model(tmp_path / "own", parts=("text",)).config == open_source(tmp_path / "hub").config


def test_our_folder_to_another_precision_and_back(tiny, tmp_path):
    main(Flags(tiny, tmp_path / "half", dtype="fp16"))
    main(Flags(tmp_path / "half", tmp_path / "single", dtype="fp32"))
    main(Flags(tiny, tmp_path / "brain", dtype="bf16"))
    for part in PARTS:
        original, half, single, brain = (
            load_file(folder / f"{part}.safetensors")
            for folder in (tiny, tmp_path / "half", tmp_path / "single", tmp_path / "brain")
        )
        for name, x in original.items():
            assert torch.equal(half[name], x.half())
            assert torch.equal(single[name], x.half().float())
            assert torch.equal(brain[name], x.bfloat16())
    assert (tmp_path / "half" / "vocabulary.txt").read_text().splitlines() == VOCABULARY
    assert load_model(tmp_path / "half").config == TINY


def test_values_too_large_for_fp16_are_refused(tiny, tmp_path):
    from safetensors.torch import save_file

    path = tiny / "vae.safetensors"
    tensors = load_file(path)
    tensors["quant_conv.bias"] = torch.full((8,), 1e5)
    save_file(tensors, path)
    main(Flags(tiny, tmp_path / "bf16", dtype="bf16"))
    with pytest.raises(ModelError, match="quant_conv.bias does not fit float16"):
        main(Flags(tiny, tmp_path / "half", dtype="fp16"))
    assert not (tmp_path / "half").exists()


def test_existing_targets(tiny, tmp_path):
    main(Flags(tiny, tmp_path / "copy"))
    with pytest.raises(OutputError, match="exists already; choose another name, or replace it with --overwrite"):
        main(Flags(tiny, tmp_path / "copy"))
    main(Flags(tiny, tmp_path / "copy", dtype="fp16", overwrite=True))
    assert next(iter(load_file(tmp_path / "copy" / "unet.safetensors").values())).dtype == torch.float16
    main(Flags(tiny, tiny, dtype="bf16", overwrite=True))  # in place
    assert next(iter(load_file(tiny / "unet.safetensors").values())).dtype == torch.bfloat16

    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "copy" / "notes.md").write_text("mine")
    (tmp_path / "link").symlink_to(tiny)
    (tmp_path / "file").write_text("mine")
    for target in (other, tmp_path / "copy", tmp_path / "link", tmp_path / "file"):
        with pytest.raises(OutputError, match="so it is not replaced"):
            main(Flags(tiny, target, overwrite=True))
    assert contents(other) == {"cat.jpg": b"cat"}
    assert (tmp_path / "copy" / "notes.md").read_text() == "mine"


def test_nothing_is_left_of_a_failure(tiny, tmp_path):
    data = bytearray((tiny / "text.safetensors").read_bytes())
    data[-4:] = b"\xff\xff\xff\xff"  # a NaN in the last part that is written
    (tiny / "text.safetensors").write_bytes(data)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ModelError, match="holds NaN"):
        main(Flags(tiny, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_replaced_folder_survives_a_failure(tiny, tmp_path):
    main(Flags(tiny, tmp_path / "out"))
    before = contents(tmp_path / "out")

    def fail() -> None:
        with new_folder(tmp_path / "out", overwrite=True) as temporary:
            (temporary / "unet.safetensors").write_bytes(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


def test_what_killed_writers_left_is_removed(tiny, tmp_path):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    stale, alive = (tmp_path / f".out.tmp-{pid}" for pid in (finished.pid, os.getppid()))
    for path in (stale, alive):
        path.mkdir()
    main(Flags(tiny, tmp_path / "out"))
    assert not stale.exists()
    assert alive.exists()


def test_command_and_its_exit_codes(tiny, tmp_path, capsys):
    line = [sys.executable, "-m", "mvdream_fast.convert", str(tiny), str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert_bit_equal(tiny, tmp_path / "out")
    for args, code, sentence in (
        ((tiny, tmp_path / "out"), 7, "exists already"),
        ((tmp_path / "none", tmp_path / "new"), 3, "there is no model at"),
        ((tiny, tmp_path / "new", "--dtype", "int8"), 2, "int8"),
        ((tiny,), 2, "The folder to write"),
    ):
        with pytest.raises(SystemExit) as refused:
            cli.run(main, Flags, prog="convert", argv=list(map(str, args)))
        said = capsys.readouterr().err
        assert (refused.value.code, sentence in said) == (code, True), said
        assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


def test_arguments_are_checked_before_torch_is_imported(tiny):
    code = "import sys; from mvdream_fast.convert import *; from mvdream_fast.core.errors import OutputError\n"
    code += "try: main(Flags(Path('x'), Path(sys.argv[1])))\nexcept OutputError: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tiny)], check=False).returncode == 0


def test_full_disk(tiny, tmp_path):
    """A limit on the size of files stands for a full disk: the bytes that are needed are named, nothing is left."""
    model = load_model(tiny)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 100, 5000, (tiny / "unet.safetensors").stat().st_size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OutputError, match=r"cannot write .*out") as info:
                save_model(model, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert info.value.exit_code == 7
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_target_that_cannot_be_made(tiny):
    with pytest.raises(OutputError, match="cannot write /dev/null/x: File exists: /dev/null"):
        main(Flags(tiny, Path("/dev/null/x")))


def test_interrupted_command_leaves_nothing(flat, tmp_path):
    code = (
        "import time, mvdream_fast.checkpoints.open as c, mvdream_fast.convert as v, mvdream_fast.core.cli as cli\n"
        "take = c._take\n"
        "def slow(*a):\n"
        "    print('reading', flush=True); time.sleep(0.05); return take(*a)\n"
        "c._take = slow\n"
        "cli.run(v.main, v.Flags, prog='convert')\n"
    )
    line = [sys.executable, "-c", code, str(flat), str(tmp_path / "out")]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() != "reading":
        assert process.poll() is None
    assert len(list(tmp_path.iterdir())) == 1
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []


def private_bytes() -> int:
    """Memory of this process that is not backed by a file."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is read from Linux's /proc")
def test_memory_stays_under_one_part(flat, tmp_path):
    """Files are mapped, not read: a conversion needs less private memory than its largest part."""
    main(Flags(flat, tmp_path / "warm"))
    start, peak, done = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, private_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    main(Flags(flat, tmp_path / "out"))
    done.set()
    thread.join()
    assert peak - start < max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
