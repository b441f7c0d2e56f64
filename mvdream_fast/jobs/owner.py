"""Who a process is, so that another one on the same machine can tell that it is gone. Linux; elsewhere nobody can."""

import os
from pathlib import Path


def this_process() -> str:
    """A name that no other process has had: of the machine's boot, its space of process numbers, number and start."""
    try:
        return "/".join((_here(), str(os.getpid()), _started(os.getpid())))
    except OSError:
        return ""


def is_gone(owner: str) -> bool:
    """Whether the process of this name ran on this machine and does not any more; False where that cannot be told."""
    here, _, process = owner.partition("/")
    number, _, started = process.partition("/")
    try:
        if here != _here():
            return False
    except OSError:
        return False
    try:
        return _started(int(number)) != started
    except (OSError, ValueError):
        return True


def _here() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def _started(number: int) -> str:
    """When a process was started, in the kernel's ticks; of one that has ended and waits for its parent, "gone"."""
    fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
    return "gone" if fields[0] in "ZX" else fields[19]
