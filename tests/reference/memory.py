"""Memory of this process as Linux counts it: what it holds now, and the most it held since."""

import ctypes
import gc
from pathlib import Path


def settled_memory() -> int:
    """Bytes held once everything unused is given back; the peak is counted from here on."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that the allocator kept would hide what is used again
    held = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    return held


def peak_memory() -> int:
    """Most bytes held since `settled_memory`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
