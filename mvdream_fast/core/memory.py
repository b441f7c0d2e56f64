"""How much memory there is, and the sentence that refuses what will not fit into it, before anything is allocated.

What a text-to-3D run takes is estimated in distill/run_memory.py, what a training step takes in
training/step_estimate.py.
"""

import resource
from pathlib import Path

from mvdream_fast.core.errors import OutOfMemoryError
from mvdream_fast.core.machine import memory_limit, resident_memory, total_memory

PROGRAM = "the program"  # the part of an estimate that is not anybody's choice
PROGRAM_BYTES = 650 << 20  # Python, torch, diffusers and transformers once imported
GRAPHS = "CUDA graphs"  # a part of estimates: what the driver keeps of them; their activations are counted as those
KERNEL_BYTES = 64 << 10  # of a kernel in a graph, on the device; estimated, not measured
ADDRESS_SPACE = 1000 << 20  # of the imported libraries
RESERVED = 512 << 20  # address space for stacks and heaps of threads, hardly any of which is ever touched


def available(device: str = "cpu") -> tuple[int | None, str]:
    """Bytes that this process may still take in addition to what it has, and what sets that limit."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0], "free on the GPU"
    limits = [(_free(), "free on this machine"), (_cgroup(), "left of the control group's limit"),
              (_address_space(), "left of the address space's limit, ulimit -v")]  # fmt: skip
    known = [(max(size, 0), name) for size, name in limits if size is not None]
    return min(known, default=(None, ""))


def total(device: str) -> int:
    """Bytes of memory that a device has, in use or not; of what cannot be told, 4 GB."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return total_memory() or 1 << 32


def _free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return None


def _cgroup() -> int | None:
    limit = memory_limit()
    return None if limit is None else limit - resident_memory()


def _address_space() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None
    return soft - used - RESERVED


def check_start() -> None:
    """Before torch is imported: refuses an address space in which its libraries could not even be mapped."""
    left = _address_space()
    if left is not None and left < ADDRESS_SPACE:
        raise OutOfMemoryError(
            f"starting needs about {gb(ADDRESS_SPACE)} of address space, and {gb(left)} is left of this process' "
            "limit; raise it with ulimit -v"
        )


def check(what: str, need: int, device: str, advice: str) -> None:
    """Raises OutOfMemoryError, which ends in `advice`, where `need` bytes beside those in use are not available."""
    have, limit = available(device)
    if have is not None and need > have:
        raise OutOfMemoryError(
            f"{what} needs about {gb(need)} more than is in use, and {gb(have)} is {limit}; {advice}"
        )


def largest(parts: dict[str, int]) -> list[str]:
    """The names of the two largest parts of an estimate, the largest first."""
    return sorted((name for name in parts if name != PROGRAM), key=lambda name: parts[name], reverse=True)[:2]


def advice(parts: dict[str, int], way: str) -> str:
    """Where most of the memory goes, and a way out."""
    first, second = largest(parts)
    return f"most goes to {first} ({gb(parts[first])}) and {second} ({gb(parts[second])}); {way}"


def gb(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.2f} GB"
