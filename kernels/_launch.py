"""A kernel's launch with everything but its addresses worked out once: what every launcher here calls.

Triton compiles at the first call of a layout, and launches it. What it compiled is kept together with the grid and the
scalars, and later calls are one call into the driver (csrc/bindings_launch.cpp), for which it takes Python 40 us to
find the same kernel again. Triton launches where anything is not as it is known to be: a launch hook of a profiler, a
tensor that starts elsewhere than at a multiple of 16 bytes, scratch memory, clusters of blocks, another vendor's GPU, a
driver that does not confirm the kernel's parameters, or an extension that is not built. Triton's settings are those of
a layout's first call.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

try:
    from mvdream_fast import _C
except ImportError:  # Triton's own launch needs no extension
    _C = None

MAX_SHARED = 228 * 1024  # beyond, Triton asks for a mode of shared memory
KINDS = {"i32": "i", "u32": "i", "i64": "l", "u64": "l", "fp32": "f"}

# What a launcher works out for a layout is kept by the arguments of the function that does; they are no tensors.
by_layout = lru_cache(maxsize=4096)


class Launch:
    """`kernel` over `programs` programs: called with its tensors, which come first among its parameters, `values` are
    the numbers and tuples of numbers that follow, `settings` its constants and Triton's options."""

    __slots__ = ("binary", "kernel", "programs", "record", "settings", "values")

    def __init__(self, kernel: Any, programs: int, values: tuple, settings: dict[str, Any]):
        self.kernel, self.programs, self.values, self.settings = kernel, programs, values, settings
        self.record, self.binary = None, None  # the binary must not be unloaded while the record has its address

    def __call__(self, *tensors: Tensor) -> None:
        if self.record is None or not _C.launch(self.record, *tensors):
            self._by_triton(*tensors)

    def _by_triton(self, *tensors: Tensor) -> None:
        with torch.cuda.device_of(tensors[0]) if tensors[0].is_cuda else nullcontext():
            self.binary = self.kernel[(self.programs,)](*tensors, *self.values, **self.settings)
            self.record = self._kept(tensors)

    def _kept(self, tensors: tuple[Tensor, ...]) -> object | None:
        """What `_C.launch` takes for later calls, None where they must be Triton's."""
        metadata = getattr(self.binary, "metadata", None)  # the interpreter compiles nothing
        if _C is None or metadata is None or not _is_plain(metadata):
            return None
        types = list(_flat(tuple(self.binary.src.signature.values())))
        values = list(_flat((*tensors, *self.values)))
        parameters = [(KINDS.get(kind, "p" if kind[0] == "*" else "?"), x) for kind, x in zip(types, values)
                      if kind != "constexpr"]  # fmt: skip
        kinds = "".join(kind for kind, _ in parameters)
        n_tensors = len(tensors)
        if "?" in kinds or kinds.count("p") != n_tensors or kinds[:n_tensors] != "p" * n_tensors:
            return None
        driver = triton.runtime.driver.active
        aligned = sum((x.data_ptr() % 16 == 0) << i for i, x in enumerate(tensors))
        scratch = (0, 0)  # for all programs, and of a profiler
        return _C.launch_record(
            self.binary.name, self.binary.function, self.programs, 32 * metadata.num_warps, metadata.shared,
            driver.get_current_device(), aligned, f"{kinds}ll", (*(x for _, x in parameters[n_tensors:]), *scratch),
            driver.get_current_stream, triton.knobs.runtime,
        )  # fmt: skip


def _is_plain(metadata: Any) -> bool:
    """Whether a kernel is launched with nothing but a grid, threads and shared memory."""
    one_block = metadata.num_ctas == 1 and tuple(getattr(metadata, "cluster_dims", (1, 1, 1))) == (1, 1, 1)
    extras = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    return (
        metadata.target.backend == "cuda"
        and metadata.target.warp_size == 32
        and one_block
        and not any(getattr(metadata, name, 0) for name in (*extras, "instrumentation_mode"))
        and metadata.shared <= MAX_SHARED
    )


def _flat(values: tuple) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value
