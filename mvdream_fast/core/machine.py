"""The machine as the commands see it: processor features, memory limits, and the device and dtype that "auto" means.

Nothing here imports torch before a function that needs it is called.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mvdream_fast.core.errors import ArgumentError, OutOfMemoryError

if TYPE_CHECKING:
    import torch

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
# Without either, torch's bf16 GEMMs are far slower than float32's. With AVX-512 bf16 (EPYC 9004, one thread, the
# embedded model, turns interleaved) bf16 takes 0.77 of float32's time for a guided UNet call of four views, 0.78 for
# generate and 0.91 for an SDS step, though our native norm, GEGLU and convolution are float32 only and stand aside.
_FAST_BF16 = {"amx_bf16", "avx512_bf16"}

M = TypeVar("M", bound="torch.nn.Module")

_NO_MEMORY = ("allocate memory", "CUDA out of memory")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets of the processor by Linux' names; empty where that cannot be told."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(found.split(":", 1)[1].split())


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system has it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def available_cores(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores this process may use: its affinity mask, cut by the CPU quota of its control group and those above it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder, name in _groups(root, own, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        try:
            numbers = (folder / name).read_text().split()
            period = numbers[1] if name == "cpu.max" else (folder / "cpu.cfs_period_us").read_text()
            quota = int(numbers[0]) // int(period)
        except (OSError, ValueError, IndexError, ZeroDivisionError):  # no such file, or "max"
            continue
        cores = min(cores, max(1, quota)) if int(numbers[0]) > 0 else cores  # -1: no limit
    return cores


def total_memory() -> int | None:
    """Bytes of main memory, None where that cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def resident_memory() -> int:
    """Bytes of main memory that this process holds now; 0 where that cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def memory_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that this process' control group, or any group above it, allows (both versions); None without a limit."""
    limits: list[int] = []
    for folder, name in _groups(root, own, "memory", "memory.max", "memory.limit_in_bytes"):
        try:
            limits.append(int((folder / name).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    total = total_memory()
    limits = [limit for limit in limits if total is None or limit < total]
    return min(limits, default=None)


def _groups(root: Path, own: Path, controller: str, name: str, name_v1: str) -> list[tuple[Path, str]]:
    """The folders whose limits apply, with the file that holds one: the process' own groups and all above them."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    found = [(root, name), (root / controller, name_v1)]
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        unified = controllers == ""
        if unified or controller in controllers.split(","):
            top, file = (root, name) if unified else (root / controller, name_v1)
            parts = Path(path.lstrip("/")).parts
            found += [(top.joinpath(*parts[:n]), file) for n in range(1, len(parts) + 1)]
    return found


def about() -> dict[str, str | int | None]:
    """What a run's record says of the machine."""
    return {"processor": cpu_name(), "cores": available_cores(), "memory": total_memory()}


def choose_device(device: str | int | torch.device | None = "auto") -> torch.device:
    """The device that a flag or a call names: "auto" (or None) is the GPU where there is one, a number that GPU.

    Raises: ArgumentError for a device that torch doesn't know, this machine doesn't have, or nothing here runs on.
    """
    import torch

    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device("cuda", device) if type(device) is int else torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if chosen.type not in DEVICES:
        raise ArgumentError(f"--device {chosen}: the kernels are for cpu and cuda; take --device cpu on this machine")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"--device {chosen}: torch sees no CUDA device; --device cpu works, and doctor tells why")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"--device {chosen}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype that a flag or a call names; "auto" (or None) is bfloat16 where that is fast (sm_80 and up, CPUs with
    AMX or AVX-512 bf16), float16 on other GPUs, float32 on other CPUs.

    Raises: ArgumentError for one that isn't float32, bfloat16 or float16.
    """
    import torch

    name = str(dtype).removeprefix("torch.")
    name = {"None": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(name, name)
    if name in DTYPES:
        return getattr(torch, name)
    if name != "auto":
        raise ArgumentError(f"--dtype must be auto, {', '.join(DTYPES)}, got {str(dtype)!r}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_flags() & _FAST_BF16 else torch.float32


def encoder_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of an image encoder beside a UNet of `dtype`: bfloat16 on a GPU (sm_80 and up) whose UNet has 16 bits,
    else float32. float16 is more exact, but its range is too small for the gradients: docs/gpu.md has the figures."""
    import torch

    on_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return torch.bfloat16 if on_gpu and dtype.itemsize == 2 else torch.float32


@contextmanager
def repeated_shapes(device: torch.device) -> Generator[None]:
    """Where the same shapes come again and again, cuDNN measures once which of its ways is the fastest for each. Not
    under torch.use_deterministic_algorithms: the winner may differ from run to run."""
    import torch

    cudnn = torch.backends.cudnn
    before = bool(cudnn.benchmark)
    measured = before or (device.type == "cuda" and not torch.are_deterministic_algorithms_enabled())
    cudnn.benchmark = measured  # pyright: ignore[reportAttributeAccessIssue] # torch makes the module's class at import
    try:
        yield
    finally:
        cudnn.benchmark = before  # pyright: ignore[reportAttributeAccessIssue] # the same


@contextmanager
def memory_errors(advice: str) -> Generator[None]:
    """Turns torch's ways of saying that there is no memory left into one OutOfMemoryError that ends in `advice`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if type(error).__name__ != "OutOfMemoryError" and not any(sign in text for sign in _NO_MEMORY):
            raise
        reason = next((line for line in text.splitlines() if "allocate" in line), text.splitlines()[0])
        raise OutOfMemoryError(f"out of memory: {reason.strip()[:200]}; {advice}") from error


def in_format(module: M, memory_format: torch.memory_format) -> M:
    """The module with its 4D weights in this memory format, in place."""
    module.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue] # torch's overloads leave it out
    return module
