"""What the public edges of the ops share: checks in the house's one sentence, which way a call goes, the way down.

Two families share it: the packed-sample ops, with a backend of the extension for each device, and the UNet's ops, with
C++ on a CPU and Triton on a GPU. No maths here.
"""

import operator
import os
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

from mvdream_fast.core.machine import available_cores

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WIDE_FLOATS = (torch.float32, torch.float64)  # what the packed-sample ops take
BACKENDS = ("cpu", "cuda")  # what the extension has of them
MAPPED = 32 << 20  # bytes from which glibc's malloc asks the system for each block by itself, and gives it back


def require(
    ok: bool, op: str, argument: str, requirement: str, got: object, remedy: str, error: type[Exception] = ValueError
) -> None:
    """Raise `error` as `<op>: <argument> must be <requirement>, got <value>; <what to do>` unless `ok`."""
    if not ok:
        raise error(f"{op}: {argument} must be {requirement}, got {got}; {remedy}")


def check_float(op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raises TypeError where a tensor is of a dtype that the op does not take."""
    if getattr(x, "dtype", None) not in dtypes:  # words only for who needs them: every call comes by here
        check_tensors(op, **{name: x})
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        wanted = f"{', '.join(names[:-1])} or {names[-1]}"
        raise TypeError(f"{op}: {name} must be {wanted}, got {x.dtype}; convert it first")


def check_tensors(op: str, **arguments: object) -> None:
    """Each argument is a tensor, and no array of another library, which has a shape and a dtype, too."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}; pass a tensor")


def check_shaped(
    op: str, name: str, x: Tensor, shape: Sequence[int | None], dtypes: tuple[torch.dtype, ...] = WIDE_FLOATS
) -> None:
    """A tensor of this shape and one of these dtypes; None stands for any length."""
    check_tensors(op, **{name: x})
    wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
    fits = x.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, x.shape, strict=True))
    require(fits, op, name, f"of shape {wanted}", list(x.shape), "reshape it")
    check_float(op, name, x, dtypes)


def number(op: str, name: str, value: Any, remedy: str) -> float:
    """A number of any library as one of Python's; not "4", and no list of one."""
    if not isinstance(value, (str, bytes)):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}; {remedy}")


def count(op: str, name: str, value: Any, remedy: str) -> int:
    """A whole number of any library, as `number`; not 4.0."""
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{op}: {name} must be a whole number, got {type(value).__name__}; {remedy}") from None


def check_probability(op: str, name: str, value: Any, remedy: str = "pass a probability") -> None:
    """A number in [0, 1]."""
    require(0 <= number(op, name, value, remedy) <= 1, op, name, "in [0, 1]", value, remedy)


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Every tensor on the device of the first."""
    (first, like), *rest = [(name, x) for name, x in tensors.items() if x is not None]
    for name, x in rest:
        if getattr(x, "device", None) != like.device:
            check_tensors(op, **{name: x})
            raise RuntimeError(
                f"{op}: {name} must be on the device of {first}, got {x.device} and {like.device}; move one"
            )


def check_like(op: str, name: str, x: Tensor, other: str, like: Tensor) -> None:
    """`x` must sit on the device of `like` and have its dtype or float32 (parameters kept in full precision)."""
    if getattr(x, "device", None) != like.device:
        check_tensors(op, **{name: x})
        raise RuntimeError(f"{op}: {name} must be on the device of {other}, got {x.device} and {like.device}; move one")
    if x.dtype != like.dtype and x.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be {like.dtype} (as {other}) or float32, got {x.dtype}; convert it first")


def by_name(x: Tensor) -> bool:
    """Whether a call goes through the registered op: torch.compile is tracing, or x is on the meta device, where only
    shapes are asked for."""
    return torch.compiler.is_compiling() or (x.is_meta and not torch._C._are_functorch_transforms_active())


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device; torch refuses to answer for the meta device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether any tensor is being vmapped over (torch.func.vmap), be it inside of other transforms; cheap without."""
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(_has_batched_layer(x) for x in tensors if x is not None)


def _has_batched_layer(x: Tensor) -> bool:
    while is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return True
        x = get_unwrapped(x)
    return False


def vmap_error(op: str) -> RuntimeError:
    """The error of an op under torch.func.vmap, which it does not know."""
    return RuntimeError(f"{op}: arguments must be plain tensors, got a vmapped one; put the extra axis into the batch")


def as_constant(op: str, run: Callable[..., Any], *arguments: Any) -> Any:
    """run(*arguments) of an op without derivatives, outside of all transforms of torch.func, which see a constant.

    arguments: tensors, lists and tuples of them, and whatever holds none. Raises: RuntimeError under vmap.
    """
    if not torch._C._are_functorch_transforms_active():
        return run(*arguments)
    if is_batched(*(x for x in arguments if isinstance(x, Tensor))):
        raise vmap_error(op)
    with torch._C._DisableFuncTorch():
        return run(*map(unwrapped, arguments))


def unwrapped(x: Any) -> Any:
    """What the transforms of torch.func have wrapped, of a tensor or of each in a list or tuple."""
    if isinstance(x, (list, tuple)):
        return [unwrapped(each) for each in x]
    while isinstance(x, Tensor) and is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


def is_watched() -> bool:
    """Whether a transform of torch.func or a forward-mode derivative looks on, which only plain torch can answer."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def runs_natively(
    *tensors: Tensor | None,
    devices: tuple[str, ...] = ("cpu",),
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> bool:
    """Whether the extension may read and replace these: plain tensors of such dtypes on such devices that nothing
    watches."""
    if is_watched():
        return False
    return all(
        x is None or (_is_plain(x) and x.device.type in devices and x.dtype in dtypes and _has_its_numbers(x))
        for x in tensors
    )


def _has_its_numbers(x: Tensor) -> bool:
    """Whether what lies at its address, by its strides, is what it holds, and not the negative of it."""
    return x.layout == torch.strided and not x.is_neg()


def plain32(x: Tensor) -> Tensor:
    """Contiguous float32 numbers of a tensor, for the extension to read where there is no derivative."""
    return x.detach().resolve_neg().float().contiguous()


def _is_plain(x: Tensor) -> bool:
    plain = type(x) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return plain and not is_legacy_batchedtensor(x)  # of torch.autograd.grad(is_grads_batched=True)


def is_mapped(x: Tensor | None) -> bool:
    """Whether a tensor stands for a batch of its like, as cotangents do: by is_grads_batched or by torch.func."""
    return x is not None and (is_legacy_batchedtensor(x) or is_functorch_wrapped_tensor(x))


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd wants a node for a call on these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_followed(*tensors: Tensor | None) -> bool:
    """Whether a call on these must be a torch.autograd.Function; without, a launch costs the CPU less."""
    return is_recorded(*tensors) or is_watched()


def vjp(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `function` with a graph of their own, for the second derivatives of an op; None where unwanted.

    Zeros for what no output with a cotangent depends on. In full precision under autocast, too, as the op itself is.
    With a graph of the gradients where one is recorded: for batched cotangents it need not be.
    """
    keep = torch.is_grad_enabled()
    with torch.autocast(inputs[0].device.type, enabled=False), torch.enable_grad():
        # As inputs of their own: where one was made of another, the way between them is not the op's.
        inputs = [x.view_as(x) if x.requires_grad else x for x in inputs]
        wanted = [x for x in inputs if x.requires_grad]
        outputs = zip(function(*inputs), cotangents, strict=True)
        pairs = [(y, d) for y, d in outputs if d is not None and y.requires_grad]
        if pairs:
            options = {"create_graph": keep, "materialize_grads": True}
            gradients = iter(torch.autograd.grad([y for y, _ in pairs], wanted, [d for _, d in pairs], **options))
        else:  # torch.autograd.grad refuses to start from nothing
            gradients = map(torch.zeros_like, wanted)
    return [next(gradients) if x.requires_grad else None for x in inputs]


def run_kernels(op: str, name: str, x: Tensor, function: str, *arguments: Any) -> Any:
    """mvdream_fast.kernels.<op>.<function>(*arguments) for a CUDA tensor `x`; it launches on its tensors' device."""
    return getattr(load_kernels(op, name, x), function)(*arguments)


def load_kernels(op: str, name: str, x: Tensor) -> ModuleType:
    """The module `mvdream_fast.kernels.<op>`, for a CUDA tensor `x`; says what to install where Triton is missing."""
    if x.dtype == torch.float64:
        raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16 on CUDA, got {x.dtype}; convert it first")
    if op not in _kernels:
        _kernels[op] = _import_kernels(op, name, x)
    return _kernels[op]


_kernels: dict[str, ModuleType] = {}


def _import_kernels(op: str, name: str, x: Tensor) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(f"mvdream_fast.kernels.{op}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            f"{op}: {name} must be a CPU tensor where Triton is not installed, got one on {x.device}; "
            "install mvdream_fast[gpu]"
        ) from error


def load_native(op: str, like: Tensor | None = None) -> ModuleType:
    """The extension's functions for the device of `like`, a CPU for None: on CUDA under the same names and signatures.

    Raises: RuntimeError where the extension, or its CUDA part, is not built.
    """
    try:
        from mvdream_fast import _C
    except ImportError as error:
        raise RuntimeError(
            f"{op}: the extension mvdream_fast._C must be built for CPU tensors, got {error}; reinstall mvdream_fast"
        ) from error
    if like is None or not like.is_cuda:
        return _C
    if not hasattr(_C, "cuda"):
        raise RuntimeError(
            f"{op}: tensors must be on a CPU where mvdream_fast was built without CUDA, got {like.device}; "
            "install nvcc and reinstall with CMAKE_ARGS=-DMVDREAM_FAST_CUDA=ON"
        )
    return _C.cuda


def thread_count() -> int:
    """Threads of a native call: torch's number, or where none was chosen the cores that the control group allows.

    Torch counts the machine's cores, of which a container may have few; more threads than those wait for each other.
    """
    return _allowed() if torch.get_num_threads() == _torchs_own() else torch.get_num_threads()


@cache
def _torchs_own() -> int:
    """Torch's number of threads at the first native call."""
    return torch.get_num_threads()


@cache
def _allowed() -> int:
    chosen = "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ
    return _torchs_own() if chosen else min(_torchs_own(), available_cores())


def queue_of(like: Tensor) -> object:
    """What native calls take last: on a CPU the number of threads; on CUDA the current stream with torch's settings,
    and the tensor's device, which the call makes current.

    torch.use_deterministic_algorithms and torch.backends.cuda.matmul.allow_tf32 are the settings that count.
    """
    if not like.is_cuda:
        return thread_count()
    from mvdream_fast import _C

    stream = torch.cuda.current_stream(like.device).cuda_stream
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return _C.cuda.Queue(stream, torch.are_deterministic_algorithms_enabled(), tf32, like.device.index)


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and on CUDA from a multiple of 16 bytes on, which vector loads need; a copy where it is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if has_vector_loads(tensor) and tensor.data_ptr() % 16 else tensor


def has_vector_loads(tensor: Tensor) -> bool:
    """Whether the kernels for this tensor's device read several numbers at once."""
    return tensor.is_cuda


def new_result(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor on the device of `like`, not filled, for an op that may have large results.

    From MAPPED bytes on a CPU's memory is new at every call, and the system clears it as it is first written: page by
    page, which takes longer than an op like `rasterize`. Large pages are asked for, which it clears as fast as it can.
    """
    result = like.new_empty(*shape, dtype=dtype)
    if result.device.type == "cpu" and result.nbytes > MAPPED:
        load_native("new_result").advise_huge_pages(address(result), result.nbytes)
    return result


def address(tensor: Tensor | None) -> int:
    """Where a contiguous tensor's numbers lie, 0 for None; the caller keeps it alive."""
    return 0 if tensor is None else tensor.data_ptr()
