"""Makes this process believe in an H100 that runs nothing: Triton compiles and launches, and a launch is written down.

Only for a process of its own: every tensor of it says that it is a CUDA tensor. cuda_stub/libcuda.c is the driver.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

SOURCE = Path(__file__).parent / "cuda_stub" / "libcuda.c"
CAPABILITY = (9, 0)


def install(folder: Path) -> ctypes.CDLL:
    """The stub, compiled into `folder`, where Triton's cache lies too; before anything imports Triton."""
    os.environ |= {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    os.environ.pop("TRITON_INTERPRET", None)
    built = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", built, SOURCE], check=True)
    stub = ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)  # of this name, so that whoever asks for libcuda gets it
    stub.stub_launches.restype, stub.stub_take_log.restype = ctypes.c_long, ctypes.c_char_p

    import torch
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    torch.Tensor.is_cuda = True
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.device_of = lambda x: nullcontext()

    class Driver(CudaDriver):
        def __init__(self):
            super().__init__()
            self.get_device_capability = lambda device=0: CAPABILITY
            self.get_current_stream = lambda device: 7 + device
            self.get_current_device = lambda: 0

    triton.runtime.driver.set_active(Driver())
    return stub


def taken(stub: ctypes.CDLL) -> list[str]:
    """The launches since the last call, a line each: kernel, grid, block, shared memory, stream, device, parameters."""
    return stub.stub_take_log().decode().splitlines()


@contextmanager
def by_triton() -> Iterator[None]:
    """Every launch inside is Triton's own, as if the extension were not built."""
    from mvdream_fast.kernels import _launch

    extension, _launch._C = _launch._C, None
    call, _launch.Launch.__call__ = _launch.Launch.__call__, _launch.Launch._by_triton
    try:
        yield
    finally:
        _launch._C, _launch.Launch.__call__ = extension, call


@contextmanager
def same_addresses() -> Iterator[None]:
    """Inside, every run from `rewind()` on gets the tensors of the first run, in the order of its allocations."""
    import torch

    makers = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    made, place = [], [0]

    def again(maker):
        def make(*args, **kwargs):
            if place[0] == len(made):
                made.append(maker(*args, **kwargs))
            place[0] += 1
            return made[place[0] - 1]

        return make

    for name, maker in makers.items():
        setattr(torch, name, again(maker))
    try:
        yield lambda: place.__setitem__(0, 0)
    finally:
        for name, maker in makers.items():
            setattr(torch, name, maker)
