"""What a text-to-3D run shows while it goes on: log.jsonl, previews, progress lines, and the live page if any."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mvdream_fast.core import run_folder
from mvdream_fast.core.files import atomic_write, make_folder
from mvdream_fast.core.images import png_bytes, sheet
from mvdream_fast.core.machine import resident_memory
from mvdream_fast.core.progress import Pace
from mvdream_fast.distill.config import SDSConfig
from mvdream_fast.distill.loop import Progress
from mvdream_fast.distill.state import Record
from mvdream_fast.scene.asset import Asset

if TYPE_CHECKING:
    from mvdream_fast.distill.viewer import Viewer

Say = Callable[[str], None]


class Watcher:
    """The callback of a run. A line a second on a terminal, one every ten seconds elsewhere."""

    def __init__(
        self, folder: Path, config: SDSConfig, preview_every: int | None, say: Say, viewer: "Viewer | None" = None
    ):
        self.folder, self.config, self.say, self.viewer = folder, config, say, viewer
        self.log = run_folder.JsonlLog(folder / "log.jsonl")
        self.preview_every = preview_every
        self.pace = Pace(1 if sys.stdout.isatty() else 10)
        make_folder(folder / "preview")

    def __call__(self, progress: Progress) -> None:
        record, asset = progress.record, progress.asset
        if self.pace.n_calls == 0:
            self.log.truncate_after(record.step - 1)
        self.log.write(record.plain())
        if record.event:
            self.say(f"step {record.step + 1}: {record.event}")
        if self.is_preview(record.step + 1):
            save_preview(asset, self.folder / "preview" / f"{record.step + 1:06d}.png")
        if self.viewer is not None:
            self.viewer.update(asset, record.step + 1, self.stage(record.step + 1))
        if line := self.pace(record.step + 1, self.config.ends[-1]):
            self.say(", ".join(filter(None, [line, self.stage(record.step + 1), figures(record)])))

    def stage(self, done: int) -> str:
        """Which of several stages has made the last of so many steps, and of what; empty where there is but one."""
        number = self.config.at_work(done)
        shape = self.config.stages[number].representation.shape
        return f"stage {number + 1} of {len(self.config.ends)} ({shape})" if self.config.later else ""

    def is_preview(self, done: int) -> bool:
        """Whether a preview is due after so many steps; at the end of each of several stages it is."""
        if self.config.later and done in self.config.ends:
            return True
        if self.preview_every:
            return done % self.preview_every == 0
        steps = self.config.ends[-1]
        return done == max(1, steps // 50) or done % max(1, steps // 10) == 0


def figures(record: Record) -> str:
    """Loss, what the representation tells of itself, and the memory in use."""
    statistics = "".join(f"{name} {value:.3g}, " for name, value in record.statistics.items())
    return f"loss {record.loss:.4g}, {statistics}memory {memory_in_use()}"


def memory_in_use() -> str:
    """Of this process, and of its GPU where it has one."""
    text = f"{resident_memory() / 2**30:.1f} GB"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f", GPU {torch.cuda.memory_allocated() / 2**30:.1f} GB"
    return text


def save_preview(asset: Asset, path: Path, size: int = 64) -> None:
    """Four views of the growing asset: colour, opacity and depth, one row each."""
    views = asset.render(size=size)
    depth = views.depth / views.depth.amax().clamp(min=1e-6)
    rows = [views.rgb, views.opacity[:, None].expand(-1, 3, -1, -1), depth[:, None].expand(-1, 3, -1, -1)]
    atomic_write(path, png_bytes(sheet(torch.stack(rows))))
