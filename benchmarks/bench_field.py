"""field: the paper's hash grid and its two networks, beside plain torch and beside the machine.

The limit is a bare level-major gather plus the bare multiply-adds of both networks. Plain torch keeps kilobytes a
sample for its backward pass, so it is compared on few samples; ours alone is measured on many.
"""

import functools

import peers_drjit
import pytest
import torch
from contest import BACKWARD, even, faster, memory_a, named, near_limit, passes, size, sizes
from contestants import Contestant
from peers import CUDA, DEVICE, compiled, need, need_gpu
from scenes import FIELD_FLOP, GATHERED_A_SAMPLE, GRADIENT_A_SAMPLE, INSIDE

from mvdream_fast import ops
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig

FEW, MANY = size((1 << 18, 1 << 22) if CUDA else (1 << 16, 1 << 20), (32, 64))
THREADS = sizes((1, 2), (1,))


@functools.cache
def volume() -> Volume:
    return Volume(size(VolumeConfig.paper(), VolumeConfig.mini())).to(DEVICE)


def points(n: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Positions in the box, and cotangents of density and colours."""
    draw = torch.Generator().manual_seed(0)
    positions = (INSIDE * (torch.rand(n, 3, generator=draw) * 2 - 1)).to(DEVICE)
    return positions, [torch.randn(shape, generator=draw).to(DEVICE) for shape in ((n,), (n, 3))]


def call_of(function, n: int, backward: bool):
    """A call on random points; its density and colours, and the gradients of all parameters."""
    v, (positions, d_out) = volume(), points(n)
    arguments = (positions, v.table, [*v.density_weights], [*v.feature_weights], v.spec)

    def call():
        with torch.set_grad_enabled(backward):
            out = function(*arguments)
        return (*out, *torch.autograd.grad(out, [*v.parameters()], d_out)) if backward else out

    return call


def drjit(backward: bool):
    v, (positions, d_out) = volume(), points(FEW)
    weights = [*v.density_weights, *v.feature_weights]
    return peers_drjit.field(positions, v.table, weights, v.spec, d_out if backward else None)


def seen_of_drjit(out):
    v = volume()
    return peers_drjit.field_to_torch(out, [*v.density_weights, *v.feature_weights], v.spec.grid)


def tiny_cuda_nn():
    """Its encoding and fully fused network, in half precision: density and features of one network."""
    need("tinycudann")
    need_gpu("tiny-cuda-nn")
    import tinycudann

    grid = volume().spec.grid
    encoding = {"otype": "HashGrid", "n_levels": 16, "n_features_per_level": 2, "log2_hashmap_size": grid.log2_size}
    encoding |= {"base_resolution": grid.base_resolution, "per_level_scale": grid.growth}
    network = {"otype": "FullyFusedMLP", "activation": "ReLU", "output_activation": "None"}
    network |= {"n_neurons": 64, "n_hidden_layers": 1}
    model = tinycudann.NetworkWithInputEncoding(3, 4, encoding, network)
    positions = torch.rand(FEW, 3, device=DEVICE)
    return lambda: model(positions)


def work(n: float, backward: bool = False) -> dict[str, float]:
    n = int(n)
    factor = GRADIENT_A_SAMPLE if backward else 1
    held = sum(p.numel() * p.element_size() for p in volume().parameters()) if backward else 0
    return {
        "samples": n,
        "flop": factor * FIELD_FLOP * n,
        "gathered_samples": n,
        "gathered_bytes": factor * GATHERED_A_SAMPLE * n,
        "bytes": 28 * factor * n,
        "held_bytes": held,
    }


@pytest.mark.parametrize("backward", BACKWARD)
def bench_field(contest, backward):
    """Beside plain torch, and Dr.Jit's encoding and networks."""
    others = [Contestant("Dr.Jit", functools.partial(drjit, backward), seen_of_drjit)]
    goals = [faster(18, "reference"), faster(1.5, "Dr.Jit")]
    against(contest, "", {"reference": ops.field_ref, "ours": ops.field}, backward, goals, others)


@pytest.mark.parametrize("backward", BACKWARD)
def bench_density(contest, backward):
    """field_density: the density alone, which pruning and the occupancy grid ask for."""
    v, (positions, _) = volume(), points(FEW)

    def of(op):
        return lambda table, *weights: op(positions, table, weights, v.spec)

    factor = GRADIENT_A_SAMPLE if backward else 1
    contest.op(
        f"field_density {FEW} samples",
        {"reference": of(ops.field_density_ref), "ours": of(ops.field_density)},
        [v.table.detach(), *(w.detach() for w in v.density_weights)],
        backward,
        work=work(FEW, backward) | {"flop": factor * 2 * (32 * 64 + 64) * FEW, "bytes": 16 * factor * FEW},
        goals=[faster(18, "reference")],
        tolerance=1e-3,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backward", BACKWARD)
def bench_compiled(contest, backward):
    """Beside plain torch compiled, which takes minutes for 16 levels."""
    by_name = {"reference": ops.field_ref, "torch.compile": compiled(ops.field_ref), "ours": ops.field}
    against(contest, ", compiled", by_name, backward, [faster(5, "torch.compile")])


def against(contest, title: str, by_name, backward: bool, goals, others=()) -> None:
    contestants = [Contestant(name, functools.partial(call_of, op, FEW, backward)) for name, op in by_name.items()]
    contest.run(
        f"field {FEW} samples{title}",
        passes(backward),
        [*contestants, *others],
        work=work(FEW, backward),
        goals=goals,
        tolerance=1e-3,
    )


def bench_tiny_cuda_nn(contest):
    """Other numbers in another precision: only the work is the same, so nothing but shapes is compared."""
    contest.run(
        f"field {FEW} samples, half precision",
        "forward",
        {"ours": functools.partial(call_of, ops.field, FEW, False), "tiny-cuda-nn": tiny_cuda_nn},
        work=work(FEW),
        seen=lambda out: len(out[0]) if isinstance(out, tuple) else len(out),
    )


@pytest.mark.parametrize("backward", BACKWARD)
def bench_threads(contest, backward):
    """Many samples, on one thread and on two."""
    what = passes(backward)
    one, two = (named("ours", n, "threads") for n in (THREADS[0], THREADS[-1]))
    goals = [faster(1.8, one, two), *([] if backward or CUDA else [near_limit(0.6, two)])]
    contest.scale(
        f"field {MANY} samples by threads",
        what,
        "threads",
        {n: {"ours": functools.partial(call_of, ops.field, MANY, backward)} for n in THREADS},
        work=lambda _: work(MANY, backward),
        goals=[*goals, *([memory_a("samples", 64, two)] if backward else [])],
    )


def bench_samples(contest):
    """Linear in the samples: of 10^4 a call every level is fetched from memory for few, which nobody can avoid."""
    counts = sizes((10**4, 10**5, 10**6, 4 * 10**6), (16, 32))
    contest.scale(
        "field by samples",
        "forward",
        "samples",
        {n: {"ours": functools.partial(call_of, ops.field, n, False)} for n in counts},
        work=work,
        goals=[even("samples", counts[0], counts[-1], 1.5), near_limit(0.6, named("ours", counts[0], "samples"))],
    )
