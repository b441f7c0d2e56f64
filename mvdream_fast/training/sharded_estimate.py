"""What one of several processes that share a model's memory (`train --shard fsdp2`) will need: bytes that it holds, and
bytes that pass its link in a step. Told on the meta device for any number of processes, at full width, on any machine:
`python -m mvdream_fast.training.sharded_estimate 1 8 64` prints it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Annotated

import torch
import tyro
from torch import nn

from mvdream_fast.checkpoints.manifest import build
from mvdream_fast.core import cli, memory
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.memory import gb
from mvdream_fast.models.config import SD21, ModelConfig
from mvdream_fast.models.text import TextEncoder
from mvdream_fast.models.unet import MultiViewUNet
from mvdream_fast.training.step_estimate import FLOAT, estimate_step
from mvdream_fast.training.unet import TextAndUNet, sharding_units

_step = cache(estimate_step)  # the same for any number of processes, and seconds of work
HALF = 2  # bytes of a bfloat16
AT_ONCE = 2  # units that are whole at a time: one computes, the next is on its way


@dataclass(frozen=True)
class ShardedEstimate:
    """Of one process and one update.

    flops: floating-point operations. memory: bytes by what they are for; `first_more`, what the first process holds
    besides. weights, trained: numbers that this process keeps, padding included. all_gather: bytes that it receives
    to make units whole; reduce_scatter: bytes of gradients that it sends; all_reduce: bytes of gradients that it
    exchanges with the same part of other copies; n_collectives: how many calls these are. checkpoint: bytes that it
    writes.
    """

    flops: float
    memory: dict[str, int]
    first_more: int
    weights: int
    trained: int
    all_gather: int
    reduce_scatter: int
    all_reduce: int
    n_collectives: int
    checkpoint: int

    @property
    def total(self) -> int:
        """Bytes of all parts, on a process that is not the first."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class _Unit:
    """Parameters that are gathered together: numbers of each process' padded share, all and those that are trained."""

    group: int
    share: int
    trained: int
    itemsize: int  # of a number under way

    @property
    def gathered(self) -> int:
        return self.group * self.share * self.itemsize


def estimate_sharded(
    config: ModelConfig,
    scenes: int,
    world: int,
    *,
    group: int | None = None,
    n_views: int = 4,
    resolution: int | None = None,
    accumulate: int = 1,
    half: bool = True,
    checkpointing: bool = True,
    train_text: bool = True,
    ema: bool = True,
) -> ShardedEstimate:
    """A multi-view training step of `scenes` encoded scenes on each of `world` processes, `group` of which (default:
    all) share one copy of the model. Weights, gradients, Adam and average are float32; `half`: activations, and weights
    under way, are bfloat16.

    Raises: ArgumentError where the groups do not divide the processes, ModelError for a configuration that cannot be
    built.
    """
    group = world if group is None else group
    if world < 1 or group < 1 or world % group:
        raise ArgumentError(f"group must be a divisor of the {world} processes, got {group}")
    units = _units(config, group, half, train_text)
    step = _step(
        config, scenes * n_views, resolution or config.vae.image_size, n_views=n_views, accumulate=accumulate,
        half=half, checkpointing=checkpointing, train_text=train_text, preserve=False,
    )  # fmt: skip
    weights, trained = sum(u.share for u in units), sum(u.trained for u in units)
    others, copies = (group - 1) / group, world // group
    # Forward and backward gather a unit each; the rest, the last of `units`, stays whole in between.
    gathers = [2 if unit.trained and unit is not units[-1] else 1 for unit in units]
    received = sum(n * unit.gathered for n, unit in zip(gathers, units))
    reductions = sum(1 for unit in units if unit.trained) * (1 if copies == 1 else 2)
    return ShardedEstimate(
        flops=step.flops,
        memory=_memory(config, units, step.memory["activations"], weights, trained, ema),
        first_more=FLOAT * group * weights,
        weights=weights,
        trained=trained,
        all_gather=round(accumulate * received * others),
        reduce_scatter=round(accumulate * FLOAT * group * trained * others),
        all_reduce=round(accumulate * 2 * FLOAT * trained * (copies - 1) / copies),
        n_collectives=accumulate * (sum(gathers) + reductions),
        checkpoint=FLOAT * trained * (3 + ema),
    )


def _memory(
    config: ModelConfig, units: list[_Unit], activations: int, weights: int, trained: int, ema: bool
) -> dict[str, int]:
    with torch.device("meta"):
        vae = sum(p.numel() for p in build("vae", config).parameters())
    inner, rest = units[:-1], units[-1]
    leaving = max(u.group * u.trained * (u.itemsize + FLOAT) for u in inner)
    return {
        memory.PROGRAM: memory.PROGRAM_BYTES,
        "weights": FLOAT * weights,
        "gradients": FLOAT * trained,
        "Adam's moments": 2 * FLOAT * trained,
        "moving average": FLOAT * trained * ema,
        "autoencoder": FLOAT * vae,
        "gathered weights": rest.gathered + AT_ONCE * max(u.gathered for u in inner),
        # of the rest until the end of the step; of one unit, as computed and as it leaves
        "gradients under way": FLOAT * rest.group * rest.trained + leaving,
        "activations": activations,
    }


def _units(config: ModelConfig, group: int, half: bool, train_text: bool) -> list[_Unit]:
    """As `training.unet` shards the model: its units, and the rest as the last."""
    with torch.device("meta"):
        module = TextAndUNet(MultiViewUNet(config.unet), TextEncoder(config.text))
    module.text.requires_grad_(train_text)
    unet, text = ([list(_parameters(unit)) for unit in units] for units in sharding_units(module))
    taken = {id(p) for unit in unet + text for p in unit}
    rest = [p for p in module.parameters() if id(p) not in taken]
    in_half = [_unit(unit, group, HALF if half else FLOAT) for unit in unet]
    return in_half + [_unit(unit, group, FLOAT) for unit in [*text, rest]]


def _parameters(modules: list[nn.Module]) -> Iterable[nn.Parameter]:
    return (p for module in modules for p in module.parameters())


def _unit(parameters: list[nn.Parameter], group: int, itemsize: int) -> _Unit:
    """FSDP2 cuts each parameter along its first dimension and pads the last pieces."""
    shares = [-(-p.shape[0] // group) * prod(p.shape[1:]) for p in parameters]
    trained = sum(share for share, p in zip(shares, parameters) if p.requires_grad)
    return _Unit(group, sum(shares), trained, itemsize)


@dataclass(frozen=True)
class Flags:
    """Prints a Markdown table of what each process needs and sends: the full-size model, 8 scenes of 4 views a process,
    bf16 and gradient checkpointing, on the meta device.
    """

    worlds: Annotated[tuple[int, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROCESSES ...")] = (1, 8, 64)
    """numbers of processes, each a column of the table"""


def main(flags: Flags) -> None:
    """Prints the table. Raises ArgumentError for a number of processes below 1."""
    worlds = flags.worlds
    for world in worlds:
        if world < 1:
            raise ArgumentError(f"PROCESSES must be at least 1, got {world}; name as many as will train")
    plans = {world: estimate_sharded(SD21, 8, world) for world in worlds}
    names = [name for name in next(iter(plans.values())).memory if name != memory.PROGRAM]
    rows = {name: [gb(plan.memory[name]) for plan in plans.values()] for name in names}
    rows["all, with the program"] = [gb(plan.total) for plan in plans.values()]
    without = [estimate_sharded(SD21, 8, world, checkpointing=False) for world in worlds]
    rows["activations without gradient checkpointing"] = [gb(plan.memory["activations"]) for plan in without]
    rows["received in a step"] = [gb(plan.all_gather) for plan in plans.values()]
    rows["sent in a step"] = [gb(plan.reduce_scatter) for plan in plans.values()]
    rows["collective calls in a step"] = [str(plan.n_collectives) for plan in plans.values()]
    rows["its part of a checkpoint"] = [gb(plan.checkpoint) for plan in plans.values()]
    print("| processes | " + " | ".join(map(str, worlds)) + " |")
    print("|---" * (1 + len(worlds)) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    cli.run(main, Flags, prog="training.sharded_estimate")
