"""Run folders, atomic files and checkpoints, JSONL logs, and signals: what makes a long run safe to interrupt.

Files appear whole or not at all (files.py). No model or loop lives here.
"""

import datetime
import hashlib
import json
import os
import re
import signal
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvdream_fast.core.errors import ArgumentError, ModelError, OutputError
from mvdream_fast.core.files import atomic_write, read_lines, read_text, remove_stale, replace_file

if TYPE_CHECKING:
    import torch

MAX_SLUG = 60
LATEST = "LATEST"


def slugify(prompt: str) -> str:
    """A file-system name for a prompt, `[a-z0-9-]{1,60}-<8 hex>`: never the prompt itself, unique by its hash."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[: MAX_SLUG - 9].strip("-") or "prompt"
    return f"{words}-{hashlib.sha256(prompt.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def make_run_folder(root: Path | str, prompt: str, seed: int, now: datetime.datetime | None = None) -> Path:
    """Creates `root/<slug>-<hash>/<time>-s<seed>/` and points `root/latest` at it. Raises OutputError."""
    root = Path(root)
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
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise OutputError(f"the output folder {folder} exists and is not empty; name another with -o")
    except (FileExistsError, NotADirectoryError):
        raise OutputError(f"the output folder {folder} cannot be made: a file is in the way") from None
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"the output folder {folder} cannot be made: {error.strerror}") from error
    return folder


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
        temporary.unlink(missing_ok=True)  # a convenience: file systems without links still work


def resolve_resume(resume: str, root: Path | str) -> Path:
    """The run folder that `--resume DIR|latest` names. Raises ArgumentError when there is none."""
    folder = Path(root) / "latest" if resume == "latest" else Path(resume)
    if not folder.is_dir():
        raise ArgumentError(f"--resume must name a run folder or 'latest', got {resume}; {folder} is not a folder")
    return folder.resolve()


def save_checkpoint(folder: Path, step: int, tensors: dict[str, "torch.Tensor"], meta: dict, keep: int = 2) -> Path:
    """Writes `folder/<step>.safetensors` atomically, then LATEST, then deletes all but the newest `keep`.

    `meta` is stored as JSON in the file's header. Returns the path. Raises OutputError; the previous checkpoint stays.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    path = folder / f"{step:06d}.safetensors"
    header = {"meta": json.dumps({**meta, "step": step}, sort_keys=True)}
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
    replace_file(path, lambda temporary: save_file(plain, temporary, metadata=header), n_bytes)
    atomic_write(folder / LATEST, path.name + "\n")
    for old in sorted(folder.glob("[0-9]*.safetensors"))[:-keep]:
        if old != path:
            old.unlink(missing_ok=True)
    return path


def load_latest(folder: Path) -> tuple[int, dict[str, "torch.Tensor"], dict] | None:
    """The checkpoint that LATEST names: (step, tensors, meta), or None where nothing was saved yet.

    Raises ModelError when it cannot be read; the message names the newest other checkpoint.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    name = read_text(pointer, ModelError).strip()
    if not re.fullmatch(r"\d+\.safetensors", name):
        raise ModelError(f"{pointer} must hold a checkpoint's file name, got {name[:80]!r}")
    return load_checkpoint(folder / name)


def load_checkpoint(path: Path) -> tuple[int, dict[str, "torch.Tensor"], dict]:
    """Reads one checkpoint file. Raises ModelError naming the file, the reason and the newest other checkpoint."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["meta"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
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
