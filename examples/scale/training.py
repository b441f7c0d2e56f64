"""A training step on many GPUs by its parts, and a whole training with its failures, simulated.

The parts of a step are worked out from bytes and operations that are counted on the meta device; times of steps,
failures and checkpoints are drawn. All GPUs wait for the slowest in every step, and for each other's restarts.
"""

from dataclasses import dataclass
from functools import cache
from math import ceil, inf, log2, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from scale.inputs import Inputs

if TYPE_CHECKING:
    from mvdream_fast.training.sharded_estimate import ShardedEstimate

SHARE_OF_MEMORY = 0.8  # of a GPU, that a step may fill
LAUNCHES = 3  # a step has as many launches as so many forwards


@dataclass(frozen=True)
class Plan:
    """Of one of `world` GPUs, `group` of which share a model: operations and bytes of activations of one scene; bytes
    that stay in memory; of one batch, bytes of all-gathers and reduce-scatters and their number; of one step, bytes of
    all-reduces and their number; bytes of a checkpoint of all together."""

    world: int
    group: int
    flops: float
    activations: float
    resident: float
    all_gather: float
    reduce_scatter: float
    n_gathers: int
    all_reduce: float
    n_reduces: int
    checkpoint: float


def counted(world: int, group: int) -> Plan:
    """Of the 867 M UNet with a frozen text tower in bfloat16, as the package itself plans it on the meta device."""
    one, alone = _estimated(world, group), _estimated(group, group)
    shared = group > 1
    return Plan(
        world=world,
        group=group,
        flops=one.flops,
        activations=one.memory["activations"],
        resident=one.total - one.memory["activations"],
        all_gather=one.all_gather,
        reduce_scatter=one.reduce_scatter,
        n_gathers=alone.n_collectives if shared else 0,
        all_reduce=one.all_reduce,
        n_reduces=one.n_collectives - alone.n_collectives,
        checkpoint=one.checkpoint * group,
    )


@cache
def _estimated(world: int, group: int) -> "ShardedEstimate":
    from mvdream_fast.models.config import SD21
    from mvdream_fast.training.sharded_estimate import estimate_sharded

    return estimate_sharded(SD21, 1, world, group=group, checkpointing=False, train_text=False)


@dataclass(frozen=True)
class Step:
    """Seconds of one step by its parts, in which nobody is late."""

    ranks: int  # GPUs that work; more have nothing to do
    computing: float
    communicating: float
    waiting: float  # of the latter, what no computation hides
    memory: float  # bytes

    @property
    def seconds(self) -> float:
        return self.computing + self.waiting


def usable(gpus: int, scenes: int) -> int:
    """The largest number of ranks that divides a batch, as `train` asks for."""
    return max(n for n in range(1, min(gpus, scenes) + 1) if scenes % n == 0)


def rate(inputs: Inputs, flops: float) -> float:
    """Operations a second that the UNet's kernels were measured to reach: 8 images forward, a forward being a third of
    the `flops` of a scene of 4."""
    return 2 * flops / 3 / (inputs.guided_ms * 1e-3)


def step(inputs: Inputs, plan: Plan, graphs: bool = False) -> Step:
    """One step of the whole batch; with CUDA `graphs` nothing waits for launches."""
    scenes = inputs.scenes / plan.world
    fit = max(1.0, (SHARE_OF_MEMORY * inputs.gpu_gb * 1e9 - plan.resident) // plan.activations)
    batches = ceil(scenes / min(fit, scenes))
    busy = scenes * (plan.flops / rate(inputs, plan.flops) + 4 * inputs.encode_ms * 1e-3)
    launching = 0.0 if graphs else batches * LAUNCHES * inputs.launch_ms * 1e-3
    computing = max(busy, launching)
    communicating = batches * gathered(inputs, plan) + reduced(inputs, plan)
    # The first unit's gather and the last one's reduction have nothing to hide behind.
    edges = 2 * communicating / max(plan.n_gathers + plan.n_reduces, 2)
    waiting = edges + max(communicating - edges - computing, 0.0)
    memory = plan.resident + min(fit, scenes) * plan.activations
    return Step(plan.world, computing, communicating, waiting, memory)


def gathered(inputs: Inputs, plan: Plan) -> float:
    """Seconds of the all-gathers and reduce-scatters of one batch: rings, over a node's cards where they leave it."""
    if plan.group == 1:
        return 0.0
    within = plan.group <= inputs.gpus_per_node
    bandwidth = inputs.nvlink_gb_s if within else min(inputs.nvlink_gb_s, inputs.node_net_gb_s)
    hops = (plan.group - 1) * inputs.hop_us * 1e-6
    return (plan.all_gather + plan.reduce_scatter) / (bandwidth * 1e9 * inputs.network_share) + plan.n_gathers * hops


def reduced(inputs: Inputs, plan: Plan) -> float:
    """Seconds of the all-reduces of a step between the copies of a model: trees, each GPU by its share of the cards."""
    copies = plan.world // plan.group
    if copies == 1:
        return 0.0
    within = plan.world <= inputs.gpus_per_node
    sharing = min(plan.group, inputs.gpus_per_node)  # GPUs of a node that exchange different parts at once
    bandwidth = inputs.nvlink_gb_s if within else inputs.node_net_gb_s / sharing
    hops = 2 * ceil(log2(copies)) * inputs.hop_us * 1e-6
    return plan.all_reduce / (bandwidth * 1e9 * inputs.network_share) + plan.n_reduces * hops


def slowest(n: int, deviation: float, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` times the largest of 1 and `n` normal paces around 1: drawn from its distribution at once."""
    top = random.random(count) ** (1 / n)
    normal = NormalDist()
    return np.maximum(1 + deviation * np.array([normal.inv_cdf(min(u, 1 - 1e-16)) for u in top]), 1.0)


@dataclass(frozen=True)
class Training:
    """What a run took, in seconds; `again` are steps that were made and lost."""

    seconds: float
    stepping: float
    checkpoints: float
    again: float
    restarts: float
    failures: int


def train(
    durations: np.ndarray, interval: float, checkpoint: float, restart: float, mtbf: float, random: np.random.Generator
) -> Training:
    """Steps one after the other, each as long as it is told, with a checkpoint of that many seconds whenever `interval`
    seconds of work have passed. A failure (of any node, `mtbf` seconds apart on average; they come during checkpoints
    and restarts, too) goes back to the last checkpoint, after a restart."""
    ends = np.cumsum(durations)
    marks = np.searchsorted(ends, np.arange(1, int(ends[-1] / interval) + 1) * interval)
    stops = np.unique(np.append(marks[marks < len(ends) - 1], len(ends) - 1))
    clock = again = restarts = written = 0.0
    failures = 0
    fails = random.exponential(mtbf) if mtbf < inf else inf
    begun = 0.0
    for stop in stops:
        work = float(ends[stop]) - begun
        wanted = work + (checkpoint if stop < len(ends) - 1 else 0.0)
        while clock + wanted > fails:
            again += fails - clock
            failures, clock = failures + 1, fails
            fails = clock + random.exponential(mtbf)
            while clock + restart > fails:  # a failure during the restart begins it again
                restarts += fails - clock
                failures, clock = failures + 1, fails
                fails = clock + random.exponential(mtbf)
            clock, restarts = clock + restart, restarts + restart
        clock, written, begun = clock + wanted, written + wanted - work, float(ends[stop])
    return Training(clock, float(ends[-1]), written, again, restarts, failures)


def young(checkpoint: float, mtbf: float) -> float:
    """Seconds of work between checkpoints that lose the least (Young 1974)."""
    return sqrt(2 * checkpoint * mtbf)


def daly(work: float, interval: float, checkpoint: float, restart: float, mtbf: float) -> float:
    """Expected seconds of `work` with failures (Daly 2006, equation 13, exact for exponential failures)."""
    part = mtbf * np.exp(restart / mtbf) * np.expm1((interval + checkpoint) / mtbf)
    return float(part * work / interval)
