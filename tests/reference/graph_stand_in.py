"""A CUDA graph's stand-in on a CPU: refuses what a capture refuses, records what torch dispatches, and does it again on
the same tensors. As with a CUDA graph, recording changes nothing and its results hold no numbers before a replay.

It sees what is dispatched. Our C++ on CPU tensors is not, so `capturable` sends the UNet's ops through torch.library,
whose entries are dispatched as one op each, and leaves the convolutions to torch.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from reference.waits import BY_INDEX, METHODS, READS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvdream_fast.models import captured, functional

OPS = ("cross_view_attention", "group_norm_silu", "geglu", "time_camera_embedding")
# On a GPU these copy from Python's memory, or ask it for numbers.
FROM_PYTHON = ("aten.lift_fresh", "aten._pin_memory", "aten.set_.source_Storage")
RANDOM = ("get_rng_state", "set_rng_state", "initial_seed", "manual_seed")


class Refused(RuntimeError):
    """What a capture cannot hold."""


class GraphStandIn:
    """`models.captured.Graph` for tensors of the CPU. `made` holds the graphs of a test, `replays` counts their uses.

    outside: what the recorded work reads that was not made in it, by address: inputs, weights, and what is baked in.
    """

    made: ClassVar[list["GraphStandIn"]] = []
    replays: ClassVar[int] = 0

    def __init__(self, device: torch.device):
        self.ops: list[tuple[Any, tuple, dict, Any]] = []
        self.outside: dict[int, Tensor] = {}

    def warm_up(self, work: Callable[[], Any]) -> None:
        work()

    def record(self, work: Callable[[], Any]) -> Any:
        with _Recording(self) as recording:
            outputs = work()
        recording.undo()
        GraphStandIn.made.append(self)
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        GraphStandIn.replays += 1
        with torch.autocast("cpu", enabled=False):  # the casts are among what was recorded
            for op, args, kwargs, out in self.ops:
                again = op(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: GraphStandIn):
        super().__init__()
        self.graph, self.made, self.kept, self.fresh = graph, set(), [], []
        self.undone = contextlib.ExitStack()

    def __enter__(self):
        for owner, names in ((Tensor, (*METHODS, "numpy")), (torch, RANDOM)):
            for name in names:
                plain = getattr(owner, name)
                self.undone.callback(setattr, owner, name, plain)
                setattr(owner, name, _refusing(name))
        return super().__enter__()

    def __exit__(self, *error):
        self.undone.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(op)
        indices = args[1] if name in BY_INDEX else ()
        if name.startswith((*READS, *FROM_PYTHON)) or any(i is not None and i.dtype == torch.bool for i in indices):
            raise Refused(f"{name} waits for the device")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in given:
            if _memory(x) not in self.made:
                self.graph.outside.setdefault(_memory(x), x)
        self._keep(op, args, kwargs)
        out = op(*args, **kwargs)
        known = {_memory(x) for x in given}
        fresh = [x for x in tree_leaves(out) if isinstance(x, Tensor) and _memory(x) not in known]
        self.made |= {_memory(x) for x in fresh}
        self.fresh += fresh
        self.graph.ops.append((op, args, kwargs, out))
        return out

    def _keep(self, op, args, kwargs) -> None:
        """What a call is about to write into, if it was there before."""
        schema = op._schema.arguments
        for i, argument in enumerate(schema):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for x in tree_leaves(value):
                if isinstance(x, Tensor) and _memory(x) not in self.made:
                    self.kept.append((x, x.clone()))

    def undo(self) -> None:
        """Leaves what was there before as it was, and no numbers in what is new."""
        with torch.no_grad():
            for x, before in reversed(self.kept):
                x.copy_(before)
            for x in self.fresh:
                if x.is_floating_point():
                    x.fill_(float("nan"))


def capturable(monkeypatch, graph: type = GraphStandIn) -> None:
    """Graphs on the CPU, and ways through the UNet that they see."""
    GraphStandIn.made, GraphStandIn.replays = [], 0
    monkeypatch.setattr(captured, "graphs_on", lambda device: graph)
    for name in OPS:
        monkeypatch.setattr(sys.modules[f"mvdream_fast.ops.{name}"], "by_name", lambda x: True)
    monkeypatch.setattr(functional, "_by_winograd", lambda module, x: False)
    monkeypatch.setattr(functional, "_by_gemm", lambda module, x: False)


def _refusing(name: str) -> Callable:
    def refuse(*_, **__):
        raise Refused(f"{name} waits for the device, or is not the device's")

    return refuse


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
