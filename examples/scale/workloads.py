"""The three jobs as the simulation takes them, worked out from the inputs: what one asset, one part of the meshes and
one training cost, and which choices make them scale."""

from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import numpy as np

from scale import training
from scale.fleet import Jobs, Machines, Outcome, simulate
from scale.inputs import Inputs

HOUR = 3600.0
LUMPS = 2  # checkpoints of an asset that are simulated one by one; more are written in as many lumps of as many bytes
PARTS_PER_NODE = 4  # of the meshes: `render --shard i/n`
STEPS_64, STEPS_256 = (32768, 16, 8), (262144, 8, 4)  # rays, images of the UNet's call, images of the VAE's


@dataclass(frozen=True)
class Choices:
    """What can be chosen; the defaults are what this page advises.

    folder: the model is a converted folder that the workers of a node read once; else the released file, by each.
    checkpoint_every: steps of an asset. spread, beats_apart, named_events: workers that were too late for a job try any
    other; look for dead ones when nothing else is free; learn from names what happened, and read little. small_parts:
    meshes come in several parts for each node; else in one. listed: the folder of meshes is listed; else every file of
    it is asked for, too. sharing: "ddp", "hsdp" or "fsdp2". sharded: every node writes its part of a training's
    checkpoint; else the first does. graphs: steps of several processes are CUDA graphs.
    """

    folder: bool = True
    checkpoint_every: int = 2000
    spread: bool = True
    beats_apart: bool = True
    named_events: bool = True
    small_parts: bool = True
    listed: bool = True
    sharing: str = "hsdp"
    sharded: bool = True
    graphs: bool = False


def sds_step(inputs: Inputs) -> tuple[float, float]:
    """Seconds of a step of either half of an asset."""

    def one(rays: int, images: int, encoded: int) -> float:
        sampled = rays * inputs.samples_per_ray * inputs.sample_ns * 1e-9
        return sampled + (inputs.unet_ms * images / 8 + inputs.vae_ms * encoded / 4) * 1e-3

    return one(*STEPS_64), one(*STEPS_256)


def asset_seconds(inputs: Inputs) -> float:
    """Of one asset, on average."""
    return inputs.sds_steps * sum(sds_step(inputs)) / 2 + inputs.export_s


def machines(inputs: Inputs, gpus: int, choices: Choices) -> Machines:
    """Single GPUs as workers."""
    return Machines(
        gpus=gpus,
        per_node=inputs.gpus_per_node,
        mtbf=inputs.node_hours * HOUR,
        repair=inputs.repair_min * 60,
        start=inputs.start_s,
        load=(inputs.folder_gb if choices.folder else inputs.released_gb) * 1e9,
        load_each=not choices.folder,
        link=inputs.store_gb_s * 1e9,
        node_link=inputs.node_store_gb_s * 1e9,
        operations=inputs.store_ops,
        latency=inputs.store_latency_ms * 1e-3,
        expiry=inputs.expiry_s,
        same_order=not choices.spread,
        read_beats=not choices.beats_apart,
        read_events=not choices.named_events,
        slowness=inputs.slowness,
    )


def batch(inputs: Inputs, gpus: int, choices: Choices, seed: int = 0) -> Outcome:
    """Text to 3D of all prompts."""
    mean = asset_seconds(inputs)
    random = np.random.default_rng(seed)
    seconds = np.maximum(random.normal(mean, inputs.asset_cv * mean, inputs.prompts), 0.1 * mean)
    checkpoints = inputs.sds_steps / choices.checkpoint_every
    lump = max(1.0, checkpoints / LUMPS)
    jobs = Jobs(
        seconds=seconds.tolist(),
        write=inputs.asset_mb * 1e6,
        state=inputs.volume_mb * 1e6 * lump,
        interval=mean / checkpoints * lump,
    )
    return simulate(jobs, machines(inputs, gpus, choices), seed)


def render(inputs: Inputs, gpus: int, choices: Choices, seed: int = 0) -> Outcome:
    """Multi-view images of all meshes. A worker is a node, which draws one part with all its cores: processors do the
    work, a GPU is hardly used."""
    nodes, cores = ceil(gpus / inputs.gpus_per_node), min(gpus, inputs.gpus_per_node) * inputs.cores_per_gpu
    parts = nodes * (PARTS_PER_NODE if choices.small_parts else 1)
    random = np.random.default_rng(seed)
    mu = np.log(inputs.mesh_core_s) - inputs.mesh_sigma**2 / 2
    ends = np.linspace(0, inputs.meshes, parts + 1).astype(int)
    seconds = []
    for n in np.diff(ends):
        each = random.lognormal(mu, inputs.mesh_sigma, n)
        seconds.append(max(float(each.sum()) / cores, float(each.max())))
    size = inputs.meshes / parts
    jobs = Jobs(
        seconds=seconds,
        start=inputs.start_s,
        operations=inputs.meshes * (1 / 1000 if choices.listed else 1.0),
        read=2 * inputs.mesh_mb * 1e6 * size,  # a mesh is looked at, then drawn
        write=inputs.mesh_out_mb * 1e6 * size,
        interval=float(np.mean(seconds)) / min(size / 16, LUMPS),  # finished shards of 16 meshes stay
        queued=False,
    )
    workers = replace(machines(inputs, nodes, choices), per_node=1, start=0.0, load=0.0, expiry=0.0)
    return simulate(jobs, workers, seed)


@cache
def plan(world: int, sharing: str, per_node: int) -> training.Plan:
    """Of a GPU, as the way of sharing says how many hold one model together."""
    group = {"ddp": 1, "hsdp": min(world, per_node), "fsdp2": world}[sharing]
    return training.counted(world, group)


def checkpoint_seconds(inputs: Inputs, world: int, n_bytes: float, sharded: bool) -> float:
    """Until a training's checkpoint is on the store, while nobody computes."""
    nodes = ceil(world / inputs.gpus_per_node)
    return n_bytes / (min(inputs.store_gb_s, inputs.node_store_gb_s * (nodes if sharded else 1)) * 1e9)


@dataclass(frozen=True)
class Trained:
    """A training of so many steps on `ranks` of the GPUs; a failure is to be expected every `mtbf` seconds."""

    steps: int
    ranks: int
    mtbf: float
    step: training.Step
    plan: training.Plan
    interval: float
    checkpoint: float
    run: training.Training

    @property
    def losses(self) -> dict[str, float]:
        """Seconds by what they were lost to, but for computing that waits for launches."""
        return {
            "communication": self.steps * self.step.waiting,
            "the slowest GPU": self.run.stepping - self.steps * self.step.seconds,
            "checkpoints": self.run.checkpoints,
            "failures": self.run.again + self.run.restarts,
        }


def train(inputs: Inputs, gpus: int, choices: Choices, seed: int = 0) -> Trained:
    """The whole training, with checkpoints as often as Young's formula says."""
    ranks = training.usable(gpus, inputs.scenes)
    planned = plan(ranks, choices.sharing, inputs.gpus_per_node)
    step = training.step(inputs, planned, choices.graphs)
    random = np.random.default_rng(seed)
    durations = step.seconds * training.slowest(ranks, inputs.slowness, inputs.train_steps, random)
    mtbf = inputs.node_hours * HOUR / ceil(ranks / inputs.gpus_per_node)
    checkpoint = checkpoint_seconds(inputs, ranks, planned.checkpoint, choices.sharded)
    interval = training.young(checkpoint, mtbf)
    restart = inputs.restart_min * 60 + inputs.start_s + checkpoint  # which reads as much
    run = training.train(durations, interval, checkpoint, restart, mtbf, random)
    return Trained(inputs.train_steps, ranks, mtbf, step, planned, interval, checkpoint, run)
