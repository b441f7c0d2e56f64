"""`python -m mvdream_fast.render`: 3D assets to multi-view training shards."""

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mvdream_fast.core import cli
from mvdream_fast.core.errors import ArgumentError, InputFileError
from mvdream_fast.rendering.parts import Part

SIZES = (64, 512)
ORBITS = {"embedded": (2, 3), "paper": (2, 0)}


@dataclass(frozen=True)
class Flags:
    """Renders captioned multi-view images of 3D assets into webdataset shards; run it again to go on."""

    source: tyro.conf.Positional[cli.Place]
    """a folder of meshes (GLB, glTF 2, OBJ, DAE, PLY, STL, 3MF, OFF; words from metadata.csv, else captions.csv, .tsv,
    .json or .jsonl, else the file's name), or `sweethome3d`"""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """folder of the shards"""
    preset: Literal["embedded", "paper"] = "embedded"
    """cameras: the embedded model's (16 azimuths with an offset, fov 30-50) or MVDream's (32 from 0, fov 15-60)"""
    size: int = 64
    """pixels of a view's side, 64 to 512"""
    orbits: int | None = None
    """orbits of each asset in its own colours (default: 2)"""
    recolours: int | None = None
    """orbits in other colours, with the captions to match (default: 3, and none with --preset paper)"""
    renderer: Literal["auto", "gl", "numpy"] = "auto"
    """OpenGL through EGL, or numpy; auto takes the first that works"""
    workers: int | None = None
    """processes (default: one a core)"""
    limit: int | None = None
    """only the first so many assets of the source, evenly spread"""
    held_out: float | None = None
    """share of a folder's assets that is kept out of training (default 0.05; sweethome3d has its own list)"""
    seed: int = 0
    """cameras, colours and order"""
    sweethome3d_dir: Path | None = None
    """where sweethome3d-furniture is unpacked (default: this folder, ./assets, /usr/share)"""
    shard: str | None = None
    """i/n: only the i-th of n parts of the assets, into a folder of its own in OUT; the parts may run anywhere, at any
    time, and all together are the data set"""
    parts: int | None = None
    """all parts of so many, one after the other through a queue in OUT; the same command on other machines shares the
    work"""
    ray: str | None = None
    """--parts: on a Ray cluster (extra "cluster"), as for `batch`; a part takes --workers cores of a node"""
    retry_quarantined: bool = False
    """try again what quarantine.jsonl in the output folder says ended a process, or took its time or memory"""
    time_limit: float = 600.0
    """seconds for reading an asset, and for each orbit of it, before its process is ended"""
    memory_limit_gb: float | None = None
    """main memory of one process before it is ended (default: half of the machine's)"""
    sheet: bool = True
    """write sheet.png, an image of some of the renders"""


def main(args: Flags) -> None:
    """Checks the flags, then renders. Raises: the errors of the exit codes in `--help`."""
    _check(args)
    if args.parts is not None:
        _render_parts(args, args.parts)
        return
    from mvdream_fast.core.run_folder import Interrupt
    from mvdream_fast.rendering import dataset, sheet
    from mvdream_fast.rendering.workers import Limits, half_the_memory

    entries, held_out = _entries(args)
    part = Part.read(args.shard) if args.shard else None
    out = args.out if part is None else part.folder(args.out)
    plain, painted = ORBITS[args.preset]
    options = dataset.Options(
        preset=args.preset,
        size=args.size,
        n_plain=plain if args.orbits is None else args.orbits,
        n_painted=painted if args.recolours is None else args.recolours,
        seed=args.seed,
        renderer=_renderer(args.renderer),
    )
    workers = args.workers or cli.available_cores()
    memory = half_the_memory() if args.memory_limit_gb is None else args.memory_limit_gb * 2**30
    more = {"part": part, "limits": Limits(args.time_limit, memory), "retry": args.retry_quarantined}
    with Interrupt() as interrupt, _Progress() as progress:
        stop = lambda: interrupt.requested is not None  # noqa: E731
        result = dataset.render_dataset(entries, out, options, held_out, workers, progress.update, stop, **more)
    if result is None:
        cli.fail("render", "stopped; the same command goes on from the finished shards", interrupt.exit_code)
    dataset.write_summary(out, result)
    _report(out, result)
    if entries and not result.shards:
        raise InputFileError(f"none of the {len(entries)} assets of {args.source} can be rendered; reasons above")
    if args.sheet and result.shards and (written := sheet.write_sheet(out)):
        print(f"sheet: {written}")


def _render_parts(args: Flags, n: int) -> None:
    """All parts through the queue; exits with the code of the first that failed."""
    from mvdream_fast.jobs.parts import render_parts

    how = ("out", "shard", "parts", "ray", "workers")
    same = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.name not in how}
    same = {name: str(x.resolve()) if isinstance(x, Path) else x for name, x in same.items() if x is not None}
    places = {"source": args.source if args.source == "sweethome3d" else str(Path(args.source).resolve())}
    code = render_parts(same | places, args.out.resolve(), n, args.workers or cli.available_cores(), args.ray)
    if code:
        sys.exit(code)


def _check(args: Flags) -> None:
    cli.check_from_to(args, *SIZES, "size")
    cli.check_at_least(args, 0, "orbits", "recolours")
    cli.check_at_least(args, 1, "workers", "limit")
    if args.orbits == 0 and (args.recolours == 0 or (args.recolours is None and args.preset == "paper")):
        raise ArgumentError("--orbits and --recolours must not both be 0; nothing would be drawn")
    if args.shard is not None:
        Part.read(args.shard)
    cli.check_at_least(args, 1, "parts")
    if (args.parts is not None and args.shard is not None) or (args.parts is None and args.ray is not None):
        raise ArgumentError("--parts must come without --shard, and --ray with --parts; a part is one of them")
    cli.check_at_least(args, 1, "time_limit")
    cli.check_at_least(args, 0.1, "memory_limit_gb")
    if args.held_out is not None and not 0 <= args.held_out < 1:
        raise ArgumentError(f"--held-out must be in [0, 1), got {args.held_out}")


def _entries(args: Flags):
    from mvdream_fast.rendering import catalogue, plan

    if args.source == "sweethome3d":
        entries = catalogue.read_sweethome3d(_sweethome3d(args.sweethome3d_dir))
        held_out = plan.held_out_ids()
    else:
        entries = catalogue.read_folder(Path(args.source))
        share = 0.05 if args.held_out is None else args.held_out
        held_out = plan.random_held_out(entries, share)
        if int(share * len(entries)) and not plan.own_captions(entries):
            print("nothing is held out of training: each asset has a caption that another has, too")
    if args.limit and args.limit < len(entries):
        entries = [entries[k * len(entries) // args.limit] for k in range(args.limit)]
    entries = Part.read(args.shard).of(entries) if args.shard else entries
    return entries, held_out & {entry.id for entry in entries} if args.shard else held_out


def _sweethome3d(folder: Path | None) -> Path:
    """The folder that was named, or the first usual place that holds the libraries."""
    usual = [Path("."), Path("assets"), Path("/usr/share/sweethome3d")]
    places = [folder] if folder else [p / "usr/share/sweethome3d" for p in usual[:2]] + usual[2:]
    return next((p for p in places if p.is_dir() and any(p.rglob("*.sh3f"))), places[0])


def _renderer(kind: str) -> str:
    from mvdream_fast.rendering import dataset

    renderer = dataset.make_renderer(kind)
    found = "numpy" if renderer.name == "numpy" else "gl"
    hint = "; no EGL was found: moderngl with libegl1 and libgl1-mesa-dri is several times faster"
    print(f"renderer: {renderer.name}{hint if kind == 'auto' and found == 'numpy' else ''}")
    return found


class _Progress:
    """One bar a stage on a terminal, a line now and then elsewhere."""

    def __enter__(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.console = Console(stderr=True)
        self.bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.tasks: dict[str, TaskID] = {}
        self.start = time.monotonic()
        self.bars.start()
        return self

    def __exit__(self, *_):
        self.bars.stop()

    def update(self, stage: str, done: int, total: int, views: int) -> None:
        if stage == "assets":
            self.start = time.monotonic()  # views are counted from the end of the survey
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total)
        rate = views / max(time.monotonic() - self.start, 1e-3)
        text = {"assets": "looking at assets"}.get(stage, f"shards, {rate:.0f} views/s")
        self.bars.update(self.tasks[stage], completed=done, description=text)
        if not self.console.is_terminal and (done == total or done % max(1, total // 10) == 0):
            self.console.print(f"{text}: {done} of {total}", highlight=False)


def _report(folder: Path, result) -> None:
    from mvdream_fast.rendering import quarantine

    for entry_id, reason in result.bad.items():
        print(f"skipped {entry_id}: {reason}")
    for entry_id, notes in result.notes.items():
        print(f"note on {entry_id}: {'; '.join(notes)}")
    kept, selection = len(result.selection.kept), result.selection
    print(
        f"{kept} assets in {len(result.shards)} shards, {len(result.captions)} captions, {result.n_views} new views; "
        f"left out: {len(result.bad)} unreadable, {len(selection.empty)} too thin, {len(selection.duplicates)} "
        f"near-duplicates (all named in {folder / 'summary.json'})"
    )
    if result.bad:
        print(f"why: {folder / quarantine.NAME}; what ended a process is tried again with --retry-quarantined")


if __name__ == "__main__":
    cli.run(main, Flags, prog="render")
