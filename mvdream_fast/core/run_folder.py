"""Run folders and their locks, checkpoints, JSONL logs, and signals: what makes a long run safe to interrupt.

Files appear whole or not at all (files.py). No model or loop lives here.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvdream_fast._version import __version__
from mvdream_fast.core import machine, sharded_checkpoint
from mvdream_fast.core.arguments import user_path
from mvdream_fast.core.errors import ArgumentError, InputFileError, ModelError, OutputError
from mvdream_fast.core.files import (
    atomic_write,
    make_folder,
    read_json,
    read_lines,
    read_text,
    remove_stale,
    replace_file,
)

if TYPE_CHECKING:
    import torch

MAX_SLUG = 60
LATEST = "LATEST"
LOCK, RECORD = ".lock", "config.json"
OUTPUTS = Path("outputs")  # where run folders are made that nobody named


def slugify(prompt: str) -> str:
    """A file-system name for a prompt, `[a-z0-9-]{1,60}-<8 hex>`: never the prompt itself, unique by its hash."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[: MAX_SLUG - 9].strip("-") or "prompt"
    return f"{words}-{hashlib.sha256(prompt.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def new_folder(output: Path | None, root: Path, prompt: str, seed: int) -> Path:
    """The folder of a new run: the one that -o names, else one under `root`. Raises OutputError."""
    return make_run_folder(root, prompt, seed) if output is None else make_output_folder(output)


def check_new_folder(output: Path | None, root: Path) -> None:
    """Refuses what `new_folder` would, before anything is computed; makes nothing yet. Raises OutputError."""
    folder = root if output is None else output
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"the output folder {folder} cannot be made: {there} is not a folder that can be written")
    if output is not None and output.is_dir():
        _check_empty(output)


def make_run_folder(root: Path | str, prompt: str, seed: int, now: datetime.datetime | None = None) -> Path:
    """Creates `root/<slug>-<hash>/<time>-s<seed>/` and points `root/latest` at it. Raises OutputError."""
    root = user_path(root)
    stamp = (now or datetime.datetime.now()).strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = root / slugify(prompt) / (f"{stamp}-s{seed}" + (f"-{attempt}" if attempt > 1 else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise OutputError(f"cannot create the run folder {folder}: a file is in the way") from None
            continue
        except OSError as error:
            raise OutputError(f"cannot create the run folder {folder}: {error.strerror}") from error
        _point(root / "latest", folder)
        return folder
    raise OutputError(f"cannot create a run folder under {root}: too many runs of this second")


def make_output_folder(folder: Path | str) -> Path:
    """Creates the folder a user named with -o; one that exists and holds anything is refused (OutputError)."""
    folder = user_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_empty(folder)
    except (FileExistsError, NotADirectoryError):
        raise OutputError(f"the output folder {folder} cannot be made: a file is in the way") from None
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"the output folder {folder} cannot be made: {error.strerror}") from error
    return folder


def _check_empty(folder: Path) -> None:
    if any(folder.iterdir()):
        runs = f", or --root {folder} to put it beside the runs there" if (folder / "latest").is_dir() else ""
        raise OutputError(f"the output folder {folder} exists and is not empty; name another with -o{runs}")


def _point(link: Path, folder: Path) -> None:
    """Makes `link` a relative symbolic link to `folder`, in one step; a real file of that name is left alone."""
    if link.exists() and not link.is_symlink():
        return
    temporary = link.with_name(f"{link.name}.tmp-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(folder, link.parent))
        temporary.replace(link)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # a convenience: file systems without links still work


def resolve_resume(resume: str, root: Path | str, output: Path | None = None) -> Path:
    """The run folder that `--resume DIR|latest` names; "latest" is that of -o, else the last one under `root`.

    Raises: ArgumentError when there is none, or -o names another.
    """
    latest = user_path(root) / "latest" if output is None else output
    folder = latest if resume == "latest" else user_path(resume)
    if not folder.is_dir():
        raise ArgumentError(f"--resume must name a run folder or 'latest', got {resume}; {folder} is not a folder")
    if output is not None and folder.resolve() != output.resolve():
        raise ArgumentError(f"-o must be left out, or be the folder of --resume, {folder}, got {output}")
    return folder.resolve()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a run folder for this process: a second command that would write there meanwhile is refused.

    A record lock (fcntl) on FOLDER/.lock: the system drops it with the process, however that ends, and workers that the
    process forks don't inherit it. A file system that knows no locks goes without.
    Raises: OutputError, naming the process that holds the folder, or why it cannot be written.
    """
    try:
        # "a": not emptied before it is ours; without a buffer, which a full disk would keep from being closed.
        file = open(folder / LOCK, "ab+", buffering=0)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise OutputError(
                    f"the run folder {folder} is in use by process {_owner(file.read())}; wait "
                    "until it is done, or stop it first"
                ) from None
        try:
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield


def _owner(lock: bytes) -> str:
    return lock.decode("ascii", "replace").strip() or "of another command"


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"the run folder {folder} cannot be written: {error.strerror}")


def write_record(
    folder: Path, verb: str, record: dict[str, Any], checkpoints: str, argv: Sequence[str] | None = None,
    anew: bool = False, **where: Any,
) -> None:  # fmt: skip
    """cmd.txt, env.json and, last, config.json, which makes a folder a run to go on with.

    config.json says what the run is and where it was begun; in `resumed` the step and place of each time it went on,
    and under `before` what of the record was otherwise until then.

    Args: checkpoints, their folder's name. argv, the verb's words for cmd.txt (default: this program's). anew: a run
    begins, and what another one left there is written over. where, what counts beside the processor and the threads:
    device, dtype.
    """
    import torch

    about = machine.about()
    here = {"version": __version__, "machine": about | where | {"threads": torch.get_num_threads()}}
    record, old = json.loads(json.dumps(record, default=str)), None if anew else read_record(folder)
    if old is None:
        words = sys.argv[1:] if argv is None else argv
        atomic_write(folder / "cmd.txt", shlex.join(["python", "-m", f"mvdream_fast.{verb}", *words]) + "\n")
        env = about | {"python": sys.version, "version": __version__}
        atomic_write(folder / "env.json", json.dumps(env, indent=2) + "\n")
    else:
        before = _before(old, record)
        session = {"step": latest_step(folder / checkpoints), **here} | ({"before": before} if before else {})
        here = {name: old[name] for name in here if name in old} | {"resumed": [*old.get("resumed", []), session]}
    atomic_write(folder / RECORD, json.dumps(record | here, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What config.json says of a run; None where there is none. Raises InputFileError."""
    path = folder / RECORD
    record = read_json(path) if path.exists() else None
    if record is not None and not isinstance(record, dict):
        raise InputFileError(f"{path} must hold a JSON object, got a {type(record).__name__}")
    return record


def _before(old: dict, new: dict) -> dict:
    """What differs in `old`, one table deep."""
    pairs = {name: (old.get(name), value) for name, value in new.items() if old.get(name) != value}
    return {name: _before(was, is_) if isinstance(was, dict) and isinstance(is_, dict) else was
            for name, (was, is_) in pairs.items()}  # fmt: skip


def latest_step(folder: Path) -> int:
    """The step of a folder's newest checkpoint by its name, 0 where there is none."""
    pointer = folder / LATEST
    return _step(read_text(pointer, ModelError).strip()) or 0 if pointer.exists() else 0


def older_checkpoint(folder: Path) -> str | None:
    """The file name of the newest checkpoint of a step before the latest one's; None where there is none."""
    steps = {path.name: _step(path.name) for path in folder.iterdir()}
    before = {name: step for name, step in steps.items() if step is not None and step < latest_step(folder)}
    return max(before, key=lambda name: before[name], default=None)


def _step(name: str) -> int | None:
    """The step of a checkpoint by its file's or folder's name; None for another name."""
    found = re.fullmatch(r"(\d+)\.safetensors", name) or sharded_checkpoint.NAME.fullmatch(name)
    return int(found[1]) if found else None


def save_checkpoint(
    folder: Path | str, step: int, tensors: dict[str, "torch.Tensor"], meta: dict[str, Any], keep: int = 2
) -> Path:
    """Writes `folder/<step>.safetensors` atomically, then LATEST, then deletes all but the newest `keep`.

    `meta` is stored as JSON in the file's header. Returns the path. Raises OutputError; the previous checkpoint stays.
    """
    from safetensors.torch import save_file

    folder = make_folder(user_path(folder))
    remove_stale(folder)
    path = folder / f"{step:06d}.safetensors"
    header = {"meta": json.dumps({**meta, "step": step}, sort_keys=True)}
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
    replace_file(path, lambda temporary: save_file(plain, temporary, metadata=header), n_bytes)
    atomic_write(folder / LATEST, path.name + "\n")
    for old in sorted(folder.glob("[0-9]*.safetensors"))[:-keep]:
        if old != path:
            with contextlib.suppress(OSError):
                old.unlink()
    return path


def load_latest(
    folder: Path | str, like: "Mapping[str, torch.Tensor] | None" = None
) -> tuple[int, dict[str, "torch.Tensor"], dict[str, Any]] | None:
    """The checkpoint that LATEST names: (step, tensors, meta), or None where nothing was saved yet.

    `like`: tensors by name, as of one that several processes wrote (sharded_checkpoint.py) each wants its share.
    Raises ModelError when it cannot be read; the message names the newest other checkpoint.
    """
    path = _latest(user_path(folder))
    if path is None or path.suffix == ".safetensors":
        return None if path is None else load_checkpoint(path)
    return sharded_checkpoint.load(path, like or {})


def load_latest_meta(folder: Path | str) -> dict[str, Any] | None:
    """What the checkpoint that LATEST names says of its run, without its tensors. Raises ModelError."""
    path = _latest(user_path(folder))
    if path is None or path.suffix != ".safetensors":
        return None if path is None else sharded_checkpoint.load_meta(path)
    return load_checkpoint(path, only_meta=True)[2]


def _latest(folder: Path) -> Path | None:
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    name = read_text(pointer, ModelError).strip()
    if _step(name) is None:
        raise ModelError(f"{pointer} must hold a checkpoint's file name, got {name[:80]!r}")
    return folder / name


def read_tensors(path: Path, key: str, only_meta: bool = False) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """A safetensors file, and the JSON under this key of its header. Raises KeyError, and what safetensors raises."""
    from safetensors import safe_open

    opened: Any = safe_open(path, framework="pt")
    with opened as file:
        meta = json.loads((file.metadata() or {})[key])
        names = () if only_meta else file.keys()
        return {name: file.get_tensor(name) for name in names}, meta


def load_checkpoint(path: Path, only_meta: bool = False) -> tuple[int, dict[str, "torch.Tensor"], dict[str, Any]]:
    """Reads one checkpoint file. Raises ModelError naming the file, the reason and the newest other checkpoint."""
    from safetensors import SafetensorError

    try:
        tensors, meta = read_tensors(path, "meta", only_meta)
        return int(meta["step"]), tensors, meta
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        others = [p.name for p in sorted(path.parent.glob("[0-9]*.safetensors")) if p != path]
        hint = (
            f"write '{others[-1]}' into {path.parent / LATEST} to go on from there" if others else "no other is there"
        )
        raise ModelError(f"cannot read the checkpoint {path}: {error}; {hint}") from error


class JsonlLog:
    """Appends one JSON object a line; a line is written with one call, so a kill never leaves half of an older one."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record as a line."""
        line = json.dumps(record, allow_nan=False, default=float) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error

    def truncate_after(self, step: int) -> None:
        """Drops the records of steps after `step` (and a half-written last line): a resumed run writes them again."""
        if self.path.exists():
            kept = [record for record in self.read() if record.get("step", 0) <= step]
            atomic_write(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a half-written last line is ignored."""
        records = []
        for line in read_lines(self.path) if self.path.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records


class Interrupt:
    """While active, SIGINT and SIGTERM only set `.requested`, so that a loop can save and leave at the end of a step.

    A second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 0 when nothing was requested."""
        return 0 if self.requested is None else 128 + self.requested
