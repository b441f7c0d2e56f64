"""A GPU made of Python: tensors of a device of their own whose numbers lie in main memory, and what waits for it.

The package runs on it as on CUDA, with the CUDA kernels that are compiled for the host (tests/cuda_shim). Counted is
whatever makes the caller wait until the device has done all that it was asked: a number that reaches Python, a copy
from or to ordinary memory, an event, and a wait inside the extension. What CUDA refuses, tensors of two devices in one
operation, is refused here. To make the device changes torch for the whole process: for processes of their own.
"""

import contextlib
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from reference.waits import BY_INDEX, PACKAGE, READS
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    """torch.gpu, with what torch.autocast asks it."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("gpu", Backend())
DEVICE = torch.device("gpu", 0)
COPIES = ("aten._to_copy.default", "aten.copy_.default")


class OnGPU(torch.Tensor):
    """A tensor of the device; `numbers` is the tensor of the CPU that stands for its memory."""

    takes_kernels = True  # what is_cuda says: False where Triton's kernels, which do not run here, would be asked

    @staticmethod
    def __new__(cls, numbers):
        like = {"dtype": numbers.dtype, "strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, numbers.size(), device=DEVICE, **like)
        tensor.numbers = numbers
        return tensor

    @property
    def is_cuda(self):
        return OnGPU.takes_kernels

    def data_ptr(self):
        return self.numbers.data_ptr()

    def tolist(self):
        GPU.current.wait("read")
        return self.numbers.tolist()

    def new_tensor(self, data, **options):
        return torch.tensor(data, **{"dtype": self.dtype, "device": DEVICE} | options)

    def __repr__(self, **_):
        return f"OnGPU({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return GPU.current(func, args, kwargs or {})


class GPU(TorchDispatchMode):
    """The device while it is entered. `waits` says how often the caller waited at each place, `file:function`.

    Args: extension: the CUDA ops built for the host.
    """

    current: "GPU"

    def __init__(self, extension):
        super().__init__()
        self.extension, self.waits, self.n_waits, self._undo = extension, Counter(), 0, contextlib.ExitStack()

    def __enter__(self):
        GPU.current = self
        # Else backward runs in a thread of the device's, which drops this mode some time after backward has returned:
        # a process that has ended by then aborts.
        self._undo.enter_context(torch.autograd.set_multithreading_enabled(False))
        for patch in _patches(self.extension):
            self._undo.enter_context(patch)
        return super().__enter__()

    def __exit__(self, *error):
        self._undo.close()
        return super().__exit__(*error)

    def take(self) -> Counter:
        """The waits since the last call; those inside the extension by that name."""
        waits, self.waits = self.waits, Counter()
        return waits

    def wait(self, why: str) -> None:
        own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        place = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "elsewhere"
        self.waits[f"{why} at {place}"] += 1
        self.n_waits += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self(func, args, kwargs or {})

    def __call__(self, func, args, kwargs):
        name, tensors = str(func), [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here, target = any(isinstance(x, OnGPU) for x in tensors), kwargs.get("device")
        if target is not None:
            stays = torch.device(target).type == DEVICE.type
            kwargs = kwargs | {"device": torch.device("cpu")}
        else:
            stays = isinstance(args[0], OnGPU) if name == "aten.copy_.default" else here
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        if name in COPIES:
            self._copy(name, args, kwargs, stays)
        elif here:
            self._look(name, args, kwargs, tensors)
            stays = stays and not name.startswith("aten._local_scalar_dense")
        plain = tree_map(lambda x: x.numbers if isinstance(x, OnGPU) else x, (args, kwargs))
        out = func(*plain[0], **plain[1])
        if not stays:
            return args[0] if name == "aten.copy_.default" else out
        out = tree_map(lambda x: OnGPU(x) if isinstance(x, torch.Tensor) else x, out)
        return out if name == "aten._to_copy.default" else return_and_correct_aliasing(func, args, kwargs, out)

    def _copy(self, name, args, kwargs, stays) -> None:
        source = args[0] if name == "aten._to_copy.default" else args[1]
        if isinstance(source, OnGPU) == stays:
            return
        unhindered = kwargs.get("non_blocking") or (name == "aten.copy_.default" and len(args) > 2 and args[2])
        host = args[0] if isinstance(source, OnGPU) and name == "aten.copy_.default" else source
        if not (unhindered and (isinstance(source, OnGPU) or getattr(host, "pinned", False))):
            self.wait("copy")

    def _look(self, name, args, kwargs, tensors) -> None:
        """Counts what hands a number to Python or has a size that is one, and refuses a mixture of devices."""
        strangers = [x for x in tensors if not isinstance(x, OnGPU) and x.ndim]
        if strangers:
            raise RuntimeError(f"{name}: tensors of two devices, {[list(x.shape) for x in strangers]} on the CPU")
        masks = args[1] if name in BY_INDEX else ()
        sized = name.startswith(READS) and not (name == "aten.repeat_interleave.Tensor" and kwargs.get("output_size"))
        if sized or any(i is not None and i.dtype == torch.bool for i in masks):
            self.wait("read")


class Event:
    """torch.cuda.Event: to wait for it is no wait where another has come after it."""

    def record(self, stream=None):
        self.n_waits = GPU.current.n_waits

    def synchronize(self):
        if self.n_waits == GPU.current.n_waits:
            GPU.current.wait("event")


def plainly(function):
    """A function whose ops go the way of plain torch: on CUDA Triton's kernels, which wait for nobody."""

    def call(*args, **kwargs):
        OnGPU.takes_kernels = False
        try:
            return function(*args, **kwargs)
        finally:
            OnGPU.takes_kernels = True

    return call


def _made_here(make):
    """torch.tensor and torch.as_tensor, whose copies torch hides from a mode: of the CPU first."""

    def call(data, dtype=None, device=None, **options):
        if device is None or torch.device(device).type != DEVICE.type:
            return make(data, dtype=dtype, device=device, **options)
        return make(data, dtype=dtype, **options).to(device)

    return call


def _pinned(x):
    x = x.clone()
    x.pinned = True
    return x


def _counted(extension):
    """The extension's functions, counting the waits inside them."""

    def counted(function):
        def call(*args):
            before = extension.syncs()
            out = function(*args)
            for _ in range(extension.syncs() - before):
                GPU.current.wait("inside the extension")
            return out

        return call

    found = {name: getattr(extension, name) for name in dir(extension) if not name.startswith("_")}
    return SimpleNamespace(**{name: counted(x) if name[0].islower() else x for name, x in found.items()})


def _patches(extension):
    from mvdream_fast import _C
    from mvdream_fast.guidance import sds
    from mvdream_fast.models.unet import MultiViewUNet
    from mvdream_fast.models.vae import VAE

    for shared in ("HashGrid", "Field", "Meshes", "Attributes", "Silhouettes", "Textured"):
        setattr(extension, shared, getattr(_C, shared))
    yield mock.patch.object(_C, "cuda", _counted(extension), create=True)
    yield mock.patch.object(torch.cuda, "Event", Event)
    yield mock.patch.object(torch.cuda, "current_stream", return_value=SimpleNamespace(cuda_stream=0))
    for name in ("tensor", "as_tensor"):
        yield mock.patch.object(torch, name, _made_here(getattr(torch, name)))
    yield mock.patch.object(torch.Tensor, "pin_memory", _pinned)
    yield mock.patch.object(torch.Tensor, "is_pinned", lambda x: getattr(x, "pinned", False))
    yield mock.patch("mvdream_fast.core.pinned.copies_wait", lambda source, target: source.type != target.type)
    yield mock.patch("mvdream_fast.scene.asset.choose_device", torch.device)
    for owner, name in ((MultiViewUNet, "forward"), (VAE, "posterior"), (sds, "sds_target")):
        yield mock.patch.object(owner, name, plainly(getattr(owner, name)))
    for name, module in sorted(sys.modules.items()):
        if name.startswith("mvdream_fast.ops.") and hasattr(module, "runs_natively"):
            yield mock.patch.object(module, "runs_natively", _is_native)


def _is_native(*tensors, devices=()):
    known = [x for x in tensors if x is not None]
    return "cuda" in devices and all(isinstance(x, OnGPU) and x.dtype == torch.float32 for x in known)
