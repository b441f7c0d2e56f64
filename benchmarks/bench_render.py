"""render: an image of a field without gradients, with a tenth of the grid occupied and all of it."""

import functools

import pytest
from contest import even, faster, size, sizes, within
from peers import DEVICE
from scenes import BOX, CELLS, FIELD_FLOP, STEP, Ball, grid_of, rays_of

from mvdream_fast import ops
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig


def image(op, field, side, share):
    rays, bits = rays_of(1, side), grid_of(share).to(DEVICE)
    return lambda: op(rays.rays_o, rays.rays_d, field, BOX, bits, CELLS, STEP, None, alpha_thre=0.01)


def pixels(out):
    return out.rgb, out.opacity, out.depth


def work(n_samples: int, config: VolumeConfig) -> dict[str, float]:
    """What the field needs: its networks at every sample, and its levels' vertices."""
    spec = Volume(config).spec.grid
    gathered = 8 * 4 * spec.n_features * spec.n_levels * n_samples
    return {"samples": n_samples, "flop": FIELD_FLOP * n_samples, "gathered_bytes": gathered}


@pytest.mark.parametrize("name", ["paper", "mini"])
def bench_render(contest, name):
    """A ball in 512 x 512 pixels, by a grid that knows where it is."""
    side, config = size(512, 8), getattr(VolumeConfig, name)()
    make = functools.partial(image, ops.render, Ball(config).to(DEVICE), side, "10 %")
    contest.run(
        f"render {side}x{side} {name}",
        "forward",
        {"ours": make},
        work=work(make()().n_samples, config),
        goals=[within(1.0)],
        seen=pixels,
    )


def bench_emptiness(contest):
    """The same by a grid that knows and by one that does not."""
    side, field = size(128, 8), Ball(size(VolumeConfig.paper(), VolumeConfig.mini())).to(DEVICE)
    contest.run(
        f"render {side}x{side} by occupancy",
        "forward",
        {f"ours, {share}": functools.partial(image, ops.render, field, side, share) for share in ("full", "10 %")},
        work={"pixels": side * side},
        goals=[faster(5, "ours, full", "ours, 10 %")],
        seen=lambda out: out.opacity.mean(),
        tolerance=0.01,  # where the grid cuts the ball's edge
    )


def bench_view(contest):
    """A volume as it is, which a kernel can evaluate on a GPU where a field in Python is called."""
    side, config = size(512, 8), size(VolumeConfig.paper(), VolumeConfig.mini())
    make = functools.partial(image, ops.render, Volume(config).to(DEVICE), side, "10 %")
    contest.run(
        f"render {side}x{side} of a volume", "forward", {"ours": make}, work(make()().n_samples, config), seen=pixels
    )


def bench_reference(contest):
    """Beside plain torch, at a size that it has patience for."""
    side, config = size(64, 8), VolumeConfig.mini()
    field = Ball(config).to(DEVICE)
    by_name = {"reference": ops.render_ref, "ours": ops.render}
    contest.run(
        f"render {side}x{side} mini",
        "forward",
        {name: functools.partial(image, op, field, side, "10 %") for name, op in by_name.items()},
        work=work(image(ops.render, field, side, "10 %")().n_samples, config),
        goals=[faster(2, "reference")],
        seen=pixels,
    )


def bench_resolution(contest):
    """By pixels; linear in them is the most that it may be."""
    field = Ball(VolumeConfig.mini()).to(DEVICE)
    sides = sizes((64, 128, 256, 512), (4, 8))
    contest.scale(
        "render mini by pixels",
        "forward",
        "pixels",
        {side**2: {"ours": functools.partial(image, ops.render, field, side, "10 %")} for side in sides},
        goals=[even("pixels", max(sides) ** 2, min(sides) ** 2, 1.1)],
        seen=pixels,
    )
