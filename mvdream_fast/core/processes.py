"""Several processes of one run: who they are, which part of a batch each takes, and how they share gradients.

`accelerate launch` and `torchrun` start them alike. A single process passes through all of this untouched, and what a
step draws at random does not depend on the number of processes. A leaf; torch.distributed is imported where it is used.
"""

import os
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, TypeVar

from mvdream_fast.core.machine import in_format

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Rows = TypeVar("Rows", "Tensor", list)
BACKEND = "cpu:gloo,cuda:nccl"  # what is agreed on travels over gloo even between GPUs, so that no stream waits for it


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run. The first one writes all files; the others only compute."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def part(self, rows: Rows) -> Rows:
        """This process' equal share of a list or of a tensor's first dimension: neighbouring rows."""
        n = len(rows) // self.world
        return rows[self.rank * n : (self.rank + 1) * n] if self.world > 1 else rows

    def mean(self, value: float) -> float:
        """The mean over all processes, which all have to ask; NaN and infinity spread to all."""
        if self.world == 1:
            return value
        return sum(self._gathered([value])) / self.world

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all processes, so that all decide alike."""
        if self.world == 1:
            return list(values)
        rows = self._gathered(values)
        return [int(max(rows[i :: len(values)])) for i in range(len(values))]

    def wait(self) -> None:
        """Until all processes are here."""
        self.largest(0)

    def _gathered(self, values: Iterable[float]) -> list[float]:
        import torch
        import torch.distributed as dist

        own = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(rows, own)
        return torch.cat(rows).tolist()


ALONE = Ranks()


def launched() -> tuple[int, int, int]:
    """(processes of the run, those on this machine, this one's number on it) as the launcher's variables say."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    return world, int(os.environ.get("LOCAL_WORLD_SIZE", world)), int(os.environ.get("LOCAL_RANK", 0))


def is_first() -> bool:
    """Whether this is the process of a run that writes, as the launcher's variables say, before they have met."""
    return int(os.environ.get("RANK", 0)) == 0


def meeting_place() -> str:
    """The address of the first process, as the launcher's variables say."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def join() -> Ranks:
    """Meets the other processes that a launcher started; ALONE where there are none."""
    if launched()[0] == 1:
        return ALONE
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group(BACKEND if torch.cuda.is_available() else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave(ranks: Ranks) -> None:
    """Ends this process' part of the group."""
    if ranks.world > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def replicated(model: "nn.Module", ranks: Ranks) -> "nn.Module":
    """The model with its gradients averaged over all processes (DDP), each holding all of it; itself where ALONE."""
    if ranks.world == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    # Said of 1x1 convolutions, whose two memory layouts are one.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # 2D steps leave the camera's layers out: of those no process has a gradient, and they stay as they are.
    return DistributedDataParallel(model, find_unused_parameters=True)


def sharded(
    model: "nn.Module", units: "list[list[nn.Module]]", halves: "list[list[nn.Module]]", ranks: Ranks, group: int
) -> "nn.Module":
    """The model with weights, gradients and optimiser state spread over `group` processes each (FSDP2), in place.

    `units` are gathered one by one while they compute, the rest of the model as a whole. So are `halves`, in bfloat16,
    which must be what they are given; their gradients are summed in float32. Where there are several groups, gradients
    are averaged over them as well.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Said of a unit that returns a view: what is added to it in place is added without autograd alone.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    device = next(model.parameters()).device
    in_format(model, torch.contiguous_format)  # FSDP2 cuts nothing else
    whole = group == ranks.world
    shape, names = ((group,), ("shard",)) if whole else ((ranks.world // group, group), ("copy", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    in_half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for unit in halves:
        fully_shard(unit, mesh=mesh, mp_policy=in_half)
    for unit in [*units, [model]]:
        fully_shard(unit, mesh=mesh)
    return model


def unsynchronised(model: "nn.Module", wanted: bool) -> AbstractContextManager:
    """Inside, where `wanted`, a replicated model keeps its gradients to itself: all but the last of several batches."""
    no_sync = getattr(model, "no_sync", None)
    return no_sync() if wanted and no_sync is not None else nullcontext()


class _Sharded(Protocol):
    """torch's DTensor as it is used here; its module takes long to import where nothing is sharded."""

    device: "torch.device"
    device_mesh: Any
    placements: Any

    def detach(self) -> "_Sharded": ...

    def full_tensor(self) -> "Tensor": ...

    def to_local(self) -> "Tensor": ...


def is_sharded(x: "Tensor") -> TypeGuard[_Sharded]:
    """Whether a tensor is spread over several processes."""
    return hasattr(x, "full_tensor")


def whole(x: "Tensor", ranks: Ranks) -> "Tensor":
    """A sharded tensor gathered, on the CPU of the first process alone (elsewhere empty); any other tensor itself.

    All processes have to ask.
    """
    if not is_sharded(x):
        return x
    full = x.detach().full_tensor()
    return full.cpu() if ranks.first else full.new_empty(0)


def placed(full: "Tensor", like: "Tensor") -> "Tensor":
    """This process' share of a whole tensor, where `like` is sharded; else, or of one that is it already, itself."""
    if any(map(is_sharded, [full])) or not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local(x: "Tensor") -> "Tensor":
    """This process' own share of a sharded tensor, detached; any other tensor itself."""
    return x.detach().to_local() if is_sharded(x) else x


def number(x: "Tensor") -> float:
    """A scalar's value, summed up from all processes where it is sharded."""
    return (x.full_tensor() if is_sharded(x) else x).item()
