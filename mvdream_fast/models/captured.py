"""A function of tensors as CUDA graphs, one for each kind of call: one launch where Python made hundreds.

What a call is told is copied into buffers that stay, the graph works on those, and what it answers is copied out. On a
CPU, and wherever a graph cannot be had or trusted, the function itself is called. No model and no weight lives here.
"""

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mvdream_fast.core.files import lines
from mvdream_fast.models.plain import hooked_everywhere, is_hooked, is_patched

MOST = 16  # kinds of call that are remembered; more are dynamic shapes
_captures = 0  # under way, in all threads: autograd's have to know, others lose nothing
_INTERNAL = frozenset(nn.Module().__dict__)
_PLAIN = frozenset((bool, int, float, str))
_TENSORS = (nn.Parameter, Tensor, nn.Buffer)
_KNOWN = ("mvdream_fast.", "diffusers.", "transformers.", "peft.")  # whose modules are switched by their attributes

Answer = TypeVar("Answer")
Work = Callable[..., tuple[Tensor, ...]]
Argument = Tensor | nn.Module | Hashable  # a tensor is copied in, a module watched, anything else is part of the key


class Graph(Protocol):
    """Work on one device, recorded once."""

    def __init__(self, device: torch.device): ...

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Does the work once, away from the current stream: what is compiled, chosen or allocated at first use."""
        ...

    def record(self, work: Callable[[], Answer]) -> Answer:
        """Records the work without doing it; what it returns holds numbers after a replay."""
        ...

    def replay(self) -> None:
        """Does the recorded work, on what its tensors hold now."""
        ...


def graphs_on(device: torch.device) -> type[Graph] | None:
    """The kind of graph for a device; None where there is none. The one place where it is chosen."""
    return CudaGraph if device.type == "cuda" else None


def is_capturing() -> bool:
    """Whether a graph is being recorded, or warmed up: an answer kept from before would be kept for ever."""
    return _captures > 0


class Captured:
    """`work(*arguments)` on a device, as a graph from the second call of a kind on; called as `work` is.

    A kind is told by the shapes, strides, dtypes and devices of the tensors, by all other arguments and by torch's
    settings. Weights may change their numbers, which a graph reads anew. Where anything else of the modules changes
    (a weight's memory, a layer, an adapter, a mode, a setting), all graphs are dropped: what is switched at every call
    is never captured. Where it stays with the function itself, that is said once, as a RuntimeWarning.

    Args:
        name: of the work, for what is said.
        work: a function of nothing but its arguments: one tensor or more, modules, None and hashable settings.
        parameters: those whose `grad` it adds to. Their gradients then stay in the same memory from graph to graph;
            `zero_grad(set_to_none=True)` between two steps is understood.
        enabled: False leaves it at `work`.
    """

    def __init__(self, name: str, work: Work, parameters: Sequence[nn.Parameter] = (), enabled: bool = True):
        self.name, self.work, self.parameters, self.enabled = name, work, parameters, enabled
        self._state: list[Hashable] | None = None  # of the modules, as the graphs have it
        self._changes = 0  # of that, since there was a graph
        self._kinds: dict[Hashable, _Recorded | None] = {}  # the latest used last; None: met once
        self._refused: set[Hashable] = set()
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._told = False

    def is_active(self, device: torch.device) -> bool:
        """Whether calls with tensors of this device may become graphs."""
        return self.enabled and not is_capturing() and graphs_on(device) is not None

    def __call__(self, *arguments: Argument) -> tuple[Tensor, ...]:
        """What `work` returns: from a graph copies, without a graph of autograd, that the caller may keep.

        Raises: RuntimeError that names the work, where its graph fails.
        """
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if not self.is_active(tensors[0].device):
            return self.work(*arguments)
        kind = _kind(arguments, tensors[0].device)
        if not self._is_ready(arguments) or kind in self._refused:
            return self.work(*arguments)
        if kind not in self._kinds:
            answer, recorded = self.work(*arguments), None
            self._is_ready(arguments)  # a first use may move weights
        else:
            recorded = self._kinds.pop(kind) or self._record(arguments, tensors, kind)
            answer = self.work(*arguments) if recorded is None else self._replay(recorded, tensors)
        self._kinds[kind] = recorded
        if len(self._kinds) > MOST and self._kinds.pop(next(iter(self._kinds))) is None:
            self._say("its shapes or settings change from call to call")
        return answer

    def forget(self) -> None:
        """Drops all graphs and their memory."""
        self._kinds.clear()
        self._refused.clear()
        self._gradients.clear()

    def _is_ready(self, arguments: Sequence[Argument]) -> bool:
        """Whether there may be graphs of the modules as they are; drops those of the modules as they were."""
        try:
            state = _state(arguments)
        except _Opaque as error:
            self.forget()
            self._say(str(error))
            return False
        if state != self._state:
            self.forget()
            self._state = state
            self._changes += 1
            if self._changes == MOST:
                self._say("its weights, layers or adapters change from call to call")
        return True

    def _record(self, arguments: Sequence[Argument], tensors: list[Tensor], kind: Hashable) -> "_Recorded | None":
        """The graph of a kind of call; None where there is none (yet). Leaves the gradients as they are."""
        graph_class = graphs_on(tensors[0].device)
        aside = [(p, p.grad) for p in self.parameters]
        try:
            assert graph_class is not None  # is_active has asked
            with torch.no_grad():
                inputs = [torch.empty_like(x).copy_(x) for x in tensors]
            given = iter(inputs)
            own = [next(given) if isinstance(x, Tensor) else x for x in arguments]
            graph = graph_class(inputs[0].device)
            for p in self.parameters:
                p.grad = None
            with _capturing():
                graph.warm_up(lambda: self.work(*own))
                if _state(arguments) != self._state:  # the next call is soon enough
                    return None
                touched = {p: p.grad for p in self.parameters if p.grad is not None}
                for p, gradient in touched.items():
                    p.grad = self._gradients.setdefault(p, gradient)
                outputs = graph.record(lambda: tuple(x.detach() for x in self.work(*own)))
            self._changes = 0
            return _Recorded(graph, inputs, outputs, [*touched])
        except Exception as error:  # whatever a capture cannot do: what is wrong with the call, the eager one says
            self._refused.add(kind)
            self._say(_reason(error))
            return None
        finally:
            for p, gradient in aside:
                p.grad = gradient

    def _replay(self, recorded: "_Recorded", tensors: list[Tensor]) -> tuple[Tensor, ...]:
        try:
            with torch.no_grad():
                self._gather(recorded.touched)
                _copy(tensors, recorded.inputs)
                recorded.graph.replay()
                return tuple(x.clone() for x in recorded.outputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.name}: its CUDA graph failed: {_first_line(error)}; graphs=False or --no-graphs shows where"
            ) from error

    def _gather(self, parameters: Sequence[nn.Parameter]) -> None:
        """Brings gradients to where the graphs add to them: zeros for those that are None."""
        empty: list[Tensor] = []
        for p in parameters:
            gradient, own = p.grad, self._gradients[p]
            if gradient is None:
                empty.append(own)
            elif gradient is not own:
                own.copy_(gradient)
            p.grad = own
        if empty:
            torch._foreach_zero_(empty)  # pyright: ignore[reportPrivateImportUsage] # not in torch's stubs

    def _say(self, why: str) -> None:
        if not self._told:
            self._told = True
            way = "graphs=False or --no-graphs leaves the attempt out"
            warnings.warn(f"{self.name} runs without a CUDA graph: {why}; {way}", RuntimeWarning, stacklevel=4)


class _Recorded(NamedTuple):
    """A graph with the tensors it reads its arguments from and leaves its answers in."""

    graph: Graph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]
    touched: list[nn.Parameter]


class CudaGraph:
    """torch.cuda.CUDAGraph. All graphs of a device share the memory between their inputs and outputs, as no two of them
    run at the same time: calls have to come from one stream."""

    def __init__(self, device: torch.device):
        self.device, self.graph, self.pool = device, torch.cuda.CUDAGraph(), _Pool.of(device)
        self.stream = _side_stream(device)

    def warm_up(self, work: Callable[[], Any]) -> None:
        """See `Graph`; on the stream that records, which then has its workspaces."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            work()
        current.wait_stream(self.stream)

    def record(self, work: Callable[[], Answer]) -> Answer:
        """See `Graph`. Other threads, as the one that pins batches, may go on allocating meanwhile."""
        torch.clear_autocast_cache()  # a weight that was cast before would be cast no more
        capture = torch.cuda.graph(
            self.graph, pool=self.pool.handle, stream=self.stream, capture_error_mode="thread_local"
        )
        try:
            with torch.cuda.device(self.device), capture:
                return work()
        finally:
            torch.clear_autocast_cache()  # what was cast in the graph holds no numbers yet

    def replay(self) -> None:
        """See `Graph`; waits for nothing."""
        self.graph.replay()


class _Pool:
    """Memory that graphs of one device share, as long as there is one of them: torch refuses a handle after that."""

    _alive: "weakref.WeakValueDictionary[torch.device, _Pool]" = weakref.WeakValueDictionary()

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()

    @classmethod
    def of(cls, device: torch.device) -> "_Pool":
        pool = cls._alive.get(device)
        if pool is None:
            pool = cls._alive[device] = cls()
        return pool


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def _capturing() -> Iterator[None]:
    global _captures
    _captures += 1
    try:
        yield
    finally:
        _captures -= 1


def _kind(arguments: Sequence[Argument], device: torch.device) -> Hashable:
    """What tells calls apart that need graphs of their own."""
    told = tuple((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else _named(x) for x in arguments)
    on = torch.is_autocast_enabled(device.type)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings = (
        torch.get_autocast_dtype(device.type) if on else None,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        matmul.allow_tf32,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        torch.backends.cuda.preferred_blas_library(),
        cudnn.enabled,
        cudnn.allow_tf32,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    return told, settings


def _named(x: Argument) -> Hashable:
    """A setting by its value, or where it holds a list by itself."""
    try:
        hash(x)
    except TypeError:
        return _Same(x)
    return x


class _Opaque(Exception):
    """Something in a module that a graph would pass over; says what."""


def _state(arguments: Sequence[Argument]) -> list[Hashable]:
    """All of the modules that a graph has for ever: which layers, where their weights lie, modes and settings.

    Not the numbers of the weights. Raises: _Opaque.
    """
    if hooked_everywhere():
        raise _Opaque("a hook is on all modules")
    found: list[Hashable] = []
    for x in arguments:
        if isinstance(x, nn.Module):
            _describe(x, found)
    return found


def _describe(module: nn.Module, found: list[Hashable]) -> None:
    """Appends a module's state. In one go, as every call comes by here: a millisecond for a full-size UNet."""
    kind, held = type(module), module.__dict__
    if is_hooked(module):
        raise _Opaque(f"a hook is on a {kind.__name__}")
    if is_patched(module):
        raise _Opaque(f"a {kind.__name__} has a forward of its own")
    if not kind.__module__.startswith(("torch.nn.", *_KNOWN)):
        raise _Opaque(f"what a {kind.__name__} does may be switched unseen")
    found += kind, held["training"]
    for name in held.keys() - _INTERNAL if len(held) > len(_INTERNAL) else ():
        value = held[name]
        found += (name, value) if type(value) in _PLAIN else _setting(name, value)
    for tensors in (held["_parameters"], held["_buffers"]):
        for x in tensors.values():
            if x is not None:
                if type(x) not in _TENSORS:
                    raise _Opaque(f"a weight of a {kind.__name__} is a {type(x).__name__}")
                found += x.data_ptr(), x.dtype, x.shape, x.requires_grad
    for child in held["_modules"].values():
        if child is not None:
            _describe(child, found)


def _setting(name: str, value: Any) -> Sequence[Hashable]:
    """What may be switched: plain values and lists and dicts of them (an adapter's), and public objects as a whole."""
    if type(value) in _PLAIN:
        return [name, value]
    if type(value) in (list, tuple) and all(type(x) in _PLAIN for x in value):
        return [name, tuple(value)]
    if type(value) is dict and all(type(x) in _PLAIN for x in value.values()):
        return [name, tuple(value.items())]
    return [] if name.startswith("_") or value is None else [name, _Same(value)]


class _Same:
    """An object that equals nothing but itself, kept alive so that no other takes its place."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copies tensors, all those of a dtype in one launch."""
    kinds = {x.dtype for x in targets}
    for dtype in kinds:
        chosen = [i for i, x in enumerate(targets) if x.dtype == dtype]
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage] # as above
            [targets[i] for i in chosen], [sources[i] for i in chosen]
        )


def _reason(error: BaseException) -> str:
    """Why a capture failed: where one went wrong, its end is an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return "there is not enough memory" if isinstance(error, torch.OutOfMemoryError) else _first_line(error)


def _first_line(error: BaseException) -> str:
    return (lines(str(error).strip()) or [type(error).__name__])[0][:200]
