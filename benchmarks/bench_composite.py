"""composite: colours, opacity and depth of rays out of samples, as a march packs them and as many on every ray."""

import functools

import pytest
import torch
from contest import BACKWARD, size, sizes
from peers import compiled, need, need_gpu
from scenes import draw, marched

from mvdream_fast import ops

SIDE, VIEWS = size(64, 8), 1
OPS = {"reference": ops.composite_ref, "ours": ops.composite}


def work(n_samples: int, backward: bool) -> dict[str, float]:
    """A sample is read as 6 floats and written as its weight; its gradient takes 11 more."""
    factor = 3 if backward else 1
    return {"samples": n_samples, "flop": 30 * factor * n_samples, "bytes": 4 * (18 if backward else 7) * n_samples}


def nerfacc_packed(sigmas, rgb, t_starts, t_ends, packed_info):
    need("nerfacc")
    need_gpu("nerfacc's packed rendering")
    import nerfacc

    n_rays = len(packed_info)
    rays = torch.repeat_interleave(torch.arange(n_rays, device=sigmas.device), packed_info[:, 1])
    weights, _, _ = nerfacc.render_weight_from_density(t_starts, t_ends, sigmas, ray_indices=rays, n_rays=n_rays)
    per_ray = functools.partial(nerfacc.accumulate_along_rays, weights, ray_indices=rays, n_rays=n_rays)
    return per_ray(rgb), per_ray(None)[:, 0], per_ray(0.5 * (t_starts + t_ends)[:, None])[:, 0]


def colors_of(op, *samples):
    out = op(*samples[:4], packed_info=samples[4])
    return out.rgb, out.opacity, out.depth


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("share", ["10 %", "full"])
def bench_composite(contest, share, backward):
    samples = marched(VIEWS, SIDE, share)
    n = samples.n_samples
    leaves = [20 * draw(n), draw(n, 3, seed=1), samples.t_starts, samples.t_ends, samples.packed_info]
    contest.op(
        f"composite {VIEWS}x{SIDE}x{SIDE} {share}",
        {name: functools.partial(colors_of, op) for name, op in OPS.items()} | {"nerfacc": nerfacc_packed},
        leaves,
        backward,
        differentiable=(0, 1),
        work=work(n, backward),
    )


def dense_torch(sigmas, rgb, t_starts, t_ends):
    """What one writes in torch where every ray has as many samples: [R, n]."""
    thick = sigmas * (t_ends - t_starts)
    weights = torch.exp(thick - thick.cumsum(-1)) * -torch.expm1(-thick)
    return (weights[..., None] * rgb).sum(1), weights.sum(1), (weights * 0.5 * (t_starts + t_ends)).sum(1)


def dense_nerfacc(sigmas, rgb, t_starts, t_ends):
    need("nerfacc")
    import nerfacc

    weights, _, _ = nerfacc.render_weight_from_density(t_starts, t_ends, sigmas)
    per_ray = functools.partial(nerfacc.accumulate_along_rays, weights)
    return per_ray(rgb), per_ray(None)[:, 0], per_ray(0.5 * (t_starts + t_ends)[..., None])[:, 0]


def dense_ours(packed_info, sigmas, rgb, t_starts, t_ends):
    flat = [x.flatten(0, 1) for x in (sigmas, rgb, t_starts, t_ends)]
    return colors_of(ops.composite, *flat, packed_info)


def dense(n_rays: int, a_ray: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    edges = torch.linspace(2, 4, a_ray + 1).expand(n_rays, -1)
    starts = torch.arange(n_rays) * a_ray
    packed = torch.stack([starts, torch.full_like(starts, a_ray)], 1)
    sigmas, rgb = 20 * draw(n_rays, a_ray), draw(n_rays, a_ray, 3, seed=1)
    ends = [x.contiguous().to(sigmas.device) for x in (edges[:, :-1], edges[:, 1:])]
    return [sigmas, rgb, *ends], packed.to(sigmas.device)


@pytest.mark.parametrize("backward", BACKWARD)
def bench_dense(contest, backward):
    """The same number of samples on every ray, where nerfacc runs on a CPU, too."""
    n_rays, a_ray = size((4096, 64), (16, 4))
    leaves, packed = dense(n_rays, a_ray)
    contest.op(
        f"composite dense {n_rays}x{a_ray}",
        {
            "reference": dense_torch,
            "torch.compile": compiled(dense_torch),
            "nerfacc": dense_nerfacc,
            "ours": functools.partial(dense_ours, packed),
        },
        leaves,
        backward,
        differentiable=(0, 1),
        work=work(n_rays * a_ray, backward),
    )


def bench_samples(contest):
    """Forward, by samples."""

    def make(n, op):
        leaves, packed = dense(n // 64, 64)
        return lambda: op(*[x.flatten(0, 1) for x in leaves], packed)

    by_name = {name: functools.partial(colors_of, op) for name, op in OPS.items()}
    counts = sizes((64 << 8, 64 << 11, 64 << 14), (64, 128))
    contest.scale(
        "composite by samples",
        "forward",
        "samples",
        {n: {name: functools.partial(make, n, op) for name, op in by_name.items()} for n in counts},
        work=lambda n: work(int(n), False),
    )
