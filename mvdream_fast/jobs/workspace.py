"""Where a job is worked on: a folder for each attempt, filled with what the one before had saved, and published once.

In a local or shared folder that is work/<name>.<attempt>/, and publishing is a rename to assets/<name>/. Behind a URL
it is a folder of this machine, whose files are copied to the same names there. A worker that lost its job can only
write where nobody looks any more.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from mvdream_fast.core.errors import OutputError
from mvdream_fast.core.files import atomic_write, make_folder
from mvdream_fast.jobs.job import Job
from mvdream_fast.jobs.store import Store, lacks_space

ASSETS, WORK = "assets", "work"
WHOLE = ".whole"  # behind a URL, in a folder of which all files have arrived
_PASSING = (".lock", ".tmp-", WHOLE)  # of names that are not copied


def asset_folder(job: Job) -> str:
    """The name, in the store, of the folder of what a job made."""
    return f"{ASSETS}/{job.name}"


class Workspace:
    """The folder of one attempt at a job.

    scratch: where, on this machine, that is for a store behind a URL.
    """

    def __init__(self, store: Store, job: Job, attempt: int, scratch: Path):
        self.store, self.job, self.attempt, self.scratch = store, job, attempt, scratch
        self._root = store.folder or scratch
        self._mirrored: dict[str, tuple[int, int]] = {}
        self.folder = self._root / self._name(attempt)

    def _name(self, attempt: int) -> str:
        return f"{WORK}/{self.job.name}.{attempt}"

    def _attempts(self) -> list[int]:
        """Those before this one, whose folder is there and whole, the latest first."""
        before = f"{self.job.name}."
        found = (name.removeprefix(before) for name in self.store.names(WORK) if name.startswith(before))
        earlier = sorted((int(word) for word in found if word.isdigit() and int(word) < self.attempt), reverse=True)
        return [n for n in earlier if self.store.folder is not None or self._is_whole(self._name(n))]

    @property
    def is_published(self) -> bool:
        """Whether the job's folder is among the assets, whole."""
        name = asset_folder(self.job)
        return self._is_whole(name) if self.store.folder is None else (self.store.folder / name).is_dir()

    def _is_whole(self, name: str) -> bool:
        return self.store.read(f"{name}/{WHOLE}") is not None

    def begin(self) -> Path:
        """Makes the folder, with what the attempt before had saved. Raises OutputError."""
        if self.folder.is_dir():
            return self.folder
        new = self.folder.with_name(f"{self.folder.name}.new-{os.getpid()}")
        try:
            shutil.rmtree(new, ignore_errors=True)
            earlier = self._attempts()
            if not earlier:
                new.mkdir(parents=True)
            elif self.store.folder is not None:
                _copy(self._root / self._name(earlier[0]), new)
            else:
                fetch(self.store, self._name(earlier[0]), new)
            new.rename(self.folder)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror or error
            raise OutputError(f"cannot make the folder {self.folder}: {reason}") from error
        return self.folder

    def save(self) -> None:
        """Copies what is new in the folder to where another machine can go on with it; nothing to do where it is."""
        if self.store.folder is None:
            self._mirrored = send(self.store, self.folder, self._name(self.attempt), self._mirrored)

    def publish(self) -> str:
        """Moves the folder among the assets and drops the other attempts'. Returns its name in the store."""
        name = asset_folder(self.job)
        if self.store.folder is None:
            send(self.store, self.folder, name, {})
        else:
            target = self.store.folder / name
            make_folder(target.parent)
            try:
                self.folder.rename(target)
            except OSError as error:
                if not target.is_dir():
                    raise OutputError(f"cannot make {target}: {error.strerror}") from error
                # another attempt was published: it has the same bytes
        self.drop()
        return name

    def drop(self) -> None:
        """Removes this attempt's folder, and all before it."""
        for attempt in range(1, self.attempt + 1):
            self.store.delete(self._name(attempt))
        shutil.rmtree(self.folder, ignore_errors=True)


def prune(store: Store, jobs: Iterable[Job]) -> None:
    """Removes what attempts at these jobs have left behind: of workers that were killed while they copied, or wrote
    after they had lost their job."""
    names = {job.name for job in jobs}
    for left in store.names(WORK):
        if left.partition(".")[0] in names:
            store.delete(f"{WORK}/{left}")


def _copy(folder: Path, new: Path, tries: int = 3) -> None:
    """Copies what an attempt has saved; again where its worker lives all the same and a file went meanwhile."""
    for last in [False] * (tries - 1) + [True]:
        shutil.rmtree(new, ignore_errors=True)
        try:
            shutil.copytree(folder, new, ignore=_passing)
            return
        except shutil.Error as error:
            if last or lacks_space(error):
                raise


def _passing(_: str, names: list[str]) -> list[str]:
    return [name for name in names if any(word in name for word in _PASSING)]


def send(store: Store, folder: Path, name: str, known: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Copies the files of a folder to a store, but those that are there as they are, and deletes what has gone.

    What names another file (LATEST of checkpoints, config.json) goes last, so that what is there is whole.
    known: what the last call returned, {} at first.
    """
    found: dict[str, tuple[int, int]] = {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _passing("", [path.name]))
    for path in sorted(paths, key=lambda path: (path.name == "config.json", path.name == "LATEST")):
        with contextlib.suppress(FileNotFoundError):  # an old checkpoint, meanwhile deleted
            about, relative = path.stat(), path.relative_to(folder).as_posix()
            found[relative] = about.st_size, about.st_mtime_ns
            if known.get(relative) != found[relative]:
                store.write(f"{name}/{relative}", path.read_bytes())
    for relative in known.keys() - found.keys():
        store.delete(f"{name}/{relative}")
    if not known:
        store.write(f"{name}/{WHOLE}", b"")
    return found


def fetch(store: Store, name: str, folder: Path) -> None:
    """Copies all files under a name of a store to a folder of this machine."""
    make_folder(folder)
    for entry in store.names(name):
        data = store.read(f"{name}/{entry}")
        if data is None:
            fetch(store, f"{name}/{entry}", folder / entry)
        else:
            atomic_write(folder / entry, data)
