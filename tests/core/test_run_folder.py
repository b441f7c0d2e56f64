"""Run folders, atomic writes, checkpoints and signals."""

import contextlib
import datetime
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import ArgumentError, InputFileError, ModelError, OutputError

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_slug_is_a_safe_name(prompt):
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,58}[a-z0-9])?", run_folder.slugify(prompt))


AWKWARD = st.sampled_from(
    ["../", "\x00", "/", "\\", "CON", "~", "\u202e", "\U0001f600", " ", "-", ".", "\u00e9", "\ud800", "$(x)"]
)
LONG = st.integers(0, 20).map(lambda n: "x/" * 2**n)
PROMPTS = st.lists(AWKWARD | st.text(max_size=20), max_size=8).map("".join) | LONG


def stays_inside(root, prompt):
    """The folder lies where it should, under a name that any file system takes, and the link points to it."""
    folder = run_folder.make_run_folder(root, prompt, 7, NOW)
    assert folder.resolve().parents[1] == root.resolve()
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,59}", folder.parent.name)
    assert (root / "latest").resolve() == folder.resolve()
    folder.rmdir()


@given(PROMPTS)
@settings(max_examples=200, deadline=None)
def test_run_folders_stay_inside(tmp_path_factory, prompt):
    stays_inside(tmp_path_factory.getbasetemp() / "inside", prompt)


@pytest.mark.slow
@given(PROMPTS)
@settings(max_examples=10_000, deadline=None)
def test_ten_thousand_run_folders_stay_inside(tmp_path_factory, prompt):
    stays_inside(tmp_path_factory.getbasetemp() / "inside", prompt)


def test_slugs_of_different_prompts_differ():
    prompts = ["A cat", "a cat", "a cat!", "../a cat", "a\ncat", "猫", "犬", "", "x" * 5000, "x" * 5001]
    assert len({run_folder.slugify(p) for p in prompts}) == len(prompts)
    assert run_folder.slugify("A brown bulldog").startswith("a-brown-bulldog-")


def test_run_folder_layout_and_latest_link(tmp_path):
    first = run_folder.make_run_folder(tmp_path, "../../etc/passwd", 7, NOW)
    second = run_folder.make_run_folder(tmp_path, "../../etc/passwd", 7, NOW)
    assert first != second
    assert first.name == "20260102-030405-s7"
    assert tmp_path in first.resolve().parents
    assert (tmp_path / "latest").resolve() == second.resolve()
    assert run_folder.resolve_resume("latest", tmp_path) == second.resolve()


def test_output_or_root(tmp_path):
    """-o is the folder itself; without it one is made under the root."""
    out, root = tmp_path / "out", tmp_path / "root"
    run_folder.check_new_folder(out, root)
    assert run_folder.new_folder(out, root, "a cat", 3) == out
    assert not root.exists()
    run_folder.check_new_folder(None, root)
    made = run_folder.new_folder(None, root, "a cat", 3)
    assert made.parents[1] == root
    (out / "file").touch()
    for refuse in (run_folder.check_new_folder, lambda output, root: run_folder.new_folder(output, root, "", 0)):
        with pytest.raises(OutputError, match="out exists and is not empty; name another with -o$"):
            refuse(out, root)
        with pytest.raises(
            OutputError, match=f"name another with -o, or --root {root} to put it beside the runs there$"
        ):
            refuse(root, root)
        with pytest.raises(OutputError, match="cannot be made"):
            refuse(out / "file" / "below", root)


def test_home_is_home_in_library_calls(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run_folder.make_output_folder("~/a") == tmp_path / "a"
    assert run_folder.make_run_folder("~/runs", "a cat", 0).parents[1] == tmp_path / "runs"
    assert run_folder.resolve_resume("~/a", "~/runs") == (tmp_path / "a").resolve()
    run_folder.atomic_write("~/a/file", "x")
    run_folder.save_checkpoint("~/a", 3, {"w": torch.ones(2)}, {})
    assert run_folder.load_latest("~/a")[0] == run_folder.latest_step(tmp_path / "a") == 3
    assert (tmp_path / "a/file").read_text() == "x"
    assert not (tmp_path / "~").exists()


def test_which_run_is_resumed(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    last = run_folder.make_run_folder(root, "a cat", 0)
    out.mkdir()
    assert run_folder.resolve_resume("latest", root) == last.resolve()
    assert run_folder.resolve_resume("latest", root, out) == run_folder.resolve_resume(str(out), root, out) == out
    with pytest.raises(ArgumentError, match="-o must be left out, or be the folder of --resume"):
        run_folder.resolve_resume(str(last), root, out)


HOLD = """
import sys, time
from pathlib import Path
from mvdream_fast.core import run_folder
with run_folder.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_keeps_a_second_process_out_and_dies_with_its_first(tmp_path):
    """Killed, not closed: nobody tidies up, and the next one may go on all the same."""
    first = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    sentence = f"is in use by process {first.pid}; wait until it is done"
    with pytest.raises(OutputError, match=sentence), run_folder.locked(tmp_path):
        pass
    first.kill()
    first.communicate()
    with run_folder.locked(tmp_path):
        assert (tmp_path / run_folder.LOCK).read_text() == f"{os.getpid()}\n"
    with run_folder.locked(tmp_path):
        pass


def test_a_lock_is_not_inherited_by_workers(tmp_path):
    """A forked worker that outlives its parent holds nothing."""
    code = HOLD.replace('print("held", flush=True)', "import os; os.fork() or print(os.getpid(), flush=True)")
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    worker = int(first.stdout.readline())
    first.kill()
    first.wait()
    first.stdout.close()  # the worker has the other end
    try:
        os.kill(worker, 0)  # alive
        with run_folder.locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    sentence = "the run folder .*/none cannot be written: No such file"
    with pytest.raises(OutputError, match=sentence), run_folder.locked(tmp_path / "none"):
        pass


@contextlib.contextmanager
def full_disk():
    """Within it no file may grow."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_on_a_full_disk_is_named(tmp_path):
    refused = pytest.raises(OutputError, match=f"the run folder {tmp_path} cannot be written: File too large")
    with refused, full_disk(), run_folder.locked(tmp_path):
        pytest.fail("it was locked")


def test_the_folder_of_checkpoints_may_be_in_the_way(tmp_path):
    (tmp_path / "ckpt").touch()
    with pytest.raises(OutputError, match="the folder .*ckpt cannot be made: a file is in the way"):
        run_folder.save_checkpoint(tmp_path / "ckpt", 1, {"x": torch.zeros(1)}, {})


def test_the_record_says_what_was_done_where_and_what_changed(tmp_path, monkeypatch):
    def write(steps: int, done: int, device: str) -> None:
        if done:
            run_folder.save_checkpoint(tmp_path / "ckpt", done, {}, {})
        record = {"kind": "x", "sds": {"steps": steps, "lr": 0.1}, "where": tmp_path}
        run_folder.write_record(tmp_path, "sds", record, "ckpt", device=device)

    monkeypatch.setattr(sys, "argv", ["sds.py", "a chair", "--steps", "5"])
    write(5, 0, "cpu")
    first = run_folder.read_record(tmp_path)
    assert (first["kind"], first["where"], first["machine"]["device"]) == ("x", str(tmp_path), "cpu")
    assert "resumed" not in first
    monkeypatch.setattr(sys, "argv", ["sds.py", "--resume", "latest"])
    write(9, 5, "cuda")
    write(9, 7, "cpu")
    last = run_folder.read_record(tmp_path)
    assert last["machine"] == first["machine"]
    assert last["sds"] == {"steps": 9, "lr": 0.1}
    assert [entry["step"] for entry in last["resumed"]] == [5, 7]
    assert [entry["machine"]["device"] for entry in last["resumed"]] == ["cuda", "cpu"]
    assert [entry.get("before") for entry in last["resumed"]] == [{"sds": {"steps": 5}}, None]
    assert (tmp_path / "cmd.txt").read_text() == "python -m mvdream_fast.sds 'a chair' --steps 5\n"  # as it was begun
    assert json.loads((tmp_path / "env.json").read_text())["python"] == sys.version
    run_folder.write_record(tmp_path, "sds", {"kind": "x"}, "ckpt", ["a table"], anew=True)
    assert run_folder.read_record(tmp_path).keys() == {"kind", "version", "machine"}
    assert (tmp_path / "cmd.txt").read_text() == "python -m mvdream_fast.sds 'a table'\n"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputFileError, match="config.json is not JSON"):
        run_folder.write_record(tmp_path, "sds", {}, "ckpt")


def test_the_checkpoint_before_the_latest(tmp_path):
    for name in ("000009.safetensors", "000010-2.shards", "000100.safetensors", "LATEST", "000020.safetensors.tmp-1"):
        (tmp_path / name).touch()
    (tmp_path / "LATEST").write_text("000100.safetensors\n")
    assert run_folder.older_checkpoint(tmp_path) == "000010-2.shards"
    (tmp_path / "LATEST").write_text("000009.safetensors\n")
    assert run_folder.older_checkpoint(tmp_path) is None


def test_resume_of_nothing_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="must name a run folder or 'latest'"):
        run_folder.resolve_resume("latest", tmp_path)


def test_output_folder_must_be_empty(tmp_path):
    assert run_folder.make_output_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "a" / "b" / "x").touch()
    with pytest.raises(OutputError, match="exists and is not empty"):
        run_folder.make_output_folder(tmp_path / "a" / "b")
    with pytest.raises(OutputError, match="a file is in the way"):
        run_folder.make_output_folder(tmp_path / "a" / "b" / "x")
    with pytest.raises(OutputError, match="a file is in the way"):
        run_folder.make_output_folder(tmp_path / "a" / "b" / "x" / "below")


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(tmp_path):
    path = tmp_path / "file"
    run_folder.atomic_write(path, "old")
    script = textwrap.dedent(f"""
        import resource, signal
        from mvdream_fast.core import run_folder
        from mvdream_fast.core.errors import OutputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            run_folder.atomic_write({str(path)!r}, b"x" * 5000)
        except OutputError as error:
            print(error)
    """)
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "5000 bytes" in out
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_atomic_write_refuses_a_device(tmp_path):
    with pytest.raises(OutputError, match="not a regular file"):
        run_folder.atomic_write("/dev/full", b"x")
    with pytest.raises(OutputError, match="not a regular file"):
        run_folder.atomic_write(tmp_path, b"x")


def state(step):
    return {
        "weight": torch.full((3, 5), float(step)),
        "bits": torch.arange(4, dtype=torch.uint8),
        "empty": torch.empty(0),
    }


def test_checkpoints_round_trip_and_old_ones_go(tmp_path):
    assert run_folder.load_latest(tmp_path) is None
    for step in (10, 20, 30):
        run_folder.save_checkpoint(tmp_path, step, state(step), {"config": {"seed": 1}}, keep=2)
    (tmp_path / run_folder.LATEST).write_bytes("000030.safetensors\r\n".encode("utf-8-sig"))  # as an editor saves it
    step, tensors, meta = run_folder.load_latest(tmp_path)
    assert (step, meta["config"]) == (30, {"seed": 1})
    assert all(torch.equal(tensors[name], value) for name, value in state(30).items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000020.safetensors", "000030.safetensors", "LATEST"]


def test_a_damaged_checkpoint_is_named_with_the_previous_one(tmp_path):
    for step in (10, 20):
        run_folder.save_checkpoint(tmp_path, step, state(step), {})
    path = tmp_path / "000020.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelError, match=r"cannot read the checkpoint .*000020.*000010\.safetensors"):
        run_folder.load_latest(tmp_path)


@pytest.mark.parametrize("content", ["", "../../etc/passwd", "000010.pt", "\x00" * 9])
def test_a_damaged_pointer_is_never_a_path(tmp_path, content):
    (tmp_path / run_folder.LATEST).write_text(content)
    with pytest.raises(ModelError, match=r"LATEST(: it is no text| must hold a checkpoint's file name)"):
        run_folder.load_latest(tmp_path)


def test_a_full_disk_keeps_the_previous_checkpoint_at_every_offset(tmp_path):
    run_folder.save_checkpoint(tmp_path, 1, state(1), {})
    script = textwrap.dedent(f"""
        import resource, signal, sys, torch
        from pathlib import Path
        from mvdream_fast.core import run_folder
        from mvdream_fast.core.errors import OutputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.RLIM_INFINITY
        failures = 0
        for limit in range(1, 40_000, 1_300):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                run_folder.save_checkpoint(Path({str(tmp_path)!r}), 2, {{"w": torch.zeros(10_000)}}, {{}})
            except OutputError:
                failures += 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            step, tensors, _ = run_folder.load_latest(Path({str(tmp_path)!r}))
            assert step == 1 and tensors["w" if step == 2 else "weight"].sum() == 15, (limit, step)
        print(failures)
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "31", result.stderr
    assert not list(tmp_path.glob("*.tmp-*"))


def test_temporary_files_of_dead_processes_go(tmp_path):
    (tmp_path / "000001.safetensors.tmp-999999999").touch()
    (tmp_path / f"000001.safetensors.tmp-{os.getpid()}").touch()
    run_folder.remove_stale(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f"000001.safetensors.tmp-{os.getpid()}"]


def test_log_survives_a_torn_line_and_forgets_later_steps(tmp_path):
    log = run_folder.JsonlLog(tmp_path / "log.jsonl")
    for step in range(5):
        log.write({"step": step, "loss": step / 3})
    with open(log.path, "a") as file:
        file.write('{"step": 5, "lo')
    log.truncate_after(2)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_become_a_request(number, code):
    before = signal.getsignal(number)
    with run_folder.Interrupt() as interrupt:
        assert interrupt.exit_code == 0
        os.kill(os.getpid(), number)
        assert interrupt.requested == number
        assert interrupt.exit_code == code
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_immediate():
    with run_folder.Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
